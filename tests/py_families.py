#!/usr/bin/env python3
"""py_families.py: the golden models of all families once more as GGUF, in parts, and as dummies.

The folders of golden/ are written as GGUF by the rules of llama.cpp's converter: names, keys, permuted q and k rows of
Llama and Mistral, Falcon's query_key_value turned into q, k, v, 1 added to Gemma's norms. Weights keep their type, so
kivi must give the same bytes as from the folder.
"""
import json
import os
import struct

import numpy as np

from blackbox import GOLDEN, UNDER, bad, case, finish, kivi, logits, scratch

N = 150  # tokens: past the windows of the golden models
FAMILIES = ('llama', 'llama-gqa', 'mistral-swa', 'falcon-mqa', 'falcon-gqa', 'qwen2', 'qwen3', 'gemma3', 'yarn')


def load(name, leaf):
    with open(os.path.join(GOLDEN, name, leaf)) as f:
        return json.load(f)


def read_safetensors(path):
    """name -> (dtype, shape, bytes)"""
    with open(path, 'rb') as f:
        data = f.read()
    n = struct.unpack('<Q', data[:8])[0]
    header, body = json.loads(data[8:8 + n]), data[8 + n:]
    header.pop('__metadata__', None)
    return {k: (v['dtype'], v['shape'], body[slice(*v['data_offsets'])]) for k, v in header.items()}


def write_safetensors(path, tensors):
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {'dtype': dtype, 'shape': shape, 'data_offsets': [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    with open(path, 'wb') as f:
        f.write(struct.pack('<Q', len(text)) + text + b''.join(t[2] for t in tensors.values()))


# ---- GGUF ----

TYPES = {'F32': 0, 'F16': 1, 'BF16': 30}


def gguf_string(text):
    return struct.pack('<Q', len(text.encode())) + text.encode()


def gguf_kv(key, value):
    head = gguf_string(key)
    if isinstance(value, bool):
        return head + struct.pack('<IB', 7, value)
    if isinstance(value, int):
        return head + struct.pack('<II', 4, value)
    if isinstance(value, float):
        return head + struct.pack('<If', 6, value)
    return head + struct.pack('<I', 8) + gguf_string(value)


def write_gguf(path, kvs, tensors, version=3):
    out = b'GGUF' + struct.pack('<IQQ', version, len(tensors), len(kvs)) + b''.join(gguf_kv(*kv) for kv in kvs.items())
    at, body = 0, b''
    for name, (dtype, shape, data) in tensors.items():
        out += gguf_string(name) + struct.pack(f'<I{len(shape)}Q', len(shape), *reversed(shape))
        out += struct.pack('<IQ', TYPES[dtype], at)
        body += data + bytes(-len(data) % 32)
        at = len(body)
    with open(path, 'wb') as f:
        f.write(out + bytes(-len(out) % 32) + body)


NAMES = {
    'model.embed_tokens': 'token_embd', 'lm_head': 'output', 'model.norm': 'output_norm',
    'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm', 'self_attn.q_norm': 'attn_q_norm',
    'self_attn.k_norm': 'attn_k_norm', 'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output', 'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down', 'transformer.word_embeddings': 'token_embd',
    'transformer.ln_f': 'output_norm', 'ln_attn': 'attn_norm_2', 'ln_mlp': 'attn_norm',
    'self_attention.query_key_value': 'attn_qkv', 'self_attention.dense': 'attn_output',
    'mlp.dense_h_to_4h': 'ffn_up', 'mlp.dense_4h_to_h': 'ffn_down'}
GEMMA = {**NAMES, 'post_attention_layernorm': 'post_attention_norm', 'pre_feedforward_layernorm': 'ffn_norm',
         'post_feedforward_layernorm': 'post_ffw_norm'}


def gguf_name(name, names):
    stem, suffix = name.rsplit('.', 1)
    parts = stem.split('.')
    if len(parts) > 2 and parts[1] in ('layers', 'h'):
        return f'blk.{parts[2]}.{names[".".join(parts[3:])]}.{suffix}'
    return f'{names[stem]}.{suffix}'


def rows(data, shape):
    return np.frombuffer(data, np.uint8).reshape(shape[0], -1)


def permute(data, shape, heads):
    """What convert_hf_to_gguf does to q and k of Llama: (j, j + D/2) become neighbours."""
    r = rows(data, shape)
    return r.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(r.shape).tobytes()


def split_qkv(data, shape, heads, kv_heads):
    r = rows(data, shape)
    r = r.reshape(kv_heads, heads // kv_heads + 2, shape[0] // (heads + 2 * kv_heads), r.shape[1])
    return b''.join(p.tobytes() for p in (r[:, :-2], r[:, -2], r[:, -1]))


def as_f32(dtype, data):
    if dtype == 'F32':
        return np.frombuffer(data, np.float32)
    if dtype == 'F16':
        return np.frombuffer(data, np.float16).astype(np.float32)
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)


def keys(config, arch):
    rope = config['rope_parameters']
    kvs = {'general.architecture': arch, 'block_count': config['num_hidden_layers'],
           'embedding_length': config['hidden_size'], 'context_length': config['max_position_embeddings'],
           'feed_forward_length': config.get('intermediate_size') or config['ffn_hidden_size'],
           'attention.head_count': config['num_attention_heads']}
    if arch == 'falcon':
        kvs['attention.layer_norm_epsilon'] = config['layer_norm_epsilon']
        kvs['attention.head_count_kv'] = config['num_kv_heads'] if config['new_decoder_architecture'] else 1
    else:
        kvs['attention.layer_norm_rms_epsilon'] = config['rms_norm_eps']
        kvs['attention.head_count_kv'] = config['num_key_value_heads']
    if config.get('head_dim'):
        kvs['attention.key_length'] = kvs['attention.value_length'] = config['head_dim']
    if config.get('sliding_window'):
        kvs['attention.sliding_window'] = config['sliding_window']
    if arch == 'gemma3':
        kvs['attention.sliding_window_pattern'] = 2
        rope = rope['full_attention']
    kvs['rope.freq_base'] = float(rope['rope_theta'])
    if rope['rope_type'] in ('linear', 'yarn'):
        kvs['rope.scaling.type'] = rope['rope_type']
        kvs['rope.scaling.factor'] = float(rope['factor'])
        if 'original_max_position_embeddings' in rope:
            kvs['rope.scaling.original_context_length'] = rope['original_max_position_embeddings']
    return {k if k.startswith('general') else f'{arch}.{k}': v for k, v in kvs.items()}


def llama3_divisors(config):
    r = config['rope_parameters']
    freq = 1 / r['rope_theta'] ** (np.arange(0, config['head_dim'], 2) / config['head_dim'])
    wave, old = 2 * np.pi / freq, r['original_max_position_embeddings']
    smooth = (old / wave - r['low_freq_factor']) / (r['high_freq_factor'] - r['low_freq_factor'])
    middle = 1 / ((1 - smooth) / r['factor'] + smooth)
    long = np.where(wave > old / r['low_freq_factor'], r['factor'], middle)
    out = np.where(wave < old / r['high_freq_factor'], 1, long)
    return out.astype(np.float32)


def to_gguf(family):
    """Keys and tensors of a golden model."""
    config = load(family, 'config.json')
    arch = {'mistral': 'llama', 'gemma3_text': 'gemma3'}.get(config['model_type'], config['model_type'])
    kvs, out = keys(config, arch), {}
    heads, kv_heads = kvs[f'{arch}.attention.head_count'], kvs[f'{arch}.attention.head_count_kv']
    for name, (dtype, shape, data) in read_safetensors(os.path.join(GOLDEN, family, 'model.safetensors')).items():
        if arch == 'llama' and ('q_proj' in name or 'k_proj' in name):
            data = permute(data, shape, heads if 'q_proj' in name else kv_heads)
        if 'query_key_value' in name:
            data = split_qkv(data, shape, heads, kv_heads)
        if len(shape) == 1:
            values = as_f32(dtype, data) + np.float32(arch == 'gemma3' and 'norm' in name)
            if arch == 'gemma3' and 'q_norm' in name:  # llama.cpp has no key for query_pre_attn_scalar
                values = values * np.float32(np.sqrt(config['head_dim'] / config['query_pre_attn_scalar']))
            data, dtype = values.tobytes(), 'F32'
        out[gguf_name(name, GEMMA if arch == 'gemma3' else NAMES)] = (dtype, shape, data)
    if config['rope_parameters'].get('rope_type') == 'llama3':
        out['rope_freqs.weight'] = ('F32', [config['head_dim'] // 2], llama3_divisors(config).tobytes())
    return kvs, out


def same(model, family, what, exact=True):
    """exact False: Llama 3's divisors round once more than the frequencies of a folder do."""
    tokens = load(family, 'tokens.json')[:N]
    options = ('--kv', 'kivi2' if exact else 'f16', '--residual', 32, '--prompt', 100)
    ours, theirs = logits(model, tokens, *options), logits(os.path.join(GOLDEN, family), tokens, *options)
    worst = np.abs(ours - theirs).max()
    assert (ours.tobytes() == theirs.tobytes()) if exact else worst < 0.05, f'{what}: logits differ by up to {worst}'


def gguf():
    for family in FAMILIES:
        if UNDER and family not in ('mistral-swa', 'falcon-gqa', 'gemma3'):
            continue
        with case(f'gguf/{family}'):
            kvs, tensors = to_gguf(family)
            for version in (3, 2):
                write_gguf(scratch('m.gguf'), kvs, tensors, version)
                same(scratch('m.gguf'), family, f'GGUF version {version}', exact=family != 'llama-gqa')


def old_rope_keys():
    with case('gguf/rope-factor-without-a-type'):  # as llama.cpp reads them: linear
        kvs, tensors = to_gguf('llama')
        tokens, rows = load('llama', 'tokens.json')[:60], []
        for more in ({}, {'rope.scaling.type': 'linear', 'rope.scaling.factor': 4.0}, {'rope.scaling.factor': 4.0},
                     {'rope.scale_linear': 4.0}, {'rope.scale_linear': 2.0, 'rope.scaling.factor': 4.0},
                     {'rope.scaling.type': 'none', 'rope.scaling.factor': 4.0}):
            plain = {k: v for k, v in kvs.items() if '.rope.scal' not in k}
            write_gguf(scratch('rope.gguf'), {**plain, **{f'llama.{k}': v for k, v in more.items()}}, tensors)
            rows.append(logits(scratch('rope.gguf'), tokens).tobytes())
        assert rows[0] != rows[1] and rows[1:5] == rows[1:2] * 4 and rows[5] == rows[0], [r == rows[1] for r in rows]


def beyond_the_pass():
    with case('gguf/keys-that-ask-for-more'):  # refused by name; what changes nothing is none
        kvs, tensors = to_gguf('llama')
        tokens, rows = load('llama', 'tokens.json')[:20], []
        nothing = {'expert_count': 0, 'attention.sliding_window': 0, 'logit_scale': 1.0, 'attention.scale': 0.0,
                   'final_logit_softcapping': 0.0, 'attention.causal': True}
        for more in ({}, nothing):
            write_gguf(scratch('more.gguf'), {**kvs, **{f'llama.{k}': v for k, v in more.items()}}, tensors)
            rows.append(logits(scratch('more.gguf'), tokens).tobytes())
        assert rows[0] == rows[1]
        for key, value in (('expert_count', 8), ('logit_scale', 0.5), ('attention.scale', 0.125),
                           ('embedding_scale', 12.0), ('residual_scale', 0.22), ('attn_logit_softcapping', 50.0),
                           ('attention.clamp_kqv', 8.0), ('attention.max_alibi_bias', 8.0),
                           ('attention.causal', False)):
            write_gguf(scratch('more.gguf'), {**kvs, f'llama.{key}': value}, tensors)
            bad(3, 'info', scratch('more.gguf'), says=f'key llama.{key} is')


def parts():
    with case('parts/gguf'):
        kvs, tensors = to_gguf('mistral-swa')
        names = list(tensors)
        for i in range(3):
            some = {n: tensors[n] for n in names[i::3]}
            split = {'split.no': i, 'split.count': 3, 'split.tensors.count': len(names)}
            write_gguf(scratch(f'p-{i + 1:05}-of-00003.gguf'), {**split, **(kvs if i == 0 else {})}, some)
        same(scratch('p-00001-of-00003.gguf'), 'mistral-swa', 'parts')
    with case('parts/safetensors'):
        folder = scratch('parts')
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, 'config.json'), 'w') as f:
            json.dump(load('falcon-gqa', 'config.json'), f)
        tensors = read_safetensors(os.path.join(GOLDEN, 'falcon-gqa', 'model.safetensors'))
        names, shards = list(tensors), {}
        for i in range(3):
            leaf = f'model-{i + 1:05}-of-00003.safetensors'
            write_safetensors(os.path.join(folder, leaf), {n: tensors[n] for n in names[i::3]})
            shards.update({n: leaf for n in names[i::3]})
        with open(os.path.join(folder, 'model.safetensors.index.json'), 'w') as f:
            json.dump({'metadata': {}, 'weight_map': shards}, f)
        same(folder, 'falcon-gqa', 'shards')


def leftover():
    with case('refused/unused-tensor'):  # a bias left out would go unnoticed
        kvs, tensors = to_gguf('llama')
        tensors['blk.0.attn_q.bias'] = ('F32', [128], bytes(512))
        write_gguf(scratch('extra.gguf'), kvs, tensors)
        r = kivi('info', scratch('extra.gguf'))
        assert r.code == 3 and 'blk.0.attn_q.bias' in r.errors, r


def dummies():
    for family in FAMILIES:
        if UNDER and family != 'gemma3':
            continue
        with case(f'dummy/{family}'):
            folder = scratch(f'dummy-{family}')
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, 'config.json'), 'w') as f:
                json.dump(load(family, 'config.json'), f)
            tokens = load(family, 'tokens.json')[:40]
            for kind in ('q8_0', 'q4_0', 'f16'):
                options = ('--dummy-weights', 7, '--dummy-type', kind)
                a = logits(folder, tokens, *options, '--threads', 1)
                b = logits(folder, tokens, *options, '--threads', 2)
                assert np.isfinite(a).all() and 0.05 < a.std() < 50, f'{kind}: spread {a.std()}'
                assert a.tobytes() == b.tobytes(), f'{kind}: not repeatable'
            other = logits(folder, tokens, '--dummy-weights', 8, '--dummy-type', 'f16')
            assert a.tobytes() != other.tobytes(), 'another seed, the same weights'
    with case('dummy/type'):
        r = kivi('info', os.path.join(GOLDEN, 'llama'), '--dummy-weights', 1, '--dummy-type', 'q5_k')
        assert r.code == 2 and 'q8_0' in r.errors, r


gguf()
old_rope_keys()
beyond_the_pass()
parts()
leftover()
dummies()
finish()
