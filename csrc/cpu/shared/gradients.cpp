#include "shared/gradients.h"

#include <ATen/ops/empty.h>

#include "shared/arguments.h"

namespace flashmark {
namespace {

Tensor rows_in_place(const Tensor& t, const Tensor& like) {
  const Tensor same = t.to(like.scalar_type());
  return same.stride(3) == 1 || same.size(3) == 1 ? same : same.contiguous();
}

}  // namespace

Gradients::Gradients(const Problem& p, const Tensor& query, const Tensor& key,
                     const OptionalTensor& sinks, const Tensor& dout, const OptionalTensor& dlse,
                     const Tensor& out, const Tensor& lse_any) {
  TORCH_CHECK(dout.sizes() == at::IntArrayRef({p.batch, p.heads, p.q_len, p.v_dim}) &&
                  out.sizes() == dout.sizes(),
              "dout, out: expected shape (B, Hq, Nq, Dv)");
  dout_ = rows_in_place(dout, query), out_ = rows_in_place(out, query);
  lse = lse_any.to(at::kFloat).contiguous();
  if (dlse) dlse_ = dlse->to(at::kFloat).contiguous();
  TORCH_CHECK(lse.numel() == p.batch * p.heads * p.q_len &&
                  (!dlse_.defined() || dlse_.sizes() == lse.sizes()),
              "lse, dlse: expected shape (B, Hq, Nq)");
  dquery = at::empty({p.batch, p.heads, p.q_len, p.dim}, query.options());
  dkey = at::empty({p.batch, p.kv_heads, p.kv_len, p.dim}, key.options());
  dvalue = at::empty({p.batch, p.kv_heads, p.kv_len, p.v_dim}, key.options());
  if (sinks) dsinks_ = at::empty({p.heads}, at::kFloat);
}

void Gradients::fill(BackwardRows& x) const {
  x.dout = dout_.const_data_ptr(), x.out = out_.const_data_ptr();
  x.dout_strides = strides_of(dout_), x.out_strides = strides_of(out_);
  x.lse = lse.const_data_ptr<float>();
  x.dlse = dlse_.defined() ? dlse_.const_data_ptr<float>() : nullptr;
  x.dquery = dquery.mutable_data_ptr(), x.dkey = dkey.mutable_data_ptr(),
  x.dvalue = dvalue.mutable_data_ptr();
  x.dsinks = dsinks_.defined() ? dsinks_.mutable_data_ptr<float>() : nullptr;
}

Tensor Gradients::dsinks(const OptionalTensor& sinks) const {
  return sinks ? dsinks_.to(sinks->scalar_type()) : Tensor();
}

}  // namespace flashmark
