#pragma once
#include <tuple>

#include "shared/arguments.h"

namespace flashmark {

// Inputs of causal Nystrom attention. Landmarks (B | 1, Hkv, M, D) are multiplied by the scale;
// core (B | 1, Hkv, M, M), half (B | 1, Hkv, M) with normalize="mass" only; decay (Hkv, M); L0
// (rows, Hkv, M), R0 (rows, Hkv, M, Dv).
struct NystromArguments {
  const Tensor &query, &key, &value, &lq, &lk, &core;
  const OptionalTensor &half, &decay, &key_mask, &cu_seqlens, &L0, &R0;
};

// (out, L, R)
std::tuple<Tensor, Tensor, Tensor> nystrom_forward(const NystromArguments& arguments);

// (dquery, dkey, dvalue, dlq, dlk, dcore, dhalf, ddecay, dL0, dR0): parameters in float32 over (B,
// Hkv, ...); ddecay float64; what has no input is empty
std::vector<Tensor> nystrom_backward(const NystromArguments& arguments, const Tensor& dout,
                                     const OptionalTensor& dL, const OptionalTensor& dR);

}  // namespace flashmark
