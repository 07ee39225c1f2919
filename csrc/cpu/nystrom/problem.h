// What the causal Nystrom kernels are given. Landmarks come scaled, M of them, in rows padded to
// `width` columns.
#pragma once
#include <cstdint>

#include "shared/problem.h"

namespace flashmark {

struct NystromProblem {
  int64_t batch, heads, kv_heads, tokens, dim, v_dim, marks;
  int64_t width;  // marks rounded up to whole vectors; padding is 0
  int64_t chunk;  // tokens of a chunk, at most 64
  bool mass;      // normalize="mass"
  const void *query, *key, *value;
  Strides query_strides, key_strides, value_strides;
  // Parameters over (batch | 1, kv_heads): batched_parameters says which.
  bool batched_parameters;
  const float *lq, *lk;        // (marks, dim)
  const float *lq_t, *lk_t;    // (dim, width)
  const float *core, *core_t;  // (marks, width), (marks, width) transposed
  const float* half;           // (width,): s_ll / 2; "mass" only
  const float* decay;          // (kv_heads, marks), or null
  const bool* key_mask;        // (batch, tokens), true = takes part, or null
  const int32_t* bounds;       // (sequences + 1,) when packed (batch 1), or null
  int64_t sequences;           // rows of the states: batch, or the packed sequences
  const float *L0, *R0;        // (sequences, kv_heads, marks), (.., marks, v_dim), or null

  int64_t group() const { return heads / kv_heads; }
  int64_t parameter(int64_t b, int64_t h) const {
    return (batched_parameters ? b : 0) * kv_heads + h;
  }
};

struct NystromOutputs {
  void* out;     // (batch, heads, tokens, v_dim)
  float *L, *R;  // final states
};

struct NystromGradients {
  const void* dout;
  Strides dout_strides;
  const float *dL, *dR;          // of the final states, contiguous, or null
  void *dquery, *dkey, *dvalue;  // contiguous
  // float32 sums of one (bundle of parts, kv_head) each, see parts.h: zeros on entry
  float *dlq, *dlk, *dcore, *dhalf;  // (.., marks, dim) twice, (.., marks, width), (.., width)
  double* ddecay;                    // (.., marks)
  float *dL0, *dR0;                  // as L0 and R0, or null
};

template <typename T>
void nystrom_forward(const NystromProblem& p, const NystromOutputs& to);

template <typename T>
void nystrom_backward(const NystromProblem& p, const NystromGradients& x);

}  // namespace flashmark
