#!/usr/bin/env python3
"""py_vocab.py: `kivi tokenize` against llama.cpp's own texts and ids (from the llama-cpp-python source package), and
the time of long and of monotonous texts. Skips the vectors when they cannot be fetched."""
import json
import os
import subprocess
import sys
import tempfile
import time

import vocab_files

KIVI = os.environ.get('KIVI_BIN') or 'build/kivi'
WANTED = ['gpt-2', 'llama-spm', 'llama-bpe', 'falcon', 'qwen2', 'phi-3', 'command-r', 'mpt', 'qwen35', 'refact',
          'starcoder']
REFUSED = ['bert-bge', 'gemma-4', 'deepseek-llm', 'deepseek-coder']
N_FAILED = 0


def case(name, ok, why=''):
    global N_FAILED
    N_FAILED += not ok
    print(f'ok {name}' if ok else f'not ok {name}: {why}', flush=True)


def tokenize(path, text, *options):
    return subprocess.run([KIVI, 'tokenize', path, '-f', '-', *options], input=text, capture_output=True, timeout=300)


def vectors(folder, name):
    """(text, ids) of each case."""
    path = os.path.join(folder, 'models', f'ggml-vocab-{name}.gguf')
    with open(path + '.inp', encoding='utf-8', newline='') as f:
        texts = f.read().split('\n__ggml_vocab_test__\n')
    with open(path + '.out', encoding='utf-8') as f:
        ids = [[int(w) for w in line.split()] for line in f.read().split('\n')]
    return path, texts, ids[:len(texts)]


def check_vectors(folder, name):
    path, texts, want = vectors(folder, name)
    done = tokenize(path, '\0'.join(texts).encode() + b'\0', '--null', '--no-bos')
    have = [[int(w) for w in line.split()] for line in done.stdout.decode().split('\n')[:-1]]
    wrong = [t for t, w, h in zip(texts, want, have) if w != h]
    case(f'{name}: {len(texts)} texts', len(have) == len(texts) == len(want) and not wrong,
         f'{wrong[:2]!r} {done.stderr.decode()[:200]}')


def seconds(path, text):
    start = time.monotonic()
    done = tokenize(path, text, '--ids')
    return time.monotonic() - start, len(done.stdout.split()), done.returncode


def check_time(folder, path, name):
    """Twenty times the text in at most sixty times the time; a square would be four hundred times."""
    source = open(os.path.join(folder, 'tests', 'test-chat-template.cpp'), 'rb').read()
    texts = {'prose': (source * (10 ** 7 // len(source) + 1))[:10 ** 7]}
    for c in 'a', ' ', '<', '\n', '1', '\u4f60', '\u0301':
        texts[repr(c)] = c.encode() * 10 ** 6
    texts['alternating marks'] = '\u0301\u0316'.encode() * 250000
    for what, text in texts.items():
        few, _, _ = seconds(path, text[:len(text) // 20])
        many, n_ids, code = seconds(path, text)
        case(f'{name}: {what}, {len(text)} bytes', code == 0 and n_ids > 0 and many < 60 * max(few, 0.05),
             f'{few:.2f} s became {many:.2f} s')


def scored_json(folder):
    """llama-spm as a tokenizer.json with what such models have."""
    g = vocab_files.Gguf(os.path.join(folder, 'models', 'ggml-vocab-llama-spm.gguf')).keys
    tokens = [t.decode() for t in g['tokenizer.ggml.tokens']]
    types, scores = g['tokenizer.ggml.token_type'], g['tokenizer.ggml.scores']
    ids = {t: i for i, t in enumerate(tokens)}
    usable = {t for i, t in enumerate(tokens) if types[i] == 1}
    merges = sorted((-scores[ids[t]], ids[t[:k]], ids[t[k:]], t[:k], t[k:]) for t in usable for k in range(1, len(t))
                    if t[:k] in usable and t[k:] in usable)
    return {'model': {'type': 'BPE', 'vocab': ids, 'merges': [list(m[3:]) for m in merges], 'byte_fallback': True,
                      'fuse_unk': True, 'unk_token': '<unk>'},
            'normalizer': {'type': 'Sequence', 'normalizers': [
                {'type': 'Prepend', 'prepend': '\u2581'},
                {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '\u2581'}, {'type': 'NFC'}]},
            'added_tokens': [{'id': i, 'content': tokens[i], 'special': True, 'normalized': False} for i in range(3)]}


def check_json(folder, tmp):
    """The same ids from a tokenizer.json as from the GGUF file it was made of."""
    path, texts, want = vectors(folder, 'llama-spm')
    made = os.path.join(tmp, 'tokenizer.json')
    with open(made, 'w', encoding='utf-8') as f:
        json.dump(scored_json(folder), f)
    done = tokenize(made, '\0'.join(texts).encode() + b'\0', '--null')
    have = [[int(w) for w in line.split()] for line in done.stdout.decode().split('\n')[:-1]]
    wrong = [t for t, w, h in zip(texts, want, have) if w != h]
    case('tokenizer.json of llama-spm', len(have) == len(texts) and not wrong,
         f'{wrong[:2]!r} {done.stderr.decode()[:200]}')
    return made


def main():
    folder, why = vocab_files.fetch()
    if not folder:
        print(f'skip vectors: {why}')
        return 0
    for name in WANTED:
        check_vectors(folder, name)
    for name in REFUSED:
        done = tokenize(os.path.join(folder, 'models', f'ggml-vocab-{name}.gguf'), b'x')
        case(f'{name} is refused by name', done.returncode == 3 and b'known:' in done.stderr, done.stderr.decode())
    with tempfile.TemporaryDirectory() as tmp:
        made = check_json(folder, tmp)
        quick = os.environ.get('KIVI_TEST_QUICK', '0') not in ('', '0')
        for name in ('llama-spm',) if quick else ('llama-spm', 'llama-bpe'):
            check_time(folder, os.path.join(folder, 'models', f'ggml-vocab-{name}.gguf'), name)
        check_time(folder, made, 'tokenizer.json')
    return 1 if N_FAILED else 0


if __name__ == '__main__':
    sys.exit(main())
