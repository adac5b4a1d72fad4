// limbeck doctor: what this machine offers, what is missing, and why

import { execFile } from 'node:child_process';
import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { availableParallelism, cpus, freemem, release } from 'node:os';
import { join } from 'node:path';
import { styleText } from 'node:util';
import { LimbeckError } from '../tensor/errors.ts';
import type { BackendInfo } from '../tensor/info.ts';
import { machineMemory } from '../tensor/machine.ts';
import { bytes } from '../train/format.ts';
import { wantsColor } from '../train/progress.ts';
import { command, commonArguments, Exit, exitCode } from './command.ts';

/** One line of the examination. */
interface Finding {
  readonly name: string;
  /** What was found, or why it is missing. */
  readonly value: string;
  /** `missing` needs something to be done, `absent` is no obstacle. */
  readonly state: 'ok' | 'absent' | 'missing';
}

interface Examination {
  readonly ok: boolean;
  readonly sections: Readonly<Record<string, readonly Finding[]>>;
}

const libraries = ['zod', 'citty', 'jiti', 'uplot', '@huggingface/tokenizers'];

export const doctor = command({
  meta: { name: 'doctor', description: 'Tell what this machine offers, what is missing, and why.' },
  args: commonArguments,
  examples: `
limbeck doctor
# for a bug report
limbeck doctor --json
`.trim(),
  async run({ args }) {
    const examination = await examine();
    process.stdout.write(args.json ? `${JSON.stringify(examination, null, 2)}\n` : render(examination));
    if (!examination.ok) throw new Exit(exitCode.error);
  },
});

async function examine(): Promise<Examination> {
  const { backendInfo } = await import('../tensor/info.ts');
  const { packageVersion } = await import('../tensor/version.ts');
  let info: BackendInfo | undefined;
  let failure: unknown;
  try {
    info = backendInfo();
  } catch (error) {
    failure = error;
  }
  const ok = (name: string, value: string): Finding => ({ name, value, state: 'ok' });
  const threads = process.env.LIMBECK_THREADS ? ' (LIMBECK_THREADS)' : '';
  const sections = {
    Machine: [
      ok('processor', cpus()[0]?.model.trim() || 'unknown'),
      ok('cores', `${availableParallelism()} for this process`),
      ok('memory', `${bytes(machineMemory())}, ${bytes(freemem())} free`),
      ok('system', `${process.platform}-${process.arch}, kernel ${release()}${info?.libc ? `, ${info.libc}` : ''}`),
    ],
    Software: [
      ok('limbeck', packageVersion()),
      ok('node', `${process.version}, Node-API ${process.versions.napi ?? '?'}`),
      ...(await Promise.all(libraries.map(library))),
    ],
    Backends: [
      ...(info
        ? [
            ok('native core', info.native.path),
            // GCC tells its number only, others their name too.
            ok('compiled by', /^\d/.test(info.native.compiler) ? `GCC ${info.native.compiler}` : info.native.compiler),
            ok('cpu', `instruction set ${info.cpu.isa || 'unknown'} of ${info.cpu.compiled.join(', ')}`),
            ok('threads', `${info.cpu.threads}${threads}`),
            ok('matrix products', info.cpu.blas),
            ...cuda(info.cuda),
          ]
        : [
            {
              name: 'native core',
              value: LimbeckError.is(failure)
                ? failure.message
                : `does not load: ${failure instanceof Error ? failure.message : failure}`,
              state: 'missing',
            } as const,
          ]),
    ],
    'To build from source': await Promise.all([
      tool('cmake', ['cmake'], info === undefined),
      tool('C++ compiler', process.env.CXX ? [process.env.CXX] : ['c++', 'g++', 'clang++'], info === undefined),
      tool('ninja', ['ninja'], false),
    ]),
  } satisfies Record<string, readonly Finding[]>;
  return { ok: info !== undefined, sections };
}

/** The GPU, and the libraries that its backend opens at run time. */
function cuda({ available, reason, driver, devices, libraries }: BackendInfo['cuda']): Finding[] {
  if (!available) return [{ name: 'cuda', value: reason, state: 'absent' }];
  return [
    { name: 'cuda driver', value: driver, state: 'ok' },
    ...devices.map(({ name, architecture, memory }, i): Finding => {
      return { name: `gpu ${i}`, value: `${name}, compute capability ${architecture}, ${bytes(memory)}`, state: 'ok' };
    }),
    ...libraries.map(({ name, path, version, lookedIn }): Finding => {
      if (path !== '') return { name, value: `${version} (${path})`, state: 'ok' };
      return { name, value: `not found; looked in\n${lookedIn.join('\n')}`, state: 'absent' };
    }),
  ];
}

async function library(name: string): Promise<Finding> {
  const require = createRequire(import.meta.url);
  for (const folder of require.resolve.paths(name) ?? []) {
    const text = await readFile(join(folder, name, 'package.json'), 'utf8').catch(() => undefined);
    if (text !== undefined) return { name, value: (JSON.parse(text) as { version: string }).version, state: 'ok' };
  }
  return { name, value: 'not installed; run npm install', state: 'missing' };
}

/** A program on the PATH; missing ones matter only when the native core has to be built here. */
async function tool(name: string, commands: readonly string[], needed: boolean): Promise<Finding> {
  for (const program of commands) {
    const version = await new Promise<string | undefined>((resolve) => {
      execFile(program, ['--version'], { timeout: 5000 }, (error, out) =>
        resolve(error ? undefined : out.split('\n')[0]!.trim()),
      );
    });
    if (version !== undefined) return { name, value: version, state: 'ok' };
  }
  return { name, value: `not found (tried ${commands.join(', ')})`, state: needed ? 'missing' : 'absent' };
}

function render({ ok, sections }: Examination): string {
  const color = wantsColor(process.stdout);
  const paint = (style: Parameters<typeof styleText>[0], text: string) => (color ? styleText(style, text) : text);
  const mark = { ok: paint('green', '✓'), absent: paint('gray', '·'), missing: paint('red', '✗') };
  const width = Math.max(...Object.values(sections).flatMap((findings) => findings.map((finding) => finding.name.length)));
  const blocks = Object.entries(sections).map(([title, findings]) => {
    const lines = findings.map(({ name, value, state }) => {
      const text = value.replaceAll('\n', `\n${' '.repeat(width + 6)}`);
      return `  ${mark[state]} ${name.padEnd(width)}  ${state === 'ok' ? text : paint(state === 'missing' ? 'red' : 'gray', text)}`;
    });
    return `${paint('bold', title)}\n${lines.join('\n')}\n`;
  });
  return `${blocks.join('\n')}\n${ok ? 'limbeck can run here.' : 'limbeck cannot run here yet: see ✗ above.'}\n`;
}
