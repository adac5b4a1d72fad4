// One engine for one device: tensors by handle, and a stream that gives kernels to the backend in order, on its own thread. All
// public functions belong to the thread that made the engine (JavaScript's); only the stream's thread touches tensor data. A call
// checks, allocates and returns: memory freed here may be handed out again at once, since the stream runs in the order of the calls.
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
#include <unordered_set>
#include <vector>

#include "core/arena.h"
#include "core/backend.h"
#include "core/kernel.h"
#include "core/signature.h"

namespace limbeck {

// A tensor's name outside the engine: slot number, generation, so that a stale handle is refused, and device. 0 is "no tensor".
// All bits together stay exact in a JavaScript number.
using Handle = uint64_t;
constexpr int kSlotBits = 24, kGenerationBits = 27, kDevices = 3;
constexpr const char* kDeviceNames[kDevices] = {"cpu", "cuda", "plan"};
constexpr int device_of(Handle h) { return static_cast<int>(h >> (kSlotBits + kGenerationBits)); }

struct EngineOptions {
  int device = 0;           // in kDeviceNames
  size_t memory_limit = 0;  // bytes of tensors; 0 is the backend's default
};

struct MemoryReport {
  size_t live, peak, reserved, limit, tensors;
};

struct OpProfile {
  std::string op;
  uint64_t count;
  double seconds;
  size_t workspace;  // bytes, of the call that took most
};

// What an op call asks of each output.
struct OutputRequest {
  enum Kind { allocate, skip, existing } kind;
  Handle handle;    // of an existing tensor
  bool accumulate;  // add to it
};

class Engine {
 public:
  // Runs on some thread when the work before it is done; `fault` is null or what stopped that work.
  using Done = Backend::Done;

  Engine(std::unique_ptr<Backend> backend, const EngineOptions& options);
  ~Engine();

  Handle create(DType dtype, const int64_t* dims, int rank);
  // A tensor over the same bytes, from `offset` elements on. `dims` must fit inside.
  Handle view(Handle of, int64_t offset, const int64_t* dims, int rank);
  void release(Handle h);
  const View& at(Handle h, const char* op = "tensor") const;

  // `op` is the signature's number; its kernel is looked up at the first call. in[] are handles (0: absent), scalars[] numbers, both
  // in signature order. out[] requests are answered with handles.
  void call(int op, const Signature& signature, const Handle* in, const double* scalars, const OutputRequest* requests, Handle* out);

  void write(Handle h, const void* data, size_t bytes);  // copies now: into the tensor itself while the stream has nothing to do
  void read(Handle h, void* to, size_t bytes, Done done);
  void sync(Done done);

  // Between the two, calls are recorded instead of run: as a graph, which keeps the memory they use. Reads are refused.
  void capture();
  int captured();
  void replay(int graph);
  void drop(int graph);  // its memory is free once the tensors in it are, too

  // Says that the fault was seen: work enqueued from now on runs again.
  void clear_fault();

  MemoryReport memory();
  void reset_peak() { arena_.reset_peak(); }
  void trim();  // gives free pages back to the system
  void profile(bool on);
  std::vector<OpProfile> profiled();
  const Backend& backend() const { return *backend_; }

 private:
  struct Graph;
  struct Storage {
    void* data;
    size_t bytes;
    int users;
    std::shared_ptr<Graph> graph;  // whose memory it lies in
  };
  struct Slot {
    uint32_t generation = 1;
    Storage* storage = nullptr;
    View view;
  };
  struct Op {
    const Signature* signature = nullptr;
    const Kernel* kernel = nullptr;
    uint64_t count = 0;
    double seconds = 0;
    size_t workspace = 0;
  };
  struct Command {
    enum Kind { kernel, write, read, done, graph } kind;
    uint64_t epoch = 0;
    Op* op = nullptr;
    Call call;
    void* to = nullptr;
    const void* from = nullptr;
    size_t bytes = 0;
    std::unique_ptr<char[]> staged;
    Done done_fn;
    std::shared_ptr<Graph> replayed;
  };
  // What was recorded. Its blocks were allocated while recording; those freed meanwhile serve later calls of the same recording, and
  // all stay its own, because every replay writes to them.
  struct Graph {
    Engine& engine;
    std::vector<std::unique_ptr<Command>> commands;
    std::vector<std::pair<void*, size_t>> blocks;
    std::multimap<size_t, void*> free;
    std::unordered_set<Storage*> used;  // tensors from before that the commands use
    bool ran = false;
    std::shared_ptr<void> compiled;     // the backend's

    explicit Graph(Engine& engine) : engine(engine) {}
    ~Graph();
  };

  Slot& slot(Handle h, const char* op);
  Handle handle_of(size_t index) const;
  Handle adopt(Storage* storage, const View& view);
  void* allocate(size_t bytes, const std::string& what);
  void give_back(void* p, size_t bytes);
  void leave(Storage* storage);
  void use(Handle h);
  void forget_graphs();
  void enqueue(std::unique_ptr<Command> command);
  void execute(Command& command);
  void perform(Command& command);
  void loop();

  EngineOptions options_;
  std::unique_ptr<Backend> backend_;
  Arena arena_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_slots_;
  size_t live_tensors_ = 0;
  std::vector<std::unique_ptr<Op>> ops_;
  std::unordered_map<std::string, const Kernel*> kernels_;
  std::shared_ptr<Graph> recording_;
  std::unordered_map<int, std::shared_ptr<Graph>> graphs_;
  int last_graph_ = 0;
  std::vector<std::shared_ptr<Graph>> dropped_;
  uint64_t epoch_ = 0;  // raised when a fault was seen; commands of an epoch that faulted are skipped

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::unique_ptr<Command>> queue_;
  bool stop_ = false;
  std::atomic<bool> profiling_{false};
  std::atomic<int64_t> pending_{0};  // commands that are not finished

  // The stream's own.
  std::unique_ptr<Error> fault_;
  uint64_t running_epoch_ = 0;
  std::mutex profile_mutex_;
  std::thread thread_;
};

}  // namespace limbeck
