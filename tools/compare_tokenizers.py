#!/usr/bin/env python3
"""compare_tokenizers.py: kivi's tokenizer.json against Hugging Face's `tokenizers` (pip install tokenizers), id by id,
on random and hostile strings. The vocabularies are those of the llama-cpp-python source package (tests/vocab_files.py),
written as tokenizer.json with the pipelines that such models have, and some made-up pipelines for the rarer parts.

    compare_tokenizers.py [--kivi build/kivi] [--strings 10000] [--seed 1] [--only NAME] [--keep FOLDER]
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import unicodedata

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', 'tests'))
import vocab_files  # noqa: E402

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace('{1,3}', '')
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
          r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")


def text_of(token):
    return token.decode('utf-8', 'surrogateescape')


def merges_of_scores(tokens, scores, types):
    """As transformers converts SentencePiece: all ways to cut a token in two tokens, the best score first."""
    ids = {t: i for i, t in enumerate(tokens)}
    usable = {t for i, t in enumerate(tokens) if types[i] in (1, 4)}
    found = []
    for t in usable:
        for k in range(1, len(t)):
            if t[:k] in usable and t[k:] in usable:
                found.append((-scores[ids[t]], ids[t[:k]], ids[t[k:]], t[:k], t[k:]))
    return [[a, b] for _, _, _, a, b in sorted(found)]


def added(tokens, types, **more):
    out = []
    for i, t in enumerate(tokens):
        if types[i] in (2, 3, 4):
            out.append({'id': i, 'content': t, 'special': types[i] != 4, 'normalized': False, 'single_word': False,
                        'lstrip': False, 'rstrip': False, **more})
    return out


def base(folder, name, pairs=True):
    g = vocab_files.Gguf(os.path.join(folder, 'models', f'ggml-vocab-{name}.gguf')).keys
    tokens = [text_of(t) for t in g['tokenizer.ggml.tokens']]
    types = g['tokenizer.ggml.token_type']
    merges = [text_of(m).split(' ') for m in g.get('tokenizer.ggml.merges', [])]
    if not merges:
        merges = merges_of_scores(tokens, g['tokenizer.ggml.scores'], types)
    elif not pairs:
        merges = [' '.join(m) for m in merges]
    model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
             'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
             'vocab': {t: i for i, t in enumerate(tokens)}, 'merges': merges}
    return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added(tokens, types),
            'normalizer': None, 'pre_tokenizer': None, 'post_processor': None, 'decoder': None, 'model': model}


def byte_level(use_regex, prefix=False):
    return {'type': 'ByteLevel', 'add_prefix_space': prefix, 'trim_offsets': True, 'use_regex': use_regex}


def split(regex, behavior='Isolated', invert=False):
    return {'type': 'Split', 'pattern': {'Regex': regex}, 'behavior': behavior, 'invert': invert}


def sequence(key, *parts):
    return {'type': 'Sequence', key: list(parts)}


def template(ids):
    return {'type': 'TemplateProcessing',
            'single': [{'SpecialToken': {'id': t, 'type_id': 0}} for t in ids]
            + [{'Sequence': {'id': 'A', 'type_id': 0}}],
            'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 1}}],
            'special_tokens': {t: {'id': t, 'ids': [i], 'tokens': [t]} for t, i in ids.items()}}


def gpt2(folder):
    t = base(folder, 'gpt-2', pairs=False)
    t['pre_tokenizer'], t['post_processor'], t['decoder'] = byte_level(True), byte_level(True), byte_level(True)
    return t


def llama3(folder):
    t = base(folder, 'llama-bpe')
    t['model']['ignore_merges'] = True
    t['pre_tokenizer'] = sequence('pretokenizers', split(LLAMA3), byte_level(False))
    t['post_processor'] = sequence('processors', byte_level(True), template({'<|begin_of_text|>': 128000}))
    t['decoder'] = byte_level(True)
    return t


def qwen2(folder):
    t = base(folder, 'qwen2')
    t['normalizer'] = {'type': 'NFC'}
    t['pre_tokenizer'] = sequence('pretokenizers', split(QWEN2), byte_level(False))
    t['decoder'] = byte_level(True)
    return t


def falcon(folder):
    t = base(folder, 'falcon')
    t['pre_tokenizer'] = sequence('pretokenizers', {'type': 'Punctuation', 'behavior': 'Contiguous'}, byte_level(True),
                                  {'type': 'Digits', 'individual_digits': False}, split('[0-9][0-9][0-9]'))
    return t


def llama2(folder):
    t = base(folder, 'llama-spm')
    t['model'].update(byte_fallback=True, fuse_unk=True, unk_token='<unk>')
    t['normalizer'] = sequence('normalizers', {'type': 'Prepend', 'prepend': '▁'},
                               {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'})
    t['post_processor'] = template({'<s>': 1})
    t['decoder'] = sequence('decoders', {'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '},
                            {'type': 'ByteFallback'}, {'type': 'Fuse'},
                            {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})
    return t


def metaspace(folder, scheme='first', parted=False):
    t = base(folder, 'llama-spm')
    t['model'].update(byte_fallback=True, fuse_unk=True, unk_token='<unk>')
    t['pre_tokenizer'] = {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': scheme, 'split': parted}
    t['decoder'] = {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': scheme, 'split': parted}
    return t


def gemma(folder):
    t = base(folder, 'llama-spm')
    t['model'].update(byte_fallback=True, fuse_unk=True, unk_token='<unk>')
    t['normalizer'] = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
    t['pre_tokenizer'] = {'type': 'Split', 'pattern': {'String': ' '}, 'behavior': 'MergedWithPrevious',
                          'invert': False}
    t['added_tokens'] += [{'id': 900, 'content': '▁▁', 'special': False, 'normalized': False, 'single_word': False,
                           'lstrip': False, 'rstrip': False}]
    t['added_tokens'][-1]['id'] = t['model']['vocab']['▁▁']
    return t


def phi3(folder):
    t = llama2(folder)
    t['added_tokens'] += [{'id': 32000 + i, 'content': c, 'special': True, 'normalized': False, 'single_word': False,
                           'lstrip': False, 'rstrip': True}
                          for i, c in enumerate(('<|end|>', '<|user|>', '<|assistant|>'))]
    return t


def tekken(folder):
    t = base(folder, 'llama-bpe')
    t['model']['ignore_merges'] = True
    t['pre_tokenizer'] = sequence('pretokenizers', split(TEKKEN), byte_level(False))
    return t


def smollm(folder):
    t = base(folder, 'starcoder')
    digits = {'type': 'Digits', 'individual_digits': True}
    t['pre_tokenizer'] = sequence('pretokenizers', digits, byte_level(True, True))
    return t


def no_fallback(folder):
    """Unknown characters, words of letters only, normal forms, and added tokens of every kind."""
    t = base(folder, 'llama-spm')
    t['model'].update(unk_token='<unk>', fuse_unk=True)
    t['normalizer'] = sequence('normalizers', {'type': 'NFKD'}, {'type': 'StripAccents'}, {'type': 'Lowercase'},
                               {'type': 'Strip', 'strip_left': True, 'strip_right': True})
    t['pre_tokenizer'] = {'type': 'Whitespace'}
    t['added_tokens'] += [
        {'id': 32000, 'content': 'CAFÉ', 'special': False, 'normalized': True, 'single_word': True, 'lstrip': False,
         'rstrip': False},
        {'id': 32001, 'content': '[x]', 'special': False, 'normalized': False, 'single_word': False, 'lstrip': True,
         'rstrip': True},
        {'id': 32002, 'content': '#', 'special': False, 'normalized': False, 'single_word': True, 'lstrip': True,
         'rstrip': False}]
    return t


def cuts(folder, behavior, invert):
    t = base(folder, 'gpt-2')
    t['pre_tokenizer'] = sequence('pretokenizers', split(r'\s|[a-c]+|\d', behavior, invert),
                                  {'type': 'CharDelimiterSplit', 'delimiter': 'x'}, byte_level(False))
    t['normalizer'] = sequence('normalizers', {'type': 'NFD'},
                               {'type': 'Replace', 'pattern': {'Regex': r'q\w?'}, 'content': 'kw'})
    return t


KINDS = {'gpt2': gpt2, 'llama3': llama3, 'qwen2': qwen2, 'falcon': falcon, 'llama2': llama2, 'gemma': gemma,
         'phi3': phi3, 'metaspace-first': metaspace, 'metaspace-always': lambda f: metaspace(f, 'always', True),
         'metaspace-never': lambda f: metaspace(f, 'never', True), 'tekken': tekken, 'smollm': smollm,
         'no-fallback': no_fallback}
for b in ('Isolated', 'Removed', 'Contiguous', 'MergedWithPrevious', 'MergedWithNext'):
    for inverted in (False, True):
        KINDS[f'{b}{"-inverted" if inverted else ""}'] = lambda f, b=b, i=inverted: cuts(f, b, i)

WORDS = '''the of and Hello world I'm WE'LL don't Übermut naïve café ÇA déjà-vu 你好世界 こんにちは 안녕하세요 Привет мир مرحبا
שלום नमस्ते สวัสดี 🤗 👨‍👩‍👧‍👦 🏳️‍🌈 1234567 3.14 0x1F ① Ⅷ ½ x² ﬁ ﷺ İstanbul ſ K Å a̧̐ḇ̡ e\u0301 q̣̇ ① <s> </s> <unk>
<0x41> <|end|> <|user|>
<|begin_of_text|> <|endoftext|> <|im_start|> ▁ ▁▁ _ __ ... --- !!! ??? ((( [x] #
CAFÉ café \\ \\n / // http://a.b/c?d=e&f
foo_bar
camelCase HTTPServer iPhone abcabc qx qqq xxx
if(x){return;} $100 €5 100% \ufeff \u200b \u200d \u180e ᄀ각 ᅡ'''.split()
SPACES = [' ', '  ', '   ', '\t', '\n', '\r\n', '\n\n', ' \n', '\u00a0', '\u3000', '\u2028', '\x85', '\x0b', '\x1f', '']


def assigned(c):
    """Theirs has tables of Unicode 9 for marks, punctuation and decompositions: newer ones are left out."""
    kind = unicodedata.category(c)
    changed = kind[0] in 'MP' or unicodedata.decomposition(c) or c in '\u1cf2\u1cf3'
    old = not changed or unicodedata.ucd_3_2_0.category(c) != 'Cn'
    return kind not in ('Cn', 'Cs') and old


def strings(n, seed):
    rng = random.Random(seed)
    out = ['', ' ', '  ', '\n', 'a', 'aa', ' a', 'a ', "'", "'s", '<s>', '<s> ', ' <s>', '▁', '\u0301', 'a\u0301\u0301']
    pool = [chr(c) for c in range(1, 0x3000) if assigned(chr(c))]
    while len(out) < n:
        kind, s = rng.randrange(6), ''
        for _ in range(rng.randrange(1, 24)):
            if kind == 0:
                s += rng.choice(WORDS) + rng.choice(SPACES)
            elif kind == 1:
                s += rng.choice(pool)
            elif kind == 2:
                s += rng.choice(' \t\n\ra1\'.<') * rng.randrange(1, 6)
            elif kind == 3:
                s += rng.choice('etaoinshrdlu ETAOIN 0123456789 .,') + rng.choice(SPACES[:2] + [''] * 6)
            elif kind == 4:
                c = chr(rng.randrange(1, 0x20000))
                s += c if assigned(c) else ' '
            else:
                s += rng.choice(WORDS + SPACES + pool[:200])
        out.append(s.replace('\0', ''))
    return out[:n]


def kivi_ids(options, path, texts, *more):
    done = subprocess.run([options.kivi, 'tokenize', path, '-f', '-', '--null', *more],
                          input='\0'.join(texts).encode() + b'\0', capture_output=True)
    if done.returncode:
        return done.stderr.decode().strip()
    return [[int(w) for w in line.split()] for line in done.stdout.decode().split('\n')[:-1]]


def compare(name, options, path, texts):
    from tokenizers import Tokenizer
    theirs = Tokenizer.from_file(path)
    n_bad = 0
    for special in (True, False):
        theirs.encode_special_tokens = not special
        want = [e.ids for e in theirs.encode_batch(texts)]
        have = kivi_ids(options, path, texts, *(['--special'] if special else []))
        if isinstance(have, str) or len(have) != len(want):
            print(f'not ok {name}: {have if isinstance(have, str) else len(have)}')
            return 1
        bad = [(t, w, h) for t, w, h in zip(texts, want, have) if w != h]
        n_bad += len(bad)
        for t, w, h in bad[:3]:
            print(f'    {t!r}\n      theirs {w}\n      kivi   {h}')
    print(f'{"not ok" if n_bad else "ok"} {name}: {len(texts)} strings, twice; {n_bad} differ', flush=True)
    return n_bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--kivi', default='build/kivi')
    parser.add_argument('--strings', type=int, default=10000)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--only', default='')
    parser.add_argument('--keep', help='leave the tokenizer.json files in this folder')
    options = parser.parse_args()
    folder, why = vocab_files.fetch()
    if not folder:
        sys.exit(f'compare_tokenizers.py: {why}')
    texts, n_bad = strings(options.strings, options.seed), 0
    with tempfile.TemporaryDirectory() as tmp:
        for name, make in KINDS.items():
            if options.only and options.only != name:
                continue
            path = os.path.join(options.keep or tmp, f'{name}.json')
            with open(path, 'w', encoding='utf-8') as out:
                json.dump(make(folder), out, ensure_ascii=False)
            n_bad += compare(name, options, path, texts)
    return 1 if n_bad else 0


if __name__ == '__main__':
    sys.exit(main())
