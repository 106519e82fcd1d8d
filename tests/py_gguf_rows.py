#!/usr/bin/env python3
"""py_gguf_rows.py: rows of every GGUF type, bit for bit, against the dequantizer of the PyPI package `gguf`.

golden/gguf_rows/ has blocks and rows made by that package (golden/make_gguf_rows.py), so that this needs numpy only;
with the package installed fresh random blocks are compared as well (seed: KIVI_TEST_SEED). kivi's side is
build/gguf_rows, which loads a file, packs its matrices into tiles and reads the rows back. Products are the business of
check-kernels; here a model of all types at once is compared with the same numbers stored as F32.
"""
import json
import os
import struct
import subprocess
import sys

import numpy as np

from blackbox import GOLDEN, KIVI, ROOT, bad, case, finish, good, logits, scratch, skip, write

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), 'golden'))
from make_gguf_rows import BLOCKS, random_blocks  # noqa: E402

ROWS = os.path.join(os.path.dirname(KIVI), 'gguf_rows')
TYPES = {'F32': 0, 'F16': 1, 'Q4_0': 2, 'Q4_1': 3, 'Q5_0': 6, 'Q5_1': 7, 'Q8_0': 8, 'Q2_K': 10, 'Q3_K': 11, 'Q4_K': 12,
         'Q5_K': 13, 'Q6_K': 14, 'BF16': 30}
# ggml's other types, with columns and bytes of a block
OTHERS = {'Q8_1': (9, 32, 36), 'Q8_K': (15, 256, 292), 'IQ2_XXS': (16, 256, 66), 'IQ2_XS': (17, 256, 74),
          'IQ3_XXS': (18, 256, 98), 'IQ1_S': (19, 256, 50), 'IQ4_NL': (20, 32, 18), 'IQ3_S': (21, 256, 110),
          'IQ2_S': (22, 256, 82), 'IQ4_XS': (23, 256, 136), 'IQ1_M': (29, 256, 56), 'TQ1_0': (34, 256, 54),
          'TQ2_0': (35, 256, 66), 'MXFP4': (39, 32, 17)}
SEED = int(os.environ.get('KIVI_TEST_SEED') or np.random.SeedSequence().entropy % 2 ** 32)


# ---- files ----

def text(s):
    return struct.pack('<Q', len(s)) + s.encode()


def key(name, value):
    if isinstance(value, int):
        return text(name) + struct.pack('<II', 4, value)
    if isinstance(value, float):
        return text(name) + struct.pack('<If', 6, value)
    return text(name) + struct.pack('<I', 8) + text(value)


def gguf(name, keys, tensors):
    """The path of a GGUF file. tensors: name -> (type number, shape, bytes)"""
    out = b'GGUF' + struct.pack('<IQQ', 3, len(tensors), len(keys)) + b''.join(key(*kv) for kv in keys.items())
    body = b''
    for tensor, (number, shape, data) in tensors.items():
        out += text(tensor) + struct.pack(f'<I{len(shape)}QIQ', len(shape), *reversed(shape), number, len(body))
        body += data + bytes(-len(data) % 32)
    return write(name, out + bytes(-len(out) % 32) + body)


def rows_of(path, n_cols):
    """What kivi reads: float32 [rows][n_cols]."""
    if not os.access(ROWS, os.X_OK):
        raise AssertionError(f'{ROWS} is not there: make tests')
    done = subprocess.run([ROWS, path, scratch('rows')], capture_output=True, text=True)
    assert done.returncode == 0, f'gguf_rows: exit {done.returncode}, {done.stderr}'
    return np.fromfile(scratch('rows'), np.float32).reshape(-1, n_cols)


def compare(name, blocks, theirs):
    ours = rows_of(gguf('rows.gguf', {'general.architecture': 'llama'},
                        {'t': (TYPES[name], theirs.shape, blocks.tobytes())}), theirs.shape[1])
    assert ours.shape == theirs.shape, f'{ours.shape}, expected {theirs.shape}'
    wrong = np.argwhere(ours != theirs)  # products are exact and there is one rounding on both sides: no tolerance
    assert not len(wrong), (f'{len(wrong)} of {ours.size} differ, first at {wrong[0]}: {ours[tuple(wrong[0])]!r}, '
                            f'expected {theirs[tuple(wrong[0])]!r}')


# ---- rows ----

def golden():
    for name in TYPES:
        with case(f'golden/{name}'):
            blocks, theirs = (np.load(os.path.join(GOLDEN, 'gguf_rows', f'{name}.{part}.npy'))
                              for part in ('blocks', 'rows'))
            assert theirs.dtype == np.float32 and blocks.dtype == np.uint8 and np.abs(theirs).max() > 0
            compare(name, blocks, theirs)


def package():
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        quants = None
    for name in TYPES:
        with case(f'package/{name}'):
            if not quants:
                skip('the Python package gguf is not installed')
            blocks = random_blocks(name, 37, 1024, np.random.default_rng(SEED))
            theirs = quants.dequantize(blocks, GGMLQuantizationType[name]).astype(np.float32)
            try:
                compare(name, blocks, theirs)
            except AssertionError as e:
                raise AssertionError(f'seed {SEED}: {e}')


# ---- a model of all types ----

# a block's first float16 number for weights of a deviation near 1/16, and the second one over it: then their mean is 0
UNITS = {'Q4_0': (.0135, 0), 'Q4_1': (.0135, -7.5), 'Q5_0': (.0068, 0), 'Q5_1': (.0068, -15.5), 'Q8_0': (.0008, 0),
         'Q2_K': (.005, 1.5), 'Q3_K': (.0014, 0), 'Q4_K': (.00025, 7.5), 'Q5_K': (.00012, 15.5), 'Q6_K': (4.4e-5, 0)}
WIDTH, FF, HEADS, KV_HEADS, VOCAB, N = 256, 512, 4, 2, 96, 40
SHAPES = {'attn_q': (WIDTH, WIDTH), 'attn_k': (WIDTH // 2, WIDTH), 'attn_v': (WIDTH // 2, WIDTH),
          'attn_output': (WIDTH, WIDTH), 'ffn_gate': (FF, WIDTH), 'ffn_up': (FF, WIDTH), 'ffn_down': (WIDTH, FF)}
NAMES = {'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
         'attn_output': 'self_attn.o_proj', 'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj',
         'ffn_down': 'mlp.down_proj'}


def weights(name, shape, rng):
    cols, n_bytes, halves = BLOCKS[name]
    blocks = random_blocks(name, shape[0] + 1, shape[1], rng)[:-1].reshape(shape[0], -1, n_bytes)
    for at, unit in zip(halves, (UNITS[name][0], UNITS[name][0] * UNITS[name][1])):
        numbers = np.full(blocks.shape[:2] + (1,), unit).astype('<f2')
        blocks[:, :, at:at + 2] = numbers.view(np.uint8)
    return TYPES[name], shape, blocks.tobytes()


def mixed(rng):
    types = list(UNITS) * 2  # 14 matrices of two layers, the embedding and the output
    tensors = {'token_embd.weight': weights('Q5_K', (VOCAB, WIDTH), rng),
               'output.weight': weights('Q6_K', (VOCAB, WIDTH), rng)}
    for layer in range(2):
        for part, shape in SHAPES.items():
            tensors[f'blk.{layer}.{part}.weight'] = weights(types.pop(0), shape, rng)
        for part in ('attn_norm', 'ffn_norm'):
            tensors[f'blk.{layer}.{part}.weight'] = 0, (WIDTH,), np.ones(WIDTH, np.float32).tobytes()
    tensors['output_norm.weight'] = 0, (WIDTH,), np.ones(WIDTH, np.float32).tobytes()
    return tensors


KEYS = {'general.architecture': 'llama', 'llama.block_count': 2, 'llama.embedding_length': WIDTH,
        'llama.context_length': 256, 'llama.feed_forward_length': FF, 'llama.attention.head_count': HEADS,
        'llama.attention.head_count_kv': KV_HEADS, 'llama.attention.layer_norm_rms_epsilon': 1e-5,
        'llama.rope.freq_base': 10000.0}


def as_folder(tensors):
    """The same numbers as F32, in a folder: q and k rows of a head in two halves, not in pairs."""
    folder, header, body = scratch('mixed'), {}, b''
    os.makedirs(folder, exist_ok=True)
    for name, (number, shape, data) in tensors.items():
        if len(shape) == 2:
            x = rows_of(gguf('one.gguf', {}, {name: (number, shape, data)}), shape[1])
            if 'attn_q' in name or 'attn_k' in name:
                x = x.reshape(-1, 32, 2, WIDTH).swapaxes(1, 2)
            data = np.ascontiguousarray(x).tobytes()
        parts = name.split('.')
        if parts[0] == 'blk':
            part = {'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm', **NAMES}[parts[2]]
            name = f'model.layers.{parts[1]}.{part}.weight'
        name = {'token_embd.weight': 'model.embed_tokens.weight', 'output.weight': 'lm_head.weight',
                'output_norm.weight': 'model.norm.weight'}.get(name, name)
        header[name] = {'dtype': 'F32', 'shape': shape, 'data_offsets': [len(body), len(body) + len(data)]}
        body += data
    head = json.dumps(header).encode()
    with open(os.path.join(folder, 'model.safetensors'), 'wb') as f:
        f.write(struct.pack('<Q', len(head)) + head + body)
    with open(os.path.join(folder, 'config.json'), 'w') as f:
        json.dump({'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'hidden_size': WIDTH,
                   'intermediate_size': FF, 'num_hidden_layers': 2, 'num_attention_heads': HEADS,
                   'num_key_value_heads': KV_HEADS, 'vocab_size': VOCAB, 'max_position_embeddings': 256,
                   'rms_norm_eps': 1e-5, 'rope_theta': 10000.0, 'hidden_act': 'silu', 'tie_word_embeddings': False}, f)
    return folder


def model():
    tensors = mixed(np.random.default_rng(5))
    path = gguf('mixed.gguf', KEYS, tensors)
    tokens = np.random.default_rng(6).integers(0, VOCAB, N)
    ours = None
    with case('model/as-f32'):
        ours = logits(path, tokens, '--kv', 'f16')
        theirs = logits(as_folder(tensors), tokens, '--kv', 'f16', name='f32.npy')
        # An activation is off by at most 2^-15 of the largest of its 32, about 2^-13 of the typical one; errors of a
        # row are independent, so a product is off by 2^-13 / sqrt 3 of its size, 7e-5, and some ten products add to
        # 3e-4. Values of float16 in the cache may round the other way: 5e-4 of their size. Together below 2e-3 of the
        # deviation, in the mean. A wrong column or scale is as large as the logits.
        off = np.abs(ours - theirs).mean() / theirs.std()
        assert theirs.std() > 0.1 and np.isfinite(theirs).all(), f'deviation {theirs.std()}'
        assert off < 2e-3, f'mean difference {off:.5f} of the deviation'
    with case('model/every-instruction-set'):
        for left_out in ('avx512vnni', 'avx512vnni,avx512', 'avx512vnni,avx512,avx2'):
            again = logits(path, tokens, '--kv', 'f16', env={'KIVI_DISABLE': left_out}, name='again.npy')
            assert again.tobytes() == ours.tobytes(), f'other bytes without {left_out}'
    with case('model/info'):
        good('info', path)


# ---- what is refused ----

def refused():
    for name, (number, cols, n_bytes) in OTHERS.items():
        with case(f'refused/{name}'):
            path = gguf('other.gguf', KEYS, {'blk.0.attn_q.weight': (number, (2, cols), bytes(2 * n_bytes))})
            bad(3, 'info', path, says=f'tensor blk.0.attn_q.weight: type {name} ({number}) not supported (F32 F16')
    for name, (cols, n_bytes, _) in BLOCKS.items():
        if cols == 1:
            continue
        with case(f'columns/{name}'):
            for n_cols in (cols // 2, cols + 16, 2 * cols - 1):
                tensor = TYPES[name], (2, n_cols), bytes(4 * n_bytes)
                path = gguf('columns.gguf', KEYS, {'blk.0.attn_q.weight': tensor})
                bad(3, 'info', path, says=f'tensor blk.0.attn_q.weight: rows of {n_cols} elements, {name} needs a '
                                          f'multiple of {cols}')
            path = gguf('short.gguf', KEYS, {'blk.0.attn_q.weight': (TYPES[name], (3, 2 * cols), bytes(3 * n_bytes))})
            bad(3, 'info', path, says='blk.0.attn_q.weight')


def terms():
    """A model under terms of use is fetched only when they are accepted in so many words."""
    fetch, flag = os.path.join(ROOT, 'tools', 'fetch_model.sh'), '--accept-gemma-terms'
    env = {**os.environ, 'KIVI_CACHE_DIR': scratch('cache')}
    with case('fetch/terms'):
        for args in (['gemma3-270m'], ['gemma3-270m', '--accept'], ['gemma3-270m', flag, 'x'], ['smollm2', flag]):
            done = subprocess.run([fetch, *args], capture_output=True, text=True, env=env, timeout=60)
            assert done.returncode == 2 and not done.stdout and done.stderr.count('\n') == 1, (args, done)
            assert args[0] == 'smollm2' or flag in done.stderr, (args, done.stderr)
            assert len(args) > 1 or 'Gemma Terms of Use' in done.stderr, done.stderr
            assert not os.path.exists(scratch('cache')), f'{args}: something was made in the cache folder'
    with case('fetch/never-by-itself'):
        for script in ('run.sh', 'test.sh', 'deps.sh'):
            with open(os.path.join(ROOT, 'tools', script)) as f:
                assert 'gemma' not in f.read(), script


print(f'seed {SEED}')
golden()
package()
model()
refused()
terms()
finish()
