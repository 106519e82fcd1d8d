"""convert_files.py: small model folders with tokenizers for tests of `kivi convert`, and a reader of GGUF tensors."""
import json
import os
import random
import shutil
import struct

import numpy as np

import vocab_files
from blackbox import GOLDEN, scratch

FAMILIES = ('llama', 'llama-gqa', 'mistral-swa', 'falcon-mqa', 'falcon-gqa', 'qwen2', 'qwen3', 'gemma3', 'yarn')
TYPES = {0: ('F32', 1, 4), 1: ('F16', 1, 2), 2: ('Q4_0', 32, 18), 8: ('Q8_0', 32, 34)}
DTYPES = {'F32': np.float32, 'F16': np.float16}
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace('{1,3}', '')
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
          r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")


# ---- safetensors ----

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
        header[name] = {'dtype': dtype, 'shape': list(shape), 'data_offsets': [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    with open(path, 'wb') as f:
        f.write(struct.pack('<Q', len(text)) + text + b''.join(t[2] for t in tensors.values()))


def as_f32(dtype, data):
    if dtype in DTYPES:
        return np.frombuffer(data, DTYPES[dtype]).astype(np.float32)
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)


# ---- tokenizers of 288 tokens ----

def alphabet():
    """GPT-2's visible character of each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


def byte_level(words, prefix=False):
    return {'type': 'ByteLevel', 'add_prefix_space': prefix, 'trim_offsets': True, 'use_regex': words}


def split(regex, behavior='Isolated'):
    return {'type': 'Split', 'pattern': {'Regex': regex}, 'behavior': behavior, 'invert': False}


def sequence(*parts):
    return {'type': 'Sequence', 'pretokenizers': list(parts)}


CUTS = {'gpt-2': byte_level(True), 'llama-bpe': sequence(split(LLAMA3), byte_level(False)),
        'smollm': sequence({'type': 'Digits', 'individual_digits': True}, byte_level(True)),
        'falcon': sequence({'type': 'Punctuation', 'behavior': 'Contiguous'}, byte_level(True),
                           {'type': 'Digits', 'individual_digits': False}, split('[0-9][0-9][0-9]')),
        'qwen2': sequence(split(QWEN2), byte_level(False)), 'tekken': sequence(split(TEKKEN), byte_level(False))}


def added(texts, special=True, **more):
    return [{'id': i, 'content': t, 'special': special, 'normalized': False, 'single_word': False, 'lstrip': False,
             'rstrip': False, **more} for i, t in texts.items()]


def template(token, i):
    return {'type': 'TemplateProcessing', 'single': [{'SpecialToken': {'id': token, 'type_id': 0}},
                                                     {'Sequence': {'id': 'A', 'type_id': 0}}],
            'special_tokens': {token: {'id': token, 'ids': [i], 'tokens': [token]}}}


def bytes_tokenizer(pre):
    merges = [['h', 'e'], ['l', 'l'], ['he', 'll'], ['hell', 'o'], ['Ġ', 't'], ['Ġt', 'he'], ['i', 'n'], ['1', '2'],
              ['12', '3'], ['Ġ', 'Ġ'], ['ĠĠ', 'ĠĠ'], ['e', 'r'], ["'", 's'], ['Ċ', 'Ċ'], ['!', '!']]
    if pre != 'falcon':  # which takes the second, one of its bytes, for a digit
        merges.append(['Ã', '¼'])
    special = ['<pad>', '<s>', '</s>', '<|im_start|>', '<|im_end|>']
    vocab = {t: i for i, t in enumerate(special)}
    for t in [*alphabet().values(), *(a + b for a, b in merges)]:
        vocab[t] = len(vocab)
    for t in special:
        del vocab[t]
    more = {len(vocab) + len(special): '<tool>'}
    model = {'type': 'BPE', 'vocab': vocab, 'merges': merges, 'ignore_merges': pre in ('llama-bpe', 'tekken')}
    return {'version': '1.0', 'added_tokens': added(dict(enumerate(special))) + added(more, special=False),
            'normalizer': {'type': 'NFC'} if pre == 'qwen2' else None, 'pre_tokenizer': CUTS[pre],
            'post_processor': template('<s>', 1) if pre == 'llama-bpe' else None, 'decoder': byte_level(True),
            'model': model}


def scored_tokenizer(kind):
    """kind: llama (a space in front), gemma (none, runs of spaces are added tokens), first (Metaspace)."""
    words = ['▁', 'e', 't', 'h', 'l', 'o', 'a', 'n', 'i', '▁▁', '▁t', 'he', '▁the', 'th', 'll', 'hell', 'hello', 'in',
             'an', '▁a', '▁in', 'llo', 'lo']
    vocab = {t: i for i, t in enumerate(['<unk>', '<s>', '</s>'] + [f'<0x{b:02X}>' for b in range(256)] + words)}
    rank = {t: i for i, t in enumerate(words)}
    merges = sorted((rank[t], t[:k], t[k:]) for t in words for k in range(1, len(t)) if t[:k] in rank and t[k:] in rank)
    model = {'type': 'BPE', 'vocab': vocab, 'merges': [[a, b] for _, a, b in merges], 'byte_fallback': True,
             'fuse_unk': True, 'unk_token': '<unk>'}
    spaces = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
    out = {'version': '1.0', 'added_tokens': added(dict(enumerate(['<unk>', '<s>', '</s>']))), 'model': model,
           'post_processor': template('<s>', 1),
           'decoder': {'type': 'Sequence', 'decoders': [
               {'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '}, {'type': 'ByteFallback'},
               {'type': 'Fuse'}]}}
    if kind == 'first':
        out['pre_tokenizer'] = {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'first', 'split': False}
        return out
    out['normalizer'] = {'type': 'Sequence', 'normalizers': [{'type': 'Prepend', 'prepend': '▁'}, spaces]}
    if kind == 'gemma':
        out['normalizer'] = spaces
        out['pre_tokenizer'] = {'type': 'Split', 'pattern': {'String': ' '}, 'behavior': 'MergedWithPrevious',
                                'invert': False}
        out['added_tokens'] += added({vocab['▁▁']: '▁▁'}, special=False)
        out['added_tokens'] += added({len(vocab): '<start_of_turn>', len(vocab) + 1: '<end_of_turn>'})
    return out


TOKENIZERS = {'llama': lambda: scored_tokenizer('llama'), 'mistral-swa': lambda: scored_tokenizer('first'),
              'gemma3': lambda: scored_tokenizer('gemma'), 'llama-gqa': lambda: bytes_tokenizer('llama-bpe'),
              'falcon-mqa': lambda: bytes_tokenizer('falcon'), 'falcon-gqa': lambda: bytes_tokenizer('gpt-2'),
              'qwen2': lambda: bytes_tokenizer('qwen2'), 'qwen3': lambda: bytes_tokenizer('qwen2'),
              'yarn': lambda: bytes_tokenizer('tekken'), 'smollm': lambda: bytes_tokenizer('smollm')}
SETTINGS = {'bos_token': '<s>', 'eos_token': '</s>',
            'chat_template': "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
                             "{% endfor %}"}


def put(folder, leaf, value):
    with open(os.path.join(folder, leaf), 'w', encoding='utf-8') as f:
        json.dump(value, f, ensure_ascii=False)


def make_folder(family, name=None, tokenizer=None, weights=None, **config):
    """A golden model with a tokenizer, its configuration changed by `config` (None takes a key out)."""
    folder = scratch(name or f'hf-{family}')
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    with open(os.path.join(GOLDEN, family, 'config.json')) as f:
        settings = {k: v for k, v in {**json.load(f), **config}.items() if v is not None}
    put(folder, 'config.json', settings)
    put(folder, 'tokenizer.json', tokenizer or TOKENIZERS[family]())
    put(folder, 'tokenizer_config.json', SETTINGS)
    path = os.path.join(folder, 'model.safetensors')
    if weights is None:
        shutil.copyfile(os.path.join(GOLDEN, family, 'model.safetensors'), path)
    else:
        write_safetensors(path, weights)
    return folder


def rounded(family):
    """The golden weights as an F16 file has them: matrices F16, vectors F32."""
    out = {}
    for name, (dtype, shape, data) in read_safetensors(os.path.join(GOLDEN, family, 'model.safetensors')).items():
        values = as_f32(dtype, data)
        kind = 'F16' if len(shape) == 2 else 'F32'
        out[name] = kind, shape, values.astype(DTYPES[kind]).tobytes()
    return out


# ---- GGUF ----

class File(vocab_files.Gguf):
    """Keys, and tensors as name -> (type, shape, bytes)."""
    def __init__(self, path):
        super().__init__(path)
        infos = []
        for _ in range(struct.unpack_from('<Q', self.data, 8)[0]):
            name = self.string().decode()
            shape = [self.number('Q') for _ in range(self.number('I'))][::-1]
            infos.append((name, shape, self.number('I'), self.number('Q')))
        start, self.tensors = self.at + -self.at % 32, {}
        for name, shape, kind, offset in infos:
            title, n, size = TYPES[kind]
            n_bytes = int(np.prod(shape)) // n * size
            self.tensors[name] = title, shape, self.data[start + offset:start + offset + n_bytes]


def dequantize(kind, data):
    if kind in DTYPES:
        return as_f32(kind, data)
    rows = np.frombuffer(data, np.uint8).reshape(-1, 34 if kind == 'Q8_0' else 18)
    d = rows[:, :2].copy().view(np.float16).astype(np.float32)
    codes = rows[:, 2:]
    if kind == 'Q8_0':
        return (d * codes.view(np.int8)).ravel()
    return (d * (np.concatenate([codes & 15, codes >> 4], 1).astype(np.int8) - 8)).ravel()


# ---- texts ----

def texts(n, seed):
    rng = random.Random(seed)
    words = ("hello the in other 12 123 1234567 's 'S don't !! ... <tool> <s> </s> <|im_end|> <start_of_turn> "
             "naïve über 你好 Привет 🤗 camelCase foo_bar ▁ ▁▁ a/b // x=1; \u0301").split(' ')
    spaces = [' ', ' ', '  ', '    ', '\n', '\n\n', '\t', '\r\n', '', '\u00a0', '\u3000']
    return ['', ' ', 'a', ' a', 'a '] + [''.join(rng.choice(words) + rng.choice(spaces)
                                                 for _ in range(rng.randrange(1, 12))) for _ in range(n)]
