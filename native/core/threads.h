// A persistent pool for one engine. The calling thread works too; idle workers stay awake for a millisecond, then sleep.
// A thread claims the tiles of its own share one by one and then those left of the others', so a core that is busy elsewhere costs at
// most the tile it holds.
#pragma once
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>

namespace limbeck {

// Tells the core that it waits.
inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

// Polls until ready() or until the time is over; true if ready.
template <class Ready>
bool spin(Ready&& ready) {
  // Longer than the gap between two kernels. After it a thread lets others have the core, but stays awake while kernels are likely to
  // follow: on a virtual machine an idle core goes back to the host, and it can take longer than a kernel to return.
  constexpr auto kSpin = std::chrono::microseconds(40), kLinger = std::chrono::microseconds(1000);
  if (ready()) return true;
  const auto start = std::chrono::steady_clock::now();
  for (auto spent = start - start; spent < kLinger; spent = std::chrono::steady_clock::now() - start) {
    if (spent >= kSpin) std::this_thread::yield();
    for (int i = 0; i < 16; ++i) {
      pause();
      if (ready()) return true;
    }
  }
  return false;
}

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;  // the calling thread included

  // Runs body(tile, thread) for every tile in [0, tiles), thread in [0, size()), and returns when all are done.
  // The first exception by tile number is thrown again here. Not reentrant: a call from inside body, or from two threads, throws.
  template <class Body>
  void parallel(int64_t tiles, Body&& body) {
    using B = std::remove_reference_t<Body>;
    run(tiles, [](void* ctx, int64_t tile, int thread) { (*static_cast<B*>(ctx))(tile, thread); }, const_cast<std::remove_const_t<B>*>(&body));
  }

  // At least `bytes` bytes, 64-byte aligned, private to `thread`, kept between calls (contents undefined). Slots are separate
  // buffers: kernels use slot 0; gemm() packs into slot 1, so that it may run while a kernel holds slot 0.
  static constexpr int kSlots = 2;
  void* scratch(int thread, size_t bytes, int slot = 0);

 private:
  using Fn = void (*)(void*, int64_t, int);
  void run(int64_t tiles, Fn fn, void* ctx);
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace limbeck
