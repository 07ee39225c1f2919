// Schemas of the CPU kernels. flashmark.cpu calls them; they are not differentiable by themselves.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "nystrom/nystrom.h"

namespace flashmark {
namespace {

std::tuple<Tensor, Tensor, Tensor> nystrom_forward_op(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& lq, const Tensor& lk,
    const Tensor& core, const OptionalTensor& half, const OptionalTensor& decay,
    const OptionalTensor& key_mask, const OptionalTensor& cu_seqlens, const OptionalTensor& L0,
    const OptionalTensor& R0) {
  return nystrom_forward(
      {query, key, value, lq, lk, core, half, decay, key_mask, cu_seqlens, L0, R0});
}

std::vector<Tensor> nystrom_backward_op(
    const Tensor& dout, const OptionalTensor& dL, const OptionalTensor& dR, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& lq, const Tensor& lk, const Tensor& core,
    const OptionalTensor& half, const OptionalTensor& decay, const OptionalTensor& key_mask,
    const OptionalTensor& cu_seqlens, const OptionalTensor& L0, const OptionalTensor& R0) {
  return nystrom_backward(
      {query, key, value, lq, lk, core, half, decay, key_mask, cu_seqlens, L0, R0}, dout, dL, dR);
}

TORCH_LIBRARY_FRAGMENT(flashmark_cpu, m) {
  m.def(
      "nystrom_forward(Tensor query, Tensor key, Tensor value, Tensor lq, Tensor lk, Tensor core, "
      "Tensor? half, "
      "Tensor? decay, Tensor? key_mask, Tensor? cu_seqlens, Tensor? L0, Tensor? R0) -> (Tensor "
      "out, Tensor L, Tensor "
      "R)");
  m.def(
      "nystrom_backward(Tensor dout, Tensor? dL, Tensor? dR, Tensor query, Tensor key, Tensor "
      "value, Tensor lq, "
      "Tensor lk, Tensor core, Tensor? half, Tensor? decay, Tensor? key_mask, Tensor? cu_seqlens, "
      "Tensor? L0, "
      "Tensor? R0) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(flashmark_cpu, CPU, m) {
  m.impl("nystrom_forward", &nystrom_forward_op);
  m.impl("nystrom_backward", &nystrom_backward_op);
}

}  // namespace
}  // namespace flashmark
