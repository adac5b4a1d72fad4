#!/usr/bin/env node
// The executable.

import { exitCode } from './command.ts';
import { limbeck } from './limbeck.ts';

// The reader of a pipe may go away (| head): that is no fault of ours.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') throw error;
  process.exit(exitCode.ok);
});

// Nor is a terminal that is gone a reason to end a run: what it would have shown is in the run's folder.
process.stderr.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') throw error;
});

process.exitCode = await limbeck(process.argv.slice(2));
