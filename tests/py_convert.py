#!/usr/bin/env python3
"""py_convert.py: `kivi convert`: the converted file gives the logits and the token ids of the folder, its bytes are
those of ggml's reference quantizers, and a conversion that fails leaves nothing behind.

Logits are compared with a folder whose matrices were rounded to float16 first, as the file's are: then every number
that enters a product is the same, and so must be every byte of the logits. Two families have a number that is rounded
once more on its way through GGUF, a float32: Llama 3's divisors (where no float32 gives the stretched frequency back)
and YaRN's attention factor. A frequency off by one part in 2^24 turns position p by p 2^-24 radians more; with fewer
than 512 positions that is under 2^-15, and the logits, of magnitude 2^5 at most, stay within 2^-8 with room for three
layers.
"""
import json
import os
import resource
import signal
import struct
import subprocess
import time
import unicodedata

import numpy as np

import convert_files as files
from blackbox import CLEAN, GOLDEN, KIVI, UNDER, bad, case, finish, good, kivi, logits, scratch, skip

N = 140
ROUNDED_ONCE_MORE = {'llama-gqa': 2 ** -8, 'yarn': 2 ** -8}


def tokens(family):
    with open(os.path.join(GOLDEN, family, 'tokens.json')) as f:
        return json.load(f)[:N]


def convert(folder, leaf, *options):
    out = scratch(leaf)
    if os.path.exists(out):
        os.remove(out)
    return out, good('convert', folder, out, *options)


def ids(model, strings, *options):
    r = good('tokenize', model, '-f', '-', '--null', *options, stdin='\0'.join(strings).encode() + b'\0')
    return [[int(w) for w in line.split()] for line in r.text.split('\n')[:-1]]


# ---- what comes out is what went in ----

def same_logits(family):
    exact = family not in ROUNDED_ONCE_MORE
    folder = files.make_folder(family)
    out, _ = convert(folder, f'{family}.gguf')
    ref = files.make_folder(family, f'f16-{family}', weights=files.rounded(family))
    options = ('--kv', 'kivi2' if exact else 'f16', '--residual', 32, '--prompt', 100)
    ours, theirs = logits(out, tokens(family), *options), logits(ref, tokens(family), *options)
    worst = float(np.abs(ours - theirs).max())
    assert ours.tobytes() == theirs.tobytes() or not exact, f'logits differ by up to {worst}'
    assert worst <= ROUNDED_ONCE_MORE.get(family, 0), f'logits differ by up to {worst}'


def same_ids(name, seed=3):
    family = name if os.path.isdir(os.path.join(GOLDEN, name)) else 'llama-gqa'
    folder = files.make_folder(family, f'words-{name}', tokenizer=files.TOKENIZERS[name]())
    out, result = convert(folder, f'words-{name}.gguf')
    strings = [unicodedata.normalize('NFC', t) for t in files.texts(40 if UNDER else 400, seed)]
    if 'Metaspace' in result.errors:  # said, and so: only the other texts are alike
        strings = [t for t in strings if t[:1] not in (' ', '\u2581') and '<s>' not in t and '</s>' not in t]
    if 'U+2581' in result.errors:  # two things in tokenizer.json: a space, and an added token's spelling
        strings = [t for t in strings if '\u2581' not in t]
    for options in ((), ('--special',), ('--no-bos',)):
        ours, theirs = ids(out, strings, *options), ids(folder, strings, *options)
        wrong = [(t, a, b) for t, a, b in zip(strings, ours, theirs) if a != b]
        assert len(ours) == len(theirs) == len(strings) and not wrong, f'seed {seed} {options}: {wrong[:2]}'


def keys():
    with case('keys'):
        folder = files.make_folder('gemma3')
        files.put(folder, 'generation_config.json', {'eos_token_id': [2, 283]})
        f = files.File(convert(folder, 'keys.gguf')[0])
        k = f.keys
        assert k['general.architecture'] == b'gemma3' and k['general.file_type'] == 1
        assert k['gemma3.attention.sliding_window'] == 40 and k['gemma3.attention.sliding_window_pattern'] == 2
        assert k['gemma3.rope.scaling.type'] == b'linear' and k['gemma3.rope.scaling.factor'] == 8
        assert k['tokenizer.ggml.model'] == b'llama' and k['tokenizer.ggml.add_space_prefix'] is False
        assert k['tokenizer.ggml.eos_token_id'] == 2 and k['tokenizer.ggml.eot_token_id'] == 283, k
        assert len(k['tokenizer.ggml.tokens']) == 288 and k['tokenizer.ggml.tokens'][287] == b'[PAD287]'
        types = k['tokenizer.ggml.token_type']
        assert types[0] == 2 and types[1] == 3 and types[3] == 6 and types[287] == 5 and types[283] == 3, types
        assert b'<|im_start|>' in k['tokenizer.chat_template']
        assert {t[0] for t in f.tensors.values() if len(t[1]) == 1} == {'F32'}


# ---- blocks ----

def golden_blocks():
    with open(os.path.join(GOLDEN, 'blocks.bin'), 'rb') as f:
        data = f.read()
    n, = struct.unpack_from('<I', data, 8)
    x = np.frombuffer(data, np.float32, n, 12)
    at = 12 + 4 * n
    q8, q4 = data[at:at + n // 32 * 34], data[at + n // 32 * 34:]
    assert data[:8] == b'KIVIBLK1' and len(q4) == n // 32 * 18
    return x, {'Q8_0': q8, 'Q4_0': q4}


def repeated(data, size, n_blocks):
    return np.resize(np.frombuffer(data, np.uint8).reshape(-1, size), (n_blocks, size)).tobytes()


def blocks():
    x, want = golden_blocks()
    name, shape = 'model.layers.0.mlp.gate_proj.weight', [192, 128]
    weights = files.rounded('llama')
    n = shape[0] * shape[1]
    weights[name] = 'F32', shape, np.resize(x, n).tobytes()
    folder = files.make_folder('llama', 'blocks', weights=weights)
    for kind in ('Q8_0', 'Q4_0'):
        with case(f'blocks/{kind} are the reference\'s'):
            f = files.File(convert(folder, 'blocks.gguf', '--type', kind.lower())[0])
            got = f.tensors['blk.0.ffn_gate.weight']
            assert got[0] == kind and got[1] == shape
            assert got[2] == repeated(want[kind], len(want[kind]) * 32 // len(x), n // 32), 'other bytes'
            assert f.tensors['output.weight'][0] == 'Q8_0'  # with q4_0 too
            assert f.keys['general.quantization_version'] == 2
        with case(f'blocks/{kind} are near what they were made of'):
            # Half a step, and the step's own rounding to float16 times the largest code; Q4_0 cuts +8 steps to 7.
            near = {'Q8_0': 0.5 + 127 * 2 ** -11, 'Q4_0': 1 + 8 * 2 ** -11}[kind] + 2 ** -10
            dtype, shape_o, data = weights['model.layers.1.self_attn.o_proj.weight']
            o = f.tensors['blk.1.attn_output.weight']
            want_o, have = files.as_f32(dtype, data).reshape(-1, 32), files.dequantize(o[0], o[2]).reshape(-1, 32)
            step = np.abs(want_o).max(1, keepdims=True) / (127 if kind == 'Q8_0' else 8)
            assert (np.abs(want_o - have) <= near * step).all()
        with case(f'blocks/{kind} run'):
            good('convert', files.make_folder('llama'), scratch('q.gguf'), '--force', '--type', kind.lower())
            a = logits(scratch('q.gguf'), tokens('llama')[:40], '--kv', 'f16')
            b = logits(files.make_folder('llama'), tokens('llama')[:40], '--kv', 'f16')
            alike = np.corrcoef(a.ravel(), b.ravel())[0, 1]
            assert alike > (0.999 if kind == 'Q8_0' else 0.9), alike
    with case('blocks/package'):
        try:
            import gguf
        except ImportError:
            skip('the gguf package is not installed')
        rng = np.random.default_rng(5)
        y = (rng.standard_normal(n) * 10.0 ** rng.integers(-6, 4, n)).astype(np.float32)
        weights[name] = 'F32', shape, y.tobytes()
        folder = files.make_folder('llama', 'blocks', weights=weights)
        for kind in ('Q8_0', 'Q4_0'):
            f = files.File(convert(folder, 'blocks.gguf', '--type', kind.lower())[0])
            theirs = gguf.quants.quantize(y.reshape(shape), gguf.GGMLQuantizationType[kind]).tobytes()
            assert f.tensors['blk.0.ffn_gate.weight'][2] == theirs, f'seed 5: {kind}'


# ---- refusals and failures ----

def left(folder=None):
    return sorted(n for n in os.listdir(folder or os.path.dirname(scratch('x'))) if '.tmp' in n or n == 'no.gguf')


def refuse(name, code, says, folder, *options, out=None):
    with case(f'refused/{name}'):
        bad(code, 'convert', folder, out or scratch('no.gguf'), *options, says=says)
        assert not left(), left()


def tokenizer_with(name='llama-gqa', **parts):
    return {**files.TOKENIZERS[name](), **parts}


def refusals():
    fine = files.make_folder('llama-gqa', 'fine')
    refuse('type', 2, "expected f16, q8_0 or q4_0", fine, '--type', 'q5_k')
    refuse('no folder', 5, 'no-such-folder', scratch('no-such-folder'))
    refuse('out in no folder', 5, 'cannot be made', fine, out=scratch('nowhere/no.gguf'))
    refuse('out is a folder', 2, 'is a folder', fine, out=fine)
    one = convert(fine, 'one.gguf')[0]
    refuse('a file', 2, 'expected a folder', one)
    with case('refused/exists'):
        before = open(one, 'rb').read()
        bad(2, 'convert', fine, one, says='--force')
        good('convert', fine, one, '--type', 'q8_0', '--force')
        assert files.File(one).keys['general.file_type'] == 7 and open(one, 'rb').read() != before
    refuse('no words', 2, 'needs a folder', '--type', out='f16')
    refuse('dynamic', 3, "rope scaling 'dynamic'", files.make_folder('dynamic', tokenizer=tokenizer_with()))
    refuse('window of qwen', 3, 'a sliding window', files.make_folder(
        'qwen2', 'windowed', use_sliding_window=True, sliding_window=32, max_window_layers=1, layer_types=None))
    bare = files.make_folder('llama', 'bare')
    os.remove(os.path.join(bare, 'tokenizer.json'))
    refuse('no tokenizer', 3, 'no tokenizer.json', bare)
    for name, says, tokenizer in (
            ('cut', 'pre-tokenizer "Split Isolated /[a-z]+ | ByteLevel" has no name',
             tokenizer_with(pre_tokenizer=files.sequence(files.split('[a-z]+'), files.byte_level(False)))),
            ('prefix', 'pre-tokenizer "ByteLevel prefix words"',
             tokenizer_with(pre_tokenizer=files.byte_level(True, prefix=True))),
            ('normalizer', 'normalizer "Lowercase"', tokenizer_with(normalizer={'type': 'Lowercase'})),
            ('front', 'post_processor adds', tokenizer_with(post_processor=files.template('<pad>', 0))),
            ('rstrip', 'has rstrip', tokenizer_with(added_tokens=files.added({1: '<s>', 2: '</s>'}, rstrip=True)))):
        refuse(name, 3, says, files.make_folder('llama-gqa', 'odd', tokenizer=tokenizer))
    scored = files.TOKENIZERS['llama']()
    scored['model']['byte_fallback'] = False
    refuse('no bytes', 3, 'byte_fallback', files.make_folder('llama', 'odd', tokenizer=scored))
    scored = files.TOKENIZERS['llama']()  # a token that no merge makes: scores would
    scored['model']['merges'] = [m for m in scored['model']['merges'] if m != ['i', 'n']]
    refuse('merges that no scores are', 3, 'would be other tokens', files.make_folder('llama', 'odd', tokenizer=scored))
    weights = files.rounded('llama')
    big = np.zeros(192 * 128, np.float32)
    big[5 * 128] = 1e5
    weights['model.layers.0.mlp.gate_proj.weight'] = 'F32', [192, 128], big.tobytes()
    large = files.make_folder('llama', 'large', weights=weights)
    refuse('too large for f16', 3, 'gate_proj.weight, row 5', large)
    with case('too large for f16 is not for q8_0'):
        convert(large, 'large.gguf', '--type', 'q8_0')
    weights['model.layers.0.extra.weight'] = 'F32', [1], b'\0\0\0\0'
    refuse('unknown tensor', 3, 'extra.weight', files.make_folder('llama', 'odd', weights=weights))


def sparse_folder(n_vocab=400000):
    """An embedding of 200 MB that takes no room on the disk."""
    folder = files.make_folder('llama-gqa', 'sparse', vocab_size=n_vocab)
    path = os.path.join(folder, 'model.safetensors')
    weights = files.read_safetensors(path)
    name, width, at, header = 'model.embed_tokens.weight', 128, 0, {}
    order = [n for n in weights if n != name] + [name]
    for n in order:
        dtype, shape, data = weights[n]
        size = len(data) if n != name else n_vocab * width * 4
        header[n] = {'dtype': dtype if n != name else 'F32', 'shape': shape if n != name else [n_vocab, width],
                     'data_offsets': [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(path, 'wb') as f:
        f.write(struct.pack('<Q', len(text)) + text + b''.join(weights[n][2] for n in order[:-1]))
        f.truncate(8 + len(text) + at)
    return folder


def failures():
    folder = sparse_folder()
    out = scratch('no.gguf')
    for number in (signal.SIGINT, signal.SIGTERM):
        with case(f'interrupted/{signal.Signals(number).name}'):
            # A shell's background job ignores SIGINT, and so do its children.
            process = subprocess.Popen([KIVI, 'convert', folder, out], env=CLEAN, stderr=subprocess.PIPE,
                                       preexec_fn=lambda n=number: signal.signal(n, signal.SIG_DFL))
            end = time.monotonic() + 60
            while not left() and process.poll() is None and time.monotonic() < end:
                time.sleep(0.001)
            process.send_signal(number)
            said = process.communicate(timeout=60)[1].decode()
            assert process.returncode == -number and 'nothing was written' in said, (process.returncode, said)
            assert not left(), left()
    with case('full/file size limit'):
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        bad(5, 'convert', folder, out, says='no.gguf', preexec_fn=limit)
        assert not left(), left()
    with case('memory'):
        if UNDER:
            skip('sanitizers hold more')
        process = subprocess.Popen([KIVI, 'convert', folder, out, '--type', 'q4_0'], env=CLEAN)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        size = os.path.getsize(os.path.join(folder, 'model.safetensors'))
        os.remove(out)
        # The vocabulary of 400,000 tokens (texts, ids, the tables it is tried with) takes some 110 MB.
        assert status == 0 and usage.ru_maxrss * 1024 < 160e6 < size, (status, usage.ru_maxrss)


for name in files.FAMILIES:
    if not UNDER or name in ('mistral-swa', 'falcon-gqa', 'gemma3'):
        with case(f'logits/{name}'):
            same_logits(name)
for name in files.TOKENIZERS:
    with case(f'ids/{name}'):
        same_ids(name)
keys()
blocks()
refusals()
failures()
finish()
