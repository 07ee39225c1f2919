// Causal Nystrom attention: from tensors to the kernels' problem, and the sums of the parameters'
// gradients.
#include "nystrom/nystrom.h"

#include <ATen/Functions.h>

#include "nystrom/pieces.h"
#include "shared/vec_math.h"

namespace flashmark {
namespace {

class PreparedNystrom {
 public:
  explicit PreparedNystrom(const NystromArguments& a) {
    NystromProblem& p = problem;
    for (const Tensor* t : {&a.query, &a.key, &a.value})
      TORCH_CHECK(t->dim() == 4 && t->device().is_cpu() &&
                      t->scalar_type() == a.query.scalar_type() &&
                      (t->stride(3) == 1 || t->size(3) == 1),
                  "query, key, value: expected 4-D CPU tensors of one dtype with stride 1 in the "
                  "last dimension");
    p.batch = a.query.size(0), p.heads = a.query.size(1), p.tokens = a.query.size(2),
    p.dim = a.query.size(3);
    p.kv_heads = a.key.size(1), p.v_dim = a.value.size(3), p.marks = a.lq.size(2);
    TORCH_CHECK(
        a.key.size(2) == p.tokens && a.value.size(2) == p.tokens && p.heads % p.kv_heads == 0,
        "key, value: expected as many tokens as query, and heads that divide those of query");
    p.width = (p.marks + 15) / 16 * 16;
    p.mass = a.half.has_value();
    p.query = a.query.const_data_ptr(), p.key = a.key.const_data_ptr(),
    p.value = a.value.const_data_ptr();
    p.query_strides = strides_of(a.query), p.key_strides = strides_of(a.key),
    p.value_strides = strides_of(a.value);
    p.batched_parameters = a.lq.size(0) > 1 || a.core.size(0) > 1;
    const int64_t rows = p.batched_parameters ? p.batch : 1;
    const auto all = [&](const Tensor& t) {
      return t.to(at::kFloat).expand({rows, t.size(1), t.size(2), t.size(3)}).contiguous();
    };
    const Tensor lq = all(a.lq), lk = all(a.lk), core = all(a.core);
    p.lq = floats(lq), p.lk = floats(lk);
    p.lq_t = floats(padded(lq.transpose(2, 3))), p.lk_t = floats(padded(lk.transpose(2, 3)));
    p.core = floats(padded(core)), p.core_t = floats(padded(core.transpose(2, 3)));
    if (p.mass) p.half = floats(padded(a.half->to(at::kFloat).expand({rows, p.kv_heads, p.marks})));
    p.chunk = 64;
    if (a.decay) {
      const Tensor decay = a.decay->to(at::kFloat).contiguous();
      p.decay = floats(decay);
      const float largest = decay.numel() ? decay.max().item<float>() : 0.f;
      while (p.chunk > 16 && largest * static_cast<float>(p.chunk) > 32.f) p.chunk /= 2;
    }
    if (a.key_mask)
      p.key_mask =
          keep(a.key_mask->expand({p.batch, p.tokens}).contiguous()).const_data_ptr<bool>();
    p.sequences = p.batch;
    if (a.cu_seqlens) {
      const Tensor& bounds = keep(a.cu_seqlens->to(at::kInt).contiguous());
      p.bounds = bounds.const_data_ptr<int32_t>();
      p.sequences = bounds.numel() - 1;
    }
    if (a.L0)
      p.L0 = floats(a.L0->to(at::kFloat).contiguous()),
      p.R0 = floats(a.R0->to(at::kFloat).contiguous());
  }

  NystromProblem problem{};

 private:
  const Tensor& keep(Tensor t) {
    kept_.push_back(std::move(t));
    return kept_.back();
  }
  const float* floats(const Tensor& t) { return keep(t).const_data_ptr<float>(); }
  Tensor padded(const Tensor& t) const {  // the last dimension to whole vectors
    std::vector<int64_t> sizes = t.sizes().vec();
    sizes.back() = problem.width;
    const Tensor wide = at::zeros(sizes, at::kFloat);
    wide.narrow(-1, 0, t.size(-1)).copy_(t);
    return wide;
  }
  std::vector<Tensor> kept_;
};

template <typename F>
void with_dtype(at::ScalarType dtype, const F& f) {
  if (dtype == at::kFloat) return f(float{});
  if (dtype == at::kHalf) return f(c10::Half{});
  TORCH_CHECK(dtype == at::kBFloat16, "query: expected float32, bfloat16 or float16, got ", dtype);
  f(c10::BFloat16{});
}

// (batch * n, ...) -> (batch, ...): the n sums of a sample, in order.
Tensor sum_bundles(const Tensor& parts, int64_t batch) {
  if (parts.size(0) == batch) return parts;
  std::vector<int64_t> sizes = parts.sizes().vec();
  sizes[0] /= batch;
  sizes.insert(sizes.begin(), batch);
  const Tensor by_sample = parts.view(sizes);
  Tensor sum = by_sample.select(1, 0).clone();
  for (int64_t n = 1; n < sizes[1]; n++) sum.add_(by_sample.select(1, n));
  return sum;
}

const float* optional_floats(Tensor& t) {
  return t.defined() ? t.const_data_ptr<float>() : nullptr;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> nystrom_forward(const NystromArguments& a) {
  const PreparedNystrom prepared(a);
  const NystromProblem& p = prepared.problem;
  const Tensor out = at::empty({p.batch, p.heads, p.tokens, p.v_dim}, a.query.options());
  const Tensor L = at::empty({p.sequences, p.kv_heads, p.marks}, at::kFloat);
  const Tensor R = at::empty({p.sequences, p.kv_heads, p.marks, p.v_dim}, at::kFloat);
  with_dtype(a.query.scalar_type(), [&](auto t) {
    nystrom_forward<decltype(t)>(p,
                                 NystromOutputs{out.mutable_data_ptr(), L.mutable_data_ptr<float>(),
                                                R.mutable_data_ptr<float>()});
  });
  return {out, L, R};
}

std::vector<Tensor> nystrom_backward(const NystromArguments& a, const Tensor& dout_any,
                                     const OptionalTensor& dL_any, const OptionalTensor& dR_any) {
  const PreparedNystrom prepared(a);
  const NystromProblem& p = prepared.problem;
  Tensor dout = dout_any.to(a.query.scalar_type());
  if (dout.stride(3) != 1 && dout.size(3) != 1) dout = dout.contiguous();
  Tensor dL = dL_any ? dL_any->to(at::kFloat).contiguous() : Tensor();
  Tensor dR = dR_any ? dR_any->to(at::kFloat).contiguous() : Tensor();
  const auto zeros = [&](at::IntArrayRef sizes) { return at::zeros(sizes, at::kFloat); };
  const Tensor dquery = at::empty({p.batch, p.heads, p.tokens, p.dim}, a.query.options());
  const Tensor dkey = at::empty({p.batch, p.kv_heads, p.tokens, p.dim}, a.key.options());
  const Tensor dvalue = at::empty({p.batch, p.kv_heads, p.tokens, p.v_dim}, a.value.options());
  const int64_t bundles = static_cast<int64_t>(bundle_pieces(p, cut_pieces(p)).size()) - 1;
  const int64_t sums = std::max(p.batch, bundles);
  const Tensor dlq = zeros({sums, p.kv_heads, p.marks, p.dim}), dlk = at::zeros_like(dlq);
  const Tensor dcore = zeros({sums, p.kv_heads, p.marks, p.width});
  const Tensor dhalf = zeros({sums, p.kv_heads, p.width});
  const Tensor ddecay = at::zeros({sums, p.kv_heads, p.marks}, at::kDouble);
  const int64_t rows = a.L0 ? p.sequences : 0;
  const Tensor dL0 = at::empty({rows, p.kv_heads, p.marks}, at::kFloat);
  const Tensor dR0 = at::empty({rows, p.kv_heads, p.marks, p.v_dim}, at::kFloat);

  NystromGradients x{};
  x.dout = dout.const_data_ptr(), x.dout_strides = strides_of(dout);
  x.dL = optional_floats(dL), x.dR = optional_floats(dR);
  x.dquery = dquery.mutable_data_ptr(), x.dkey = dkey.mutable_data_ptr(),
  x.dvalue = dvalue.mutable_data_ptr();
  x.dlq = dlq.mutable_data_ptr<float>(), x.dlk = dlk.mutable_data_ptr<float>();
  x.dcore = dcore.mutable_data_ptr<float>(), x.dhalf = dhalf.mutable_data_ptr<float>();
  if (a.decay) x.ddecay = ddecay.mutable_data_ptr<double>();
  if (a.L0) x.dL0 = dL0.mutable_data_ptr<float>(), x.dR0 = dR0.mutable_data_ptr<float>();
  with_dtype(a.query.scalar_type(), [&](auto t) { nystrom_backward<decltype(t)>(p, x); });
  const auto total = [&](const Tensor& parts) { return sum_bundles(parts, p.batch); };
  return {dquery,
          dkey,
          dvalue,
          total(dlq),
          total(dlk),
          total(dcore).narrow(3, 0, p.marks),
          total(dhalf).narrow(2, 0, p.marks),
          total(ddecay),
          dL0,
          dR0};
}

}  // namespace flashmark
