import { expect } from 'vitest';
import { LimbeckError } from '../src/tensor/errors.ts';

/** The typed error that a promise ends with. */
export async function rejection(promise: Promise<unknown>): Promise<LimbeckError> {
  const error = await promise.then(
    () => undefined,
    (reason) => reason,
  );
  expect(error).toBeInstanceOf(LimbeckError);
  return error;
}
