#!/usr/bin/env bash
# bench_gpu.sh [FOLDER | FILE.tar.xz] [options]: every figure of the CUDA path in one call of under 10 minutes, and one
# table of them beside the goals; tools/bench_gpu.py says what is measured. FOLDER (build) has kivi, libkivi-cuda.so and
# check-cuda. Nothing is compiled or fetched; torch and transformers are measured where python3 has them.
# FILE.tar.xz is tools/gpu_carry.sh's, for a machine that has a GPU, a driver and CUDA's libraries and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

programs=build
case ${1:-} in ''|-*) ;; *) programs=$1; shift ;; esac
if [ -f "$programs" ]; then
    unpacked=$(mktemp -d)
    trap 'rm -rf "$unpacked"' EXIT
    tar -C "$unpacked" -xJf "$programs"
    programs=$unpacked
fi
# cuDNN out of Python's packages, where the system has none: prompts are measured with it, too.
libs=$(python3 -c 'import importlib.util as u
found = [u.find_spec("nvidia." + name) for name in ("cudnn", "cu13")]
print(":".join(f"{path}/lib" for s in found if s for path in s.submodule_search_locations))' 2>/dev/null || true)
[ -z "$libs" ] || export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libs"
python3 tools/bench_gpu.py "$programs" "$@"
