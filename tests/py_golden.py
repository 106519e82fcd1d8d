#!/usr/bin/env python3
"""py_golden.py: the logits of kivi against golden files of Hugging Face transformers, and against a numpy model.

The golden files of the first families but llama need `--rope-freq` with their stored type, such as bf16. Their
generator (golden/make_golden.py, main) stores the model with m.to(bfloat16), which rounds the module's rotary buffer
inv_freq as well, and going back to float32 before the reference is run does not bring it back. Real checkpoints hold
no such buffer: they are served with float32 frequencies, and that is kivi's default. The cases `frequencies` prove
it: numpy with rounded frequencies gives the golden file, with float32 frequencies it gives what kivi does by default,
and the two are far apart. So for llama-gqa the default is proved by the numpy model (reference.py), which also covers
what has no golden file: the other rules, sinks, and keys or values alone in 16 bit.
"""
import json
import os

import numpy as np

from blackbox import FAMILIES, GOLDEN, UNDER, case, finish, logits
from reference import Llama

# The page of issue 6. Logits have a spread of about 3 (llama) and 8 (llama-gqa).
F16_MEAN, F16_MAX = 2e-3, 5e-2
KIVI_MEAN, KIVI_SHARE = 4e-3, 0.10
# Against numpy the share is measured at 0.001 to 0.021 (float16 rounding that falls on another code); a boundary of
# exact values that is one position off makes 0.03 to 0.6, so this finds it where the page's 0.10 would not.
NUMPY_SHARE = 0.025
NUMPY_MAX = 5e-3  # of a 16-bit cache over 40 tokens: float32 sums, and ties of float16 rounding that fall differently


def load(name):
    with open(os.path.join(GOLDEN, name)) as f:
        return json.load(f)


def check(difference, to_f16, share=KIVI_SHARE):
    """Both are [..][V]; to_f16 is how far the case itself is from a 16-bit cache, 0 for f16."""
    mean, worst = np.abs(difference).mean(), np.abs(difference).max()
    assert np.isfinite(worst), 'not finite'
    limit = KIVI_MEAN + share * to_f16 if to_f16 else F16_MEAN
    assert mean <= limit, f'mean |difference| {mean:.5f}, expected at most {limit:.5f} (max {worst:.4f})'
    assert to_f16 or worst <= F16_MAX, f'max |difference| {worst:.5f}, expected at most {F16_MAX}'


def golden(family, *options):
    folder = os.path.join(GOLDEN, family)
    tokens = load(f'{family}/tokens.json')
    for name, c in load(f'{family}/cases.json')['cases'].items():
        if not isinstance(c, dict) or UNDER and name not in ('f16', 'k2v2-r32'):
            continue
        with case(f'golden/{family}/{name}'):
            ours = logits(folder, tokens, '--prompt', c['n_prompt'], '--k-bits', c['k_bits'], '--v-bits', c['v_bits'],
                          '--group', c['group'], '--residual', c['residual'], *options)
            theirs = np.load(os.path.join(folder, name + '.npy'))
            assert ours.shape[0] == len(tokens) and theirs.shape == (len(c['positions']), ours.shape[1])
            check(ours[c['positions']] - theirs, c['mean_abs_diff_to_f16'])


def frequencies():
    folder, n = os.path.join(GOLDEN, 'llama-gqa'), 40
    tokens = load('llama-gqa/tokens.json')[:n]
    positions = [p for p in load('llama-gqa/cases.json')['cases']['f16']['positions'] if p < n]
    theirs = np.load(os.path.join(folder, 'f16.npy'))[:len(positions)]
    rounded, full = Llama(folder, bf16_frequencies=True).logits(tokens), Llama(folder).logits(tokens)

    def near(a, b):
        worst = np.abs(a - b).max()
        assert worst < NUMPY_MAX, f'max |difference| {worst:.5f}, expected less than {NUMPY_MAX}'

    with case('frequencies/numpy-bf16-is-golden'):
        near(rounded[positions], theirs)
    with case('frequencies/numpy-f32-is-kivi'):
        near(full, logits(folder, tokens, '--kv', 'f16'))
    with case('frequencies/numpy-bf16-is-kivi-bf16'):
        near(rounded, logits(folder, tokens, '--kv', 'f16', '--rope-freq', 'bf16'))
    with case('frequencies/they-differ'):
        apart = np.abs(rounded - full).max()
        assert apart > 0.1, f'rounded frequencies change the logits by {apart:.5f} only'


# name, model, rule, K bits, V bits, group, residual, sinks, prompt
NUMPY_CASES = [
    ('paper', 'llama-gqa', 'paper', 2, 2, 32, 32, 0, 140),
    ('paper-r128', 'llama-gqa', 'paper', 2, 2, 32, 128, 0, 140),
    ('stream', 'llama-gqa', 'stream', 2, 2, 32, 32, 0, 140),
    ('stream-g16', 'llama-gqa', 'stream', 2, 2, 16, 48, 0, 205),
    ('stream-g64', 'llama-gqa', 'stream', 4, 2, 64, 64, 0, 140),
    ('span-128', 'llama-gqa', 'span:128', 2, 2, 32, 32, 0, 190),
    ('span-128-long-prompt', 'llama', 'span:128', 2, 2, 32, 64, 0, 205),
    ('sinks', 'llama-gqa', 'stream', 2, 2, 32, 32, 32, 140),
    ('sinks-paper', 'llama-gqa', 'paper', 2, 2, 32, 32, 32, 100),
    ('sinks-span', 'llama', 'span:128', 2, 2, 32, 32, 64, 200),
    ('sinks-4', 'llama-gqa', 'stream', 2, 2, 32, 32, 4, 140),
    ('sinks-1-g64', 'llama-gqa', 'stream', 2, 2, 64, 64, 1, 140),
    ('sinks-20-span', 'llama', 'span:128', 2, 2, 16, 32, 20, 140),
    ('k16v2', 'llama-gqa', 'stream', 16, 2, 32, 32, 0, 140),
    ('k2v16', 'llama-gqa', 'stream', 2, 16, 32, 32, 0, 140),
    ('k16v2-paper', 'llama-gqa', 'paper', 16, 2, 32, 32, 32, 100),
    ('k8v4', 'llama', 'stream', 8, 4, 32, 32, 0, 100),
    ('decode-alone', 'llama-gqa', 'paper', 2, 2, 32, 32, 0, 0),
]


# What kivi2+ changes in kivi2's groups, alone: name, --parts, key group, value group, zero point
PARTS_ALONE = [
    ('none', 'zero,k32,v32', 32, 32, True),
    ('k128', 'zero,v32', 128, 32, True),
    ('nozero', 'k32,v32', 32, 32, False),
    ('v64', 'zero,k32', 32, 64, True),
    ('k128-nozero-v64', 'none', 128, 64, False),
]


def numpy_parts():
    n, sinks, family = 205, 4, 'llama-gqa'
    tokens = load(f'{family}/tokens.json')[:n]
    model = Llama(os.path.join(GOLDEN, family))
    exact = model.logits(tokens)
    others = []
    for name, parts, group, v_group, zero in PARTS_ALONE:
        with case(f'numpy/parts-{name}-alone'):
            cache = dict(k_bits=2, v_bits=2, group=group, v_group=v_group, zero=zero, residual=128, sinks=sinks,
                         n_prompt=0, rule='stream')
            reference = model.logits(tokens, cache)
            to_f16 = np.abs(reference - exact).mean()
            assert to_f16 > 1e-3, f'the case is no different from a 16-bit cache ({to_f16:.5f})'
            ours = logits(os.path.join(GOLDEN, family), tokens, '--kv', 'kivi2+', '--parts', parts, '--rule', 'stream')
            check(ours - reference, to_f16, NUMPY_SHARE)
            # and none of them is another: the share would not tell two that lie near
            assert all(np.abs(reference - o).mean() > 2 * np.abs(ours - reference).mean() for o in others)
            others.append(reference)


def numpy_cache():
    n = 205
    tokens = load('llama-gqa/tokens.json')[:n]
    models = {family: Llama(os.path.join(GOLDEN, family)) for family in ('llama', 'llama-gqa')}
    exact = {family: model.logits(tokens) for family, model in models.items()}
    for name, family, rule, k_bits, v_bits, group, residual, sinks, n_prompt in NUMPY_CASES:
        if UNDER and name not in ('stream', 'sinks-span'):
            continue
        with case(f'numpy/{name}'):
            span = int(rule[5:]) if rule.startswith('span:') else 0
            cache = dict(k_bits=k_bits, v_bits=v_bits, group=group, residual=residual, sinks=sinks, n_prompt=n_prompt,
                         rule='span' if span else rule, span=span)
            reference = models[family].logits(tokens, cache)
            to_f16 = np.abs(reference - exact[family]).mean()
            assert to_f16 > 1e-3, f'the case is no different from a 16-bit cache ({to_f16:.5f})'
            ours = logits(os.path.join(GOLDEN, family), tokens, '--prompt', n_prompt, '--k-bits', k_bits, '--v-bits',
                          v_bits, '--group', group, '--residual', residual, '--sinks', sinks, '--rule', rule)
            check(ours - reference, to_f16, NUMPY_SHARE)
            if n_prompt and rule == 'paper':  # exact for the whole prompt, so held to the 16-bit bound there
                check((ours - reference)[:n_prompt], 0)


for family, *options in FAMILIES:
    golden(family, *options)
frequencies()
numpy_cache()
if not UNDER:
    numpy_parts()
finish()
