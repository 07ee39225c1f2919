#include "heads.h"

namespace flashmark::dense_blocks {

FLASHMARK_DEFINE_HEAD(Wide, double, double)

}  // namespace flashmark::dense_blocks
