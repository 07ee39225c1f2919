// A call of hybrid attention: its arguments.
#pragma once
#include "shared/stack.h"

namespace flashmark {

// The fields of flashmark.hybrid.call.Call, read in their order.
struct HybridCall {
  explicit HybridCall(Arguments& arguments) : from(arguments) {}

  Arguments& from;
  const Tensor &query = from.tensor(), &key = from.tensor(), &value = from.tensor();
  const Tensor &landmark_queries = from.tensor(), &landmark_keys = from.tensor();
  const int64_t window = from.integer();
  const std::string merge = from.string();
  const double scale = from.number();
  const OptionalTensor core = from.optional_tensor(), gate = from.optional_tensor(),
                       key_mask = from.optional_tensor(), cu_seqlens = from.optional_tensor();
  // of flashmark.HybridState, all of them or none; far_keys for merge="slots" only
  const OptionalTensor position = from.optional_tensor(), keep = from.optional_tensor(),
                       held_keys = from.optional_tensor(), held_values = from.optional_tensor(),
                       far_counts = from.optional_tensor(), far_keys = from.optional_tensor(),
                       far_values = from.optional_tensor();
  const bool return_state = from.boolean();
};

}  // namespace flashmark
