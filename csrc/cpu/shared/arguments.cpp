#include "shared/arguments.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "block_sparse/kernels.h"
#include "shared/vec_math.h"

namespace flashmark {

Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

bool bfloat16_products() {
#if defined(CPU_CAPABILITY_AVX512)
  static const bool works = [] {
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    // 1 x 2 times 2 x 2: told apart are rows paired, rows in order, and a refusal.
    const c10::BFloat16 a[2] = {1.f, 0.f}, b[4] = {1.f, 2.f, 3.f, 4.f};
    float c[2] = {0.f, 0.f};
    try {
      at::native::cpublas::brgemm(1, 2, 2, 2, 2, 2, false, a, b, c, true);
      at::native::cpublas::brgemm_release(true);
    } catch (const c10::Error&) {
      return false;
    }
    return c[0] == 1.f && c[1] == 3.f;
  }();
  return works;
#else
  return false;
#endif
}

const Tensor& PreparedProblem::keep(Tensor tensor) {
  kept_.push_back(std::move(tensor));
  return kept_.back();
}

PreparedProblem::PreparedProblem(const BlockSparseCall& a) {
  Problem& p = problem;
  kept_.reserve(24);
  TORCH_CHECK(a.query.dim() == 4 && a.key.dim() == 4 && a.value.dim() == 4,
              "query, key, value: expected 4 dimensions each");
  for (const Tensor* t : {&a.query, &a.key, &a.value})
    TORCH_CHECK(
        t->device().is_cpu() && t->scalar_type() == a.query.scalar_type() &&
            (t->stride(3) == 1 || t->size(3) == 1),
        "query, key, value: expected CPU tensors of one dtype with stride 1 in the last dimension");
  p.batch = a.query.size(0), p.heads = a.query.size(1), p.q_len = a.query.size(2),
  p.dim = a.query.size(3);
  p.kv_heads = a.key.size(1), p.kv_len = a.key.size(2), p.v_dim = a.value.size(3);
  TORCH_CHECK(p.dim <= 256 && p.v_dim <= 256,
              "query, value: expected head dimensions up to 256, got ", p.dim, " and ", p.v_dim);
  TORCH_CHECK(a.key.size(0) == p.batch && a.value.size(0) == p.batch &&
                  a.value.size(1) == p.kv_heads && a.value.size(2) == p.kv_len &&
                  a.key.size(3) == p.dim && p.kv_heads > 0 && p.heads % p.kv_heads == 0,
              "key, value: expected shapes (B, Hkv, Nk, D) and (B, Hkv, Nk, Dv) that fit query");
  p.query = a.query.const_data_ptr(), p.key = a.key.const_data_ptr(),
  p.value = a.value.const_data_ptr();
  p.query_strides = strides_of(a.query), p.key_strides = strides_of(a.key),
  p.value_strides = strides_of(a.value);
  p.scale = static_cast<float>(a.scale), p.softcap = static_cast<float>(a.softcap);
  read_mask(a);
  if (a.query_offset) {
    const Tensor& offset = keep(a.query_offset->to(at::kInt).contiguous());
    p.query_offset = offset.const_data_ptr<int32_t>();
    p.query_offset_stride = offset.numel() > 1 ? 1 : 0;
  }
  for (int64_t b = 0; b < p.batch; b++)
    TORCH_CHECK(p.offset(b) >= 0 && p.offset(b) + p.q_len <= p.mask.rows,
                "query_offset: expected rows inside the mask's ", p.mask.rows, ", got ",
                p.offset(b));
  if (a.kv_lengths)
    p.kv_lengths = keep(a.kv_lengths->to(at::kInt).contiguous()).const_data_ptr<int32_t>();
  read_bias(a);
  if (a.sinks) p.sinks = keep(a.sinks->to(at::kFloat).contiguous()).const_data_ptr<float>();
  if (a.dropout_p > 0.0) {
    TORCH_CHECK(a.dropout_seed.has_value(),
                "dropout_seed: expected a tensor with dropout_p > 0, got None");
    p.dropout = true;
    p.keep_scale = static_cast<float>(1.0 / (1.0 - a.dropout_p));
    p.drop_below = static_cast<uint64_t>(std::floor(a.dropout_p * 4294967296.0));
    p.seed = static_cast<uint64_t>(a.dropout_seed->item<int64_t>());
  }
}

void PreparedProblem::read_mask(const BlockSparseCall& a) {
  Problem& p = problem;
  BlockMaskView& mask = p.mask;
  TORCH_CHECK(a.mask_layout.size() == 6, "mask: expected 6 integers of layout, got ",
              a.mask_layout.size());
  mask.kind = a.mask_kind == "causal"  ? MaskKind::CAUSAL
              : a.mask_kind == "dense" ? MaskKind::DENSE
                                       : MaskKind::SPARSE;
  mask.rows = a.mask_layout[0];
  mask.block_q = a.mask_layout[2], mask.block_kv = a.mask_layout[3];
  mask.batch = a.mask_layout[4], mask.heads = a.mask_layout[5];
  TORCH_CHECK(a.mask_layout[1] == p.kv_len, "mask: expected ", p.kv_len, " keys, got ",
              a.mask_layout[1]);
  const bool narrow = p.q_len <= 16 || (mask.kind == MaskKind::SPARSE && mask.block_q % 64 != 0);
  p.tile_q = narrow ? 16 : 64;
  if (mask.kind != MaskKind::SPARSE) return;
  TORCH_CHECK(a.mask_tensors.size() == 14 && mask.block_q % 16 == 0 && mask.block_kv % 16 == 0,
              "mask: expected 14 tensors and block sizes that are multiples of 16");
  mask.q_blocks = (mask.rows + mask.block_q - 1) / mask.block_q;
  mask.kv_blocks = (p.kv_len + mask.block_kv - 1) / mask.block_kv;
  const auto contiguous = [&](const Tensor& t) -> const Tensor& {
    return t.is_contiguous() ? t : keep(t.contiguous());
  };
  const auto lists = [&](size_t first) {
    const int32_t* pointers[6];
    for (size_t n = 0; n < 6; n++) {
      const Tensor& t = a.mask_tensors[first + n].toTensor();
      TORCH_CHECK(t.scalar_type() == at::kInt && t.device().is_cpu(),
                  "mask: expected int32 CPU tensors");
      pointers[n] = contiguous(t).const_data_ptr<int32_t>();
    }
    return TileLists{pointers[0], pointers[1], pointers[2], pointers[3], pointers[4], pointers[5]};
  };
  mask.by_query = lists(0);
  mask.by_key = lists(6);
  const Tensor& bits = contiguous(a.mask_tensors[12].toTensor());
  const int64_t tiles = bits.size(0);
  mask.subs = mask.block_q / p.tile_q;
  const auto workspace = [&](int64_t n, at::ScalarType dtype) {  // without the dispatcher
    return keep(Tensor(at::detail::empty_cpu({n}, dtype))).mutable_data_ptr();
  };
  auto* rows =
      static_cast<int64_t*>(workspace(tiles * mask.subs * mask.block_kv, at::kLong));
  auto* extents = static_cast<int32_t*>(workspace(tiles * mask.subs * 2, at::kInt));
  mask.tile_rows = reinterpret_cast<uint64_t*>(rows);
  mask.extents = reinterpret_cast<Extent*>(extents);
  transpose_tile_bits(bits.const_data_ptr<int32_t>(), tiles, mask.block_q, mask.block_kv, p.tile_q,
                      reinterpret_cast<uint64_t*>(rows), reinterpret_cast<Extent*>(extents));
}

void PreparedProblem::read_bias(const BlockSparseCall& a) {
  Problem& p = problem;
  p.relative_size = p.mask.rows + p.kv_len - 1;
  if (!a.bias) return;
  if (a.bias->dim() == 2) {
    TORCH_CHECK(a.bias->size(0) == p.heads && a.bias->size(1) == p.relative_size,
                "bias: expected shape (", p.heads, ", ", p.relative_size, "), got ",
                a.bias->sizes());
    const Tensor padded = at::zeros({p.heads, p.relative_size + p.tile_q}, at::kFloat);
    padded.narrow(1, 0, p.relative_size)
        .copy_(a.bias->to(at::kFloat).flip(1));
    p.relative_bias = keep(padded).const_data_ptr<float>();
    return;
  }
  Tensor dense = a.bias->to(at::kFloat);
  if (dense.size(3) != 1 && dense.stride(3) != 1) dense = dense.contiguous();
  const Tensor view = keep(dense.expand({p.batch, p.heads, p.q_len, p.kv_len}));
  p.dense_bias = view.const_data_ptr<float>();
  for (int n = 0; n < 4; n++) p.dense_strides[n] = a.bias->size(n) == 1 ? 0 : view.stride(n);
}

}  // namespace flashmark
