// What ops refuse, on every device alike. Compiled once: kernel files of the CPU are compiled for instruction sets that this machine
// may not have, so the std::string work of an error stays out of them.
#pragma once
#include <cstdint>

#include "core/error.h"
#include "core/kernel.h"

namespace limbeck {

// The numbers that linear_distill's signature uses.
enum Divergence { forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, total_variation, alpha_beta, adaptive, divergence_count };
enum Tail { bucket, renormalize, truncate, tail_count };

// ---- Arguments: what can be known before the data is looked at.

// q, k, v, starts stand at in[first..]; scalars are scale, cap, window. `square`: as many keys as queries.
void check_attention(const Call& call, int first, bool square);
void check_attention_step(const Call& call);
void check_distill(const Call& call);
// One entry of `blocks` for each `size` of the parameters in in[0].
void check_blocks(const Call& call, const View& blocks, const char* argument, int64_t size);
void check_concat(const Call& call);
void check_slice(const Call& call, int64_t start, int64_t m, int64_t n);
void check_even_head(const Call& call, int64_t d, const char* argument);
void check_argmax(const Call& call);
void check_top_k(const Call& call);

// ---- Data: what kernels find in it.

enum class Fault : unsigned long long { none, table_row, row_index, target, teacher_token, teacher_twice, teacher_mass, document_start, cache_row, cache_position, cache_row_twice };

// `value` stands at `position`; those that are right lie below `limit`. A GPU tells of it later, so this makes the error only.
Error error_of(Fault fault, const char* op, int64_t position, double value, int64_t limit);
[[noreturn]] void raise(Fault fault, const char* op, int64_t position, double value, int64_t limit);

}  // namespace limbeck
