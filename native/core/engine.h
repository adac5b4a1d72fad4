// One engine: tensors by handle, and a stream that runs kernels in order on its own thread. All public functions belong to the
// thread that made the engine (JavaScript's); only the stream's thread touches tensor data. A call checks, allocates and returns:
// memory freed here may be handed out again at once, since the stream runs in the order of the calls.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "core/arena.h"
#include "core/families.h"
#include "core/kernel.h"
#include "core/signature.h"

namespace limbeck {

// A tensor's name outside the engine: slot number and generation, so that a stale handle is refused. 0 is "no tensor".
using Handle = uint64_t;

struct EngineOptions {
  int threads = 1;
  size_t memory_limit = 0;
  const IsaKernels* kernels = nullptr;
};

struct MemoryReport {
  size_t live, peak, reserved, limit, tensors;
};

struct OpProfile {
  std::string op;
  uint64_t count;
  double seconds;
};

// What an op call asks of each output.
struct OutputRequest {
  enum Kind { allocate, skip, existing } kind;
  Handle handle;    // of an existing tensor
  bool accumulate;  // add to it
};

class Engine {
 public:
  // Runs on the stream's thread when the work before it is done; `fault` is null or what stopped that work.
  using Done = std::function<void(const Error* fault)>;

  explicit Engine(const EngineOptions& options);
  ~Engine();

  Handle create(DType dtype, const int64_t* dims, int rank);
  // A tensor over the same bytes, from `offset` elements on. `dims` must fit inside.
  Handle view(Handle of, int64_t offset, const int64_t* dims, int rank);
  void release(Handle h);
  const View& at(Handle h, const char* op = "tensor") const;

  // Signatures are kept by number. The kernel of that name is looked up at the first call.
  int define(Signature signature);
  const Signature& signature(int op) const { return ops_[static_cast<size_t>(op)]->signature; }

  // in[] are handles (0: absent), scalars[] numbers, both in signature order. out[] requests are answered with handles.
  void call(int op, const Handle* in, const double* scalars, const OutputRequest* requests, Handle* out);

  void write(Handle h, const void* data, size_t bytes);  // copies now: into the tensor itself while the stream has nothing to do
  void read(Handle h, void* to, size_t bytes, Done done);
  void sync(Done done);

  // Says that the fault was seen: work enqueued from now on runs again.
  void clear_fault();

  MemoryReport memory() const;
  void reset_peak() { arena_.reset_peak(); }
  void trim();  // gives free pages back to the system
  void profile(bool on);
  std::vector<OpProfile> profiled();
  int threads() const { return options_.threads; }
  const char* isa() const { return options_.kernels->isa; }

 private:
  struct Storage {
    void* data;
    size_t bytes;
    int users;
  };
  struct Slot {
    uint32_t generation = 1;
    Storage* storage = nullptr;
    View view;
  };
  struct Op {
    Signature signature;
    const Kernel* kernel = nullptr;
    uint64_t count = 0;
    double seconds = 0;
  };
  struct Command {
    enum Kind { kernel, copy, done } kind;
    uint64_t epoch;
    Op* op = nullptr;
    Call call;
    void* to = nullptr;
    const void* from = nullptr;
    size_t bytes = 0;
    std::unique_ptr<char[]> staged;
    Done done_fn;
  };

  Slot& slot(Handle h, const char* op);
  Handle handle_of(size_t index) const { return (static_cast<Handle>(slots_[index].generation) << 24) | (index + 1); }
  Handle adopt(Storage* storage, const View& view);
  void* allocate(size_t bytes, const std::string& what);
  void enqueue(std::unique_ptr<Command> command);
  void execute(Command& command);
  void loop();

  EngineOptions options_;
  Arena arena_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_slots_;
  size_t live_tensors_ = 0;
  std::vector<std::unique_ptr<Op>> ops_;
  std::unordered_map<std::string, const Kernel*> kernels_;
  uint64_t epoch_ = 0;  // raised when a fault was seen; commands of an epoch that faulted are skipped

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::unique_ptr<Command>> queue_;
  bool stop_ = false;
  std::atomic<bool> profiling_{false};
  std::atomic<int64_t> pending_{0};  // commands that are not finished

  // The stream's own.
  ThreadPool pool_;
  std::unique_ptr<Error> fault_;
  uint64_t fault_epoch_ = 0;
  std::mutex profile_mutex_;
  std::thread thread_;
};

}  // namespace limbeck
