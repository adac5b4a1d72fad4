#include "core/engine.h"

#include <chrono>
#include <cstring>

namespace limbeck {

namespace {
constexpr uint64_t kSlotMask = (1u << 24) - 1;

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

Engine::Engine(const EngineOptions& options) : options_(options), arena_(options.memory_limit), pool_(options.threads) {
  for (int f = 0; f < options_.kernels->count; ++f) {
    const KernelFamily& family = *options_.kernels->families[f];
    for (int k = 0; k < family.count; ++k) kernels_.emplace(family.kernels[k].name, &family.kernels[k]);
  }
  thread_ = std::thread([this] { loop(); });
}

Engine::~Engine() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
  for (const Slot& s : slots_)
    if (s.storage && --s.storage->users == 0) delete s.storage;
}

Engine::Slot& Engine::slot(Handle h, const char* op) {
  const size_t index = (h & kSlotMask) - 1;
  if (h == 0 || index >= slots_.size() || slots_[index].generation != h >> 24 || !slots_[index].storage)
    throw Error(ErrorKind::disposed, "ERR_TENSOR_DISPOSED",
                std::string(op) + ": a tensor was used after it was freed; keep it by returning it from its scope, or free it later").in(op);
  return slots_[index];
}

const View& Engine::at(Handle h, const char* op) const { return const_cast<Engine*>(this)->slot(h, op).view; }

void* Engine::allocate(size_t bytes, const std::string& what) {
  void* p = arena_.allocate(bytes);
  if (!p)
    throw Error(ErrorKind::memory, "ERR_OUT_OF_MEMORY",
                what + ": no room for " + mebibytes(bytes) + "; " + mebibytes(arena_.live()) + " of " + mebibytes(arena_.limit()) +
                    " are in use. Use a smaller batch, shorter sequences or recompute, or raise the memory limit")
        .in(what).wanted(mebibytes(bytes)).got(mebibytes(arena_.limit() - arena_.live()) + " free");
  return p;
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
  return adopt(new Storage{v.data, bytes, 0}, v);
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
  if (--s.storage->users == 0) {
    arena_.free(s.storage->data, s.storage->bytes);
    delete s.storage;
  }
  s.storage = nullptr;
  s.generation = (s.generation + 1) & 0xfffffff;  // 24 + 28 bits stay exact in a JavaScript number
  if (s.generation == 0) s.generation = 1;
  --live_tensors_;
  free_slots_.push_back(static_cast<uint32_t>((h & kSlotMask) - 1));
}

int Engine::define(Signature signature) {
  auto op = std::make_unique<Op>();
  op->signature = std::move(signature);
  ops_.push_back(std::move(op));
  return static_cast<int>(ops_.size()) - 1;
}

void Engine::call(int op_number, const Handle* in, const double* scalars, const OutputRequest* requests, Handle* out) {
  Op& op = *ops_.at(static_cast<size_t>(op_number));
  const Signature& sig = op.signature;
  if (!op.kernel) {
    const auto it = kernels_.find(sig.op);
    if (it == kernels_.end())
      throw Error(ErrorKind::device, "ERR_NO_KERNEL", sig.op + ": the CPU backend has no kernel of this name").in(sig.op);
    op.kernel = it->second;
  }
  auto command = std::make_unique<Command>();
  command->kind = Command::kernel;
  command->op = &op;
  Call& c = command->call;
  c.op = sig.op.c_str();
  c.threads = &pool_;
  for (size_t i = 0; i < sig.in.size(); ++i)
    if (in[i]) c.in[i] = at(in[i], c.op);
  for (size_t i = 0; i < sig.scalars.size(); ++i) c.scalar[i] = scalars[i];
  sig.bind(c, false);

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
  // Free for the calls that come after this one: the stream is in order.
  if (c.workspace) arena_.free(c.workspace, c.workspace_bytes);
  enqueue(std::move(command));
}

void Engine::write(Handle h, const void* data, size_t bytes) {
  Slot& s = slot(h, "write");
  if (bytes != bytes_of(s.view))
    throw Error(ErrorKind::shape, "ERR_SHAPE", "write: " + std::to_string(bytes) + " bytes given for a tensor of " + std::to_string(bytes_of(s.view))).in("write");
  if (pending_.load(std::memory_order_acquire) == 0) {
    std::memcpy(s.view.data, data, bytes);
    return;
  }
  auto command = std::make_unique<Command>();
  command->kind = Command::copy;
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
  auto command = std::make_unique<Command>();
  command->kind = Command::copy;
  command->from = s.view.data;
  command->to = to;
  command->bytes = bytes;
  command->done_fn = std::move(done);
  enqueue(std::move(command));
}

void Engine::sync(Done done) {
  auto command = std::make_unique<Command>();
  command->kind = Command::done;
  command->done_fn = std::move(done);
  enqueue(std::move(command));
}

void Engine::clear_fault() { ++epoch_; }

void Engine::enqueue(std::unique_ptr<Command> command) {
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
  const bool skip = fault_ && command.epoch <= fault_epoch_;
  if (!skip && fault_) fault_.reset();
  if (!skip) {
    try {
      if (command.kind == Command::copy) {
        std::memcpy(command.to, command.from, command.bytes);
      } else if (command.kind == Command::kernel) {
        if (!profiling_.load(std::memory_order_relaxed)) {
          command.op->kernel->run(command.call);
        } else {
          const auto start = std::chrono::steady_clock::now();
          command.op->kernel->run(command.call);
          const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
          std::lock_guard lock(profile_mutex_);
          ++command.op->count;
          command.op->seconds += took.count();
        }
      }
    } catch (const Error& e) {
      fault_ = std::make_unique<Error>(e);
    } catch (const std::exception& e) {
      fault_ = std::make_unique<Error>(ErrorKind::internal, "ERR_KERNEL", std::string(command.call.op) + ": " + e.what());
    }
    if (fault_) fault_epoch_ = command.epoch;
  }
  if (command.done_fn) command.done_fn(fault_.get());
}

MemoryReport Engine::memory() const {
  return {arena_.live(), arena_.peak(), arena_.reserved(), arena_.limit(), live_tensors_};
}

void Engine::trim() {
  sync([pages = arena_.take_free_pages()](const Error*) { Arena::give_back(pages); });
}

void Engine::profile(bool on) {
  std::lock_guard lock(profile_mutex_);
  if (on)
    for (auto& op : ops_) op->count = 0, op->seconds = 0;
  profiling_ = on;
}

std::vector<OpProfile> Engine::profiled() {
  std::lock_guard lock(profile_mutex_);
  std::vector<OpProfile> all;
  for (auto& op : ops_)
    if (op->count) all.push_back({op->signature.op, op->count, op->seconds});
  return all;
}

}  // namespace limbeck
