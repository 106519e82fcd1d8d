#!/usr/bin/env python3
"""py_convert_llama.py: llama.cpp reads what `kivi convert` writes, and finds the same log-probabilities and token ids.
Needs a Python that has llama-cpp-python: this one, KIVI_LLAMA_PYTHON, or the `llama-venv` in kivi's cache folder that
tools/compare_llama.py makes; skips where there is none.

Tolerance: llama.cpp rounds the activations of F16 matrices to float16 (2^-11 of a value) and keeps keys and values in
float16, kivi does not round activations. A log-probability is a difference of logits of magnitude 2^5, each a sum over
three layers of such products: 2^5 x 2^-11 x 2 = 0.03 a layer if all errors had one sign; 0.1 is allowed, and a mean of
0.02. Q8_0 and Q4_0: llama.cpp's activations have 8 bits, kivi's 15: an error of up to 2^-8 of the largest of 32 values,
which is some three times their spread, in each of the 21 products on the way to a logit. As independent errors these
are sqrt(21) x 3 x 2^-8 / sqrt(3) = 2^-5 of a logit's spread; four times that is allowed for the mean (norms and softmax
amplify), and the largest of 60 x 288 values is eight times the mean at most.
"""
import json
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def find_python():
    if os.environ.get('KIVI_TEST_INNER'):
        return None
    sys.path.insert(0, HERE)
    import vocab_files
    for path in (os.environ.get('KIVI_LLAMA_PYTHON'), sys.executable,
                 os.path.join(vocab_files.cache_folder(), 'llama-venv', 'bin', 'python')):
        if path and os.path.exists(path):
            probe = subprocess.run([path, '-c', 'import llama_cpp, numpy'], capture_output=True)
            if probe.returncode == 0:
                return path
    print('skip convert-llama: llama-cpp-python is not installed')
    sys.exit(0)


PYTHON = find_python()
if PYTHON:
    os.environ['KIVI_TEST_INNER'] = '1'
    os.execv(PYTHON, [PYTHON, os.path.abspath(__file__)])

import numpy as np  # noqa: E402
from llama_cpp import Llama  # noqa: E402

import convert_files as files  # noqa: E402
from blackbox import GOLDEN, case, finish, good, logits, scratch  # noqa: E402

N = 60  # shorter than the window of mistral-swa, which llama.cpp does not know for arch llama
KINDS = ('f16', 'q8_0', 'q4_0')


def log_softmax(x):
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def theirs(path, tokens):
    model = Llama(path, n_ctx=512, n_batch=512, logits_all=True, verbose=False, n_threads=1)
    model.eval(tokens)
    return model, np.array(model.scores[:len(tokens)])


def compare(family, kind):
    folder = files.make_folder(family)
    out = scratch(f'{family}-{kind}.gguf')
    good('convert', folder, out, '--type', kind)
    with open(os.path.join(GOLDEN, family, 'tokens.json')) as f:
        tokens = json.load(f)[:N]
    model, scores = theirs(out, tokens)
    ours = logits(out, tokens, '--kv', 'f16')
    apart = np.abs(log_softmax(ours) - log_softmax(scores))
    print(f'    {family} {kind}: log-probabilities apart by up to {apart.max():.4f}, {apart.mean():.5f} on average; '
          f'the logits spread by {ours.std():.2f}')
    mean = 2 ** -3 * ours.std()
    most, mean = (0.1, 0.02) if kind == 'f16' else (8 * mean, mean)
    assert apart.max() < most and apart.mean() < mean, f'up to {apart.max():.4f}, mean {apart.mean():.5f}'
    if kind != 'f16':
        return
    strings = [t for t in files.texts(60, 11) if t and '\u2581' not in t]
    mine = good('tokenize', out, '-f', '-', '--null', stdin='\0'.join(strings).encode() + b'\0').text.split('\n')
    for text, line in zip(strings, mine):
        want = model.tokenize(text.encode(), add_bos=True, special=False)
        have = [int(w) for w in line.split()]
        assert have == want, f'seed 11: {text!r}: {have}, llama.cpp {want}'
    assert model.token_bos() == 1 and model.token_eos() == 2


for name in files.FAMILIES:
    for kind in KINDS:
        with case(f'{name}/{kind}'):
            compare(name, kind)
finish()
