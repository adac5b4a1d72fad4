// The ONNX format: a ModelProto in protobuf's wire form (fields as of onnx.proto, IR version 8), written in one pass. Tensors follow their
// descriptions in the same file, or lie in a second one, since protobuf readers stop at 2 GiB.

import { rm } from 'node:fs/promises';
import { basename } from 'node:path';
import { FormatError } from '../tensor/errors.ts';
import { writeAll, writeAtomic } from './atomic.ts';

const types = {
  float: { code: 1, bytes: 4 },
  float16: { code: 10, bytes: 2 },
  int64: { code: 7, bytes: 8 },
  bool: { code: 9, bytes: 1 },
} as const;

/** An element type, as the format's text form spells it. */
export type OnnxType = keyof typeof types;

/** A constant of the graph. `data` may be a function, called when its turn comes, whose pieces follow one another in the file. */
export interface OnnxTensor {
  readonly name: string;
  readonly type: OnnxType;
  readonly shape: readonly number[];
  readonly data: ArrayBufferView | (() => Iterable<ArrayBufferView> | AsyncIterable<ArrayBufferView>);
}

/** An input or output of the graph; a dim that is a name is free. */
export interface OnnxValue {
  readonly name: string;
  readonly type: OnnxType;
  readonly shape: readonly (number | string)[];
}

/** An operator with its operands; an attribute is a whole number or a list of them, or `{ float }`. */
export interface OnnxNode {
  readonly op: string;
  readonly name: string;
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly attributes?: Readonly<Record<string, number | readonly number[] | { readonly float: number }>>;
}

/** Nodes stand in an order in which each reads only what came before. */
export interface OnnxGraph {
  readonly name: string;
  readonly inputs: readonly OnnxValue[];
  readonly outputs: readonly OnnxValue[];
  readonly tensors: readonly OnnxTensor[];
  readonly nodes: readonly OnnxNode[];
}

export interface OnnxOptions {
  /** Version of the operator set that the nodes are written for. Default 18. */
  readonly opset?: number;
  /** Who made it, for readers. */
  readonly producer?: { readonly name: string; readonly version: string };
  /** Tensors in `path`_data: `true`, `false`, or only where one file would exceed 2 GiB. Default `auto`. */
  readonly external?: boolean | 'auto';
}

// Protobuf in memory is bounded by a signed 32-bit length.
const MOST = 2 ** 31 - 1;
// Pages, so that a reader may map the tensors. Smaller ones stay inside, where shape inference looks for constants.
const PAGE = 4096;
const SMALLEST = 1024;

/**
 * Writes a model that replaces `path` only when complete; with external tensors `path`_data is renamed just before it. The files hold
 * what `graph` says, which is not checked against the operators.
 * @returns whether the tensors lie in `path`_data.
 * @throws FormatError where a tensor's data and description differ, or one file would exceed 2 GiB; FileError `ERR_WRITE`.
 */
export async function writeOnnx(path: string, graph: OnnxGraph, options: OnnxOptions = {}): Promise<boolean> {
  const { external: wanted = 'auto' } = options;
  const inside = modelProto(graph, options, undefined);
  const external = wanted === 'auto' ? inside.bytes > MOST : wanted;
  const dataPath = `${path}_data`;
  const { bytes, parts } = external ? modelProto(graph, options, basename(dataPath)) : inside;
  if (bytes > MOST) {
    throw new FormatError(
      `writeOnnx: ${path} would have ${bytes} bytes in one file; the format allows ${MOST}; use external tensors`,
      {
        code: 'ERR_ONNX_SIZE',
        op: 'writeOnnx',
        argument: 'external',
        expected: `up to ${MOST} bytes`,
        actual: String(bytes),
      },
    );
  }
  await writeAtomic(path, async (file) => {
    for (const part of parts) {
      if (part instanceof Uint8Array) await writeAll(file, part);
      else for await (const piece of piecesOf(part)) await writeAll(file, piece);
    }
    if (!external) return;
    await writeAtomic(dataPath, async (data) => {
      for (const { tensor, gap } of layout(graph.tensors)) {
        await writeAll(data, new Uint8Array(gap));
        for await (const piece of piecesOf(tensor)) await writeAll(data, piece);
      }
    });
  });
  if (!external) await rm(dataPath, { force: true });
  return external;
}

function bytesOf({ shape, type }: OnnxTensor): number {
  return shape.reduce((n, size) => n * size, types[type].bytes);
}

/** External tensors with their offsets, and the bytes between each and the one before. */
function* layout(tensors: readonly OnnxTensor[]): Generator<{ tensor: OnnxTensor; offset: number; gap: number }> {
  let end = 0;
  for (const tensor of tensors) {
    if (bytesOf(tensor) < SMALLEST) continue;
    const offset = Math.ceil(end / PAGE) * PAGE;
    yield { tensor, offset, gap: offset - end };
    end = offset + bytesOf(tensor);
  }
}

async function* piecesOf(tensor: OnnxTensor): AsyncGenerator<ArrayBufferView, void, undefined> {
  const expected = bytesOf(tensor);
  let bytes = 0;
  for await (const piece of typeof tensor.data === 'function' ? tensor.data() : [tensor.data]) {
    bytes += piece.byteLength;
    yield piece;
  }
  if (bytes === expected) return;
  throw new FormatError(
    `writeOnnx: tensor '${tensor.name}' [${tensor.shape.join(' ')}] ${tensor.type} has ${bytes} bytes, not ${expected}`,
    {
      code: 'ERR_ONNX_TENSOR',
      op: 'writeOnnx',
      argument: tensor.name,
      expected: String(expected),
      actual: String(bytes),
    },
  );
}

// Protobuf. A message is the list of its encoded fields; a tensor whose bytes follow stands for them.
type Part = Uint8Array | OnnxTensor;
interface Message {
  readonly bytes: number;
  readonly parts: readonly Part[];
}

function join(messages: readonly Message[]): Message {
  const parts: Part[] = [];
  let small: Uint8Array[] = [];
  const flush = (): void => {
    if (small.length > 0) parts.push(Buffer.concat(small));
    small = [];
  };
  for (const part of messages.flatMap((message) => message.parts)) {
    if (part instanceof Uint8Array) {
      small.push(part);
    } else {
      flush();
      parts.push(part);
    }
  }
  flush();
  return { bytes: messages.reduce((n, message) => n + message.bytes, 0), parts };
}

const raw = (bytes: Uint8Array): Message => ({ bytes: bytes.length, parts: [bytes] });

/** Seven bits a byte, the lowest first. Negative numbers are 64 bits of two's complement. */
function varint(value: number): Uint8Array {
  const bytes: number[] = [];
  let rest = BigInt.asUintN(64, BigInt(value));
  for (; rest > 127n; rest >>= 7n) bytes.push(Number(rest & 127n) | 128);
  return Uint8Array.from([...bytes, Number(rest)]);
}

const key = (field: number, wire: number): Uint8Array => varint((field << 3) | wire);
const int = (field: number, value: number): Message => raw(Buffer.concat([key(field, 0), varint(value)]));
const text = (field: number, value: string): Message => message(field, raw(Buffer.from(value)));
function message(field: number, ...content: readonly Message[]): Message {
  const bytes = content.reduce((n, part) => n + part.bytes, 0);
  return join([raw(Buffer.concat([key(field, 2), varint(bytes)])), ...content]);
}
function float(field: number, value: number): Message {
  const bits = Buffer.alloc(4);
  bits.writeFloatLE(value);
  return raw(Buffer.concat([key(field, 5), bits]));
}

function modelProto(graph: OnnxGraph, { opset = 18, producer }: OnnxOptions, location: string | undefined): Message {
  return join([
    int(1, 8),
    ...(producer === undefined ? [] : [text(2, producer.name), text(3, producer.version)]),
    message(7, ...graphProto(graph, location)),
    message(8, int(2, opset)),
  ]);
}

function graphProto({ name, inputs, outputs, nodes, tensors }: OnnxGraph, location: string | undefined): Message[] {
  const offsets = new Map(location === undefined ? [] : Array.from(layout(tensors), ({ tensor, offset }) => [tensor, offset]));
  return [
    ...nodes.map((node) => message(1, ...nodeProto(node))),
    text(2, name),
    ...tensors.map((tensor) => {
      const offset = offsets.get(tensor);
      return message(
        5,
        ...tensorProto(tensor),
        offset === undefined ? insideData(tensor) : externalData(tensor, location!, offset),
      );
    }),
    ...inputs.map((value) => message(11, ...valueProto(value))),
    ...outputs.map((value) => message(12, ...valueProto(value))),
  ];
}

function nodeProto({ op, name, inputs, outputs, attributes = {} }: OnnxNode): Message[] {
  return [
    ...inputs.map((input) => text(1, input)),
    ...outputs.map((output) => text(2, output)),
    text(3, name),
    text(4, op),
    ...Object.entries(attributes).map(([attribute, value]) => {
      // The type is said by field 20: 1 a float, 2 an integer, 7 a list of integers.
      if (typeof value === 'number') return message(5, text(1, attribute), int(3, value), int(20, 2));
      if ('float' in value) return message(5, text(1, attribute), float(2, value.float), int(20, 1));
      return message(5, text(1, attribute), ...value.map((item) => int(8, item)), int(20, 7));
    }),
  ];
}

const tensorProto = ({ name, type, shape }: OnnxTensor): Message[] => [
  ...shape.map((size) => int(1, size)),
  int(2, types[type].code),
  text(8, name),
];

function insideData(tensor: OnnxTensor): Message {
  const bytes = bytesOf(tensor);
  return join([raw(Buffer.concat([key(9, 2), varint(bytes)])), { bytes, parts: [tensor] }]);
}

function externalData(tensor: OnnxTensor, location: string, offset: number): Message {
  const entry = (name: string, value: string): Message => message(13, text(1, name), text(2, value));
  return join([
    entry('location', location),
    entry('offset', String(offset)),
    entry('length', String(bytesOf(tensor))),
    int(14, 1),
  ]);
}

function valueProto({ name, type, shape }: OnnxValue): Message[] {
  const dims = shape.map((size) => message(1, typeof size === 'number' ? int(1, size) : text(2, size)));
  return [text(1, name), message(2, message(1, int(1, types[type].code), message(2, ...dims)))];
}
