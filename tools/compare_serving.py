#!/usr/bin/env python3
"""compare_serving.py: `kivi serve`, `llama_cpp.server` and llama.cpp's own batched decode on one model file and one
machine, with the same requests.

  compare_serving.py MODEL.gguf PYTHON [--at-once 16] [--prompt 1024] [--answer 128] [--threads 2] [--kv kivi2]
                     [--reps 3]

PYTHON is an interpreter that can `import llama_cpp.server` (pip install "llama-cpp-python[server]"). Each server gets
the same texts at the same time, none of which ends early; what counts is generated tokens a second from the first
request to the last answer. llama.cpp's own batched decode is its library without a server (compare_llama.py): each
prompt in batches of 512 rows, then steps of a row of each sequence. Prints a line for each and the ratios. With --reps
kivi and the batched decode run in turn as often, and the ratios are of their medians; the server runs once."""
import argparse
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, 'tests'))
from compare_llama import PROMPT_ROWS, Llama  # noqa: E402
from serve_client import Server  # noqa: E402

KIVI = os.path.join(ROOT, os.environ.get('KIVI_BIN') or 'build/kivi')
WORDS = 'time people way water words work day part number sound place year name man men sentence set air end'.split()


def texts(n, n_tokens, seed=1):
    """Each word is one token of every vocabulary in use."""
    rng = random.Random(seed)
    return [''.join(' ' + rng.choice(WORDS) for _ in range(n_tokens)) for _ in range(n)]


def ask(port, body, out, i):
    link = http.client.HTTPConnection('127.0.0.1', port, timeout=900)
    link.request('POST', '/v1/completions', json.dumps(body), {'Content-Type': 'application/json'})
    answer = link.getresponse()
    data = json.loads(answer.read())
    assert answer.status == 200, data
    out[i] = data['usage']


def load(port, prompts, n_answer, ends, **more):
    """(seconds, prompt tokens, generated tokens) of all prompts at once."""
    out = [None] * len(prompts)
    body = {'max_tokens': n_answer, 'temperature': 0, 'logit_bias': {str(e): -100 for e in ends}, **more}
    threads = [threading.Thread(target=ask, args=(port, {**body, 'prompt': p}, out, i)) for i, p in enumerate(prompts)]
    begun = time.monotonic()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    seconds = time.monotonic() - begun
    assert all(out), 'an answer is missing'
    return seconds, sum(u['prompt_tokens'] for u in out), sum(u['completion_tokens'] for u in out)


def say(name, figures):
    seconds, n_in, n_out = figures
    print(f'{name:34} {seconds:8.1f} s  {n_in:6} in  {n_out:6} out  {n_out / seconds:8.1f} tokens/s', flush=True)
    return n_out / seconds


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as s:
        return s.getsockname()[1]


def answers(port):
    try:
        link = http.client.HTTPConnection('127.0.0.1', port, timeout=2)
        link.request('GET', '/v1/models')
        return link.getresponse().status == 200
    except OSError:
        return False


def llama_job(job):
    """In the interpreter that has llama_cpp: seconds for all prompts and answers."""
    llama, depth = Llama(job), job['depth']
    llama.decode([(0, pos, pos == 7) for pos in range(8)])  # warm
    llama.api.llama_memory_clear(llama.memory, False)
    begun = time.monotonic()
    for seq in range(job['batch']):
        for first in range(0, depth, PROMPT_ROWS):
            end = min(first + PROMPT_ROWS, depth)
            llama.decode([(seq, pos, pos == depth - 1) for pos in range(first, end)])
    llama.steps(job['steps'])
    print(time.monotonic() - begun)


def batched(o):
    job = {'model': os.path.abspath(o.model), 'kind': 'f16', 'depth': o.prompt, 'batch': o.at_once,
           'threads': o.threads, 'prompt_threads': o.threads, 'steps': o.answer}
    done = subprocess.run([o.python, os.path.abspath(__file__), '--llama-job', json.dumps(job)], check=True,
                          stdout=subprocess.PIPE, text=True)
    return float(done.stdout), o.at_once * o.prompt, o.at_once * o.answer


def serve_kivi(o, ctx, prompts, short, ends):
    with Server(KIVI, o.model, '--threads', o.threads, '--ctx', ctx, '--max-num-seqs', o.at_once, '--kv', o.kv,
                '--rule', o.rule, '--no-prefix-cache', '--device', 'cpu') as s:
        load(s.port, short, 4, ends, ignore_eos=True)  # warm
        speed = say(f'kivi serve, {o.kv}, {o.rule}', load(s.port, prompts, o.answer, ends, ignore_eos=True))
        assert s.stop() == 0
    return speed


def serve_llama(o, ctx, prompts, short, ends):
    port = free_port()
    process = subprocess.Popen(
        [o.python, '-m', 'llama_cpp.server', '--model', o.model, '--n_ctx', str(ctx), '--n_threads', str(o.threads),
         '--n_threads_batch', str(o.threads), '--port', str(port), '--host', '127.0.0.1', '--cache', 'false'],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        Server.until(lambda: process.poll() is not None or answers(port), 'llama_cpp.server answers', 60)
        assert process.poll() is None, 'llama_cpp.server ended'
        load(port, short, 4, ends)
        return say('llama_cpp.server, f16', load(port, prompts, o.answer, ends))
    finally:
        process.kill()
        process.wait()


def main():
    if sys.argv[1:2] == ['--llama-job']:
        return llama_job(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('model')
    parser.add_argument('python')
    parser.add_argument('--at-once', type=int, default=16)
    parser.add_argument('--prompt', type=int, default=1024)
    parser.add_argument('--answer', type=int, default=128)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--kv', default='kivi2')
    parser.add_argument('--rule', default='stream')
    parser.add_argument('--reps', type=int, default=1)
    o = parser.parse_args()
    ctx = o.prompt + o.answer + 64
    prompts, short = texts(o.at_once, o.prompt), texts(2, 8, 2)
    ends = (0, 2)  # <|endoftext|> and <|im_end|> of SmolLM2
    ours, alone = [], []
    for _ in range(o.reps):
        ours.append(serve_kivi(o, ctx, prompts, short, ends))
        alone.append(say('llama.cpp, batched decode, f16', batched(o)))
    theirs = serve_llama(o, ctx, prompts, short, ends)
    middle = statistics.median(ours)
    print(f'kivi / llama_cpp.server: {middle / theirs:.2f}; kivi / batched decode: '
          f'{middle / statistics.median(alone):.2f}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
