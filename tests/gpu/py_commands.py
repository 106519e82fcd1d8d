#!/usr/bin/env python3
"""py_commands.py: SmolLM2 by every command on a CUDA device, beside the CPU's answer (`make test-gpu`). Needs
KIVI_TEST_MODEL; without it each case says that it was skipped.

Between the two stand float16 products and the order of sums (py_cuda.py derives what that is in logits: about 0.01 of
their mean spread), so texts are compared where the CPU's choice is clear, and log-probabilities within NEAR.
"""
import concurrent.futures
import json
import math
import os
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from blackbox import GOLDEN, KIVI, MODEL, case, finish, good, kivi, logits, needs_model, skip, write  # noqa: E402
from serve_client import Server  # noqa: E402

CLEAR, TOP1, MEAN, P99 = 0.05, 0.98, 0.10, 0.45  # of tests/py_smollm2.py, which says what they are
NEAR = 0.15  # of a log-probability that both name: 2-bit codes that fall to the other side of a rounding
CUDA, CPU = ('--device', 'cuda'), ('--device', 'cpu')
PROMPTS = ('The capital of France is', 'Once upon a time', 'Water boils at')


def log_probabilities(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def common(a, b):
    """Bytes that two texts begin with alike."""
    return len(os.path.commonprefix([a, b]))


def reference(compute):
    """The whole of golden/smollm2.json, as py_smollm2.py has it for the CPU."""
    with case(f'reference/{compute}'):
        model, hits, clear, differences = needs_model(), 0, 0, []
        with open(os.path.join(GOLDEN, 'smollm2.json')) as f:
            texts = [t for t in json.load(f)['prompts'] if 'positions' in t]
        for i, text in enumerate(texts):
            ours = log_probabilities(logits(model, text['ids'], '--kv', 'f16', '--ctx', 256, *CUDA,
                                            '--compute', compute, name=f'reference-{compute}-{i}.npy'))
            assert len(ours) == len(text['positions'])
            for row, position in zip(ours, text['positions']):
                ids, theirs = np.array(position['top_ids']), np.array(position['top_logprobs'])
                differences.append(np.abs(row[ids] - theirs))
                if theirs[0] - theirs[1] > CLEAR:
                    clear += 1
                    hits += int(row.argmax() == ids[0])
        d = np.concatenate(differences)
        print(f'# reference {compute}: {hits} of {clear}, mean {d.mean():.4f} p99 {np.percentile(d, 99):.4f}')
        assert len(d) >= 3000, f'only {len(d)} log-probabilities were compared'
        assert hits >= TOP1 * clear, f'{hits} of {clear} clear places'
        assert d.mean() <= MEAN and np.percentile(d, 99) <= P99, f'mean {d.mean():.3f}, p99 {np.percentile(d, 99):.3f}'


def generate(prompt, *args):
    return good('run', needs_model(), '-p', prompt, '--ctx', 2048, *args).text


def run(kv):
    for text in PROMPTS:
        with case(f'run/{kv}/{text.split()[0]}'):
            texts = [generate(text, '-n', 24, '--temp', 0, '--kv', kv, *device) for device in (CPU, CUDA)]
            assert common(*texts) >= 12, texts
    with case(f'run/{kv}/sampled'):
        texts = [generate(PROMPTS[1], '-n', 24, '--seed', 7, '--kv', kv, *device)
                 for device in (CPU, CUDA, CUDA, (*CUDA, '--batch-invariant'))]
        assert texts[1] == texts[2], f'the same seed twice: {texts[1:3]}'
        assert common(texts[0], texts[1]) >= 8 and common(texts[0], texts[3]) >= 8, texts
    with case(f'run/{kv}/long-prompt'):
        story = ' '.join(f'Line {i} of the story tells about the number {i * 7 % 13}.' for i in range(60))
        texts = [generate(story, '-n', 12, '--temp', 0, '--kv', kv, *device) for device in (CPU, CUDA)]
        assert common(*texts) >= 4, texts


def chat():
    with case('chat/two-turns'):
        lines = 'What is the capital of France?\nAnd of Germany?\n'.encode()
        texts = [good('chat', needs_model(), '--temp', 0, '-c', 1024, *device, stdin=lines).text
                 for device in (CPU, CUDA)]
        assert all('Paris' in t and 'Berlin' in t for t in texts), texts


def evaluate():
    with case('eval/kld'):
        path = write('eval.txt', ' '.join(f'The {w} of the {v} is {i}.' for i in range(40) for w, v in
                                          (('colour', 'sky'), ('name', 'river'), ('end', 'road'))))
        args = ('eval', 'kld', needs_model(), '-f', path, '--ctx', 512, '--skip', 64, '--chunks', 1, '--kv',
                'kivi2,kivi2+,k4v3+', '-o', 'json')
        cpu, cuda = (json.loads(good(*args, *device, timeout=600).out) for device in (CPU, CUDA))
        for a, b in zip(cpu, cuda):
            print(f'# eval {a["kv"]}: kld {a["kld"]["mean"]:.4f} {b["kld"]["mean"]:.4f}, '
                  f'ppl {a["ppl"]:.3f} {b["ppl"]:.3f}')
            assert a['kv'] == b['kv'] and a['tokens'] == b['tokens'], (a, b)
            assert abs(a['kld']['mean'] - b['kld']['mean']) <= 0.01 + 0.25 * a['kld']['mean'], (a, b)
            assert abs(math.log(a['ppl'] / b['ppl'])) <= 0.05, (a, b)


def says(server, text, max_tokens=16, **body):
    return server.complete(prompt=text, max_tokens=max_tokens, **body)['choices'][0]


def serve():
    with case('serve/starts'):
        needs_model()
    if not MODEL:
        return
    options = ('--ctx', 1024, '--max-num-seqs', 8)
    cpu, cuda = Server(KIVI, MODEL, *options, *CPU), Server(KIVI, MODEL, *options, *CUDA)
    fixed = Server(KIVI, MODEL, *options, *CUDA, '--batch-invariant')
    with case('serve/greedy-as-on-the-cpu'):
        for text in PROMPTS:
            a, b = says(cpu, text)['text'], says(cuda, text)['text']
            assert common(a, b) >= 8, (a, b)
    settings = dict(temperature=0.9, top_p=0.9, seed=11)
    with case('serve/drawn-there'):
        for more in ({}, {'frequency_penalty': 0.8, 'presence_penalty': 0.3}, {'logit_bias': {'28': -100}},
                     {'repetition_penalty': 1.3, 'top_k': 20, 'min_p': 0.02}):
            texts = [says(s, PROMPTS[1], **settings, **more)['text'] for s in (cpu, cuda, cuda)]
            assert texts[1] == texts[2], f'{more}: the same seed twice: {texts}'
            assert common(texts[0], texts[1]) >= 4, f'{more}: {texts}'
    with case('serve/log-probabilities'):
        a, b = (says(s, PROMPTS[0], logprobs=5)['logprobs'] for s in (cpu, cuda))
        n = common(''.join(a['tokens']), ''.join(b['tokens']))
        assert n >= 8, (a['tokens'], b['tokens'])
        assert abs(a['token_logprobs'][0] - b['token_logprobs'][0]) <= NEAR, (a, b)
    with case('serve/n-choices'):
        answers = [s.complete(prompt=PROMPTS[1], max_tokens=12, n=3, **settings)['choices'] for s in (cuda, cuda)]
        texts = [[c['text'] for c in sorted(a, key=lambda c: c['index'])] for a in answers]
        assert texts[0] == texts[1] and len(set(texts[0])) > 1, texts
    with case('serve/a-schema-needs-the-host'):
        schema = {'type': 'object', 'properties': {'n': {'type': 'integer'}}, 'required': ['n'],
                  'additionalProperties': False}
        answer = cuda.chat('Answer with a number.', max_tokens=40, response_format={
            'type': 'json_schema', 'json_schema': {'name': 'number', 'schema': schema, 'strict': True}})
        assert isinstance(json.loads(answer['choices'][0]['message']['content'])['n'], int), answer
    with case('serve/neighbours-change-nothing'):
        alone = [says(fixed, text, **settings)['text'] for text in PROMPTS]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(says, fixed, PROMPTS[i % 3], **settings) for i in range(24)]
            among = [j.result()['text'] for j in jobs]
        for i, text in enumerate(among):
            assert text == alone[i % 3], f'{i}: {text!r}, alone {alone[i % 3]!r}'
    for server in (cpu, cuda, fixed):
        server.stop()


def counted(server, name):
    """A counter or gauge of /metrics."""
    for line in server.get('/metrics')[1].decode().splitlines():
        if line.split('{')[0].split(' ')[0] == f'kivi:{name}':
            return float(line.split()[-1])
    raise AssertionError(f'no kivi:{name} in /metrics')


def pages():
    """What moves a sequence's pages on a device. A prompt that is cut elsewhere has other last bits there, so answers
    are compared as far as the CPU's are."""
    if not MODEL:
        return
    options = ('--ctx', 1024, '--max-num-seqs', 6, '--rule', 'stream', '--kv', 'kivi2', *CUDA)
    items = [' '.join(f'Item {j} is {i * j}.' for j in range(60)) for i in range(6)]
    prompts = [f'{PROMPTS[i % 3]} number {i}. {items[i]}' for i in range(6)]
    ample = Server(KIVI, MODEL, *options)
    with case('serve/prefix-hit-as-a-miss'):
        miss = says(ample, prompts[0])['text']
        before = counted(ample, 'prefix_cache_hits_total')
        hit = says(ample, prompts[0])['text']
        assert counted(ample, 'prefix_cache_hits_total') - before >= 128, 'nothing was found'
        assert common(miss, hit) >= 8, (miss, hit)
    with case('serve/choices-share-a-prompt'):
        a = ample.complete(prompt=prompts[1], max_tokens=12, n=3)['choices']
        assert len(a) == 3 and len({c['text'] for c in a}) == 1, a  # greedy: whoever shares sees the same
    alone = [says(ample, p, max_tokens=300, ignore_eos=True)['text'] for p in prompts]
    ample.stop()
    tight = Server(KIVI, MODEL, *options, '--kv-memory', 10, '--no-prefix-cache')
    with case('serve/preempted-and-resumed'):
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            jobs = [pool.submit(tight.complete, prompt=p, max_tokens=300, ignore_eos=True) for p in prompts]
            among = [j.result()['choices'][0]['text'] for j in jobs]
        assert counted(tight, 'num_preemptions_total') > 0, 'all had room'
        for a, b in zip(alone, among):
            assert common(a, b) >= 8, (a, b)
    tight.stop()


found = kivi('info', os.path.join(GOLDEN, 'llama-gqa'), *CUDA)
if found.code == 4:
    with case('cuda'):
        skip(found.errors.strip())
    finish()
reference('f16')
reference('f32')
for kind in ('f16', 'kivi2', 'kivi2+'):
    run(kind)
chat()
evaluate()
serve()
pages()
finish()
