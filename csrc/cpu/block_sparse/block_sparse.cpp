// The operators' bodies: allocate, choose the types, call the kernels.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <array>
#include <cmath>

#include "block_sparse/kernels.h"
#include "block_sparse/segments.h"
#include "shared/arguments.h"
#include "shared/gradients.h"
#include "shared/pack.h"

namespace flashmark {
namespace {

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

Tensor nothing(at::ScalarType dtype) {  // at::empty({0}), without the dispatcher
  return Tensor(at::detail::empty_cpu({0}, dtype));
}

template <typename C>
Tensor workspace(int64_t n) {
  constexpr at::ScalarType dtype = c10::CppTypeToScalarType<C>::value;
  return n == 0 ? nothing(dtype) : at::empty({n}, dtype);
}

// No query, or no key: rows of zeros, whose denominator is a sink or nothing.
std::tuple<Tensor, Tensor, Tensor> forward_of_nothing(const BlockSparseCall& a) {
  const int64_t batch = a.query.size(0), heads = a.query.size(1), q_len = a.query.size(2);
  const Tensor out = at::zeros({batch, heads, q_len, a.value.size(3)}, a.query.options());
  const Tensor lse = at::full({batch, heads, q_len}, -INFINITY, at::kFloat);
  if (a.sinks) lse.copy_(a.sinks->unsqueeze(1));
  return {out, lse, a.bias ? at::zeros_like(lse) : nothing(at::kFloat)};
}

// Only the sinks reach such an lse.
std::array<Tensor, 5> gradients_of_nothing(const BlockSparseCall& a, const OptionalTensor& dlse) {
  Tensor dsinks;
  if (a.sinks)
    dsinks = dlse ? dlse->sum(at::IntArrayRef({0, 2})).to(a.sinks->scalar_type()) : at::zeros_like(*a.sinks);
  return {at::zeros_like(a.query), at::zeros_like(a.key), at::zeros_like(a.value),
          a.bias ? at::zeros_like(*a.bias) : Tensor(), dsinks};
}

std::tuple<Tensor, Tensor, Tensor> forward(const BlockSparseCall& a) {
  if (a.query.numel() == 0 || a.key.numel() == 0) return forward_of_nothing(a);
  const PreparedProblem prepared(a);
  const Problem& p = prepared.problem;
  const Tensor out = at::empty({p.batch, p.heads, p.q_len, p.v_dim}, a.query.options());
  const Tensor lse = at::empty({p.batch, p.heads, p.q_len}, at::kFloat);
  const Tensor residual = a.bias ? at::empty_like(lse) : nothing(at::kFloat);
  with_types(a.query.scalar_type(), [&](auto t, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    const int64_t blocks = (p.kv_len + VALUE_BLOCK - 1) / VALUE_BLOCK;
    const int64_t pairs =
        p.tile_q > 16 ? p.batch * p.kv_heads : 0;  // narrow tiles read K and V in place
    const Tensor value_t = workspace<C>(pairs * blocks * p.v_dim * VALUE_BLOCK);
    const bool direct = std::is_same_v<T, C> && padded<C>(p.dim) == p.dim;
    const Tensor key_rows = workspace<C>(direct ? 0 : pairs * p.kv_len * padded<C>(p.dim));
    block_sparse_forward<T, C>(
        p, {out.mutable_data_ptr(), lse.mutable_data_ptr<float>(),
            a.bias ? residual.mutable_data_ptr<float>() : nullptr, value_t.mutable_data_ptr(),
            direct ? nullptr : key_rows.mutable_data_ptr()});
  });
  return {out, lse, residual};
}

// Sums the leading dimension in order.
Tensor sum_in_order(const Tensor& parts) {
  Tensor sum = parts.select(0, 0);
  for (int64_t n = 1; n < parts.size(0); n++) sum = at::add(sum, parts.select(0, n));
  return sum;
}

// float32 sums of the bias gradient, as the kernels add them up, and the way back to the bias's
// shape.
class BiasGradient {
 public:
  BiasGradient(const Problem& p, const OptionalTensor& bias, BackwardTensors& x)
      : p_(p), bias_(bias) {
    if (!bias) return;
    if (bias->dim() == 2) {
      parts_ = at::zeros({p.batch * x.segments, p.heads, p.relative_size + p.tile_q}, at::kFloat);
      x.drelative = parts_.mutable_data_ptr<float>();
      return;
    }
    // Segments differ in their keys: only a bias without keys needs one part each.
    std::vector<int64_t> sizes = {bias->size(3) == 1 ? x.segments : 1};
    for (int64_t n = 0; n < 4; n++) sizes.push_back(bias->size(n));
    parts_ = at::zeros(sizes, at::kFloat);
    x.ddense = parts_.mutable_data_ptr<float>();
    for (int64_t n = 0; n < 5; n++) x.ddense_strides[n] = sizes[n] == 1 ? 0 : parts_.stride(n);
  }

  Tensor result() const {
    if (!bias_) return {};
    if (parts_.size(0) == 0) return at::zeros(bias_->sizes(), bias_->options());
    const Tensor sum = sum_in_order(parts_);
    if (bias_->dim() != 2) return sum.to(bias_->scalar_type());
    return sum.narrow(1, 0, p_.relative_size).flip(1).to(bias_->scalar_type());
  }

 private:
  const Problem& p_;
  const OptionalTensor& bias_;
  Tensor parts_;
};

std::array<Tensor, 5> backward(const BlockSparseCall& a, const Tensor& dout,
                               const OptionalTensor& dlse, const Tensor& out, const Tensor& lse,
                               const Tensor& residual_any) {
  if (a.query.numel() == 0 || a.key.numel() == 0)
    return gradients_of_nothing(a, dlse);
  const PreparedProblem prepared(a);
  const Problem& p = prepared.problem;
  const Gradients found(p, a.query, a.key, a.sinks, dout, dlse, out, lse);
  BackwardTensors x{};
  found.fill(x);
  const Tensor residual = residual_any.contiguous();
  x.residual = residual.numel() == found.lse.numel() ? residual.const_data_ptr<float>() : nullptr;
  x.one_batch = a.bias && a.bias->dim() == 4 && a.bias->size(0) == 1;
  x.one_head = a.bias && a.bias->dim() == 4 && a.bias->size(1) == 1;
  x.key_tile =
      p.mask.kind == MaskKind::SPARSE ? std::min<int64_t>(p.mask.block_kv, KEY_TILE) : KEY_TILE;
  const int64_t key_tiles = (p.kv_len + x.key_tile - 1) / x.key_tile;
  x.segments =
      count_segments((x.one_batch ? 1 : p.batch) * (x.one_head ? 1 : p.kv_heads), key_tiles);
  const std::vector<int32_t> starts = segment_starts(p, x.key_tile, x.segments);
  x.segment_starts = starts.data();
  const BiasGradient dbias(p, a.bias, x);

  with_types(a.query.scalar_type(), [&](auto t, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    const int64_t wanted = (ITEMS_A_THREAD * at::get_num_threads() + x.segments - 1) / x.segments;
    x.at_once = std::min(wanted, p.batch * p.kv_heads);
    const int64_t tiles = x.at_once * p.group() * p.max_tiles(), rows = tiles * p.tile_q;
    const int64_t copies = std::is_same_v<T, float> ? 0 : rows;
    const Tensor query_t = workspace<C>(rows * padded<C>(p.dim)),
                 dout_t = workspace<C>(rows * padded<C>(p.v_dim));
    const Tensor query_rows = workspace<C>(copies * p.dim),
                 dout_rows = workspace<C>(copies * p.v_dim);
    const int64_t all_rows = p.batch * p.heads * p.max_tiles() * p.tile_q;
    const Tensor row_lse = workspace<float>(all_rows), row_residual = workspace<float>(all_rows),
                 delta = workspace<float>(all_rows);
    const Tensor dquery_t = workspace<float>(x.segments * rows * p.dim);
    const Tensor touched = at::empty({x.segments * tiles}, at::kByte);
    x.query_t = query_t.mutable_data_ptr(), x.dout_t = dout_t.mutable_data_ptr();
    x.query_rows = query_rows.mutable_data_ptr(), x.dout_rows = dout_rows.mutable_data_ptr();
    x.row_lse = row_lse.mutable_data_ptr<float>(),
    x.row_residual = row_residual.mutable_data_ptr<float>(), x.delta = delta.mutable_data_ptr<float>();
    x.dquery_t = dquery_t.mutable_data_ptr<float>(),
    x.touched = touched.mutable_data_ptr<uint8_t>();
    block_sparse_backward<T, C>(p, x);
  });
  return {found.dquery, found.dkey, found.dvalue, dbias.result(), found.dsinks(a.sinks)};
}

// The operators, boxed: gradients of the outputs and outputs come before a call.
const c10::DispatchKeySet AUTOCAST(c10::DispatchKey::AutocastCPU);  // dtypes are chosen already

void block_sparse_forward_op(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard guard(AUTOCAST);
  const size_t count = op.schema().arguments().size();
  Arguments arguments(*stack, count);
  auto [out, lse, residual] = forward(BlockSparseCall(arguments));
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, std::move(out), std::move(lse), std::move(residual));
}

void block_sparse_backward_op(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard guard(AUTOCAST);
  const size_t count = op.schema().arguments().size();
  Arguments arguments(*stack, count);
  const Tensor& dout = arguments.tensor();
  const OptionalTensor dlse = arguments.optional_tensor();
  const Tensor &out = arguments.tensor(), &lse = arguments.tensor(),
               &residual = arguments.tensor();
  const BlockSparseCall call(arguments);
  std::array<Tensor, 5> grads = backward(call, dout, dlse, out, lse, residual);
  for (Tensor& grad : grads)
    if (!grad.defined()) grad = nothing(call.query.scalar_type());
  torch::jit::drop(*stack, count);
  for (Tensor& grad : grads) torch::jit::push(*stack, std::move(grad));
}

}  // namespace

TORCH_LIBRARY_IMPL(flashmark, CPU, m) {
  m.impl("block_sparse_forward.cpu",
         torch::CppFunction::makeFromBoxedFunction<&block_sparse_forward_op>());
  m.impl("block_sparse_backward.cpu",
         torch::CppFunction::makeFromBoxedFunction<&block_sparse_backward_op>());
}

}  // namespace flashmark
