#include "heads.h"

namespace flashmark::dense_blocks {

FLASHMARK_DEFINE_HEAD(Narrow, float, float)

}  // namespace flashmark::dense_blocks
