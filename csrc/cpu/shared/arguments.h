// A call of block-sparse attention: its arguments, and the Problem of its kernels.
#pragma once
#include "shared/problem.h"
#include "shared/stack.h"

namespace flashmark {

// The fields of flashmark.block_sparse.call.Call, read in their order.
struct BlockSparseCall {
  explicit BlockSparseCall(Arguments& arguments) : from(arguments) {}

  Arguments& from;
  const Tensor &query = from.tensor(), &key = from.tensor(), &value = from.tensor();
  const at::ArrayRef<c10::IValue> mask_tensors = from.tensors();  // BlockMask.tensors(), or empty
  const std::vector<int64_t> mask_layout = from.integers();
  const std::string mask_kind = from.string();
  const double scale = from.number();
  const OptionalTensor bias = from.optional_tensor(), sinks = from.optional_tensor(),
                       query_offset = from.optional_tensor(), kv_lengths = from.optional_tensor(),
                       dropout_seed = from.optional_tensor();
  const double softcap = from.number(), dropout_p = from.number();
  const bool deterministic = from.boolean();  // sums run in a fixed order either way
};

// A Problem, and the tensors it points into.
class PreparedProblem {
 public:
  explicit PreparedProblem(const BlockSparseCall& call);
  Problem problem{};

 private:
  const Tensor& keep(Tensor tensor);
  void read_mask(const BlockSparseCall& call);
  void read_bias(const BlockSparseCall& call);
  std::vector<Tensor> kept_;
};

Strides strides_of(const Tensor& tensor);

// Whether brgemm takes bfloat16 here, at the machine's full speed; tested once.
bool bfloat16_products();

}  // namespace flashmark
