// QR decomposition by Householder reflections, with LAPACK's signs: the diagonal of R is negative where a column begins positive.

/**
 * Q [N R] of a matrix [N R] = Q R with N >= R, in row-major order.
 * @param x [N R], row-major
 */
export function orthonormalColumns(x: Float32Array, n: number, r: number): Float32Array {
  // Columns lie together.
  const columns = Array.from({ length: r }, (_, j) => Float64Array.from({ length: n }, (_, i) => x[i * r + j]!));
  const factors = new Float64Array(r);
  const reflect = (v: Float64Array, from: number, factor: number, c: Float64Array): void => {
    let dot = c[from]!; // v[from] counts as 1
    for (let i = from + 1; i < n; i++) dot += v[i]! * c[i]!;
    dot *= factor;
    c[from] = c[from]! - dot;
    for (let i = from + 1; i < n; i++) c[i] = c[i]! - dot * v[i]!;
  };
  for (const [j, v] of columns.entries()) {
    let squares = 0;
    for (let i = j + 1; i < n; i++) squares += v[i]! * v[i]!;
    if (squares === 0) continue; // it has its place already
    const first = v[j]!;
    const length = (first < 0 ? 1 : -1) * Math.sqrt(first * first + squares);
    factors[j] = (length - first) / length;
    for (let i = j + 1; i < n; i++) v[i] = v[i]! / (first - length);
    for (let next = j + 1; next < r; next++) reflect(v, j, factors[j]!, columns[next]!);
  }
  const q = new Float32Array(n * r);
  for (let j = 0; j < r; j++) {
    const c = new Float64Array(n);
    c[j] = 1;
    for (let k = r - 1; k >= 0; k--) reflect(columns[k]!, k, factors[k]!, c);
    for (let i = 0; i < n; i++) q[i * r + j] = c[i]!;
  }
  return q;
}
