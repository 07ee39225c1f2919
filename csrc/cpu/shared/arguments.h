// From the operator's tensors to a Problem. Keeps alive what the Problem points into.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "shared/problem.h"

namespace flashmark {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct AttentionArguments {
  const Tensor &query, &key, &value;
  at::TensorList mask_tensors;  // BlockMask.tensors(), or empty
  at::IntArrayRef mask_layout;  // BlockMask.layout
  std::string mask_kind;
  const OptionalTensor &bias, &sinks, &query_offset, &kv_lengths, &dropout_seed;
  double scale, softcap, dropout_p;
};

class PreparedProblem {
 public:
  explicit PreparedProblem(const AttentionArguments& arguments);
  Problem problem{};

 private:
  const Tensor& keep(Tensor tensor);
  void read_mask(const AttentionArguments& arguments);
  void read_bias(const AttentionArguments& arguments);
  std::vector<Tensor> kept_;
};

Strides strides_of(const Tensor& tensor);

// Whether brgemm takes bfloat16 here, at the machine's full speed; found out once.
bool bfloat16_products();

}  // namespace flashmark
