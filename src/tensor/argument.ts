// Arguments that TypeScript refuses, for callers without it: what was expected, instead of what JavaScript could not read.
import { ConfigError } from './errors.ts';

const kindOf = (value: unknown): string => (value === null ? 'null' : Array.isArray(value) ? 'a list' : typeof value);

function refuse(op: string, argument: string, value: unknown, expected: string, actual = kindOf(value)): never {
  throw new ConfigError(`${op}: ${argument} is ${actual}, expected ${expected}`, {
    ...{ code: 'ERR_ARGUMENT', op, argument, expected, actual },
  });
}

/** @throws ConfigError `ERR_ARGUMENT` for what is no text */
export function checkText(op: string, argument: string, value: unknown, expected: string): void {
  if (typeof value !== 'string') refuse(op, argument, value, expected);
}

/** @throws ConfigError `ERR_ARGUMENT` for what is no function */
export function checkFunction(op: string, argument: string, value: unknown): void {
  if (typeof value !== 'function') refuse(op, argument, value, 'a function');
}

/** @throws ConfigError `ERR_ARGUMENT` for what is no list of numbers: an array or a typed array */
export function checkNumbers(op: string, argument: string, value: unknown, expected: string): void {
  if (!Array.isArray(value) && !(ArrayBuffer.isView(value) && !(value instanceof DataView)))
    refuse(op, argument, value, expected);
}

/** @throws ConfigError `ERR_ARGUMENT` for what is none of the `choices` */
export function checkChoice(op: string, argument: string, value: unknown, choices: readonly string[]): void {
  if (choices.includes(value as string)) return;
  refuse(op, argument, value, `one of ${choices.join(', ')}`, typeof value === 'string' ? `'${value}'` : undefined);
}

/** @throws ConfigError `ERR_ARGUMENT` for what is no object, or one without the `fields` */
export function checkObject(op: string, argument: string, value: unknown, expected: string, ...fields: readonly string[]): void {
  if (typeof value !== 'object' || value === null) refuse(op, argument, value, expected);
  const missing = fields.find((field) => (value as Record<string, unknown>)[field] === undefined);
  if (missing !== undefined) {
    throw new ConfigError(`${op}: ${argument} has no ${missing}, expected ${expected}`, {
      ...{ code: 'ERR_ARGUMENT', op, argument, expected, actual: `an object without ${missing}` },
    });
  }
}

/** @throws ConfigError `ERR_ARGUMENT` for what is no model */
export const checkModel = (op: string, value: unknown): void =>
  checkObject(op, 'model', value, 'a model, as createModel and loadModel give it', 'config', 'parameters', 'hidden');
