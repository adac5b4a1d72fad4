// A frozen matrix of few bits an element, which is filled without ever lying in memory whole in a wider type.
import { type QuantizedFormat, type QuantizedWeight, quantize_, quantizedShapes } from '../ops/quant.ts';
import { LimbeckError } from '../tensor/errors.ts';
import { scope } from '../tensor/scope.ts';
import { empty, tensor, viewOf } from '../tensor/tensor.ts';

/** A parameter that is kept in few bits. */
export interface QuantizedParameter {
  readonly name: string;
  readonly shape: readonly [number, number];
  readonly weight: QuantizedWeight;
  /** Takes elements from the first to the last. */
  write(from: number, data: Float32Array): void;
  dispose(): void;
}

/** Elements that are rounded at once: whole rows of at most a MiB of f32, but one at least. */
const atOnce = 1 << 18;

/** Makes one in the current scope; its values are undefined until all are written. */
export function createQuantized(name: string, shape: readonly [number, number], format: QuantizedFormat): QuantizedParameter {
  const [n, k] = shape;
  const sizes = quantizedShapes(format, n, k);
  const scale = empty(sizes.scale, format === 'fp8' ? 'f32' : 'bf16');
  const weight = { format, shape, codes: empty(sizes.codes, 'u8'), scale } as QuantizedWeight;
  let staged: Float32Array | undefined;
  let done = 0; // elements that are rounded
  let waiting = 0; // elements that are staged

  const round = (): void => {
    const [row, rows] = [done / k, waiting / k];
    scope(() => {
      const part = quantizedShapes(format, rows, k);
      const [codes, perRow] = [part.codes[1], part.scale[1] ?? 1];
      const into = {
        format,
        shape: [rows, k],
        codes: viewOf(weight.codes, part.codes, row * codes),
        scale: viewOf(weight.scale, part.scale, row * perRow),
      } as const;
      quantize_(into as QuantizedWeight, tensor(staged!.subarray(0, waiting), [rows, k]));
    });
    done += waiting;
    waiting = 0;
  };

  return {
    name,
    shape,
    weight,
    write(from, data) {
      if (from === 0) done = waiting = 0;
      if (from !== done + waiting || from + data.length > n * k) {
        throw new LimbeckError(`parameters: elements of '${name}' are written from ${from}, expected ${done + waiting} on`, {
          code: 'ERR_INTERNAL',
          op: 'parameters',
          argument: name,
        });
      }
      staged ??= new Float32Array(Math.min(Math.max(1, Math.floor(atOnce / k)), n) * k);
      for (let at = 0; at < data.length; ) {
        const part = Math.min(data.length - at, staged.length - waiting);
        staged.set(data.subarray(at, at + part), waiting);
        at += part;
        waiting += part;
        if (waiting === staged.length || done + waiting === n * k) round();
      }
      if (done === n * k) staged = undefined;
    },
    dispose() {
      weight.codes.dispose();
      weight.scale.dispose();
    },
  };
}
