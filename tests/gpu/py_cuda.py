#!/usr/bin/env python3
"""py_cuda.py: the CUDA engine from outside, on a machine with a GPU (`make test-gpu`).

With --compute f32 products are float32. What is left between the CPU engine or a golden file and the device is the
order of sums, and that attention takes queries (and the fused kernels q * scale and p * scale) as float16: 2^-12 of a
score, which a softmax of these models, whose logits spread over 3 to 8, turns into about QUERY of the spread. With
float16 products, the default, each input of a product is off by up to 2^-12 of itself and the errors of three layers
add up like a random walk: PRODUCTS of the spread. Then float16 keys and values differ in their last bit, and where a
code falls on the other side of a rounding the logits of these small random models move by a part of what quantization
moves them: the share of a case's mean distance from a 16-bit cache, FEW_FLIPS and MANY_FLIPS.
"""
import concurrent.futures
import itertools
import json
import os
import struct
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from blackbox import FAMILIES, GOLDEN, bad, case, finish, good, kivi, needs_model, scratch, skip, write  # noqa: E402

F16_MEAN, F16_MAX = 2e-3, 5e-2
KIVI_MEAN = 4e-3
QUERY, PRODUCTS = 1e-3, 2e-3  # mean difference in units of the logits' standard deviation
FEW_FLIPS, MANY_FLIPS = 0.15, 0.4  # of a case's mean distance from a 16-bit cache
BUILT = (64, 80, 96, 128, 256)  # head sizes of the fused kernels


def load(name):
    with open(os.path.join(GOLDEN, name)) as f:
        return json.load(f)


def head_dim(family):
    c = load(f'{family}/config.json')
    return c.get('head_dim') or c['hidden_size'] // c['num_attention_heads']


def check(difference, to_f16, extra, share):
    """extra: what is allowed on top, in logits."""
    mean, worst = np.abs(difference).mean(), np.abs(difference).max()
    assert np.isfinite(worst), 'not finite'
    limit = (KIVI_MEAN + share * to_f16 if to_f16 else F16_MEAN) + extra
    assert mean <= limit, f'mean |difference| {mean:.5f}, expected at most {limit:.5f} (max {worst:.4f})'
    assert to_f16 or worst <= F16_MAX + 10 * extra, f'max |difference| {worst:.5f} (mean {mean:.5f})'
    return f'mean {mean:.6f} max {worst:.5f} limit {limit:.5f} to_f16 {to_f16:.4f}'


# name, options, environment, what is allowed on top in spreads, share of the distance from a 16-bit cache
def ways(dim):
    f32, plain = ['--compute', 'f32'], {'env': {'KIVI_DISABLE': 'fused'}}
    found = [('plain', f32, plain, QUERY, FEW_FLIPS), ('f16', [], {}, PRODUCTS, MANY_FLIPS)]
    return found + ([('fused', f32, {}, QUERY, FEW_FLIPS)] if dim in BUILT else [])


numbers = itertools.count()


def logits(model, tokens, *args, **more):
    """float32 [T][V] of `kivi logits`; several may run at once, each with files of its own."""
    number = next(numbers)
    out = scratch(f'{number}.npy')
    good('logits', model, '--tokens', write(f'{number}.json', [int(t) for t in tokens]), '--out', out, '--threads', 2,
         *args, **more)
    result = np.load(out)
    os.remove(out)
    return result


def cuda(model, tokens, *args, **more):
    return logits(model, tokens, '--device', 'cuda', *args, **more)


# Most of a case's time is a process that starts: several at once. Cases report themselves, so nothing is returned.
AT_ONCE = 8
pool = concurrent.futures.ThreadPoolExecutor(AT_ONCE)
jobs = []


def later(function, *args):
    jobs.append(pool.submit(function, *args))


def say(name, what):
    """The figures behind a case that passed, for whoever reads the log."""
    sys.stdout.write(f'# {name}: {what}\n')
    sys.stdout.flush()


# ---- golden files ----

def golden(family, *options):
    for name, c in load(f'{family}/cases.json')['cases'].items():
        if not isinstance(c, dict):
            continue
        for way in ways(head_dim(family)):
            later(golden_case, family, name, c, way, options)


def golden_case(family, name, c, way, options):
    folder, tokens = os.path.join(GOLDEN, family), load(f'{family}/tokens.json')
    suffix, compute, more, extra, share = way
    with case(f'golden/{family}/{name}/{suffix}'):
        ours = cuda(folder, tokens, '--prompt', c['n_prompt'], '--k-bits', c['k_bits'], '--v-bits', c['v_bits'],
                    '--group', c['group'], '--residual', c['residual'], *options, *compute, **more)
        theirs = np.load(os.path.join(folder, name + '.npy'))
        say(f'golden/{family}/{name}/{suffix}', check(ours[c['positions']] - theirs, c['mean_abs_diff_to_f16'],
                                                      extra * theirs.std(), share))


# ---- the CPU engine ----

# name, family, tokens, options
CPU_CASES = [
    ('f16', 'llama-gqa', 300, ['--kv', 'f16', '--prompt', 200]),
    ('paper', 'llama-gqa', 300, ['--residual', 32, '--prompt', 200]),
    ('paper-chunks', 'llama-gqa', 300, ['--residual', 32, '--prompt', 200, '--prompt-chunk', 48]),
    ('paper-r128', 'llama-gqa', 330, ['--kv', 'kivi2', '--prompt', 150]),
    ('stream', 'llama-gqa', 300, ['--residual', 32, '--rule', 'stream', '--prompt', 200]),
    ('stream-chunks', 'llama-gqa', 300, ['--residual', 32, '--rule', 'stream', '--prompt', 200, '--prompt-chunk', 7]),
    ('span', 'llama-gqa', 300, ['--residual', 32, '--rule', 'span:128', '--prompt', 250]),
    ('span-chunks', 'llama-gqa', 300, ['--residual', 32, '--rule', 'span:128', '--prompt', 250, '--prompt-chunk', 60]),
    ('decode-alone', 'llama-gqa', 300, ['--residual', 32, '--prompt', 0]),
    ('g16', 'llama-gqa', 205, ['--group', 16, '--residual', 48, '--prompt', 140]),
    ('g64', 'llama-gqa', 205, ['--group', 64, '--residual', 64, '--k-bits', 4, '--prompt', 140]),
    ('sinks', 'llama-gqa', 205, ['--residual', 32, '--sinks', 4, '--prompt', 100]),
    ('sinks-33', 'llama-gqa', 205, ['--residual', 32, '--sinks', 33, '--rule', 'stream', '--prompt', 100]),
    ('k16v2', 'llama-gqa', 205, ['--k-bits', 16, '--residual', 32, '--prompt', 100]),
    ('k2v16', 'llama-gqa', 205, ['--v-bits', 16, '--residual', 32, '--prompt', 100, '--sinks', 8]),
    ('k8v4', 'llama-gqa', 205, ['--k-bits', 8, '--v-bits', 4, '--residual', 32, '--prompt', 100]),
    ('window', 'mistral-swa', 330, ['--residual', 32, '--prompt', 200]),
    ('window-chunks', 'mistral-swa', 330, ['--residual', 32, '--prompt', 200, '--prompt-chunk', 33]),
    ('gemma', 'gemma3', 330, ['--residual', 32, '--prompt', 200]),
    ('dynamic', 'dynamic', 330, ['--kv', 'kivi2', '--ctx', 512, '--prompt', 150]),
    ('falcon', 'falcon-gqa', 300, ['--residual', 32, '--prompt', 200]),
]


def against_cpu(name, family, n, options):
    folder, tokens = os.path.join(GOLDEN, family), load(f'{family}/tokens.json')[:n]
    theirs = exact = None
    for suffix, compute, more, extra, share in ways(head_dim(family)):
        with case(f'cpu/{name}/{suffix}'):
            if theirs is None:
                theirs = logits(folder, tokens, '--device', 'cpu', *options)
                exact = logits(folder, tokens, '--device', 'cpu', '--kv', 'f16', '--prompt', 0, '--ctx', 512)
            to_f16 = 0 if name == 'f16' else np.abs(theirs - exact).mean()
            ours = cuda(folder, tokens, *options, *compute, **more)
            say(f'cpu/{name}/{suffix}', check(ours - theirs, to_f16, extra * theirs.std(), share))


def repeats():
    folder, tokens = os.path.join(GOLDEN, 'llama-gqa'), load('llama-gqa/tokens.json')[:250]
    for name, options in (('decode', ['--prompt', 0]), ('prompt', ['--prompt', 200]), ('f16', ['--kv', 'f16'])):
        with case(f'repeat/{name}'):
            first = cuda(folder, tokens, '--residual', 32, *options)
            assert np.isfinite(first).all()
            for _ in range(2):
                assert cuda(folder, tokens, '--residual', 32, *options).tobytes() == first.tobytes()


# Kernels of a step begin while others still run, and only products of many bytes take long enough for one to overtake
# another: two layers of Llama-2-7B's shapes, and what each part does to it.
WIDE = dict(architectures=['LlamaForCausalLM'], model_type='llama', hidden_size=4096, intermediate_size=11008,
            num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000, hidden_act='silu',
            max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0, bos_token_id=1, eos_token_id=2,
            tie_word_embeddings=False, torch_dtype='float16')


def wide_repeats(kv):
    folder = scratch(f'wide-{kv}')
    os.makedirs(folder, exist_ok=True)
    write(f'wide-{kv}/config.json', WIDE)
    tokens = [int(t) for t in np.random.default_rng(7).integers(3, 32000, 420)]
    for part in ('', 'append', 'close', 'norms', 'stream', 'fused'):
        with case(f'repeat/wide-{kv}' + (f'-without-{part}' if part else '')):
            runs = [cuda(folder, tokens, '--dummy-weights', 1, '--dummy-type', 'f16', '--kv', kv, '--prompt', 140,
                         '--ctx', 512, env={'KIVI_DISABLE': part} if part else {}) for _ in range(2)]
            assert np.isfinite(runs[0]).all()
            apart = runs[0] != runs[1]
            rows = np.flatnonzero(apart.any(-1))
            assert not len(rows), (f'rows {rows[:8]} of {len(rows)} differ in {apart[rows[:8]].sum(-1)} places, by at '
                                   f'most {np.abs(runs[0] - runs[1]).max()}')


# ---- parts of the engine that can be left out ----

def parts(kv):
    """Without a part the bits are the same where it changes no sum, and near where it does."""
    folder, tokens = os.path.join(GOLDEN, 'llama-gqa'), load('llama-gqa/tokens.json')[:300]
    base = None
    for part in ('close', 'append', 'stream', 'norms', 'stream,ranking', 'close,stream'):
        with case(f'without/{part}/{kv}'):
            if base is None:
                base = cuda(folder, tokens, '--kv', kv, '--prompt', 100)
            ours = cuda(folder, tokens, '--kv', kv, '--prompt', 100, env={'KIVI_DISABLE': part})
            if part in ('close', 'append'):
                assert ours.tobytes() == base.tobytes(), f'mean |difference| {np.abs(ours - base).mean():.6f}'
            else:
                say(f'without/{part}/{kv}', check(ours - base, 0 if kv == 'f16' else 0.3 * base.std(),
                                                  PRODUCTS * base.std(), FEW_FLIPS))


# ---- weight types: a model of random blocks ----

def fields(dtype, rng, n):
    """n random blocks of a type with scales that keep a product's result near 1."""
    spec = {'Q4_0': (2, 18, 32, [0]), 'Q4_1': (3, 20, 32, [0, 2]), 'Q5_0': (6, 22, 32, [0]),
            'Q5_1': (7, 24, 32, [0, 2]), 'Q8_0': (8, 34, 32, [0]), 'Q2_K': (10, 84, 256, [80, 82]),
            'Q3_K': (11, 110, 256, [108]),
            'Q4_K': (12, 144, 256, [0, 2]), 'Q5_K': (13, 176, 256, [0, 2]), 'Q6_K': (14, 210, 256, [208])}
    number, n_bytes, cols, halves = spec[dtype]
    peak = {'Q4_0': 8, 'Q4_1': 15, 'Q5_0': 16, 'Q5_1': 31, 'Q8_0': 128, 'Q2_K': 45, 'Q3_K': 128, 'Q4_K': 945,
            'Q5_K': 1953, 'Q6_K': 4096}[dtype]
    blocks = rng.integers(0, 256, (n // cols, n_bytes), dtype=np.uint8)
    for i, at in enumerate(halves):
        value = np.float16(0.1 / peak) if i == 0 else np.float16(-0.05 if '_1' in dtype else 0.05 / 63)
        blocks[:, at:at + 2] = np.frombuffer(value.tobytes(), np.uint8)
    return number, blocks.tobytes()


def random_gguf(path, dtype):
    rng = np.random.default_rng(5)
    n, ff, vocab = 256, 512, 256
    shapes = {'token_embd': (vocab, n), 'output': (vocab, n), 'blk.0.attn_q': (n, n), 'blk.0.attn_k': (n, n),
              'blk.0.attn_v': (n, n), 'blk.0.attn_output': (n, n), 'blk.0.ffn_gate': (ff, n), 'blk.0.ffn_up': (ff, n),
              'blk.0.ffn_down': (n, ff)}
    tensors = {k + '.weight': (s, *fields(dtype, rng, s[0] * s[1])) for k, s in shapes.items()}
    for k in ('output_norm', 'blk.0.attn_norm', 'blk.0.ffn_norm'):
        tensors[k + '.weight'] = ((n,), 0, np.ones(n, np.float32).tobytes())
    kvs = {'general.architecture': 'llama', 'llama.block_count': 1, 'llama.embedding_length': n,
           'llama.feed_forward_length': ff, 'llama.attention.head_count': 4, 'llama.attention.head_count_kv': 4,
           'llama.context_length': 512, 'llama.vocab_size': vocab, 'llama.attention.layer_norm_rms_epsilon': 1e-5}

    def text(s):
        return struct.pack('<Q', len(s)) + s.encode()

    def value(v):
        if isinstance(v, str):
            return struct.pack('<I', 8) + text(v)
        return struct.pack('<If', 6, v) if isinstance(v, float) else struct.pack('<II', 4, v)
    head = b'GGUF' + struct.pack('<IQQ', 3, len(tensors), len(kvs))
    head += b''.join(text(k) + value(v) for k, v in kvs.items())
    body = b''
    for k, (shape, number, data) in tensors.items():
        head += text(k) + struct.pack(f'<I{len(shape)}Q', len(shape), *reversed(shape))
        head += struct.pack('<IQ', number, len(body))
        body += data + bytes(-len(data) % 32)
    with open(path, 'wb') as f:
        f.write(head + bytes(-len(head) % 32) + body)


def weight_types():
    tokens = [int(t) for t in np.random.default_rng(6).integers(0, 256, 40)]
    for dtype in ('Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K'):
        with case(f'weights/{dtype}'):
            path = scratch(f'{dtype}.gguf')
            random_gguf(path, dtype)
            theirs = logits(path, tokens, '--device', 'cpu', '--kv', 'f16')
            assert theirs.std() > 0.05, f'the model says nothing: spread {theirs.std():.4f}'
            ours = cuda(path, tokens, '--kv', 'f16')
            say(f'weights/{dtype}', check(ours - theirs, 0, PRODUCTS * theirs.std(), MANY_FLIPS))


# ---- the command ----

def command():
    model = os.path.join(GOLDEN, 'llama-gqa')
    tokens = write('few.json', load('llama-gqa/tokens.json')[:20])
    with case('command/info'):
        memory = json.loads(good('info', model, '--device', 'cuda', '--json').out)['memory_plan'][0]['bytes']
        assert memory['weights'] > 0 and memory['workspace'] > 0, memory
    with case('command/auto-is-cuda'):
        assert 'device cuda:0' in good('info', model, '--device', 'auto').errors
    with case('command/device-that-is-not-there'):
        result = kivi('info', model, '--device', 'cuda:77')
        assert result.code == 4 and 'cuda:77' in result.errors, result
    with case('command/gpu-memory'):
        result = kivi('logits', model, '--tokens', tokens, '--out', scratch('x.npy'), '--device', 'cuda',
                      '--gpu-memory', 20)
        assert result.code == 4 and '20' in result.errors, result
    with case('command/bench'):
        rows = json.loads(good('bench', model, '--device', 'cuda', '-p', 64, '-n', 16, '-b', '1,5', '-r', 2, '--kv',
                               'kivi2,f16', '-o', 'json').out)
        assert len(rows) >= 4 and all(r['avg_ts'] > 0 for r in rows), rows
    with case('command/bench-attention'):
        args = ('bench', 'attention', '--device', 'cuda', '--kv', 'kivi2,kivi2+,f16', '-b', '1,3', '-H', '8/2', '-d',
                512, '-r', 3)
        rows = json.loads(good(*args, '-o', 'json').out)
        assert all(r['us'] > 0 and r['device'].startswith('cuda:0') for r in rows), rows
        theirs = sorted(r['kv'] for r in rows if r['kv'].startswith('cudnn'))  # where cuDNN is
        assert theirs in ([], ['cudnn', 'cudnn-exact']), theirs
        seen = sorted((r['what'], r['kv'], r['n_batch'], r['residual']) for r in rows
                      if r['what'] != 'length' and r['kv'] not in theirs)
        kinds, batches = ('kivi2', 'kivi2+', 'f16'), (1, 3)
        assert seen == sorted(
            [('read', '', 0, 0), ('copy', '', 0, 0), ('prompt', '', 1, 0)] +
            [(w, kv, b, 0) for w in ('decode', 'constant') for kv in kinds for b in batches] +
            [('window', kv, b, r) for kv, r in (('kivi2', 128), ('kivi2', 32), ('kivi2+', 128)) for b in batches] +
            [('append', kv, b, 0 if kv == 'f16' else 128) for kv in kinds for b in batches] +
            [(w, kv, b, 128) for w in ('within', 'close') for kv in ('kivi2', 'kivi2+') for b in batches]), seen
        lengths = [(r['n_batch'], r['n_tokens']) for r in rows if r['what'] == 'length']
        assert lengths == [(b, 128 << i) for b in batches for i in range(11)], lengths
        shares = [r['read_share'] for r in rows if r['what'] == 'decode']
        assert all(0 < s < 3 for s in shares), shares  # small ones are in the L2 cache
        table = good(*args, '--measure', 'append', '--no-pdl').text
        assert table.count('| append ') == 6 and 'plain launches' in table, table
    with case('command/bf16'):
        full = logits(model, load('llama-gqa/tokens.json')[:60], '--device', 'cpu', '--kv', 'f16')
        ours = cuda(model, load('llama-gqa/tokens.json')[:60], '--kv', 'f16', '--compute', 'bf16')
        mean = np.abs(ours - full).mean()
        assert 1e-4 < mean < 8 * PRODUCTS * full.std(), f'mean |difference| {mean:.5f}'  # 3 bits fewer
    with case('command/compute-that-is-not-there'):
        bad(2, 'info', model, '--device', 'cuda', '--compute', 'f8', says='f8')


def smollm2():
    with case('smollm2/run'):
        result = good('run', needs_model(), '-p', 'The capital of France is', '-n', 4, '--temp', 0, '--ctx', 256,
                      '--device', 'cuda')
        assert result.text.startswith(' Paris'), result
    with case('smollm2/sampled-as-on-the-cpu'):
        texts = [good('run', needs_model(), '-p', 'Once upon a time', '-n', 24, '--seed', 7, '--ctx', 256, '--device',
                      device).text for device in ('cpu', 'cuda')]
        assert texts[0][:20] == texts[1][:20], texts
    for kv in ('f16', 'kivi2'):
        with case(f'smollm2/as-on-the-cpu-{kv}'):
            ids = [p['ids'] for p in load('smollm2.json')['prompts'] if 'positions' in p]
            ids = [int(i) for text in ids for i in text]
            assert len(ids) > 150, len(ids)
            theirs = logits(needs_model(), ids, '--device', 'cpu', '--kv', kv, '--prompt', 100, '--ctx', 512)
            ours = cuda(needs_model(), ids, '--kv', kv, '--prompt', 100, '--ctx', 512)
            mean = np.abs(ours - theirs).mean()
            say(f'smollm2/{kv}', f'mean {mean:.5f} max {np.abs(ours - theirs).max():.4f} spread {theirs.std():.3f}')
            assert mean <= (0.02 if kv == 'f16' else 0.1), f'mean |difference| {mean:.5f}'


found = kivi('info', os.path.join(GOLDEN, 'llama-gqa'), '--device', 'cuda')
if found.code == 4:
    with case('cuda'):
        skip(found.errors.strip())
    finish()
for family, *options in FAMILIES:
    golden(family, *options)
for one in CPU_CASES:
    later(against_cpu, *one)
for kv in ('kivi2', 'kivi2+', 'f16'):
    later(parts, kv)
later(repeats)
for kv in ('kivi2', 'kivi2+', 'f16'):
    later(wide_repeats, kv)
later(weight_types)
later(command)
later(smollm2)
for job in jobs:
    job.result()
finish()
