// Hybrid attention: from tensors to the kernels' problem.
#include "hybrid/hybrid.h"

#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "hybrid/totals.h"
#include "shared/arguments.h"
#include "shared/pack.h"

namespace flashmark {
namespace {

class PreparedHybrid {
 public:
  explicit PreparedHybrid(const HybridCall& a) {
    HybridProblem& p = problem;
    for (const Tensor* t : {&a.query, &a.key, &a.value})
      TORCH_CHECK(t->dim() == 4 && t->device().is_cpu() &&
                      t->scalar_type() == a.query.scalar_type() &&
                      (t->stride(3) == 1 || t->size(3) == 1),
                  "query, key, value: expected 4-D CPU tensors of one dtype with stride 1 in the "
                  "last dimension");
    p.batch = a.query.size(0), p.heads = a.query.size(1), p.tokens = a.query.size(2),
    p.dim = a.query.size(3);
    p.kv_heads = a.key.size(1), p.v_dim = a.value.size(3), p.marks = a.landmark_queries.size(-2);
    TORCH_CHECK(a.key.size(0) == p.batch && a.value.size(0) == p.batch &&
                    a.value.size(1) == p.kv_heads && a.key.size(2) == p.tokens &&
                    a.value.size(2) == p.tokens && a.key.size(3) == p.dim && p.kv_heads > 0 &&
                    p.heads % p.kv_heads == 0,
                "key, value: expected as many tokens as query, and heads that divide those of query");
    TORCH_CHECK(p.dim <= 256 && p.v_dim <= 256 && p.marks <= 256 && a.window >= 1,
                "query, value, landmarks, window: expected at most 256 dimensions and landmarks, "
                "and a window of at least 1");
    p.merge = a.merge == "slots" ? Merge::SLOTS : a.merge == "mass" ? Merge::MASS : Merge::GATE;
    p.window = a.window;
    p.scale = static_cast<float>(a.scale);
    p.query = a.query.const_data_ptr(), p.key = a.key.const_data_ptr(),
    p.value = a.value.const_data_ptr();
    p.query_strides = strides_of(a.query), p.key_strides = strides_of(a.key),
    p.value_strides = strides_of(a.value);
    p.batched_parameters = a.landmark_queries.dim() == 4 || (a.core && a.core->dim() == 4);
    p.lq = parameters(a.landmark_queries);
    p.lk = a.landmark_keys.is_same(a.landmark_queries) ? p.lq : parameters(a.landmark_keys);
    if (p.merge != Merge::SLOTS) {
      p.core = parameters(*a.core);
      const bool tiles = std::min(p.window, p.tokens) * p.group() > FEW;
      if (tiles) p.core_t = parameters(a.core->transpose(-1, -2));
    }
    if (a.gate) {
      const Tensor& gate = keep(
          a.gate->to(at::kFloat).expand({p.batch, p.heads, p.tokens, 1}));
      p.gate = gate.const_data_ptr<float>();
      for (int n = 0; n < 3; n++) p.gate_strides[n] = gate.stride(n);
    }
    if (a.key_mask)
      p.key_mask =
          keep(a.key_mask->expand({p.batch, p.tokens}).contiguous()).const_data_ptr<bool>();
    if (a.position)
      p.before = view({*a.position, *a.keep, *a.held_keys, *a.held_values, *a.far_counts,
                       a.far_keys.value_or(Tensor()), *a.far_values});
    cut_streams(a);
  }

  std::vector<Tensor> empty_state(const HybridCall& a) const {
    const HybridProblem& p = problem;
    const int64_t rows = static_cast<int64_t>(p.streams.size()), held = 2 * p.window;
    const auto options = a.key.options();
    const auto wide = options.dtype(at::kFloat);
    return {at::empty({rows}, options.dtype(at::kLong)),
            at::empty({rows, held}, options.dtype(at::kBool)),
            at::empty({rows, p.kv_heads, held, p.dim}, options),
            at::empty({rows, p.kv_heads, held, p.v_dim}, options),
            at::empty({rows, p.kv_heads, 3, p.marks}, wide),
            p.merge == Merge::SLOTS ? at::empty({rows, p.kv_heads, 3, p.marks, p.dim}, wide)
                                    : Tensor(),
            at::empty({rows, p.kv_heads, 3, p.marks, p.v_dim}, wide)};
  }

  HybridStateView view(const std::vector<Tensor>& state) const {
    for (const Tensor& t : state)
      TORCH_CHECK(!t.defined() || t.is_contiguous(), "state: expected dense tensors");
    return {state[0].mutable_data_ptr<int64_t>(),
            state[1].mutable_data_ptr<bool>(),
            state[2].mutable_data_ptr(),
            state[3].mutable_data_ptr(),
            state[4].mutable_data_ptr<float>(),
            problem.merge == Merge::SLOTS ? state[5].mutable_data_ptr<float>() : nullptr,
            state[6].mutable_data_ptr<float>()};
  }

  HybridProblem problem{};

 private:
  const Tensor& keep(Tensor t) {
    kept_.push_back(std::move(t));
    return kept_.back();
  }

  const float* parameters(const Tensor& t) {
    Tensor wide = t.to(at::kFloat);
    if (problem.batched_parameters && t.dim() == 3)
      wide = wide.expand({problem.batch, t.size(0), t.size(1), t.size(2)});
    return keep(wide.contiguous()).const_data_ptr<float>();
  }

  void cut_streams(const HybridCall& a) {
    HybridProblem& p = problem;
    const auto add = [&](int64_t b, int64_t first, int64_t tokens) {
      const int64_t row = static_cast<int64_t>(p.streams.size());
      Stream s{row, b, first, tokens, p.before ? p.before.position[row] : 0, 0, 0};
      const int64_t inside = s.position % p.window;
      s.chunks = tokens == 0 ? 0 : (inside + tokens - 1) / p.window + 1;
      s.entered = (inside + tokens) / p.window;
      p.most_near = std::max(
          p.most_near, std::min(2 * p.window, tokens + (p.before ? inside + p.window : 0)));
      p.streams.push_back(s);
    };
    if (!a.cu_seqlens) {
      for (int64_t b = 0; b < p.batch; b++) add(b, 0, p.tokens);
      return;
    }
    const Tensor bounds = a.cu_seqlens->to(at::kInt).contiguous();
    const int32_t* at = bounds.const_data_ptr<int32_t>();
    for (int64_t n = 0; n + 1 < bounds.numel(); n++) add(0, at[n], at[n + 1] - at[n]);
  }

  std::vector<Tensor> kept_;
};

Tensor run(const PreparedHybrid& prepared, const HybridCall& a) {
  const HybridProblem& p = prepared.problem;
  const Tensor out = at::empty({p.batch, p.heads, p.tokens, p.v_dim}, a.query.options());
  void* to = out.mutable_data_ptr();
  switch (a.query.scalar_type()) {
    case at::kFloat: hybrid_forward<float>(p, to); break;
    case at::kHalf: hybrid_forward<Half>(p, to); break;
    case at::kBFloat16: hybrid_forward<BFloat16>(p, to); break;
    default:
      TORCH_CHECK(false, "query: expected float32, bfloat16 or float16, got ",
                  a.query.scalar_type());
  }
  return out;
}

// out, then with `return_state` the new state.
std::vector<Tensor> forward(const HybridCall& a) {
  PreparedHybrid prepared(a);
  std::vector<Tensor> state;
  if (a.return_state) {
    state = prepared.empty_state(a);
    prepared.problem.after = prepared.view(state);
  }
  std::vector<Tensor> results = {run(prepared, a)};
  for (Tensor& t : state)
    if (t.defined()) results.push_back(std::move(t));
  return results;
}

// The operators, boxed.
const c10::DispatchKeySet AUTOCAST(c10::DispatchKey::AutocastCPU);  // dtypes are chosen already

void hybrid_forward_op(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard guard(AUTOCAST);
  const size_t count = op.schema().arguments().size();
  Arguments arguments(*stack, count);
  std::vector<Tensor> results = forward(HybridCall(arguments));
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, std::move(results));
}

// The state of the call moves on in place.
void hybrid_update_op(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard guard(AUTOCAST);
  const size_t count = op.schema().arguments().size();
  Arguments arguments(*stack, count);
  const HybridCall call(arguments);
  PreparedHybrid prepared(call);
  prepared.problem.after = prepared.problem.before;
  Tensor out = run(prepared, call);
  for (const OptionalTensor* t : {&call.position, &call.keep, &call.held_keys, &call.held_values,
                                  &call.far_counts, &call.far_keys, &call.far_values})
    if (*t && !(*t)->is_inference())  // so that autograd sees that they changed
      (*t)->unsafeGetTensorImpl()->bump_version();
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, std::move(out));
}

}  // namespace

TORCH_LIBRARY_IMPL(flashmark, CPU, m) {
  m.impl("hybrid_forward.cpu", torch::CppFunction::makeFromBoxedFunction<&hybrid_forward_op>());
  m.impl("hybrid_update.cpu", torch::CppFunction::makeFromBoxedFunction<&hybrid_update_op>());
}

}  // namespace flashmark
