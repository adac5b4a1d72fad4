// Where the table of op tests runs: LIMBECK_TEST_DEVICE is `cpu` (the default), `emulated` (the CUDA kernels on this processor, exact
// about what a GPU would not forgive) or `cuda`. Tests that are about the CPU's engine or about files run there whatever it says.
import { join } from 'node:path';
import { init } from '../src/tensor/engine.ts';

/** What LIMBECK_TEST_DEVICE says. */
export const testDevice = process.env.LIMBECK_TEST_DEVICE ?? 'cpu';

if (testDevice === 'emulated') {
  process.env.LIMBECK_CUDA_PATH ??= join(import.meta.dirname, '..', 'build', 'Release', 'limbeck_cuda_emulated.so');
}
if (testDevice !== 'cpu') init({ device: 'cuda' });
