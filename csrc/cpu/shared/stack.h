// Arguments of a boxed operator, read one after another in the order of its schema.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <optional>
#include <string>
#include <vector>

namespace flashmark {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

class Arguments {
 public:
  Arguments(torch::jit::Stack& stack, size_t count) : next_(&stack[stack.size() - count]) {}

  const Tensor& tensor() { return (next_++)->toTensor(); }
  OptionalTensor optional_tensor() { return (next_++)->toOptional<Tensor>(); }
  at::ArrayRef<c10::IValue> tensors() { return (next_++)->toListRef(); }
  std::vector<int64_t> integers() { return (next_++)->toIntVector(); }
  std::string string() { return (next_++)->toStringRef(); }
  double number() { return (next_++)->toDouble(); }
  int64_t integer() { return (next_++)->toInt(); }
  bool boolean() { return (next_++)->toBool(); }

 private:
  c10::IValue* next_;
};

}  // namespace flashmark
