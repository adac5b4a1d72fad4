// What the fields of a row must hold.

export type Fields = Readonly<Record<string, unknown>>;

/** What is wrong with a row. */
export class RowError extends Error {
  readonly field: string;
  constructor(field: string, reason: string) {
    super(reason);
    this.field = field;
  }
}

/** What a row says of a field, never what its prototype does. */
export function ownField(value: Fields, field: string): unknown {
  return Object.hasOwn(value, field) ? value[field] : undefined;
}

/** @param at where the row lies within another one. @throws RowError */
export function textField(value: Fields, field: string, at?: string): string {
  const found = ownField(value, field);
  if (typeof found === 'string') return found;
  const name = at === undefined ? field : `${at}.${field}`;
  throw new RowError(name, found === undefined ? `field "${name}" is missing` : `field "${name}" is not a text`);
}

/** One object or more. @param of what they should be, for the error. @throws RowError */
export function listField(value: Fields, field: string, of: string): readonly Fields[] {
  let found = ownField(value, field);
  // Tables that know no lists keep them as JSON.
  if (typeof found === 'string') {
    try {
      found = JSON.parse(found);
    } catch {}
  }
  if (!Array.isArray(found) || found.length === 0) throw new RowError(field, `field "${field}" is not a list ${of}`);
  const wrong = found.findIndex((entry) => typeof entry !== 'object' || entry === null || Array.isArray(entry));
  if (wrong >= 0) throw new RowError(`${field}[${wrong}]`, `${field}[${wrong}] is not an object`);
  return found as Fields[];
}
