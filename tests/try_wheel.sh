#!/bin/sh
# Installs a wheel in a new environment and runs the self-check there, with no compiler on the path.
# usage: tests/try_wheel.sh PYTHON WHEEL
set -eu
cd "$(dirname "$0")/.."
wheel=$(realpath "$2")
home=$PWD/build/wheel-environment
rm -rf "$home"
"$1" -m venv "$home"
"$home/bin/python" -m pip install --quiet --requirement requirements-torch.txt "$wheel" 'numpy>=2.0'

cd /  # not the checkout: the package is the wheel's
run() { env -i HOME="$home" PATH="$home/bin" "$home/bin/python" "$@"; }
for compiler in cc c++ gcc g++ clang nvcc; do
  if env -i PATH="$home/bin" command -v $compiler >/dev/null; then
    echo "$compiler is on the path of the environment" >&2 && exit 1
  fi
done
text=$(run -m flashmark) || { echo "$text"; exit 1; }
echo "$text"
# Every operator ran in the kernels, and the package is not the checkout's.
for operator in block_sparse nystrom hybrid routed; do
  echo "$text" | grep -q "^  $operator on cpu, cpu, float32 *ok" || { echo "$operator: no C++ kernels" >&2; exit 1; }
done
run -c "import flashmark; assert flashmark.__file__.startswith('$home'), flashmark.__file__; print(flashmark.__file__)"
