#!/usr/bin/env python3
"""py_serve.py: `kivi serve`, `kivi batch` and `kivi bench serve` from outside, on a tiny random model: endpoints,
parameters, errors, streams, clients that leave or do not read, draining, malformed input."""
import contextlib
import ctypes
import http.client
import json
import os
import pty
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import warnings

from blackbox import KIVI, SCRATCH, UNDER, bad, case, finish, good, kivi, logits, scratch, skip, start, write
from convert_files import make_folder
from serve_client import SLOWER, Server, read_events

# 288 tokens: all bytes, some merges; BOS is 1, <|im_end|> 4; 8,192 positions. The golden weights repeat one token;
# random ones with an output matrix of their own do not.
MODEL = make_folder('llama-gqa', tie_word_embeddings=False)
NAME = os.path.basename(MODEL)
DUMMY = ('--dummy-weights', '1', '--threads', '2')
COMMON = (*DUMMY, '--log-format', 'json')
CHAT = '/v1/chat/completions'
TEXT = '/v1/completions'


def long_stream(server, n=4000, **more):
    """A connection whose answer has begun and goes on for long."""
    link = server.connect()
    body = {'prompt': 'abc', 'max_tokens': n, 'ignore_eos': True, 'stream': True, **more}
    link.request('POST', TEXT, json.dumps(body), {'Content-Type': 'application/json'})
    answer = link.getresponse()
    assert answer.status == 200, answer.status
    answer.readline()
    answer.readline()
    return link, answer


def pages(server):
    m = server.metrics()
    return m['kv_pages{state="used"}'] - m['kv_pages{state="cached"}']


def endpoints(s):
    with case('what the server says of itself'):
        assert s.get('/health') == (200, b'{"status":"ok"}') and s.get('/ready')[0] == 200
        assert 'version' in json.loads(s.get('/version')[1])
        models = json.loads(s.get('/v1/models')[1])
        assert models['object'] == 'list' and models['data'][0]['id'] == NAME and models['data'][0]['object'] == 'model'
        assert models['data'][0]['max_model_len'] == 8192
        assert json.loads(s.get('/v1/models/' + NAME)[1]) == models['data'][0]
        status, error = s.get('/v1/models/other')
        assert status == 404 and json.loads(error)['error']['code'] == 'model_not_found'
        status, headers, page = s.ask('GET', '/')
        assert status == 200 and headers['Content-Type'].startswith('text/html') and b'<title>kivi' in page
        status, headers, data = s.ask('HEAD', '/health')
        assert status == 200 and data == b'' and headers['Content-Length'] == '15'
    with case('tokenize and detokenize'):
        status, t = s.post('/tokenize', {'prompt': 'hello the 123 ü', 'return_token_strs': True})
        assert status == 200 and t['count'] == len(t['tokens']) == len(t['token_strs']) and t['tokens'][0] == 1, t
        bare = s.post('/tokenize', {'prompt': 'hello the 123 ü', 'add_special_tokens': False})[1]
        assert bare['tokens'] == t['tokens'][1:] and bare['token_strs'] is None
        assert s.post('/detokenize', {'tokens': bare['tokens']}) == (200, {'prompt': 'hello the 123 ü'})
        assert 4 not in s.post('/tokenize', {'prompt': '<|im_end|>'})[1]['tokens']
        assert 4 in s.post('/tokenize', {'prompt': '<|im_end|>', 'parse_special': True})[1]['tokens']
        chat = s.post('/tokenize', {'messages': [{'role': 'user', 'content': 'hello'}]})[1]
        assert chat['tokens'].count(3) == 2, chat  # the turn and the beginning of the answer
        info = json.loads(s.get('/tokenizer_info')[1])
        assert info['bos_token'] == '<s>' and info['eos_token'] == '</s>' and 'im_start' in info['chat_template']
    with case('an id that the client gives comes back'):
        assert s.ask('GET', '/health', headers={'X-Request-Id': 'abc-1'})[1]['X-Request-Id'] == 'abc-1'
        assert s.ask('GET', '/health', headers={'X-Request-Id': 'a b\t'})[1]['X-Request-Id'] != 'a b\t'


def f32(x):
    import numpy as np
    return np.float32(x)


def log_softmax(row):
    import numpy as np
    row = row.astype(np.float64)
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def scores(s):
    ids = [1, 70, 71, 102, 33, 99, 256, 44, 45, 46]
    with case('log-probabilities equal those of kivi logits'):
        rows = logits(MODEL, ids, *DUMMY, '--rule', 'stream')
        for top in (1, 5):
            choice = s.complete(prompt=[ids], max_tokens=1, logprobs=top, echo=True, seed=1234)['choices'][0]
            lp = choice['logprobs']
            assert len(lp['tokens']) == len(lp['token_logprobs']) == len(lp['top_logprobs']) == \
                len(lp['text_offset']) == len(ids) + 1
            assert lp['token_logprobs'][0] is None and lp['top_logprobs'][0] is None
            for t in range(1, len(ids) + 1):
                want = log_softmax(rows[t - 1])
                token = ids[t] if t < len(ids) else int(want.argmax())
                got = lp['token_logprobs'][t]
                assert f32(got) == f32(want[token]), (t, got, want[token])
                best = max(lp['top_logprobs'][t].values())
                assert f32(best) == f32(want.max()), (t, best, want.max())
                assert (got == best) == (token == int(want.argmax()))
                assert top <= len(lp['top_logprobs'][t]) <= top + 1
    with case('echo: text, offsets and max_tokens 0'):
        nothing = s.complete(prompt='hello the', max_tokens=0, echo=True, logprobs=1)['choices'][0]
        one = s.complete(prompt='hello the', max_tokens=1, echo=True, logprobs=1)['choices'][0]
        assert nothing['text'] == 'hello the' and one['text'].startswith('hello the')
        assert one['logprobs']['token_logprobs'][:-1] == nothing['logprobs']['token_logprobs']
        assert nothing['logprobs']['text_offset'] == [0, 0, 5], nothing  # <s> is no text
        assert s.complete(prompt='hello', max_tokens=0)['choices'][0]['text'] == ''
        for body in (dict(echo=True), dict(echo=True, logprobs=2, n=2, seed=4, temperature=1)):
            body = {'prompt': 'hello the', 'max_tokens': 5, 'temperature': 0, 'ignore_eos': True, **body}
            events, whole = s.events(TEXT, body), s.complete(**body)
            for c in whole['choices']:
                mine = [x for e in events for x in e['choices'] if x['index'] == c['index']]
                assert ''.join(x['text'] for x in mine) == c['text'], (c, mine)
                for key in ('tokens', 'token_logprobs', 'text_offset') if c['logprobs'] else ():
                    assert [v for x in mine if x['logprobs'] for v in x['logprobs'][key]] == c['logprobs'][key]
        if not UNDER:  # the default gives way to the context, after more than a minute
            assert s.complete(prompt=[5] * 8190)['usage']['completion_tokens'] == 2
        usage = s.complete(prompt='hello', max_tokens=0)['usage']
        assert usage['prompt_tokens'] == 2 and usage['completion_tokens'] == 0


def settings(s):
    # Text of whole ASCII characters: no token that has another byte.
    texts = [s.post('/detokenize', {'tokens': [i]})[1]['prompt'] for i in range(288)]
    ascii_only = {str(i): -100 for i, t in enumerate(texts) if not t.isprintable() or not t.isascii()}
    plain = dict(prompt='hello', max_tokens=24, ignore_eos=True, logit_bias=ascii_only)
    words = s.complete(**plain)['choices'][0]['text']
    base = s.complete(prompt='hello', max_tokens=24, ignore_eos=True)['choices'][0]['text']
    with case('prompts of four kinds'):
        ids = s.post('/tokenize', {'prompt': 'hello'})[1]['tokens']
        assert s.complete(prompt=ids, max_tokens=24, ignore_eos=True)['choices'][0]['text'] == base
        many = s.complete(prompt=['hello', 'the', 'hello'], max_tokens=24, ignore_eos=True)['choices']
        assert [c['index'] for c in many] == [0, 1, 2] and many[0]['text'] == many[2]['text'] == base
        lists = s.complete(prompt=[ids, [1, 70]], max_tokens=24, ignore_eos=True)['choices']
        assert lists[0]['text'] == base and len(lists) == 2
    with case('seeds and n'):
        hot = dict(prompt='hello', max_tokens=16, temperature=1, ignore_eos=True)
        three = [c['text'] for c in s.complete(seed=5, n=3, **hot)['choices']]
        assert three == [c['text'] for c in s.complete(seed=5, n=3, **hot)['choices']]
        assert s.complete(seed=5, **hot)['choices'][0]['text'] == three[0] and len(set(three)) == 3
        assert s.complete(**hot)['choices'][0]['text'] != s.complete(**hot)['choices'][0]['text']
        wide = s.complete(prompt=['hello', 'the'], n=2, max_tokens=4, seed=1, temperature=1)
        assert [c['index'] for c in wide['choices']] == [0, 1, 2, 3] and wide['usage']['prompt_tokens'] == 5
    with case('stop strings that span tokens'):
        assert len(set(words)) > 2, words
        for at in range(1, len(words) - 4, 5 if UNDER else 1):
            for stop in (words[at:at + 1], words[at:at + 2], words[at:at + 4]):
                cut = words[:words.index(stop)]
                events = s.events(TEXT, dict(plain, temperature=0, stop=[stop, 'never there']))
                text = ''.join(c['text'] for e in events for c in e['choices'])
                c = s.complete(**plain, stop=stop)['choices'][0]
                assert text == c['text'] == cut, (stop, words, text, c['text'])
                assert events[-1]['choices'][0]['finish_reason'] == c['finish_reason'] == 'stop'
        stop = words[3:6]
        kept = s.complete(**plain, stop=stop, include_stop_str_in_output=True)['choices'][0]['text']
        assert kept == words[:words.index(stop)] + stop
        half = s.complete(**plain, stop=words[-2:] + 'x')['choices'][0]
        assert half['text'] == words and half['finish_reason'] == 'length'  # held back, then given out
        later = s.complete(**plain, stop=words[0], min_tokens=24)
        assert later['choices'][0]['text'] == words and later['choices'][0]['finish_reason'] == 'length'
    with case('stop ids, bias, penalties'):
        lp = s.complete(prompt='hello', max_tokens=3, logprobs=0, logit_bias=ascii_only)['choices'][0]['logprobs']
        first = s.post('/tokenize', {'prompt': lp['tokens'][0], 'add_special_tokens': False})[1]['tokens']
        assert len(first) == 1, lp
        ended = s.complete(prompt='hello', max_tokens=9, stop_token_ids=first, logit_bias=ascii_only)
        assert ended['choices'][0]['finish_reason'] == 'stop' and ended['choices'][0]['text'] == ''
        assert ended['usage']['completion_tokens'] == 1
        banned = s.complete(prompt='hello', max_tokens=24, ignore_eos=True,
                            logit_bias={**ascii_only, str(first[0]): -100})
        assert lp['tokens'][0] not in banned['choices'][0]['text']
        forced = s.complete(prompt='hello', max_tokens=5, logit_bias={str(70): 100})['choices'][0]['text']
        assert len(set(forced)) == 1, forced
        assert s.complete(prompt='hello', max_tokens=24, ignore_eos=True, frequency_penalty=2,
                          presence_penalty=2)['choices'][0]['text'] != base
        assert s.complete(prompt='hello', max_tokens=24, ignore_eos=True,
                          repetition_penalty=3)['choices'][0]['text'] != base
        assert s.complete(prompt='hello', max_tokens=24, ignore_eos=True, user='me', unknown_field={'a': 1},
                          service_tier='auto')['choices'][0]['text'] == base
        for key, value in (('top_k', 1), ('top_p', 1e-5), ('min_p', 1)):  # only the best is left
            hot = s.complete(prompt='hello', max_tokens=24, ignore_eos=True, temperature=1, **{key: value})
            assert hot['choices'][0]['text'] == base, key


def chats(s):
    with case('a chat, whole and streamed'):
        body = dict(max_tokens=20, ignore_eos=True)
        whole = s.chat('hello', logprobs=True, top_logprobs=2, **body)
        choice = whole['choices'][0]
        assert whole['object'] == 'chat.completion' and whole['id'].startswith('chatcmpl-')
        assert choice['message']['role'] == 'assistant' and choice['finish_reason'] == 'length'
        entries = choice['logprobs']['content']
        assert len(entries) == 20 and all(len(e['top_logprobs']) == 2 for e in entries)
        assert b''.join(bytes(e['bytes']) for e in entries).decode(errors='replace') == choice['message']['content']
        events = s.events(CHAT, {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'hello'}]}],
                                 'temperature': 0, 'logprobs': True, 'top_logprobs': 2,
                                 'stream_options': {'include_usage': True}, **body})
        assert events[0]['choices'][0]['delta'] == {'role': 'assistant', 'content': ''}
        assert all(e['object'] == 'chat.completion.chunk' and e['id'] == events[0]['id'] for e in events)
        assert events[-1]['choices'] == [] and events[-1]['usage'] == whole['usage']
        assert all(e['usage'] is None for e in events[:-1])
        pieces = [e['choices'][0] for e in events[1:-1]]
        assert ''.join(p['delta'].get('content', '') for p in pieces) == choice['message']['content']
        assert [x for p in pieces for x in (p['logprobs'] or {'content': []})['content']] == entries
        assert [p['finish_reason'] for p in pieces] == [None] * (len(pieces) - 1) + ['length']
        running = s.events(CHAT, {'messages': [{'role': 'user', 'content': 'hello'}], 'temperature': 0, **body,
                                  'stream_options': {'include_usage': True, 'continuous_usage_stats': True}})
        counts = [e['usage']['completion_tokens'] for e in running]
        assert counts == sorted(counts) and counts[-1] == 20, counts
    with case('a stream is whole characters, and n streams keep apart'):
        hot = {'prompt': 'hello', 'max_tokens': 40, 'temperature': 3, 'ignore_eos': True, 'seed': 3, 'n': 3}
        events = s.events(TEXT, hot)
        whole = s.complete(**hot)
        for i in range(3):
            text = ''.join(c['text'] for e in events for c in e['choices'] if c['index'] == i)
            assert text == whole['choices'][i]['text'], i
    with case('JSON by a schema'):
        schema = {'type': 'object', 'properties': {
            'name': {'type': 'string', 'maxLength': 8}, 'age': {'type': 'integer', 'minimum': 0, 'maximum': 150},
            'tags': {'type': 'array', 'items': {'enum': ['a', 'b']}, 'maxItems': 3}, 'ok': {'type': 'boolean'}},
            'required': ['name', 'age', 'ok'], 'additionalProperties': False}
        form = {'type': 'json_schema', 'json_schema': {'name': 'x', 'strict': True, 'schema': schema}}
        for seed in range(3 if UNDER else 12):
            c = s.chat('hello', max_tokens=300, temperature=1.5, seed=seed, response_format=form)['choices'][0]
            assert c['finish_reason'] == 'stop', c
            value = json.loads(c['message']['content'])
            assert set(value) <= set(schema['properties']) and {'name', 'age', 'ok'} <= set(value)
            assert len(value['name']) <= 8 and 0 <= value['age'] <= 150 and isinstance(value['ok'], bool)
            assert all(t in 'ab' for t in value.get('tags', []))
        text = ''.join(e['choices'][0]['delta'].get('content', '') for e in s.events(CHAT, {
            'messages': [{'role': 'user', 'content': 'hello'}], 'max_tokens': 300, 'temperature': 1.5, 'seed': 0,
            'response_format': form}))
        assert text == s.chat('hello', max_tokens=300, temperature=1.5, seed=0,
                              response_format=form)['choices'][0]['message']['content']
        both = s.chat('hello', max_tokens=300, temperature=1.5, seed=7, n=4, response_format=form)['choices']
        assert len({c['message']['content'] for c in both}) > 1 and all(json.loads(c['message']['content'])
                                                                        for c in both)
        small = {'type': 'json_object'}
        text = s.chat('hello', max_tokens=40, temperature=1, seed=1, response_format=small,
                      logit_bias={'130': 0})['choices'][0]['message']['content']
        assert text.startswith('{')


REFUSED = [  # body of a completion (prompt given), param that the error names
    ({'temperature': -1}, 'temperature'), ({'temperature': 1e308}, 'temperature'),
    ({'temperature': 'hot'}, 'temperature'),
    ({'top_p': 0}, 'top_p'), ({'top_p': 2}, 'top_p'), ({'top_k': 1.5}, 'top_k'), ({'min_p': -0.1}, 'min_p'),
    ({'max_tokens': -1}, 'max_tokens'), ({'max_tokens': 2**31}, 'max_tokens'), ({'max_tokens': 1e9}, 'max_tokens'),
    ({'max_tokens': '5'}, 'max_tokens'), ({'max_tokens': 1.5}, 'max_tokens'), ({'max_tokens': 9000}, 'max_tokens'),
    ({'min_tokens': 17}, 'min_tokens'), ({'n': 0}, 'n'), ({'n': 10**9}, 'n'), ({'logprobs': 10**6}, 'logprobs'),
    ({'logprobs': True}, 'logprobs'), ({'presence_penalty': 1e9}, 'presence_penalty'),
    ({'frequency_penalty': -3}, 'frequency_penalty'), ({'repetition_penalty': 0}, 'repetition_penalty'),
    ({'logit_bias': {'288': 1}}, 'logit_bias'), ({'logit_bias': {'-1': 1}}, 'logit_bias'),
    ({'logit_bias': {'x': 1}}, 'logit_bias'), ({'logit_bias': {'5': 101}}, 'logit_bias'),
    ({'logit_bias': 5}, 'logit_bias'),
    ({'stop': ['a'] * 1000}, 'stop'), ({'stop': [5]}, 'stop'), ({'stop': ['']}, 'stop'),
    ({'stop': 'x' * 2000}, 'stop'),
    ({'stop_token_ids': [-1]}, 'stop_token_ids'), ({'stop_token_ids': ['a']}, 'stop_token_ids'),
    ({'seed': 'a'}, 'seed'), ({'stream': 'yes'}, 'stream'), ({'stream_options': {}}, 'stream_options'),
    ({'echo': 1}, 'echo'), ({'prompt': []}, 'prompt'), ({'prompt': {}}, 'prompt'), ({'prompt': [1, 'a']}, 'prompt'),
    ({'prompt': [1, 288]}, 'prompt'), ({'prompt': [[1], 'a', 5]}, 'prompt'), ({'prompt': None}, 'prompt'),
    ({'prompt': [[]]}, 'prompt'), ({'prompt': 'a' * 9000}, 'prompt'), ({'model': 5}, 'model'),
    ({'suffix': 'x'}, 'suffix'),
    ({'best_of': 3}, 'best_of'), ({'response_format': 'json'}, 'response_format'),
    ({'response_format': {'type': 'xml'}}, 'response_format'),
    ({'response_format': {'type': 'json_schema'}}, 'response_format'),
    ({'ignore_eos': 'no'}, 'ignore_eos'), ({'priority': 'x'}, 'priority'), ({'cache_salt': 5}, 'cache_salt'),
]
REFUSED_CHATS = [
    ({'messages': []}, 'messages'), ({'messages': 'hello'}, 'messages'), ({'messages': [{}]}, 'messages'),
    ({'messages': [{'role': 'robot', 'content': 'x'}]}, 'messages'), ({'messages': [{'role': 'user'}]}, 'messages'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]}, 'messages'),
    ({'messages': [{'role': 'user', 'content': 'a'}, {'role': 'system', 'content': 'b'}]}, 'messages'),
    ({'tools': [{'type': 'function'}]}, 'tools'), ({'top_logprobs': 2}, 'top_logprobs'),
    ({'logprobs': True, 'top_logprobs': 21}, 'top_logprobs'), ({'max_completion_tokens': 0}, 'max_completion_tokens'),
    ({'response_format': {'type': 'json_schema', 'json_schema': {'schema': {'type': 'string', 'pattern': 'a'}}}},
     'response_format'),
]


def refusals(s):
    for table, path, rest in ((REFUSED, TEXT, {'prompt': 'x'}),
                              (REFUSED_CHATS, CHAT, {'messages': [{'role': 'user', 'content': 'x'}]})):
        with case(f'{path}: {len(table)} wrong parameters are refused by name'):
            for body, param in table:
                status, answer = s.post(path, {**rest, **body})
                error = answer.get('error', {})
                assert status == 400 and error.get('param') == param, (body, status, answer)
                assert error['type'] == 'invalid_request_error' and error['code'] == 400 and error['message'], answer
    with case('an unsupported keyword is named'):
        body = {'messages': [{'role': 'user', 'content': 'x'}], 'response_format': {
            'type': 'json_schema', 'json_schema': {'schema': {'type': 'object', 'properties': {
                'a': {'type': 'string', 'pattern': '^x'}}}}}}
        assert "'pattern'" in s.post(CHAT, body)[1]['error']['message']
    with case('a prompt that never fits: both numbers'):
        message = s.post(TEXT, {'prompt': [5] * 8193})[1]['error']['message']
        assert '8193' in message and '8192' in message, message
    with case('another model: 404'):
        status, answer = s.post(TEXT, {'prompt': 'x', 'model': 'gpt-4'})
        assert status == 404 and answer['error']['code'] == 'model_not_found'
    with case('bodies that are no JSON'):
        deep = b'[' * 100000
        for body in (b'', b'{', b'{"prompt":"a"}x', b'{"prompt":"a","prompt":"b"}', b'{"a":1e999}', deep,
                     b'\xef\xbb\xbf{}',
                     b'{"prompt":"\\ud800"}', b'{"prompt":"\xff"}', b'[]', b'5', b'{"%s":1}' % (b'k' * 65536)):
            begun = time.monotonic()
            status, answer = s.post(TEXT, body)
            assert status == 400 and answer['error']['message'], (body[:40], status)
            assert time.monotonic() - begun < 3 * SLOWER, body[:40]
    with case('odd prompts have answers'):
        for prompt in ('\0\0\0', 'ü' * 500, ' ' * 4000, 'a\r\n\t', '\U0001f600'):
            assert s.complete(prompt=prompt, max_tokens=1)['usage']['completion_tokens'] == 1
    with case('405, 404, 415, 413'):
        for method, path, allow in (('GET', TEXT, 'POST'), ('POST', '/health', 'GET, HEAD'),
                                    ('DELETE', '/v1/models/' + NAME, 'GET, HEAD')):
            status, headers, data = s.ask(method, path)
            assert status == 405 and headers['Allow'] == allow, (status, headers)
            assert json.loads(data)['error']['code'] == 405, data
        assert s.ask('POST', '/health', {})[0] == 405 and s.ask('BREW', '/health')[0] == 405
        assert s.ask('GET', '/nothing')[0] == 404 and s.ask('GET', '/v1/')[0] == 404
        for kind in ('text/plain', 'application/jsonx', ''):
            assert s.ask('POST', TEXT, b'{"prompt":"x"}', {'Content-Type': kind})[0] == 415, kind
        assert s.ask('POST', TEXT, b'{"prompt":"x"}', {'Content-Type': 'application/json; charset=utf-8'})[0] == 200
        status, answer = s.post(TEXT, b'{"prompt":"' + b'x' * (17 << 20) + b'"}')
        assert status == 413, (status, answer)
        chunked = b'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n' \
                  b'Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n' \
                  + b'100000\r\n' + b'x' * 0x100000 + b'\r\n'
        piece = b'100000\r\n' + b'x' * 0x100000 + b'\r\n'
        got = s.raw(chunked + piece * 17 + b'0\r\n\r\n')
        assert b' 413 ' in got[:20], got[:100]


def large(s):
    with case('large bodies are prepared beside the streams'):
        long = 'hello the 123 ' * 30000
        status, t = s.post('/tokenize', {'prompt': long, 'add_special_tokens': False})
        assert status == 200 and s.post('/detokenize', {'tokens': t['tokens']})[1]['prompt'] == long
        want = s.complete(prompt='hello', max_tokens=9)['choices'][0]['text']
        assert s.complete(prompt='hello', max_tokens=9, user='x' * 200000)['choices'][0]['text'] == want
        text = ''.join(c['text'] for e in s.events(TEXT, {'prompt': 'hello', 'max_tokens': 9, 'temperature': 0,
                                                          'user': 'x' * 200000}) for c in e['choices'])
        assert text == want
        status, answer = s.post(TEXT, {'prompt': long})
        assert status == 400 and answer['error']['param'] == 'prompt', answer
        assert s.post(TEXT, {'prompt': 'x', 'user': 'x' * 200000, 'n': 0})[0] == 400
        assert s.post(TEXT, b'{"prompt": "' + b'x' * 200000)[0] == 400
    with case('clients that leave while their body is prepared'):
        body = json.dumps({'prompt': 'x' * 4000, 'user': 'y' * 3000000, 'max_tokens': 3000}).encode()
        for _ in range(5 if UNDER else 20):
            with socket.create_connection(('127.0.0.1', s.port)) as link:
                link.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n'
                             b'Content-Length: %d\r\n\r\n' % len(body) + body)
        s.until(s.idle, 'all are cancelled', 20)
        assert s.complete(prompt='x', max_tokens=2)


def malformed(s):
    seed = int(os.environ.get('KIVI_TEST_SEED') or random.randrange(2**32))
    with case(f'malformed HTTP, seed {seed}'):
        rng = random.Random(seed)
        head = b'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n'
        body = b'{"prompt":"hi","max_tokens":2}'
        ok = head + b'Connection: close\r\nContent-Length: %d\r\n\r\n' % len(body) + body
        assert b'200 OK' in s.raw(ok)
        fixed = [
            b'\r\n\r\n', b'GET\r\n\r\n', b'GET / HTTP/9.9\r\n\r\n', b'\0' * 100, b'GET / HTTP/1.1\r\n\r\n',
            head + b'Content-Length: -5\r\n\r\n', head + b'Content-Length: 99999999999999999999\r\n\r\n',
            head + b'Content-Length: 5\r\nContent-Length: 7\r\n\r\nabcdefg',
            head + b'Transfer-Encoding: chunked\r\n\r\n-2\r\nab\r\n',
            head + b'Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n',
            head + b'X-A: ' + b'a' * 1000000 + b'\r\n\r\n', b'GET /' + b'a' * 100000 + b' HTTP/1.1\r\nHost: a\r\n\r\n',
            b'GET / HTTP/1.1\nHost: a\n\n', ok + b'garbage' * 50, b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n',
            b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03',
        ]
        for data in fixed:
            got = s.raw(data, limit_s=0.2, close_write=True)
            assert got.count(b'HTTP/1.1 200') <= (data.startswith(ok)) + (b'GET / ' in data), (data[:60], got[:80])
        for _ in range(50 if UNDER else 150):
            data = bytearray(ok)
            for _ in range(rng.randrange(1, 6)):
                at = rng.randrange(len(data))
                what = rng.randrange(3)
                if what == 0:
                    data[at] = rng.randrange(256)
                elif what == 1:
                    del data[at:at + rng.randrange(1, 9)]
                else:
                    data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
            s.raw(bytes(data), limit_s=0.05, close_write=True)
        assert s.process.poll() is None and s.complete(prompt='x', max_tokens=2)
    with case(f'malformed JSON, seed {seed}'):
        rng = random.Random(seed + 1)
        whole = json.dumps({'prompt': ['hi', 'ho'], 'max_tokens': 3, 'stop': ['a', 'b'], 'logit_bias': {'5': 1}, 'n': 2,
                            'logprobs': 2, 'response_format': {'type': 'json_object'}, 'temperature': 0.5}).encode()
        for _ in range(200):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 5)):
                data[rng.randrange(len(data))] = rng.choice(b'{}[]",:0123456789-+.eE\\ abnullt\xff\x00')
            status, _ = s.post(TEXT, bytes(data))
            assert status in (200, 400, 404), (status, bytes(data))
        s.until(s.idle, 'all ended')


def stops_only_the_engine(pid):
    """The first thread of a child, which runs the steps, stands still until the returned call; None: not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    seize, interrupt, detach = 0x4206, 0x4207, 17
    if libc.ptrace(seize, pid, None, None):
        return None
    assert libc.ptrace(interrupt, pid, None, None) == 0, os.strerror(ctypes.get_errno())
    os.waitpid(pid, 0x40000000)  # __WALL: it has stopped
    return lambda: libc.ptrace(detach, pid, None, None)


def leave_in_a_step(s):
    """The steps from the moment that three clients leave until nothing of them is left; None: no thread can be stopped
    here. TimeoutError: the engine was stopped while it held a lock that answers need."""
    links = []
    for _ in range(3):
        # Not streamed: nothing is written to it, so no failing write shows that it is gone.
        links.append(s.connect())
        links[-1].request('POST', TEXT, json.dumps({'prompt': 'abc', 'max_tokens': 8000, 'ignore_eos': True}),
                          {'Content-Type': 'application/json'})
    s.until(lambda: s.metrics()['num_requests_running'] == 3, 'three run')
    go_on = stops_only_the_engine(s.process.pid)
    if not go_on:
        return None
    try:
        before = s.metrics(5)
        assert before['num_requests_running'] == 3, before
    finally:
        for link in links:
            link.close()
        go_on()
    s.until(s.idle, 'they are cancelled')
    after = s.metrics()  # nothing runs: there are no more steps
    assert after['kv_pages{state="used"}'] == after['kv_pages{state="cached"}'], after
    return after['engine_steps_total'] - before['engine_steps_total']


def leavers(s):
    with case('a client that leaves: noticed within a step, its pages free after the next'):
        # The engine stands still while they leave, so its steps are counted from that moment on. At most three: the one
        # that was under way, or was done and not yet in the metrics, the one after which they are looked for, and one
        # for the metrics of the end. The keeper, which also looks every 100 ms, would take a hundred of these steps.
        s.until(lambda: pages(s) == 0, 'nothing holds pages')
        for _ in range(5):
            for _ in range(5):
                try:
                    steps = leave_in_a_step(s)
                    break
                except TimeoutError:
                    s.until(s.idle, 'they are cancelled')
            else:
                raise AssertionError('stopped at a lock, five times')
            if steps is None:
                skip('no thread can be stopped here (ptrace is not allowed)')
            assert steps <= 3, f'{steps:.0f} steps'
    with case('a client that leaves is noticed, and its pages are free'):
        s.until(lambda: pages(s) == 0, 'nothing holds pages')
        before = s.metrics()
        links = [long_stream(s) for _ in range(3)]
        s.until(lambda: s.metrics()['num_requests_running'] == 3, 'three run')
        assert pages(s) > 0
        for link, answer in links:
            answer.close()
            link.close()
        begun = time.monotonic()
        s.until(s.idle, 'they are cancelled')
        took = time.monotonic() - begun
        s.until(lambda: pages(s) == 0, 'the pages are free', 5)
        after = s.metrics()
        assert took < 5 * SLOWER, f'{took} s'  # milliseconds, but on a busy machine; the case above counts steps
        assert after['clients_left_total'] == before['clients_left_total'] + 3
        assert after['request_success_total{finished_reason="abort"}'] == \
            before['request_success_total{finished_reason="abort"}'] + 3
    with case('a client that leaves before its answer begins'):
        body = json.dumps({'prompt': 'x' * 4000, 'max_tokens': 3000, 'ignore_eos': True}).encode()
        head = b'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n' \
               b'Content-Length: %d\r\n\r\n'
        for _ in range(1 if UNDER else 4):
            with socket.create_connection(('127.0.0.1', s.port)) as link:
                link.sendall(head % len(body) + body)
                s.until(lambda: s.metrics()['num_requests_running'] == 1, 'it runs')
            s.until(s.idle, 'it is cancelled', 10)
        assert pages(s) == 0
    with case('what others get does not change when one leaves'):
        alone = s.complete(prompt='hello', max_tokens=200, ignore_eos=True)['choices'][0]['text']
        got = []
        ask = threading.Thread(target=lambda: got.append(s.complete(prompt='hello', max_tokens=200, ignore_eos=True)))
        links = [long_stream(s, prompt='the ' * 40) for _ in range(3)]
        ask.start()
        for link, answer in links:
            answer.close()
            link.close()
        ask.join()
        assert got[0]['choices'][0]['text'] == alone


def many(s):
    with case('twenty at once answer as one alone'):
        bodies = [dict(prompt='hello ' * (i % 7 + 1) + 'the' * (i % 3), max_tokens=10 + i, temperature=i % 2, seed=i,
                       ignore_eos=True, n=1 + i % 2) for i in range(20)]
        alone = [[c['text'] for c in s.complete(**b)['choices']] for b in bodies]
        got = [None] * len(bodies)

        def ask(i):
            got[i] = [c['text'] for c in s.complete(**bodies[i])['choices']]
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert got == alone


def together(s):
    with case('eight connections ask for everything at once'):  # the thread sanitizer sees what the threads then share
        asked = [('GET', path, None) for path in ('/health', '/ready', '/version', '/v1/models', '/metrics', '/',
                                                  '/tokenizer_info')]
        asked += [('POST', '/tokenize', {'prompt': 'hello'}), ('POST', '/detokenize', {'tokens': [70, 71]}),
                  ('POST', TEXT, {'prompt': 'hello', 'max_tokens': 2}),
                  ('POST', TEXT, {'prompt': 'hello', 'max_tokens': 2, 'stream': True}),
                  ('POST', CHAT, {'messages': [{'role': 'user', 'content': 'hello'}], 'max_tokens': 2})]
        failed = []

        def ask(i):
            rng, link = random.Random(i), s.connect()
            try:
                for _ in range(100):
                    method, path, body = rng.choice(asked)
                    link.request(method, path, body and json.dumps(body), {'Content-Type': 'application/json'})
                    answer = link.getresponse()
                    if not answer.read() or answer.status != 200:
                        failed.append((path, answer.status))
            except (OSError, http.client.HTTPException) as e:
                failed.append((path, repr(e)))
            link.close()
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not failed, failed[:5]


def prefixes(s):
    with case('a prefix is found again, and changes nothing'):
        rng = random.Random(5)
        ids = [1] + [rng.randrange(5, 280) for _ in range(700)]

        def ask(**more):
            a = s.complete(prompt=ids, max_tokens=20, ignore_eos=True, **more)
            return a['choices'][0]['text'], a['usage']['prompt_tokens_details']['cached_tokens']
        text, cached = ask(cache_salt='a')
        again, found = ask(cache_salt='a')
        other, none = ask(cache_salt='b')
        assert cached == none == 0 and found >= 256, (cached, found, none)
        assert text == again == other
        first = s.chat('hello ' * 100, max_tokens=150, ignore_eos=True)
        talk = [{'role': 'user', 'content': 'hello ' * 100}, {'role': 'assistant',
                'content': first['choices'][0]['message']['content']}, {'role': 'user', 'content': 'the'}]
        assert s.chat(talk, max_tokens=2)['usage']['prompt_tokens_details']['cached_tokens'] >= 128


# vLLM's names of today, and which of them have no meaning here (adapters, sleep, blocks sampled one by one).
VLLM_GAUGES = ('num_requests_running', 'num_requests_waiting', 'num_requests_waiting_by_reason', 'kv_cache_usage_perc',
               'cache_config_info')
VLLM_COUNTERS = ('prompt_tokens', 'generation_tokens', 'request_success', 'num_preemptions', 'prefix_cache_queries',
                 'prefix_cache_hits', 'prompt_tokens_cached', 'prompt_tokens_by_source', 'admission_rejections',
                 'corrupted_requests')
VLLM_HISTOGRAMS = ('time_to_first_token_seconds', 'inter_token_latency_seconds', 'e2e_request_latency_seconds',
                   'request_time_per_output_token_seconds', 'request_queue_time_seconds',
                   'request_prefill_time_seconds', 'request_decode_time_seconds', 'request_inference_time_seconds',
                   'request_prompt_tokens', 'request_generation_tokens', 'request_max_num_generation_tokens',
                   'request_params_n', 'request_params_max_tokens', 'request_num_preemptions',
                   'request_prefill_kv_computed_tokens', 'iteration_tokens_total')


def families(text):
    """name -> type of a text in Prometheus' form, all of whose rules are asserted: HELP, then TYPE, then the samples of
    that name and no others, once for each name; counters end in _total; of a histogram the buckets rise to +Inf."""
    types, name, helped, seen, rising = {}, None, None, set(), []
    for line in text.splitlines():
        if line.startswith('# HELP '):
            _, _, helped, told = line.split(' ', 3)
            assert told.endswith('.') and helped not in types, line
            continue
        if line.startswith('# TYPE '):
            _, _, name, kind = line.split(' ')
            assert name == helped and kind in ('gauge', 'counter', 'histogram'), line
            assert kind == 'histogram' or (kind == 'counter') == name.endswith('_total'), line
            types[name] = kind
            continue
        found = re.fullmatch(r'([a-z0-9_:]+)\{((?:[a-z_]+="(?:[^"\\]|\\.)*",?)+)\} ([0-9.e+-]+)', line)
        assert found and line not in seen, line
        labels = dict(re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', found[2]))
        assert labels['model_name'] and labels['engine'] == '0', line
        key = (found[1], found[2])
        assert key not in seen, f'{key} twice'
        seen.add(key)
        if types[name] != 'histogram':
            assert found[1] == name, line
            continue
        assert found[1] in (name + '_bucket', name + '_sum', name + '_count'), line
        if found[1] == name + '_bucket':
            rising.append((float(labels['le']), float(found[3])))
        elif found[1] == name + '_count':
            assert rising == sorted(rising) and [n for _, n in rising] == sorted(n for _, n in rising), rising
            assert rising[-1] == (float('inf'), float(found[3])), rising
            rising = []
    return types


def check_metrics(s):
    with case('metrics: form, names, sums'):
        text = s.get('/metrics')[1].decode()
        types = families(text)
        wanted = {**dict.fromkeys(VLLM_GAUGES, 'gauge'), **{c + '_total': 'counter' for c in VLLM_COUNTERS},
                  **dict.fromkeys(VLLM_HISTOGRAMS, 'histogram'), 'memory_bytes': 'gauge', 'kv_pages': 'gauge'}
        for name, kind in wanted.items():
            assert types.get('kivi:' + name) == kind, (name, types.get('kivi:' + name))
        s.settle()
        before = s.metrics()
        s.complete(prompt='hello', max_tokens=7, ignore_eos=True)
        s.settle()
        after = s.metrics()
        grew = {k: after[k] - before[k] for k in after}
        assert grew['generation_tokens_total'] == 7 and grew['prompt_tokens_total'] == 2, grew
        assert grew['prompt_tokens_by_source_total{source="local_compute"}'] == 2
        assert grew['request_max_num_generation_tokens_sum'] == 7
        assert grew['time_to_first_token_seconds_count'] == 1 and grew['inter_token_latency_seconds_count'] == 6
        assert grew['request_success_total{finished_reason="length"}'] == 1
        bounds = [k for k in after if k.startswith('time_to_first_token_seconds_bucket')]
        assert 'time_to_first_token_seconds_bucket{le="0.001"}' in bounds and len(bounds) == 23
        assert after['memory_bytes{kind="kv_codes"}'] > 0 and after['memory_bytes{kind="weights"}'] > 0
    with case('metrics: of n choices the longest, and where the tokens of a prompt come from'):
        rng = random.Random(6)
        body = dict(prompt=[1] + [rng.randrange(5, 280) for _ in range(400)], max_tokens=3, n=2, ignore_eos=True)
        s.settle()
        before = s.metrics()
        for _ in range(2):
            s.complete(**body)
            s.settle()
        after = s.metrics()
        grew = {k: after[k] - before[k] for k in after}
        assert grew['request_max_num_generation_tokens_sum'] == 6 and grew['request_generation_tokens_sum'] == 12
        found, made = (grew['prompt_tokens_by_source_total{source="%s"}' % x] for x in
                       ('local_cache_hit', 'local_compute'))
        assert found + made == grew['prompt_tokens_total'] == 802, (found, made)
        assert 256 <= found == grew['prefix_cache_hits_total'] == grew['prompt_tokens_cached_total'] <= 401, found
    with case('metrics: how the cache is made'):
        line, = (x for x in text.splitlines() if x.startswith('kivi:cache_config_info{'))
        got, m = dict(re.findall(r'([a-z_]+)="([^"]*)"', line)), s.metrics()
        assert line.endswith('} 1') and got['enable_prefix_caching'] == 'True' and got['rule'] == 'stream', line
        model = json.loads(s.get('/v1/models')[1])['data'][0]
        assert got['cache_dtype'] == 'k%dv%d' % (model['meta']['kv_k_bits'], model['meta']['kv_v_bits']), line
        n_pages = m['kv_pages{state="free"}'] + m['kv_pages{state="used"}']
        assert int(got['num_gpu_blocks']) == n_pages > 0 and int(got['block_size']) == m['kv_page_tokens'], line
        assert int(got['kv_cache_size_tokens']) == n_pages * m['kv_page_tokens'], line
        assert int(got['kv_cache_memory_bytes']) == n_pages * m['kv_page_bytes'], line
        assert int(got['max_model_len']) == model['max_model_len'] and got['device'] == 'cpu', line
    with case('promtool reads the metrics'):
        if not shutil.which('promtool'):
            skip('promtool is not there')
        done = subprocess.run(['promtool', 'check', 'metrics'], input=text, capture_output=True, text=True)
        # Its style guide knows no prefix with a colon, and a histogram has vLLM's name; all else must please it.
        rest = [x for x in (done.stdout + done.stderr).splitlines()
                if not x.endswith("metric names should not contain ':'") and 'kivi:iteration_tokens_total' not in x]
        assert done.returncode in (0, 3) and not rest, rest
    with case('the log has a line a request, with timings and without prompts'):
        s.ask('POST', TEXT, {'prompt': 'secret words', 'max_tokens': 2}, {'X-Request-Id': 'looked-for'})
        s.until(lambda: any('looked-for' in x for x in s.lines), 'the line is there', 5)
        line = json.loads(next(x for x in s.lines if 'looked-for' in x))
        assert line['completion_tokens'] == 2 and line['status'] == 200 and line['first_token_s'] > 0
        assert not any('secret' in x for x in s.lines)


def unread(s, body, path=TEXT):
    """A connection whose request is sent and whose answer nobody reads."""
    data = json.dumps(body).encode()
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    link.connect(('127.0.0.1', s.port))
    link.sendall(b'POST %s HTTP/1.0\r\nHost: a\r\nContent-Type: application/json\r\n'
                 b'Content-Length: %d\r\n\r\n' % (path.encode(), len(data)) + data)
    return link


def until_paused(s):
    """Until the system's buffers are full, too: before that what was paused goes on again. The metrics then."""
    seen = []

    def stays():
        m = s.metrics()
        seen.append(m if m['num_requests_paused'] == 1 else None)
        time.sleep(0.1)
        return len(seen) > 3 and all(seen[-3:]) and len({x['generation_tokens_total'] for x in seen[-3:]}) == 1
    s.until(stays, 'it is paused')
    return seen[-1]


def slow_readers():
    with case('a slow reader: paused, then dropped; others go on'), \
            Server(KIVI, MODEL, *COMMON, '--stream-buffer', '4', '--reader-timeout', 10 if UNDER else 4) as s:
        n = 1300 if UNDER else 6000  # the last ones are the slowest: 6,000 are minutes under a sanitizer
        body = {'prompt': 'x', 'max_tokens': n, 'ignore_eos': True, 'stream': True, 'logprobs': 5, 'temperature': 0}
        other = dict(prompt='hello', max_tokens=50, ignore_eos=True)
        alone = s.complete(**other)['choices'][0]['text']
        link = s.connect()
        link.request('POST', TEXT, json.dumps(body), {'Content-Type': 'application/json'})
        ends = [0]  # where each event of the answer ends
        for block in link.getresponse().read().split(b'\n\n')[:-2]:
            ends.append(ends[-1] + len(block) + 2)
        link.close()
        assert len(ends) > n - 100, len(ends)  # a token may have no event of its own
        s.settle()
        before = s.metrics()['generation_tokens_total']
        link = unread(s, body)
        beside = s.complete(**other)['choices'][0]['text']
        m = until_paused(s)
        made = int(m['generation_tokens_total'] - before) - 50
        # The buffer and the event that crosses its bound, a block of libmicrohttpd's (32 KiB), what the system keeps
        # for the sender (64 KiB, which Linux doubles) and for the reader (4 KiB, the same), the head: all else would be
        # a buffer without a bound. The whole answer is more than ten times that (twice under a sanitizer).
        bound = (4 + 32 + 2 * 64 + 2 * 4 + 1 + 4) << 10
        least = ends[-1] / (2 if UNDER else 10)
        assert ends[min(made, len(ends) - 1)] < bound < least, (made, ends[made], bound, ends[-1])
        again = s.complete(**other)['choices'][0]['text']
        s.until(lambda: s.metrics()['num_requests_running'] <= 1, 'the other has ended')
        assert s.metrics()['generation_tokens_total'] == m['generation_tokens_total'] + 50  # paused: none of its own
        assert beside == again == alone, (beside, again, alone)
        s.until(lambda: s.metrics()['slow_clients_dropped_total'] == 1, 'it is dropped')
        s.until(lambda: s.idle() and pages(s) == 0, 'its pages are free', 10)
        link.close()
    with case('a whole answer that nobody reads is dropped, too; one that is read slowly is not'), \
            Server(KIVI, MODEL, *COMMON, '--reader-timeout', '3') as s:
        ids = [70] * 400000  # of a byte each: more than all buffers on the way
        want = s.post('/detokenize', {'tokens': ids})[1]['prompt']
        assert len(want) == len(ids)
        slow = unread(s, {'tokens': ids}, '/detokenize')
        lost = unread(s, {'tokens': ids}, '/detokenize')
        body = {'prompt': 'x', 'n': 4, 'max_tokens': 150, 'ignore_eos': True, 'logprobs': 20}  # 260 KB
        work = unread(s, body)
        slow.settimeout(60 * SLOWER)
        data, begun = b'', time.monotonic()
        while True:
            piece = slow.recv(1024)  # for some eight seconds
            if not piece:
                break
            data += piece
            time.sleep(0.02)
        assert json.loads(data.split(b'\r\n\r\n', 1)[1])['prompt'] == want, len(data)
        assert time.monotonic() - begun > 5, 'read faster than meant'
        s.until(lambda: s.metrics()['slow_clients_dropped_total'] == 2, 'both are dropped', 20)
        s.until(lambda: s.metrics()['http_connections'] == 1, 'their connections are closed', 5)
        assert s.idle() and pages(s) == 0 and s.metrics()['clients_left_total'] == 0
        for link in (lost, work):
            link.settimeout(20)
            with contextlib.suppress(ConnectionError):
                while link.recv(65536):  # what was on the way, and then the end
                    pass
            link.close()
        slow.close()
    with case('a slow reader that wakes gets everything'), \
            Server(KIVI, MODEL, *COMMON, '--stream-buffer', '4', '--reader-timeout', '30') as s:
        n = 900 if UNDER else 2500
        want = s.complete(prompt='x', max_tokens=n, ignore_eos=True)['choices'][0]['text']
        link = unread(s, {'prompt': 'x', 'max_tokens': n, 'ignore_eos': True, 'stream': True, 'logprobs': 5,
                          'temperature': 0})
        link.settimeout(60 * SLOWER)
        s.until(lambda: s.metrics()['num_requests_paused'] == 1, 'it is paused')
        data = b''
        while True:
            piece = link.recv(65536)
            if not piece:
                break
            data += piece
        events = read_events(data.split(b'\r\n\r\n', 1)[1])
        assert events[-1] == '[DONE]'
        assert ''.join(c['text'] for e in events[:-1] for c in e['choices']) == want


def drains():
    with case('SIGTERM: what runs ends whole, new ones get 503, exit 0'), Server(KIVI, MODEL, *COMMON) as s:
        n = 300 if UNDER else 1500
        whole = s.complete(prompt='abc', max_tokens=n, ignore_eos=True)['choices'][0]['text']
        link, answer = long_stream(s, n, temperature=0)
        s.process.send_signal(signal.SIGTERM)
        s.until(lambda: any('no new requests' in x for x in s.lines), 'it drains', 5)
        status, _, error = s.ask('POST', TEXT, {'prompt': 'x'})
        assert status == 503 and json.loads(error)['error']['type'] == 'unavailable_error', (status, error)
        assert s.get('/ready')[0] == 503 and s.get('/health')[0] == 200
        events = read_events(answer.read())
        assert events[-1] == '[DONE]' and events[-2]['choices'][0]['finish_reason'] == 'length'
        assert whole.endswith(''.join(c['text'] for e in events[:-1] for c in e['choices'])[1:])
        assert s.process.wait(20 * SLOWER) == 0
        link.close()
    with case('SIGTERM with a short drain: an error event, exit 0'), \
            Server(KIVI, MODEL, *COMMON, '--drain-timeout', '1') as s:
        link, answer = long_stream(s, 8000)
        begun = time.monotonic()
        s.process.send_signal(signal.SIGTERM)
        events = read_events(answer.read())
        assert events[-1] == '[DONE]' and 'going down' not in str(events[-3:]) and 'error' in events[-2], events[-2:]
        assert s.process.wait(20 * SLOWER) == 0 and time.monotonic() - begun < 20 * SLOWER
    with case('a second SIGTERM ends at once'), Server(KIVI, MODEL, *COMMON) as s:
        link, answer = long_stream(s, 8000)
        s.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        s.process.send_signal(signal.SIGTERM)
        assert s.process.wait(10 * SLOWER) == -signal.SIGTERM
    with case('an idle server ends at once, and the port is free again'), Server(KIVI, MODEL, *COMMON) as s:
        begun = time.monotonic()
        assert s.stop() == 0 and time.monotonic() - begun < 10 * SLOWER
        probe = socket.socket()
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(('127.0.0.1', s.port))
        probe.close()


def limits():
    with case('a full queue: 429 at once, with Retry-After'), \
            Server(KIVI, MODEL, *COMMON, '--max-num-seqs', '1', '--max-num-queued-reqs', '2') as s:
        links = [long_stream(s, 8000)]
        others = []
        for _ in range(2):
            link = s.connect()
            link.request('POST', TEXT, json.dumps({'prompt': 'x', 'max_tokens': 1}),
                         {'Content-Type': 'application/json'})
            others.append(link)
        s.until(lambda: s.metrics()['num_requests_waiting'] == 2, 'two wait')
        m = s.metrics()
        assert m['num_requests_waiting_by_reason{reason="capacity"}'] == 2, m
        assert m['num_requests_waiting_by_reason{reason="deferred"}'] == 0, m
        begun = time.monotonic()
        status, headers, data = s.ask('POST', TEXT, {'prompt': 'x', 'max_tokens': 1})
        took = time.monotonic() - begun
        assert status == 429 and 1 <= int(headers['Retry-After']) <= 60, (status, headers)
        assert json.loads(data)['error']['type'] == 'rate_limit_error' and took < 2 * SLOWER, took
        assert s.metrics()['admission_rejections_total'] == 1
        links[0][1].close()
        links[0][0].close()
        for link in others:
            assert link.getresponse().status == 200
            link.close()
    with case('senders that do not send: 408 or the end'), Server(KIVI, MODEL, *COMMON, '--header-timeout', '1') as s:
        head, _, body = s.raw(b'POST /v1/completions HTTP/1.1\r\nHost: a\r\n', limit_s=6 * SLOWER).partition(
            b'\r\n\r\n')
        assert b' 408 ' in head and b'Content-Length: %d' % len(body) in head, head
        error = json.loads(body)['error']
        assert error['code'] == 408 and error['type'] == 'invalid_request_error' and error['message'], error
        assert b' 408 ' in s.raw(b'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n'
                                 b'Content-Length: 100\r\n\r\n{"pro', limit_s=6 * SLOWER)
        assert b' 408 ' in s.raw(b'', limit_s=6 * SLOWER)
        assert s.metrics()['http_responses_total{status="4xx"}'] == 3
        # The second had a head, so there is a request to tell of.
        s.until(lambda: any('"/v1/completions"' in x for x in s.lines), 'the log has it', 5)
        line = json.loads(next(x for x in s.lines if '"/v1/completions"' in x))
        assert line['status'] == 408 and line['seconds'] > 0.9, line
    with case('too many connections: 503'), \
            Server(KIVI, MODEL, *COMMON, '--max-connections', '8', '--rule', 'paper') as s:
        config = s.get('/metrics')[1]  # `paper` shares nothing
        assert b'enable_prefix_caching="False"' in config and b'rule="paper"' in config
        idle = [socket.create_connection(('127.0.0.1', s.port)) for _ in range(9)]
        s.until(lambda: s.ask('GET', '/health')[0] == 503, 'one more is refused', 5)
        for link in idle:
            link.close()
        s.until(lambda: s.ask('GET', '/health')[0] == 200, 'it is served again', 5)


    with case('few descriptors: fewer connections, and it lives'):
        few = ('bash', '-c', 'ulimit -n 48; exec "$0" "$@"', KIVI)
        with Server(few, MODEL, *COMMON) as s:
            idle = [socket.create_connection(('127.0.0.1', s.port)) for _ in range(60)]
            s.until(lambda: any('48 descriptors' in x for x in s.lines), 'it says so', 5)
            for link in idle:
                link.close()
            s.until(lambda: s.ask('GET', '/health')[0] == 200, 'it is served again', 10)
            assert s.complete(prompt='x', max_tokens=2)


WORK = ((TEXT, {'prompt': 'x', 'max_tokens': 1}),
        (CHAT, {'messages': [{'role': 'user', 'content': 'x'}], 'max_tokens': 1}))


def check_unready(status, data, retry, why):
    """An answer to new work that is not taken now."""
    assert status == 503 and 1 <= int(retry) <= 60, (status, retry, data)
    error = json.loads(data)['error']
    assert why in error['message'] and error['type'] == 'unavailable_error', error
    assert error['code'] == 503 and error['param'] is None, error


def stall_once(s, go_on):
    """What a stopped engine looks like. TimeoutError: it was stopped while it held a lock that answers need, which no
    step does for long."""
    def ask(path, body=None):
        link = s.connect(5)
        try:
            link.request('POST' if body else 'GET', path, json.dumps(body) if body else None,
                         {'Content-Type': 'application/json'} if body else {})
            answer = link.getresponse()
            return (answer.status, answer.read(), answer.getheader('Retry-After'))[:3 if body else 2]
        finally:
            link.close()
    try:
        stopped, n_before = time.monotonic(), len(s.lines)
        while ask('/ready')[0] == 200 and time.monotonic() - stopped < 30:
            time.sleep(0.2)
        waited, (status, body) = time.monotonic() - stopped, ask('/ready')
        if status == 200:  # nobody could look at the engine
            raise TimeoutError
        assert status == 503 and b'stalled' in body, (status, body)
        assert waited > 9, f'after {waited:.1f} s'  # what "stalled" means
        assert ask('/health')[0] == 200 and ask('/v1/models')[0] == 200
        assert b'kivi:num_requests_running' in ask('/metrics')[1]
        for path, body in WORK:
            try:
                refused = ask(path, body)
            except TimeoutError:  # not a lock: the questions above needed the same ones
                raise AssertionError('work was taken in while nothing moves')
            check_unready(*refused, 'stalled')
        s.until(lambda: any('stalled: no progress' in x for x in s.lines[n_before:]), 'the log says it', 5)
        told = next(i for i, x in enumerate(s.lines) if i >= n_before and 'stalled: no progress' in x)
        s.until(lambda: len(s.lines) > told + 1, 'the log has the state', 5)
        assert all(json.loads(x)['level'] == 'warning' for x in s.lines[told:told + 2]), s.lines[told:]
    finally:
        go_on()


def stalls():
    with case('a step that does not end: 503 after ten seconds, the state in the log; then all goes on'), \
            Server(KIVI, MODEL, *COMMON) as s:
        for left in reversed(range(5)):
            link, answer = long_stream(s, n=8000)
            go_on = stops_only_the_engine(s.process.pid)
            if not go_on:
                link.close()
                skip('no thread can be stopped here (ptrace is not allowed)')
            try:
                stall_once(s, go_on)
                break
            except TimeoutError:
                link.close()
                assert left, 'stopped at a lock, five times'
        s.until(lambda: s.get('/ready')[0] == 200, 'ready again', 10)
        assert answer.readline() is not None and answer.readline() is not None  # one that ran goes on
        for path, body in WORK:
            assert s.post(path, body)[0] == 200, path
        link.close()
        s.until(lambda: pages(s) == 0, 'the pages are free', 10)


def loading():
    # Some 200 MB of random weights: a second or two, while the port opens within milliseconds of the first line.
    n_layers = 2 if UNDER else 8
    model = make_folder('llama-gqa', name='hf-larger', hidden_size=1024, intermediate_size=4096,
                        num_hidden_layers=n_layers)
    with case('while the model loads: 503 with Retry-After; health, metrics and the page answer'), \
            Server(KIVI, model, *COMMON, ready=False) as s:
        n_refused = 0
        while s.get('/ready')[0] == 503:
            path, body = WORK[n_refused % 2]
            status, headers, data = s.ask('POST', path, body)
            if status == 200:  # it was loaded between the two
                break
            check_unready(status, data, headers.get('Retry-After', 0), 'being loaded')
            if n_refused == 0:
                assert s.get('/health')[0] == s.get('/')[0] == s.get('/version')[0] == 200
                assert b'kivi:http_connections' in s.get('/metrics')[1]
            n_refused += 1
            time.sleep(0.01)
        assert n_refused > 0, 'it was loaded before the first question'
        s.until(lambda: s.get('/ready')[0] == 200, 'it is loaded')
        assert s.post(*WORK[0])[0] == 200


@contextlib.contextmanager
def unread_server():
    """A server, the end of a pipe that its log goes to, and an open connection; read up to its start, no further."""
    reader, writer = os.pipe()
    process = subprocess.Popen([KIVI, 'serve', MODEL, '--port', '0', *COMMON], stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=writer)
    os.close(writer)
    try:
        seen = b''
        while b'listening at' not in seen or b'serving' not in seen:
            more = os.read(reader, 65536)
            assert more, seen
            seen += more
        port = int(re.search(rb'listening at http://127.0.0.1:(\d+)', seen)[1])
        yield process, reader, http.client.HTTPConnection('127.0.0.1', port, timeout=20 * SLOWER)
    finally:
        process.kill()
        process.wait()
        os.close(reader)


def fill_log(link, n_bytes):
    line = len(b'{"time":"2026-01-01T00:00:00.000Z","level":"info","message":"request","client":"127.0.0.1",'
               b'"method":"GET","path":"/health","status":200,"seconds":0.000030,"id":"0123456789abcdef01234567"}\n')
    for _ in range(n_bytes // line + 100):
        link.request('GET', '/health')
        assert link.getresponse().read() == b'{"status":"ok"}'
    link.close()


def slow_log():
    with case('a log that nobody reads: answers go on, lines are dropped and counted'), \
            unread_server() as (process, reader, link):
        fill_log(link, 5 << 18)  # more than the pipe and 1 MiB
        rest = bytearray()
        while not re.search(rb'dropped.*\n', rest):
            more = os.read(reader, 65536)
            assert more, rest[-300:]
            rest += more
        told = next(x for x in bytes(rest).split(b'\n') if b'dropped' in x)
        assert int(re.search(rb'(\d+) lines of the log were dropped', told)[1]) > 0, told
        assert json.loads(told)['level'] == 'warning', told
        process.send_signal(signal.SIGTERM)
        assert process.wait(30 * SLOWER) == 0
    with case('nor does it keep the server from ending'), unread_server() as (process, _, link):
        fill_log(link, 1 << 18)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30 * SLOWER) == 0


def text_log():
    with case('the log as text: a line a request with its fields, no key and no prompt'), \
            Server(KIVI, MODEL, *DUMMY, '--log-format', 'text', '--api-key', 'the-key') as s:
        def ask(name, path, body=None, key='the-key'):
            return s.ask('POST' if body else 'GET', path, body,
                         {'Authorization': 'Bearer ' + key, 'X-Request-Id': name})[0]
        words = {'prompt': 'secret words', 'max_tokens': 3, 'ignore_eos': True, 'user': 'secret user'}
        assert ask('whole', TEXT, words) == 200 and ask('streamed', TEXT, {**words, 'stream': True}) == 200
        assert ask('chat', CHAT, {'messages': [{'role': 'user', 'content': 'secret words'}], 'max_tokens': 3,
                                  'ignore_eos': True}) == 200
        assert ask('wrong', TEXT, {**words, 'stop': ['secret'] * 100}) == 400
        assert ask('nobody', TEXT, words, key='secret key') == 401 and ask('nothing', '/secret') == 404
        assert ask('models', '/v1/models') == 200
        start = r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z 127\.0\.0\.1 '
        work = r' prompt=%s cached=0 generated=3 queue=\d+\.\d{3}s first=\d+\.\d{3}s rate=\d+\.\d/s finish=length%s ' \
               'preempted=0'
        n = len(s.post('/tokenize', {'prompt': 'secret words'}, {'Authorization': 'Bearer the-key'})[1]['tokens'])
        want = {'whole': f'POST {TEXT} 200', 'streamed': f'POST {TEXT} 200', 'chat': f'POST {CHAT} 200',
                'wrong': f'POST {TEXT} 400', 'nobody': f'POST {TEXT} 401', 'nothing': r'GET \? 404',
                'models': 'GET /v1/models 200'}
        s.until(lambda: all(any(f's {name}' in x for x in s.lines) for name in want), 'the lines are there', 10)
        assert s.stop() == 0
        s.reader.join(10)
        for name, what in want.items():
            rest = {'whole': work % (n, ''), 'streamed': work % (n, ' stream'), 'chat': work % (r'\d+', '')}
            line = f'{start}{what} \\d+\\.\\d{{3}}s {name}' + rest.get(name, '')
            lines = [x for x in s.lines if f's {name}' in x]
            assert len(lines) == 1 and re.fullmatch(line, lines[0]), (line, lines)
        assert not any('secret' in x or 'the-key' in x for x in s.lines), s.lines
        assert any(x.startswith('kivi: listening at ') for x in s.lines) and s.lines[-1] == 'kivi: ended', s.lines


def keys():
    path = write('keys.txt', '# our keys\nfirst-key\n\nsecond-key \n')
    with case('API keys'), Server(KIVI, MODEL, *COMMON, '--api-key', 'third', '--api-key-file', path) as s:
        for key in ('first-key', 'second-key', 'third', 'third \t'):  # a header ends before the spaces behind it
            assert s.ask('GET', '/v1/models', headers={'Authorization': 'Bearer ' + key})[0] == 200, key
        for value in ('Bearer first-ke', 'Bearer first-keyx', 'Bearer ', 'Basic first-key', 'Bearer ' + 'x' * 500,
                      'Bearer # our keys'):
            status, headers, data = s.ask('GET', '/v1/models', headers={'Authorization': value})
            assert status == 401 and headers['WWW-Authenticate'] == 'Bearer', value
            assert json.loads(data)['error']['type'] == 'authentication_error'
        assert s.ask('POST', TEXT, {'prompt': 'x'})[0] == 401 and s.ask('POST', '/tokenize', {'prompt': 'x'})[0] == 401
        for open_path in ('/health', '/ready', '/version', '/metrics', '/'):
            assert s.get(open_path)[0] == 200, open_path
        assert not any('first-key' in x or 'third' in x for x in s.lines)
    with case('CORS'), Server(KIVI, MODEL, *COMMON, '--cors', 'http://a.example') as s:
        status, headers, _ = s.ask('OPTIONS', CHAT, headers={'Origin': 'http://a.example',
                                                             'Access-Control-Request-Method': 'POST'})
        assert status == 204 and headers['Access-Control-Allow-Origin'] == 'http://a.example'
        assert 'Content-Type' in headers['Access-Control-Allow-Headers']
        for asked, allowed in (('authorization,content-type,x-stainless-os', True), ('a;b', False),
                               ('x' * 4000, False)):  # what OpenAI's client in a page sends, too
            headers = s.ask('OPTIONS', CHAT, headers={'Origin': 'http://a.example',
                                                      'Access-Control-Request-Method': 'POST',
                                                      'Access-Control-Request-Headers': asked})[1]
            assert (headers['Access-Control-Allow-Headers'] == asked) == allowed, headers
            assert 'authorization' in headers['Access-Control-Allow-Headers'].lower(), headers
        headers = s.ask('POST', CHAT, b'{')[1]  # a page reads errors, too, and how long to wait
        assert headers['Access-Control-Allow-Origin'] == 'http://a.example', headers
        assert 'Retry-After' in headers['Access-Control-Expose-Headers'], headers
        assert s.ask('GET', '/v1/models')[1]['Access-Control-Allow-Origin'] == 'http://a.example'
    with case('TLS'):
        import ssl
        cert, key = scratch('cert.pem'), scratch('key.pem')
        try:
            subprocess.run(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj',
                            '/CN=localhost', '-addext', 'subjectAltName=IP:127.0.0.1', '-keyout', key, '-out', cert],
                           check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            skip('openssl is not there')
        with Server(KIVI, MODEL, *COMMON, '--tls-cert', cert, '--tls-key', key, ready=False) as s:
            import http.client
            trust = ssl.create_default_context(cafile=cert)

            def ask(method, path, body=None):
                link = http.client.HTTPSConnection('127.0.0.1', s.port, context=trust, timeout=30 * SLOWER)
                link.request(method, path, body, {'Content-Type': 'application/json'})
                answer = link.getresponse()
                return answer.status, answer.read(), link
            s.until(lambda: ask('GET', '/ready')[0] == 200, 'it is ready')
            body = json.dumps({'prompt': 'hello', 'max_tokens': 8, 'stream': True, 'ignore_eos': True})
            status, data, _ = ask('POST', TEXT, body)
            assert status == 200 and read_events(data)[-1] == '[DONE]'
            for version in (ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2):
                old = ssl.create_default_context(cafile=cert)
                with warnings.catch_warnings(action='ignore'):
                    old.minimum_version = old.maximum_version = version
                old.set_ciphers('ALL:@SECLEVEL=0')  # else this side would refuse the old one
                with socket.create_connection(('127.0.0.1', s.port), timeout=30 * SLOWER) as plain:
                    try:
                        old.wrap_socket(plain, server_hostname='127.0.0.1').close()
                        assert version == ssl.TLSVersion.TLSv1_2, 'TLS 1.1 is spoken'
                    except (ssl.SSLError, ConnectionError) as e:
                        assert version == ssl.TLSVersion.TLSv1_1, e
            link = http.client.HTTPSConnection('127.0.0.1', s.port, context=trust, timeout=30 * SLOWER)
            link.request('POST', TEXT, json.dumps({'prompt': 'x', 'max_tokens': 8000, 'stream': True,
                                                   'ignore_eos': True}),
                         {'Content-Type': 'application/json'})
            link.getresponse().readline()
            link.sock.close() if link.sock else None
            link.close()
            assert s.stop() == 0
        bad(2, 'serve', MODEL, '--port', '0', '--tls-cert', cert, says='both are needed')
    with case('what serve refuses to start with'):
        bad(2, 'serve', MODEL, '--log-format', 'xml', says='--log-format')
        bad(2, 'serve', MODEL, '--api-key', 'a,,b', says='--api-key')
        bad(2, 'serve', MODEL, '--port', '99999', says='--port')
        bad(5, 'serve', MODEL, '--api-key-file', scratch('none'), says='none')
        taken = socket.create_server(('127.0.0.1', 0))
        bad(5, 'serve', MODEL, '--port', taken.getsockname()[1], says='in use')
        taken.close()


def batches():
    def line(i, **body):
        return {'custom_id': f'r{i}', 'method': 'POST', 'url': TEXT,
                'body': {'prompt': 'hello ' * (i % 5 + 1), 'max_tokens': 6, 'temperature': 0, **body}}
    requests = [line(i) for i in range(40)]
    requests[7]['body'] = {'prompt': 'x', 'temperature': -1}
    requests[9] = {'custom_id': 'r9', 'method': 'POST', 'url': CHAT,
                   'body': {'messages': [{'role': 'user', 'content': 'hello'}], 'max_tokens': 4, 'temperature': 0}}
    requests[11] = {'custom_id': 'r11', 'url': '/v1/embeddings', 'body': {}}
    source = write('in.jsonl', '\n'.join(json.dumps(r) for r in requests) + '\nnot json\n')
    out = scratch('out.jsonl')

    def answers():
        with open(out) as f:
            return {a['custom_id']: a for a in map(json.loads, f)}
    with case('a batch'):
        good('batch', MODEL, source, out, *DUMMY, '--max-num-seqs', '4')
        got = answers()
        assert len(got) == 41
        assert all(got[f'r{i}']['response']['status_code'] == 200 for i in range(40) if i not in (7, 11))
        assert got['r7']['response']['status_code'] == 400 and got['r11']['response']['status_code'] == 404
        assert got['r7']['response']['body']['error']['param'] == 'temperature'
        assert got['r9']['response']['body']['object'] == 'chat.completion'
        with Server(KIVI, MODEL, *COMMON) as s:
            for i in (0, 3, 38):
                body = got[f'r{i}']['response']['body']
                assert body['choices'] == s.complete(**requests[i]['body'])['choices'], i
    with case('a batch is taken up again'):
        with open(out, 'rb') as f:
            whole = f.read()
        lines = whole.splitlines(keepends=True)
        with open(out, 'wb') as f:
            f.write(b''.join(lines[:25]) + lines[25][:30])  # as if it had been killed in the middle of a line
        result = good('batch', MODEL, source, out, *DUMMY)
        with open(out) as f:
            again = [json.loads(x)['custom_id'] for x in f]
        assert sorted(again) == sorted(json.loads(x)['custom_id'] for x in lines), again
        assert len(again) == len(set(again)), again
    with case('a batch has a progress bar on a terminal, and none in a file'):
        ours, theirs = pty.openpty()
        with start('batch', MODEL, source, scratch('out-bar.jsonl'), *DUMMY, stdin=subprocess.DEVNULL,
                   stdout=subprocess.DEVNULL, stderr=theirs) as process:
            os.close(theirs)
            seen = b''
            while True:
                try:
                    piece = os.read(ours, 4096)
                except OSError:  # the other end is closed
                    break
                seen += piece
            os.close(ours)
        assert process.returncode == 0, (process.returncode, seen)
        bars = re.findall(rb'\r\[(#*)(\.*)\] (\d+) answered, (\d+) failed, (\d+) at work, \d+\.\d\d/s\x1b\[K', seen)
        assert len(bars) >= 2 and all(len(full) + len(rest) == 30 for full, rest, *_ in bars), seen
        assert bars[-1] == (b'#' * 30, b'', b'38', b'3', b'0'), bars[-1]  # two refused, one line no JSON
        assert b'38 answered, 3 refused or failed' in seen.split(b'\n')[-2], seen
        with open(scratch('errors.txt'), 'wb') as f:
            good('batch', MODEL, source, scratch('out-file.jsonl'), *DUMMY, stderr=f)
        with open(scratch('errors.txt'), 'rb') as f:
            errors = f.read()
        assert errors.count(b'\n') == 1 and b'38 answered' in errors and not re.search(rb'[\r\x1b#]', errors), errors
    with case('what a batch refuses'):
        bad(2, 'batch', MODEL, source, says='batch needs')
        bad(5, 'batch', MODEL, scratch('nothing.jsonl'), scratch('o2.jsonl'), says='nothing.jsonl')
        bad(2, 'batch', MODEL, source, write('other.jsonl', 'hello\n'), says='no answers')


class CannedServer:
    """Answers every completion with the same events, as a list of seconds to wait and JSON to send."""

    def __init__(self, events):
        self.events, self.listener = events, socket.create_server(('127.0.0.1', 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                link, _ = self.listener.accept()
            except OSError:  # it was closed
                return
            threading.Thread(target=self.answer, args=(link,), daemon=True).start()

    def answer(self, link):
        with link, link.makefile('rb') as sent:
            path, n = sent.readline().split()[1], 0
            while (line := sent.readline().strip()):
                if line.lower().startswith(b'content-length:'):
                    n = int(line.split(b':')[1])
            sent.read(n)
            link.sendall(b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n')
            if path == b'/v1/models':
                link.sendall(b'{"data":[{"id":"canned"}]}')
                return
            for wait_s, event in self.events:
                time.sleep(wait_s)
                link.sendall(b'data: %s\n\n' % json.dumps(event).encode())
            link.sendall(b'data: [DONE]\n\n')

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()


def bench_by_usage():
    def piece(text, finish=None):
        return {'choices': [{'index': 0, 'text': text, 'finish_reason': finish}]}

    def usage(n):
        return {'choices': [], 'usage': {'prompt_tokens': 3, 'completion_tokens': n}}

    def figures_of(events, *more):
        with CannedServer(events) as canned:
            return json.loads(good('bench', 'serve', f'http://127.0.0.1:{canned.port}', '-n', '2', '-c', '2', '-o',
                                   'json', *more).text)
    with case('bench serve: tokens without text count, by the usage and up to the end'):
        # Five tokens, two of them with text; the last has none and is the end. 1 s over 4 tokens is 250 ms each; up to
        # the last text it would be 125, by events 500 and more. A client that is late to read the first event makes it
        # less: by a quarter of a second at most here.
        got = figures_of([(0, piece('a')), (0.5, piece('b')), (0.5, piece('', 'length')), (0, usage(5))])
        assert 188 < got['median_tpot_ms'] < 400, got
        assert got['total_output_tokens'] == 10 and got['without_tpot'] == got['without_usage'] == 0, got
        assert got['p99_e2el_ms'] > 990, got
    with case('bench serve: what is not known is null, and counted'):
        late = [(0.1, piece('abc', 'length')), (0, usage(5))]  # all text with the end: no time between tokens
        got = figures_of(late)
        assert got['completed'] == got['without_tpot'] == 2 and got['total_output_tokens'] == 10, got
        assert got['median_tpot_ms'] is got['p99_tpot_ms'] is got['mean_itl_ms'] is None, got
        assert got['median_ttft_ms'] > 99, got
        # 100 ms for 5 tokens: at most 25 a token after the first, if the first had come at once
        assert figures_of(late, '--goodput-tpot', '20')['request_goodput'] == 0
        assert figures_of(late, '--goodput-tpot', '10000')['request_goodput'] > 0
        one = figures_of([(0, piece('a', 'length')), (0, usage(1))], '--goodput-tpot', '1e-6')
        assert one['without_tpot'] == 2 and one['mean_tpot_ms'] is None and one['request_goodput'] > 0, one
        mute = figures_of([(0, piece('a')), (0.1, piece('b', 'length'))])
        assert mute['completed'] == mute['without_usage'] == mute['without_tpot'] == 2, mute
        assert mute['total_output_tokens'] is mute['output_throughput'] is mute['median_tpot_ms'] is None, mute
        assert mute['median_itl_ms'] > 0, mute
        broken = [(0, piece('a')), (0, piece('b')), (0, {'error': {'message': 'going down', 'code': 503}})]
        with CannedServer(broken) as canned:
            result = kivi('bench', 'serve', f'http://127.0.0.1:{canned.port}', '-n', '2', '-o', 'json')
        assert result.code == 5 and json.loads(result.text)['failed'] == 2, result
        with CannedServer(late) as canned:
            text = good('bench', 'serve', f'http://127.0.0.1:{canned.port}', '-n', '1').text
        assert re.search(r'^mean_tpot_ms +-$', text, re.M) and re.search(r'^without_tpot +1\.00$', text, re.M), text


def bench(s):
    with case('bench serve'):
        result = good('bench', 'serve', f'http://127.0.0.1:{s.port}', '-n', '12', '-c', '4', '--input-len', '20',
                      '--output-len', '9', '-o', 'json', '--goodput-ttft', '60000')
        figures = json.loads(result.text)
        assert figures['completed'] == 12 and figures['failed'] == 0
        assert figures['total_input_tokens'] == 240 and figures['total_output_tokens'] == 108
        assert figures['request_goodput'] == figures['request_throughput'] > 0
        assert 0 < figures['median_ttft_ms'] <= figures['p99_ttft_ms'] <= figures['p99_e2el_ms']
        bad(2, 'bench', 'serve', 'ftp://x', says='http://')
        bad(5, 'bench', 'serve', 'http://127.0.0.1:9', says='no answer')

    def figures_of(*more):
        args = ('-n', '20', '-c', '4', '--input-len', '8', '--output-len', '24', '--seed', '1', '-o', 'json')
        return json.loads(good('bench', 'serve', f'http://127.0.0.1:{s.port}', *args, *more).text)
    with case('bench serve: a request rate is kept'):
        # Arrivals are random (exponential gaps), but the seed is fixed: the 19 gaps are 1.9 s in the mean at 10/s, and
        # never does the last request leave before its time. Half of that is far more than 20 such requests take.
        slow, slower = figures_of('--request-rate', '10'), figures_of('--request-rate', '5')
        assert slow['completed'] == slower['completed'] == 20
        assert slow['duration'] > 19 / 10 / 2 and slower['duration'] > 19 / 5 / 2, (slow, slower)
    with case('bench serve: goodput'):
        n = 6 if UNDER else 20
        huge = figures_of('-n', n, '--goodput-ttft', '1e9', '--goodput-tpot', '1e9')
        assert huge['request_goodput'] == huge['request_throughput'] > 0, huge
        for limit in (('--goodput-ttft', '1e-6'), ('--goodput-tpot', '1e-6'),
                      ('--goodput-ttft', '1e9', '--goodput-tpot', '1e-6')):
            none = figures_of('-n', n, *limit)
            assert none['request_goodput'] == 0 and none['completed'] == n, (limit, none)


with Server(KIVI, MODEL, *COMMON, '--rule', 'stream', '--max-num-seqs', '8') as server:
    for part in (endpoints, scores, settings, chats, refusals, large, malformed, leavers, many, together, prefixes,
                 check_metrics, bench):
        try:
            part(server)
        except Exception as e:
            with case(part.__name__):
                raise AssertionError(f'{type(e).__name__}: {e}')
    with case('it ends with 0'):
        assert server.stop() == 0
slow_readers()
drains()
limits()
stalls()
loading()
bench_by_usage()
slow_log()
text_log()
keys()
batches()
finish()
