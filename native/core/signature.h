// An op's signature: `rms_norm(x[* c], w[c]:float, eps) -> y[* c], rstd[*]:f32`. Parsed once; each call binds its dims to shapes.
//
//   x[* c]      a tensor; `*` stands for any leading dims, the same in all tensors; an integer is a fixed size; `[]` is a scalar tensor
//   :f32 :bf16 :i32 :u8 :f64   a fixed dtype; `:float` is f32 or bf16; none is the call's compute dtype: f32, or on a GPU
//               that of the first such tensor (else of the first :float one), which the others must share
//   x[..]?      may be absent          p[..]&   is updated in place
//   eps         a number; an output dim may take its size from one of that name
//   dw[..]+     an output that can be added to            dr = dy   an output that is the same tensor as an input
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "core/kernel.h"

namespace limbeck {

enum class DTypeRule : uint8_t { compute, any_float, f32, bf16, i32, u8, f64 };

struct Dim {
  enum Kind : uint8_t { star, symbol, fixed } kind;
  int64_t value;  // the symbol's index, or the size
};

struct TensorSpec {
  std::string name;
  std::vector<Dim> dims;
  DTypeRule dtype = DTypeRule::compute;
  bool optional = false, in_place = false, accumulates = false;
  std::string alias;  // of an output: the input it is
};

struct Argument {
  std::string name;
  bool scalar;
  int index;  // among tensors or among scalars
};

struct Signature {
  std::string op, text;
  std::vector<Argument> arguments;  // in the order they are written
  std::vector<TensorSpec> in, out;  // `out` without the aliases
  std::vector<std::pair<std::string, std::string>> aliases;
  std::vector<std::string> scalars, symbols;

  static Signature parse(std::string_view text);

  // Checks in[] and scalars against the signature and fills shape and dtype of out[]. Views that are absent have no data.
  void bind(Call& call, bool computes_bf16) const;
};

std::string shape_text(const View& v);

}  // namespace limbeck
