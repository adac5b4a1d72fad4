import { lstat, mkdir, mkdtemp, open, readdir, readFile, rename, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { isPartial, readAll, recoverFolder, replaceFolder, writeAll, writeAtomic } from '../../src/io/atomic.ts';
import { FileError } from '../../src/tensor/errors.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'limbeck-atomic-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

const text = (path: string) => readFile(path, 'utf8');
const put = (content: string) => (path: string) => writeAtomic(path, (file) => writeAll(file, Buffer.from(content)));

// A device that is always full: the system's own error, without filling a disk.
const full = async () => {
  const device = await open('/dev/full', 'w');
  try {
    await writeAll(device, Buffer.from('x'));
  } finally {
    await device.close();
  }
};

describe('writeAtomic', () => {
  it('makes folders, replaces files and leaves nothing beside', async () => {
    const path = join(folder, 'a', 'b', 'c.txt');
    await put('one')(path);
    await put('two')(path);
    expect(await text(path)).toBe('two');
    expect(await readdir(join(folder, 'a', 'b'))).toEqual(['c.txt']);
  });

  it('keeps a link a link', async () => {
    await writeFile(join(folder, 'real'), 'old');
    await symlink('real', join(folder, 'link'));
    await put('new')(join(folder, 'link'));
    expect((await lstat(join(folder, 'link'))).isSymbolicLink()).toBe(true);
    expect(await text(join(folder, 'real'))).toBe('new');
  });

  it('shows the old file until the new one is complete', async () => {
    const path = join(folder, 'file');
    await put('old')(path);
    await writeAtomic(path, async (file) => {
      await writeAll(file, Buffer.from('new'));
      expect(await text(path)).toBe('old');
      expect((await readdir(folder)).filter(isPartial)).toHaveLength(1);
    });
    expect(await text(path)).toBe('new');
  });

  it.runIf(process.platform === 'linux')('a full disk loses nothing', async () => {
    const path = join(folder, 'file');
    await put('old')(path);
    const error = await writeAtomic(path, full).catch((e) => e);
    expect(error).toBeInstanceOf(FileError);
    expect(error).toMatchObject({ code: 'ERR_WRITE', argument: path, actual: 'ENOSPC', cause: { code: 'ENOSPC' } });
    expect(error.message).toContain('the disk is full');
    expect(await text(path)).toBe('old');
    expect(await readdir(folder)).toEqual(['file']);
  });

  it('a folder that cannot be written, or is no folder', async () => {
    await writeFile(join(folder, 'file'), '');
    const error = await put('x')(join(folder, 'file', 'below')).catch((e) => e);
    expect(error).toBeInstanceOf(FileError);
    expect(error).toMatchObject({ code: 'ERR_WRITE' });
    await mkdir(join(folder, 'dir'));
    expect(await put('x')(join(folder, 'dir')).catch((e) => e)).toMatchObject({ code: 'ERR_WRITE', actual: 'EISDIR' });
    expect((await readdir(folder)).filter(isPartial)).toEqual([]);
    // /sys refuses even the superuser.
    if (process.platform === 'linux') {
      expect(await put('x')('/sys/limbeck').catch((e) => e)).toMatchObject({ code: 'ERR_WRITE', argument: '/sys/limbeck' });
    }
  });

  it("passes the caller's own error on", async () => {
    const own = new RangeError('mine');
    await expect(writeAtomic(join(folder, 'x'), () => Promise.reject(own))).rejects.toBe(own);
    expect(await readdir(folder)).toEqual([]);
  });

  it('moves more than one chunk', async () => {
    const data = new Uint32Array((1 << 22) * 3 + 5).map((_, i) => i * 2654435761);
    const path = join(folder, 'large');
    await writeAtomic(path, (file) => writeAll(file, data));
    const back = new Uint32Array(data.length + 1);
    const file = await open(path);
    expect(await readAll(file, back, 0)).toBe(data.byteLength);
    await file.close();
    expect(Buffer.compare(Buffer.from(back.buffer, 0, data.byteLength), Buffer.from(data.buffer))).toBe(0);
  });
});

describe('replaceFolder', () => {
  const fill = (content: string) => async (path: string) => {
    await mkdir(join(path, 'sub'));
    await writeFile(join(path, 'sub', 'file'), content);
    await writeFile(join(path, content), '');
  };

  it('replaces the whole folder', async () => {
    const path = join(folder, 'made', 'checkpoint');
    await replaceFolder(path, fill('one'));
    await replaceFolder(path, fill('two'));
    expect((await readdir(path)).sort()).toEqual(['sub', 'two']);
    expect(await text(join(path, 'sub', 'file'))).toBe('two');
    expect(await readdir(join(folder, 'made'))).toEqual(['checkpoint']);
  });

  it.runIf(process.platform === 'linux')('a full disk loses nothing', async () => {
    const path = join(folder, 'checkpoint');
    await replaceFolder(path, fill('one'));
    const failing = async (part: string) => {
      await fill('two')(part);
      await full();
    };
    await expect(replaceFolder(path, failing)).rejects.toMatchObject({ code: 'ERR_WRITE', actual: 'ENOSPC' });
    expect((await readdir(path)).sort()).toEqual(['one', 'sub']);
    expect(await readdir(folder)).toEqual(['checkpoint']);
  });

  it('recovers from a stop between the two renames', async () => {
    const path = join(folder, 'checkpoint');
    await replaceFolder(path, fill('one'));
    await rename(path, `${path}.old`);
    await recoverFolder(path);
    expect((await readdir(path)).sort()).toEqual(['one', 'sub']);
    // And from a stop after both.
    await mkdir(`${path}.old`);
    await replaceFolder(path, fill('two'));
    expect(await readdir(folder)).toEqual(['checkpoint']);
    expect((await readdir(path)).sort()).toEqual(['sub', 'two']);
  });
});
