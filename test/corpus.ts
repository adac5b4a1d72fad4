// Made-up prose for runs that need something to read.
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';

const words = ['the', 'people', 'of', 'this', 'country', 'shall', 'keep', 'a', 'Union', 'that', 'is', 'free'];

/** Writes documents of so many words each, `0.txt` and on, into a folder: the same every time. */
export async function writeCorpus(folder: string, documents: number, length: number): Promise<void> {
  const text = (n: number): string =>
    Array.from({ length }, (_, i) => words[(i * i + n * 7 + (i >> 2)) % words.length]).join(' ');
  await Promise.all(Array.from({ length: documents }, (_, n) => writeFile(join(folder, `${n}.txt`), text(n))));
}
