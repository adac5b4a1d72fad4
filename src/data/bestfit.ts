// Best-fit decreasing: items of different lengths into as few rows of one length as a simple rule can (Johnson 1974; at most 22 % more than the
// fewest, in practice a row in a thousand).

/**
 * Puts items into rows: the longest first, each into the row with the least room that still takes it.
 * @param lengths of the items, each from 0 to `room`.
 * @param order the items, in the order that decides among equal lengths. Default: as they come.
 * @returns the items of each row.
 */
export function bestFitDecreasing(lengths: ArrayLike<number>, room: number, order?: ArrayLike<number>): number[][] {
  const items = order === undefined ? Uint32Array.from({ length: lengths.length }, (_, i) => i) : Uint32Array.from(order);
  return fill(byLength(items, lengths, room), lengths, room);
}

/** Longest first; equal ones stay in order. A counting sort: lengths are small numbers. */
function byLength(items: Uint32Array, lengths: ArrayLike<number>, room: number): Uint32Array {
  const place = new Uint32Array(room + 2);
  for (const item of items) place[room - lengths[item]! + 1]!++;
  for (let i = 1; i < place.length; i++) place[i]! += place[i - 1]!;
  const sorted = new Uint32Array(items.length);
  for (const item of items) sorted[place[room - lengths[item]!]!++] = item;
  return sorted;
}

function fill(items: Uint32Array, lengths: ArrayLike<number>, room: number): number[][] {
  const rows: number[][] = [];
  // Rows by the room they have left, and a bit for each room that some row has.
  const open: number[][] = Array.from({ length: room + 1 }, () => []);
  const some = new Uint32Array((room >>> 5) + 1);
  const leastFrom = (size: number): number => {
    for (let word = size >>> 5, bits = some[word]! & (-1 << (size & 31)); ; bits = some[word]!) {
      if (bits !== 0) return word * 32 + 31 - Math.clz32(bits & -bits);
      if (++word >= some.length) return -1;
    }
  };
  for (const item of items) {
    const size = lengths[item]!;
    const left = leastFrom(size);
    let row: number;
    if (left < 0) {
      row = rows.length;
      rows.push([]);
    } else {
      row = open[left]!.pop()!;
      if (open[left]!.length === 0) some[left >>> 5]! &= ~(1 << (left & 31));
    }
    rows[row]!.push(item);
    const rest = (left < 0 ? room : left) - size;
    open[rest]!.push(row);
    some[rest >>> 5]! |= 1 << (rest & 31);
  }
  return rows;
}
