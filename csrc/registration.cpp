// Schemas of the stable-ABI operators. flashmark.native calls them; they are not differentiable by
// themselves.
#include "landmark_core/landmark_core.h"
#include "tiles/tiles.h"

STABLE_TORCH_LIBRARY_FRAGMENT(flashmark_native, m) {
  m.def("pack_tiles(Tensor elements) -> (Tensor bits, Tensor counts)");
  m.def("pack_dense(Tensor visible, int block_q, int block_kv) -> (Tensor bits, Tensor counts)");
  m.def(
      "distinct_tiles(Tensor bits, Tensor counts, int area, int max_tiles) "
      "-> (Tensor classes, Tensor tile_bits, Tensor visible, Tensor found)");
  m.def("tile_lists(Tensor visible, Tensor classes, Tensor area, int capacity) -> Tensor[]");
  m.def(
      "tied_core(Tensor scores, float jitter, bool softmax, bool wide) "
      "-> (Tensor core, Tensor inverse, Tensor jitter_used)");
  m.def(
      "landmarks_core(Tensor landmarks, float scale, float jitter, bool softmax) -> Tensor core");
  m.def(
      "landmarks_core_saving(Tensor landmarks, float scale, float jitter, bool softmax) "
      "-> (Tensor core, Tensor inverse, Tensor jitter_used)");
  m.def(
      "landmarks_core_backward(Tensor landmarks, Tensor inverse, Tensor jitter_used, Tensor dcore, "
      "float scale, bool softmax) -> Tensor dlandmarks");
  m.def(
      "tied_core_backward(Tensor scores, Tensor inverse, Tensor jitter_used, Tensor dcore, bool "
      "softmax) "
      "-> Tensor dscores");
  m.def(
      "tikhonov_core(Tensor matrix, float jitter, bool unit_rows, bool wide) "
      "-> (Tensor core, Tensor inverse, Tensor jitter_used)");
  m.def(
      "tikhonov_core_backward(Tensor matrix, Tensor inverse, Tensor dcore, bool unit_rows) -> "
      "Tensor dmatrix");
}

STABLE_TORCH_LIBRARY_IMPL(flashmark_native, CPU, m) {
  m.impl("pack_tiles", TORCH_BOX(&flashmark::pack_tiles_cpu));
  m.impl("pack_dense", TORCH_BOX(&flashmark::pack_dense_cpu));
  m.impl("distinct_tiles", TORCH_BOX(&flashmark::distinct_tiles_cpu));
  m.impl("tile_lists", TORCH_BOX(&flashmark::tile_lists_cpu));
  m.impl("tied_core", TORCH_BOX(&flashmark::tied_core_cpu));
  m.impl("landmarks_core", TORCH_BOX(&flashmark::landmarks_core_cpu));
  m.impl("landmarks_core_saving", TORCH_BOX(&flashmark::landmarks_core_saving_cpu));
  m.impl("landmarks_core_backward", TORCH_BOX(&flashmark::landmarks_core_backward_cpu));
  m.impl("tied_core_backward", TORCH_BOX(&flashmark::tied_core_backward_cpu));
  m.impl("tikhonov_core", TORCH_BOX(&flashmark::tikhonov_core_cpu));
  m.impl("tikhonov_core_backward", TORCH_BOX(&flashmark::tikhonov_core_backward_cpu));
}

#ifdef FLASHMARK_CUDA
STABLE_TORCH_LIBRARY_IMPL(flashmark_native, CUDA, m) {
  m.impl("pack_tiles", TORCH_BOX(&flashmark::pack_tiles_cuda));
  m.impl("pack_dense", TORCH_BOX(&flashmark::pack_dense_cuda));
  m.impl("distinct_tiles", TORCH_BOX(&flashmark::distinct_tiles_cuda));
  m.impl("tile_lists", TORCH_BOX(&flashmark::tile_lists_cuda));
  m.impl("tied_core", TORCH_BOX(&flashmark::tied_core_cuda));
  m.impl("landmarks_core", TORCH_BOX(&flashmark::landmarks_core_cuda));
  m.impl("landmarks_core_saving", TORCH_BOX(&flashmark::landmarks_core_saving_cuda));
  m.impl("landmarks_core_backward", TORCH_BOX(&flashmark::landmarks_core_backward_cuda));
  m.impl("tied_core_backward", TORCH_BOX(&flashmark::tied_core_backward_cuda));
  m.impl("tikhonov_core", TORCH_BOX(&flashmark::tikhonov_core_cuda));
  m.impl("tikhonov_core_backward", TORCH_BOX(&flashmark::tikhonov_core_backward_cuda));
}
#endif
