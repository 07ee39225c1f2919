"""Alias of `flashmark.variants`, the name it had before."""

import sys

from flashmark import variants

sys.modules[__name__] = variants
