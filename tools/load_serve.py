#!/usr/bin/env python3
"""load_serve.py: many requests at once against one server, and whether everything is as it was before.

  load_serve.py [--requests 10000] [--at-once 64] [--model MODEL] [--seed N] [kivi serve's options]

Without --model, a random model of three layers (needs numpy). Of the requests 10% go away before their answer is
whole, 4% read slowly, 1% not at all, 5% are malformed; the rest must get, byte for byte, what the same request got
alone. Answers to slow readers are longer than all buffers on the way: some of their requests must have been paused, and
of those that nobody reads some dropped. At the end all pages are free, descriptors are as many as before, and memory
has not grown. One closing line; exit 1 if anything is wrong."""
import argparse
import asyncio
import json
import os
import random
import socket
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, 'tests'))
from serve_client import Server, read_events  # noqa: E402

KIVI = os.path.join(ROOT, os.environ.get('KIVI_BIN') or 'build/kivi')
KINDS = 60  # different requests
SLOW_KINDS = 8  # beyond those: what slow readers ask for
# Some 370 bytes a token; the system and libmicrohttpd keep about half of them, the server this much more.
SLOW_TOKENS, BUFFER_KIB = 600, 4
SLOW_BYTES, SLOW_S = 1024, 0.02  # at most 50 KB/s: less than is made
READER_S = 5  # one that takes nothing for so long is dropped


def make_bodies(rng):
    out = []
    for i in range(KINDS):
        body = {'prompt': [1] + [rng.randrange(5, 280) for _ in range(rng.choice((3, 10, 40, 150, 400)))],
                'max_tokens': rng.randrange(1, 40), 'ignore_eos': True, 'seed': i,
                'temperature': rng.choice((0, 0.7, 1.5)),
                'n': rng.choice((1, 1, 1, 2))}
        if rng.random() < 0.5:
            body['stream'] = True
        if rng.random() < 0.2:
            body['logprobs'] = 2
        out.append(body)
    for i in range(SLOW_KINDS):
        out.append({'prompt': [1] + [rng.randrange(5, 280) for _ in range(10)], 'max_tokens': SLOW_TOKENS, 'n': 1,
                    'ignore_eos': True, 'seed': i, 'temperature': i % 2, 'stream': True, 'logprobs': 5})
    return out


def texts(body, data):
    """{choice: (text, reason)} of a whole answer; what is missing or twice is an error."""
    out = {}
    if body.get('stream'):
        events = read_events(data)
        assert events and events[-1] == '[DONE]', 'no [DONE]'
        for event in events[:-1]:
            assert 'error' not in event, event
            for c in event['choices']:
                text, reason = out.get(c['index'], ('', None))
                assert reason is None, 'more after the end'
                out[c['index']] = (text + c['text'], c['finish_reason'])
    else:
        for c in json.loads(data)['choices']:
            assert c['index'] not in out, 'a choice twice'
            out[c['index']] = (c['text'], c['finish_reason'])
    assert len(out) == body['n'] and all(reason == 'length' for _, reason in out.values()), out
    return out


async def send(port, data, slow=False):
    link = socket.socket()
    if slow:  # before the connection is made: its window is announced then
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    link.setblocking(False)
    await asyncio.get_running_loop().sock_connect(link, ('127.0.0.1', port))
    # Where the limit is small, what was not asked for stays in the socket.
    reader, writer = await asyncio.open_connection(sock=link, limit=1024 if slow else 1 << 24)
    writer.write(data)
    await writer.drain()
    return reader, writer


def request_bytes(body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    # HTTP/1.0: the answer ends with the connection and has no chunks.
    return b'POST /v1/completions HTTP/1.0\r\nHost: a\r\nContent-Type: application/json\r\n' \
           b'Content-Length: %d\r\n\r\n' % len(data) + data


async def whole(port, body, slow=False):
    reader, writer = await send(port, request_bytes(body), slow)
    data = b''
    while True:
        piece = await reader.read(SLOW_BYTES if slow else 1 << 16)
        if not piece:
            break
        data += piece
        if slow:
            await asyncio.sleep(SLOW_S)
    writer.close()
    head, _, rest = data.partition(b'\r\n\r\n')
    return int(head.split()[1]) if head else 0, rest


async def one(port, rng, bodies, alone, count):
    i = rng.randrange(KINDS)
    body, what = bodies[i], rng.random()
    if what < 0.10:
        reader, writer = await send(port, request_bytes({**body, 'max_tokens': 400}))
        await asyncio.sleep(rng.random() * 0.2)
        writer.transport.abort()
        count['left'] += 1
        return
    if what < 0.15:
        data = bytearray(json.dumps(body).encode())
        data[rng.randrange(len(data))] = rng.choice(b'{}[]\x00\xff"')
        status, _ = await whole(port, bytes(data))
        if status not in (200, 400, 404):
            count['wrong'] += 1
        count['malformed'] += 1
        return
    if what < 0.16:
        reader, writer = await send(port, request_bytes(bodies[KINDS + i % SLOW_KINDS]), slow=True)
        await asyncio.sleep(READER_S + 3)
        writer.transport.abort()
        count['unread'] += 1
        return
    slow = what < 0.20
    if slow:
        i = KINDS + i % SLOW_KINDS
        body = bodies[i]
    for _ in range(200):
        status, data = await whole(port, body, slow)
        if status != 429:
            break
        count['told to wait'] += 1
        await asyncio.sleep(0.1)
    try:
        assert status == 200, f'status {status}: {data[:200]}'
        assert texts(body, data) == alone[i], 'not as alone'
        count['slow' if slow else 'ok'] += 1
    except (AssertionError, ValueError, KeyError) as e:
        count['wrong'] += 1
        if count['wrong'] < 6:
            print(f'request {i}: {e}', file=sys.stderr)


async def look_for_paused(server, most):
    while True:
        m = await asyncio.to_thread(server.metrics)
        most[0] = max(most[0], int(m['num_requests_paused']))
        await asyncio.sleep(0.05)


async def run(server, n, at_once, seed, bodies, alone, count, most, watch):
    port, looks = server.port, asyncio.create_task(look_for_paused(server, most))
    left = iter(range(n))

    async def work(k):
        rng = random.Random(seed * 1000 + k)
        for _ in left:
            await one(port, rng, bodies, alone, count)
            watch()
    await asyncio.gather(*(work(k) for k in range(at_once)))
    looks.cancel()


def state(server):
    pid = server.process.pid
    with open(f'/proc/{pid}/statm') as f:
        rss = int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    return len(os.listdir(f'/proc/{pid}/fd')), rss


def settle(server):
    server.settle()
    m = server.metrics()
    return int(m['kv_pages{state="used"}'] - m['kv_pages{state="cached"}'])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--requests', type=int, default=10000)
    parser.add_argument('--at-once', type=int, default=64)
    parser.add_argument('--model')
    parser.add_argument('--seed', type=int, default=random.randrange(2**31))
    options, rest = parser.parse_known_args()
    more = ['--max-num-seqs', '32', '--threads', '2', '--stream-buffer', str(BUFFER_KIB), '--reader-timeout',
            str(READER_S), *rest]
    if not options.model:
        from convert_files import make_folder
        options.model = make_folder('llama-gqa', tie_word_embeddings=False)
        more += ['--dummy-weights', '1']
    bodies = make_bodies(random.Random(options.seed))
    with Server(KIVI, options.model, *more) as server:
        alone = []
        for body in bodies:
            status, data = asyncio.run(whole(server.port, body))
            assert status == 200, (status, data[:300])
            alone.append(texts(body, data))
        count = dict.fromkeys(('ok', 'slow', 'unread', 'left', 'malformed', 'wrong', 'told to wait'), 0)
        settle(server)
        before, early, done, paused = state(server), [], [0], [0]

        def watch():
            done[0] += 1
            if done[0] == options.requests // 5:
                early.append(state(server)[1])
        begun = time.monotonic()
        asyncio.run(run(server, options.requests, options.at_once, options.seed, bodies, alone, count, paused, watch))
        seconds = time.monotonic() - begun
        pages = settle(server)
        # A connection that was cut is closed by the server a moment later.
        server.until(lambda: state(server)[0] <= before[0], 'the descriptors are closed', 10)
        after, m = state(server), server.metrics()
        grown = (after[1] - early[0]) / 2**20
        lost = options.requests - sum(count[k] for k in ('ok', 'slow', 'unread', 'left', 'malformed', 'wrong'))
        ended = sum(v for k, v in m.items() if k.startswith('request_success_total'))
        dropped = int(m['slow_clients_dropped_total'])
        exit_code = server.stop()
    felt = (paused[0] or not count['slow']) and (dropped or not count['unread'])
    wrong = count['wrong'] or lost or pages or grown > 8 or exit_code or not felt or dropped > count['unread']
    print(f'load: {options.requests} requests, {options.at_once} at once, seed {options.seed}: '
          + ', '.join(f'{v} {k}' for k, v in count.items())
          + f', {lost} lost, {pages} pages held, descriptors {before[0]} -> {after[0]}, memory {grown:+.1f} MiB '
          f'after the first fifth, up to {paused[0]} paused, {dropped} dropped, {ended:.0f} ended, '
          f'{m["num_preemptions_total"]:.0f} preempted, {seconds:.1f} s: '
          + ('WRONG' if wrong else 'all as it was'))
    return 1 if wrong else 0


if __name__ == '__main__':
    sys.exit(main())
