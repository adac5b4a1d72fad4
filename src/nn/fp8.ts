// A frozen matrix of one byte an element, which is filled without ever lying in memory whole in a wider type.
import { type Fp8Weight, quantizeFp8_ } from '../ops/quant.ts';
import { LimbeckError } from '../tensor/errors.ts';
import { keep, scope } from '../tensor/scope.ts';
import { empty, tensor, viewOf } from '../tensor/tensor.ts';

/** A parameter that is kept in fp8. */
export interface Fp8Parameter {
  readonly name: string;
  readonly shape: readonly [number, number];
  readonly weight: Fp8Weight;
  /** Takes elements from the first to the last. */
  write(from: number, data: Float32Array): void;
  dispose(): void;
}

/** Elements that are rounded at once: whole rows of at most a MiB of f32, but one at least. */
const atOnce = 1 << 18;

/** Makes one; its values are undefined until all are written. */
export function createFp8(name: string, shape: readonly [number, number]): Fp8Parameter {
  const [n, k] = shape;
  const weight = keep({ codes: empty([n, k], 'u8'), scale: empty([n]) });
  let staged: Float32Array | undefined;
  let done = 0; // elements that are rounded
  let waiting = 0; // elements that are staged

  const round = (): void => {
    const [row, rows] = [done / k, waiting / k];
    scope(() => {
      const w = tensor(staged!.subarray(0, waiting), [rows, k]);
      quantizeFp8_({ codes: viewOf(weight.codes, [rows, k], done), scale: viewOf(weight.scale, [rows], row) }, w);
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
