// Products of few tokens with weights in blocks of 8 or 4 bits (core/blocks.h), as a model writes text: all that counts is to read the codes
// once. A warp has 16 rows of the weight and its share of their blocks. Codes become bf16 in registers and go to the tensor cores as they
// are, rows of the weight as the left operand, eight tokens as the right one; what a block sums up to is scaled in float32. Which k a
// lane has makes no difference as long as both operands agree: its own are neighbours, 8 bytes of the 32 of every block.
//   M tokens, N rows of the weight, K elements of each
#pragma once
#include "core/blocks.h"
#include "cuda/lanes.cuh"
#include "cuda/ptx.cuh"

namespace limbeck::cuda {

constexpr int kFewTokens = 32;  // more are worth making bf16 of the weight
constexpr int kBlockBytes = 32;
constexpr int kProductRows = 16, kProductWarps = 8;
constexpr int kAhead = 4;  // blocks that are on their way at once

// A byte of four NF4 values, as float32 or rounded to bf16 in the upper half: tables for __byte_perm, which looks four codes up at once. An
// array that is indexed by a code would lie in memory.
LIMBECK_EVERYWHERE constexpr uint32_t nf4_bytes(int first, int byte, bool rounded) {
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, nf4_value(first + i));
    bytes |= ((rounded ? bits + 0x7fff + (bits >> 16 & 1) : bits) >> 8 * byte & 0xff) << 8 * i;
  }
  return bytes;
}
template <int First, int Byte, bool Rounded>
constexpr uint32_t kNf4Bytes = nf4_bytes(First, Byte, Rounded);

// That byte of the values of four codes: from either half of the table by three bits of each code; the fourth says which.
template <int Byte, bool Rounded>
__device__ __forceinline__ uint32_t nf4_look_up(uint32_t codes) {
  const uint32_t which = codes & 0x7777, half = (codes >> 1 & 0x4444) | 0x3210;
  return __byte_perm(__byte_perm(kNf4Bytes<0, Byte, Rounded>, kNf4Bytes<4, Byte, Rounded>, which),
                     __byte_perm(kNf4Bytes<8, Byte, Rounded>, kNf4Bytes<12, Byte, Rounded>, which), half);
}

// The values of four codes of 4 bits, the lowest first.
__device__ __forceinline__ void nf4_values(uint32_t codes, float* values) {
  const uint32_t bytes[4] = {nf4_look_up<0, false>(codes), nf4_look_up<1, false>(codes), nf4_look_up<2, false>(codes), nf4_look_up<3, false>(codes)};
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t pairs = i == 0 ? 0x5140 : 0x7362, low = __byte_perm(bytes[0], bytes[1], pairs), high = __byte_perm(bytes[2], bytes[3], pairs);
    values[i] = __uint_as_float(__byte_perm(low, high, 0x5410));
    values[i + 1] = __uint_as_float(__byte_perm(low, high, 0x7632));
  }
}

// Four codes, the lowest first, as two pairs of bf16.
template <int Bits>
__device__ __forceinline__ void widen_codes(uint32_t codes, uint32_t (&pairs)[2]) {
  if constexpr (Bits == 4) {
    const uint32_t low = nf4_look_up<2, true>(codes), high = nf4_look_up<3, true>(codes);
    pairs[0] = __byte_perm(low, high, 0x5140);
    pairs[1] = __byte_perm(low, high, 0x7362);
  } else {
    // 0x4300 | n is 128 + n for seven bits n, and with the sign's bit it is 256: what a negative number is to be moved by.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t bytes = __byte_perm(codes, 0, i == 0 ? 0x4140 : 0x4342);
      pairs[i] = subtract_bf16((bytes & 0x007f007f) | 0x43004300, (bytes & 0x00800080) | 0x43004300);
    }
  }
}

// y[m n] = x[m k] w[n k] (+ bias[n]) for up to 8 * Tiles tokens. `whole`: rows of x are pieces of 16 bytes.
template <int Bits, int Tiles>
__global__ __launch_bounds__(32 * kProductWarps) void block_product(const bf16* x, const uint8_t* codes, const bf16* scales, const bf16* bias, bf16* y,
                                                                    int m, int64_t n, int64_t k, int blocks, bool whole) {
  constexpr int Block = static_cast<int>(block_of(Bits)), Own = Block / 4;  // codes of a block; a lane's
  Shared shared;
  float* parts = shared.take<float>(kProductWarps * kProductRows * 8 * Tiles);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kProductRows;
  const int begin = static_cast<int>(static_cast<int64_t>(blocks) * warp / kProductWarps);
  const int end = static_cast<int>(static_cast<int64_t>(blocks) * (warp + 1) / kProductWarps);
  float out[Tiles][4] = {};  // (row lane / 4, token 2 (lane % 4)), (.., + 1), (row + 8, ..) twice
#pragma unroll 1
  for (int first = begin; first < end; first += kAhead) {
    uint2 words[kAhead][2];
    float scale[kAhead][2];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = row0 + lane / 4 + 8 * half, at = row * blocks + first + i;
        words[i][half] = make_uint2(0, 0), scale[i][half] = 0;
        if (first + i >= end || row >= n) continue;
        words[i][half] = *reinterpret_cast<const uint2*>(codes + at * kBlockBytes + lane % 4 * 8);
        scale[i][half] = to_float(scales[at]);
      }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= end) break;
      uint32_t tokens[Tiles][Own / 2];
      const int64_t column = static_cast<int64_t>(first + i) * Block + lane % 4 * Own;
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        const int token = 8 * tile + lane / 4;
        const bf16* from = x + token * k + column;
#pragma unroll
        for (int j = 0; j < Own; j += 8) {
          uint4 piece = make_uint4(0, 0, 0, 0);
          if (token < m && whole) {
            if (column + j < k) piece = *reinterpret_cast<const uint4*>(from + j);
          } else if (token < m) {
            const auto pair = [&](int e) {
              const uint32_t low = column + e < k ? from[e].bits : 0u, high = column + e + 1 < k ? from[e + 1].bits : 0u;
              return low | high << 16;
            };
            piece = make_uint4(pair(j), pair(j + 2), pair(j + 4), pair(j + 6));
          }
          tokens[tile][j / 2] = piece.x, tokens[tile][j / 2 + 1] = piece.y, tokens[tile][j / 2 + 2] = piece.z, tokens[tile][j / 2 + 3] = piece.w;
        }
      }
      float sums[Tiles][4] = {};
#pragma unroll
      for (int step = 0; step < Block / 16; ++step) {
        uint32_t upper[2], lower[2];
        const int shift = Bits == 4 ? step % 2 * 16 : 0;
        const bool second = step >= Block / 32;
        widen_codes<Bits>((second ? words[i][0].y : words[i][0].x) >> shift, upper);
        widen_codes<Bits>((second ? words[i][1].y : words[i][1].x) >> shift, lower);
        const uint32_t rows[4] = {upper[0], lower[0], upper[1], lower[1]};
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) ptx::mma_m16n8k16(sums[tile], rows, tokens[tile][2 * step], tokens[tile][2 * step + 1]);
      }
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[tile][e] += sums[tile][e] * scale[i][e / 2];
    }
  }

  constexpr int Stride = 8 * Tiles;
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      parts[(warp * kProductRows + lane / 4 + e / 2 * 8) * Stride + 8 * tile + lane % 4 * 2 + e % 2] = out[tile][e];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < m * kProductRows; i += 32 * kProductWarps) {
    const int token = i / kProductRows, row = i % kProductRows;
    if (row0 + row >= n) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kProductWarps; ++w) sum += parts[(w * kProductRows + row) * Stride + token];
    y[token * n + row0 + row] = to_bf16(bias ? sum + to_float(bias[row0 + row]) : sum);
  }
}

template <int Bits>
void few_tokens(const Call& call, const bf16* x, const uint8_t* codes, const bf16* scales, const bf16* bias, bf16* y, int64_t m, int64_t n, int64_t k,
                int64_t blocks) {
  const auto run = [&](auto tiles) {
    const Grid grid{dim3(static_cast<unsigned>(ceil_div(n, kProductRows))), dim3(32 * kProductWarps), kProductWarps * kProductRows * 8 * tiles * sizeof(float)};
    launch(call, grid, block_product<Bits, tiles>, x, codes, scales, bias, y, static_cast<int>(m), n, k, static_cast<int>(blocks), k % 8 == 0 && aligned(x));
  };
  if (m <= 8) run(std::integral_constant<int, 1>{});
  else if (m <= 16) run(std::integral_constant<int, 2>{});
  else run(std::integral_constant<int, 4>{});
}

}  // namespace limbeck::cuda
