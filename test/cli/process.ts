// The command line as a process of its own, run from source.

import { type ChildProcess, spawn } from 'node:child_process';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { vi } from 'vitest';
import { limbeck as inProcess } from '../../src/cli/limbeck.ts';

export const root = fileURLToPath(new URL('../..', import.meta.url));

export interface Result {
  readonly code: number | null;
  readonly out: string;
  readonly err: string;
}

/** Runs `limbeck ...args` to its end; `watch` sees the process and what it has written so far, each time that it writes. `input` is all of its standard
 * input, which a `watch` has to end. */
export function limbeck(
  args: readonly string[],
  watch?: (child: ChildProcess, out: string, err: string) => void,
  input?: string,
): Promise<Result> {
  return new Promise((resolve, reject) => {
    const { FORCE_COLOR: _, ...env } = process.env;
    const child = spawn(process.execPath, ['--import', 'jiti/register', join(root, 'src/cli/main.ts'), ...args], {
      cwd: root,
      env: { ...env, NO_COLOR: '1' },
      stdio: [input === undefined ? 'ignore' : 'pipe', 'pipe', 'pipe'],
    });
    if (watch === undefined) child.stdin?.end(input);
    else if (input !== undefined) child.stdin?.write(input);
    let out = '';
    let err = '';
    child.stdout!.setEncoding('utf8').on('data', (text: string) => {
      out += text;
      watch?.(child, out, err);
    });
    child.stderr!.setEncoding('utf8').on('data', (text: string) => {
      err += text;
      watch?.(child, out, err);
    });
    child.on('error', reject);
    child.on('close', (code) => resolve({ code, out, err }));
  });
}

/** The same within this process: quick, for what needs no process of its own. */
export async function limbeckHere(args: readonly string[]): Promise<Result> {
  let out = '';
  let err = '';
  const onOut = vi.spyOn(process.stdout, 'write').mockImplementation((text) => {
    out += text;
    return true;
  });
  const onErr = vi.spyOn(process.stderr, 'write').mockImplementation((text) => {
    err += text;
    return true;
  });
  vi.stubEnv('NO_COLOR', '1');
  try {
    const code = await inProcess(args);
    return { code, out, err };
  } finally {
    onOut.mockRestore();
    onErr.mockRestore();
    vi.unstubAllEnvs();
  }
}
