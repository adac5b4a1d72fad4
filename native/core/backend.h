// What an engine needs of a device. The CPU's stands in this folder (host.cpp); others come from a library that is opened at run
// time and exports limbeck_backend(). Both sides are compiled from these headers; the ABI number says whether from the same ones.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/kernel.h"

namespace limbeck {

// One range of device addresses. Used by the engine's owner, not by its stream.
class Range {
 public:
  virtual ~Range() = default;
  virtual char* base() const = 0;
  virtual size_t size() const = 0;
  virtual bool commit(size_t bytes) = 0;  // makes the first `bytes` usable; false: the device has no room
  // Parts that hold nothing now. They may go back to the system, and come again with undefined contents.
  virtual void give_back(const std::vector<std::pair<void*, size_t>>& parts) = 0;
};

// Runs in order what the stream's thread gives it. Functions from run() on are called by that thread alone; they may return before
// the work is done.
class Backend {
 public:
  // Called when the work before it is done, from any thread; `fault` is null or what stopped the device.
  using Done = std::function<void(const Error* fault)>;

  virtual ~Backend() = default;
  virtual const char* name() const = 0;       // "cpu", "cuda"
  virtual const char* detail() const = 0;     // the instruction set, or the device's name and architecture
  virtual int threads() const = 0;            // of the CPU that compute
  virtual bool computes_bf16() const = 0;     // whether tensors without a dtype in the signature may be bf16
  virtual std::vector<const KernelFamily*> families() const = 0;
  virtual size_t default_limit() const = 0;   // bytes that tensors may take when nobody says
  virtual std::unique_ptr<Range> reserve(size_t bytes) = 0;
  virtual bool writes_at_once() const = 0;    // whether write() may be called by the engine's owner while the stream is idle
  virtual void prepare(Call& call) = 0;       // what kernels and workspace functions look at: threads, device

  virtual void run(const Kernel& kernel, const Call& call) = 0;
  virtual double time(const Kernel& kernel, const Call& call) = 0;  // runs it, waits, and tells the seconds it took
  virtual void write(void* to, const void* from, size_t bytes) = 0;  // `from` may be reused when it returns
  virtual void read(void* to, const void* from, size_t bytes, Done done) = 0;
  virtual void sync(Done done) = 0;
  virtual void drain() = 0;        // returns when all work is done
  virtual void clear_fault() = 0;  // the fault was seen: work from now on counts again

  // What is run and written between capture() and captured() may be kept to be run again as a whole. A backend that has no such
  // thing runs it at once and returns null; one that has does not run it before replay().
  virtual void capture() {}
  virtual std::shared_ptr<void> captured() { return nullptr; }
  virtual void replay(void*) {}
};

struct BackendOptions {
  int device = 0;              // its number among those of its kind
  size_t workspace_limit = 0;  // bytes of temporary memory for kernels that have the choice; 0: their own
};

// What a backend library exports as `limbeck_backend`. The sizes are checked too: a struct that differs must not be passed along.
struct BackendLibrary {
  int abi;
  size_t call_bytes, view_bytes;
  // Throws Error of kind device: no driver, no device, wrong architecture.
  std::unique_ptr<Backend> (*open)(const BackendOptions& options);
  // What there is, as JSON: driver, devices, libraries found and where they were looked for. Never throws.
  std::string (*probe)();
  // For plans: the kernels, and what their workspace functions look at, of a device that need not be here.
  std::vector<const KernelFamily*> (*families)();
  std::shared_ptr<void> (*imagine)(int architecture, int processors, size_t memory);
};

constexpr int kBackendAbi = 1;
constexpr const char* kBackendSymbol = "limbeck_backend";
using BackendLibraryFunction = const BackendLibrary* (*)();

}  // namespace limbeck
