#!/usr/bin/env bash
# bench_gpu.sh [FOLDER]: the figures of the CUDA kernels in SPEED.md in one call of some two minutes. FOLDER (build) has
# bench-cuda and check-cuda, which need nothing but the driver; torch's attention is measured where python3 has torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=${1:-build}

"$build/check-cuda" --small | tail -n 1
"$build/bench-cuda"
"$build/bench-cuda" --plain --short
if python3 -c 'import torch' 2>/dev/null; then python3 tools/bench_torch_attention.py
else echo "bench_gpu.sh: python3 has no torch: its attention was not measured" >&2
fi
