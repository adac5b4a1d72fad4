// Where and what this package is.
import { readFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

/** The folder of package.json: two above this file, in `src` as in `dist`. */
export const packageRoot = resolve(fileURLToPath(import.meta.url), '../../..');

/** This package's version. */
export function packageVersion(): string {
  return (JSON.parse(readFileSync(join(packageRoot, 'package.json'), 'utf8')) as { version: string }).version;
}
