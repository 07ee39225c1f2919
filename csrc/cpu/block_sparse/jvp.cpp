// Forward mode on CPUs: outputs and their tangents in one pass, in float32 for every dtype.
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

Tensor floats(const Tensor& x) {
  const Tensor same = x.to(at::kFloat);
  return same.stride(-1) == 1 || same.size(-1) == 1 ? same : same.contiguous();
}

// (B, Hkv, Nk, Dv) -> (B, Hkv, blocks, Dv, block), 0 beyond the end.
Tensor transposed_blocks(const Tensor& value, int64_t block, int64_t blocks) {
  const int64_t missing = blocks * block - value.size(2);
  const Tensor padded = at::constant_pad_nd(value.to(at::kFloat), {0, 0, 0, missing});
  return padded.view({value.size(0), value.size(1), blocks, block, value.size(3)})
      .transpose(3, 4)
      .contiguous();
}

template <int64_t W>
void run(const Problem& p, const JvpTensors& x) {
  const int64_t tiles = p.max_tiles();
  share_items(p.batch * p.heads * tiles, [&](const auto& next) {
    JvpTile<W> worker(p, x);
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
  const auto given = [](const OptionalTensor& t) {
    return t ? t->to(at::kFloat).contiguous() : Tensor();
  };
  const auto pointer = [](const Tensor& t) {
    return t.defined() ? t.const_data_ptr<float>() : nullptr;
  };
  JvpTensors x{};
  x.block = std::min(VALUE_BLOCK, (p.kv_len + 15) / 16 * 16);
  x.blocks = (p.kv_len + x.block - 1) / x.block;
  const Tensor tq = given(tquery), tk = given(tkey), ts = given(tsinks);
  const Tensor value_t = transposed_blocks(a.value, x.block, x.blocks);
  const Tensor tvalue_t = tvalue ? transposed_blocks(*tvalue, x.block, x.blocks) : Tensor();
  x.tquery = pointer(tq), x.tkey = pointer(tk), x.tsinks = pointer(ts);
  x.value_t = pointer(value_t), x.tvalue_t = pointer(tvalue_t);
  x.tbias = tbias ? &tbias->problem : nullptr;
  x.out = out.mutable_data_ptr<float>(), x.lse = lse.mutable_data_ptr<float>();
  x.residual = a.bias ? r.residual.mutable_data_ptr<float>() : nullptr;
  x.tout = r.tout.mutable_data_ptr<float>(), x.tlse = r.tlse.mutable_data_ptr<float>();
  p.tile_q == 64 ? run<64>(p, x) : run<16>(p, x);
  return r;
}

void block_sparse_jvp_op(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKeySet(c10::DispatchKey::AutocastCPU));
  const size_t count = op.schema().arguments().size(), first = stack->size() - count;
  const at::ScalarType dtype = (*stack)[first + TANGENTS].toTensor().scalar_type();
  for (size_t n = 0; n < 3; n++) {  // query, key, value
    c10::IValue& x = (*stack)[first + TANGENTS + n];
    x = floats(x.toTensor());
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
