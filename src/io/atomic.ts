// Files and folders that are either the old ones or the new ones, never a part: written beside, flushed, renamed.

import { randomBytes } from 'node:crypto';
import { type FileHandle, mkdir, open, readdir, realpath, rename, rm, stat } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { FileError } from '../tensor/errors.ts';

const PARTIAL = /\.[0-9a-f]{12}\.partial$/;

// One call of the system moves at most 2 GiB, and a few MiB already run at full speed.
const CHUNK = 1 << 24;

/** True for the name of something a killed process left half-written; the owner of a folder may remove these. */
export function isPartial(name: string): boolean {
  return PARTIAL.test(name);
}

/**
 * Writes a file beside `path`, flushes it to disk and renames it over `path`; on any failure the old file stays as it was and the
 * new one is removed. Missing parent folders are made. Throws FileError `ERR_WRITE` (disk full, read-only folder, ...).
 */
export async function writeAtomic(path: string, write: (file: FileHandle) => Promise<void>): Promise<void> {
  let partial = '';
  try {
    // A link is followed, so that it goes on being a link.
    const target = await realpath(path).catch(() => path);
    await mkdir(dirname(target), { recursive: true });
    partial = beside(target);
    const file = await open(partial, 'wx');
    try {
      await write(file);
      await file.sync();
    } finally {
      await file.close();
    }
    await rename(partial, target);
    await syncFolder(dirname(target));
  } catch (error) {
    if (partial) await rm(partial, { force: true }).catch(() => {});
    throw writeError(path, error);
  }
}

/**
 * Fills a new folder beside `path`, flushes it and puts it in the place of `path`; on any failure the old folder stays as it was.
 * Throws FileError `ERR_WRITE`. A machine that stops between the two renames leaves the old folder at `path.old`:
 * {@link recoverFolder} puts it back, and so does the next `replaceFolder`.
 */
export async function replaceFolder(path: string, fill: (folder: string) => Promise<void>): Promise<void> {
  const old = `${path}.old`;
  let partial = '';
  try {
    await recoverFolder(path);
    await mkdir(dirname(path), { recursive: true });
    partial = beside(path);
    await mkdir(partial);
    await fill(partial);
    await syncTree(partial);
    if (await exists(path)) {
      await rename(path, old);
      try {
        await rename(partial, path);
      } catch (error) {
        await rename(old, path);
        throw error;
      }
    } else {
      await rename(partial, path);
    }
    await syncFolder(dirname(path));
  } catch (error) {
    if (partial) await rm(partial, { recursive: true, force: true }).catch(() => {});
    throw writeError(path, error);
  }
  // The new folder is in place: an old one that will not go away is no failure, the next call tries again.
  await rm(old, { recursive: true, force: true }).catch(() => {});
}

/** Ends a {@link replaceFolder} that was cut short: afterwards `path` is the last complete folder, and `path.old` is gone. */
export async function recoverFolder(path: string): Promise<void> {
  const old = `${path}.old`;
  if (!(await exists(old))) return;
  if (await exists(path)) await rm(old, { recursive: true, force: true });
  else await rename(old, path);
}

/** Writes all bytes of `data` after what was written so far, however large. */
export async function writeAll(file: FileHandle, data: ArrayBufferView): Promise<void> {
  let at = 0;
  while (at < data.byteLength) {
    const chunk = new Uint8Array(data.buffer, data.byteOffset + at, Math.min(CHUNK, data.byteLength - at));
    at += (await file.write(chunk)).bytesWritten;
  }
}

/** What the system refused while `op` read `path`. */
export function readError(op: string, path: string, error: unknown): FileError {
  const message = error instanceof Error ? error.message : String(error);
  return new FileError(`${op}: cannot read ${path}: ${message}`, { code: 'ERR_READ', op, argument: path, cause: error });
}

/** Fills `data` from byte `position` of the file, however large, and returns the bytes read: fewer only at the end of the file. */
export async function readAll(file: FileHandle, data: ArrayBufferView, position: number): Promise<number> {
  let at = 0;
  while (at < data.byteLength) {
    const chunk = new Uint8Array(data.buffer, data.byteOffset + at, Math.min(CHUNK, data.byteLength - at));
    const { bytesRead } = await file.read(chunk, 0, chunk.length, position + at);
    if (bytesRead === 0) break;
    at += bytesRead;
  }
  return at;
}

function beside(path: string): string {
  return join(dirname(path), `${basename(path)}.${randomBytes(6).toString('hex')}.partial`);
}

async function exists(path: string): Promise<boolean> {
  try {
    await stat(path);
    return true;
  } catch (error) {
    if (systemCode(error) === 'ENOENT') return false;
    throw error;
  }
}

async function syncTree(folder: string): Promise<void> {
  for (const entry of await readdir(folder, { withFileTypes: true })) {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) await syncTree(path);
    else if (entry.isFile()) await syncPath(path);
  }
  await syncFolder(folder);
}

async function syncFolder(folder: string): Promise<void> {
  // Windows cannot open a folder, and keeps its names without being asked.
  if (process.platform !== 'win32') await syncPath(folder);
}

async function syncPath(path: string): Promise<void> {
  const file = await open(path, 'r');
  try {
    await file.sync();
  } finally {
    await file.close();
  }
}

function systemCode(error: unknown): string | undefined {
  return error instanceof Error && 'syscall' in error && 'code' in error ? String(error.code) : undefined;
}

const advice: Record<string, string> = {
  ENOSPC: 'the disk is full; free some space or choose another folder',
  EDQUOT: 'the disk quota is used up; free some space or choose another folder',
  EFBIG: 'the file would exceed the size limit of this process or file system; choose another folder',
  EROFS: 'the file system is read-only; choose another folder',
  EACCES: 'permission denied; choose a folder that you may write to',
  EPERM: 'not permitted; choose a folder that you may write to',
  ENOTDIR: 'a part of the path is a file; choose another path',
  EISDIR: 'the path is a folder; give the path of a file',
};

/** @internal What the system refused becomes a FileError; anything else (the caller's own error) stays what it is. */
export function writeError(path: string, error: unknown): unknown {
  const code = systemCode(error);
  if (code === undefined) return error;
  const reason = advice[code] ?? (error as Error).message;
  return new FileError(`write: cannot write ${path}: ${reason}. Nothing that was there before has changed.`, {
    code: 'ERR_WRITE',
    op: 'write',
    argument: path,
    actual: code,
    cause: error,
  });
}
