// One writer for a folder. Each process puts a file of its own name there, looks for others that are alive, and gives way to them:
// of two that start at the same moment one or none goes on, never both.

import { randomBytes } from 'node:crypto';
import { mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { FileError } from '../tensor/errors.ts';
import { writeError } from './atomic.ts';

const LOCK = /^\.lock-(\d+)-(\d+)-([0-9a-f]{8})-(.*)$/;

/** A folder that only this owner writes to. */
export interface FolderLock {
  release(): Promise<void>;
}

/**
 * Takes a folder for this process; it is made if missing. The locks of processes that are gone are removed.
 * @throws FileError `ERR_LOCKED` when another process, or another run in this one, holds it; `ERR_WRITE` where it cannot be written
 */
export async function lockFolder(folder: string): Promise<FolderLock> {
  const name = `.lock-${process.pid}-${await startOf(process.pid)}-${randomBytes(4).toString('hex')}-${hostname()}`;
  const path = join(folder, name);
  try {
    await mkdir(folder, { recursive: true });
    await writeFile(path, '', { flag: 'wx' });
  } catch (error) {
    throw writeError(folder, error);
  }
  const release = () => rm(path, { force: true });
  try {
    for (const other of await readdir(folder)) {
      const match = LOCK.exec(other);
      if (!match || other === name) continue;
      const [, pid, start, , host] = match;
      if (host === hostname() && !(await lives(Number(pid), start!))) {
        await rm(join(folder, other), { force: true });
        continue;
      }
      throw new FileError(
        `${folder} is in use by process ${pid} on ${host}; wait for it, give another output folder` +
          `${host === hostname() ? '' : `, or remove ${other} there if that machine is gone`}`,
        { code: 'ERR_LOCKED', op: 'lock', argument: folder, actual: `process ${pid} on ${host}` },
      );
    }
  } catch (error) {
    await release();
    throw error;
  }
  return { release };
}

async function lives(pid: number, start: string): Promise<boolean> {
  try {
    process.kill(pid, 0);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ESRCH') return false;
  }
  // A number that was given to a new process since.
  return (await startOf(pid)) === start;
}

/** When a process started, in ticks of the system's clock; 0 where the system does not tell. */
async function startOf(pid: number): Promise<string> {
  const stat = await readFile(`/proc/${pid}/stat`, 'latin1').catch(() => undefined);
  // The name of the program is in brackets and may hold anything; the 20th field after it is the start.
  return stat?.slice(stat.lastIndexOf(')') + 2).split(' ')[19] ?? '0';
}
