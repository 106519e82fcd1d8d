#!/usr/bin/env bash
# bench_gpu.sh [FOLDER | FILE.tar.xz] [options]: every figure of the CUDA path in one call of under 10 minutes, and one
# table of them beside the goals; tools/bench_gpu.py says what is measured. FOLDER (build) has kivi, libkivi-cuda.so and
# check-cuda. Nothing is compiled or fetched; torch and transformers are measured where python3 has them.
#
# bench_gpu.sh --pack FILE.tar.xz [FOLDER]: those programs without symbols, and the libraries they need but for the
# system's and cuBLASLt, as one file for a machine that has a GPU, a driver and CUDA's libraries and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pack() {
    local file=$1 build=${2:-build} stage name lib
    stage=$(mktemp -d)
    trap 'rm -rf "$stage"' RETURN
    mkdir "$stage/lib"
    for name in kivi libkivi-cuda.so check-cuda gpu_engine tune-cuda; do
        if [ -f "$build/$name" ]; then strip -o "$stage/$name" "$build/$name"; fi
    done
    for name in kivi libkivi-cuda.so; do
        [ -f "$stage/$name" ] || { echo "bench_gpu.sh: $build/$name is missing" >&2; return 2; }
        ldd "$build/$name" | sed -n 's/.* => \(\/[^ ]*\).*/\1/p'
    done | sort -u | while read -r lib; do
        case ${lib##*/} in
        lib[cm].so.*|libdl.so.*|librt.so.*|libpthread.so.*|libgcc_s.so.*|libstdc++.so.*|libcublas*) ;;
        *) cp -L "$lib" "$stage/lib/" ;;
        esac
    done
    tar -C "$stage" -cf - . | xz -6 -T2 > "$file"
    echo "$file: $(($(stat -c %s "$file") / 1000000)) MB"
}

if [ "${1:-}" = --pack ]; then
    [ $# -ge 2 ] || { echo "bench_gpu.sh: --pack needs the file to make" >&2; exit 2; }
    pack "${@:2}"
    exit
fi
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
