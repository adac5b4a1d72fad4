// After each test: as many tensors are alive as before it, so what a test makes it frees, and so does what it calls.
import { afterEach, beforeEach, expect } from 'vitest';
import { memory } from '../src/tensor/engine.ts';

let before = 0;
beforeEach(() => {
  before = memory().tensors;
});
afterEach(({ task }) => {
  // A test that failed could not clean up.
  if (task.result?.state !== 'fail')
    expect(memory().tensors, 'tensors alive after the test; LIMBECK_LEAKS=1 tells where they were made').toBe(before);
});
