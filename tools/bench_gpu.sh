#!/usr/bin/env bash
# bench_gpu.sh [FOLDER]: the figures of the CUDA kernels in SPEED.md in one call of some two minutes. FOLDER (build) has
# bench-cuda and check-cuda, which need nothing but the driver; torch's attention is measured where python3 has torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=${1:-build}
# cuDNN out of Python's packages, where the system has none: prompts are measured with it, too.
libs=$(python3 -c 'import importlib.util as u
found = [u.find_spec("nvidia." + name) for name in ("cudnn", "cu13")]
print(":".join(f"{path}/lib" for s in found if s for path in s.submodule_search_locations))' 2>/dev/null || true)
[ -z "$libs" ] || export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libs"

"$build/check-cuda" --small | tail -n 1
"$build/bench-cuda"
"$build/bench-cuda" --plain --short
if python3 -c 'import torch' 2>/dev/null; then python3 tools/bench_torch_attention.py
else echo "bench_gpu.sh: python3 has no torch: its attention was not measured" >&2
fi
