#!/usr/bin/env bash
# The tests of the ops with AddressSanitizer and UndefinedBehaviorSanitizer in the native library:
# a read or write outside of a tensor or of the scratch, a misaligned or overflowing access stops
# the run. Uses the python of the environment, with torch, ninja, pybind11, setuptools and pytest.
#
#   tests/sanitize.sh                     # all instruction sets, 60 random cases per op
#   tests/sanitize.sh --fuzz-cases 400    # arguments go to pytest
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cxx=${CXX:-g++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/site"
cp -r "$root"/{csrc,_build,sparsecnn,setup.py,pyproject.toml,README.md} "$work/"
rm -f "$work"/sparsecnn/*.so
# Through a folder of its own: the tests take the repository's root off the path.
ln -s "$work/sparsecnn" "$work/site/sparsecnn"

flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1"
# The kernels pass undefined vector registers on purpose; vptr needs type information torch hides.
flags+=" -fno-sanitize=vptr"
(cd "$work" && SPARSECNN_CUDA=0 CXXFLAGS="$flags" python setup.py -q build_ext --inplace \
  --build-temp "$work/build" >"$work/log" 2>&1) || { cat "$work/log"; exit 1; }

# Python itself is not instrumented: the runtimes must be there before the library is loaded.
preload="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libubsan.so)"
cd "$root"
# Torch and Python keep memory to the end of the process; their leaks are not ours to find.
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 \
  UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$work/site" \
  python -m pytest -p no:cacheprovider tests/ops tests/formats --fuzz-cases 60 "$@"
