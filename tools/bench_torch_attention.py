#!/usr/bin/env python3
"""bench_torch_attention.py: float16 attention of torch (cuDNN and flash) at the shapes of `kivi bench attention`.

One query token, head size 128, random data; median of seven event-timed replays of a CUDA graph, over as many
copies of the cache as exceed the L2 cache. Also causal prompt attention at 4,096 and 32,768 tokens. Prints us.
"""
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

SHAPES = [(32, 32, 32, 4096), (8, 32, 32, 32768), (32, 32, 8, 8192), (8, 32, 8, 32768), (1, 32, 8, 131072)]
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


def main():
    print(torch.cuda.get_device_name(), 'torch', torch.__version__)
    for shape in SHAPES:
        for name, backend in BACKENDS.items():
            try:
                us, size = decode(*shape, backend)
                print('%-6s f16 decode B%-2d %d/%d T%-6d %8.1f us  %6.0f GB/s' % (name, *shape, us, size / us * 1e-3),
                      flush=True)
            except RuntimeError as e:
                print('%-6s B%d %d/%d T%d: %s' % (name, *shape, str(e).split('\n')[0]), flush=True)
            torch.cuda.empty_cache()
    for tokens in 4096, 32768:
        for name, backend in BACKENDS.items():
            us = prompt(tokens, 32, 32, backend)
            print('%-6s f16 causal prompt B1 32/32 T%-6d %9.1f us  %4.0f TFLOP/s'
                  % (name, tokens, us, 2 * 2 * tokens * tokens / 2 * 128 * 32 / us * 1e-6), flush=True)


if __name__ == '__main__':
    main()
