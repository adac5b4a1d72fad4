// Packed weights of files: the kernels of cpu/ggml.cpp and cpu/kquants.cpp, of the best instruction set of this machine, beside the event
// loop. src/tensor/ggml.ts is the twin.
#include <napi.h>

#include <bit>
#include <cstdint>
#include <cmath>
#include <string>

#include "binding/job.h"
#include "core/cpuid.h"

namespace limbeck {
namespace {

const Kernel& kernel_named(const std::string& name) {
  static const IsaKernels& kernels = choose_isa();
  for (int i = 0; i < kernels.count; ++i)
    for (int j = 0; j < kernels.families[i]->count; ++j)
      if (name == kernels.families[i]->kernels[j].name) return kernels.families[i]->kernels[j];
  throw Error(ErrorKind::internal, "ERR_INTERNAL", "limbeck: there is no kernel " + name);
}

// The arrays of a job, kept until it is done. Whoever asked for it leaves them alone so long.
struct Arrays {
  Napi::ObjectReference from, to;
  Call call;
};

View view_of(const Napi::TypedArray& array, DType dtype) {
  View view;
  view.data = static_cast<char*>(array.ArrayBuffer().Data()) + array.ByteOffset();
  view.dtype = dtype;
  view.rank = 1;
  view.dims[0] = static_cast<int64_t>(array.ByteLength() / size_of(dtype));
  return view;
}

std::shared_ptr<Arrays> arrays_of(const Napi::CallbackInfo& info, DType from, DType to) {
  if (!info[1].IsTypedArray() || !info[2].IsTypedArray()) throw Error(ErrorKind::internal, "ERR_INTERNAL", "limbeck: two typed arrays were expected");
  auto arrays = std::make_shared<Arrays>();
  arrays->from = Napi::Persistent(info[1].As<Napi::Object>());
  arrays->to = Napi::Persistent(info[2].As<Napi::Object>());
  arrays->call.in[0] = view_of(info[1].As<Napi::TypedArray>(), from);
  arrays->call.out[0] = view_of(info[2].As<Napi::TypedArray>(), to);
  return arrays;
}

// unpack(kernel, blocks: Uint8Array, values: Float32Array) -> promise
Napi::Value unpack(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const Kernel& kernel = kernel_named(info[0].As<Napi::String>());
    auto arrays = arrays_of(info, DType::u8, DType::f32);
    return Job::start(
        info.Env(), [arrays, &kernel] { kernel.run(arrays->call); }, [arrays](Napi::Env env) { return env.Undefined(); });
  });
}

// The first value that is larger than `limit`, or not a number; -1 for none.
int64_t first_beyond(const View& values, float limit) {
  constexpr int64_t kRun = 1024;
  const auto most = std::bit_cast<uint32_t>(limit);
  const float* x = values.as<float>();
  for (int64_t from = 0, n = values.size(); from < n; from += kRun) {
    const int64_t to = from + kRun < n ? from + kRun : n;
    uint32_t beyond = 0;
    for (int64_t i = from; i < to; ++i) beyond |= (std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu) > most;
    for (int64_t i = from; beyond != 0 && i < to; ++i)
      if ((std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu) > most) return i;
  }
  return -1;
}

// pack(kernel, values: Float32Array, blocks: Uint8Array, limit) -> promise of the first value beyond the limit, or -1: then they are packed
Napi::Value pack(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const Kernel& kernel = kernel_named(info[0].As<Napi::String>());
    auto arrays = arrays_of(info, DType::f32, DType::u8);
    const float limit = info[3].As<Napi::Number>().FloatValue();
    auto beyond = std::make_shared<int64_t>(-1);
    return Job::start(
        info.Env(),
        [arrays, beyond, limit, &kernel] {
          *beyond = std::isnan(limit) ? -1 : first_beyond(arrays->call.in[0], limit);
          if (*beyond < 0) kernel.run(arrays->call);
        },
        [arrays, beyond](Napi::Env env) { return Napi::Number::New(env, static_cast<double>(*beyond)); });
  });
}

}  // namespace

void register_ggml(Napi::Env env, Napi::Object exports) {
  exports.Set("unpack", Napi::Function::New(env, unpack));
  exports.Set("pack", Napi::Function::New(env, pack));
}

}  // namespace limbeck
