// Collectives of a warp: lanes wait for each other, the last one does the work of all.
#include <cstring>

#include "cuda/emulate/executor.h"
#include "cuda/emulate/ptx.h"
#include "cuda/emulate/shadow.h"

namespace limbeck::cuda::emulate {

void gather(const char* name, uint32_t mask, uint64_t parameter, void* operands, void (*finish)(Operands lanes, uint32_t mask)) {
  Thread& me = *executor.current;
  const int lane = me.number % kWarp, first = me.number - lane;
  Block& block = *me.block;
  Warp& warp = block.warps[static_cast<size_t>(me.number / kWarp)];
  // Lanes that a block does not have are in the mask of nobody.
  const int lanes = executor.block_threads - first;
  const uint32_t present = lanes >= kWarp ? ~0u : (1u << lanes) - 1;
  if (!(mask >> lane & 1)) stop("ERR_EMULATED_DIVERGENCE", "%s with mask %08x, which does not have its own lane %d", name, mask, lane);
  if ((mask & present) != mask)
    stop("ERR_EMULATED_DIVERGENCE", "%s with mask %08x in a warp of %d lanes", name, mask, lanes);

  Gathering* mine = nullptr;
  for (Gathering& g : warp.open) {
    if (!(g.mask & mask)) continue;
    if (g.mask == mask && g.parameter == parameter && std::strcmp(g.name, name) == 0) {
      mine = &g;
      break;
    }
    const int other = __builtin_ctz(g.came);
    if (std::strcmp(g.name, name) == 0 && g.mask == mask)
      stop("ERR_EMULATED_DIVERGENCE", "%s with other operands than lane %d of its warp, where all lanes must have the same", name, other);
    stop("ERR_EMULATED_DIVERGENCE", "%s with mask %08x, while lane %d of its warp waits for it in %s with mask %08x", name, mask, other, g.name, g.mask);
  }
  const auto thread_of = [&](int l) -> Thread& { return executor.threads[static_cast<size_t>(block.first + first + l)]; };
  if (!mine) {
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      const int l = __builtin_ctz(rest);
      if (thread_of(l).ended)
        stop("ERR_EMULATED_DIVERGENCE", "%s with mask %08x, but lane %d has ended", name, mask, l);
    }
    warp.open.push_back({name, mask, 0, parameter});
    mine = &warp.open.back();
  }
  mine->came |= 1u << lane;
  me.operands = operands;
  if (mine->came != mask) return wait(name, mask);

  void* all[kWarp];
  for (int l = 0; l < kWarp; ++l) all[l] = mask >> l & 1 ? thread_of(l).operands : nullptr;
  *mine = warp.open.back();
  warp.open.pop_back();
  finish(all, mask);
  for (uint32_t rest = mask & ~(1u << lane); rest != 0; rest &= rest - 1) wake(thread_of(__builtin_ctz(rest)));
}

namespace {

struct ShuffleOperands {
  uint32_t bits, result;
  int operand;
};

template <Shuffle kind>
void finish_shuffle(Operands lanes, uint32_t, int width) {
  for (int l = 0; l < kWarp; ++l) {
    if (!lanes[l]) continue;
    auto& mine = *static_cast<ShuffleOperands*>(lanes[l]);
    const int segment = l & ~(width - 1), operand = mine.operand;
    int from = l;
    if constexpr (kind == Shuffle::index) from = segment + (operand & (width - 1));
    if constexpr (kind == Shuffle::up) from = l - operand >= segment ? l - operand : l;
    if constexpr (kind == Shuffle::down) from = l + operand < segment + width ? l + operand : l;
    if constexpr (kind == Shuffle::exclusive_or) from = (l ^ operand) < segment + width ? l ^ operand : l;
    from &= kWarp - 1;
    if (!lanes[from]) stop("ERR_EMULATED_DIVERGENCE", "a shuffle gives lane %d the value of lane %d, which takes no part", l, from);
    mine.result = static_cast<const ShuffleOperands*>(lanes[from])->bits;
  }
}
// The width is the same for all lanes: it is in the gathering's parameter.
int shuffle_width = 32;

struct VoteOperands {
  uint32_t low, high, result;
};

struct ReduceOperands {
  uint32_t value, result;
};
template <Reduce kind>
void finish_reduce(Operands lanes, uint32_t mask) {
  uint32_t sum = static_cast<ReduceOperands*>(lanes[__builtin_ctz(mask)])->value;
  for (int l = __builtin_ctz(mask) + 1; l < kWarp; ++l) {
    if (!lanes[l]) continue;
    const uint32_t v = static_cast<ReduceOperands*>(lanes[l])->value;
    const auto a = static_cast<int32_t>(sum), b = static_cast<int32_t>(v);
    switch (kind) {
      case Reduce::add: sum += v; break;
      case Reduce::min_signed: sum = static_cast<uint32_t>(b < a ? b : a); break;
      case Reduce::max_signed: sum = static_cast<uint32_t>(b > a ? b : a); break;
      case Reduce::min_unsigned: sum = v < sum ? v : sum; break;
      case Reduce::max_unsigned: sum = v > sum ? v : sum; break;
      case Reduce::bit_and: sum &= v; break;
      case Reduce::bit_or: sum |= v; break;
      case Reduce::bit_xor: sum ^= v; break;
    }
  }
  for (void* lane : lanes)
    if (lane) static_cast<ReduceOperands*>(lane)->result = sum;
}

}  // namespace

uint32_t shuffle(Shuffle kind, uint32_t mask, uint32_t bits, int operand, int width) {
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) stop("ERR_EMULATED_DIVERGENCE", "a shuffle of width %d", width);
  ShuffleOperands operands = {bits, 0, operand};
  const auto parameter = static_cast<uint64_t>(width);
  shuffle_width = width;
  switch (kind) {
    case Shuffle::index:
      gather("__shfl_sync", mask, parameter, &operands, [](Operands lanes, uint32_t m) { finish_shuffle<Shuffle::index>(lanes, m, shuffle_width); });
      break;
    case Shuffle::up:
      gather("__shfl_up_sync", mask, parameter, &operands, [](Operands lanes, uint32_t m) { finish_shuffle<Shuffle::up>(lanes, m, shuffle_width); });
      break;
    case Shuffle::down:
      gather("__shfl_down_sync", mask, parameter, &operands,
             [](Operands lanes, uint32_t m) { finish_shuffle<Shuffle::down>(lanes, m, shuffle_width); });
      break;
    case Shuffle::exclusive_or:
      gather("__shfl_xor_sync", mask, parameter, &operands,
             [](Operands lanes, uint32_t m) { finish_shuffle<Shuffle::exclusive_or>(lanes, m, shuffle_width); });
      break;
  }
  return operands.result;
}

uint32_t ballot(const char* name, uint32_t mask, uint32_t value) {
  VoteOperands operands = {value, 0, 0};
  gather(name, mask, 0, &operands, [](Operands lanes, uint32_t) {
    uint32_t votes = 0;
    for (int l = 0; l < kWarp; ++l)
      if (lanes[l] && static_cast<VoteOperands*>(lanes[l])->low) votes |= 1u << l;
    for (void* lane : lanes)
      if (lane) static_cast<VoteOperands*>(lane)->result = votes;
  });
  return operands.result;
}

uint32_t match_any(uint32_t mask, uint32_t low, uint32_t high) {
  VoteOperands operands = {low, high, 0};
  gather("__match_any_sync", mask, 0, &operands, [](Operands lanes, uint32_t) {
    for (void* lane : lanes) {
      if (!lane) continue;
      auto& mine = *static_cast<VoteOperands*>(lane);
      mine.result = 0;
      for (int l = 0; l < kWarp; ++l) {
        const auto* other = static_cast<const VoteOperands*>(lanes[l]);
        if (other && other->low == mine.low && other->high == mine.high) mine.result |= 1u << l;
      }
    }
  });
  return operands.result;
}

uint32_t reduce(Reduce kind, uint32_t mask, uint32_t value) {
  ReduceOperands operands = {value, 0};
  switch (kind) {
    case Reduce::add: gather("__reduce_add_sync", mask, 0, &operands, finish_reduce<Reduce::add>); break;
    case Reduce::min_signed: gather("__reduce_min_sync", mask, 0, &operands, finish_reduce<Reduce::min_signed>); break;
    case Reduce::max_signed: gather("__reduce_max_sync", mask, 0, &operands, finish_reduce<Reduce::max_signed>); break;
    case Reduce::min_unsigned: gather("__reduce_min_sync", mask, 1, &operands, finish_reduce<Reduce::min_unsigned>); break;
    case Reduce::max_unsigned: gather("__reduce_max_sync", mask, 1, &operands, finish_reduce<Reduce::max_unsigned>); break;
    case Reduce::bit_and: gather("__reduce_and_sync", mask, 0, &operands, finish_reduce<Reduce::bit_and>); break;
    case Reduce::bit_or: gather("__reduce_or_sync", mask, 0, &operands, finish_reduce<Reduce::bit_or>); break;
    case Reduce::bit_xor: gather("__reduce_xor_sync", mask, 0, &operands, finish_reduce<Reduce::bit_xor>); break;
  }
  return operands.result;
}

// The one collective that also orders the lanes' memory.
void warp_sync(uint32_t mask) {
  Thread& me = *executor.current;
  gather("__syncwarp", mask, 0, &me, [](Operands lanes, uint32_t) {
    if (!executor.checks) return;
    Joined joined;
    for (void* lane : lanes)
      if (lane) joined.add(static_cast<Thread*>(lane)->moment());
    for (void* lane : lanes) {
      if (!lane) continue;
      auto& t = *static_cast<Thread*>(lane);
      t.seen = joined.seen, t.fenced = joined.fenced;
      ++t.step;
    }
    enter_thread();
  });
}

bool elect_one() {
  VoteOperands operands = {};
  gather("elect.sync", ~0u, 0, &operands, [](Operands lanes, uint32_t) { static_cast<VoteOperands*>(lanes[0])->result = 1; });
  return operands.result != 0;
}

void setmaxnreg(int registers) {
  VoteOperands operands = {};
  gather("setmaxnreg", ~0u, static_cast<uint64_t>(registers), &operands, [](Operands, uint32_t) {});
}

}  // namespace limbeck::cuda::emulate
