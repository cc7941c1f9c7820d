"""The HTTP interface, through a real server and the clients that people use."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
openai = pytest.importorskip("openai", reason="the package openai is not installed")

from serving_cases import METHODS, PROMPTS, Adapters, engine  # noqa: E402

from lowrank_cli.serving import app, server  # noqa: E402
from lowrank_cli.serving.metrics import Metrics  # noqa: E402

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ('user', 'assistant') %}{{ raise_exception('unknown role') }}"
    "{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


class Running:
    """A server on a free port, in a thread."""

    def __init__(self, engine, **options):
        import uvicorn

        self.engine = engine
        self.listener = server.listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        made = app.create(engine, app.Options(**options), Metrics(engine))
        config = uvicorn.Config(made, loop="asyncio", http="h11", lifespan="off", log_config=None, access_log=False)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        self.clients = []

    def client(self, token="none", **settings):
        settings = {"max_retries": 0, "timeout": 60} | settings
        self.clients.append(openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=token, **settings))
        return self.clients[-1]

    def raw(self, method, path, body=None, **headers):
        """Status, headers and parsed or plain body of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"content-type": "application/json"} | {key.replace("_", "-"): text for key, text in headers.items()}
        if isinstance(body, dict):
            body = json.dumps(body)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.status, response.headers, json.loads(text) if is_json else text

    def close(self):
        for client in self.clients:
            client.close()
        self.server.should_exit = True
        self.thread.join()
        self.engine.close()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return Adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def running(adapters):
    one = engine(max_rows=8, max_waiting=100)
    for tenant, folder in adapters.folders.items():
        one.load(tenant, folder)
    folder = Path(adapters.folders["ann"]).parent
    running = Running(one, chat_template=TEMPLATE, adapters=folder, max_body_bytes=10_000)
    yield running
    running.close()


def greedy(client, model, prompt=PROMPTS[0], tokens=8, **settings):
    return client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0, **settings)


def said(text):
    return [{"role": "user", "content": text}]


def test_models_are_listed(running):
    client = running.client()
    models = {model.id: model for model in client.models.list()}
    assert [*models] == ["base", *METHODS]
    assert models["base"].parent is None and models["ben"].parent == "base"
    assert client.models.retrieve("ben").max_model_len == 256


def test_completions(running, adapters):
    client = running.client()
    for tenant in ("base", *METHODS):
        answer = greedy(client, tenant)
        assert answer.choices[0].text == adapters.alone(tenant, PROMPTS[0], 8)
    ids = running.engine.tokenizer(PROMPTS[0]).input_ids
    assert answer.object == "text_completion" and answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.prompt_tokens == len(ids) and answer.usage.total_tokens == len(ids) + 8
    several = greedy(client, "ben", PROMPTS[:2], n=2)
    expected = [adapters.alone("ben", prompt, 8) for prompt in PROMPTS[:2] for _ in range(2)]
    assert [(choice.index, choice.text) for choice in several.choices] == list(enumerate(expected))
    assert several.usage.completion_tokens == 32
    assert greedy(client, "ben", ids).choices[0].text == greedy(client, "ben", [ids]).choices[0].text == expected[0]
    stop = expected[0][3:5]
    assert greedy(client, "ben", stop=stop).choices[0].text == expected[0][: expected[0].find(stop)]
    drawn = [
        client.completions.create(model="ben", prompt=PROMPTS[0], max_tokens=8, n=3, seed=4, top_p=0.9).choices
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1] and len({choice.text for choice in drawn[0]}) == 3


def test_streams_bring_the_same_text(running, adapters):
    client = running.client()
    chunks = list(greedy(client, "ben", PROMPTS[:2], stream=True, stream_options={"include_usage": True}))
    texts, ends = ["", ""], [None, None]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        ends[choice.index] = ends[choice.index] or choice.finish_reason
    assert texts == [adapters.alone("ben", prompt, 8) for prompt in PROMPTS[:2]] and None not in ends
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 16
    assert len(chunks) > 8, "they come token by token"


def test_an_adapter_answers_in_the_template_next_to_it(running, adapters):
    folder = Path(adapters.folders["ann"])
    own = folder.with_name("own")
    shutil.copytree(folder, own)
    (own / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<{{ m.content }}>{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}: {% endif %}"
    )
    running.engine.load("own", str(own))
    client, settings = running.client(), {"messages": said("hi"), "max_tokens": 8, "temperature": 0}
    answer = client.chat.completions.create(model="own", **settings)
    ids = running.engine.tokenizer("<s><hi></s>: ", add_special_tokens=False).input_ids
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.choices[0].message.content == greedy(client, "ann", ids).choices[0].text
    others = client.chat.completions.create(model="ann", **settings)
    assert others.choices[0].message.content == adapters.alone("ann", "user: hi\nassistant:", 8)
    running.engine.unload("own")


def test_chats_follow_the_template(running, adapters):
    client = running.client()
    prompt = "user: hi\nassistant:"
    alone = adapters.alone("ben", prompt, 8)
    settings = {"model": "ben", "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(messages=said("hi"), **settings)
    assert whole.choices[0].message.content == alone and whole.choices[0].message.role == "assistant"
    parts = client.chat.completions.create(messages=said([{"type": "text", "text": "hi"}]), **settings)
    assert parts.choices[0].message.content == alone
    chunks = list(client.chat.completions.create(messages=said("hi"), stream=True, n=2, **settings))
    for index in range(2):
        deltas = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert deltas[0].delta.role == "assistant" and deltas[-1].finish_reason in ("length", "stop")
        assert "".join(choice.delta.content or "" for choice in deltas) == alone


def test_log_probabilities_are_reported(running):
    client = running.client()
    first = greedy(client, "ann", tokens=4, logprobs=2).choices[0]
    assert "".join(first.logprobs.tokens) == first.text and len(first.logprobs.token_logprobs) == 4
    assert first.logprobs.text_offset == [len("".join(first.logprobs.tokens[:at])) for at in range(4)]
    assert all(max(top.values()) == lp for top, lp in zip(first.logprobs.top_logprobs, first.logprobs.token_logprobs))
    settings = {"model": "ann", "messages": said("hi"), "max_tokens": 3, "temperature": 0}
    chat = client.chat.completions.create(logprobs=True, top_logprobs=2, **settings).choices[0]
    assert [len(token.top_logprobs) for token in chat.logprobs.content] == [2, 2, 2]
    assert "".join(token.token for token in chat.logprobs.content) == chat.message.content
    assert client.chat.completions.create(**settings).choices[0].logprobs is None


COMPLETION = {"model": "base", "prompt": "a"}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", "{", 400, "JSON decode error"),
        ("completions", "[" * 3000, 400, ""),
        ("completions", "[]", 400, "the body is not an object"),
        ("completions", "x" * 20_000, 413, "the body is larger than 10000 bytes"),
        ("completions", {**COMPLETION, "model": "bse"}, 404, "model: there is no model 'bse'; did you mean 'base'?"),
        ("completions", {**COMPLETION, "tempeature": 1}, 400, "tempeature: unknown key; did you mean 'temperature'?"),
        ("completions", {**COMPLETION, "temperature": 3}, 400, "temperature: Input should be less than or equal to 2"),
        ("completions", {**COMPLETION, "top_p": 0}, 400, "top_p: Input should be greater than 0"),
        ("completions", {**COMPLETION, "n": 9}, 400, "n: 9 is out of range (allowed: 1 to 8)"),
        ("completions", {**COMPLETION, "echo": True}, 400, "echo: it is not supported here; leave it out"),
        ("completions", {**COMPLETION, "prompt": 3}, 400, "prompt: Input should be a valid string"),
        ("completions", {**COMPLETION, "prompt": []}, 400, "prompt: "),
        ("completions", {**COMPLETION, "prompt": [[]]}, 400, "prompt: it is empty"),
        ("completions", {**COMPLETION, "prompt": [5000]}, 400, "prompt: there is no token 5000"),
        ("completions", {**COMPLETION, "prompt": [3] * 250}, 400, "prompt: 250 tokens, and 16 for the answer, do not"),
        ("completions", {**COMPLETION, "prompt": ["a"] * 101}, 400, "prompt: 101 answers at once are too many"),
        ("completions", {**COMPLETION, "prompt": "\ud800"}, 400, "half of a surrogate pair"),
        (
            "chat/completions",
            {**CHAT, "messages": [{"role": "user", "content": "\ud800"}]},
            400,
            "half of a surrogate pair",
        ),
        ("load_lora_adapter", {"lora_name": "\ud800", "lora_path": "ben"}, 400, "half of a surrogate pair"),
        ("completions", {**COMPLETION, "stream_options": {"x": 1}}, 400, "stream_options: x: unknown key"),
        ("chat/completions", {"model": "base"}, 400, "messages: Field required"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user"}]}, 400, "messages.0.content: Field required"),
        ("chat/completions", {**CHAT, "messages": [{"role": "x", "content": ""}]}, 400, "messages: the chat template"),
        ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools: it is not supported here"),
        ("chat/completions", {**CHAT, "max_tokens": 255}, 400, "messages: "),
        ("nowhere", {}, 404, "Not Found"),
        ("load_lora_adapter", {"lora_name": "x"}, 400, "lora_path: Field required"),
        ("load_lora_adapter", {"lora_name": "x", "lora_path": "no"}, 400, "tenant: there is no folder"),
        ("load_lora_adapter", {"lora_name": "x", "lora_path": "../.."}, 403, "from the server's folder only"),
        ("load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, 403, "from the server's folder only"),
        ("load_lora_adapter", {"lora_name": "ann", "lora_path": "ben"}, 400, "there is a model 'ann' already"),
        ("unload_lora_adapter", {"lora_name": "x"}, 404, "model: there is no model 'x'"),
        ("unload_lora_adapter", {"lora_name": "base"}, 400, "it cannot be unloaded"),
    ],
)
def test_mistakes_are_answered_as_openai_does(running, path, body, status, message):
    found, _, answer = running.raw("POST", f"/v1/{path}", body)
    assert found == status and [*answer] == ["error"]
    assert {*answer["error"]} == {"message", "type", "param", "code"}
    assert message in answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"


def test_a_body_that_grows_too_large_is_cut_off(running):
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    pieces = [b'{"model": "base", "prompt": "', *[b"a" * 4000] * 4, b'"}']
    connection.request("POST", "/v1/completions", iter(pieces), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 413 and json.load(response)["error"]["code"] == "request_too_large"
    connection.close()


def test_adapters_come_and_go(running, adapters):
    client = running.client()
    status, _, text = running.raw("POST", "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "ben"})
    assert (status, text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert greedy(client, "new").choices[0].text == adapters.alone("ben", PROMPTS[0], 8)
    status, _, text = running.raw("POST", "/v1/unload_lora_adapter", {"lora_name": "new"})
    assert (status, text) == (200, "Success: LoRA adapter 'new' removed successfully.")
    with pytest.raises(openai.NotFoundError, match="there is no model 'new'"):
        greedy(client, "new")
    assert 'model="new"' not in running.raw("GET", "/metrics")[2]


def idle(running):
    """Wait until no answer is running or waiting."""
    for _ in range(600):
        if not (running.engine.running or running.engine.waiting):
            return
        time.sleep(0.05)
    raise AssertionError("rows are taken still")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(running, adapters, stream):
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    body = {"model": "ann", "prompt": PROMPTS[0], "max_tokens": 230, "n": 8, "stream": stream, "temperature": 0}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    while not running.engine.running:
        time.sleep(0.01)
    connection.sock.close()
    connection.close()
    began = running.raw("GET", "/metrics")[2]
    assert greedy(running.client(), "ben").choices[0].text == adapters.alone("ben", PROMPTS[0], 8)
    idle(running)
    assert 'lrk_requests_total{model="ann",outcome="gone"}' in running.raw("GET", "/metrics")[2] + began


def test_metrics_count_what_was_answered(running):
    def value(name):
        lines = running.raw("GET", "/metrics")[2].splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith(name))

    names = {
        'lrk_requests_total{model="dan",outcome="done"}': 1,
        'lrk_generated_tokens_total{model="dan"}': 5,
        'lrk_time_to_first_token_seconds_count{model="dan"}': 1,
    }
    before = {name: value(name) for name in names}
    greedy(running.client(), "dan", tokens=5)
    assert {name: value(name) - before[name] for name in names} == names
    assert value("lrk_models") == 1 + len(METHODS) and value("lrk_running_answers") == 0


def test_a_token_is_asked_for(adapters):
    running = Running(engine(), token="secret")
    try:
        for token in ("wrong", "secreT"):
            with pytest.raises(openai.AuthenticationError, match="the token is missing or wrong"):
                running.client(token).models.list()
        assert running.raw("GET", "/metrics")[0] == 401 and running.raw("GET", "/health")[0] == 200
        assert running.raw("GET", "/v1/models", authorization="Bearer \xff")[0] == 401
        assert [model.id for model in running.client("secret").models.list()] == ["base"]
        status, _, answer = running.raw(
            "POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "a"}, authorization="Bearer secret"
        )
        assert status == 403 and "start the server with serve.adapters=FOLDER" in answer["error"]["message"]
        with pytest.raises(openai.BadRequestError, match="'base' has no chat template"):
            running.client("secret").chat.completions.create(model="base", messages=said("hi"))
    finally:
        running.close()


def test_a_full_queue_and_a_stopping_server_refuse(adapters):
    running = Running(engine(max_rows=1, max_waiting=1))
    client = running.client()
    try:
        long = {"model": "base", "prompt": PROMPTS[0], "max_tokens": 200, "temperature": 0, "stream": True}
        streams = [client.completions.create(**long)]
        next(iter(streams[0]))
        streams.append(client.completions.create(**long))
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(**long)
        assert refused.value.response.headers["retry-after"] == "1" and refused.value.code == "queue_full"
        running.engine.refuse()
        assert running.raw("GET", "/health")[0] == 503
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            client.completions.create(**long)
        texts = ["".join(chunk.choices[0].text for chunk in stream) for stream in streams]
        alone = adapters.alone("base", PROMPTS[0], 200)
        assert alone.endswith(texts[0]) and texts[1] == alone, "what was taken is finished"
    finally:
        running.close()


@pytest.mark.slow
def test_sixty_four_clients_at_once(running, adapters):
    """No answer is lost or mixed up, and nothing stays. ``LRK_SERVE_SECONDS`` makes it longer."""
    seconds = float(os.environ.get("LRK_SERVE_SECONDS", "2"))
    tenants, wrong, count = ["base", *METHODS], [], [0] * 64
    expected = {(t, p, n): adapters.alone(t, p, n) for t in tenants for p in PROMPTS[:2] for n in (3, 7)}
    until = time.monotonic() + seconds
    memory = []

    def work(number):
        client = running.client()
        while not count[number] or time.monotonic() < until:
            case = [*expected][(number * 7 + count[number] * 5) % len(expected)]
            tenant, prompt, tokens = case
            if number % 2:
                text = greedy(client, tenant, prompt, tokens).choices[0].text
            else:
                chunks = greedy(client, tenant, prompt, tokens, stream=True)
                text = "".join(chunk.choices[0].text for chunk in chunks)
            count[number] += 1
            if text != expected[case]:
                wrong.append((case, text))
        client.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append(resident())
        time.sleep(0.5)
    assert wrong == [] and min(count) > 0
    idle(running)
    if seconds >= 60:
        middle = len(memory) // 2
        assert max(memory[middle:]) < 1.02 * max(memory[:middle]) + 2**22, "memory is flat"


def resident():
    """Memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
