// Atomics: nothing runs in between here, so that they are plain changes.
#include "cuda/emulate/ptx.h"
#include "cuda/emulate/schedule.h"
#include "cuda/emulate/shadow.h"

namespace limbeck::cuda::emulate {

namespace {

template <class T>
void check(T* p) {
  check_aligned(p, sizeof(T), "an atomic");
  check_access(p, sizeof(T), Access::atomic, thread_accessor(), "an atomic");
}

template <class T, class Signed>
T change(Atomic kind, T* p, T value) {
  check(p);
  order_blocks(p);
  const T old = *p;
  const auto a = static_cast<Signed>(old), b = static_cast<Signed>(value);
  switch (kind) {
    case Atomic::add: *p = old + value; break;
    case Atomic::exchange: *p = value; break;
    case Atomic::min_signed: *p = b < a ? value : old; break;
    case Atomic::max_signed: *p = b > a ? value : old; break;
    case Atomic::min_unsigned: *p = value < old ? value : old; break;
    case Atomic::max_unsigned: *p = value > old ? value : old; break;
    case Atomic::bit_and: *p = old & value; break;
    case Atomic::bit_or: *p = old | value; break;
    case Atomic::bit_xor: *p = old ^ value; break;
    case Atomic::increment: *p = old >= value ? 0 : old + 1; break;
    case Atomic::decrement: *p = old == 0 || old > value ? value : old - 1; break;
  }
  return old;
}

template <class T>
T compare_exchange(T* p, T compare, T value) {
  check(p);
  order_blocks(p);
  const T old = *p;
  if (old == compare) *p = value;
  return old;
}

}  // namespace

uint32_t atomic(Atomic kind, uint32_t* p, uint32_t value) { return change<uint32_t, int32_t>(kind, p, value); }
uint64_t atomic(Atomic kind, uint64_t* p, uint64_t value) { return change<uint64_t, int64_t>(kind, p, value); }
uint32_t atomic_compare_exchange(uint32_t* p, uint32_t compare, uint32_t value) { return compare_exchange(p, compare, value); }
uint64_t atomic_compare_exchange(uint64_t* p, uint64_t compare, uint64_t value) { return compare_exchange(p, compare, value); }

float atomic_add(float* p, float value) {
  check(p);
  const float old = *p;
  *p = old + value;
  return old;
}
double atomic_add(double* p, double value) {
  check(p);
  const double old = *p;
  *p = old + value;
  return old;
}

void red_add(float* p, const float* values, int count) {
  check_aligned(p, sizeof(float) * static_cast<size_t>(count), "red.add");
  check_access(p, sizeof(float) * static_cast<size_t>(count), Access::atomic, thread_accessor(), "red.add");
  for (int i = 0; i < count; ++i) p[i] += values[i];
}

}  // namespace limbeck::cuda::emulate
