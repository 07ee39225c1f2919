#include "heads.h"

namespace flashmark::dense_blocks {

FLASHMARK_DEFINE_HEAD(Mixed, float, double)

}  // namespace flashmark::dense_blocks
