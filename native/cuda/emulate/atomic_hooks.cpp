// The atomics of the host's own code in instrumented files (guards of statics, shared pointers): plain ones.
#include <cstdint>

extern "C" {
#define LIMBECK_HIDDEN __attribute__((visibility("hidden")))
#define LIMBECK_TSAN_ATOMICS(bits)                                                                                            \
  LIMBECK_HIDDEN uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
  LIMBECK_HIDDEN void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); } \
  LIMBECK_HIDDEN uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* p, uint##bits##_t v, int) {           \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                                       \
  }                                                                                                                           \
  LIMBECK_HIDDEN uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* p, uint##bits##_t v, int) {          \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                                        \
  }                                                                                                                           \
  LIMBECK_HIDDEN uint##bits##_t __tsan_atomic##bits##_fetch_sub(volatile uint##bits##_t* p, uint##bits##_t v, int) {          \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                                        \
  }                                                                                                                           \
  LIMBECK_HIDDEN int __tsan_atomic##bits##_compare_exchange_strong(volatile uint##bits##_t* p, uint##bits##_t* e, uint##bits##_t v, int, int) { \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                   \
  }                                                                                                                           \
  LIMBECK_HIDDEN int __tsan_atomic##bits##_compare_exchange_weak(volatile uint##bits##_t* p, uint##bits##_t* e, uint##bits##_t v, int, int) { \
    return __atomic_compare_exchange_n(p, e, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                    \
  }
LIMBECK_TSAN_ATOMICS(8)
LIMBECK_TSAN_ATOMICS(16)
LIMBECK_TSAN_ATOMICS(32)
LIMBECK_TSAN_ATOMICS(64)
LIMBECK_HIDDEN void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
LIMBECK_HIDDEN void __tsan_atomic_signal_fence(int) {}
}
