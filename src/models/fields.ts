// Fields of a config.json, read with the error that names them.
import { FormatError } from '../tensor/errors.ts';

/** The object of a config.json, or one inside it. */
export interface Fields {
  readonly where: string;
  readonly values: Readonly<Record<string, unknown>>;
  /** A number; the fallback where it is absent or null. */
  number(field: string, fallback?: number): number;
  /** How many layers: a whole number that no file can make absurd. */
  layers(field: string, fallback?: number): number;
  /** A number, or null where the file says null; the fallback where it is absent. */
  optional(field: string, fallback?: number | null): number | null;
  flag(field: string, fallback: boolean): boolean;
  /** Fields of an object inside; undefined where it is absent or null. */
  inside(field: string): Fields | undefined;
  /** Throws unless the field is absent, null, or one of these. */
  only(field: string, ...allowed: readonly unknown[]): void;
  refuse(field: string, expected: string): never;
}

/** @param where the file, for errors */
export function fieldsOf(json: unknown, where: string, path = ''): Fields {
  const refuse = (field: string, expected: string, actual: unknown): never => {
    throw new FormatError(`${where}: ${path}${field} is ${JSON.stringify(actual)}, expected ${expected}`, {
      code: 'ERR_CHECKPOINT',
      op: 'loadModel',
      argument: `${path}${field}`,
      expected,
      actual: String(JSON.stringify(actual)),
    });
  };
  if (typeof json !== 'object' || json === null || Array.isArray(json))
    return refuse(path === '' ? 'the file' : '', 'an object', json);
  const values = json as Record<string, unknown>;
  const number = (field: string, fallback?: number): number => {
    const value = values[field] ?? fallback;
    return typeof value === 'number' && Number.isFinite(value) ? value : refuse(field, 'a number', values[field]);
  };
  return {
    where,
    values,
    number,
    layers(field, fallback) {
      const value = number(field, fallback);
      return Number.isInteger(value) && value >= 1 && value <= 10_000
        ? value
        : refuse(field, 'a whole number from 1 to 10,000', value);
    },
    optional(field, fallback = null) {
      if (values[field] === null) return null;
      return values[field] === undefined && fallback === null ? null : number(field, fallback ?? undefined);
    },
    flag(field, fallback) {
      const value = values[field] ?? fallback;
      return typeof value === 'boolean' ? value : refuse(field, 'true or false', value);
    },
    inside(field) {
      return values[field] === undefined || values[field] === null
        ? undefined
        : fieldsOf(values[field], where, `${path}${field}.`);
    },
    only(field, ...allowed) {
      const value = values[field];
      if (value === undefined || value === null || allowed.includes(value)) return;
      refuse(field, `${allowed.map((one) => JSON.stringify(one)).join(' or ')}: limbeck computes nothing else here`, value);
    },
    refuse: (field, expected) => refuse(field, expected, values[field]),
  };
}
