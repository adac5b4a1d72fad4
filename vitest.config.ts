import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    // A process for each file: an engine of its own, and a crash costs one file.
    pool: 'forks',
    setupFiles: ['test/device.ts', 'test/leaks.ts'],
    testTimeout: 30_000,
    hookTimeout: 60_000,
  },
});
