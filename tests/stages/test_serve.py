"""lrk serve: what is served, from a run or a file of tenants, until a signal stops it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from command import lrk, one_line  # noqa: F401 (a fixture)
from forked import Lrk
from serving_cases import PROMPTS

from lowrank_cli.runs import stopping
from lowrank_cli.runs.tenant_file import read_tenants
from lowrank_cli.stages import serve

SERVES = importlib.util.find_spec("fastapi") and importlib.util.find_spec("openai")
needs_server = pytest.mark.skipif(not SERVES, reason="the extra serve or the package openai is not installed")


@pytest.fixture
def trained(lrk):  # noqa: F811
    """A function that trains a method for a moment, on reviews unless told otherwise; returns the run's folder."""

    def train(*words):
        task = [] if any(word.startswith("task=") for word in words) else ["task=tiny_sentiment"]
        ended = lrk("train", *words, *task, "hardware.threads=1")
        assert ended.code == 0, ended
        return str(Path("outputs/latest").resolve())

    return train


@needs_server
@pytest.mark.slow
def test_a_server_serves_until_it_is_stopped(trained, lrk):  # noqa: F811
    """Two methods next to the bare model; a stream that runs when SIGTERM comes is finished."""
    import openai

    short = ("train.max_steps=2", "train.batch_size=2", "task.limit=8")
    milora, calibrated = trained("method=milora", *short), trained("method=idaicl", "task.limit=48")
    Path("tenants.jsonl").write_text(
        json.dumps({"tenant": milora, "name": "mi"}) + "\n" + json.dumps({"tenant": calibrated, "name": "ida"}) + "\n"
    )
    server = Lrk("serve", "--tenants", "tenants.jsonl", "serve.port=0", "hardware.threads=1")
    killer = threading.Timer(120, server.kill)
    killer.start()
    try:
        while not (at := re.search(r"serving llama, mi, ida at (http://127\.0\.0\.1:\d+/v1)", server.errors())):
            assert server.poll() is None, server.errors()
            time.sleep(0.05)
        with openai.OpenAI(base_url=at[1], api_key="none", max_retries=0) as client:
            prompt = "Review: a charming film\nSentiment:"
            answers = client.completions.create(model="ida", prompt=[prompt, PROMPTS[0]]).choices
            assert {answer.text.strip() for answer in answers} <= {"positive", "negative"}
            with pytest.raises(openai.BadRequestError, match="their tokens have no log probabilities"):
                client.completions.create(model="ida", prompt=prompt, logprobs=1)
            settings = {"model": "mi", "prompt": prompt, "max_tokens": 300, "temperature": 0, "stream": True}
            stream = iter(client.completions.create(**settings))
            text = next(stream).choices[0].text
            server.send_signal(signal.SIGTERM)
            rest = list(stream)
            text += "".join(chunk.choices[0].text for chunk in rest)
            assert rest[-1].choices[0].finish_reason in ("length", "stop")
        assert server.wait(60) == 0, server.errors()
    finally:
        killer.cancel()
        server.kill()
    run = Path("outputs/latest")
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    assert json.loads((run / "metrics.json").read_text())["serve/requests"] == 2
    asked = ["generate.max_new_tokens=300", "hardware.threads=1", "--save"]
    ended = lrk("generate", f"run={milora}", prompt, *asked)
    assert json.loads(Path("outputs/latest/answers.jsonl").read_text())["answer"] == text, ended


def test_a_taken_port_and_a_missing_package_are_one_line(lrk, monkeypatch):  # noqa: F811
    if SERVES:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            said = one_line(lrk("serve", "method=none", f"serve.port={port}"))
        assert said == f"serve.port: 127.0.0.1:{port} cannot be used: Address already in use"
    monkeypatch.setattr(serve, "PACKAGES", ("no_such_package",))
    assert one_line(lrk("serve", "method=none")).endswith("install it with: pip install 'lowrank-cli[serve]'")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=none", "model=minilm"], "model.kind: minilm is an encoder and generates nothing"),
        (["method=none", "hardware.processes=2"], "hardware.processes: 2, but one process serves"),
        (["method=none", "serve.port=70000"], "serve.port: 70000 is out of range (allowed: 0 to 65535)"),
        (["method=none", "serve.max_rows=0"], "serve.max_rows: 0 is out of range"),
        (
            ["method=none", "serve.host=0.0.0.0"],
            "serve.host: 0.0.0.0 can be reached by other machines; set serve.token",
        ),
        (["--tenants", "nowhere"], "serve.tenants: 'nowhere' cannot be read"),
        (["--tenants", "empty.jsonl"], "serve.tenants: 'empty.jsonl' has no lines"),
        (["--tenants", "twice.jsonl"], "serve.tenants: twice.jsonl, line 2: there is a tenant 'a' already"),
        (["--tenants", "wrong.jsonl"], "serve.tenants: wrong.jsonl, line 1: tenant is 3; expected text"),
        ([], "run: no finished run under 'outputs'; start one with: lrk train"),
    ],
)
def test_mistakes_are_one_line(lrk, words, message):  # noqa: F811
    Path("empty.jsonl").write_text("\n")
    Path("twice.jsonl").write_text('{"tenant": "b/a"}\n{"tenant": "c", "name": "a"}\n')
    Path("wrong.jsonl").write_text('{"tenant": 3}\n')
    assert one_line(lrk("serve", *words)).startswith(message)


@pytest.mark.skipif(not SERVES, reason="the extra serve is not installed")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve.token_file=nowhere"], "serve.token_file: '"),
        (["serve.token_file=blank"], "serve.token_file: '"),
        (["serve.adapters=nowhere"], "serve.adapters: there is no folder '"),
        (["serve.chat_template=nowhere"], "serve.chat_template: '"),
        (["serve.max_length=2000", "serve.port=0"], "serve.max_length: 2000 is out of range (allowed: 1 to 1024"),
    ],
)
def test_files_and_limits_are_checked_before_serving(lrk, words, message):  # noqa: F811
    Path("blank").write_text(" \n")
    assert one_line_at_end(lrk("serve", "method=none", "hardware.threads=1", *words)).startswith(message)


def one_line_at_end(ended):
    """The message, after what is printed about the model."""
    assert ended.code == 2, ended
    assert not any(Path("outputs").glob("2*/*"))
    return ended.err.splitlines()[-1].removeprefix("error: ")


def test_tenants_are_checked_before_anything_is_loaded(trained, lrk, monkeypatch):  # noqa: F811
    short = ("train.max_steps=1", "train.batch_size=2", "task.limit=8")
    for method in ("lora", "full"):
        shutil.copytree(trained(f"method={method}", *short), method)
    shutil.copytree("lora", "other")
    proof = json.loads(Path("other/adapter/lrk.json").read_text()) | {"fingerprint": "0" * 64}
    Path("other/adapter/lrk.json").write_text(json.dumps(proof))
    Path("empty").mkdir()

    def checked(*folders):
        lines = [json.dumps({"name": f"t{at}", "tenant": folder}) + "\n" for at, folder in enumerate(folders)]
        Path("tenants.jsonl").write_text("".join(lines))
        return lrk("check", "serve", "serve.tenants=tenants.jsonl")

    assert checked("lora", "lora/adapter").code == 0
    for folder, message in {
        "nowhere": "there is no folder 'nowhere'",
        "empty": "'empty' is no run with an adapter, and no adapter folder",
        "full": "method=full leaves no adapter that could share the model; merge it with lrk export run=full export.",
        "other": "it was trained on another model than 't0' (fingerprint 000000000000, not ",
    }.items():
        ended = checked("lora", folder)
        assert ended.code == 2 and ended.err.startswith(f"error: serve: tenant 't1': {message}"), ended

    def stop(*args, **settings):
        raise stopping.Stop

    monkeypatch.setattr(serve, "load", stop)
    ended = lrk("serve", "run=lora", "serve.port=0")
    assert ended.code == 130 and "interrupted: the server has stopped" in ended.err and "--resume" not in ended.err
    assert "--resume" not in ended.out


def test_a_chat_is_written_as_the_run_recorded_it(trained, lrk):  # noqa: F811
    from serving_cases import bundled

    from lowrank_cli.serving.chats import adapter_template

    turn = {"role": "user", "content": "How are you?"}
    rows = [
        {"messages": [{"role": "user", "content": str(at)}, {"role": "assistant", "content": "a"}]} for at in range(20)
    ]
    Path("talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("template").write_text("{% for m in messages %}{{ m.role }}: {{ m.content + eos_token }}{% endfor %}")
    words = ["task.path=talk.jsonl", "task.chat_template=template", "task.system=Be kind.", "train.max_steps=1"]
    run = Path(trained("method=lora", "task=chat", *words))
    tokenizer = bundled()[1]
    expected = tokenizer("system: Be kind.</s>user: How are you?</s>", add_special_tokens=False).input_ids
    for folder in (run, run / "adapter"):
        template = adapter_template(tokenizer, folder)
        assert template.tokens(tokenizer, [turn]) == expected and tokenizer.eos_token_id in template.ends
    own = [{"role": "system", "content": "Be brief."}, turn]
    assert "Be kind" not in tokenizer.decode(template.tokens(tokenizer, own))


def test_tenants_are_named_after_their_runs():
    Path("t.jsonl").write_text('{"tenant": "runs/one"}\n{"tenant": "runs/two/adapter"}\n{"name": "x", "tenant": "y"}\n')
    assert read_tenants(Path("t.jsonl")) == {"one": "runs/one", "two": "runs/two/adapter", "x": "y"}


def test_a_folder_from_elsewhere_does_not_serve_others(lrk):  # noqa: F811
    from lowrank_cli.config.composition import compose
    from lowrank_cli.launch import stage

    Path("mine").mkdir()
    run = stage.create(compose("serve", ["method=none", "serve.adapters=mine"]), None, "lrk serve")
    ended = lrk("serve", "--resume", str(run.path))
    assert ended.code == 2 and "would serve others with serve.host=127.0.0.1, serve.adapters=" in ended.err
