#!/usr/bin/env python3
"""bench_torch_attention.py [--json]: float16 attention of torch at the shapes of `kivi bench attention`.

cuDNN and flash. One query token, head size 128, random data; median of seven event-timed replays of a CUDA graph, over
as many copies of the cache as exceed the L2 cache. Also causal prompt attention at 4,096 and 32,768 tokens. --json: an
object a line, as each is there.
"""
import argparse
import json

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

SHAPES = [(32, 32, 32, 4096), (8, 32, 32, 32768), (32, 32, 8, 8192), (8, 32, 8, 32768), (1, 32, 8, 131072)]
PROMPTS = (4096, 32768)
BACKENDS = {'cuDNN': SDPBackend.CUDNN_ATTENTION, 'flash': SDPBackend.FLASH_ATTENTION}


def timed(run, n):
    """Median microseconds of one of n calls captured in a graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(n):
            run(i)
    times = []
    for i in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i:
            times.append(start.elapsed_time(end))
    return sorted(times)[3] * 1e3 / n


def decode(batch, heads, kv_heads, tokens, backend):
    size = 2 * batch * kv_heads * tokens * 128 * 2
    n_sets = max(2, min(8, (1 << 30) // size))
    sets = [[torch.randn(batch, kv_heads, tokens, 128, device='cuda', dtype=torch.float16) for _ in 'kv']
            for _ in range(n_sets)]
    q = torch.randn(batch, heads, 1, 128, device='cuda', dtype=torch.float16)
    gqa = heads != kv_heads
    with sdpa_kernel(backend):
        return timed(lambda i: sdpa(q, *sets[i % n_sets], enable_gqa=gqa), max(n_sets, 8)), size


def prompt(tokens, heads, kv_heads, backend):
    q = torch.randn(1, heads, tokens, 128, device='cuda', dtype=torch.float16)
    k, v = (torch.randn(1, kv_heads, tokens, 128, device='cuda', dtype=torch.float16) for _ in 'kv')
    with sdpa_kernel(backend):
        return timed(lambda i: sdpa(q, k, v, is_causal=True, enable_gqa=heads != kv_heads), 4)


def say(row, as_json):
    if as_json:
        print(json.dumps(row), flush=True)
        return
    name = '%-6s %-6s B%-2d %d/%d T%-6d' % (row['backend'], row['what'], *row['shape'])
    if 'error' in row:
        print(name, row['error'], flush=True)
    else:
        print('%s %9.1f us  %6.0f GB/s  %4.0f TFLOP/s' % (name, row['us'], row['gbs'], row['tflops']), flush=True)


def measure(what, shape, name):
    """One figure; torch has no kernel for everything, which is an answer too."""
    row = {'what': what, 'backend': name, 'shape': shape, 'us': 0, 'gbs': 0, 'tflops': 0}
    try:
        if what == 'decode':
            row['us'], size = decode(*shape, BACKENDS[name])
            row['gbs'] = size / row['us'] * 1e-3
        else:
            batch, heads, kv_heads, tokens = shape
            row['us'] = prompt(tokens, heads, kv_heads, BACKENDS[name])
            row['tflops'] = 2 * tokens * tokens * 128 * heads / row['us'] * 1e-6
    except RuntimeError as e:
        row['error'] = str(e).split('\n')[0]
    torch.cuda.empty_cache()
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--json', action='store_true', help='an object a line')
    as_json = parser.parse_args().json
    if not as_json:
        print(torch.cuda.get_device_name(), 'torch', torch.__version__)
    for shape in SHAPES:
        for name in BACKENDS:
            say(measure('decode', shape, name), as_json)
    for tokens in PROMPTS:
        for name in BACKENDS:
            say(measure('prompt', (1, 32, 32, tokens), name), as_json)


if __name__ == '__main__':
    main()
