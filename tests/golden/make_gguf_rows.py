"""Reference rows of every GGUF type that kivi reads: blocks of bytes in, float32 values out, by the dequantizer of the
PyPI package `gguf` (0.19.0): make_gguf_rows.py OUT [SEED].

Written for each type: TYPE.blocks.npy uint8 [rows][bytes] and TYPE.rows.npy float32 [rows][512]. Bytes are random but
for the float16 numbers of a block, which are kept within +-0.1 (none of them an infinity or NaN); the last row has all
its other bytes 255, so that every code and scale is at its end.
"""
import os
import sys

import numpy as np

N_COLS = 512
# type: columns and bytes of a block, where its float16 numbers stand
BLOCKS = {'F32': (1, 4, ()), 'F16': (1, 2, ()), 'BF16': (1, 2, ()), 'Q4_0': (32, 18, (0,)), 'Q4_1': (32, 20, (0, 2)),
          'Q5_0': (32, 22, (0,)), 'Q5_1': (32, 24, (0, 2)), 'Q8_0': (32, 34, (0,)), 'Q2_K': (256, 84, (80, 82)),
          'Q3_K': (256, 110, (108,)), 'Q4_K': (256, 144, (0, 2)), 'Q5_K': (256, 176, (0, 2)), 'Q6_K': (256, 210, (208,))}


def random_blocks(name, n_rows, n_cols, rng):
    """uint8 [n_rows][bytes of a row]"""
    cols, n_bytes, halves = BLOCKS[name]
    if cols == 1:
        x = rng.standard_normal((n_rows, n_cols)).astype(np.float32)
        if name == 'BF16':
            return (x.view(np.uint32) >> 16).astype('<u2').view(np.uint8).reshape(n_rows, -1)
        return x.astype('<f4' if name == 'F32' else '<f2').view(np.uint8).reshape(n_rows, -1)
    blocks = rng.integers(0, 256, (n_rows, n_cols // cols, n_bytes), np.uint8)
    blocks[-1] = 255
    for at in halves:
        numbers = rng.uniform(-0.1, 0.1, (n_rows, n_cols // cols, 1)).astype('<f2')
        blocks[:, :, at:at + 2] = numbers.view(np.uint8)
    return blocks.reshape(n_rows, -1)


def main():
    from gguf import GGMLQuantizationType, quants
    folder, rng = sys.argv[1], np.random.default_rng(int(sys.argv[2]) if len(sys.argv) > 2 else 7)
    os.makedirs(folder, exist_ok=True)
    for name in BLOCKS:
        blocks = random_blocks(name, 3, N_COLS, rng)
        rows = quants.dequantize(blocks, GGMLQuantizationType[name]).astype(np.float32)
        assert rows.shape == (3, N_COLS) and np.isfinite(rows).all()
        np.save(os.path.join(folder, name + '.blocks.npy'), blocks)
        np.save(os.path.join(folder, name + '.rows.npy'), rows)


if __name__ == '__main__':
    main()
