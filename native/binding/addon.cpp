// The Node-API face of the engine. Only integers and numbers cross in a hot call: JavaScript writes an op's arguments into a shared
// Float64Array, calls with the op's number, and finds the outputs' handles and shapes in the same array.
#include <napi.h>

#include <memory>
#include <string>
#include <vector>

#include "binding/error.h"
#include "binding/library.h"
#include "core/cpuid.h"
#include "core/engine.h"
#include "core/host.h"
#include "core/planned.h"

namespace limbeck {

void register_ggml(Napi::Env env, Napi::Object exports);
void register_half(Napi::Env env, Napi::Object exports);
void register_text(Napi::Env env, Napi::Object exports);

namespace {

// Raised when the meaning of a function or of the shared array changes; src/tensor/native.ts holds its twin.
constexpr int kAbi = 3;
constexpr size_t kIoSlots = 256;
// After a call, each output takes this many slots of the shared array: handle, dtype, rank, dims.
constexpr size_t kOutputSlots = 3 + kMaxRank;

// Runs `body`; whatever it throws becomes a pending JavaScript exception.
template <class Body>
napi_value guard(napi_env env, Body&& body) {
  try {
    return body();
  } catch (const Napi::Error& e) {
    e.ThrowAsJavaScriptException();
  } catch (const Error& e) {
    napi_throw(env, to_js_error(env, e).Value());
  } catch (const std::bad_alloc&) {
    napi_throw(env, to_js_error(env, Error(ErrorKind::memory, "ERR_OUT_OF_MEMORY", "limbeck: the system has no memory left")).Value());
  } catch (const std::exception& e) {
    napi_throw(env, to_js_error(env, Error(ErrorKind::internal, "ERR_INTERNAL", e.what())).Value());
  }
  return nullptr;
}

struct Pending {
  napi_deferred deferred;
  napi_ref buffer = nullptr;
  int device = 0;
  std::unique_ptr<Error> fault;
};

// What belongs to one JavaScript environment: the main thread or a worker.
struct Instance {
  std::unique_ptr<Engine> engines[kDevices];
  std::vector<std::unique_ptr<Signature>> signatures;  // of all devices, by number
  double* io = nullptr;
  napi_ref io_ref = nullptr;
  napi_threadsafe_function settle = nullptr;
  int pending = 0;
  napi_env env;

  Engine& engine(int device) {
    if (device < 0 || device >= kDevices || !engines[device]) throw Error(ErrorKind::config, "ERR_NOT_STARTED", "limbeck: the engine was not started");
    return *engines[device];
  }
  Engine& of(Handle h) { return engine(device_of(h)); }
};

Instance& instance_of(napi_env env) {
  void* data;
  napi_get_instance_data(env, &data);
  return *static_cast<Instance*>(data);
}

struct Args {
  napi_value value[8];
  size_t count = 8;
  Args(napi_env env, napi_callback_info info) { napi_get_cb_info(env, info, &count, value, nullptr, nullptr); }
};

double number(napi_env env, napi_value v) {
  double d = 0;
  if (napi_get_value_double(env, v, &d) != napi_ok) throw Error(ErrorKind::internal, "ERR_INTERNAL", "limbeck: a number was expected");
  return d;
}

// A device for plans: its library's path, or "" for the CPU's kernels, and in the shared array what there is to know of it.
std::unique_ptr<Backend> planned(const std::string& library, const double* io) {
  PlannedDevice device;
  device.flops = io[0];
  device.fast_flops = io[1];
  device.bandwidth = io[2];
  device.memory = static_cast<size_t>(io[3]);
  device.threads = static_cast<int>(io[4]);
  device.bf16 = io[5] != 0;
  if (library.empty()) {
    const IsaKernels& kernels = choose_isa();
    return open_planned(device, {kernels.families, kernels.families + kernels.count}, nullptr);
  }
  const BackendLibrary& backend = backend_library(library);
  return open_planned(device, backend.families(), backend.imagine(static_cast<int>(io[6]), static_cast<int>(io[7]), device.memory));
}

// start(io: Float64Array, device, memoryLimit or 0, and for the CPU: threads, isa or ""; for CUDA: path of its library, number, workspaceLimit or 0; for a
// plan: see planned())
napi_value start(napi_env env, napi_callback_info info) {
  return guard(env, [&]() -> napi_value {
    Args a(env, info);
    Instance& me = instance_of(env);
    const int device = static_cast<int>(number(env, a.value[1]));
    if (me.engines[device]) throw Error(ErrorKind::config, "ERR_STARTED", "init: the engine runs already; call init() before anything else");
    Napi::Float64Array io = Napi::Value(env, a.value[0]).As<Napi::Float64Array>();
    if (io.ElementLength() < kIoSlots) throw Error(ErrorKind::internal, "ERR_INTERNAL", "limbeck: the shared array is too small");
    EngineOptions options;
    options.device = device;
    options.memory_limit = static_cast<size_t>(number(env, a.value[2]));
    std::unique_ptr<Backend> backend;
    if (device == 0) {
      backend = open_host(static_cast<int>(number(env, a.value[3])), choose_isa(Napi::Value(env, a.value[4]).As<Napi::String>().Utf8Value()));
    } else if (device == 2) {
      backend = planned(Napi::Value(env, a.value[3]).As<Napi::String>(), io.Data());
    } else {
      const std::string path = Napi::Value(env, a.value[3]).As<Napi::String>();
      backend = backend_library(path).open({static_cast<int>(number(env, a.value[4])), static_cast<size_t>(number(env, a.value[5]))});
    }
    me.engines[device] = std::make_unique<Engine>(std::move(backend), options);
    if (!me.io_ref) napi_create_reference(env, a.value[0], 1, &me.io_ref);
    me.io = io.Data();
    return nullptr;
  });
}

// stop(device or -1): waits for the kernel that runs, drops the rest and every tensor. Pending reads must have settled.
napi_value stop(napi_env env, napi_callback_info info) {
  return guard(env, [&]() -> napi_value {
    Args a(env, info);
    Instance& me = instance_of(env);
    if (const int device = static_cast<int>(number(env, a.value[0])); device >= 0) {
      me.engines[device].reset();
      return nullptr;
    }
    if (me.pending > 0) throw Error(ErrorKind::config, "ERR_BUSY", "shutdown: reads are pending; await them first");
    for (auto& engine : me.engines) engine.reset();
    me.signatures.clear();
    if (me.io_ref) napi_delete_reference(env, me.io_ref);
    me.io_ref = nullptr;
    return nullptr;
  });
}

// define(signature) -> { id, arguments, inputs, outputs, aliases }
Napi::Value define(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  Napi::Object result = Napi::Object::New(env);
  guard(env, [&]() -> napi_value {
    auto& signatures = instance_of(env).signatures;
    const size_t id = signatures.size();
    signatures.push_back(std::make_unique<Signature>(Signature::parse(info[0].As<Napi::String>().Utf8Value())));
    const Signature& sig = *signatures.back();
    const auto tensors = [&](const std::vector<TensorSpec>& specs) {
      Napi::Array list = Napi::Array::New(env, specs.size());
      for (size_t i = 0; i < specs.size(); ++i) {
        Napi::Object o = Napi::Object::New(env);
        o.Set("name", specs[i].name);
        o.Set("optional", specs[i].optional);
        o.Set("inPlace", specs[i].in_place);
        o.Set("accumulates", specs[i].accumulates);
        o.Set("f32", specs[i].dtype == DTypeRule::f32);
        list.Set(i, o);
      }
      return list;
    };
    Napi::Array arguments = Napi::Array::New(env, sig.arguments.size());
    for (size_t i = 0; i < sig.arguments.size(); ++i) {
      Napi::Object o = Napi::Object::New(env);
      o.Set("name", sig.arguments[i].name);
      o.Set("scalar", sig.arguments[i].scalar);
      arguments.Set(i, o);
    }
    Napi::Array aliases = Napi::Array::New(env, sig.aliases.size());
    for (size_t i = 0; i < sig.aliases.size(); ++i) {
      Napi::Object o = Napi::Object::New(env);
      o.Set("name", sig.aliases[i].first);
      o.Set("of", sig.aliases[i].second);
      aliases.Set(i, o);
    }
    result.Set("id", static_cast<double>(id));
    result.Set("op", sig.op);
    result.Set("arguments", arguments);
    result.Set("inputs", tensors(sig.in));
    result.Set("outputs", tensors(sig.out));
    result.Set("aliases", aliases);
    return nullptr;
  });
  return result;
}

// call(op). In: arguments in order (handle, 0 for absent, or number), then for each output two numbers: -1 allocate, 0 skip or a
// handle; and 1 to accumulate. Out: for each output handle, dtype, rank, dims.
napi_value call(napi_env env, napi_callback_info info) {
  return guard(env, [&]() -> napi_value {
    Args a(env, info);
    Instance& me = instance_of(env);
    const int op = static_cast<int>(number(env, a.value[0]));
    const Signature& sig = *me.signatures.at(static_cast<size_t>(op));
    Handle in[kMaxTensors], out[kMaxTensors];
    double scalars[kMaxScalars];
    OutputRequest requests[kMaxTensors];
    const double* at = me.io;
    Handle first = 0;  // an op runs where its first tensor is
    for (const Argument& argument : sig.arguments) {
      if (argument.scalar) {
        scalars[argument.index] = *at++;
      } else {
        const Handle h = static_cast<Handle>(*at++);
        in[argument.index] = h;
        if (!first) first = h;
      }
    }
    Engine& engine = me.of(first);
    for (size_t i = 0; i < sig.out.size(); ++i, at += 2) {
      if (at[0] < 0) requests[i] = {OutputRequest::allocate, 0, false};
      else if (at[0] == 0) requests[i] = {OutputRequest::skip, 0, false};
      else requests[i] = {OutputRequest::existing, static_cast<Handle>(at[0]), at[1] != 0};
    }
    engine.call(op, sig, in, scalars, requests, out);
    double* to = me.io;
    for (size_t i = 0; i < sig.out.size(); ++i, to += kOutputSlots) {
      to[0] = static_cast<double>(out[i]);
      if (!out[i]) continue;
      const View& v = engine.at(out[i]);
      to[1] = static_cast<double>(v.dtype);
      to[2] = v.rank;
      for (int d = 0; d < v.rank; ++d) to[3 + d] = static_cast<double>(v.dims[d]);
    }
    return nullptr;
  });
}

napi_value handle_value(napi_env env, Handle h) {
  napi_value v;
  napi_create_double(env, static_cast<double>(h), &v);
  return v;
}

// Dims wait in the shared array.
int dims_from(const Instance& me, double rank, int64_t* dims) {
  const int n = static_cast<int>(rank);
  for (int i = 0; i < n && i < kMaxRank; ++i) dims[i] = static_cast<int64_t>(me.io[i]);
  return n;
}

// create(device, dtype, rank) -> handle
napi_value create(napi_env env, napi_callback_info info) {
  return guard(env, [&] {
    Args a(env, info);
    Instance& me = instance_of(env);
    int64_t dims[kMaxRank];
    const int rank = dims_from(me, number(env, a.value[2]), dims);
    Engine& engine = me.engine(static_cast<int>(number(env, a.value[0])));
    return handle_value(env, engine.create(static_cast<DType>(static_cast<int>(number(env, a.value[1]))), dims, rank));
  });
}

// view(of, offset, rank) -> handle
napi_value view(napi_env env, napi_callback_info info) {
  return guard(env, [&] {
    Args a(env, info);
    Instance& me = instance_of(env);
    int64_t dims[kMaxRank];
    const int rank = dims_from(me, number(env, a.value[2]), dims);
    const Handle of = static_cast<Handle>(number(env, a.value[0]));
    return handle_value(env, me.of(of).view(of, static_cast<int64_t>(number(env, a.value[1])), dims, rank));
  });
}

// release(handle)
napi_value release(napi_env env, napi_callback_info info) {
  return guard(env, [&]() -> napi_value {
    Args a(env, info);
    const Handle h = static_cast<Handle>(number(env, a.value[0]));
    instance_of(env).of(h).release(h);
    return nullptr;
  });
}

struct Bytes {
  char* data;
  size_t size;
};

Bytes bytes_of(napi_env env, napi_value v) {
  Napi::TypedArray array = Napi::Value(env, v).As<Napi::TypedArray>();
  return {static_cast<char*>(array.ArrayBuffer().Data()) + array.ByteOffset(), array.ByteLength()};
}

// write(handle, typedArray): the data is copied before the call returns
napi_value write(napi_env env, napi_callback_info info) {
  return guard(env, [&]() -> napi_value {
    Args a(env, info);
    const Bytes b = bytes_of(env, a.value[1]);
    const Handle h = static_cast<Handle>(number(env, a.value[0]));
    instance_of(env).of(h).write(h, b.data, b.size);
    return nullptr;
  });
}

// Settles a promise on the JavaScript thread.
void settle(napi_env env, napi_value, void*, void* data) {
  std::unique_ptr<Pending> p(static_cast<Pending*>(data));
  if (!env) return;  // the environment is being torn down
  Instance& me = instance_of(env);
  napi_value value;
  napi_get_undefined(env, &value);
  if (p->buffer) {
    if (!p->fault) napi_get_reference_value(env, p->buffer, &value);
    napi_delete_reference(env, p->buffer);
  }
  if (p->fault) {
    if (me.engines[p->device]) me.engines[p->device]->clear_fault();
    napi_reject_deferred(env, p->deferred, to_js_error(env, *p->fault).Value());
  } else {
    napi_resolve_deferred(env, p->deferred, value);
  }
  if (--me.pending == 0) napi_unref_threadsafe_function(env, me.settle);
}

// A promise that settles when the stream comes to it; the process stays alive until then.
template <class Enqueue>
napi_value promise(napi_env env, int device, napi_value buffer, Enqueue&& enqueue) {
  Instance& me = instance_of(env);
  auto pending = std::make_unique<Pending>();
  pending->device = device;
  napi_value result;
  napi_create_promise(env, &pending->deferred, &result);
  if (buffer) napi_create_reference(env, buffer, 1, &pending->buffer);
  if (me.pending++ == 0) napi_ref_threadsafe_function(env, me.settle);
  Pending* p = pending.release();
  try {
    enqueue([p, tsfn = me.settle](const Error* fault) {
      if (fault) p->fault = std::make_unique<Error>(*fault);
      napi_call_threadsafe_function(tsfn, p, napi_tsfn_blocking);
    });
  } catch (const Error& e) {
    p->fault = std::make_unique<Error>(e);
    napi_call_threadsafe_function(me.settle, p, napi_tsfn_blocking);
  }
  return result;
}

// read(handle, typedArray) -> promise of the same array, filled
napi_value read(napi_env env, napi_callback_info info) {
  return guard(env, [&] {
    Args a(env, info);
    const Handle h = static_cast<Handle>(number(env, a.value[0]));
    Engine& engine = instance_of(env).of(h);
    engine.at(h, "read");
    const Bytes b = bytes_of(env, a.value[1]);
    return promise(env, device_of(h), a.value[1], [&](Engine::Done done) { engine.read(h, b.data, b.size, std::move(done)); });
  });
}

// sync(device) -> promise that resolves when all work enqueued before is done
napi_value sync(napi_env env, napi_callback_info info) {
  return guard(env, [&] {
    Args a(env, info);
    const int device = static_cast<int>(number(env, a.value[0]));
    Engine& engine = instance_of(env).engine(device);
    return promise(env, device, nullptr, [&](Engine::Done done) { engine.sync(std::move(done)); });
  });
}

// All that follow take the device first.
Engine& engine_of(const Napi::CallbackInfo& info) { return instance_of(info.Env()).engine(info[0].ToNumber().Int32Value()); }

Napi::Value memory(const Napi::CallbackInfo& info) {
  Napi::Object o = Napi::Object::New(info.Env());
  const auto& engine = instance_of(info.Env()).engines[info[0].ToNumber().Int32Value()];
  const MemoryReport m = engine ? engine->memory() : MemoryReport{};
  o.Set("live", static_cast<double>(m.live));
  o.Set("peak", static_cast<double>(m.peak));
  o.Set("reserved", static_cast<double>(m.reserved));
  o.Set("limit", static_cast<double>(m.limit));
  o.Set("tensors", static_cast<double>(m.tensors));
  return o;
}

// Runs `body`, for functions that answer nothing.
template <class Body>
Napi::Value told(const Napi::CallbackInfo& info, Body&& body) {
  guard(info.Env(), [&]() -> napi_value {
    body(engine_of(info));
    return nullptr;
  });
  return info.Env().Undefined();
}

Napi::Value reset_peak(const Napi::CallbackInfo& info) { return told(info, [](Engine& e) { e.reset_peak(); }); }
Napi::Value trim(const Napi::CallbackInfo& info) { return told(info, [](Engine& e) { e.trim(); }); }
Napi::Value profile(const Napi::CallbackInfo& info) { return told(info, [&](Engine& e) { e.profile(info[1].ToBoolean()); }); }
Napi::Value capture(const Napi::CallbackInfo& info) { return told(info, [](Engine& e) { e.capture(); }); }
Napi::Value replay(const Napi::CallbackInfo& info) { return told(info, [&](Engine& e) { e.replay(info[1].ToNumber()); }); }
Napi::Value drop(const Napi::CallbackInfo& info) { return told(info, [&](Engine& e) { e.drop(info[1].ToNumber()); }); }

// captured(device) -> the graph's number
Napi::Value captured(const Napi::CallbackInfo& info) {
  int graph = 0;
  told(info, [&](Engine& e) { graph = e.captured(); });
  return Napi::Number::New(info.Env(), graph);
}

Napi::Value profiled(const Napi::CallbackInfo& info) {
  Napi::Array list = Napi::Array::New(info.Env());
  told(info, [&](Engine& e) {
    uint32_t i = 0;
    for (const OpProfile& p : e.profiled()) {
      Napi::Object o = Napi::Object::New(info.Env());
      o.Set("op", p.op);
      o.Set("count", static_cast<double>(p.count));
      o.Set("seconds", p.seconds);
      o.Set("workspace", static_cast<double>(p.workspace));
      list.Set(i++, o);
    }
  });
  return list;
}

// probe(path of a backend library) -> what it says of the machine, as JSON
Napi::Value probe(const Napi::CallbackInfo& info) {
  std::string json;
  guard(info.Env(), [&]() -> napi_value {
    json = backend_library(info[0].As<Napi::String>().Utf8Value()).probe();
    return nullptr;
  });
  return Napi::String::New(info.Env(), json);
}

Napi::Value info(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  Napi::Object o = Napi::Object::New(env);
  Napi::Array compiled = Napi::Array::New(env);
  for (int i = 0; i < cpu_isa_count; ++i) compiled.Set(static_cast<uint32_t>(i), cpu_isas[i].isa);
  o.Set("compiled", compiled);
  const Instance& me = instance_of(env);
  if (me.engines[0]) {
    o.Set("isa", me.engines[0]->backend().detail());
    o.Set("threads", me.engines[0]->backend().threads());
  } else {
    guard(env, [&]() -> napi_value {
      o.Set("isa", choose_isa().isa);
      return nullptr;
    });
  }
  o.Set("blas", blas_name);
  o.Set("compiler", __VERSION__);
  return o;
}

void set_raw(napi_env env, napi_value exports, const char* name, napi_callback cb) {
  napi_value f;
  napi_create_function(env, name, NAPI_AUTO_LENGTH, cb, nullptr, &f);
  napi_set_named_property(env, exports, name, f);
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  auto* me = new Instance{};
  me->env = env;
  napi_set_instance_data(env, me, nullptr, nullptr);
  napi_value name;
  napi_create_string_utf8(env, "limbeck", NAPI_AUTO_LENGTH, &name);
  napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, nullptr, settle, &me->settle);
  napi_unref_threadsafe_function(env, me->settle);
  // Workers may end at any moment: the engine stops after the kernel it is in. Hooks run last first, so this one runs before the
  // thread-safe function goes.
  napi_add_env_cleanup_hook(
      env,
      [](void* data) {
        auto* self = static_cast<Instance*>(data);
        delete self;
      },
      me);

  exports.Set("abi", kAbi);
  set_raw(env, exports, "start", start);
  set_raw(env, exports, "stop", stop);
  exports.Set("define", Napi::Function::New(env, define));
  set_raw(env, exports, "call", call);
  set_raw(env, exports, "create", create);
  set_raw(env, exports, "view", view);
  set_raw(env, exports, "release", release);
  set_raw(env, exports, "write", write);
  set_raw(env, exports, "read", read);
  set_raw(env, exports, "sync", sync);
  exports.Set("memory", Napi::Function::New(env, memory));
  exports.Set("resetPeak", Napi::Function::New(env, reset_peak));
  exports.Set("trim", Napi::Function::New(env, trim));
  exports.Set("capture", Napi::Function::New(env, capture));
  exports.Set("captured", Napi::Function::New(env, captured));
  exports.Set("replay", Napi::Function::New(env, replay));
  exports.Set("drop", Napi::Function::New(env, drop));
  exports.Set("probe", Napi::Function::New(env, probe));
  exports.Set("profile", Napi::Function::New(env, profile));
  exports.Set("profiled", Napi::Function::New(env, profiled));
  exports.Set("info", Napi::Function::New(env, info));
  register_ggml(env, exports);
  register_half(env, exports);
  register_text(env, exports);
  return exports;
}

NODE_API_MODULE(NODE_GYP_MODULE_NAME, init)

}  // namespace
}  // namespace limbeck
