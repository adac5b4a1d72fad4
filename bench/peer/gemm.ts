// Matrix products at training shapes: limbeck's `linear` and its gradients against torch (MKL) and NumPy (OpenBLAS).

import { type Result, spread } from '../results.ts';
import { startLimbeck, startTorch, type Worker } from './worker.ts';

/** C[m n] = A[m k] B[k n]; nt: forward, nn: gradient of the input, tn: gradient of the weight. */
type Product = readonly [layout: 'nt' | 'nn' | 'tn', m: number, n: number, k: number];

const products: readonly Product[] = [
  // The student of the step benchmark, 2048 tokens.
  ['nt', 2048, 1024, 256],
  ['nn', 2048, 256, 1024],
  ['tn', 1024, 256, 2048],
  ['nt', 2048, 256, 1024],
  ['nt', 2048, 256, 256],
  ['nt', 2048, 128, 256],
  ['tn', 128, 256, 2048],
  // The teacher.
  ['nt', 2048, 2048, 512],
  ['nt', 2048, 512, 2048],
  // The output head, one piece of tokens.
  ['nt', 512, 8192, 256],
  ['nn', 512, 256, 8192],
  ['tn', 8192, 256, 512],
  // Gemma 2 2B.
  ['nt', 512, 2304, 2304],
  ['nt', 512, 9216, 2304],
  ['nt', 512, 2304, 9216],
  // Squares, small ones, and generation.
  ['nt', 1024, 1024, 1024],
  ['nt', 128, 768, 768],
  ['nt', 64, 64, 64],
  ['nt', 1, 2304, 2304],
];

export async function compareGemm(threads: number, rounds: number): Promise<Result[]> {
  const workers: { worker: Worker; library: string; label: string }[] = [
    { worker: startLimbeck(), library: 'limbeck', label: 'limbeck' },
  ];
  try {
    await workers[0]!.worker.ask({ cmd: 'init', task: 'none', threads });
    const [torch, numpy] = [startTorch('torch', threads), startTorch('numpy', threads)];
    try {
      const { torch: version, numpy: numpyVersion, blas, mkl } = await torch.ask<Record<string, string>>({ cmd: 'versions' });
      workers.push({ worker: torch, library: 'torch', label: `torch ${version}${mkl ? ' (MKL)' : ''}` });
      workers.push({ worker: numpy, library: 'numpy', label: `numpy ${numpyVersion} (${blas})` });
    } catch (error) {
      await Promise.all([torch.close(), numpy.close()]);
      console.log(`peer not measured: ${(error as Error).message}`);
    }
    console.log(`\nMatrix products, float32, ${threads} threads, GFLOP/s (median of ${rounds} rounds)`);
    for (const { library, label } of workers.slice(1)) console.log(`  ${library}: ${label}`);
    console.log(
      `${'product (m n k)'.padEnd(24)}${workers.map(({ library }) => library.padStart(10)).join('')}${'to the best'.padStart(14)}`,
    );
    const results: Result[] = [];
    for (const product of products) results.push(...(await compare(product, workers, threads, rounds)));
    return results;
  } finally {
    await Promise.all(workers.map(({ worker }) => worker.close()));
  }
}

async function compare(
  [layout, m, n, k]: Product,
  workers: readonly { worker: Worker; library: string; label: string }[],
  threads: number,
  rounds: number,
): Promise<Result[]> {
  const rates = workers.map((): number[] => []);
  for (let round = 0; round < rounds; round++) {
    for (let turn = 0; turn < workers.length; turn++) {
      const index = (turn + round) % workers.length;
      const { worker, library } = workers[index]!;
      const { seconds } = await worker.ask<{ seconds: number }>({ cmd: 'gemm', library, layout, m, n, k, threads, seconds: 0.2 });
      rates[index]!.push((2 * m * n * k) / seconds / 1e9);
    }
  }
  const spreads = rates.map(spread);
  const ours = spreads[0]!.median;
  const best = Math.max(...spreads.slice(1).map(({ median }) => median));
  const cells = spreads.map(({ median }) => median.toFixed(1).padStart(10));
  const share = workers.length > 1 ? `${((100 * ours) / best).toFixed(0)} %` : '';
  console.log(`${`${layout} ${m} ${n} ${k}`.padEnd(24)}${cells.join('')}${share.padStart(14)}`);
  return spreads.map((values, index) => ({
    bench: 'gemm',
    op: `gemm_${layout}`,
    shape: `${m}x${n}x${k}`,
    dtype: 'f32',
    threads,
    ...values,
    unit: 'GFLOP/s',
    ...(index > 0 && { peer: workers[index]!.label, ratio: ours / values.median }),
  }));
}
