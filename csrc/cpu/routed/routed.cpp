// The operators' bodies: allocate, choose the types, call the kernels.
#include <ATen/Functions.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "routed/problem.h"
#include "shared/arguments.h"
#include "shared/gradients.h"
#include "shared/pack.h"

namespace flashmark {
namespace {

// The fields of flashmark.routed.call.Call, read in their order.
struct RoutedCall {
  explicit RoutedCall(Arguments& arguments) : from(arguments) {}

  Arguments& from;
  const Tensor &query = from.tensor(), &key = from.tensor(), &value = from.tensor(),
               &indices = from.tensor();
  const int64_t block_size = from.integer(), near = from.integer();
  const double scale = from.number();
  const OptionalTensor sinks = from.optional_tensor(), query_offset = from.optional_tensor(),
                       kv_lengths = from.optional_tensor(), key_mask = from.optional_tensor(),
                       starts = from.optional_tensor();
  const double softcap = from.number();
  const bool deterministic = from.boolean();  // sums run in a fixed order either way

  bool empty() const { return query.numel() == 0 || key.numel() == 0; }
};

// The fields of flashmark.routed.choice.Choice, read in their order.
struct ChoiceCall {
  explicit ChoiceCall(Arguments& arguments) : from(arguments) {}

  Arguments& from;
  const Tensor &query = from.tensor(), &keys = from.tensor(), &log_counts = from.tensor();
  const int64_t top_k = from.integer(), block_size = from.integer(), near = from.integer();
  const double scale = from.number();
  const int64_t kv_len = from.integer();
  const OptionalTensor query_offset = from.optional_tensor(), starts = from.optional_tensor(),
                       base = from.optional_tensor();
};

// A problem, and the tensors it points into.
class Prepared {
 protected:
  const Tensor& keep(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }
  const int32_t* integers(const OptionalTensor& t) {
    return t ? keep(t->to(at::kInt).contiguous()).const_data_ptr<int32_t>() : nullptr;
  }

  BlockPlaces places(const Tensor& query, int64_t kv_len, int64_t block_size, int64_t near,
                     const OptionalTensor& query_offset, const OptionalTensor& starts) {
    const int64_t q_len = query.size(2), offsets = query_offset ? query_offset->numel() : 1;
    TORCH_CHECK(query.dim() == 4 && query.device().is_cpu() &&
                    (query.stride(3) == 1 || query.size(3) == 1),
                "query: expected a 4-D CPU tensor with stride 1 in the last dimension");
    TORCH_CHECK(block_size >= 1 && near >= 0, "block_size, near: expected at least 1 and 0, got ",
                block_size, " and ", near);
    TORCH_CHECK(offsets == 1 || offsets == query.size(0),
                "query_offset: expected one or one a sample, got ", offsets);
    TORCH_CHECK(!starts || starts->numel() == kv_len, "starts: expected one a key");
    return {kv_len, block_size, near, integers(query_offset), offsets > 1 ? 1 : 0, kv_len - q_len,
            integers(starts)};
  }

 private:
  std::vector<Tensor> kept_;
};

class PreparedRouted : Prepared {
 public:
  explicit PreparedRouted(const RoutedCall& a) {
    RoutedProblem& p = problem;
    for (const Tensor* t : {&a.query, &a.key, &a.value})
      TORCH_CHECK(t->dim() == 4 && t->device().is_cpu() &&
                      t->scalar_type() == a.query.scalar_type() &&
                      (t->stride(3) == 1 || t->size(3) == 1),
                  "query, key, value: expected 4-D CPU tensors of one dtype with stride 1 in the "
                  "last dimension");
    p.batch = a.query.size(0), p.heads = a.query.size(1), p.q_len = a.query.size(2),
    p.dim = a.query.size(3);
    p.kv_heads = a.key.size(1), p.kv_len = a.key.size(2), p.v_dim = a.value.size(3);
    TORCH_CHECK(a.key.size(0) == p.batch && a.value.size(0) == p.batch &&
                    a.value.size(1) == p.kv_heads && a.value.size(2) == p.kv_len &&
                    a.key.size(3) == p.dim && p.kv_heads > 0 && p.heads % p.kv_heads == 0,
                "key, value: expected shapes (B, Hkv, Nk, D) and (B, Hkv, Nk, Dv) that fit query");
    TORCH_CHECK(p.dim <= 256 && p.v_dim <= 256,
                "query, value: expected head dimensions up to 256, got ", p.dim, " and ", p.v_dim);
    TORCH_CHECK(a.indices.dim() == 4 && a.indices.scalar_type() == at::kInt &&
                    a.indices.size(0) == p.batch && a.indices.size(1) == p.kv_heads &&
                    a.indices.size(2) == p.q_len,
                "indices: expected int32 of shape (B, Hkv, Nq, K)");
    p.query = a.query.const_data_ptr(), p.key = a.key.const_data_ptr(),
    p.value = a.value.const_data_ptr();
    p.query_strides = strides_of(a.query), p.key_strides = strides_of(a.key),
    p.value_strides = strides_of(a.value);
    p.scale = static_cast<float>(a.scale), p.softcap = static_cast<float>(a.softcap);
    p.indices = keep(a.indices.contiguous()).const_data_ptr<int32_t>();
    p.choices = a.indices.size(3);
    p.places = places(a.query, p.kv_len, a.block_size, a.near, a.query_offset, a.starts);
    p.kv_lengths = integers(a.kv_lengths);
    TORCH_CHECK(!a.kv_lengths || a.kv_lengths->numel() == p.batch,
                "kv_lengths: expected one a sample");
    if (a.key_mask)
      p.key_mask = keep(a.key_mask->expand({p.batch, p.kv_len}).contiguous()).const_data_ptr<bool>();
    if (a.sinks) p.sinks = keep(a.sinks->to(at::kFloat).contiguous()).const_data_ptr<float>();
    p.blocks = (p.kv_len + a.block_size - 1) / a.block_size;
    if (a.starts) number_blocks();
  }

  RoutedProblem problem{};

 private:
  void number_blocks() {
    RoutedProblem& p = problem;
    number_.resize(p.kv_len);
    for (int64_t t = 0; t < p.kv_len; t++) {
      const int64_t inside = t - p.places.starts[t];
      TORCH_CHECK(p.places.starts[t] >= 0 && inside >= 0 && (t > 0 || inside == 0),
                  "starts: expected the first token of each token's sequence");
      if (inside % p.places.block_size == 0) openings_.push_back(static_cast<int32_t>(t));
      number_[t] = static_cast<int32_t>(openings_.size()) - 1;
    }
    p.blocks = static_cast<int64_t>(openings_.size());
    openings_.push_back(static_cast<int32_t>(p.kv_len));
    p.number = number_.data(), p.openings = openings_.data();
  }

  std::vector<int32_t> number_, openings_;
};

class PreparedChoice : Prepared {
 public:
  PreparedChoice(const ChoiceCall& a, const Tensor& found) {
    ChoiceProblem& p = problem;
    p.places = places(a.query, a.kv_len, a.block_size, a.near, a.query_offset, a.starts);
    p.batch = a.query.size(0), p.heads = a.query.size(1), p.q_len = a.query.size(2),
    p.dim = a.query.size(3);
    TORCH_CHECK(a.keys.dim() == 5 && a.keys.size(0) == p.batch && a.keys.size(4) == p.dim &&
                    a.keys.scalar_type() == at::kFloat &&
                    a.log_counts.scalar_type() == at::kFloat &&
                    a.log_counts.sizes() == a.keys.sizes().slice(0, 4),
                "keys, log_counts: expected float32 (B, Hkv, C, M, D) and (B, Hkv, C, M)");
    p.kv_heads = a.keys.size(1), p.blocks = a.keys.size(2), p.marks = a.keys.size(3);
    TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0 && p.marks > 0,
                "keys: expected heads that divide those of query, and a landmark");
    TORCH_CHECK(!a.base || (a.base->scalar_type() == at::kLong && a.base->numel() == a.kv_len),
                "base: expected int64, one a key");
    p.best = found.size(3);
    p.query = a.query.const_data_ptr(), p.query_strides = strides_of(a.query);
    p.keys = keep(a.keys.contiguous()).const_data_ptr<float>();
    p.log_counts = keep(a.log_counts.contiguous()).const_data_ptr<float>();
    p.base = a.base ? keep(a.base->contiguous()).const_data_ptr<int64_t>() : nullptr;
    p.scale = static_cast<float>(a.scale);
    p.found = found.mutable_data_ptr<int32_t>();
  }

  ChoiceProblem problem{};
};

template <typename F>
void with_types(at::ScalarType dtype, const F& f) {
  if (dtype == at::kFloat) return f(float{}, float{});
  if (dtype == at::kHalf) return f(Half{}, float{});
  TORCH_CHECK(dtype == at::kBFloat16, "query: expected float32, bfloat16 or float16, got ", dtype);
#if defined(CPU_CAPABILITY_AVX512)
  if (bfloat16_products()) return f(BFloat16{}, BFloat16{});
#endif
  return f(BFloat16{}, float{});
}

std::tuple<Tensor, Tensor> forward(const RoutedCall& a) {
  const int64_t batch = a.query.size(0), heads = a.query.size(1), q_len = a.query.size(2);
  if (a.empty()) {  // rows of zeros, whose denominator is a sink or nothing
    const Tensor lse = at::full({batch, heads, q_len}, -INFINITY, at::kFloat);
    if (a.sinks) lse.copy_(a.sinks->unsqueeze(1));
    return {at::zeros({batch, heads, q_len, a.value.size(3)}, a.query.options()), lse};
  }
  const PreparedRouted prepared(a);
  const Tensor out = at::empty({batch, heads, q_len, a.value.size(3)}, a.query.options());
  const Tensor lse = at::empty({batch, heads, q_len}, at::kFloat);
  const ForwardOutputs to{out.mutable_data_ptr(), lse.mutable_data_ptr<float>(), nullptr, nullptr,
                          nullptr};
  with_types(a.query.scalar_type(), [&](auto t, auto c) {
    block_topk_forward<decltype(t), decltype(c)>(prepared.problem, to);
  });
  return {out, lse};
}

std::array<Tensor, 4> backward(const RoutedCall& a, const Tensor& dout, const OptionalTensor& dlse,
                               const Tensor& out, const Tensor& lse) {
  if (a.empty()) {  // only the sinks reach such an lse
    Tensor dsinks;
    if (a.sinks)
      dsinks = dlse ? dlse->sum(at::IntArrayRef({0, 2})).to(a.sinks->scalar_type())
                    : at::zeros_like(*a.sinks);
    return {at::zeros_like(a.query), at::zeros_like(a.key), at::zeros_like(a.value), dsinks};
  }
  const PreparedRouted prepared(a);
  const RoutedProblem& p = prepared.problem;
  const Gradients found(p, a.query, a.key, a.sinks, dout, dlse, out, lse);
  BackwardRows x{};
  found.fill(x);
  with_types(a.query.scalar_type(), [&](auto t, auto c) {
    block_topk_backward<decltype(t), decltype(c)>(p, x);
  });
  return {found.dquery, found.dkey, found.dvalue, found.dsinks(a.sinks)};
}

Tensor choose(const ChoiceCall& a) {
  const Tensor found =
      at::empty({a.log_counts.size(0), a.log_counts.size(1), a.query.size(2),
                 std::min(a.top_k, a.log_counts.size(2))},
                a.query.options().dtype(at::kInt));
  if (found.numel() == 0) return found;
  const PreparedChoice prepared(a, found);
  with_types(a.query.scalar_type(),
             [&](auto t, auto) { choose_blocks<decltype(t)>(prepared.problem); });
  return found;
}

// The operators, boxed: gradients of the outputs and outputs come before a call.
const c10::DispatchKeySet AUTOCAST(c10::DispatchKey::AutocastCPU);  // dtypes are chosen already

void block_topk_forward_op(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard guard(AUTOCAST);
  const size_t count = op.schema().arguments().size();
  Arguments arguments(*stack, count);
  auto [out, lse] = forward(RoutedCall(arguments));
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, std::move(out), std::move(lse));
}

void block_topk_backward_op(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard guard(AUTOCAST);
  const size_t count = op.schema().arguments().size();
  Arguments arguments(*stack, count);
  const Tensor& dout = arguments.tensor();
  const OptionalTensor dlse = arguments.optional_tensor();
  const Tensor &out = arguments.tensor(), &lse = arguments.tensor();
  const RoutedCall call(arguments);
  std::array<Tensor, 4> grads = backward(call, dout, dlse, out, lse);
  for (Tensor& grad : grads)
    if (!grad.defined()) grad = at::empty({0}, call.query.options());
  torch::jit::drop(*stack, count);
  for (Tensor& grad : grads) torch::jit::push(*stack, std::move(grad));
}

void choose_blocks_op(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard guard(AUTOCAST);
  const size_t count = op.schema().arguments().size();
  Arguments arguments(*stack, count);
  Tensor found = choose(ChoiceCall(arguments));
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, std::move(found));
}

}  // namespace

TORCH_LIBRARY_IMPL(flashmark, CPU, m) {
  m.impl("block_topk_forward.cpu",
         torch::CppFunction::makeFromBoxedFunction<&block_topk_forward_op>());
  m.impl("block_topk_backward.cpu",
         torch::CppFunction::makeFromBoxedFunction<&block_topk_backward_op>());
  m.impl("choose_blocks.cpu", torch::CppFunction::makeFromBoxedFunction<&choose_blocks_op>());
}

}  // namespace flashmark
