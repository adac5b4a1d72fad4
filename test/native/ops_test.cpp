// The row and element kernels give the same bits with one thread and with four. Buffers are exactly as long as their tensors, so
// that a build with sanitizers sees a tail that is read or written too far. Values are tested from TypeScript.
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>

#include "check.h"
#include "core/families.h"

using namespace limbeck;

namespace {

const Kernel& kernel(const std::string& name) {
  for (int i = 0; i < cpu_isa_count; ++i) {
    if (std::strcmp(cpu_isas[i].isa, LIMBECK_TEXT(LIMBECK_ISA)) != 0) continue;
    for (int f = 0; f < cpu_isas[i].count; ++f)
      for (int k = 0; k < cpu_isas[i].families[f]->count; ++k)
        if (name == cpu_isas[i].families[f]->kernels[k].name) return cpu_isas[i].families[f]->kernels[k];
  }
  throw Error(ErrorKind::internal, "ERR_NO_KERNEL", "no kernel " + name);
}

using Shape = std::initializer_list<int64_t>;

struct Tensor {
  View view;
  std::unique_ptr<char[]> bytes;

  // Floats are in (-1, 1), other numbers below `below`.
  Tensor(Shape shape, DType dtype = DType::f32, int below = 2, uint32_t seed = 1) {
    view.dtype = dtype;
    for (int64_t d : shape) view.dims[view.rank++] = d;
    bytes = std::make_unique<char[]>(size());
    view.data = bytes.get();
    for (int64_t i = 0; i < view.size(); ++i) {
      seed = seed * 1664525u + 1013904223u;
      const float x = static_cast<float>(static_cast<int32_t>(seed)) / 2147483648.f;
      if (dtype == DType::f32) view.as<float>()[i] = x;
      if (dtype == DType::f64) view.as<double>()[i] = x * x;
      if (dtype == DType::i32) view.as<int32_t>()[i] = static_cast<int32_t>((seed >> 8) % static_cast<uint32_t>(below));
      if (dtype == DType::u8) view.as<uint8_t>()[i] = static_cast<uint8_t>(seed >> 31);
      if (dtype == DType::bf16) {
        uint32_t u;
        std::memcpy(&u, &x, 4);
        view.as<uint16_t>()[i] = static_cast<uint16_t>(u >> 16);
      }
    }
  }
  size_t size() const { return static_cast<size_t>(view.size()) * size_of(view.dtype); }
};

using Tensors = std::vector<Tensor>;
template <class... T>
Tensors tensors(T&&... each) {
  Tensors all;
  (all.push_back(std::forward<T>(each)), ...);
  return all;
}

ThreadPool one(1), four(4);

// Runs on both pools, overwriting and accumulating; `updated` of the inputs are changed in place.
void same_bits(const char* name, Tensors (*inputs)(), Tensors (*outputs)(), std::initializer_list<double> scalars = {}, int updated = 0) {
  const Kernel& k = kernel(name);
  for (bool accumulate : {false, true}) {
    std::string bits[2];
    for (int run = 0; run < 2; ++run) {
      Tensors in = inputs(), out = outputs();
      Call call;
      call.op = name;
      call.threads = run == 0 ? &one : &four;
      for (size_t i = 0; i < in.size(); ++i) call.in[i] = in[i].view;
      for (size_t i = 0; i < out.size(); ++i) call.out[i] = out[i].view, call.accumulate[i] = accumulate && out[i].view.dtype == DType::f32;
      int at = 0;
      for (double s : scalars) call.scalar[at++] = s;
      call.workspace_bytes = k.workspace ? k.workspace(call) : 0;
      const std::unique_ptr<void, void (*)(void*)> workspace(std::aligned_alloc(64, (call.workspace_bytes + 63) / 64 * 64), std::free);
      call.workspace = workspace.get();
      k.run(call);
      for (const Tensor& t : out) bits[run].append(t.bytes.get(), t.size());
      for (int i = 0; i < updated; ++i) bits[run].append(in[static_cast<size_t>(i)].bytes.get(), in[static_cast<size_t>(i)].size());
    }
    if (bits[0] != bits[1]) std::printf("  %s, accumulate %d\n", name, accumulate);
    CHECK(bits[0] == bits[1]);
    CHECK(!bits[0].empty());
  }
}

// Several chunks, and sizes that end inside a vector.
constexpr int64_t N = 3 * 16384 + 5, R = 301, C = 211;
constexpr DType bf16 = DType::bf16, i32 = DType::i32, u8 = DType::u8, f64 = DType::f64;

}  // namespace

TEST(elements) {
  for (const char* name : {"gelu", "silu", "copy", "copy_backward", "sub_backward"})
    same_bits(name, [] { return tensors(Tensor({N})); }, [] { return tensors(Tensor({N})); });
  for (const char* name : {"geglu", "swiglu", "gelu_backward", "silu_backward", "add", "sub", "mul"})
    same_bits(name, [] { return tensors(Tensor({N}), Tensor({N})); }, [] { return tensors(Tensor({N})); });
  for (const char* name : {"geglu_backward", "swiglu_backward", "mul_backward"})
    same_bits(name, [] { return tensors(Tensor({N}), Tensor({N}), Tensor({N})); }, [] { return tensors(Tensor({N}), Tensor({N})); });
  same_bits("scale", [] { return tensors(Tensor({N})); }, [] { return tensors(Tensor({N})); }, {3});
  same_bits("softcap", [] { return tensors(Tensor({N})); }, [] { return tensors(Tensor({N})); }, {3});
  same_bits("softcap_backward", [] { return tensors(Tensor({N}), Tensor({N})); }, [] { return tensors(Tensor({N})); }, {3});
  same_bits("to_bf16", [] { return tensors(Tensor({N})); }, [] { return tensors(Tensor({N}, bf16)); });
  same_bits("to_f32", [] { return tensors(Tensor({N}, bf16)); }, [] { return tensors(Tensor({N})); });
  same_bits("fill", [] { return tensors(Tensor({N})); }, [] { return tensors(); }, {3}, 1);
  same_bits("copy_", [] { return tensors(Tensor({N}), Tensor({N}, DType::f32, 0, 7)); }, [] { return tensors(); }, {}, 1);
  same_bits("add_", [] { return tensors(Tensor({N}), Tensor({N})); }, [] { return tensors(); }, {}, 1);
}

TEST(norms) {
  same_bits("rms_norm", [] { return tensors(Tensor({R, C}), Tensor({C})); }, [] { return tensors(Tensor({R, C}), Tensor({R})); }, {1e-6, 1});
  same_bits("rms_norm_add", [] { return tensors(Tensor({R, C}), Tensor({C}, bf16), Tensor({R, C})); },
            [] { return tensors(Tensor({R, C}), Tensor({R})); }, {1e-6, 1});
  same_bits("rms_norm_backward", [] { return tensors(Tensor({R, C}), Tensor({R, C}), Tensor({C}), Tensor({R})); },
            [] { return tensors(Tensor({R, C}), Tensor({C})); }, {1});
  same_bits("layer_norm", [] { return tensors(Tensor({R, C}), Tensor({C}), Tensor({C}, bf16)); },
            [] { return tensors(Tensor({R, C}), Tensor({R}), Tensor({R})); }, {1e-6});
  same_bits("layer_norm_backward", [] { return tensors(Tensor({R, C}), Tensor({R, C}), Tensor({C}), Tensor({R}), Tensor({R})); },
            [] { return tensors(Tensor({R, C}), Tensor({C}), Tensor({C})); });
}

TEST(embeddings) {
  same_bits("embedding", [] { return tensors(Tensor({R}, i32, 37), Tensor({37, C})); }, [] { return tensors(Tensor({R, C})); }, {3});
  same_bits("embedding", [] { return tensors(Tensor({R}, i32, 37), Tensor({37, C}, bf16)); }, [] { return tensors(Tensor({R, C})); }, {3});
  same_bits("embedding_backward", [] { return tensors(Tensor({R, C}), Tensor({R}, i32, 37), Tensor({97, C})); },
            [] { return tensors(Tensor({97, C})); }, {3});
}

TEST(rotary) {
  same_bits("rope_table", [] { return tensors(Tensor({2, R}, i32, 9999)); }, [] { return tensors(Tensor({2, R, 34})); }, {34, 1e4});
  same_bits("rope_angles", [] { return tensors(Tensor({2, R}, i32, 9999), Tensor({34})); }, [] { return tensors(Tensor({2, R, 34})); }, {1.25});
  for (const char* name : {"rope", "rope_backward"})
    same_bits(name, [] { return tensors(Tensor({2, R, 3, 34}), Tensor({2, R, 34})); }, [] { return tensors(Tensor({2, R, 3, 34})); }, {1});
}

TEST(reductions) {
  for (const char* name : {"sum", "mean"}) same_bits(name, [] { return tensors(Tensor({N})); }, [] { return tensors(Tensor({})); });
  for (const char* name : {"sum_backward", "mean_backward"})
    same_bits(name, [] { return tensors(Tensor({}), Tensor({N})); }, [] { return tensors(Tensor({N})); });
  same_bits("dot", [] { return tensors(Tensor({N}), Tensor({N})); }, [] { return tensors(Tensor({})); });
  same_bits("dot_backward", [] { return tensors(Tensor({}), Tensor({N}), Tensor({N})); }, [] { return tensors(Tensor({N}), Tensor({N})); });
  same_bits("squared_norm", [] { return tensors(Tensor({N}), Tensor({}, f64)); }, [] { return tensors(Tensor({}, f64)); });
  same_bits("is_finite", [] { return tensors(Tensor({N})); }, [] { return tensors(Tensor({}, i32)); });
  same_bits("argmax", [] { return tensors(Tensor({R, C})); }, [] { return tensors(Tensor({R}, i32)); });
  same_bits("top_k", [] { return tensors(Tensor({R, C})); }, [] { return tensors(Tensor({R, 7}), Tensor({R, 7}, i32)); }, {7});
  for (const char* name : {"softmax", "log_softmax"})
    same_bits(name, [] { return tensors(Tensor({R, C})); }, [] { return tensors(Tensor({R, C})); });
  for (const char* name : {"softmax_backward", "log_softmax_backward"})
    same_bits(name, [] { return tensors(Tensor({R, C}), Tensor({R, C})); }, [] { return tensors(Tensor({R, C})); });
}

TEST(optimizer) {
  same_bits("adamw",
            [] {
              return tensors(Tensor({N}), Tensor({N}), Tensor({N}), Tensor({N}, DType::f32, 0, 9), Tensor({}, f64), Tensor({(N + 63) / 64}, u8),
                             Tensor({2}, f64), Tensor({N}, bf16));
            },
            [] { return tensors(); }, {0.9, 0.95, 1e-8, 0.1, 0.1, 7}, 4);
  same_bits("adamw_8bit",
            [] {
              constexpr int64_t blocks = (N + 255) / 256;
              return tensors(Tensor({N}, bf16), Tensor({N}), Tensor({N}, u8), Tensor({blocks}, DType::f32, 0, 9), Tensor({N}, u8),
                             Tensor({blocks}, DType::f32, 0, 11), Tensor({}, f64), Tensor({(N + 63) / 64}, u8), Tensor({2}, f64));
            },
            [] { return tensors(); }, {0.9, 0.95, 1e-8, 0.1, 0.1, 7}, 6);
}

TEST(rearrangements) {
  for (const char* name : {"transpose", "transpose_backward"}) {
    same_bits(name, [] { return tensors(Tensor({2, 61, 3, 53, 1})); }, [] { return tensors(Tensor({2, 53, 3, 61, 1})); });
    same_bits(name, [] { return tensors(Tensor({3, 37, 1, 41, 19})); }, [] { return tensors(Tensor({3, 41, 1, 37, 19})); });
  }
  same_bits("concat", [] { return tensors(Tensor({R, 3, 67}), Tensor({R, 5, 67})); }, [] { return tensors(Tensor({R, 8, 67})); }, {8});
  same_bits("concat_backward", [] { return tensors(Tensor({R, 8, 67}), Tensor({R, 3, 67}), Tensor({R, 5, 67})); },
            [] { return tensors(Tensor({R, 3, 67}), Tensor({R, 5, 67})); });
  same_bits("slice", [] { return tensors(Tensor({R, 8, 67})); }, [] { return tensors(Tensor({R, 3, 67})); }, {2, 3});
  same_bits("slice_backward", [] { return tensors(Tensor({R, 3, 67}), Tensor({R, 8, 67})); }, [] { return tensors(Tensor({R, 8, 67})); }, {2});
  same_bits("pick", [] { return tensors(Tensor({N, 2}), Tensor({N}, i32)); }, [] { return tensors(Tensor({N})); });
  same_bits("pick_backward", [] { return tensors(Tensor({N}), Tensor({N, 2}), Tensor({N}, i32)); }, [] { return tensors(Tensor({N, 2})); });
}
