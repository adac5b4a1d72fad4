#include "core/engine.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace limbeck {

namespace {
constexpr uint64_t kSlotMask = (uint64_t{1} << kSlotBits) - 1, kGenerationMask = (uint64_t{1} << kGenerationBits) - 1;

size_t bytes_of(const View& v) { return static_cast<size_t>(v.size()) * size_of(v.dtype); }

std::string mebibytes(size_t bytes) { return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB"; }

View view_of(DType dtype, const int64_t* dims, int rank) {
  if (rank > kMaxRank)
    throw Error(ErrorKind::shape, "ERR_RANK", "tensor: " + std::to_string(rank) + " dims, at most " + std::to_string(kMaxRank) + " are supported");
  View v;
  v.dtype = dtype;
  v.rank = rank;
  int64_t size = 1;
  for (int i = 0; i < rank; ++i) {
    if (dims[i] < 0 || (dims[i] > 0 && size > (int64_t{1} << 46) / dims[i]))
      throw Error(ErrorKind::shape, "ERR_SHAPE", "tensor: dim " + std::to_string(i) + " is " + std::to_string(dims[i]) + ", which is negative or too large");
    v.dims[i] = dims[i];
    size *= dims[i];
  }
  return v;
}
}  // namespace

Engine::Graph::~Graph() {
  for (const auto& [p, bytes] : blocks) engine.arena_.free(p, bytes);
  for (Storage* s : used) engine.leave(s);
}

Engine::Engine(std::unique_ptr<Backend> backend, const EngineOptions& options)
    : options_(options),
      backend_(std::move(backend)),
      arena_(backend_->reserve(options.memory_limit ? options.memory_limit : backend_->default_limit())) {
  for (const KernelFamily* family : backend_->families())
    for (int k = 0; k < family->count; ++k) kernels_.emplace(family->kernels[k].name, &family->kernels[k]);
  thread_ = std::thread([this] { loop(); });
}

Engine::~Engine() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
  backend_->drain();
  queue_.clear();
  graphs_.clear();
  dropped_.clear();
  recording_.reset();
  for (const Slot& s : slots_)
    if (s.storage) leave(s.storage);
}

Handle Engine::handle_of(size_t index) const {
  return (static_cast<Handle>(options_.device) << (kSlotBits + kGenerationBits)) | (static_cast<Handle>(slots_[index].generation) << kSlotBits) | (index + 1);
}

Engine::Slot& Engine::slot(Handle h, const char* op) {
  const size_t index = (h & kSlotMask) - 1;
  if (h != 0 && device_of(h) != options_.device)
    throw Error(ErrorKind::device, "ERR_DEVICE",
                std::string(op) + ": its tensors are on two devices, " + kDeviceNames[options_.device] + " and " + kDeviceNames[device_of(h)] +
                    "; move one with toDevice()")
        .in(op).wanted(kDeviceNames[options_.device]).got(kDeviceNames[device_of(h)]);
  if (h == 0 || index >= slots_.size() || slots_[index].generation != ((h >> kSlotBits) & kGenerationMask) || !slots_[index].storage)
    throw Error(ErrorKind::disposed, "ERR_TENSOR_DISPOSED",
                std::string(op) + ": a tensor was used after it was freed; keep it by returning it from its scope, or free it later").in(op);
  return slots_[index];
}

const View& Engine::at(Handle h, const char* op) const { return const_cast<Engine*>(this)->slot(h, op).view; }

void* Engine::allocate(size_t bytes, const std::string& what) {
  if (recording_) {
    const auto fit = recording_->free.lower_bound(bytes);
    if (fit != recording_->free.end() && fit->first < 2 * bytes + 4096) {
      void* p = fit->second;
      recording_->free.erase(fit);
      return p;
    }
  }
  void* p = arena_.allocate(bytes);
  if (!p && !dropped_.empty()) {
    forget_graphs();
    p = arena_.allocate(bytes);
  }
  if (!p)
    throw Error(ErrorKind::memory, "ERR_OUT_OF_MEMORY",
                what + ": no room for " + mebibytes(bytes) + " on the " + kDeviceNames[options_.device] + "; " + mebibytes(arena_.live()) + " of " + mebibytes(arena_.limit()) +
                    " are in use. Use a smaller batch, shorter sequences or recompute, or raise the memory limit")
        .in(what).wanted(mebibytes(bytes)).got(mebibytes(arena_.limit() - arena_.live()) + " free");
  if (recording_) recording_->blocks.emplace_back(p, bytes);
  return p;
}

// Free for the calls that come after this one: the stream is in order.
void Engine::give_back(void* p, size_t bytes) {
  if (!recording_) return arena_.free(p, bytes);
  // A block of the recording may be larger than what was asked of it.
  for (const auto& [block, size] : recording_->blocks)
    if (block == p) return void(recording_->free.emplace(size, p));
  arena_.free(p, bytes);
}

void Engine::leave(Storage* storage) {
  if (--storage->users > 0) return;
  if (!storage->graph) arena_.free(storage->data, storage->bytes);
  else if (storage->graph == recording_) give_back(storage->data, storage->bytes);
  delete storage;
}

// A recording keeps the tensors from before it that it uses.
void Engine::use(Handle h) {
  Storage* s = slots_[(h & kSlotMask) - 1].storage;
  if (recording_ && s->graph != recording_ && recording_->used.insert(s).second) ++s->users;
}

Handle Engine::adopt(Storage* storage, const View& view) {
  size_t index;
  if (free_slots_.empty()) {
    index = slots_.size();
    if (index >= kSlotMask - 1) throw Error(ErrorKind::memory, "ERR_TOO_MANY_TENSORS", "tensor: 16 million tensors are alive; free some with scope()");
    slots_.emplace_back();
  } else {
    index = free_slots_.back();
    free_slots_.pop_back();
  }
  slots_[index].storage = storage;
  slots_[index].view = view;
  ++storage->users;
  ++live_tensors_;
  return handle_of(index);
}

Handle Engine::create(DType dtype, const int64_t* dims, int rank) {
  View v = view_of(dtype, dims, rank);
  const size_t bytes = bytes_of(v);
  v.data = allocate(bytes, "tensor");
  return adopt(new Storage{v.data, bytes, 0, recording_}, v);
}

Handle Engine::view(Handle of, int64_t offset, const int64_t* dims, int rank) {
  Slot& s = slot(of, "view");
  View v = view_of(s.view.dtype, dims, rank);
  if (offset < 0 || offset + v.size() > s.view.size())
    throw Error(ErrorKind::shape, "ERR_SHAPE",
                "view: " + shape_text(v) + " from element " + std::to_string(offset) + " does not fit in " + shape_text(s.view)).in("view").got(shape_text(v)).wanted(shape_text(s.view));
  v.data = s.view.as<char>() + static_cast<size_t>(offset) * size_of(v.dtype);
  return adopt(s.storage, v);
}

void Engine::release(Handle h) {
  Slot& s = slot(h, "dispose");
  leave(s.storage);
  s.storage = nullptr;
  s.generation = (s.generation + 1) & kGenerationMask;
  if (s.generation == 0) s.generation = 1;
  --live_tensors_;
  free_slots_.push_back(static_cast<uint32_t>((h & kSlotMask) - 1));
}

void Engine::call(int op_number, const Signature& sig, const Handle* in, const double* scalars, const OutputRequest* requests, Handle* out) {
  const size_t number = static_cast<size_t>(op_number);
  if (number >= ops_.size()) ops_.resize(number + 1);
  if (!ops_[number]) {
    const auto it = kernels_.find(sig.op);
    if (it == kernels_.end())
      throw Error(ErrorKind::device, "ERR_NO_KERNEL", sig.op + ": the " + backend_->name() + " backend has no kernel of this name").in(sig.op);
    ops_[number] = std::make_unique<Op>();
    ops_[number]->signature = &sig;
    ops_[number]->kernel = it->second;
  }
  Op& op = *ops_[number];
  auto command = std::make_unique<Command>();
  command->kind = Command::kernel;
  command->op = &op;
  Call& c = command->call;
  c.op = sig.op.c_str();
  backend_->prepare(c);
  for (size_t i = 0; i < sig.in.size(); ++i)
    if (in[i]) c.in[i] = at(in[i], c.op), use(in[i]);
  for (size_t i = 0; i < sig.scalars.size(); ++i) c.scalar[i] = scalars[i];
  sig.bind(c, backend_->computes_bf16());

  std::vector<Handle> made;  // undone when a later allocation fails
  try {
    for (size_t i = 0; i < sig.out.size(); ++i) {
      View& v = c.out[i];
      switch (requests[i].kind) {
        case OutputRequest::skip: out[i] = 0; break;
        case OutputRequest::allocate:
          out[i] = create(v.dtype, v.dims, v.rank);
          made.push_back(out[i]);
          v = at(out[i]);
          break;
        case OutputRequest::existing: {
          const View& given = at(requests[i].handle, c.op);
          if (given.dtype != v.dtype || given.size() != v.size())
            throw Error(ErrorKind::shape, "ERR_SHAPE", sig.op + ": output " + sig.out[i].name + " is to go into a tensor of " + shape_text(given) + ", it has " + shape_text(v))
                .in(sig.op).on(sig.out[i].name).wanted(shape_text(v)).got(shape_text(given));
          if (requests[i].accumulate && !sig.out[i].accumulates)
            throw Error(ErrorKind::internal, "ERR_ACCUMULATE", sig.op + ": output " + sig.out[i].name + " cannot accumulate").in(sig.op).on(sig.out[i].name);
          out[i] = requests[i].handle;
          use(out[i]);
          v.data = given.data;
          c.accumulate[i] = requests[i].accumulate;
          break;
        }
      }
    }
    if (op.kernel->workspace) c.workspace_bytes = op.kernel->workspace(c);
    if (c.workspace_bytes) c.workspace = allocate(c.workspace_bytes, sig.op);
  } catch (...) {
    for (Handle h : made) release(h);
    throw;
  }
  if (c.workspace) give_back(c.workspace, c.workspace_bytes);
  enqueue(std::move(command));
}

void Engine::write(Handle h, const void* data, size_t bytes) {
  Slot& s = slot(h, "write");
  if (bytes != bytes_of(s.view))
    throw Error(ErrorKind::shape, "ERR_SHAPE", "write: " + std::to_string(bytes) + " bytes given for a tensor of " + std::to_string(bytes_of(s.view))).in("write");
  use(h);
  if (!recording_ && backend_->writes_at_once() && pending_.load(std::memory_order_acquire) == 0) {
    backend_->write(s.view.data, data, bytes);
    return;
  }
  auto command = std::make_unique<Command>();
  command->kind = Command::write;
  command->staged = std::make_unique_for_overwrite<char[]>(bytes);
  std::memcpy(command->staged.get(), data, bytes);
  command->from = command->staged.get();
  command->to = s.view.data;
  command->bytes = bytes;
  enqueue(std::move(command));
}

void Engine::read(Handle h, void* to, size_t bytes, Done done) {
  Slot& s = slot(h, "read");
  if (bytes != bytes_of(s.view))
    throw Error(ErrorKind::shape, "ERR_SHAPE", "read: room for " + std::to_string(bytes) + " bytes given, the tensor has " + std::to_string(bytes_of(s.view))).in("read");
  if (recording_)
    throw Error(ErrorKind::config, "ERR_GRAPH_READ",
                "read: a value was read while a graph was being recorded, when nothing has run yet; return the tensor and read it after replay()").in("read");
  auto command = std::make_unique<Command>();
  command->kind = Command::read;
  command->from = s.view.data;
  command->to = to;
  command->bytes = bytes;
  command->done_fn = std::move(done);
  enqueue(std::move(command));
}

void Engine::sync(Done done) {
  if (recording_)
    throw Error(ErrorKind::config, "ERR_GRAPH_READ", "sync: a graph is being recorded, when nothing has run yet; wait after replay()").in("sync");
  auto command = std::make_unique<Command>();
  command->kind = Command::done;
  command->done_fn = std::move(done);
  enqueue(std::move(command));
}

void Engine::capture() {
  if (recording_) throw Error(ErrorKind::config, "ERR_GRAPH", "graph: one is being recorded already; graphs cannot be nested").in("graph");
  recording_ = std::make_shared<Graph>(*this);
}

int Engine::captured() {
  graphs_.emplace(++last_graph_, std::move(recording_));
  recording_ = nullptr;
  return last_graph_;
}

void Engine::replay(int graph) {
  if (recording_) throw Error(ErrorKind::config, "ERR_GRAPH", "graph: replay() was called while another graph was being recorded").in("graph");
  auto command = std::make_unique<Command>();
  command->kind = Command::graph;
  command->replayed = graphs_.at(graph);
  enqueue(std::move(command));
}

// Replays may be under way and tensors may lie in it. The graph goes when nothing else holds it, on this thread like all bookkeeping.
void Engine::drop(int graph) {
  const auto it = graphs_.find(graph);
  if (it == graphs_.end()) return;
  dropped_.push_back(std::move(it->second));
  graphs_.erase(it);
  forget_graphs();
}

void Engine::forget_graphs() {
  std::erase_if(dropped_, [](const std::shared_ptr<Graph>& g) { return g.use_count() == 1; });
}

void Engine::clear_fault() { ++epoch_; }

void Engine::enqueue(std::unique_ptr<Command> command) {
  if (recording_) return recording_->commands.push_back(std::move(command));
  command->epoch = epoch_;
  pending_.fetch_add(1, std::memory_order_relaxed);
  {
    std::lock_guard lock(mutex_);
    queue_.push_back(std::move(command));
  }
  wake_.notify_one();
}

void Engine::loop() {
  for (;;) {
    std::unique_ptr<Command> command;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (stop_) return;  // whoever waited is gone: the engine dies with its environment
      command = std::move(queue_.front());
      queue_.pop_front();
    }
    execute(*command);
    pending_.fetch_sub(1, std::memory_order_release);
  }
}

void Engine::execute(Command& command) {
  // Somebody was told what stopped the stream: work from then on counts again. The device may have found it without this thread.
  if (command.epoch != running_epoch_) {
    running_epoch_ = command.epoch;
    fault_.reset();
    backend_->clear_fault();
  }
  if (!fault_) {
    try {
      perform(command);
    } catch (const Error& e) {
      fault_ = std::make_unique<Error>(e);
    } catch (const std::exception& e) {
      fault_ = std::make_unique<Error>(ErrorKind::internal, "ERR_KERNEL", std::string(command.call.op) + ": " + e.what());
    }
  }
  if (command.done_fn) command.done_fn(fault_.get());
}

void Engine::perform(Command& command) {
  switch (command.kind) {
    case Command::kernel:
      if (!profiling_.load(std::memory_order_relaxed)) return backend_->run(*command.op->kernel, command.call);
      {
        const double seconds = backend_->time(*command.op->kernel, command.call);
        std::lock_guard lock(profile_mutex_);
        ++command.op->count;
        command.op->seconds += seconds;
        command.op->workspace = std::max(command.op->workspace, command.call.workspace_bytes);
      }
      return;
    case Command::write: return backend_->write(command.to, command.from, command.bytes);
    case Command::read: return backend_->read(command.to, command.from, command.bytes, std::exchange(command.done_fn, nullptr));
    case Command::done: return backend_->sync(std::exchange(command.done_fn, nullptr));
    case Command::graph: break;
  }
  Graph& graph = *command.replayed;
  const bool apart = profiling_.load(std::memory_order_relaxed);  // kernel by kernel
  if (graph.compiled && !apart) return backend_->replay(graph.compiled.get());
  const bool first = !graph.ran && !apart;
  graph.ran = graph.ran || first;
  if (first) backend_->capture();
  for (const auto& recorded : graph.commands) perform(*recorded);
  if (first && (graph.compiled = backend_->captured())) backend_->replay(graph.compiled.get());
}

MemoryReport Engine::memory() {
  forget_graphs();
  return {arena_.live(), arena_.peak(), arena_.reserved(), arena_.limit(), live_tensors_};
}

void Engine::trim() {
  sync([parts = arena_.take_free_parts(), &range = arena_.range()](const Error*) { range.give_back(parts); });
}

void Engine::profile(bool on) {
  std::lock_guard lock(profile_mutex_);
  if (on)
    for (auto& op : ops_)
      if (op) op->count = 0, op->seconds = 0, op->workspace = 0;
  profiling_ = on;
}

std::vector<OpProfile> Engine::profiled() {
  std::lock_guard lock(profile_mutex_);
  std::vector<OpProfile> all;
  for (auto& op : ops_)
    if (op && op->count) all.push_back({op->signature->op, op->count, op->seconds, op->workspace});
  return all;
}

}  // namespace limbeck
