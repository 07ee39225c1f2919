// Forward mode on CPUs: outputs and their tangents in one pass.
#include "block_sparse/jvp.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include "block_sparse/kernels.h"
#include "shared/arguments.h"
#include "shared/pack.h"
#include "shared/schedule.h"

namespace flashmark {
namespace {

constexpr size_t TANGENTS = 5;  // of query, key, value, bias, sinks: they come before the call
constexpr size_t BIAS = 7;      // place of the bias in a call

at::ScalarType type_of_products(at::ScalarType dtype) {
#if defined(CPU_CAPABILITY_AVX512)
  if (dtype == at::kBFloat16 && bfloat16_products()) return at::kBFloat16;
#endif
  return at::kFloat;
}

// An operand in the type of the products, with a last dimension that they take.
Tensor operand(const Tensor& x, at::ScalarType type, int64_t dim) {
  const int64_t missing = dim - x.size(-1);
  const Tensor whole = missing == 0 ? x.to(type) : at::constant_pad_nd(x.to(type), {0, missing});
  return whole.stride(-1) == 1 || dim == 1 ? whole : whole.contiguous();
}

// (B, Hkv, Nk, Dv) -> (B, Hkv, blocks, Dv, block). What lies beyond a sample's keys is not set, but
// for the zero that a pair of keys needs.
template <typename C>
Tensor transposed_blocks(const Problem& p, const Tensor& value, int64_t block, int64_t blocks) {
  const Tensor to = at::empty({p.batch, p.kv_heads, blocks, p.v_dim, block}, value.options());
  at::parallel_for(0, p.batch * p.kv_heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; x++) {
      const int64_t pair = x / blocks, b = pair / p.kv_heads, h = pair % p.kv_heads;
      const int64_t first = x % blocks * block;
      const int64_t n = std::clamp<int64_t>(p.keys(b) - first, 0, block);
      const C* from = value.const_data_ptr<C>() + b * value.stride(0) + h * value.stride(1) +
                      first * value.stride(2);
      C* block_t = to.mutable_data_ptr<C>() + x * p.v_dim * block;
      transpose(from, value.stride(2), n, p.v_dim, block_t, block);
      if (PAIRED<C> && n % 2 != 0)
        for (int64_t d = 0; d < p.v_dim; d++) block_t[d * block + n] = C(0.f);
    }
  });
  return to;
}

template <typename C, int64_t W>
void run(const Problem& p, const JvpTensors& x) {
  const int64_t tiles = p.max_tiles();
  share_items(p.batch * p.heads * tiles, [&](const auto& next) {
    JvpTile<C, W> worker(p, x);
    for (int64_t item = next(); item >= 0; item = next()) {
      const int64_t b = item / tiles / p.heads, h = item / tiles % p.heads;
      const int64_t rank = item % tiles, count = p.tiles(b);
      if (rank < count) worker.run(b, h, p.first_tile(b) + count - 1 - rank);  // the long ones first
    }
  });
}

struct Results {
  Tensor out, lse, residual, tout, tlse;
};

Results jvp(const BlockSparseCall& a, const PreparedProblem* tbias,
            const OptionalTensor (&tangents)[TANGENTS]) {
  const auto& [tquery, tkey, tvalue, unused, tsinks] = tangents;
  const auto shape = a.query.sizes();
  const Tensor out = at::zeros({shape[0], shape[1], shape[2], a.value.size(3)}, at::kFloat);
  const Tensor lse = at::full({shape[0], shape[1], shape[2]}, NEG_INF, at::kFloat);
  const Results r{out, lse, a.bias ? at::zeros_like(lse) : at::empty({0}, at::kFloat),
                  at::zeros_like(out), at::zeros_like(lse)};
  if (a.query.numel() == 0 || a.key.numel() == 0) {
    if (a.sinks) lse.copy_(a.sinks->unsqueeze(1));
    if (tsinks) r.tlse.copy_(tsinks->unsqueeze(1));
    return r;
  }
  const PreparedProblem prepared(a);
  const Problem& p = prepared.problem;
  const at::ScalarType type = a.query.scalar_type();
  const auto given = [&](const OptionalTensor& t) {
    return t ? operand(*t, type, p.dim).contiguous() : Tensor();
  };
  const auto blocks_of = [&](const Tensor& value, const JvpTensors& x) {
    const Tensor whole = operand(value, type, p.v_dim);
    return type == at::kFloat ? transposed_blocks<float>(p, whole, x.block, x.blocks)
                              : transposed_blocks<BFloat16>(p, whole, x.block, x.blocks);
  };
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  JvpTensors x{};
  x.block = std::min(VALUE_BLOCK, (p.kv_len + 15) / 16 * 16);
  x.blocks = (p.kv_len + x.block - 1) / x.block;
  const Tensor tq = given(tquery), tk = given(tkey), value_t = blocks_of(a.value, x);
  const Tensor tvalue_t = tvalue ? blocks_of(*tvalue, x) : Tensor();
  const Tensor ts = tsinks ? tsinks->to(at::kFloat).contiguous() : Tensor();
  x.tquery = pointer(tq), x.tkey = pointer(tk);
  x.tsinks = ts.defined() ? ts.const_data_ptr<float>() : nullptr;
  x.value_t = pointer(value_t), x.tvalue_t = pointer(tvalue_t);
  x.tbias = tbias ? &tbias->problem : nullptr;
  x.out = out.mutable_data_ptr<float>(), x.lse = lse.mutable_data_ptr<float>();
  x.residual = a.bias ? r.residual.mutable_data_ptr<float>() : nullptr;
  x.tout = r.tout.mutable_data_ptr<float>(), x.tlse = r.tlse.mutable_data_ptr<float>();
#if defined(CPU_CAPABILITY_AVX512)
  if (type == at::kBFloat16) {
    p.tile_q == 64 ? run<BFloat16, 64>(p, x) : run<BFloat16, 16>(p, x);
    return r;
  }
#endif
  p.tile_q == 64 ? run<float, 64>(p, x) : run<float, 16>(p, x);
  return r;
}

void block_sparse_jvp_op(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKeySet(c10::DispatchKey::AutocastCPU));
  const size_t count = op.schema().arguments().size(), first = stack->size() - count;
  const at::ScalarType dtype = (*stack)[first + TANGENTS].toTensor().scalar_type();
  const at::ScalarType type = type_of_products(dtype);
  for (size_t n = 0; n < 3; n++) {  // query, key, value
    c10::IValue& x = (*stack)[first + TANGENTS + n];
    const int64_t dim = x.toTensor().size(-1);
    x = operand(x.toTensor(), type, n < 2 && type != at::kFloat ? (dim + 1) / 2 * 2 : dim);
  }
  Results r;
  {
    Arguments arguments(*stack, count);
    OptionalTensor tangents[TANGENTS];
    for (OptionalTensor& x : tangents) x = arguments.optional_tensor();
    const BlockSparseCall call(arguments);
    if (tangents[3]) {
      torch::jit::Stack other(stack->begin() + first + TANGENTS, stack->end());
      other[BIAS] = *tangents[3];
      Arguments of_bias(other, other.size());
      const BlockSparseCall tcall(of_bias);
      const PreparedProblem tbias(tcall);
      r = jvp(call, &tbias, tangents);
    } else {
      r = jvp(call, nullptr, tangents);
    }
  }
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, r.out.to(dtype), std::move(r.lse), std::move(r.residual),
                   r.tout.to(dtype), std::move(r.tlse));
}

}  // namespace

TORCH_LIBRARY_IMPL(flashmark, CPU, m) {
  m.impl("block_sparse_jvp.cpu", torch::CppFunction::makeFromBoxedFunction<&block_sparse_jvp_op>());
}

}  // namespace flashmark
