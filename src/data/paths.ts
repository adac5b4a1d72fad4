// Which files a user means: paths, folders and globs, in an order that is the same on every machine.

import { readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { DataError, FileError } from '../tensor/errors.ts';

const magic = /[*?[{]/;

/**
 * The files behind paths, folders (all files below with one of the endings) and globs (`*`, `**`, `?`, `[abc]`, `{a,b}`). Each entry's
 * files are sorted by name; none is given twice.
 * @throws FileError `ERR_READ` for a path that does not exist; DataError `ERR_NO_FILES` for a folder or glob that gives nothing
 */
export async function expandPaths(patterns: string | readonly string[], endings: readonly string[]): Promise<string[]> {
  const files = new Set<string>();
  for (const pattern of typeof patterns === 'string' ? [patterns] : patterns) {
    const found = await expand(pattern, endings);
    if (found.length === 0) {
      const wanted = magic.test(pattern) ? 'no file matches it' : `the folder has no file that ends in ${endings.join(' or ')}`;
      throw new DataError(`data: ${pattern} gives nothing to read: ${wanted}`, {
        code: 'ERR_NO_FILES',
        op: 'data',
        argument: pattern,
      });
    }
    for (const file of found) files.add(file);
  }
  return [...files];
}

async function expand(pattern: string, endings: readonly string[]): Promise<string[]> {
  try {
    const info = await stat(pattern);
    if (!info.isDirectory()) return [pattern];
    return (await filesBelow(pattern)).filter((file) => endings.some((ending) => file.endsWith(ending)));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT' || !magic.test(pattern)) throw readError(pattern, error);
  }
  // Everything below the part without wildcards, matched against the whole pattern.
  const parts = pattern.split('/');
  const fixed = parts.slice(
    0,
    parts.findIndex((part) => magic.test(part)),
  );
  const root = fixed.join('/') || (pattern.startsWith('/') ? '/' : '.');
  const deep = parts.length - fixed.length > 1 || pattern.includes('**') || /\{[^}]*\//.test(pattern);
  const regex = globToRegex(root === '.' && fixed.length === 0 ? join('.', pattern) : pattern);
  return (await filesBelow(root, deep)).filter((file) => regex.test(file));
}

async function filesBelow(folder: string, deep = true): Promise<string[]> {
  const files: string[] = [];
  try {
    for (const entry of await readdir(folder, { withFileTypes: true })) {
      const path = join(folder, entry.name);
      const info = entry.isSymbolicLink() ? await stat(path).catch(() => undefined) : entry;
      if (info?.isFile()) files.push(path);
      // Links to folders are not followed: they could go round in circles.
      else if (deep && entry.isDirectory()) files.push(...(await filesBelow(path)));
    }
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw readError(folder, error);
  }
  return files.sort((a, b) => (a < b ? -1 : 1));
}

/** The expression of a glob over paths with `/`. */
export function globToRegex(glob: string): RegExp {
  let source = '';
  let depth = 0;
  for (let i = 0; i < glob.length; i++) {
    const char = glob[i]!;
    if (glob.startsWith('**/', i)) {
      source += '(?:[^/]+/)*';
      i += 2;
    } else if (glob.startsWith('**', i)) {
      source += '.*';
      i++;
    } else if (char === '*') source += '[^/]*';
    else if (char === '?') source += '[^/]';
    else if (char === '[' && glob.indexOf(']', i + 2) > 0) {
      const end = glob.indexOf(']', i + 2);
      source += `[${glob
        .slice(i + 1, end)
        .replace(/^!/, '^')
        .replace(/\\/g, '\\\\')}]`;
      i = end;
    } else if (char === '{' && glob.indexOf('}', i) > 0) {
      source += '(?:';
      depth++;
    } else if (char === '}' && depth > 0) {
      source += ')';
      depth--;
    } else if (char === ',' && depth > 0) source += '|';
    else source += char.replace(/[\\^$.*+?()[\]{}|]/, '\\$&');
  }
  return new RegExp(`^${source}$`);
}

/** What the system refused while reading `path`. */
export function readError(path: string, error: unknown): FileError {
  const { code, message } = error as NodeJS.ErrnoException;
  const text = code === 'ENOENT' ? 'there is no such file or folder' : message;
  return new FileError(`data: cannot read ${path}: ${text}`, { code: 'ERR_READ', op: 'data', argument: path, cause: error });
}
