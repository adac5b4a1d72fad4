// Attention on Hopper: WGMMA, TMA, warp specialisation. Each function returns false where it does not take a call: then
// attention_sm80.cuh does. Arguments were checked, and there is something to compute.
#pragma once
#include "cuda/attention.cuh"

namespace limbeck::cuda {

inline bool attention_sm90(const Call&) { return false; }
inline size_t attention_sm90_workspace(const Call&) { return 0; }
inline bool attention_backward_sm90(const Call&) { return false; }
inline size_t attention_backward_sm90_workspace(const Call&) { return 0; }

}  // namespace limbeck::cuda
