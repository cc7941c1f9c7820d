"""lrk generate: one prompt as it is written, files of prompts for many adapters, and lines that fail."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command import lrk, one_line  # noqa: F401 (a fixture)
from transformers import TextStreamer

from lowrank_cli import methods
from lowrank_cli.adapter.files import save_load
from lowrank_cli.config.composition import compose
from lowrank_cli.launch import stage
from lowrank_cli.models.load import load
from lowrank_cli.runs import Run
from lowrank_cli.runs.prompt_file import read_requests
from lowrank_cli.stages.generate import Writer

QUICK = ["hardware.threads=1", "generate.max_new_tokens=6"]
PROMPTS = ["the zorp is red.", "Question: is the zorp of Marl a good one? Answer:", "ring"]


def adapted(name: str, seed: int, *, task: str = "tiny_instruct") -> Path:
    """A finished run whose adapter holds noise."""
    composed = compose("train", [f"method={name}", f"task={task}", f"name=seed{seed}", "hardware.threads=1"])
    run = stage.create(composed, None, "made by a test")
    run.begin()
    torch.manual_seed(seed)
    adapter = methods.create(composed.config.method).adapt(
        load(composed.config.model, composed.config.hardware, None).model
    )
    with torch.no_grad():
        for parameter in adapter.trained.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    run.file("adapter").mkdir()
    save_load.save(adapter, run.path / "adapter", {})
    run.finish({})
    return run.path


def answer(lrk, *words):  # noqa: F811
    """What one prompt gets."""
    ended = lrk("generate", "--save", *QUICK, *words)
    assert ended.code == 0, ended
    return records()[0]["answer"]


def records(path="outputs/latest/answers.jsonl"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def asked(*lines):
    """A file of these lines."""
    path = Path("prompts.jsonl")
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_one_prompt_is_printed_while_it_is_written(lrk, monkeypatch):  # noqa: F811
    run, puts, put = adapted("lora", 1), [], TextStreamer.put
    monkeypatch.setattr(TextStreamer, "put", lambda self, value: puts.append(value) or put(self, value))
    ended = lrk("generate", "--save", f"run={run}", PROMPTS[0], *QUICK)
    assert ended.code == 0 and len(puts) == 7, "the prompt, and each token"
    assert ended.out == records()[0]["answer"] + "\n"
    assert "bundled" in ended.err and "generate" in ended.err, "what else there is to say goes to stderr"
    assert Run.open("outputs/latest").metrics["generate/tokens"] == 6
    runs = sorted(Path("outputs").glob("*/*"))
    newest = lrk("generate", PROMPTS[0], *QUICK, "generate.num_beams=3")
    assert newest.code == 0 and sorted(Path("outputs").glob("*/*")) == runs, "without --save it leaves no folder"
    assert f"\nrun: {run}\n" in newest.err and "run: " not in ended.err, "a run that was not named is printed"
    assert lrk("generate", "--dry-run", PROMPTS[0]).out.count(str(run.resolve())) == 1
    assert answer(lrk, PROMPTS[0], "method=none") != answer(lrk, PROMPTS[0])


def test_a_file_is_answered_by_many_adapters_each_as_alone(lrk):  # noqa: F811
    tenants = [adapted("lora", 1), adapted("milora", 2), adapted("milora", 3), adapted("pissa", 4), None]
    lines = [
        {"id": (at, prompt), "tenant": tenant and str(tenant), "prompt": prompt}
        for at, tenant in enumerate(tenants)
        for prompt in PROMPTS
    ]
    lines.append({"tenant": f"{tenants[0]}/adapter", "prompt": PROMPTS[0]})
    ended = lrk("generate", "--tenants", asked(*lines), *QUICK, "generate.batch_size=5")
    assert ended.code == 0, ended
    found = records()
    assert Run.open("outputs/latest").info["grouped"] == "torch", "our kernels are for larger models"
    assert [json.loads(line) for line in ended.out.splitlines()] == found
    assert [{**line, "id": list(line["id"])} for line in lines[:-1]] == [
        {key: value for key, value in record.items() if key != "answer"} for record in found[:-1]
    ], "in order, other keys come back"
    assert found[0]["answer"] == found[-1]["answer"]
    assert len({record["answer"] for record in found[0:15:3]}) == 5, "the adapters differ"
    for record in found[:15]:
        own = f"run={record['tenant']}" if record["tenant"] else "method=none"
        assert record["answer"] == answer(lrk, own, record["prompt"])


def test_adapters_answer_under_autocast(lrk):  # noqa: F811
    for run in (str(adapted("lora", 1)), str(adapted("milora", 2))):
        autocast = answer(lrk, f"run={run}", PROMPTS[0], "hardware.precision=autocast")
        file = asked({"tenant": run, "prompt": PROMPTS[0]})
        assert answer(lrk, "--tenants", file, "hardware.precision=autocast") == autocast


def test_a_line_that_fails_leaves_the_others_alone(lrk):  # noqa: F811
    lora, dora = str(adapted("lora", 1)), str(adapted("dora", 2))
    other = adapted("lora", 3)
    damaged = other / "adapter" / save_load.WEIGHTS
    damaged.write_bytes(damaged.read_bytes()[:-1])
    lines = [
        ({"tenant": lora, "prompt": PROMPTS[0]}, None),
        ("{", "it cannot be read as JSON"),
        ("[]", 'not an object {"tenant"'),
        ({"tenant": lora}, "'prompt' is missing"),
        ({"tenant": 3, "prompt": "x"}, "'tenant' is not a folder"),
        ({"tennant": lora, "prompt": "x"}, "'tenant' is missing, and 'tennant' means nothing"),
        ({"prompt": "x"}, "'tenant' is missing (null is the bare model)"),
        ({"tenant": "nowhere", "prompt": "x"}, "tenant: there is no folder 'nowhere'"),
        ({"tenant": ".", "prompt": "x"}, "tenant: '.' is no run with an adapter"),
        ({"tenant": "x" * 5000, "prompt": "x"}, "tenant: there is no folder 'xxx"),
        ({"tenant": "~nosuchuser", "prompt": "x"}, "tenant: there is no folder '~nosuchuser'"),
        ({"tenant": "a\0b", "prompt": "x"}, "tenant: there is no folder 'a"),
        ('{"tenant": null, "prompt": "\\ud800"}', "it: prompt is '\\ud800'; expected text of whole characters"),
        ("[" * 50_000, "it is nested too deep"),
        ("[" * 50 + "]" * 50, "is nested more than 32 levels deep"),
        ({"tenant": dora, "prompt": "x"}, "use_dora=True, and a bank takes use_dora=False"),
        ({"tenant": str(other), "prompt": "x"}, "was truncated or altered"),
        ({"tenant": None, "prompt": PROMPTS[0]}, None),
    ]
    ended = lrk("generate", "--tenants", asked(*[line for line, _ in lines]), *QUICK, "generate.output=answers.jsonl")
    assert (
        ended.code == 1
        and ended.out == ""
        and "16 of 18 lines have no answer; the first is line 2: it cannot be read as JSON" in ended.err
    )
    for (line, error), record in zip(lines, records("answers.jsonl"), strict=True):
        assert ("answer" in record) == (error is None), line
        assert (error or "") in record.get("error", "")
    assert records("answers.jsonl") == records()


def test_tokens_are_counted_up_to_the_end():
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2]))
    writer = SimpleNamespace(model=model, tokenizer=SimpleNamespace(pad_token_id=0))
    made = torch.tensor([[5, 6, 2, 2, 2], [5, 2, 0, 0, 0], [5, 6, 7, 8, 9]])
    assert Writer.count_tokens(writer, made) == 3 + 2 + 5
    model.generation_config.eos_token_id = None
    assert Writer.count_tokens(writer, made) == 5 + 2 + 5


def test_only_a_new_line_ends_a_request():
    Path("one.jsonl").write_text('{"tenant": null, "prompt": "a\u2028b\u0085c"}\n', encoding="utf-8")
    (request,) = read_requests(Path("one.jsonl"))
    assert request.prompt == "a\u2028b\u0085c" and request.error is None


def test_answers_do_not_go_into_a_folder(lrk):  # noqa: F811
    said = one_line(lrk("generate", "--tenants", asked({"tenant": None, "prompt": "x"}), *QUICK, "generate.output=."))
    assert said.startswith("generate.output: ") and said.endswith("is a folder; name a file")


def test_a_batch_that_does_not_fit_is_answered_line_by_line(lrk):  # noqa: F811
    runs = [str(adapted("lora", seed)) for seed in range(3)]
    size = sum(t.numel() * 4 for t in save_load.read_tensors(Path(runs[0]) / "adapter" / save_load.WEIGHTS).values())
    file = asked(*[{"tenant": run, "prompt": PROMPTS[0]} for run in runs])
    plain = lrk("generate", "--tenants", file, *QUICK)
    tight = lrk("generate", "--tenants", file, *QUICK, f"generate.max_bytes={size}")
    assert (plain.code, tight.code) == (0, 0) and plain.out == tight.out
    ended = lrk("generate", "--tenants", file, *QUICK, f"generate.max_bytes={size - 1}")
    assert ended.code == 1 and "and max_bytes is" in records()[0]["error"]


def test_the_model_of_a_file_is_that_of_its_first_run(lrk):  # noqa: F811
    run = adapted("lora", 1, task="tiny_sentiment")
    file = asked("{", {"tenant": None, "prompt": "x"}, {"tenant": str(run / "adapter"), "prompt": "x"})
    assert f"adapter of   {run.resolve()}" in lrk("check", "generate", f"generate.tenants={file}").out
    none = lrk("check", "generate", f"generate.tenants={asked({'tenant': None, 'prompt': 'x'})}").out
    assert "method     none" in none and "adapter of" not in none


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], 'generate: give one prompt ("…"), or a file of them (--tenants FILE)'),
        (["a", "b"], "generate: one prompt at a time, not 2; quote it as one word"),
        (["--tenants", "nowhere"], "generate.tenants: 'nowhere' cannot be read"),
        (["--tenants", "/dev/null"], "generate.tenants: '/dev/null' cannot be read: it is not a file"),
        (["--tenants", "empty.jsonl"], "generate.tenants: 'empty.jsonl' has no lines"),
        (["a"], "run: no finished run under 'outputs'; start one with: lrk train"),
        (["method=none", "a", "generate.temperature=-1"], "generate.temperature: -1.0 is out of range"),
        (["method=none", "a", "generate.batch=1"], "generate.batch: unknown key; did you mean 'generate.batch_size'?"),
        (["method=none", "a", "model=minilm"], "model.kind: minilm is an encoder and generates nothing"),
        (["method=none", "a", "hardware.processes=2"], "hardware.processes: 2, but answers are written by one process"),
        (["method=none", "a", "generate.output=no/x.jsonl"], "generate.output: there is no folder"),
    ],
)
def test_mistakes_are_one_line(lrk, words, message):  # noqa: F811
    Path("empty.jsonl").write_text("\n \n")
    words = words or ["method=none"]
    assert one_line(lrk("generate", *words)).startswith(message)
