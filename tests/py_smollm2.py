#!/usr/bin/env python3
"""py_smollm2.py: a real model with `--kv f16` against Hugging Face transformers, which ran the GGUF's own weights in
float32. golden/smollm2.json holds, for each text, the ids and at every position the twenty most likely tokens. (That
the ids are ours is tests/test_token.c.) The bounds are llama.cpp's distance from the same reference.
"""
import json
import os

import numpy as np

from blackbox import GOLDEN, UNDER, case, finish, good, logits, needs_model, skip

CLEAR = 0.05  # log-probability between the reference's first two, from which the first must be ours
TOP1, MEAN, P99 = 0.98, 0.10, 0.45


def log_probabilities(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compare(prompts):
    """(hits, clear places, all differences of the top-20 log-probabilities)."""
    hits, clear, differences = 0, 0, []
    for prompt in prompts:
        ours = log_probabilities(logits(needs_model(), prompt['ids'], '--kv', 'f16', '--ctx', 256))
        assert len(ours) == len(prompt['ids']) == len(prompt['positions'])
        for row, position in zip(ours, prompt['positions']):
            ids, theirs = np.array(position['top_ids']), np.array(position['top_logprobs'])
            differences.append(np.abs(row[ids] - theirs))
            if theirs[0] - theirs[1] > CLEAR:
                clear += 1
                hits += int(row.argmax() == ids[0])
    return hits, clear, np.concatenate(differences)


with open(os.path.join(GOLDEN, 'smollm2.json')) as f:
    texts = json.load(f)['prompts']
texts = [t for t in texts if 'positions' in t]
found = None

with case('smollm2/logits-of-all-texts'):
    needs_model()
    assert len(texts) >= 8, f'{len(texts)} texts in the golden file'
    found = compare(texts[:2] if UNDER else texts)
    assert len(found[2]) >= (400 if UNDER else 3000), f'only {len(found[2])} log-probabilities were compared'

with case('smollm2/top-1'):
    if not found:
        skip('there are no logits')
    share = found[0] / found[1]
    assert share >= TOP1, f'{found[0]} of {found[1]} clear places, expected {TOP1:.0%}'

with case('smollm2/top-20'):
    if not found:
        skip('there are no logits')
    mean, p99 = found[2].mean(), np.percentile(found[2], 99)
    assert mean <= MEAN and p99 <= P99, f'mean {mean:.3f} (at most {MEAN}), 99th percentile {p99:.3f} (at most {P99})'

with case('smollm2/run-says-paris'):
    result = good('run', needs_model(), '-p', 'The capital of France is', '-n', 4, '--temp', 0, '--ctx', 256)
    assert result.text.startswith(' Paris'), result

finish()
