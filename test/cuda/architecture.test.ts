// What a machine may lack, found before anything is computed.
import { beforeEach, expect, test } from 'vitest';
import { init, shutdown } from '../../src/tensor/engine.ts';
import { DeviceError } from '../../src/tensor/errors.ts';
import { tensor } from '../../src/tensor/tensor.ts';
import { testDevice } from '../device.ts';

beforeEach(shutdown);

test.skipIf(testDevice !== 'emulated')('a GPU that is too old is refused with what is needed', () => {
  process.env.LIMBECK_EMULATE_ARCHITECTURE = '75';
  try {
    expect(() => init({ device: 'cuda' })).toThrow(DeviceError);
    expect(() => init({ device: 'cuda' })).toThrow(/compute capability 7\.5, 8\.0 or newer is needed/);
  } finally {
    delete process.env.LIMBECK_EMULATE_ARCHITECTURE;
  }
});

test('what failed leaves the CPU to work with', async () => {
  using x = tensor([1, 2]);
  expect(x.device).toBe('cpu');
  expect([...(await x.read())]).toEqual([1, 2]);
});
