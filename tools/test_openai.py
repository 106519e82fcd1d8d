#!/usr/bin/env python3
"""test_openai.py: `kivi serve` against the `openai` package, unmodified.

  test_openai.py MODEL [kivi serve's options]        needs: pip install openai

Completions, chat, streams, logprobs, n, stop, JSON schema (by the package's own pydantic helper), errors raised as its
own exception types, timeouts, cancellation, the asynchronous client. One line a case, then the count."""
import asyncio
import json
import os
import signal
import sys
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, 'tests'))
from serve_client import Server  # noqa: E402

import openai  # noqa: E402
import pydantic  # noqa: E402

KIVI = os.path.join(ROOT, os.environ.get('KIVI_BIN') or 'build/kivi')
COUNT = {True: 0, False: 0}
ASK = [{'role': 'user', 'content': 'What is the capital of France?'}]


class Person(pydantic.BaseModel):
    name: str
    age: int
    likes: list[str] = []


def raises(kind, status, call, **more):
    try:
        call(**more)
    except kind as e:
        assert type(e) is kind, type(e)
        assert status is None or e.status_code == status, e.status_code
        return e
    raise AssertionError(f'{kind.__name__} was not raised')


def cases(server, model):
    url = f'http://127.0.0.1:{server.port}/v1'
    c = openai.OpenAI(base_url=url, api_key='a-key', max_retries=0)

    def models():
        assert [m.id for m in c.models.list()] == [model]
        assert c.models.retrieve(model).id == model
        raises(openai.NotFoundError, 404, c.models.retrieve, model='other')

    def completion():
        r = c.completions.create(model=model, prompt='The capital of France is', max_tokens=8, temperature=0,
                                 logprobs=3)
        choice = r.choices[0]
        assert choice.finish_reason == 'length' and r.usage.completion_tokens == 8 and choice.text
        assert len(choice.logprobs.token_logprobs) == 8 and len(choice.logprobs.top_logprobs[0]) == 3
        assert ''.join(choice.logprobs.tokens) == choice.text
        many = c.completions.create(model=model, prompt=['One', 'Two'], max_tokens=4, n=2, seed=1)
        assert [x.index for x in many.choices] == [0, 1, 2, 3]
        echo = c.completions.create(model=model, prompt='One two', max_tokens=0, echo=True, logprobs=1, temperature=0)
        assert echo.choices[0].text == 'One two' and echo.choices[0].logprobs.token_logprobs[0] is None

    def completion_stream():
        whole = c.completions.create(model=model, prompt='Once', max_tokens=20, temperature=0).choices[0].text
        parts = list(c.completions.create(model=model, prompt='Once', max_tokens=20, temperature=0, stream=True,
                                          stream_options={'include_usage': True}))
        assert ''.join(x.choices[0].text for x in parts[:-1]) == whole
        assert parts[-1].usage.completion_tokens == 20 and not parts[-1].choices

    def chat():
        r = c.chat.completions.create(model=model, messages=ASK, max_completion_tokens=30, temperature=0, logprobs=True,
                                      top_logprobs=2)
        assert 'Paris' in r.choices[0].message.content and r.choices[0].message.role == 'assistant'
        entries = r.choices[0].logprobs.content
        assert bytes(b for e in entries[:-1] for b in e.bytes).decode() == r.choices[0].message.content
        assert all(len(e.top_logprobs) == 2 and e.logprob <= e.top_logprobs[0].logprob for e in entries)

    def chat_stream():
        whole = c.chat.completions.create(model=model, messages=ASK, max_tokens=30, temperature=0)
        with c.chat.completions.stream(model=model, messages=ASK, max_tokens=30, temperature=0) as stream:
            text = ''.join(e.delta for e in stream if e.type == 'content.delta')
            final = stream.get_final_completion()
        assert text == whole.choices[0].message.content == final.choices[0].message.content
        assert final.choices[0].finish_reason == 'stop'

    def stop_and_n():
        r = c.chat.completions.create(model=model, messages=ASK, max_tokens=30, temperature=0, stop=['Paris', 'zz'])
        assert r.choices[0].finish_reason == 'stop' and 'Paris' not in r.choices[0].message.content
        r = c.chat.completions.create(model=model, messages=ASK, max_tokens=12, n=3, seed=3, temperature=1.2)
        assert len({x.message.content for x in r.choices}) > 1 and len(r.choices) == 3
        biased = c.completions.create(model=model, prompt='x', max_tokens=3, temperature=0, logit_bias={'42': 100})
        assert len(set(biased.choices[0].text)) == 1

    def schema():
        r = c.chat.completions.parse(model=model, max_tokens=120, temperature=0, response_format=Person,
                                     messages=[{'role': 'user', 'content': 'Describe a person as JSON.'}])
        assert isinstance(r.choices[0].message.parsed, Person), r
        r = c.chat.completions.create(model=model, max_tokens=200, temperature=0,
                                      response_format={'type': 'json_object'},
                                      messages=[{'role': 'user', 'content': 'Give me one small JSON object.'}])
        if r.choices[0].finish_reason == 'stop':
            assert isinstance(json.loads(r.choices[0].message.content), dict)

    def errors():
        create = c.chat.completions.create
        e = raises(openai.BadRequestError, 400, create, model=model, messages=ASK, temperature=-1)
        assert e.param == 'temperature' and e.type == 'invalid_request_error', e
        e = raises(openai.NotFoundError, 404, create, model='gpt-4', messages=ASK)
        assert e.code == 'model_not_found'
        other = openai.OpenAI(base_url=url, api_key='wrong', max_retries=0)
        e = raises(openai.AuthenticationError, 401, other.models.list)
        assert e.code == 'invalid_api_key'
        raises(openai.BadRequestError, 400, create, model=model, messages=ASK,
               response_format={'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': {'not': {}}}})
        nobody = openai.OpenAI(base_url='http://127.0.0.1:9/v1', api_key='x', max_retries=0)
        raises(openai.APIConnectionError, None, nobody.models.list)

    def timeout():
        slow = c.with_options(timeout=0.4)
        raises(openai.APITimeoutError, None, slow.completions.create, model=model, prompt='x', max_tokens=1500,
               extra_body={'ignore_eos': True})
        server.until(server.idle, 'what nobody waits for is cancelled', 3)

    def cancel():
        stream = c.completions.create(model=model, prompt='x', max_tokens=1500, stream=True,
                                      extra_body={'ignore_eos': True})
        for _, part in zip(range(3), stream):
            assert part.choices
        stream.close()
        begun = time.monotonic()
        server.until(server.idle, 'it is cancelled', 3)
        print(f'   noticed after {1e3 * (time.monotonic() - begun):.0f} ms')

    def asynchronous():
        async def ask():
            a = openai.AsyncOpenAI(base_url=url, api_key='a-key', max_retries=0)
            alone = [c.completions.create(model=model, prompt=f'Number {i}', max_tokens=8,
                                          temperature=0).choices[0].text for i in range(8)]
            got = await asyncio.gather(*(a.completions.create(model=model, prompt=f'Number {i}', max_tokens=8,
                                                              temperature=0) for i in range(8)))
            assert [g.choices[0].text for g in got] == alone
            task = asyncio.create_task(a.completions.create(model=model, prompt='x', max_tokens=1500,
                                                            extra_body={'ignore_eos': True}))
            await asyncio.sleep(0.3)
            task.cancel()
        asyncio.run(ask())
        server.until(server.idle, 'a cancelled task is cancelled here', 3)

    return [models, completion, completion_stream, chat, chat_stream, stop_and_n, schema, errors, timeout, cancel,
            asynchronous]


def overloaded(args):
    """429 while the queue is full and 503 while the server drains, on a server of its own that runs one at a time."""
    with Server(KIVI, *args, '--max-num-seqs', '1', '--max-num-queued-reqs', '1') as server:
        c = openai.OpenAI(base_url=f'http://127.0.0.1:{server.port}/v1', api_key='x', max_retries=0)
        model = c.models.list().data[0].id
        ask = dict(model=model, prompt='x', max_tokens=1)
        long = dict(ask, max_tokens=2000, extra_body={'ignore_eos': True})
        running = c.completions.create(**long, stream=True)
        next(iter(running))
        waiting = threading.Thread(target=lambda: c.completions.create(**ask))
        waiting.start()
        server.until(lambda: server.metrics()['num_requests_waiting'] == 1, 'one waits')
        e = raises(openai.RateLimitError, 429, c.completions.create, **ask)
        assert e.code == 'queue_full' and e.type == 'rate_limit_error', e
        assert 1 <= int(e.response.headers['Retry-After']) <= 60, e.response.headers
        server.process.send_signal(signal.SIGTERM)
        server.until(lambda: server.ask('GET', '/ready')[0] == 503, 'it drains')
        e = raises(openai.InternalServerError, 503, c.completions.create, **ask)
        assert e.type == 'unavailable_error' and 1 <= int(e.response.headers['Retry-After']) <= 60, e
        running.close()
        waiting.join(60)
        assert not waiting.is_alive() and server.process.wait(60) == 0


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    with Server(KIVI, *sys.argv[1:], '--served-model-name', 'small', '--api-key', 'a-key') as server:
        server_get = server.ask
        server.ask = lambda method, path, body=None, headers=None, **more: server_get(
            method, path, body, {'Authorization': 'Bearer a-key', **(headers or {})}, **more)
        def busy():
            overloaded(sys.argv[1:])
        for function in [*cases(server, 'small'), busy]:
            try:
                function()
                ok, why = True, ''
            except Exception as e:  # an exception of the package is as much a failure as an assertion
                ok, why = False, f': line {e.__traceback__.tb_next.tb_lineno}: {type(e).__name__}: {str(e)[:300]}'
            COUNT[ok] += 1
            print(f'{"ok" if ok else "not ok"} openai {openai.__version__}: {function.__name__}{why}', flush=True)
    print(f'{COUNT[True]} passed, {COUNT[False]} failed')
    return 1 if COUNT[False] else 0


if __name__ == '__main__':
    sys.exit(main())
