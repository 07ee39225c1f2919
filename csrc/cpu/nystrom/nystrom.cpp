// The operators flashmark::nystrom_forward.cpu and nystrom_backward.cpu: from the arguments to what
// the kernels are given, and from their sums to the parameters' gradients.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "nystrom/parts.h"
#include "shared/arguments.h"
#include "shared/stack.h"
#include "shared/vec_math.h"

namespace flashmark {
namespace {

// The fields of flashmark.nystrom.call.Call, in order.
struct NystromCall {
  explicit NystromCall(Arguments& arguments) : from(arguments) {}

  Arguments& from;
  const Tensor &query = from.tensor(), &key = from.tensor(), &value = from.tensor();
  const Tensor &landmark_queries = from.tensor(), &landmark_keys = from.tensor();
  const Tensor& core = from.tensor();
  const double scale = from.number();
  const OptionalTensor decay = from.optional_tensor(), key_mask = from.optional_tensor(),
                       cu_seqlens = from.optional_tensor(), L0 = from.optional_tensor(),
                       R0 = from.optional_tensor();
  const bool mass = from.boolean(), is_causal = from.boolean();
};

bool fits(const Tensor& t, at::IntArrayRef sizes) {
  return t.device().is_cpu() && t.sizes() == sizes;
}

// What the kernels are given, and the memory that it points into.
class PreparedNystrom {
 public:
  PreparedNystrom(const NystromCall& a, bool backward) {
    NystromProblem& p = problem;
    for (const Tensor* t : {&a.query, &a.key, &a.value})
      TORCH_CHECK(t->dim() == 4 && t->device().is_cpu() &&
                      t->scalar_type() == a.query.scalar_type() &&
                      (t->stride(3) == 1 || t->size(3) == 1),
                  "query, key, value: expected 4-D CPU tensors of one dtype with stride 1 in the "
                  "last dimension");
    TORCH_CHECK(a.is_causal, "is_causal: expected True with backend='cpu', got False");
    p.batch = a.query.size(0), p.heads = a.query.size(1), p.tokens = a.query.size(2);
    p.dim = a.query.size(3), p.kv_heads = a.key.size(1), p.v_dim = a.value.size(3);
    p.marks = a.core.size(-1), p.width = (p.marks + 15) / 16 * 16, p.mass = a.mass;
    TORCH_CHECK(fits(a.key, {p.batch, p.kv_heads, p.tokens, p.dim}) &&
                    fits(a.value, {p.batch, p.kv_heads, p.tokens, p.v_dim}) && p.kv_heads > 0 &&
                    p.heads % p.kv_heads == 0,
                "key, value: expected as many tokens as query, and heads that divide those of "
                "query");
    p.query = a.query.const_data_ptr(), p.key = a.key.const_data_ptr();
    p.value = a.value.const_data_ptr();
    p.query_strides = strides_of(a.query), p.key_strides = strides_of(a.key);
    p.value_strides = strides_of(a.value);
    p.chunk = 64;
    if (a.decay) read_decay(*a.decay);
    if (a.key_mask) {
      TORCH_CHECK(fits(*a.key_mask, {p.batch, p.tokens}), "key_mask: expected shape (B, N)");
      p.key_mask = keep(a.key_mask->contiguous()).const_data_ptr<bool>();
    }
    p.sequences = p.batch;
    if (a.cu_seqlens) read_bounds(*a.cu_seqlens);
    if (a.L0) {
      TORCH_CHECK(a.R0 && fits(*a.L0, {p.sequences, p.kv_heads, p.marks}) &&
                      fits(*a.R0, {p.sequences, p.kv_heads, p.marks, p.v_dim}),
                  "L0, R0: expected shapes (rows, Hkv, M) and (rows, Hkv, M, Dv)");
      p.L0 = floats(*a.L0), p.R0 = floats(*a.R0);
    }
    read_parameters(a, backward);
  }

  NystromProblem problem{};

 private:
  const Tensor& keep(Tensor t) {
    kept_.push_back(std::move(t));
    return kept_.back();
  }

  const float* floats(const Tensor& t) {
    return keep(t.to(at::kFloat).contiguous()).const_data_ptr<float>();
  }

  void read_decay(const Tensor& decay) {
    NystromProblem& p = problem;
    TORCH_CHECK(fits(decay, {p.kv_heads, p.marks}), "decay: expected shape (Hkv, M)");
    p.decay = floats(decay);
    const float largest = *std::max_element(p.decay, p.decay + p.kv_heads * p.marks);
    while (p.chunk > 16 && largest * static_cast<float>(p.chunk) > 32.f) p.chunk /= 2;
  }

  void read_bounds(const Tensor& cu_seqlens) {
    NystromProblem& p = problem;
    const Tensor& bounds = keep(cu_seqlens.to(at::kInt).contiguous());
    p.bounds = bounds.const_data_ptr<int32_t>(), p.sequences = bounds.numel() - 1;
    bool rises = p.batch == 1 && p.sequences > 0 && p.bounds[0] == 0;
    for (int64_t s = 0; rises && s < p.sequences; s++) rises = p.bounds[s] <= p.bounds[s + 1];
    TORCH_CHECK(rises && p.bounds[p.sequences] == p.tokens,
                "cu_seqlens: expected to rise from 0 to ", p.tokens);
  }

  // Landmarks are scaled, and padded to `width` where they are columns. Only the backward reads
  // them as rows, and the core transposed.
  void read_parameters(const NystromCall& a, bool backward) {
    NystromProblem& p = problem;
    const auto samples = [](const Tensor& t) { return t.dim() == 4 ? t.size(0) : 1; };
    const int64_t with = std::max(samples(a.landmark_queries), samples(a.core));
    p.batched_parameters = with > 1;
    const int64_t rows = with * p.kv_heads, marks = p.marks, dim = p.dim, width = p.width;
    const auto read = [&](const Tensor& t, int64_t columns) {
      TORCH_CHECK((t.dim() == 3 || t.dim() == 4) && t.size(-3) == p.kv_heads &&
                      t.size(-2) == marks && t.size(-1) == columns &&
                      (samples(t) == 1 || samples(t) == p.batch),
                  "landmarks, core: expected shapes (Hkv, M, D) and (Hkv, M, M), or those of each "
                  "sample");
      return floats(t);
    };
    const float* queries = read(a.landmark_queries, dim);
    const float* keys = read(a.landmark_keys, dim);
    const float* core = read(a.core, marks);
    const bool tied = queries == keys;
    const auto row = [&](const Tensor& t, int64_t r) { return samples(t) == 1 ? r % p.kv_heads : r; };

    const int64_t turned = dim * width, square = marks * width, plain = backward ? marks * dim : 0;
    const int64_t size = (tied ? 1 : 2) * (turned + plain) + (backward ? 2 : 1) * square +
                         (p.mass ? width : 0);
    memory_.emplace(rows * size);
    float* to = *memory_;
    std::fill(to, to + rows * size, 0.f);
    const float scale = static_cast<float>(a.scale);
    const auto place = [&](int64_t n) { return std::exchange(to, to + rows * n); };
    const auto turn = [&](const float* from, const Tensor& t) {
      float* start = place(turned);
      for (int64_t r = 0; r < rows; r++) {
        float* out = start + r * turned;
        transpose_words(from + row(t, r) * marks * dim, dim, marks, dim, out, width);
        for (int64_t k = 0; k < turned; k++) out[k] *= scale;
      }
      return start;
    };
    const auto rescale = [&](const float* from, const Tensor& t) {
      float* start = place(plain);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < plain; k++)
          start[r * plain + k] = scale * from[row(t, r) * plain + k];
      return start;
    };
    p.lq_t = turn(queries, a.landmark_queries);
    p.lk_t = tied ? p.lq_t : turn(keys, a.landmark_keys);
    if (backward) {
      p.lq = rescale(queries, a.landmark_queries);
      p.lk = tied ? p.lq : rescale(keys, a.landmark_keys);
      p.core_t = place(square);
    }
    p.core = place(square);
    for (int64_t r = 0; r < rows; r++) {
      const float* from = core + row(a.core, r) * marks * marks;
      for (int64_t l = 0; l < marks; l++)
        std::copy_n(from + l * marks, marks, const_cast<float*>(p.core) + (r * marks + l) * width);
      if (backward)
        transpose_words(from, marks, marks, marks, const_cast<float*>(p.core_t) + r * square, width);
    }
    if (!p.mass) return;
    float* half = place(width);  // s_ll / 2
    for (int64_t r = 0; r < rows; r++)
      for (int64_t d = 0; d < dim; d++)
        for (int64_t l = 0; l < marks; l++)
          half[r * width + l] += 0.5f * p.lq_t[r * turned + d * width + l] *
                                 keys[(row(a.landmark_keys, r) * marks + l) * dim + d];
    p.half = half;
  }

  std::vector<Tensor> kept_;
  std::optional<Scratch<float>> memory_;
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

// A sum for each sample to the shape and dtype of the parameter, which samples may share.
Tensor gradient_of(const Tensor& parameter, Tensor by_sample) {
  if (parameter.dim() < by_sample.dim()) {
    const Tensor parts = by_sample;
    by_sample = at::zeros(parameter.sizes(), parts.options());
    for (int64_t b = 0; b < parts.size(0); b++) by_sample.add_(parts.select(0, b));
  }
  return by_sample.reshape(parameter.sizes()).to(parameter.scalar_type()).contiguous();
}

struct Guards {  // the operators are below autograd and autocast
  at::AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

// The output of a call, whose final states go to L and R: float32, contiguous.
Tensor forward(const NystromCall& a, const NystromProblem& p, const Tensor& L, const Tensor& R) {
  Tensor out = at::empty({p.batch, p.heads, p.tokens, p.v_dim}, a.query.options());
  TORCH_CHECK(fits(L, {p.sequences, p.kv_heads, p.marks}) &&
                  fits(R, {p.sequences, p.kv_heads, p.marks, p.v_dim}),
              "L, R: expected shapes (rows, Hkv, M) and (rows, Hkv, M, Dv)");
  with_dtype(a.query.scalar_type(), [&](auto t) {
    nystrom_forward<decltype(t)>(p,
                                 NystromOutputs{out.mutable_data_ptr(), L.mutable_data_ptr<float>(),
                                                R.mutable_data_ptr<float>()});
  });
  return out;
}

std::pair<Tensor, Tensor> new_states(const NystromCall& a, const NystromProblem& p) {
  const auto options = a.query.options().dtype(at::kFloat);
  return {at::empty({p.sequences, p.kv_heads, p.marks}, options),
          at::empty({p.sequences, p.kv_heads, p.marks, p.v_dim}, options)};
}

void forward_operator(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const Guards guards;
  const size_t count = handle.schema().arguments().size();
  Arguments arguments(*stack, count);
  const NystromCall a(arguments);
  const PreparedNystrom prepared(a, false);
  auto [L, R] = new_states(a, prepared.problem);
  Tensor out = forward(a, prepared.problem, L, R);
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, std::move(out), std::move(L), std::move(R));
}

// Whether the kernels may write a state there while they read the call. They read a row of the
// state `before` whole before they write it.
bool in_place(const Tensor& to, const OptionalTensor& before, const OptionalTensor& other,
              const NystromCall& a) {
  if (to.scalar_type() != at::kFloat || !to.is_contiguous()) return false;
  if (before && before->is_alias_of(to) && before->const_data_ptr() != to.const_data_ptr())
    return false;
  for (const OptionalTensor& t : {other, a.decay, a.key_mask, a.cu_seqlens})
    if (t && t->is_alias_of(to)) return false;
  return !a.query.is_alias_of(to) && !a.key.is_alias_of(to) && !a.value.is_alias_of(to);
}

// The final states overwrite the two tensors behind the call, which may be L0 and R0.
void update_operator(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const Guards guards;
  const size_t count = handle.schema().arguments().size();
  Arguments arguments(*stack, count);
  const NystromCall a(arguments);
  const Tensor &L_out = arguments.tensor(), &R_out = arguments.tensor();
  const PreparedNystrom prepared(a, false);
  Tensor out;
  if (in_place(L_out, a.L0, a.R0, a) && in_place(R_out, a.R0, a.L0, a) &&
      !L_out.is_alias_of(R_out)) {
    out = forward(a, prepared.problem, L_out, R_out);
  } else {
    const auto [L, R] = new_states(a, prepared.problem);
    out = forward(a, prepared.problem, L, R);
    L_out.copy_(L), R_out.copy_(R);
  }
  for (const Tensor* t : {&L_out, &R_out})  // so that autograd sees that they changed
    if (!t->is_inference()) t->unsafeGetTensorImpl()->bump_version();
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, std::move(out));
}

void backward_operator(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const Guards guards;
  const size_t count = handle.schema().arguments().size();
  Arguments arguments(*stack, count);
  Tensor dout = arguments.tensor();
  const OptionalTensor dL_any = arguments.optional_tensor(), dR_any = arguments.optional_tensor();
  const NystromCall a(arguments);
  const PreparedNystrom prepared(a, true);
  const NystromProblem& p = prepared.problem;
  TORCH_CHECK(fits(dout, {p.batch, p.heads, p.tokens, p.v_dim}),
              "dout: expected shape (B, Hq, N, Dv)");
  dout = dout.to(a.query.scalar_type());
  if (dout.stride(3) != 1 && dout.size(3) != 1) dout = dout.contiguous();
  const auto wide = a.query.options().dtype(at::kFloat);
  const auto float_or_null = [&](const OptionalTensor& t) {
    return t ? t->to(at::kFloat).contiguous() : Tensor();
  };
  const Tensor dL = float_or_null(dL_any), dR = float_or_null(dR_any);
  const auto zeros = [&](at::IntArrayRef sizes) { return at::zeros(sizes, wide); };
  const auto like = [&](const Tensor& t) { return at::empty(t.sizes(), t.options()); };
  const Tensor dquery = like(a.query), dkey = like(a.key), dvalue = like(a.value);
  const int64_t bundles = static_cast<int64_t>(bundle_parts(p, cut_parts(p)).size()) - 1;
  const int64_t sums = std::max(p.batch, bundles);
  const Tensor dlq = zeros({sums, p.kv_heads, p.marks, p.dim}), dlk = at::zeros_like(dlq);
  const Tensor dcore = zeros({sums, p.kv_heads, p.marks, p.width});
  const Tensor dhalf = zeros({sums, p.kv_heads, p.width});
  const Tensor ddecay = at::zeros({sums, p.kv_heads, p.marks}, wide.dtype(at::kDouble));
  const int64_t rows = a.L0 ? p.sequences : 0;
  const Tensor dL0 = at::empty({rows, p.kv_heads, p.marks}, wide);
  const Tensor dR0 = at::empty({rows, p.kv_heads, p.marks, p.v_dim}, wide);

  NystromGradients x{};
  x.dout = dout.const_data_ptr(), x.dout_strides = strides_of(dout);
  x.dL = dL.defined() ? dL.const_data_ptr<float>() : nullptr;
  x.dR = dR.defined() ? dR.const_data_ptr<float>() : nullptr;
  x.dquery = dquery.mutable_data_ptr(), x.dkey = dkey.mutable_data_ptr(),
  x.dvalue = dvalue.mutable_data_ptr();
  x.dlq = dlq.mutable_data_ptr<float>(), x.dlk = dlk.mutable_data_ptr<float>();
  x.dcore = dcore.mutable_data_ptr<float>(), x.dhalf = dhalf.mutable_data_ptr<float>();
  if (a.decay) x.ddecay = ddecay.mutable_data_ptr<double>();
  if (a.L0) x.dL0 = dL0.mutable_data_ptr<float>(), x.dR0 = dR0.mutable_data_ptr<float>();
  with_dtype(a.query.scalar_type(), [&](auto t) { nystrom_backward<decltype(t)>(p, x); });

  // The kernels' landmarks are scaled, and half = 0.5 scale q~ . k~.
  const auto total = [&](const Tensor& parts) { return sum_bundles(parts, p.batch); };
  Tensor dqueries = total(dlq).mul_(a.scale), dkeys = total(dlk).mul_(a.scale);
  if (p.mass) {
    const Tensor pull = total(dhalf).narrow(2, 0, p.marks).unsqueeze(3).mul(0.5 * a.scale);
    dqueries.add_(pull.mul(a.landmark_keys.to(at::kFloat)));
    dkeys.add_(pull.mul(a.landmark_queries.to(at::kFloat)));
  }
  const auto some = [&](const OptionalTensor& given, const auto& gradient) {
    return given ? gradient() : at::empty({0}, a.query.options());
  };
  Tensor for_decay = some(a.decay, [&] { return gradient_of(*a.decay, total(ddecay)); });
  Tensor for_L0 = some(a.L0, [&] { return dL0.to(a.L0->scalar_type()); });
  Tensor for_R0 = some(a.R0, [&] { return dR0.to(a.R0->scalar_type()); });
  Tensor for_core = gradient_of(a.core, total(dcore).narrow(3, 0, p.marks));
  Tensor for_queries = gradient_of(a.landmark_queries, dqueries);
  Tensor for_keys = gradient_of(a.landmark_keys, dkeys);
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, dquery, dkey, dvalue, for_queries, for_keys, for_core, for_decay, for_L0,
                   for_R0);
}

}  // namespace

TORCH_LIBRARY_IMPL(flashmark, CPU, m) {
  m.impl("nystrom_forward.cpu",
         torch::CppFunction::makeFromBoxedFunction<&forward_operator>());
  m.impl("nystrom_update.cpu", torch::CppFunction::makeFromBoxedFunction<&update_operator>());
  m.impl("nystrom_backward.cpu",
         torch::CppFunction::makeFromBoxedFunction<&backward_operator>());
}

}  // namespace flashmark
