// What the scripts that drive a compiler share: files of a folder, objects that are out of date, several compilers at once.
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, utimesSync, writeFileSync } from 'node:fs';
import path from 'node:path';

/** A failure that its text explains: printed without a stack. */
export class BuildError extends Error {}

/** The files of a folder with an ending, sorted. */
export function list(folder, ending) {
  return existsSync(folder)
    ? readdirSync(folder)
        .filter((f) => f.endsWith(ending))
        .sort()
        .map((f) => path.join(folder, f))
    : [];
}

/** Runs a command to its end; both streams as one text. */
export function run(command, args, options = {}) {
  const { error, status, stdout, stderr } = spawnSync(command, args, { encoding: 'utf8', ...options });
  return { ok: !error && status === 0, text: `${stdout ?? ''}${stderr ?? ''}` };
}

/**
 * Runs tasks { command, args, label }, at most `jobs` at once; stops at the first failure. With `said(text)` a task gets what its
 * command wrote to stderr instead of letting it through.
 */
export async function runAll(tasks, jobs) {
  let next = 0;
  let failed = null;
  const worker = async () => {
    while (next < tasks.length && !failed) {
      const { command, args, label, said } = tasks[next++];
      await new Promise((resolve) => {
        const child = spawn(command, args, { stdio: ['ignore', said ? 'pipe' : 2, said ? 'pipe' : 2] });
        let text = '';
        for (const stream of [child.stdout, child.stderr]) stream?.setEncoding('utf8').on('data', (piece) => (text += piece));
        child.on('error', (error) => {
          failed ??= `${label}: ${error.message}`;
          resolve();
        });
        child.on('close', (code) => {
          if (code !== 0) failed ??= label;
          said?.(text, code === 0);
          resolve();
        });
      });
    }
  };
  await Promise.all(Array.from({ length: jobs }, worker));
  if (failed) throw new BuildError(`limbeck: the native build failed at ${failed}; the messages above say why.`);
}

/** Whether an object is older than its source or any header that the compiler saw (its .d file). */
export function stale(object) {
  const dependencies = object.replace(/\.o$/, '.d');
  if (!existsSync(object) || !existsSync(dependencies)) return true;
  const built = statSync(object).mtimeMs;
  const files = readFileSync(dependencies, 'utf8')
    .replace(/^[^:]*:/, '')
    .replace(/\\\n/g, ' ')
    .trim()
    .split(/(?<!\\)\s+/);
  return files.some((name) => {
    const file = name.replace(/\\ /g, ' ');
    return !existsSync(file) || statSync(file).mtimeMs > built;
  });
}

/**
 * What was built, as text, and when it began, as the file's time. A file that was deleted leaves no newer time behind, so the names
 * are in the text.
 */
export function stampOf(file, text, made, inputs) {
  const current = () => {
    if (!existsSync(file) || readFileSync(file, 'utf8') !== text || !made.every((output) => existsSync(output))) return false;
    const began = statSync(file).mtimeMs;
    return inputs.every((input) => statSync(input).mtimeMs < began);
  };
  const write = (began) => {
    mkdirSync(path.dirname(file), { recursive: true });
    writeFileSync(file, text);
    utimesSync(file, began, began);
  };
  return { current, write };
}
