#!/usr/bin/env python3
"""bench_transformers.py [--json]: Hugging Face transformers at the shapes of Llama-2-7B: tokens a second of a batch.

Random float16 weights made on the GPU, SDPA, the library's own float16 cache, greedy; a batch of prompts of random ids
in, the same number of tokens out for each. The time is that of generate(), prompt included; the median of the
repetitions. A short run before it, prompt included, loads kernels.
"""
import argparse
import json
import time

import torch
import transformers

SHAPE = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
             num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5)


def make_model(layers):
    config = transformers.LlamaConfig(**{**SHAPE, 'num_hidden_layers': layers}, attn_implementation='sdpa')
    torch.set_default_dtype(torch.float16)
    with torch.device('cuda'):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator('cuda').manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.02, generator=generator)
    wrong = {(str(p.dtype), p.device.type) for p in model.parameters()} - {('torch.float16', 'cuda')}
    assert not wrong, wrong
    return model.eval()


def generate(model, batch, n_in, n_out):
    ids = torch.randint(3, SHAPE['vocab_size'], (batch, n_in), device='cuda')
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1,
                             min_new_tokens=n_out, max_new_tokens=n_out, use_cache=True, pad_token_id=0)
    torch.cuda.synchronize()
    assert out.shape == (batch, n_in + n_out), out.shape
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--tokens-in', type=int, default=160)
    parser.add_argument('--tokens-out', type=int, default=338)
    parser.add_argument('--repetitions', type=int, default=1)
    parser.add_argument('--layers', type=int, default=SHAPE['num_hidden_layers'], help='fewer: to try this script')
    parser.add_argument('--json', action='store_true', help='one object')
    o = parser.parse_args()
    model = make_model(o.layers)
    generate(model, o.batch, o.tokens_in, 8)
    times = sorted(generate(model, o.batch, o.tokens_in, o.tokens_out) for _ in range(o.repetitions))
    seconds = times[len(times) // 2]
    row = {'engine': f'transformers {transformers.__version__}, torch {torch.__version__}', 'batch': o.batch,
           'tokens_in': o.tokens_in, 'tokens_out': o.tokens_out, 'seconds': seconds,
           'tokens_per_s': o.batch * o.tokens_out / seconds, 'peak_gib': torch.cuda.max_memory_allocated() / 2**30}
    if o.json:
        print(json.dumps(row))
    else:
        print('%(engine)s: batch %(batch)d, %(tokens_in)d in, %(tokens_out)d out: %(tokens_per_s).0f tokens/s, '
              '%(seconds).1f s, peak %(peak_gib).1f GiB' % row)


if __name__ == '__main__':
    main()
