// What all commands share: a stricter reading of arguments than citty's own, help with examples, and the end of the process.

import { parseArgs, stripVTControlCharacters, styleText } from 'node:util';
import { type ArgsDef, type CommandDef, type CommandMeta, defineCommand } from 'citty';
import { LimbeckError } from '../tensor/errors.ts';
import { nearest } from '../train/issues.ts';
import { wantsColor } from '../train/progress.ts';

/** Exit codes of `limbeck`. */
export const exitCode = { ok: 0, error: 1, usage: 2, interrupted: 130 } as const;

/** The command line itself is wrong. */
export class UsageError extends Error {}

/** Ends the command with a code, everything having been said. */
export class Exit extends Error {
  readonly exitCode: number;
  constructor(code: number) {
    super(`exit ${code}`);
    this.exitCode = code;
  }
}

/** A citty command and what its help shows below the options. */
export type Command = CommandDef<ArgsDef> & { readonly examples: string };

/** Defines a command; unknown options and surplus arguments (unless `variadic`) are refused before it runs. */
export function command<const T extends ArgsDef>(definition: CommandDef<T> & { examples: string; variadic?: boolean }): Command {
  const { examples, run, variadic = false, ...rest } = definition;
  const defined = defineCommand<T>({
    ...rest,
    async run(context) {
      checkArguments(context.rawArgs, (context.cmd.args ?? {}) as ArgsDef, variadic);
      return run?.(context);
    },
  } as CommandDef<T>);
  return Object.assign(defined as unknown as CommandDef<ArgsDef>, { examples });
}

/** Options that every command has. */
export const commonArguments = {
  json: { type: 'boolean', description: 'Print JSON, one object a line, for other programs.' },
  debug: { type: 'boolean', description: 'Show the stack of an error.' },
} as const satisfies ArgsDef;

/** A run file and changes of its fields. */
export const runArguments = {
  run: { type: 'positional', required: false, description: 'Run file: .json, .ts, .mts, .js or .mjs.', valueHint: 'file' },
  set: { type: 'string', description: 'Change a field of the run, as often as wanted.', valueHint: 'field=value' },
} as const satisfies ArgsDef;

function tokens(rawArgs: readonly string[], definitions: ArgsDef) {
  const options: Record<string, { type: 'boolean' | 'string'; short?: string; multiple: true }> = {};
  for (const [name, definition] of Object.entries(definitions)) {
    if (definition.type === 'positional') continue;
    const alias = [('alias' in definition && definition.alias) || []].flat().find((a) => a.length === 1);
    options[name] = {
      type: definition.type === 'boolean' ? 'boolean' : 'string',
      multiple: true,
      ...(alias ? { short: alias } : {}),
    };
  }
  return {
    options,
    tokens: parseArgs({ args: [...rawArgs], options, strict: false, allowPositionals: true, tokens: true }).tokens,
  };
}

function checkArguments(rawArgs: readonly string[], definitions: ArgsDef, variadic: boolean): void {
  const { options, tokens: found } = tokens(rawArgs, definitions);
  const named = Object.values(definitions).filter((definition) => definition.type === 'positional').length;
  const positionals = variadic ? Number.POSITIVE_INFINITY : named;
  let seen = 0;
  for (const token of found) {
    if (token.kind === 'positional' && ++seen > positionals) {
      throw new UsageError(`unexpected argument "${token.value}"${positionals === 0 ? '; this command takes options only' : ''}`);
    }
    if (token.kind !== 'option') continue;
    const name = token.name.replace(/^no-/, '');
    const known = options[token.name] ?? (options[name]?.type === 'boolean' ? options[name] : undefined);
    if (!known) {
      const meant = nearest(token.name, Object.keys(options));
      throw new UsageError(`unknown option ${token.rawName}${meant ? `; did you mean --${meant}?` : ''}`);
    }
    if (known.type === 'string' && token.value === undefined) throw new UsageError(`option ${token.rawName} needs a value`);
    if (known.type === 'boolean' && token.value !== undefined) throw new UsageError(`option ${token.rawName} takes no value`);
  }
}

/** Every value of an option that may be given more than once. */
export function allValues(rawArgs: readonly string[], definitions: ArgsDef, name: string): string[] {
  return tokens(rawArgs, definitions).tokens.flatMap((token) =>
    token.kind === 'option' && token.name === name && token.value !== undefined ? [token.value] : [],
  );
}

/** The value of a number option. */
export function numberOption(
  name: string,
  value: string | undefined,
  least: number,
  whole = false,
  most = Number.POSITIVE_INFINITY,
): number | undefined {
  if (value === undefined) return undefined;
  const parsed = Number(value);
  if (value.trim() === '' || !(parsed >= least && parsed <= most) || (whole && !Number.isInteger(parsed))) {
    const range = most === Number.POSITIVE_INFINITY ? `of at least ${least}` : `from ${least} to ${most}`;
    throw new UsageError(`--${name} is "${value}"; it must be a ${whole ? 'whole number' : 'number'} ${range}`);
  }
  return parsed;
}

/** `field=value` pairs of --set; a value is JSON where it parses as such, else a text. */
export function parseOverrides(pairs: readonly string[]): Record<string, unknown> {
  return Object.fromEntries(
    pairs.map((pair) => {
      const at = pair.indexOf('=');
      if (at < 1) throw new UsageError(`--set ${pair}: write field=value, as in --set optimizer.learningRate=1e-3`);
      const value = pair.slice(at + 1);
      try {
        return [pair.slice(0, at), JSON.parse(value)];
      } catch {
        return [pair.slice(0, at), value];
      }
    }),
  );
}

/** Help of a command: what it does, its arguments and options, and examples to copy. @param parent what is typed before its name */
export function usage(definition: Command, parent?: string): string {
  const meta = definition.meta as CommandMeta;
  const definitions = Object.entries((definition.args ?? {}) as ArgsDef);
  const hint = (d: ArgsDef[string]) => d.valueHint ?? 'value';
  const positionals = definitions.filter(([, d]) => d.type === 'positional');
  const options = definitions.filter(([, d]) => d.type !== 'positional');
  const commands = Object.entries((definition.subCommands ?? {}) as Record<string, Command>);
  const line = [
    parent ? `${parent} ${meta.name}` : `${meta.name}`,
    ...(commands.length > 0 ? ['<command>'] : []),
    ...positionals.map(([name, d]) => (d.required === false ? `[${name}]` : `<${name}>`)),
    '[options]',
  ];
  const rows = {
    Commands: commands.map(([name, c]) => [name, (c.meta as CommandMeta).description ?? '']),
    Arguments: positionals.map(([name, d]) => [`<${name}>`, d.description ?? '']),
    Options: [
      ...options.map(([name, d]) => {
        const short = 'alias' in d && d.alias ? `-${d.alias}, ` : '';
        return [`${short}--${name}${d.type === 'boolean' ? '' : ` <${hint(d)}>`}`, d.description ?? ''];
      }),
      ['-h, --help', 'Show this.'],
      ...(parent ? [] : [['-v, --version', 'Show the version.']]),
    ],
  };
  const color = wantsColor(process.stdout);
  const title = (text: string) => (color ? styleText('bold', text) : text);
  const example = (text: string) => (color && text.startsWith('#') ? styleText('gray', text) : text);
  const width = Math.max(...Object.values(rows).flatMap((r) => r.map(([name]) => name!.length)));
  const sections = Object.entries(rows).flatMap(([name, r]) =>
    r.length ? [`${title(name)}\n${r.map(([key, text]) => `  ${key!.padEnd(width)}  ${text}`).join('\n')}\n`] : [],
  );
  const examples = definition.examples.split('\n').map((text) => `  ${example(text)}`);
  return `${[`${meta.description}\n`, `${title('Usage')}  ${line.join(' ')}\n`, ...sections, `${title('Examples')}\n${examples.join('\n')}`].join('\n')}\n`;
}

/** Prints what went wrong and returns the exit code that says so. */
export function reportError(error: unknown, options: { debug: boolean; json: boolean }): number {
  if (error instanceof Exit) return error.exitCode;
  const isUsage = error instanceof UsageError || (error as Error | undefined)?.name === 'CLIError';
  const message = error instanceof Error ? stripVTControlCharacters(error.message) : String(error);
  const code = LimbeckError.is(error) ? error.code : isUsage ? 'ERR_USAGE' : 'ERR_UNEXPECTED';
  if (options.json) {
    const data = LimbeckError.is(error) ? { argument: error.argument, expected: error.expected, actual: error.actual } : {};
    process.stdout.write(`${JSON.stringify({ type: 'error', code, message, ...data })}\n`);
  }
  process.stderr.write(`error ${code}: ${message}\n`);
  if (isUsage) process.stderr.write('Run the command with --help to see its options and examples.\n');
  if (options.debug && error instanceof Error)
    process.stderr.write(`${error.stack}\n${error.cause ? `caused by ${(error.cause as Error).stack ?? error.cause}\n` : ''}`);
  else if (code === 'ERR_UNEXPECTED')
    process.stderr.write('This is probably a fault of limbeck; --debug shows where it comes from.\n');
  return isUsage ? exitCode.usage : exitCode.error;
}
