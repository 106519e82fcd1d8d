"""Golden bytes of ggml's Q8_0 and Q4_0 blocks, from the `gguf` Python package (pip install gguf numpy).

    make_blocks.py tests/golden/blocks.bin

The file: "KIVIBLK1", n u32, then n float32, then the bytes of their Q8_0 rows, then those of their Q4_0 rows. The
numbers are such as go wrong: ties of rounding, equal largest magnitudes of both signs, zeros, subnormals, scales at the
ends of float16, and many plain ones.
"""
import struct
import sys

import numpy as np

BLOCK = 32


def blocks(seed=1):
    rng = np.random.default_rng(seed)
    out = [np.zeros(BLOCK), -np.zeros(BLOCK), np.full(BLOCK, 1.0), np.full(BLOCK, -1.0)]
    for k in range(8):  # ties: multiples of half a step
        top = 2.0 ** (k - 4)
        out.append(np.where(np.arange(BLOCK) == 7, 127 * top, (rng.integers(-254, 255, BLOCK)) * top / 2))
        out.append(np.where(np.arange(BLOCK) == 9, -8 * top, (rng.integers(-16, 17, BLOCK)) * top / 2))
    for first, second in ((3.0, -3.0), (-3.0, 3.0)):  # the first of equals decides the sign
        x = rng.standard_normal(BLOCK)
        x[5], x[20] = first, second
        out.append(x)
    for scale in (1e-36, 1e-30, 6e-8, 3e-5, 1e-3, 1, 100, 6e4, 5e5, 8e6):
        for _ in range(4):
            x = rng.standard_normal(BLOCK)
            out.append(x / np.abs(x).max() * scale)
    out += list(rng.standard_normal((64, BLOCK)))
    x = np.stack(out).astype(np.float32)
    fits_q4 = np.abs(x).max(1) < 65520 * 8
    return x[fits_q4]


def main():
    import gguf
    x = blocks()
    with open(sys.argv[1], 'wb') as f:
        f.write(b'KIVIBLK1' + struct.pack('<I', x.size) + x.tobytes())
        for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
            f.write(gguf.quants.quantize(x, kind).tobytes())


if __name__ == '__main__':
    main()
