// Tensors of a backward pass over rows of queries.
#pragma once
#include "shared/problem.h"
#include "shared/stack.h"

namespace flashmark {

// The outputs of a forward and their gradients, checked and in the types of the kernels, and empty
// gradients of its inputs.
class Gradients {
 public:
  Gradients(const Problem& p, const Tensor& query, const Tensor& key, const OptionalTensor& sinks,
            const Tensor& dout, const OptionalTensor& dlse, const Tensor& out, const Tensor& lse);

  // Sets the pointers of a kernel's arguments.
  void fill(BackwardRows& x) const;
  // Gradient of the sinks in their own type; undefined where there are none.
  Tensor dsinks(const OptionalTensor& sinks) const;

  Tensor dquery, dkey, dvalue, lse;

 private:
  Tensor dout_, out_, dlse_, dsinks_;
};

}  // namespace flashmark
