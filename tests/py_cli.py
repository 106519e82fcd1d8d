#!/usr/bin/env python3
"""py_cli.py: the commands of kivi as a user meets them: what they accept, print and refuse, and how they end. The
exit codes (DESIGN.md section 8): 0 ok, 2 usage or configuration, 3 bad model file, 4 out of memory, disk or device,
5 I/O. Every refusal is one line `kivi: error: ...` on stderr and nothing on stdout; nothing ends by a signal.
"""
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import time

import numpy as np

from blackbox import (CLEAN, GOLDEN, KIVI, SCRATCH, UNDER, bad, case, describe, finish, good, kivi, needs_model,
                      scratch, start, write)

GQA = os.path.join(GOLDEN, 'llama-gqa')  # a Hugging Face folder without a vocabulary
IDS = json.load(open(os.path.join(GQA, 'tokens.json')))[:150]
TAGS = ['weights', 'kv_codes', 'kv_scales', 'kv_residual', 'activations', 'workspace', 'other']


def run(*args, **more):
    """A short greedy run of the real model; later options win."""
    return good('run', needs_model(), '--ctx', 512, '--temp', 0, '-n', 12, *args, **more)


def logits_args(tokens=None, out='out.npy'):
    return ['logits', GQA, '--tokens', write('ids.json', IDS if tokens is None else tokens), '--out', scratch(out)]


def refused(group, *cases):
    """Each case is (name, exit code, words of the message or None, arguments)."""
    for name, code, says, args in cases:
        with case(f'{group}/{name}'):
            bad(code, *args, says=says, timeout=20)


# ---- usage ----

def usage():
    with case('usage/help'):
        listing = good('--help').text
        for command in ('run', 'info', 'logits', 'bench'):
            assert command in listing, listing
            assert f'usage: kivi {command} MODEL' in good(command, '--help').text
        assert good('help').text == listing
        assert re.fullmatch(r'kivi \d+\.\d+\.\d+\n', good('--version').text)
        assert good('run', '--help').err == b''
    with case('usage/no-arguments'):
        result = kivi()
        assert result.code == 2 and result.out == b'' and 'usage:' in result.errors, result
    refused(
        'usage',
        ('unknown-command', 2, "'walk'", ['walk', GQA]),
        ('command-not-built', 2, 'study', ['study', GQA]),
        ('no-model', 2, 'MODEL', ['info']),
        ('two-models', 2, None, ['info', GQA, os.path.join(GOLDEN, 'llama')]),
        ('unknown-option', 2, '--nothing', ['info', GQA, '--nothing']),
        ('unknown-short-option', 2, '-Z', ['info', GQA, '-Z']),
        ('option-of-another-command', 2, '--seed', ['info', GQA, '--seed', '1']),
        ('option-cut-short', 2, '--thread', ['info', GQA, '--thread', '1']),
        ('no-value', 2, '--threads', ['info', GQA, '--threads']),
        ('no-tokens', 2, '--tokens', ['logits', GQA]),
        ('no-out', 2, '--out', ['logits', GQA, '--tokens', write('ids.json', IDS)]),
    )
    for value in ('4x', '-1', '1e9', '', ' 4', '+4', '0x4', '99999999999999999999999', '4,4', 'NaN'):
        for option in ('--threads', '--ctx', '--residual'):
            if option == '--threads' or not UNDER:
                refused('value', (f'{option[2:]}={value!r}', 2, option, ['info', GQA, f'{option}={value}']))
    refused(
        'value',
        ('threads-0', 2, '--threads', ['info', GQA, '--threads', '0']),
        ('ctx-0', 2, '--ctx', ['info', GQA, '--ctx', '0']),
        ('temp-nan', 2, '--temp', ['run', GQA, '--temp', 'nan']),
        ('temp-negative', 2, '--temp', ['run', GQA, '--temp', '-1']),
        ('temp-1e308', 2, '--temp', ['run', GQA, '--temp', '1e308']),
        ('temp-junk', 2, '--temp', ['run', GQA, '--temp', '0.5x']),
        ('top-p-0', 2, '--top-p', ['run', GQA, '--top-p', '0']),
        ('top-p-2', 2, '--top-p', ['run', GQA, '--top-p', '2']),
        ('min-p-2', 2, '--min-p', ['run', GQA, '--min-p', '2']),
        ('penalty-0', 2, '--repeat-penalty', ['run', GQA, '--repeat-penalty', '0']),
        ('seed-junk', 2, '--seed', ['run', GQA, '--seed', '1x']),
        ('n-2^32', 2, '-n', ['run', GQA, '-n', '4294967296']),
        ('stats', 2, '--stats', ['run', GQA, '--stats', 'yaml']),
        ('device-cuda-255', 4, 'cuda:255', ['info', GQA, '--device', 'cuda:255']),
        *[('device-' + name, 2, 'cuda:N', ['info', GQA, '--device', name])
          for name in ('gpu', 'cuda:', 'cuda:x', 'cuda:-1', 'cuda:256', 'cuda:1234', 'CUDA', 'cpu:0')],
        ('compute-of-a-cpu', 2, 'compute_type', ['info', GQA, '--device', 'cpu', '--compute', 'bf16']),
        ('gpu-memory-of-a-cpu', 2, 'gpu_memory', ['info', GQA, '--device', 'cpu', '--gpu-memory', '64']),
        ('gpu-memory-0', 2, '--gpu-memory', ['info', GQA, '--gpu-memory', '0']),
        ('prompt-chunk-0', 2, '--prompt-chunk', [*logits_args(), '--prompt-chunk', '0']),
        ('run-prompt-chunk-0', 2, '--prompt-chunk', ['run', GQA, '--prompt-chunk', '0']),
        ('prompt-over-tokens', 2, '151', [*logits_args(), '--prompt', '151']),
        ('rope-freq', 2, 'f8', [*logits_args(), '--rope-freq', 'f8']),
    )
    with case('usage/both-spellings-of-a-value'):
        assert good('info', GQA, '--ctx=256', '--json').out == good('info', '--json', '-c', 256, '-m', GQA).out
    with case('usage/device-library-that-is-none'):
        folder = scratch('own')
        os.mkdir(folder)
        shutil.copy(KIVI, folder)
        with open(os.path.join(folder, 'libkivi-cuda.so'), 'w') as f:
            f.write('no library')
        own = os.path.join(folder, os.path.basename(KIVI))
        run = [subprocess.run([own, 'info', GQA, '--device', d], capture_output=True, text=True, env=CLEAN)
               for d in ('cuda', 'auto')]
        assert run[0].returncode == 4 and 'libkivi-cuda.so' in run[0].stderr and run[0].stdout == '', run[0]
        assert run[0].stderr.count('\n') == 1, run[0]
        assert run[1].returncode == 0 and 'device cpu (' in run[1].stderr and run[1].stderr.count('\n') == 1, run[1]
    with case('usage/device-cpu-and-auto'):
        assert good('info', GQA, '--device', 'cpu').out == good('info', GQA, '--device=auto').out


def cache_kinds():
    refused(
        'kv',
        ('unknown', 2, "'kivi3'", ['info', GQA, '--kv', 'kivi3']),
        ('unknown-plus', 2, 'kivi2+, k4v2+ or k4v3+', ['info', GQA, '--kv', 'kivi4+']),
        ('plus-group', 2, 'key groups of a page (128)', ['info', GQA, '--kv', 'kivi2+', '--group', '32']),
        ('plus-residual', 2, 'multiple of the page (128)', ['info', GQA, '--kv', 'k4v3+', '--residual', '64']),
        ('plus-k-bits', 2, 'expected 2, 4 or 16', ['info', GQA, '--kv', 'kivi2+', '--k-bits', '8']),
        ('plus-v-bits', 2, 'expected 2, 3 or 16', ['info', GQA, '--kv', 'kivi2+', '--v-bits', '4']),
        ('plus-in-a-list', 2, 'key groups of a page', ['info', GQA, '--kv', 'f16,kivi2+', '--group', '32']),
        ('parts', 2, "'wild', expected wide", ['info', GQA, '--kv', 'kivi2+', '--parts', 'fit,wild']),
        ('parts-zero-and-step', 2, '(zero) have no step', ['info', GQA, '--kv', 'kivi2+', '--parts', 'zero,step']),
        ('parts-k32-and-group', 2, 'of 32 by part k32',
         ['info', GQA, '--kv', 'kivi2+', '--parts', 'k32', '--group', '128']),
        ('parts-empty', 2, '--parts', ['info', GQA, '--kv', 'kivi2+', '--parts=']),
        ('parts-of-a-plain-kind', 2, 'kivi2 is no + kind', ['info', GQA, '--kv', 'kivi2', '--parts', 'all']),
        ('unknown-in-run', 2, "'q4'", ['run', GQA, '-p', 'a', '--kv', 'q4']),
        ('empty', 2, '--kv', ['info', GQA, '--kv=']),
        ('empty-in-list', 2, '--kv', ['info', GQA, '--kv', 'f16,,kivi2']),
        ('list-where-one-is-meant', 2, '--kv', [*logits_args(), '--kv', 'f16,kivi2']),
        ('bits-3', 2, '2, 4, 8 or 16', ['info', GQA, '--k-bits', '3']),
        ('v-bits-9', 2, '2, 4, 8 or 16', ['info', GQA, '--v-bits', '9']),
        ('bits-0', 2, '--k-bits', ['info', GQA, '--k-bits', '0']),
        ('group-7', 2, 'expected one of 16, 32, 64', ['info', GQA, '--kv', 'kivi2', '--group', '7']),
        ('group-over-head', 2, 'expected one of 16, 32', [*logits_args(), '--group', '128']),
        ('residual-not-multiple', 2, 'multiple of the group', [*logits_args(), '--residual', '100']),
        ('residual-0', 2, '--residual', [*logits_args(), '--residual', '0']),
        ('residual-large', 2, '4096', [*logits_args(), '--residual', '8192']),
        ('sinks', 2, 'up to 4096', [*logits_args(), '--sinks', '4097']),
        ('rule', 2, 'paper, stream or span:N', [*logits_args(), '--rule', 'best']),
        ('rule-span-junk', 2, 'paper, stream or span:N', [*logits_args(), '--rule', 'span:x']),
        ('rule-span-0', 2, None, [*logits_args(), '--rule', 'span:0']),
        ('rule-span-100', 2, 'multiple of the page (128)', [*logits_args(), '--rule', 'span:100']),
        ('ctk', 2, "'q3_k'", ['info', GQA, '-ctk', 'q3_k']),
    )
    with case('kv/llama.cpp-spelling'):
        one = json.loads(good('info', GQA, '--json', '--kv', 'kivi2', '-ctk', 'q4_0', '-ctv', 'q8_0').text)
        two = json.loads(good('info', GQA, '--json', '--kv', 'kivi2', '--k-bits', 4, '--v-bits', 8).text)
        assert one == two


# ---- models that are none ----

def fifo():
    path = scratch('fifo')
    if not os.path.exists(path):
        os.mkfifo(path)
    return path


def folder(name, config=None, weights=None):
    """A copy of the golden model with another config.json or other weights; None keeps, False leaves out."""
    path = scratch(name)
    os.makedirs(path, exist_ok=True)
    for file, new in (('config.json', config), ('model.safetensors', weights)):
        if new is False:
            continue
        with open(os.path.join(GQA, file), 'rb') as f:
            old = f.read()
        if callable(new):
            new = new(json.loads(old) if file == 'config.json' else old)
        if isinstance(new, dict):
            new = json.dumps(new).encode()
        with open(os.path.join(path, file), 'wb') as f:
            f.write(old if new is None else new)
    return path


def bad_models():
    gguf = b'GGUF' + struct.pack('<I', 3)
    ids = write('ids.json', IDS)
    for command in (['run', '-p', 'a'], ['info'], ['logits', '--tokens', ids, '--out', scratch('x')]):
        for name, code, path in (
                ('missing', 5, scratch('nothing.gguf')),
                ('missing-folder', 5, scratch('nothing/at/all')),
                ('directory', 3, SCRATCH),
                ('fifo', 3, fifo()),
                ('dev-zero', 3, '/dev/zero'),
                ('empty', 3, write('empty.gguf', b''))):
            refused('model', (f'{name}-{command[0]}', code, path, [command[0], path, *command[1:]]))
    for name, data in (
            ('one-byte', b'G'), ('magic-alone', b'GGUF'), ('wrong-magic', b'GGML' + bytes(100)),
            ('text', b'The quick brown fox jumps over the lazy dog. ' * 9), ('zeros', bytes(4096)),
            ('version-0', b'GGUF' + struct.pack('<IQQ', 0, 0, 0)),
            ('version-1', b'GGUF' + struct.pack('<IQQ', 1, 0, 0)),
            ('version-99', b'GGUF' + struct.pack('<IQQ', 99, 0, 0)),
            ('big-endian', b'GGUF' + struct.pack('>IQQ', 3, 0, 0)), ('no-content', gguf + struct.pack('<QQ', 0, 0)),
            ('tensors-2^64-1', gguf + struct.pack('<QQ', 2 ** 64 - 1, 0) + bytes(64)),
            ('keys-2^64-1', gguf + struct.pack('<QQ', 0, 2 ** 64 - 1) + bytes(64)),
            ('key-of-2^63', gguf + struct.pack('<QQQ', 0, 1, 2 ** 63) + bytes(64))):
        path = write(name + '.gguf', data)
        refused('model', (name, 3, path, ['info', path]))

    def other(**changes):
        return lambda config: {**config, **changes}

    with case('model/copy-of-a-folder-works'):  # so that the folders below are refused for what was changed
        good('info', folder('copy'))
    for name, config, weights in (
            ('config-missing', False, None), ('weights-missing', None, False),
            ('config-empty', b'', None), ('config-not-json', b'{"model_type": ', None), ('config-array', b'[]', None),
            ('config-nested', b'[' * 100000, None), ('config-not-utf8', b'{"model_type": "\xff"}', None),
            ('family-unknown', other(model_type='nothing', architectures=['NothingForCausalLM']), None),
            ('family-not-built', other(model_type='falcon', architectures=['FalconForCausalLM']), None),
            ('heads-0', other(num_attention_heads=0), None), ('heads-text', other(num_attention_heads='4'), None),
            ('heads-negative', other(num_attention_heads=-4), None),
            ('heads-over-kv', other(num_key_value_heads=3), None),
            ('head-size-odd', other(head_dim=63), None), ('layers-4', other(num_hidden_layers=4), None),
            ('layers-2^31', other(num_hidden_layers=2 ** 31), None), ('layers-0', other(num_hidden_layers=0), None),
            ('vocabulary', other(vocab_size=289), None), ('width', other(hidden_size=64), None),
            ('activation', other(hidden_act='gelu'), None), ('epsilon', other(rms_norm_eps='x'), None),
            ('rope', other(rope_parameters={'rope_type': 'longrope', 'rope_theta': 1e4, 'factor': 4.0}), None),
            ('rope-theta-0', other(rope_parameters={'rope_type': 'default', 'rope_theta': 0}), None),
            ('weights-empty', None, b''), ('weights-cut', None, lambda data: data[:-1]),
            ('weights-long', None, lambda data: data + b'\0'),
            ('weights-half', None, lambda data: data[:len(data) // 2]),
            ('weights-header', None, lambda data: data[:100]), ('weights-7-bytes', None, lambda data: data[:7]),
            ('weights-header-2^63', None, lambda data: struct.pack('<Q', 2 ** 63) + data[8:])):
        refused('model', (name, 3, None, ['info', folder('model-' + name, config, weights)]))
    with case('model/run-needs-a-vocabulary'):
        bad(3, 'run', GQA, '-p', 'a', says='tokenizer')
    with case('model/gguf-truncated'):
        with open(needs_model(), 'rb') as f:
            size = os.fstat(f.fileno()).st_size
            head = f.read(3 << 20)
        for n in (5, 8, 23, 24, 25, 100, 1000, 65536, 1 << 20, len(head)) if not UNDER else (24, 1000):
            bad(3, 'info', write('cut.gguf', head[:n]), timeout=20)
        path = scratch('cut.gguf')  # nothing but the tensors' values is missing: one byte, or all but a hole
        for n in (size - 1, size // 2):
            os.truncate(path, n)
            bad(3, 'info', path, timeout=20)
        os.remove(path)


# ---- the environment ----

def environment():
    def plan(*args, env):
        return [p['kv'] for p in json.loads(good('info', GQA, '--json', *args, env=env).text)['memory_plan']]

    with case('environment/is-read'):
        assert plan(env={'KIVI_KV': 'kivi8,f16'}) == ['kivi8', 'f16']
        result = good('info', GQA, env={'KIVI_JSON': '1', 'KIVI_CTX': '384', 'KIVI_K_BITS': '4', 'KIVI_KV': 'kivi2'})
        assert [(p['ctx'], p['bits']) for p in json.loads(result.text)['memory_plan']] == [(384, 4)], result
    with case('environment/command-line-wins'):
        assert plan('--kv', 'kivi4', env={'KIVI_KV': 'kivi8,f16'}) == ['kivi4']
        assert '3 threads' in good('info', GQA, '-t', 3, env={'KIVI_THREADS': '2'}).text
    with case('environment/empty-is-unset'):
        assert plan(env={'KIVI_KV': '', 'KIVI_THREADS': ''}) == plan(env={})
    with case('environment/prompt-on-the-command-line-wins'):
        env = {'KIVI_FILE': scratch('nothing.txt')}
        assert run('-p', 'Hello', env=env).out == run('-p', 'Hello').out
        assert run('-f', write('hello.txt', 'Hello'), env={'KIVI_PROMPT': 'What'}).out == run('-p', 'Hello').out
    for name, value in (('KIVI_THREADS', '4x'), ('KIVI_CTX', '-1'), ('KIVI_KV', 'kivi3'), ('KIVI_RULE', 'best'),
                        ('KIVI_GROUP', '7'), ('KIVI_DISABLE', 'mmx')):
        with case(f'environment/{name}={value}'):
            bad(2, *logits_args(), env={name: value})
    with case('environment/unknown-names-are-left-alone'):
        good('info', GQA, env={'KIVI_NOTHING': '4x', 'KIVI_SEED': '4x'})  # seed is no option of info


# ---- info ----

def bytes_of_f16(layers, kv_heads, dim):
    return layers * kv_heads * dim * 2 * 2


def check_plus_plan(p, k, v, heads, dim, token):
    """ARCHITECTURE.md 5: codes, then scales, zeros and the list of wide channels, up to whole lines of 64 bytes."""
    wide, group = dim // 4 if k == 2 else 0, min(dim & -dim, 64)
    codes = 128 * (dim * k + wide * 2 + dim * v) // 8
    scales = 2 * dim + 2 * dim + 2 * 128 * dim // group + wide
    page = -(-(codes + scales) // 64) * 64
    b = p['bytes']
    assert abs(p['bits'] - page * 8 / (256 * dim)) < 1e-3 * p['bits'], p
    assert p['bytes_per_token'] * 128 == page * heads, p
    assert b['kv_codes'] == 8 * heads * codes and b['kv_scales'] == 8 * heads * (page - codes), p
    rows = b['kv_residual'] / token
    assert 128 <= rows <= 128 + 64, p


def info():
    for name, layers, kv_heads, dim in (('llama', 3, 4, 32), ('llama-gqa', 3, 1, 64), ('smollm2', 30, 3, 64)):
        with case(f'info/{name}'):
            model = needs_model() if name == 'smollm2' else os.path.join(GOLDEN, name)
            kinds = {'f16': (16, 16), 'kivi8': (8, 8), 'kivi4': (4, 4), 'k4v2': (4, 2), 'kivi2': (2, 2)}
            plus = {'k4v3+': (4, 3), 'k4v2+': (4, 2), 'kivi2+': (2, 2)}
            answer = json.loads(good('info', model, '--json', '--ctx', 1024).out)
            m, plans = answer['model'], answer['memory_plan']
            assert (m['n_layers'], m['n_kv_heads'], m['head_dim']) == (layers, kv_heads, dim), m
            assert [p['kv'] for p in plans] == [*kinds, *plus], plans
            token = bytes_of_f16(layers, kv_heads, dim)
            for p in plans[len(kinds):]:
                check_plus_plan(p, *plus[p['kv']], layers * kv_heads, dim, token)
            for p in plans[:len(kinds)]:
                (k, v), b = kinds[p['kv']], p['bytes']
                overhead = 32 / 32 if p['kv'] != 'f16' else 0  # a scale and a zero of 16 bit for 32 values
                assert list(b) == TAGS and all(isinstance(n, int) and n >= 0 for n in b.values()), p
                assert p['ctx'] == 1024 and p['bits'] == (k + v) / 2 + overhead, p
                assert p['bytes_per_token'] == token * p['bits'] / 16, p
                assert b['kv_codes'] == 1024 * token * (k + v) / 32, p
                assert b['kv_scales'] == 1024 * token * overhead / 16, p
                assert b['weights'] == plans[0]['bytes']['weights'] > 0, p
                rows = b['kv_residual'] / token  # the window, and what rewinding and rounding up take
                assert rows == 0 if p['kv'] == 'f16' else 128 <= rows <= 128 + 64, p
    with case('info/f16-of-smollm2'):
        plan = json.loads(good('info', needs_model(), '--json', '--kv', 'f16').text)['memory_plan'][0]
        assert plan['bytes_per_token'] == 30 * 3 * 64 * 2 * 2 and plan['ctx'] == 8192, plan
    with case('info/group-and-residual'):
        p, = json.loads(good('info', GQA, '--json', '--kv', 'kivi2', '--group', 64, '--residual', 64,
                             '--ctx', 256).text)['memory_plan']
        assert p['bits'] == 2.5 and 64 <= p['bytes']['kv_residual'] / bytes_of_f16(3, 1, 64) <= 128, p
    with case('info/order-of-the-list'):
        kinds = ['kivi2', 'f16', 'kivi2']
        plans = json.loads(good('info', GQA, '--json', '--kv', ','.join(kinds)).text)['memory_plan']
        assert [p['kv'] for p in plans] == kinds
    with case('info/list-of-17'):  # all of it or none of it
        result = kivi('info', GQA, '--json', '--kv', ','.join(['kivi2'] * 17))
        assert result.code == 2 or len(json.loads(result.text)['memory_plan']) == 17, result
    with case('info/text'):
        text = good('info', GQA, '--kv', 'f16,kivi2', '--ctx', 256).text
        for word in ('llama', '3 layers', *TAGS, 'sum', 'f16', 'kivi2', 'bits/element', '16.00', '3.00', '256 tokens'):
            assert word in text, f'{word!r} is missing in {text!r}'
        assert 'trained for 256' not in text, f'{text.splitlines()[1]!r}: 256 is --ctx, the model has 8192'
    with case('info/names-make-valid-json'):
        for name in ('qu"ote\\', 'tab\there', '\U0001f30d' * 20, 'x' + 'é' * 40):
            answer = json.loads(good('info', folder(name), '--json').out.decode())
            assert name.startswith(answer['model']['name'].rstrip('�')), answer['model']
        os.makedirs(os.fsencode(scratch('')) + b'bad\xff', exist_ok=True)
        for file in ('config.json', 'model.safetensors'):
            os.symlink(os.path.join(GQA, file), os.fsencode(scratch('')) + b'bad\xff/' + file.encode())
        result = kivi('info', scratch('bad\udcff'), '--json')
        json.loads(result.out.decode())


# ---- logits ----

def logits():
    with case('logits/file'):
        result = good(*logits_args())
        assert result.out == b'' and result.err == b'', result
        array = np.load(scratch('out.npy'))
        assert array.shape == (len(IDS), 288) and array.dtype == np.dtype('<f4') and np.isfinite(array).all()
        assert os.path.getsize(scratch('out.npy')) == 128 + array.nbytes

    def content(*args, tokens=None, **more):
        good(*logits_args(tokens), *args, **more)
        with open(scratch('out.npy'), 'rb') as f:
            return f.read()

    few = () if UNDER else (1,)
    for rule in ('paper', 'stream', 'span:128'):
        with case(f'logits/prompt-chunk-{rule}'):
            options = ('--rule', rule, '--residual', 32, '--prompt', 140)
            whole = content(*options)
            for chunk in (*few, 7, 64):
                assert content(*options, '--prompt-chunk', chunk) == whole, f'chunks of {chunk} give another file'
    with case('logits/stream-prompt-is-token-by-token'):
        options = ('--rule', 'stream', '--residual', 32)
        assert content(*options) == content(*options, '--prompt', 0) == content(*options, '--prompt', 77)
    with case('logits/threads'):
        assert content('--threads', 1) == content('--threads', 2) == content('--threads', 3)
    with case('logits/instruction-sets'):
        base = content('--residual', 32)
        for names in ('avx512vnni', 'avx512', 'avx512,avx2', 'avx2'):
            assert content('--residual', 32, env={'KIVI_DISABLE': names}) == base, f'without {names}: another file'
    with case('logits/one-token'):
        content(tokens=[1])
        assert np.load(scratch('out.npy')).shape == (1, 288)
    with case('logits/prompt-over-context'):
        bad(2, *logits_args(), '--ctx', 149, says='149')
        good(*logits_args(), '--ctx', 150)

    for name, tokens in (
            ('object', b'{"a": 1}'), ('number', b'1'), ('strings', b'["1", "2"]'), ('reals', b'[1.0, 2.0]'),
            ('booleans', b'[true]'), ('null', b'[null]'), ('negative', b'[1, -1]'), ('too-large', b'[1, 288]'),
            ('2^31', b'[2147483648]'), ('2^32', b'[4294967297]'), ('2^64', b'[18446744073709551617]'),
            ('1e999', b'[1e999]'), ('empty-array', b'[]'), ('empty-file', b''), ('cut', b'[1, 2'),
            ('trailing', b'[1] [2]'), ('trailing-comma', b'[1,]'), ('not-json', b'hello'), ('nul', b'[1, \x002]'),
            ('bom', b'\xef\xbb\xbf[1]'), ('nested', b'[' * 100000 + b']' * 100000), ('array-in-array', b'[[1]]'),
            ('binary', bytes(range(256)))):
        with case(f'logits/tokens-{name}'):
            path, out = write('bad.json', tokens), scratch('never.npy')
            bad(2, 'logits', GQA, '--tokens', path, '--out', out, timeout=20)
            assert not os.path.exists(out), 'a file was left behind'
    with case('logits/tokens-missing'):
        bad(5, 'logits', GQA, '--tokens', scratch('nothing.json'), '--out', scratch('never.npy'), says='nothing.json')
    with case('logits/out-in-missing-folder'):
        bad(5, *logits_args(out='nowhere/out.npy'), says='nowhere')
    with case('logits/out-is-a-folder'):
        bad(5, 'logits', GQA, '--tokens', write('ids.json', IDS), '--out', SCRATCH, says=SCRATCH)
    with case('logits/failure-in-the-middle-leaves-no-file'):
        bad(2, *logits_args([*IDS, 288, *IDS], 'never.npy'), '--prompt', 10, says='288')
        assert not os.path.exists(scratch('never.npy')), 'half a file was left behind'
    with case('logits/full-disk'):
        link = scratch('full')  # a link, so that no mistake of the program can remove the device
        os.symlink('/dev/full', link)
        bad(5, *logits_args(out='full'), says='No space left')
        assert os.path.islink(link), 'the program removed what --out named, though it is no file of its own'
    with case('logits/to-a-pipe'):
        with open(scratch('copy.npy'), 'wb') as copy:
            reader = subprocess.Popen(['cat', fifo()], stdout=copy)
        good(*logits_args(out='fifo'))
        assert reader.wait(20) == 0
        with open(scratch('copy.npy'), 'rb') as f:
            assert f.read() == content(), 'a pipe gets other bytes'
        assert os.path.exists(fifo())
    with case('logits/size-limit'):
        args = logits_args(out='limit.npy')
        result = subprocess.run(['sh', '-c', 'trap "" XFSZ; ulimit -f 64; exec "$@"', 'sh', KIVI, *args],
                                capture_output=True)
        assert result.returncode == 5 and result.stderr.count(b'\n') == 1, result
        assert not os.path.exists(scratch('limit.npy')), 'half a file was left behind'


# ---- run ----

STATS = {'prompt_tokens': int, 'prompt_tps': float, 'gen_tokens': int, 'gen_tps': float, 'bytes': dict,
         'peak_rss_bytes': int}


def check_stats(stats):
    assert list(stats) == list(STATS), stats
    for name, kind in STATS.items():
        assert isinstance(stats[name], (int, float) if kind is float else kind), (name, stats)
    assert list(stats['bytes']) == TAGS, stats
    return stats


def run_text():
    with case('run/text-alone-on-stdout'):
        plain, silent = run('-p', 'The capital of France is'), run('-p', 'The capital of France is', '--stats', 'none')
        assert plain.text.startswith(' Paris') and plain.out == silent.out and plain.out.endswith(b'\n'), plain
        assert silent.err == b'', silent
        assert b'\x1b' not in plain.err and b'\r' not in plain.err, f'escape codes without a terminal: {plain}'
        for word in ('prompt', 'generation', 'tokens/s', 'kivi2+', 'f16', 'kv_codes', 'sum'):
            assert word in plain.errors, f'{word!r} is missing: {plain}'
    with case('run/stats-json'):
        stats = check_stats(run('-p', 'The capital of France is', '--stats', 'json').stats())
        assert stats['prompt_tokens'] == 5 and stats['gen_tokens'] == 12 and stats['prompt_tps'] > 0, stats
        plan, = json.loads(good('info', needs_model(), '--json', '--kv', 'kivi2+', '--ctx', 512).text)['memory_plan']
        for tag in ('weights', 'kv_codes', 'kv_scales', 'kv_residual', 'activations'):
            assert stats['bytes'][tag] == plan['bytes'][tag], f'{tag}: {stats} but info says {plan}'
        assert stats['peak_rss_bytes'] > stats['bytes']['kv_codes'], stats
    with case('run/prompt-chunk'):
        whole = run('-p', 'The capital of France is', '--stats', 'json')
        for chunk in (1, 3):
            cut = run('-p', 'The capital of France is', '--stats', 'json', '--prompt-chunk', chunk)
            assert cut.out == whole.out, f'steps of {chunk} rows give another text: {cut}'
            sizes = [check_stats(x.stats())['bytes']['activations'] for x in (cut, whole)]
            assert sizes[0] < sizes[1] / 8, f'buffers of {chunk} rows, and of 512: {sizes}'
    with case('run/greedy-twice'):
        assert run('-p', 'Once upon a time').out == run('-p', 'Once upon a time').out
    with case('run/seed'):
        warm = ('-p', 'Once upon a time', '--temp', 1.5, '--top-k', 0, '--top-p', 1, '--min-p', 0)
        first = run(*warm, '--seed', 7).out
        assert run(*warm, '--seed', 7).out == first, 'the same seed gives another text'
        others = {run(*warm, '--seed', seed).out for seed in (8, 9, 2 ** 63)}
        assert others != {first}, 'three other seeds give the same text'
        assert len(others) == 3, f'three seeds give {len(others)} texts'
    with case('run/top-k-1-is-greedy'):
        options = ('-p', 'Once upon a time', '--top-k', 1, '--temp', 1.2, '--repeat-penalty', 1)
        assert run(*options, '--seed', 3).out == run('-p', 'Once upon a time').out
    with case('run/threads'):
        texts = [run('-p', 'Once upon a time', '--threads', n).out for n in (1, 2, 3)]
        assert texts[0] == texts[1] == texts[2], texts
    with case('run/n-0'):
        result = run('-p', 'Hello', '-n', 0, '--stats', 'json')
        assert result.text.strip() == '' and result.stats()['gen_tokens'] == 0, result
    with case('run/whole-context'):
        result = run('-p', 'Hello', '-n', 100, '--ctx', 16, '--ignore-eos', '--stats', 'json')
        assert result.stats()['gen_tokens'] == 16, result  # the last one is seen but not evaluated
        bad(2, 'run', needs_model(), '--ctx', 16, '-p', 'word ' * 40, says='16')
    with case('run/stops-at-the-end-token'):
        few = run('-p', 'The capital of France is', '--kv', 'f16', '-n', 100, '--stats', 'json')
        assert few.stats()['gen_tokens'] < 100 and '<|im_end|>' not in few.text, few
        more = run('-p', 'The capital of France is', '--kv', 'f16', '-n', 100, '--ignore-eos', '--stats', 'json')
        assert more.stats()['gen_tokens'] == 100 and more.out.startswith(few.out.rstrip(b'\n')), more


def run_prompt():
    hello = None
    with case('run/prompt-from-stdin'):
        hello = run('-p', 'Hello, my name is').out
        assert run(stdin=b'Hello, my name is').out == hello
        with open(write('prompt.txt', 'Hello, my name is'), 'rb') as f:
            assert run(stdin=f).out == hello
    with case('run/prompt-from-a-file'):
        assert run('-f', write('prompt.txt', 'Hello, my name is')).out == (hello or run('-p', 'Hello, my name is').out)
        assert run('-f', '-', stdin=b'Hello, my name is').out == hello
    with case('run/prompt-refused'):
        model = needs_model()
        bad(2, 'run', model, '-p', 'a', '-f', write('prompt.txt', 'b'), says='-p and -f')
        bad(2, 'run', model, '-p', '', says='empty')
        bad(2, 'run', model, '-f', write('prompt.txt', ''), says='empty')
        bad(2, 'run', model, stdin=b'', says='empty')
        bad(5, 'run', model, '-f', scratch('nothing.txt'), says='nothing.txt')
        bad(5, 'run', model, '-f', SCRATCH, says=SCRATCH)
    for name, prompt in (('one-byte', b'a'), ('blank', b' '), ('newlines', b'\n\n\n'), ('nul-bytes', bytes(16)),
                         ('nul-inside', b'Hello\0world'), ('invalid-utf8', b'\xff\xfe\xc3\xed\xa0\x80 abc \xf4'),
                         ('all-bytes', bytes(range(256))), ('emoji', '👩‍👩‍👧 🌍 🇩🇪 '.encode()),
                         ('special', b'<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'),
                         ('long-word', b'a' * 2000)):
        with case(f'run/prompt-{name}'):
            result = run('-f', write('prompt.bin', prompt), '-n', 4, '--stats', 'json')
            result.out.decode('utf-8')  # what comes out is always whole characters
            tokens = check_stats(result.stats())['prompt_tokens']
            assert 1 <= tokens <= len(prompt), result
            if name == 'nul-bytes':
                assert tokens > 1, f'the prompt ended at its first NUL: {result}'
            if name == 'special':
                assert tokens < 20, f'special tokens were cut into letters: {result}'
    with case('run/emoji-come-out-whole'):
        result = run('-p', '🌍🌎🌏 😀😃😄😁😆😅😂🤣 👍👎👌', '-n', 40, '--temp', 1, '--seed', 5, '--ignore-eos')
        result.out.decode('utf-8')


def run_ends():
    with case('run/closed-pipe'):
        for args in (['-n', 200, '--ignore-eos'], ['-n', 1]):
            reader, writer = os.pipe()
            os.close(reader)
            try:
                result = kivi('run', needs_model(), '--ctx', 512, '-p', 'Hello', *args, stdout=writer, timeout=30)
            finally:
                os.close(writer)
            assert result.code == 5 and result.errors.startswith('kivi: error: standard output'), result
            assert result.errors.count('\n') == 1, result
    with case('run/full-disk'):
        with open('/dev/full', 'wb') as full:
            bad(5, 'run', needs_model(), '--ctx', 512, '-p', 'Hello', '-n', 2, stdout=full, says='No space left')
    with case('output/full-disk'):
        for args in (['info', GQA], ['info', GQA, '--json'], ['--help'], ['run', '--help'], ['--version']):
            with open('/dev/full', 'wb') as full:
                bad(5, *args, stdout=full, says='standard output')
    with case('output/stdout-not-open'):
        result = subprocess.run(['sh', '-c', 'exec "$@" >&-', 'sh', KIVI, 'info', GQA], capture_output=True)
        assert result.returncode == 5 and result.stderr.startswith(b'kivi: error: '), result


def read_until(fd, want, seconds=30):
    """What comes from fd until `want(data)` or its end."""
    data, end = b'', time.monotonic() + seconds
    while not want(data):
        left = end - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            raise AssertionError(f'nothing like it came in {seconds} s: {data[-300:]!r}')
        try:
            chunk = os.read(fd, 4096)
        except OSError:  # the other end of a terminal is gone
            chunk = b''
        if not chunk:
            break
        data += chunk
    return data


def interrupted():
    long_prompt = write('long.txt', 'The sea was calm and the boats went out. ' * 250)

    def ended(process, errors):
        assert process.returncode == 0, f'exit {describe(process.returncode)}, stderr {errors[-300:]!r}'
        last = errors.decode().rstrip().split('\n')[-1]
        return check_stats(json.loads(last[last.index('{'):]))  # on a terminal, behind the end of the progress line

    with case('run/ctrl-c-in-the-prompt'):
        ours, theirs = pty.openpty()  # stderr is a terminal: its progress line says when the prompt is under way
        args = ['run', needs_model(), '-f', long_prompt, '-n', 50, '--stats', 'json', '--threads', 1]
        with start(*args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs) as process:
            os.close(theirs)
            try:
                seen = read_until(ours, lambda data: b'prompt 512/' in data)
                process.send_signal(signal.SIGINT)
                seen += read_until(ours, lambda data: False)
            finally:
                os.close(ours)
                process.kill() if process.poll() is None and not process.wait(30) else None
            out = process.stdout.read()
        stats = ended(process, seen)
        assert out.strip() == b'' and stats['gen_tokens'] == 0, (out, stats)
        assert 512 <= stats['prompt_tokens'] < 2250, f'stopped inside the prompt, but {stats}'
    with case('run/ctrl-c-in-the-generation'):
        args = ['run', needs_model(), '-p', 'Once upon a time', '-n', 100000, '--ignore-eos', '--stats', 'json']
        with start(*args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            out = read_until(process.stdout.fileno(), lambda data: len(data) > 20)
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=30)
        stats = ended(process, errors)
        (out + rest).decode('utf-8')
        assert (out + rest).endswith(b'\n') and 0 < stats['gen_tokens'] < 8192, stats
    with case('run/ctrl-c-while-the-reader-is-slow'):
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.write(writer, bytes(4096))  # the pipe is full: kivi waits in its first write
        try:
            args = ['run', needs_model(), '-p', 'Once upon a time', '-n', 100000, '--ignore-eos', '--stats', 'json']
            with start(*args, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE) as process:
                os.close(writer)
                wait_blocked(process)
                process.send_signal(signal.SIGINT)
                time.sleep(0.05)
                out = read_until(reader, lambda data: False)
                errors = process.communicate(timeout=30)[1]
        finally:
            os.close(reader)
        stats = ended(process, errors)
        assert out[:4096] == bytes(4096) and 0 < stats['gen_tokens'] < 50, stats


def wait_blocked(process):
    """Until the main thread waits in a write to a pipe."""
    end = time.monotonic() + 30
    while time.monotonic() < end and process.poll() is None:
        try:
            with open(f'/proc/{process.pid}/wchan') as f:
                where = f.read()
        except OSError:
            where = ''
        if 'pipe_write' in where:
            return
        if not where or where == '0':  # the kernel does not tell: see that no time is used
            before = cpu_ticks(process.pid)
            time.sleep(0.5)
            if before > 2 and cpu_ticks(process.pid) == before:
                return
        time.sleep(0.02)
    raise AssertionError('the program did not come to wait for its reader')


def cpu_ticks(pid):
    with open(f'/proc/{pid}/stat') as f:
        fields = f.read().rsplit(')', 1)[1].split()
    return int(fields[11]) + int(fields[12])


def terminal():
    with case('run/progress-on-a-terminal'):
        ours, theirs = pty.openpty()
        args = ['run', needs_model(), '-f', write('some.txt', 'The sea was calm. ' * 150), '-n', 2, '--stats', 'none']
        with start(*args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs) as process:
            os.close(theirs)
            seen = read_until(ours, lambda data: False)
            os.close(ours)
            out = process.communicate(timeout=30)[0]
        assert process.returncode == 0, f'exit {describe(process.returncode)}, {seen[-200:]!r}'
        total = re.search(rb'prompt 0/(\d+) tokens', seen)
        assert total and b'prompt 512/' + total[1] in seen, f'no progress: {seen!r}'
        assert seen.endswith(b'\r\x1b[K'), f'the line is not taken away: {seen[-60:]!r}'
        assert b'\x1b' not in out and b'prompt' not in out, out


usage()
cache_kinds()
bad_models()
environment()
info()
logits()
if not UNDER:  # the SmolLM2 file is minutes of work for a sanitizer; py_turns runs and interrupts small models
    run_text()
    run_prompt()
    run_ends()
    interrupted()
    terminal()
finish()
