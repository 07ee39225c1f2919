#!/bin/sh
# Builds the C++ libraries with the address and undefined-behaviour sanitizers and runs their tests.
# usage: csrc/sanitize.sh [python] [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
python=${1:-python}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- tests/block_sparse/test_cpu*.py tests/nystrom/test_cpu.py tests/routed/test_cpu.py tests/routed/test_choice.py tests/native/test_tiles.py tests/native/test_core.py

# A copy of the package beside the sanitized libraries: the ones in use stay as they are.
package=build/sanitize/python
mkdir -p "$package"
cp -r python/flashmark "$package/"
rm -f "$package"/flashmark/*.so
level=$("$python" -c "import torch; print(torch.backends.cpu.get_cpu_capability().lower())")
"$python" csrc/build.py --sanitize --only "$level" --to "$package"
"$python" csrc/build.py --sanitize --only native --to "$package"

runtime="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libubsan.so)"
# Leaks are Python's own; a compiled kernel of oneDNN knows nothing of the stack's shadow.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export OMP_NUM_THREADS=2 LD_PRELOAD="$runtime" PYTHONPATH="$package"
exec "$python" -m pytest -q -p no:cacheprovider "$@"
