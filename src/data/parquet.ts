// Rows of Parquet files. The package that decodes them believes what the pages say of themselves, so that a damaged file can send it in
// circles or make it ask for all memory: every page is looked at before it is decoded.

import type { ColumnMetaData, Compressors, DataPageHeader, FileMetaData, RowGroup } from 'hyparquet';
import { FormatError } from '../tensor/errors.ts';

// Rows that are held at once.
const rowsAtOnce = 4096;

// What a page may hold. Writers make pages of a megabyte, or of a whole row group of some 100,000 rows.
const mostValues = 1 << 24;
const mostBytes = 1 << 30;
// No codec makes more of fewer bytes; small pages may.
const mostGrowth = 1 << 12;
const alwaysFine = 1 << 20;

let loaded: ReturnType<typeof load> | undefined;

/** The package, loaded at first use: most programs never need it. */
const decoder = (): ReturnType<typeof load> => (loaded ??= load());

async function load() {
  return {
    ...(await import('hyparquet')),
    ...(await import('hyparquet-compressors')),
    ...(await import('hyparquet/src/schema.js')),
    ...(await import('hyparquet/src/column.js')),
    ...(await import('hyparquet/src/datapage.js')),
  };
}

/**
 * Rows of a Parquet file, in order, with the columns as fields.
 * @throws FormatError `ERR_PARQUET` for a file that is damaged
 */
export async function* parquetRows(path: string): AsyncGenerator<Record<string, unknown>> {
  const { asyncBufferFromFile, parquetMetadataAsync, parquetReadObjects, parquetSchema, compressors, ...paths } = await decoder();
  const { getMaxDefinitionLevel, getMaxRepetitionLevel, getTreePath } = paths;
  const guarded = async <T>(work: () => Promise<T>): Promise<T> => {
    try {
      return await work();
    } catch (error) {
      throw new FormatError(`data: ${path} cannot be read as Parquet: ${(error as Error).message}`, {
        code: 'ERR_PARQUET',
        op: 'data',
        argument: path,
        cause: error,
      });
    }
  };
  const file = await guarded(() => asyncBufferFromFile(path));
  // Columns of maps are nothing to us, and a damaged schema sends the search for them in circles.
  const metadata = await guarded(() => parquetMetadataAsync(file, { geoparquet: false }));
  const total = await guarded(async () => checkRows(metadata));
  const tree = await guarded(async () => parquetSchema(metadata));
  const depthOf = ({ path_in_schema: column }: ColumnMetaData): Depth => {
    const place = getTreePath(tree, column);
    return { repeated: getMaxRepetitionLevel(place), defined: getMaxDefinitionLevel(place) };
  };
  // One group after the other, so that what is wrong with a later one costs nothing before.
  let checked = 0;
  let groupEnd = 0;
  for (let rowStart = 0; rowStart < total; rowStart += rowsAtOnce) {
    const rowEnd = Math.min(total, rowStart + rowsAtOnce);
    const rows = await guarded(async () => {
      for (; groupEnd < rowEnd; groupEnd += Number(metadata.row_groups[checked++]!.num_rows)) {
        for (const column of columnsOf(metadata.row_groups[checked]!))
          await checkPages(file, column, depthOf(column), compressors);
      }
      const found = await parquetReadObjects({ file, metadata, rowStart, rowEnd, compressors });
      if (found.length < rowEnd - rowStart) throw new Error(`it has ${rowStart + found.length} rows, not ${total} as it says`);
      return found;
    });
    yield* rows;
  }
}

/** The number of rows, on which file and row groups must agree. */
function checkRows({ num_rows: rows, row_groups: groups }: FileMetaData): number {
  const sizes = groups.map(({ num_rows }) => Number(num_rows));
  const total = sizes.reduce((sum, n) => sum + n, 0);
  if (!sizes.every((n) => Number.isSafeInteger(n) && n >= 0) || total !== Number(rows) || !Number.isSafeInteger(total))
    throw new Error(`it says that it has ${String(rows)} rows, its row groups have ${sizes.join(', ')}`);
  return total;
}

function columnsOf({ columns }: RowGroup): ColumnMetaData[] {
  return columns.map(({ meta_data: column }) => {
    if (column === undefined) throw new Error('a column is not described');
    return column;
  });
}

type AsyncBuffer = Awaited<ReturnType<typeof import('hyparquet')['asyncBufferFromFile']>>;

/** How deep the values of a column may lie in lists, and in what may be missing. */
interface Depth {
  readonly repeated: number;
  readonly defined: number;
}

/** Walks the pages of a column: each must lie in it, and hold what can be believed. */
async function checkPages(file: AsyncBuffer, column: ColumnMetaData, depth: Depth, compressors: Compressors): Promise<void> {
  const { parquetHeader, decompressPage } = await decoder();
  const name = column.path_in_schema.join('.');
  const refuse = (what: string): never => {
    throw new Error(`column '${name}': ${what}`);
  };
  const from = Number(column.dictionary_page_offset || column.data_page_offset);
  const bytes = Number(column.total_compressed_size);
  if (!(from >= 0 && bytes >= 0 && from + bytes <= file.byteLength))
    refuse(`bytes ${from} to ${from + bytes} are not in the file`);
  const reader = { view: new DataView(await file.slice(from, from + bytes)), offset: 0 };
  const values = Number(column.num_values);
  let left = values;
  while (reader.offset < bytes - 1 && left > 0) {
    const header = parquetHeader(reader);
    const [packed, whole] = [header.compressed_page_size, header.uncompressed_page_size];
    if (!(packed >= 0 && packed <= bytes - reader.offset)) refuse(`a page of ${packed} bytes goes beyond its end`);
    if (!(whole >= 0 && whole <= mostBytes && whole <= Math.max(alwaysFine, packed * mostGrowth)))
      refuse(`a page of ${packed} bytes is said to hold ${whole}`);
    const data = header.data_page_header ?? header.data_page_header_v2;
    const count = (data ?? header.dictionary_page_header)?.num_values ?? 0;
    if (!(count >= 0 && count <= mostValues)) refuse(`a page is said to hold ${count} values`);
    if (data !== undefined && count === 0) refuse('a page holds no values');
    const page = new Uint8Array(reader.view.buffer, reader.offset, packed);
    const unpack = (bytes: Uint8Array, size: number) => decompressPage(bytes, size, column.codec, compressors);
    if (header.data_page_header !== undefined) checkLevels(unpack(page, whole), header.data_page_header, depth);
    if (header.data_page_header_v2 !== undefined) {
      const { repetition_levels_byte_length: first, definition_levels_byte_length: second, ...v2 } = header.data_page_header_v2;
      if (!(first >= 0 && second >= 0 && first + second <= Math.min(packed, whole))) refuse('the levels of a page go beyond it');
      if (depth.repeated > 0) checkRuns(page.subarray(0, first), widthOf(depth.repeated), count);
      if (depth.defined > 0) checkRuns(page.subarray(first, first + second), widthOf(depth.defined), count);
      const rest = page.subarray(first + second);
      const values = v2.is_compressed === false ? rest : unpack(rest, whole - first - second);
      if (dictionaries.has(v2.encoding)) checkRuns(values.subarray(1), values[0] ?? 0, count, true);
      if (!(v2.num_nulls >= 0 && v2.num_nulls <= count)) refuse(`${v2.num_nulls} of ${count} values are missing`);
    }
    if (data !== undefined) left -= count;
    reader.offset += packed;
  }
  if (left !== 0) refuse(`its pages hold ${values - left} values, not ${values}`);
}

const dictionaries: ReadonlySet<string> = new Set(['PLAIN_DICTIONARY', 'RLE_DICTIONARY']);
const widthOf = (largest: number): number => 32 - Math.clz32(largest);

/** Levels, each with its length in front, then the values of a page of the first kind. */
function checkLevels(page: Uint8Array, { num_values: count, encoding }: DataPageHeader, { repeated, defined }: Depth): void {
  const view = new DataView(page.buffer, page.byteOffset, page.byteLength);
  let at = 0;
  for (const largest of [repeated, defined]) {
    if (largest === 0) continue;
    const end = at + 4 + view.getUint32(at, true);
    if (end > page.length) throw new Error('the levels of a page go beyond it');
    checkRuns(page.subarray(at + 4, end), widthOf(largest), count);
    at = end;
  }
  if (dictionaries.has(encoding)) checkRuns(page.subarray(at + 1), page[at] ?? 0, count, true);
}

/**
 * Runs of equal values and of packed bits: none may be longer than what is left of `count` values.
 * @param fewer the bytes may end before, since missing values have none
 */
function checkRuns(bytes: Uint8Array, width: number, count: number, fewer = false): void {
  let at = 0;
  for (let seen = 0; seen < count; ) {
    if (fewer && at >= bytes.length) return;
    let header = 0;
    let byte = 0x80;
    for (let shift = 0; byte >= 0x80; shift += 7) {
      if (at >= bytes.length || shift > 21) throw new Error('a run is damaged');
      byte = bytes[at++]!;
      header |= (byte & 0x7f) << shift;
    }
    const length = header >>> 1;
    const values = header & 1 ? 8 * length : length;
    // The last run may be filled up.
    if (length === 0 || values > count - seen + 511) throw new Error(`a run of ${values} values where ${count - seen} are left`);
    at += header & 1 ? length * width : (width + 7) >> 3;
    seen += values;
  }
}
