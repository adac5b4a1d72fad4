// Every error limbeck throws on purpose: a class to catch, a stable code to switch on, and the data that its text was made from.

/** What a {@link LimbeckError} knows beside its text. */
export interface ErrorData {
  /** Stable identifier, `ERR_...`. */
  readonly code: string;
  /** The op or function that refused. */
  readonly op?: string;
  /** The argument, field, file or tensor at fault. */
  readonly argument?: string;
  /** What would have been accepted. */
  readonly expected?: string;
  /** What was given. */
  readonly actual?: string;
  readonly cause?: unknown;
}

const marker = Symbol.for('limbeck.error');

/** Base class. `LimbeckError.is(e)` works across duplicate installs, where `instanceof` does not. */
export class LimbeckError extends Error {
  readonly code: string;
  readonly op: string | undefined;
  readonly argument: string | undefined;
  readonly expected: string | undefined;
  readonly actual: string | undefined;

  constructor(message: string, data: ErrorData) {
    super(message, data.cause === undefined ? undefined : { cause: data.cause });
    this.name = new.target.name;
    this.code = data.code;
    this.op = data.op;
    this.argument = data.argument;
    this.expected = data.expected;
    this.actual = data.actual;
    Object.defineProperty(this, marker, { value: true });
  }

  static is(value: unknown): value is LimbeckError {
    return typeof value === 'object' && value !== null && marker in value;
  }
}

/** A tensor's shape does not fit. */
export class ShapeError extends LimbeckError {}
/** A tensor's dtype does not fit. */
export class DTypeError extends LimbeckError {}
/** The device has no room for an allocation. */
export class OutOfMemoryError extends LimbeckError {}
/** A device or its library is missing or failed. */
export class DeviceError extends LimbeckError {}
/** A run file or an option is wrong; `argument` is the path of the field. */
export class ConfigError extends LimbeckError {}
/** A file is not what it claims to be. */
export class FormatError extends LimbeckError {}
/** A file or folder cannot be read or written; `cause` is what the system said. */
export class FileError extends LimbeckError {}
/** The data cannot be used: a token id out of range, an empty corpus, a malformed record. */
export class DataError extends LimbeckError {}
/** A tensor was used after it was freed. */
export class DisposedError extends LimbeckError {}
/** Training cannot go on (a loss that is not finite). */
export class TrainingError extends LimbeckError {}
