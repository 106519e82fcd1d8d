#!/usr/bin/env bash
# deps.sh [build|test|model|plots]...: the Debian packages that each job needs (default: build). Installs the missing
# ones as root; for anyone else prints the line to run and exits 2. When nothing is missing no network is touched.
set -euo pipefail

packages() {
    case $1 in
        build) echo gcc libc6-dev make pkg-config libjansson-dev libpcre2-dev libutf8proc-dev libedit-dev \
            libmicrohttpd-dev scdoc ;;
        test) echo g++ libcmocka-dev python3 python3-numpy python3-jinja2 valgrind # g++: headers compile as C++
            # the other architecture; on it, the kernels are tested as they are
            [ "$(uname -m)" != x86_64 ] || echo gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user ;;
        model) echo python3 python3-pip ca-certificates ;;             # the model comes inside a Python package
        plots) echo python3-matplotlib ;;
        *) echo "kivi: error: deps.sh: unknown set '$1', known: build test model plots" >&2; return 2 ;;
    esac
}

# The same things as commands that succeed when they are there, for systems without apt-get.
probes() {
    case $1 in
        build) printf '%s\n' 'cc --version' 'make --version' \
            'pkg-config --exists jansson' 'pkg-config --exists libpcre2-8' \
            'pkg-config --exists libutf8proc' 'pkg-config --exists libedit' \
            'pkg-config --exists libmicrohttpd' 'scdoc -v' ;;
        test) printf '%s\n' 'g++ --version' 'pkg-config --exists cmocka' \
            'python3 -c import\ numpy' 'valgrind --version' ;;
        model) printf '%s\n' 'python3 -m pip --version' ;;
        plots) printf '%s\n' 'python3 -c import\ matplotlib' ;;
    esac
}

[ $# -gt 0 ] || set -- build
wanted=()
for set_name in "$@"; do
    list=$(packages "$set_name")
    # shellcheck disable=SC2206 # names are words
    wanted+=($list)
done

if ! command -v apt-get >/dev/null; then
    missing=()
    for set_name in "$@"; do
        while IFS= read -r probe; do
            eval "$probe" >/dev/null 2>&1 || missing+=("$probe")
        done < <(probes "$set_name")
    done
    [ ${#missing[@]} -eq 0 ] && exit 0
    echo "kivi: error: this system has no apt-get; install by hand what makes these commands succeed:" >&2
    printf '  %s\n' "${missing[@]}" >&2
    exit 2
fi

have=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "${wanted[@]}" 2>/dev/null || true)
missing=()
for name in "${wanted[@]}"; do
    [[ $'\n'$have$'\n' == *$'\n'"installed $name"$'\n'* || " ${missing[*]} " == *" $name "* ]] || missing+=("$name")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
    echo "kivi: error: packages are missing; run this once, then try again:" >&2
    echo "sudo apt-get install -y --no-install-recommends ${missing[*]}" >&2
    exit 2
fi

echo "kivi: installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for pause in 5 15 0; do # mirrors and locks have bad moments; three tries bridge them
    if { apt-get update -qq && apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 \
        -o Acquire::Retries=3 "${missing[@]}"; } >"$log" 2>&1 </dev/null; then
        exit 0
    fi
    sleep "$pause"
done
tail -n 15 "$log" >&2
echo "kivi: error: apt-get could not install: ${missing[*]}" >&2
exit 5
