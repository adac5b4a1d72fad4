// The memory that this process may use.
import { totalmem } from 'node:os';

/** Bytes: the machine's memory, or less where a control group (a container's limit) allows less. */
export function machineMemory(): number {
  // 0 where there are no groups, more than any memory where a group sets no limit.
  const limit = process.constrainedMemory();
  return limit > 0 ? Math.min(totalmem(), limit) : totalmem();
}
