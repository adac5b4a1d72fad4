import { defineConfig } from 'vitest/config';

// A process for each file: an engine of its own, and a crash costs one file.
const common = { pool: 'forks', setupFiles: ['test/device.ts', 'test/leaks.ts'], hookTimeout: 60_000 } as const;
// What every device does: the table of ops, graphs, and whole runs.
const everywhere = ['test/ops/*.test.ts', 'test/tensor/graph.test.ts', 'test/cuda/*.test.ts'];

export default defineConfig({
  test: {
    projects: [
      { test: { name: 'cpu', include: ['test/**/*.test.ts'], exclude: ['test/cuda/**'], testTimeout: 30_000, ...common } },
      {
        test: {
          name: 'emulated',
          include: everywhere,
          env: { LIMBECK_TEST_DEVICE: 'emulated' },
          testTimeout: 120_000,
          // The emulator computes on one thread, the CPU's tests on all: those go first, a file at a time.
          maxWorkers: 2,
          sequence: { groupOrder: 1 },
          ...common,
        },
      },
      // Only by its name: npm run test:gpu.
      ...(process.env.LIMBECK_TEST_DEVICE === 'cuda'
        ? [{ test: { name: 'gpu', include: everywhere, testTimeout: 120_000, ...common } }]
        : []),
    ],
  },
});
