#include "core/threads.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "core/pages.h"

namespace limbeck {
namespace {

constexpr size_t kLine = 64;

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  std::unique_ptr<Range> pages;  // owns the data of large buffers: huge pages, which packed matrices need to stream from cache

  void allocate(size_t size) {
    if (size >= kLarge) {
      pages = reserve_pages(size);
      pages->commit(size);
      data = pages->base();
    } else {
      data = ::operator new(size, std::align_val_t{kLine});
    }
    bytes = size;
  }
  void release() {
    if (data && !pages) ::operator delete(data, std::align_val_t{kLine});
    pages.reset();
    data = nullptr;
    bytes = 0;
  }

 private:
  static constexpr size_t kLarge = size_t{1} << 18;
};

struct alignas(kLine) Slots {
  Buffer buffer[ThreadPool::kSlots];
};

}  // namespace

// The tiles of a job are shared out evenly, in order: a thread that takes its own share finds in its cache what it left there in the job
// before. Who is done with his own takes what is left of the others'.
//
// A share is published by writing its ticket: epoch (16 bits), end (24) and next claim (24). A claim is a compare-and-swap that moves
// `next`, so a worker that comes late finds tickets without claims left and never touches the job. fn, ctx and the rest are read only
// while holding a claim, and the caller does not leave before all claims are reported.
struct ThreadPool::State {
  static constexpr int kBits = 24;
  static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;

  struct alignas(kLine) Share {
    std::atomic<uint64_t> ticket{0};
  };

  alignas(kLine) std::atomic<uint64_t> jobs{0};    // published so far
  alignas(kLine) std::atomic<int32_t> pending{0};  // claims of the job that are not reported yet
  alignas(kLine) std::atomic<int32_t> wake{0};     // sleepers wait for a change
  std::atomic<int32_t> sleepers{0};
  std::atomic<bool> stop{false};
  std::atomic<bool> busy{false};

  alignas(kLine) Fn fn = nullptr;
  void* ctx = nullptr;
  int64_t tiles = 0;
  int64_t span = 1;  // tiles in a claim
  std::atomic<int64_t> failed{INT64_MAX};
  std::exception_ptr error;
  std::mutex error_mutex;

  std::vector<Slots> slots;
  std::vector<Share> shares;
  std::vector<std::thread> workers;

  explicit State(int threads) : slots(static_cast<size_t>(threads)), shares(static_cast<size_t>(threads)) {
    workers.reserve(static_cast<size_t>(threads) - 1);
    try {
      for (int i = 1; i < threads; ++i) workers.emplace_back([this, i] { work(i); });
    } catch (...) {
      finish();
      throw Error(ErrorKind::memory, "ERR_THREADS", "thread pool: the system refused a thread after " +
                  std::to_string(workers.size() + 1) + " of " + std::to_string(threads) + "; ask for fewer threads");
    }
  }
  ~State() {
    finish();
    for (Slots& s : slots)
      for (Buffer& b : s.buffer) b.release();
  }

  void finish() {
    stop.store(true);
    wake.fetch_add(1);
    wake.notify_all();
    for (std::thread& t : workers) t.join();
  }

  static bool open(uint64_t t) { return (t & kMask) < ((t >> kBits) & kMask); }

  // Claims and runs tiles until none is left, then reports them at once.
  void drain(int thread) {
    const size_t count = shares.size();
    int32_t done = 0;
    for (size_t i = 0; i < count; ++i) done += drain(shares[(static_cast<size_t>(thread) + i) % count].ticket, thread);
    if (done != 0 && pending.fetch_sub(done, std::memory_order_acq_rel) == done) pending.notify_one();
  }

  int32_t drain(std::atomic<uint64_t>& ticket, int thread) {
    int32_t done = 0;
    uint64_t t = ticket.load(std::memory_order_relaxed);
    while (open(t)) {
      if (!ticket.compare_exchange_weak(t, t + 1, std::memory_order_acq_rel, std::memory_order_relaxed)) continue;
      const int64_t first = static_cast<int64_t>(t & kMask) * span;
      const int64_t last = first + span < tiles ? first + span : tiles;
      for (int64_t tile = first; tile < last; ++tile) {
        if (tile > failed.load(std::memory_order_relaxed)) break;  // an earlier tile decides what is thrown
        try {
          fn(ctx, tile, thread);
        } catch (...) {
          const std::lock_guard lock(error_mutex);
          if (tile < failed.load(std::memory_order_relaxed)) {
            failed.store(tile, std::memory_order_relaxed);
            error = std::current_exception();
          }
        }
      }
      ++done;
      t = ticket.load(std::memory_order_relaxed);
    }
    return done;
  }

  void publish(int64_t claims) {
    const uint64_t epoch = (jobs.load(std::memory_order_relaxed) + 1) << (2 * kBits);
    const int64_t count = static_cast<int64_t>(shares.size());
    const auto begin = [&](int64_t i) { return static_cast<uint64_t>((claims * i + count - 1) / count); };
    for (int64_t i = 0; i < count; ++i) shares[static_cast<size_t>(i)].ticket.store(epoch | begin(i + 1) << kBits | begin(i), std::memory_order_release);
    jobs.fetch_add(1);  // seq_cst: before reading sleepers
  }

  void work(int thread) {
    for (uint64_t seen = 0;;) {
      const auto ready = [&] { return jobs.load(std::memory_order_acquire) != seen || stop.load(std::memory_order_relaxed); };
      if (!spin(ready)) {
        const int32_t before = wake.load();
        sleepers.fetch_add(1);  // before the last look at the jobs; the caller looks in the opposite order
        if (jobs.load() == seen && !stop.load()) wake.wait(before);
        sleepers.fetch_sub(1);
        continue;
      }
      if (stop.load()) return;
      seen = jobs.load(std::memory_order_acquire);
      drain(thread);
    }
  }
};

ThreadPool::ThreadPool(int threads) : state_(new State(threads < 1 ? 1 : threads)) {}
ThreadPool::~ThreadPool() = default;

int ThreadPool::size() const { return static_cast<int>(state_->slots.size()); }

void ThreadPool::run(int64_t tiles, Fn fn, void* ctx) {
  if (tiles <= 0) return;
  State& s = *state_;
  if (s.busy.exchange(true, std::memory_order_acquire))
    throw Error(ErrorKind::internal, "ERR_POOL_BUSY", "thread pool: parallel() was called while it was running");
  struct Release {
    State& s;
    ~Release() { s.busy.store(false, std::memory_order_release); }
  } release{s};

  if (tiles == 1 || s.workers.empty()) {
    for (int64_t tile = 0; tile < tiles; ++tile) fn(ctx, tile, 0);
    return;
  }
  constexpr int64_t most = static_cast<int64_t>(State::kMask);
  s.span = (tiles + most - 1) / most;
  const int64_t claims = (tiles + s.span - 1) / s.span;
  s.fn = fn;
  s.ctx = ctx;
  s.tiles = tiles;
  s.failed.store(INT64_MAX, std::memory_order_relaxed);
  s.error = nullptr;
  s.pending.store(static_cast<int32_t>(claims), std::memory_order_relaxed);
  s.publish(claims);
  if (const int32_t asleep = s.sleepers.load(); asleep > 0) {
    s.wake.fetch_add(1);
    if (claims - 1 >= asleep) {
      s.wake.notify_all();
    } else {
      for (int64_t i = 1; i < claims; ++i) s.wake.notify_one();
    }
  }
  s.drain(0);
  const auto finished = [&s] { return s.pending.load(std::memory_order_acquire) == 0; };
  if (!spin(finished))
    for (int32_t left; (left = s.pending.load(std::memory_order_acquire)) != 0;) s.pending.wait(left, std::memory_order_acquire);
  if (s.error) {
    const std::exception_ptr error = std::move(s.error);
    s.error = nullptr;
    std::rethrow_exception(error);
  }
}

void* ThreadPool::scratch(int thread, size_t bytes, int slot) {
  Buffer& b = state_->slots[static_cast<size_t>(thread)].buffer[slot];
  if (b.bytes < bytes) {
    b.release();
    const size_t size = (bytes + bytes / 4 + kLine - 1) / kLine * kLine;  // some room, so that slowly growing shapes settle soon
    try {
      b.allocate(size);
    } catch (const std::bad_alloc&) {
      throw Error(ErrorKind::memory, "ERR_OUT_OF_MEMORY",
                  "thread pool: no memory for " + std::to_string(size) + " bytes of scratch space; use a smaller batch");
    }
  }
  return b.data;
}

}  // namespace limbeck
