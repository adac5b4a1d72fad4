// What plans know of devices.

import { copy } from '../ops/elementwise.ts';
import { memory, type PlannedDevice, profile, shutdown, started, whileOn } from '../tensor/engine.ts';
import { ConfigError } from '../tensor/errors.ts';
import { backendInfo } from '../tensor/info.ts';
import { op } from '../tensor/op.ts';
import { scope } from '../tensor/scope.ts';
import { empty } from '../tensor/tensor.ts';

const GB = 1e9;
const T = 1e12;

function gpu(
  memory: number,
  flops: number,
  fastFlops: number,
  bandwidth: number,
  architecture: number,
  processors: number,
): PlannedDevice {
  return { kind: 'cuda', memory, flops, fastFlops, bandwidth, architecture, processors };
}

/** GPUs by name, with the figures of their data sheets: dense bf16 and fp8 (bf16 where there is none), memory and its speed. */
export const plannedDevices = {
  h100: gpu(85.5 * GB, 989 * T, 1979 * T, 3.35 * T, 90, 132),
  h200: gpu(150.8 * GB, 989 * T, 1979 * T, 4.8 * T, 90, 132),
  'a100-80gb': gpu(85.1 * GB, 312 * T, 312 * T, 2.04 * T, 80, 108),
  'a100-40gb': gpu(42.4 * GB, 312 * T, 312 * T, 1.56 * T, 80, 108),
  l40s: gpu(47.7 * GB, 362 * T, 733 * T, 0.864 * T, 89, 142),
  'rtx-4090': gpu(25.3 * GB, 165 * T, 330 * T, 1.01 * T, 89, 128),
  'rtx-3090': gpu(25.3 * GB, 71 * T, 71 * T, 0.936 * T, 86, 82),
} as const satisfies Record<string, PlannedDevice>;

/**
 * A device by name: one of {@link plannedDevices}, `cpu` for this machine, `cuda` for its first GPU.
 * @throws ConfigError for another name, or `cuda` without a GPU.
 */
export async function plannedDevice(name: string): Promise<PlannedDevice> {
  if (Object.hasOwn(plannedDevices, name)) return plannedDevices[name as keyof typeof plannedDevices];
  if (name === 'cpu') return thisProcessor();
  const known = ['cpu', 'cuda', ...Object.keys(plannedDevices)].join(', ');
  if (name !== 'cuda') throw unknown(name, known);
  const found = backendInfo().cuda.devices[0];
  if (found === undefined) throw unknown('cuda', `one of ${known}; there is no GPU here to take the figures from`);
  const [, sheet] =
    Object.entries(plannedDevices).find(([key]) =>
      found.name.toLowerCase().replaceAll(' ', '-').includes(key.split('-80')[0]!),
    ) ?? [];
  const base = sheet ?? plannedDevices['rtx-3090'];
  return {
    ...base,
    memory: found.memory,
    processors: found.processors,
    architecture: Math.round(Number(found.architecture) * 10),
  };
}

function unknown(name: string, expected: string): ConfigError {
  return new ConfigError(`plan: there is no device '${name}' to plan for; give ${expected}`, {
    code: 'ERR_CONFIG',
    op: 'plan',
    argument: 'device',
    expected,
    actual: name,
  });
}

const peakFlops = op({ forward: 'peak_flops(rounds) -> flops[]:f64' });
const ROUNDS = 400;
const COPIED = 1 << 24;

/** This machine, measured for some tens of milliseconds. */
async function thisProcessor(): Promise<PlannedDevice> {
  const before = started();
  try {
    return await whileOn('cpu', async () => {
      const spent = async (name: string, f: () => unknown): Promise<number> => {
        const times = await profile(() => scope(f) as undefined);
        return times.find((t) => t.op === name)!.seconds;
      };
      const done = peakFlops(ROUNDS)[0]!;
      const flops = await done.item();
      done.dispose();
      const computing = await spent('peak_flops', () => void peakFlops(ROUNDS));
      // An engine that is short of memory is measured, too.
      const { limit, live } = memory('cpu');
      const copied = Math.min(COPIED, Math.floor((limit - live) / 32));
      const from = empty([copied]);
      await spent('copy', () => void copy(from)); // touches the pages
      const copying = await spent('copy', () => void copy(from));
      from.dispose();
      const info = backendInfo();
      const speed = flops / computing;
      return {
        kind: 'cpu',
        flops: speed,
        fastFlops: speed,
        bandwidth: (2 * 4 * copied) / copying,
        memory: limit,
        threads: info.cpu.threads,
      };
    });
  } finally {
    if (!before) shutdown();
  }
}
