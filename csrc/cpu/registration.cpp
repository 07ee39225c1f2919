// Schemas of the CPU kernels. flashmark.cpu calls them; they are not differentiable by themselves.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "block_sparse/block_sparse.h"
#include "nystrom/nystrom.h"

namespace flashmark {
namespace {

std::tuple<Tensor, Tensor, Tensor> block_sparse_forward_op(
    const Tensor& query, const Tensor& key, const Tensor& value, at::TensorList mask_tensors,
    at::IntArrayRef mask_layout, c10::string_view mask_kind, const OptionalTensor& bias,
    const OptionalTensor& sinks, const OptionalTensor& query_offset,
    const OptionalTensor& kv_lengths, const OptionalTensor& dropout_seed, double scale,
    double softcap, double dropout_p) {
  return forward({query, key, value, mask_tensors, mask_layout, std::string(mask_kind), bias, sinks,
                  query_offset, kv_lengths, dropout_seed, scale, softcap, dropout_p});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> block_sparse_backward_op(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& lse, const Tensor& residual,
    at::TensorList mask_tensors,
    at::IntArrayRef mask_layout, c10::string_view mask_kind, const OptionalTensor& bias,
    const OptionalTensor& sinks, const OptionalTensor& query_offset,
    const OptionalTensor& kv_lengths, const OptionalTensor& dropout_seed, double scale,
    double softcap, double dropout_p) {
  auto [dquery, dkey, dvalue, dbias, dsinks] =
      backward({query, key, value, mask_tensors, mask_layout, std::string(mask_kind), bias, sinks,
                query_offset, kv_lengths, dropout_seed, scale, softcap, dropout_p},
               dout, dlse, out, lse, residual);
  const auto some = [&](const Tensor& t) {
    return t.defined() ? t : at::empty({0}, query.options());
  };
  return {dquery, dkey, dvalue, some(dbias), some(dsinks)};
}

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
      "block_sparse_forward(Tensor query, Tensor key, Tensor value, Tensor[] mask_tensors, int[] "
      "mask_layout, "
      "str mask_kind, Tensor? bias, Tensor? sinks, Tensor? query_offset, Tensor? kv_lengths, "
      "Tensor? dropout_seed, "
      "float scale, float softcap, float dropout_p) -> (Tensor out, Tensor lse, Tensor residual)");
  m.def(
      "block_sparse_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, "
      "Tensor out, "
      "Tensor lse, Tensor residual, Tensor[] mask_tensors, int[] mask_layout, str mask_kind, Tensor? bias, Tensor? "
      "sinks, "
      "Tensor? query_offset, Tensor? kv_lengths, Tensor? dropout_seed, float scale, float softcap, "
      "float dropout_p) "
      "-> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dbias, Tensor dsinks)");
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
  m.impl("block_sparse_forward", &block_sparse_forward_op);
  m.impl("block_sparse_backward", &block_sparse_backward_op);
  m.impl("nystrom_forward", &nystrom_forward_op);
  m.impl("nystrom_backward", &nystrom_backward_op);
}

}  // namespace
}  // namespace flashmark
