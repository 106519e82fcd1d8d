"""serve_client.py: a server under test and a client of the standard library, for tests and tools."""
import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time

# Sanitizers make everything slow, and waits are there to end at all: none is how fast something has to be.
SLOWER = 5 if os.environ.get('KIVI_TEST_UNDER') else 1
WAIT_S = 60


class Server:
    """`kivi serve` at a free port; the last lines of its log are kept."""

    def __init__(self, program, model, *args, env=None, ready=True, tls=False):
        clean = {k: v for k, v in os.environ.items() if not k.startswith('KIVI_')}
        program = [program] if isinstance(program, str) else program
        self.process = subprocess.Popen([*program, 'serve', model, '--port', '0', *map(str, args)], text=True,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.PIPE, env={**clean, **(env or {})})
        self.lines, self.tls, self.port = [], tls, None
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        self.until(lambda: self.port or self.process.poll() is not None, 'it listens')
        assert self.port, f'the server did not start: {self.lines[-3:]}'
        if ready:
            self.until(lambda: self.process.poll() is not None or self.get('/ready')[0] == 200, 'it is ready')
            assert self.process.poll() is None, f'the server ended: {self.lines[-3:]}'

    def read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip('\n'))
            found = re.search(r'listening at https?://[^ ]*:(\d+)', line)
            if found:
                self.port = int(found[1])

    @staticmethod
    def until(done, what, limit_s=WAIT_S):
        end = time.monotonic() + limit_s * SLOWER
        while not done():
            assert time.monotonic() < end, f'{what}: not after {limit_s * SLOWER} s'
            time.sleep(0.01)

    def connect(self, timeout=WAIT_S):
        return http.client.HTTPConnection('127.0.0.1', self.port, timeout=timeout * SLOWER)

    def ask(self, method, path, body=None, headers=None, timeout=WAIT_S):
        """(status, headers, bytes) of one request on a connection of its own."""
        link = self.connect(timeout)
        try:
            sent = {'Content-Type': 'application/json'} if body is not None else {}
            data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
            link.request(method, path, data, {**sent, **(headers or {})})
            answer = link.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            link.close()

    def get(self, path, **headers):
        status, _, data = self.ask('GET', path, headers=headers)
        return status, data

    def post(self, path, body, headers=None):
        """(status, parsed JSON)."""
        status, _, data = self.ask('POST', path, body, headers)
        return status, json.loads(data)

    def complete(self, **body):
        status, answer = self.post('/v1/completions', {'temperature': 0, **body})
        assert status == 200, f'{status}: {answer}'
        return answer

    def chat(self, text, **body):
        messages = [{'role': 'user', 'content': text}] if isinstance(text, str) else text
        status, answer = self.post('/v1/chat/completions', {'temperature': 0, 'messages': messages, **body})
        assert status == 200, f'{status}: {answer}'
        return answer

    def events(self, path, body):
        """The JSON of each event; the last must be [DONE]."""
        link = self.connect()
        try:
            link.request('POST', path, json.dumps({'stream': True, **body}), {'Content-Type': 'application/json'})
            answer = link.getresponse()
            assert answer.status == 200, (answer.status, answer.read())
            assert answer.getheader('Content-Type').startswith('text/event-stream')
            out = read_events(answer.read())
        finally:
            link.close()
        assert out and out[-1] == '[DONE]', f'no [DONE] at the end: {out[-2:]}'
        return out[:-1]

    def metrics(self, timeout=WAIT_S):
        """name{labels without model and engine} -> number."""
        out = {}
        for line in self.ask('GET', '/metrics', timeout=timeout)[2].decode().splitlines():
            if line.startswith('#'):
                continue
            name, value = line.rsplit(' ', 1)
            name = re.sub(r'model_name="[^"]*",engine="0",?', '', name).replace('{}', '')
            out[name.removeprefix('kivi:')] = float(value)
        return out

    def raw(self, data, limit_s=5, tail=b'', close_write=False):
        """Bytes sent as they are; what comes back until the server closes or is silent for limit_s."""
        with socket.create_connection(('127.0.0.1', self.port), timeout=limit_s) as s:
            got = b''
            try:
                s.sendall(data)
                if tail:
                    time.sleep(0.05)
                    s.sendall(tail)
                if close_write:
                    s.shutdown(socket.SHUT_WR)
                while select.select([s], [], [], limit_s)[0]:
                    piece = s.recv(65536)
                    if not piece:
                        break
                    got += piece
            except OSError:
                pass
            return got

    def idle(self):
        m = self.metrics()
        return m['num_requests_running'] == 0 and m['num_requests_waiting'] == 0

    def settle(self):
        """The metrics are as of the end of a step; an answer may be read before that."""
        self.until(lambda: self.idle() and self.metrics()['num_sequences_running'] == 0, 'nothing runs')

    def stop(self, signal_number=signal.SIGTERM, limit_s=WAIT_S):
        """The exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        try:
            return self.process.wait(limit_s * SLOWER)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f'still running {limit_s * SLOWER} s after {signal_number!r}')

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.reader.join(5)


def read_events(data):
    out = []
    for block in data.decode().split('\n\n'):
        for line in block.split('\n'):
            if line.startswith('data: '):
                text = line[6:]
                out.append(text if text == '[DONE]' else json.loads(text))
    return out
