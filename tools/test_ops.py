#!/usr/bin/env python3
"""test_ops.py: `kivi serve` under the programs that operators put around it: Prometheus scrapes it, HAProxy stands in
front of two replicas of which one is drained and one is killed under load.

  test_ops.py        needs: haproxy and prometheus (Debian packages), numpy; a program that is not there is skipped

One line a case, then the count."""
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.parse

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, 'tests'))
from blackbox import case, finish, scratch, skip  # noqa: E402
from convert_files import make_folder  # noqa: E402
from serve_client import Server, read_events  # noqa: E402

KIVI = os.path.join(ROOT, os.environ.get('KIVI_BIN') or 'build/kivi')
MODEL = make_folder('llama-gqa', tie_word_embeddings=False)
COMMON = ('--dummy-weights', '1', '--threads', '1', '--served-model-name', 'm')

PROXY = """
global
  maxconn 500
defaults
  mode http
  timeout connect 1s
  timeout client 60s
  timeout server 60s
  retries 3
  option redispatch 1
  option http-buffer-request
  retry-on conn-failure empty-response response-timeout 503
frontend all
  bind 127.0.0.1:{port}
  default_backend replicas
backend replicas
  balance roundrobin
  option httpchk GET /ready
  default-server check inter 100ms fall 2 rise 2
  server a 127.0.0.1:{a}
  server b 127.0.0.1:{b}
"""
SCRAPE = """
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: kivi
    static_configs: [{{targets: ['127.0.0.1:{port}']}}]
"""


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as s:
        return s.getsockname()[1]


def get(port, path):
    link = http.client.HTTPConnection('127.0.0.1', port, timeout=5)
    try:
        link.request('GET', path)
        answer = link.getresponse()
        return answer.status, answer.read()
    except OSError:
        return 0, b''
    finally:
        link.close()


def prometheus():
    program = shutil.which('prometheus') or skip('prometheus is not there')
    with Server(KIVI, MODEL, *COMMON) as s, tempfile.TemporaryDirectory() as folder:
        config, port = os.path.join(folder, 'p.yml'), free_port()
        with open(config, 'w') as f:
            f.write(SCRAPE.format(port=s.port))
        process = subprocess.Popen([program, '--config.file', config, '--storage.tsdb.path', os.path.join(folder, 'db'),
                                    '--web.listen-address', f'127.0.0.1:{port}'], stderr=subprocess.DEVNULL)
        try:
            s.complete(prompt='hello', max_tokens=9, ignore_eos=True)
            s.settle()

            def query(text):
                status, data = get(port, '/api/v1/query?' + urllib.parse.urlencode({'query': text}))
                return json.loads(data)['data']['result'] if status == 200 else []
            s.until(lambda: query('kivi:generation_tokens_total'), 'a sample is stored', 30)
            assert query('kivi:generation_tokens_total')[0]['value'][1] == '9'
            assert query('up{job="kivi"}')[0]['value'][1] == '1'
            assert query('histogram_quantile(0.5, kivi:time_to_first_token_seconds_bucket)')
            kinds = {r['metric']['kind'] for r in query('kivi:memory_bytes')}
            assert {'kv_codes', 'kv_scales', 'kv_residual', 'weights'} <= kinds, kinds
        finally:
            process.kill()
            process.wait()


def one(port, body, alone, count):
    """started: some of the answer had come when it broke off."""
    link = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
    started = False
    try:
        link.request('POST', '/v1/completions', json.dumps(body), {'Content-Type': 'application/json'})
        answer = link.getresponse()
        started = answer.status == 200
        data = answer.read()
        if answer.status != 200:
            raise OSError(f'status {answer.status}: {data[:100]}')
        if body.get('stream'):
            events = read_events(data)
            if events[-1:] != ['[DONE]'] or 'error' in events[-2]:
                raise OSError('cut off')
            text = ''.join(c['text'] for e in events[:-1] for c in e['choices'])
        else:
            text = json.loads(data)['choices'][0]['text']
        count['right' if text == alone else 'wrong'] += 1
    except (OSError, http.client.HTTPException, ValueError) as e:
        count['cut off' if started else 'lost'] += 1
        count['why'] = count.get('why') or str(e)
    finally:
        link.close()


def proxied(stop):
    """What becomes of 400 requests while one of two replicas is stopped."""
    program = shutil.which('haproxy') or skip('haproxy is not there')
    with Server(KIVI, MODEL, *COMMON) as a, Server(KIVI, MODEL, *COMMON) as b:
        port = free_port()
        config = scratch('haproxy.cfg')
        with open(config, 'w') as f:
            f.write(PROXY.format(port=port, a=a.port, b=b.port))
        process = subprocess.Popen([program, '-f', config, '-db'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            a.until(lambda: get(port, '/ready')[0] == 200, 'the proxy answers', 10)
            bodies = [{'prompt': 'hello ' * (i + 1), 'max_tokens': 40 + 9 * i, 'temperature': 0, 'ignore_eos': True,
                       'stream': i % 2 == 0} for i in range(12)]
            alone = [b.complete(**{**x, 'stream': False})['choices'][0]['text'] for x in bodies]
            count = dict.fromkeys(('right', 'wrong', 'cut off', 'lost'), 0)
            left = iter(range(400))
            lock = threading.Lock()

            def work(k):
                rng = random.Random(k)
                while True:
                    with lock:
                        n = next(left, None)
                    if n is None:
                        return
                    if n == 120:
                        stop(a.process)
                    i = rng.randrange(len(bodies))
                    one(port, bodies[i], alone[i], count)
            threads = [threading.Thread(target=work, args=(k,)) for k in range(16)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            served = b.metrics()['request_success_total{finished_reason="length"}']
            code = a.process.wait(30)
        finally:
            process.kill()
            process.wait()
    assert served > 100, served
    return count, code


with case('Prometheus scrapes it'):
    prometheus()
with case('HAProxy: a replica is drained under load, nothing is lost or cut off'):
    result, code = proxied(lambda p: p.send_signal(signal.SIGTERM))
    print('  ', result)
    assert result['right'] == 400 and code == 0, (result, code)
with case('HAProxy: a replica is killed under load, nothing that had not begun is lost'):
    result, code = proxied(lambda p: p.kill())
    print('  ', result)
    assert result['lost'] == 0 and result['wrong'] == 0 and result['right'] >= 384, result
finish()
