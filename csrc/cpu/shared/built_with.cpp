// The torch that this library belongs to, which flashmark.cpu reads from the file before it loads
// it.
#include <torch/headeronly/version.h>

extern "C" {
[[gnu::used, gnu::visibility("default")]] extern const char flashmark_built_with[] =
    "flashmark built with torch " TORCH_VERSION;
}
