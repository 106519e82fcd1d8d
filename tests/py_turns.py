#!/usr/bin/env python3
"""py_turns.py: where an answer ends, and what Ctrl-C does to a prompt; on tiny models with made-up tokenizers."""
import fcntl
import json
import os
import re
import signal
import subprocess
import termios
import time

import numpy as np

import convert_files as files
from blackbox import CLEAN, KIVI, UNDER, case, finish, good, kivi, logits, scratch

TEXT = 'hello the in other'
GREEDY = ('--temp', 0, '-t', 1)


def chosen(model, n=6):
    """The tokens that a greedy answer has, from the logits."""
    line = good('tokenize', model, '-p', TEXT, '--ids').text
    ids, answer = [int(w) for w in line.split()], []
    for _ in range(n):
        row = logits(model, ids, '--prompt', len(ids) - len(answer), '-t', 1)[-1]
        answer.append(int(np.argmax(row)))
        ids.append(answer[-1])
    return answer


def n_generated(model, *more):
    return good('run', model, '-p', TEXT, '-n', 6, *GREEDY, '--stats', 'json', *more).stats()['gen_tokens']


def with_mark(i):
    """The tokenizer with <|im_end|> in the place of token i."""
    tokenizer = files.TOKENIZERS['qwen2']()
    model = tokenizer['model']
    tokenizer['added_tokens'] = [t for t in tokenizer['added_tokens'] if t['content'] != '<|im_end|>' and t['id'] != i]
    gone = {t for t, k in model['vocab'].items() if k == i}
    model['merges'] = [m for m in model['merges'] if not gone & {*m, ''.join(m)}]
    model['vocab'] = {t: k for t, k in model['vocab'].items() if k != i}
    tokenizer['added_tokens'] += files.added({i: '<|im_end|>'}, special=False)
    return tokenizer


def ends():
    folder = files.make_folder('qwen2', 'ends')
    answer = chosen(folder)
    first = answer.index(answer[3])
    with case('ends/none'):
        assert n_generated(folder) == 6, 'the answer of this model has an end of its own'
    for name, leaf, value in (('generation_config.json, one', 'generation_config.json', answer[3]),
                              ('generation_config.json, a list', 'generation_config.json', [2, answer[3]]),
                              ('config.json, a list', 'config.json', [2, answer[3]])):
        with case(f'ends/{name}'):
            there = {}
            if leaf == 'config.json':
                with open(os.path.join(folder, leaf)) as f:
                    there = json.load(f)
            made = files.make_folder('qwen2', 'ends-too')
            files.put(made, leaf, {**there, 'eos_token_id': value})
            assert n_generated(made) == first, n_generated(made)
            assert n_generated(made, '--ignore-eos') == 6
            out = scratch('ends.gguf')
            good('convert', made, out, '--force')
            assert n_generated(out) == first, 'converted: ' + str(n_generated(out))
    with case('ends/the mark of a chat format'):  # even where it is an ordinary added token
        same, j = good('tokenize', folder, '-p', TEXT, '--ids').text, 0
        while True:  # a token of the answer that the prompt does not need
            made = files.make_folder('qwen2', 'ends-too', tokenizer=with_mark(answer[j]))
            if answer.index(answer[j]) == j and good('tokenize', made, '-p', TEXT, '--ids').text == same:
                break
            j += 1
        assert n_generated(made) == j and n_generated(made, '--ignore-eos') == 6


def slow_folder():
    """Random weights of some size: a prompt takes seconds."""
    tokenizer = files.TOKENIZERS['llama-gqa']()
    size = 512 if UNDER else 1024
    return files.make_folder('llama-gqa', 'slow', tokenizer=tokenizer, hidden_size=size, intermediate_size=4 * size,
                             num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4, head_dim=64)


OPTIONS = ('--dummy-weights', '1', '--dummy-type', 'q8_0', '-c', '8192', '-n', '4', '-t', '1', '--temp', '0', '--kv',
           'kivi2', '--rule', 'stream')


class Chat:
    def __init__(self, folder):
        self.err = open(scratch('chat.err'), 'w+b')
        self.process = subprocess.Popen([KIVI, 'chat', folder, *OPTIONS], env=CLEAN, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.err)

    def say(self, line):
        self.process.stdin.write(line.encode() + b'\n')
        self.process.stdin.flush()

    def errors(self):
        with open(scratch('chat.err'), 'rb') as f:
            return f.read().decode()

    def wait_for(self, pattern, count=1, seconds=120):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = re.findall(pattern, self.errors())
            if len(found) >= count:
                return found[count - 1]
            assert self.process.poll() is None, f'ended: {self.errors()}'
            time.sleep(0.02)
        raise AssertionError(f'no {pattern!r} in {self.errors()!r}')


LENGTH = r'(\d+) of 8192 tokens'


def interrupts():
    folder = slow_folder()
    with case('ctrl-c/stops a prompt, not the program'):
        chat = Chat(folder)
        chat.say('hello')
        chat.say('/stats')
        before = chat.wait_for(LENGTH)
        chat.say('x ' * 3500)
        time.sleep(0.5)  # within the prompt, which takes much longer; if not, the answer would lengthen the history
        chat.process.send_signal(signal.SIGINT)
        chat.wait_for('interrupted; the conversation is as it was')
        chat.say('/stats')
        assert chat.wait_for(LENGTH, 2) == before, chat.errors()
        chat.say('the other')
        chat.say('/stats')
        after = chat.wait_for(LENGTH, 3)
        chat.say('/quit')
        out, _ = chat.process.communicate(timeout=120)
        assert chat.process.returncode == 0 and int(after) > int(before)
    with case('ctrl-c/what follows is as if that turn had not been'):
        plain = kivi('chat', folder, *OPTIONS, stdin=b'hello\nthe other\n/quit\n')
        assert plain.code == 0 and plain.out == out, (plain.out, out)


def waits_for_its_reader(pipe):
    """Until nothing more comes into the pipe."""
    before, same, end = -1, 0, time.monotonic() + 120
    while same < 10 and time.monotonic() < end:
        now = int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), 'little')
        same, before = same + 1 if now and now == before else 0, now
        time.sleep(0.05)
    assert same == 10, f'{before} bytes'


def blocked():
    folder = files.make_folder('falcon-gqa', 'blocked')
    with case('ctrl-c/an answer that waits for its reader ends, the program does not'):
        options = ('--temp', '0', '-t', '1', '-c', '8192', '-n', '8000')
        pipes = {k: subprocess.PIPE for k in ('stdin', 'stdout', 'stderr')}
        with subprocess.Popen([KIVI, 'chat', folder, *options], env=CLEAN, **pipes) as chat:
            fcntl.fcntl(chat.stdout, fcntl.F_SETPIPE_SZ, 4096)
            chat.stdin.write(b'hello\n')
            chat.stdin.flush()
            waits_for_its_reader(chat.stdout)
            chat.send_signal(signal.SIGINT)
            time.sleep(0.2)  # for a program that wrongly gives up
            out, err = chat.communicate(b'/stats\n', timeout=120)
        assert chat.returncode == 0 and b'of 8192 tokens' in err, err
        n = int(re.search(rb'answers +(\d+) tokens', err)[1])
        assert 0 < n < 8000, n


ends()
interrupts()
blocked()
finish()
