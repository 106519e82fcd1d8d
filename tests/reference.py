"""reference.py: a Llama forward pass and a KIVI cache in numpy, written from the definitions (DESIGN.md sections 2 and
3) and sharing nothing with kivi. float64 throughout, except that keys and values are rounded to float16, the type of
the cache, and that the quantizer follows its float32 definition. Slow and short; for models of a few layers.
"""
import json
import os
import struct

import numpy as np


def read_safetensors(path):
    """Every tensor, as float64."""
    tensors = {}
    with open(path, 'rb') as f:
        data = f.read()
    n = struct.unpack('<Q', data[:8])[0]
    for name, t in json.loads(data[8:8 + n]).items():
        if name == '__metadata__':
            continue
        raw = data[8 + n + t['data_offsets'][0]:8 + n + t['data_offsets'][1]]
        if t['dtype'] == 'BF16':
            values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, {'F32': np.float32, 'F16': np.float16}[t['dtype']])
        tensors[name] = values.reshape(t['shape']).astype(np.float64)
    return tensors


def round_bf16(x):
    """float32 to the nearest bfloat16, ties to even."""
    u = x.astype(np.float32).view(np.uint32)
    return ((u + 0x7fff + ((u >> 16) & 1)) & np.uint32(0xffff0000)).view(np.float32)


def round_f16(x):
    return x.astype(np.float32).astype(np.float16).astype(np.float64)


# ---- the quantizer: one group lies along the last axis ----

def _f16_down(x):
    h = x.astype(np.float16)
    return np.where(h.astype(np.float32) > x, np.nextafter(h, np.float16(-np.inf)), h).astype(np.float32)


def _f16_up(x):
    h = x.astype(np.float16)
    return np.where(h.astype(np.float32) < x, np.nextafter(h, np.float16(np.inf)), h).astype(np.float32)


def quantize(x, bits):
    """What is read back after x was stored with `bits` bits."""
    x = x.astype(np.float32)
    levels = np.float32(2 ** bits - 1)
    zero = _f16_down(x.min(-1, keepdims=True))
    scale = _f16_up((x.max(-1, keepdims=True) - zero) / levels)
    divisor = np.where(scale == 0, np.float32(1), scale)
    codes = np.where(scale == 0, 0, np.clip(np.rint((x - zero) / divisor), 0, levels)).astype(np.float32)
    return (codes * scale + zero).astype(np.float64)


def quantize_even(x, bits):
    """The same without a zero point: levels lie evenly about 0 (DESIGN.md 11, the plain step)."""
    x, middle = x.astype(np.float32), np.float32(2 ** bits - 1) / np.float32(2)
    scale = _f16_up(np.abs(x).max(-1, keepdims=True) / middle)
    divisor = np.where(scale == 0, np.float32(1), scale)
    codes = np.where(scale == 0, 0, np.clip(np.rint(x / divisor + middle), 0, 2 * middle)).astype(np.float32)
    return ((codes - middle) * scale).astype(np.float64)


def quantize_keys(k, bits, group, sinks=0):
    """[T][Hk][D]; a group is `group` tokens of one channel. Tokens of a group that is not full stay as they are, and
    sinks do not count in the range of theirs."""
    n = len(k) - len(k) % group
    if bits == 16 or n == 0:
        return k
    if sinks % group and sinks < n:
        k = k.copy()
        k[sinks - sinks % group:sinks] = k[sinks]
    x = k[:n].reshape(n // group, group, -1).swapaxes(1, 2)
    return np.concatenate([quantize(x, bits).swapaxes(1, 2).reshape(k[:n].shape), k[n:]])


def quantize_values(v, bits, group, has_zero=True):
    """[T][Hk][D]; a group is `group` channels of one token."""
    form = quantize if has_zero else quantize_even
    return v if bits == 16 else form(v.reshape(len(v), -1, group), bits).reshape(v.shape)


# ---- what a query sees exactly ----

def visibility(n_tokens, n_prompt, rule, residual, span=0):
    """For each position, the first position whose key, and the first whose value, it sees in 16 bit."""
    p = np.arange(n_tokens)
    keys, values = p // residual * residual, np.maximum(0, p - residual)  # as a generated token
    prompt = p < n_prompt
    if rule == 'paper':
        keys, values = np.where(prompt, 0, keys), np.where(prompt, 0, values)
    elif rule == 'span':
        edge = p // span * span
        keys = np.where(prompt, np.minimum(edge, keys), keys)
        values = np.where(prompt, np.minimum(edge, values), values)
    else:
        assert rule == 'stream'
    return keys, values


# ---- the model ----

class Llama:
    def __init__(self, folder, bf16_frequencies=False):
        with open(os.path.join(folder, 'config.json')) as f:
            self.config = c = json.load(f)
        self.weights = read_safetensors(os.path.join(folder, 'model.safetensors'))
        self.heads, self.kv_heads, self.dim = c['num_attention_heads'], c['num_key_value_heads'], c['head_dim']
        self.frequencies = self._frequencies(c['rope_parameters'])
        if bf16_frequencies:
            self.frequencies = round_bf16(self.frequencies)

    def _frequencies(self, rope):
        f = 1 / rope['rope_theta'] ** (np.arange(0, self.dim, 2) / self.dim)
        if rope['rope_type'] == 'llama3':
            original, low, high = (rope['original_max_position_embeddings'], rope['low_freq_factor'],
                                   rope['high_freq_factor'])
            turns = original * f / (2 * np.pi)  # within the original context
            blend = np.clip((turns - low) / (high - low), 0, 1)
            f = blend * f + (1 - blend) * f / rope['factor']
        return f.astype(np.float32)

    def _rotate(self, x):
        angle = np.arange(len(x))[:, None, None] * self.frequencies.astype(np.float64)
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    def _norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config['rms_norm_eps']) * self.weights[name]

    def _attend(self, q, k, v, cache):
        """q [T][H][D], k and v [T][Hk][D]; every query reads each position exactly or from the codes, as it must."""
        k, v = round_f16(k), round_f16(v)
        column, p = np.arange(len(q)), np.arange(len(q))[:, None]
        if cache is None:
            kq, vq, exact_k, exact_v = k, v, column >= 0, column >= 0
        else:
            kq, vq = (quantize_keys(k, cache['k_bits'], cache['group'], cache.get('sinks', 0)),
                      quantize_values(v, cache['v_bits'], cache.get('v_group', cache['group']),
                                      cache.get('zero', True)))
            first_k, first_v = visibility(len(q), cache['n_prompt'], cache['rule'], cache['residual'],
                                          cache.get('span', 0))
            sink = column < cache.get('sinks', 0)
            exact_k, exact_v = (column >= first_k[:, None]) | sink, (column >= first_v[:, None]) | sink
        out = np.empty_like(q)
        for h in range(self.heads):
            g = h * self.kv_heads // self.heads
            scores = np.where(exact_k, q[:, h] @ k[:, g].T, q[:, h] @ kq[:, g].T) / np.sqrt(self.dim)
            scores[column > p] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[:, h] = (weights * exact_v) @ v[:, g] + (weights * ~exact_v) @ vq[:, g]
        return out.reshape(len(q), -1)

    def logits(self, tokens, cache=None):
        """float64 [T][V]. cache: None for 16 bit, or k_bits, v_bits, group, residual, n_prompt, rule (span, sinks;
        v_group and zero, of values, where they are not as in a plain kind)."""
        w, n = self.weights, len(tokens)
        x = w['model.embed_tokens.weight'][np.asarray(tokens)]
        for i in range(self.config['num_hidden_layers']):
            layer = f'model.layers.{i}.'
            h = self._norm(x, layer + 'input_layernorm.weight')
            q, k, v = ((h @ w[f'{layer}self_attn.{name}_proj.weight'].T).reshape(n, -1, self.dim) for name in 'qkv')
            x = x + self._attend(self._rotate(q), self._rotate(k), v, cache) @ w[layer + 'self_attn.o_proj.weight'].T
            h = self._norm(x, layer + 'post_attention_layernorm.weight')
            gate = h @ w[layer + 'mlp.gate_proj.weight'].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w[layer + 'mlp.up_proj.weight'].T)) @ \
                w[layer + 'mlp.down_proj.weight'].T
        head = 'model.embed_tokens.weight' if self.config['tie_word_embeddings'] else 'lm_head.weight'
        return self._norm(x, 'model.norm.weight') @ w[head].T
