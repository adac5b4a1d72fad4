// The CUDA backend: one compute stream and one copy stream on one GPU. Kernels are launched in the order of the calls; data goes
// through pinned and device staging, so that the bus and the kernels work at the same time.
#include "core/backend.h"

#include <cuda.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "cuda/blas.h"
#include "cuda/fault.h"
#include "cuda/launch.h"
#include "cuda/libraries.h"

namespace limbeck::cuda {

namespace {

Error device_error(const char* code, const std::string& message) { return Error(ErrorKind::device, code, message); }

template <class F>
F* driver(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found), name);
  if (found != cudaDriverEntryPointSuccess)
    throw device_error("ERR_CUDA_DRIVER", std::string("cuda: the driver has no ") + name + "; install a driver of version 525 or newer");
  return reinterpret_cast<F*>(function);
}

// Physical memory is mapped behind the arena's high-water mark, so that one contiguous range grows without copies.
class DeviceRange final : public Range {
 public:
  DeviceRange(int device, size_t bytes) : device_(device) {
    property_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    property_.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
    size_t granularity = 0;
    succeed(granularity_of_(&granularity, &property_, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED), "cuMemGetAllocationGranularity");
    step_ = std::max(granularity, size_t{32} << 20);
    size_ = (bytes + step_ - 1) / step_ * step_;
    succeed(reserve_(&base_, size_, 0, 0, 0), "cuMemAddressReserve");
  }
  ~DeviceRange() override {
    size_t at = 0;
    for (const auto& [handle, bytes] : parts_) {
      unmap_(base_ + at, bytes);
      release_(handle);
      at += bytes;
    }
    free_(base_, size_);
  }
  char* base() const override { return reinterpret_cast<char*>(base_); }
  size_t size() const override { return size_; }
  bool commit(size_t bytes) override {
    if (bytes <= committed_) return true;
    check(cudaSetDevice(device_), "cudaSetDevice");
    const size_t more = std::min((bytes - committed_ + step_ - 1) / step_ * step_, size_ - committed_);
    CUmemGenericAllocationHandle handle;
    const CUresult made = create_(&handle, more, &property_, 0);
    if (made == CUDA_ERROR_OUT_OF_MEMORY) return false;
    succeed(made, "cuMemCreate");
    succeed(map_(base_ + committed_, more, 0, handle, 0), "cuMemMap");
    CUmemAccessDesc access = {property_.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    succeed(access_(base_ + committed_, more, &access, 1), "cuMemSetAccess");
    parts_.emplace_back(handle, more);
    committed_ += more;
    return true;
  }
  // Unmapping would wait for the device; what was mapped stays for the next step.
  void give_back(const std::vector<std::pair<void*, size_t>>&) override {}

 private:
  static void succeed(CUresult result, const char* what) {
    if (result != CUDA_SUCCESS) throw device_error("ERR_CUDA", std::string("cuda: ") + what + " failed with error " + std::to_string(result));
  }

  int device_;
  CUmemAllocationProp property_ = {};
  CUdeviceptr base_ = 0;
  size_t size_ = 0, step_ = 0, committed_ = 0;
  std::vector<std::pair<CUmemGenericAllocationHandle, size_t>> parts_;
  decltype(&cuMemGetAllocationGranularity) granularity_of_ = driver<std::remove_pointer_t<decltype(granularity_of_)>>("cuMemGetAllocationGranularity");
  decltype(&cuMemAddressReserve) reserve_ = driver<std::remove_pointer_t<decltype(reserve_)>>("cuMemAddressReserve");
  decltype(&cuMemAddressFree) free_ = driver<std::remove_pointer_t<decltype(free_)>>("cuMemAddressFree");
  decltype(&cuMemCreate) create_ = driver<std::remove_pointer_t<decltype(create_)>>("cuMemCreate");
  decltype(&cuMemRelease) release_ = driver<std::remove_pointer_t<decltype(release_)>>("cuMemRelease");
  decltype(&cuMemMap) map_ = driver<std::remove_pointer_t<decltype(map_)>>("cuMemMap");
  decltype(&cuMemUnmap) unmap_ = driver<std::remove_pointer_t<decltype(unmap_)>>("cuMemUnmap");
  decltype(&cuMemSetAccess) access_ = driver<std::remove_pointer_t<decltype(access_)>>("cuMemSetAccess");
};

struct Event {
  cudaEvent_t event = nullptr;
  explicit Event(unsigned flags = cudaEventDisableTiming) { check(cudaEventCreateWithFlags(&event, flags), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
};

// Kernels and writes that are launched as one.
struct Recorded {
  cudaGraphExec_t exec = nullptr;
  std::vector<void*> pinned;  // what the writes in it read
  ~Recorded() {
    if (exec) cudaGraphExecDestroy(exec);
    for (void* p : pinned) cudaFreeHost(p);
  }
};

class Cuda final : public Backend {
 public:
  explicit Cuda(const BackendOptions& options) {
    check(cudaSetDevice(options.device), "cudaSetDevice");
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, options.device), "cudaGetDeviceProperties");
    device_.number = options.device;
    device_.workspace_limit = options.workspace_limit;
    device_.architecture = properties.major * 10 + properties.minor;
    device_.processors = properties.multiProcessorCount;
    device_.memory = properties.totalGlobalMem;
    device_.shared_per_block = properties.sharedMemPerBlockOptin;
    detail_ = std::string(properties.name) + ", compute capability " + std::to_string(properties.major) + "." + std::to_string(properties.minor);
    check_architecture(device_.architecture, properties.name);
    check(cudaStreamCreateWithFlags(&device_.stream, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaStreamCreateWithFlags(&copies_, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaMalloc(reinterpret_cast<void**>(&device_.fault), sizeof(FaultRecord)), "cudaMalloc");
    reset_fault();
    for (Slot& slot : slots_) {
      check(cudaMallocHost(&slot.pinned, kSlotBytes + sizeof(FaultRecord)), "cudaMallocHost");
      check(cudaMalloc(&slot.device, kSlotBytes + sizeof(FaultRecord)), "cudaMalloc");
      free_.push_back(&slot);
    }
    blas_ = open_blas(device_);
    device_.blas = blas_.get();
    completions_ = std::thread([this] { complete(); });
  }
  ~Cuda() override {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    completions_.join();
    blas_.reset();
    for (Slot& slot : slots_) {
      cudaFreeHost(slot.pinned);
      cudaFree(slot.device);
    }
    cudaFree(device_.fault);
    cudaStreamDestroy(copies_);
    cudaStreamDestroy(device_.stream);
  }

  const char* name() const override { return "cuda"; }
  const char* detail() const override { return detail_.c_str(); }
  int threads() const override { return 0; }
  bool computes_bf16() const override { return true; }
  std::vector<const KernelFamily*> families() const override { return cuda::families(); }
  size_t default_limit() const override { return device_.memory; }
  std::unique_ptr<Range> reserve(size_t bytes) override { return std::make_unique<DeviceRange>(device_.number, bytes); }
  bool writes_at_once() const override { return false; }
  void prepare(Call& call) override { call.device = &device_; }

  void run(const Kernel& kernel, const Call& call) override {
    enter();
    kernel.run(call);
  }

  double time(const Kernel& kernel, const Call& call) override {
    enter();
    Event from(cudaEventDefault), to(cudaEventDefault);
    check(cudaEventRecord(from.event, device_.stream), "cudaEventRecord");
    kernel.run(call);
    check(cudaEventRecord(to.event, device_.stream), "cudaEventRecord");
    check(cudaEventSynchronize(to.event), call.op);
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, from.event, to.event), "cudaEventElapsedTime");
    return static_cast<double>(milliseconds) / 1000;
  }

  void write(void* to, const void* from, size_t bytes) override {
    enter();
    if (recording_) return write_recorded(to, from, bytes);
    for (size_t at = 0; at < bytes; at += kSlotBytes) {
      const size_t part = std::min(kSlotBytes, bytes - at);
      Slot& slot = take();
      std::memcpy(slot.pinned, static_cast<const char*>(from) + at, part);
      check(cudaMemcpyAsync(slot.device, slot.pinned, part, cudaMemcpyHostToDevice, copies_), "write");
      check(cudaEventRecord(slot.filled.event, copies_), "write");
      check(cudaStreamWaitEvent(device_.stream, slot.filled.event), "write");
      check(cudaMemcpyAsync(static_cast<char*>(to) + at, slot.device, part, cudaMemcpyDeviceToDevice, device_.stream), "write");
      check(cudaEventRecord(slot.emptied.event, device_.stream), "write");
      finish({&slot, nullptr, 0, nullptr});
    }
  }

  // With each part comes the fault record as it was then.
  void read(void* to, const void* from, size_t bytes, Done done) override {
    enter();
    size_t at = 0;
    do {
      const size_t part = std::min(kSlotBytes, bytes - at);
      Slot& slot = take();
      char* const record = static_cast<char*>(slot.device) + part;
      if (part > 0) check(cudaMemcpyAsync(slot.device, static_cast<const char*>(from) + at, part, cudaMemcpyDeviceToDevice, device_.stream), "read");
      check(cudaMemcpyAsync(record, device_.fault, sizeof(FaultRecord), cudaMemcpyDeviceToDevice, device_.stream), "read");
      check(cudaEventRecord(slot.filled.event, device_.stream), "read");
      check(cudaStreamWaitEvent(copies_, slot.filled.event), "read");
      check(cudaMemcpyAsync(slot.pinned, slot.device, part + sizeof(FaultRecord), cudaMemcpyDeviceToHost, copies_), "read");
      check(cudaEventRecord(slot.emptied.event, copies_), "read");
      finish({&slot, static_cast<char*>(to) + at, part, at + part == bytes ? std::move(done) : nullptr});
      at += part;
    } while (at < bytes);
  }

  void sync(Done done) override { read(nullptr, nullptr, 0, std::move(done)); }

  void drain() override {
    enter();
    cudaStreamSynchronize(device_.stream);
    cudaStreamSynchronize(copies_);
  }

  void clear_fault() override {
    drain();
    reset_fault();
  }

  void capture() override {
    enter();
    recording_ = std::make_shared<Recorded>();
    // What a product or a write needs for good (workspace, pinned memory) may be allocated while a stream is recorded.
    check(cudaStreamBeginCapture(device_.stream, cudaStreamCaptureModeRelaxed), "graph");
  }

  std::shared_ptr<void> captured() override {
    const std::shared_ptr<Recorded> recorded = std::exchange(recording_, nullptr);
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(device_.stream, &graph), "graph");
    const cudaError_t made = cudaGraphInstantiate(&recorded->exec, graph, 0);
    cudaGraphDestroy(graph);
    check(made, "graph");
    return recorded;
  }

  void replay(void* graph) override {
    enter();
    check(cudaGraphLaunch(static_cast<Recorded*>(graph)->exec, device_.stream), "graph");
  }

 private:
  // Staging of one transfer: over the bus on the copy stream, to or from its place on the compute stream.
  struct Slot {
    void *pinned = nullptr, *device = nullptr;
    Event filled, emptied;
  };
  struct Completion {
    Slot* slot;
    char* to;  // where a read's bytes go, of which the fault record lies behind them; null for a write
    size_t bytes;
    Done done;
  };
  static constexpr size_t kSlotBytes = size_t{8} << 20;

  // The device is a thread's own choice, made once.
  void enter() const {
    thread_local int chosen = -1;
    if (chosen == device_.number) return;
    check(cudaSetDevice(device_.number), "cudaSetDevice");
    chosen = device_.number;
  }

  Slot& take() {
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [this] { return !free_.empty(); });
    Slot* slot = free_.back();
    free_.pop_back();
    return *slot;
  }

  void finish(Completion completion) {
    {
      std::lock_guard lock(mutex_);
      queue_.push_back(std::move(completion));
    }
    wake_.notify_all();
  }

  void complete() {
    for (;;) {
      Completion c;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
        if (queue_.empty()) return;
        c = std::move(queue_.front());
        queue_.pop_front();
      }
      std::unique_ptr<Error> fault;
      try {
        enter();
        check(cudaEventSynchronize(c.slot->emptied.event), "cuda");
        if (c.done || c.bytes > 0) fault = receive(c);
      } catch (const Error& e) {
        fault = std::make_unique<Error>(e);
        fault->op = "";
      }
      {
        std::lock_guard lock(mutex_);
        free_.push_back(c.slot);
      }
      wake_.notify_all();
      if (c.done) c.done(fault.get());
    }
  }

  // What a read brought, or the fault that came before it.
  static std::unique_ptr<Error> receive(const Completion& c) {
    FaultRecord record;
    std::memcpy(&record, static_cast<const char*>(c.slot->pinned) + c.bytes, sizeof record);
    if (record.key != FaultRecord::no_key) return std::make_unique<Error>(error_of(record));
    if (c.bytes > 0) std::memcpy(c.to, c.slot->pinned, c.bytes);
    return nullptr;
  }

  void reset_fault() {
    check(cudaMemsetAsync(device_.fault, 0, sizeof(FaultRecord), device_.stream), "fault");
    check(cudaMemsetAsync(&device_.fault->key, 0xff, sizeof device_.fault->key, device_.stream), "fault");
  }

  void write_recorded(void* to, const void* from, size_t bytes) {
    if (bytes == 0) return;
    void* pinned = nullptr;
    check(cudaMallocHost(&pinned, bytes), "graph");
    recording_->pinned.push_back(pinned);
    std::memcpy(pinned, from, bytes);
    check(cudaMemcpyAsync(to, pinned, bytes, cudaMemcpyHostToDevice, device_.stream), "graph");
  }

  Device device_;
  std::string detail_;
  cudaStream_t copies_ = nullptr;
  std::unique_ptr<Blas> blas_;
  std::shared_ptr<Recorded> recording_;

  std::mutex mutex_;
  std::condition_variable wake_;
  Slot slots_[8];
  std::vector<Slot*> free_;
  std::deque<Completion> queue_;
  bool stop_ = false;
  std::thread completions_;
};

std::string probe() {
  std::string reason, devices;
  int driver_version = 0, count = 0;
  cudaDriverGetVersion(&driver_version);
  const cudaError_t counted = cudaGetDeviceCount(&count);
  if (driver_version == 0) reason = "there is no NVIDIA driver";
  else if (counted != cudaSuccess) reason = cudaGetErrorString(counted);
  else if (count == 0) reason = "the driver finds no GPU";
  bool usable = false;
  for (int i = 0; i < count && reason.empty(); ++i) {
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, i) != cudaSuccess) continue;
    usable = usable || p.major * 10 + p.minor >= kOldestArchitecture;
    devices += (devices.empty() ? "" : ",") + std::string("{\"name\":") + quoted(p.name) + ",\"architecture\":\"" + std::to_string(p.major) + "." +
               std::to_string(p.minor) + "\",\"memory\":" + std::to_string(p.totalGlobalMem) + ",\"processors\":" + std::to_string(p.multiProcessorCount) + "}";
  }
  if (reason.empty() && !usable) reason = "no GPU here has compute capability 8.0 or newer";
  const std::string version = driver_version ? std::to_string(driver_version / 1000) + "." + std::to_string(driver_version % 1000 / 10) : "";
  return "{\"driver\":" + quoted(version) + ",\"devices\":[" + devices + "],\"libraries\":" + libraries_json() + ",\"reason\":" + quoted(reason) + "}";
}

std::unique_ptr<Backend> open(const BackendOptions& options) { return std::make_unique<Cuda>(options); }

}  // namespace

}  // namespace limbeck::cuda

extern "C" __attribute__((visibility("default"))) const limbeck::BackendLibrary* limbeck_backend() {
  static const limbeck::BackendLibrary library = {limbeck::kBackendAbi, sizeof(limbeck::Call), sizeof(limbeck::View),
                                                  limbeck::cuda::open, limbeck::cuda::probe, limbeck::cuda::families, limbeck::cuda::imagine};
  return &library;
}
