"""The lm-evaluation-harness over a session: equal to our own scores, and routed by the prompt alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lowrank_cli.config.composition import compose
from lowrank_cli.inference import continuations, harness
from lowrank_cli.inference.choice_scores import choice_scores
from lowrank_cli.report.end_of_run import end_of_run
from lowrank_cli.report.metric_names import quality
from lowrank_cli.runs import Run
from lowrank_cli.session.session import start
from lowrank_cli.terminal import Terminal

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: [negative, positive]
doc_to_target: label
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def session():
    """The bundled model with a MiLoRA adapter whose updates are not zero."""
    loaded = start(compose("train", ["method=milora", "task.limit=12", "hardware.threads=1"]).config, None)
    torch.manual_seed(0)
    for name, parameter in loaded.adapter.trained.items():
        if name.endswith("lora_B.weight"):
            parameter.data.normal_(std=0.05)
    return loaded


def test_log_likelihoods_are_our_choice_scores(session):
    """Exactly: both go through the same passes, whose batches are the same here."""
    examples = session.task.dev
    pairs = [
        continuations.pair(session, example.prompt, choice, 1000) for example in examples for choice in example.choices
    ]
    scores = [score for row in choice_scores(session, examples, [e.prompt for e in examples], 0) for score in row]
    assert [score for score, _ in continuations.log_likelihoods(session, pairs)] == pytest.approx(scores, abs=1e-5)


def test_a_continuation_is_not_read_by_the_router(session):
    """Equal to one pass over prompt and continuation with the prompt's mask, and different from one without it."""
    prompt, continuation = (5, 9, 12, 40, 7), (100, 200, 300)
    ((score, greedy),) = continuations.log_likelihoods(session, [(prompt, continuation)])
    mask = torch.tensor([[True] * 5 + [False] * 3])

    def whole(mask):
        with torch.no_grad():
            logits = session.model(input_ids=torch.tensor([prompt + continuation]), prompt_mask=mask).logits[0, 4:7]
        return logits, logits.log_softmax(-1)[torch.arange(3), torch.tensor(continuation)].sum().item()

    logits, expected = whole(mask)
    assert score == pytest.approx(expected, abs=1e-4)
    assert greedy == (logits.argmax(-1).tolist() == list(continuation))
    assert abs(score - whole(torch.ones_like(mask))[1]) > 1e-3


def test_the_greedy_continuation_is_known_as_such(session):
    prompts = ["Question: is it red?\nAnswer:", "the"]
    for prompt in prompts:
        (text,) = continuations.generate_until(session, [prompt], [], 4, 100)
        greedy = continuations.pair(session, prompt, text, 100)
        other = (greedy[0], (*greedy[1][:-1], greedy[1][-1] ^ 1))
        assert [one for _, one in continuations.log_likelihoods(session, [greedy, other])] == [True, False]


def test_generation_ends_in_front_of_a_stop_string(session):
    (whole,) = continuations.generate_until(session, ["Question:"], [], 6, 100)
    stop = whole[2:4]
    (text,) = continuations.generate_until(session, ["Question:"], ["never said", stop], 6, 100)
    assert text == whole.partition(stop)[0]


def test_a_pair_is_encoded_together(session):
    prompt, after = continuations.pair(session, "the cat ", "sat", 100)
    bare, spaced = continuations.pair(session, "the cat", " sat", 100)
    assert (prompt, after) == (bare, spaced)  # the space belongs to the continuation
    start_token = continuations.start_token(session)
    assert continuations.pair(session, "", "sat", 100)[0] == (start_token,)
    cut, kept = continuations.pair(session, "the cat and the dog", " sat", 3)
    assert kept == spaced[-len(kept) :] and len(cut) + len(kept) == 4  # the last token is predicted, not read


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
def test_windows_hold_each_token_once_and_fit(length):
    tokens = list(range(length))
    pairs = list(continuations.windows(tokens, -1, 4))
    assert [token for _, piece in pairs for token in piece] == tokens
    for before, piece in pairs:
        assert len(before) + len(piece) <= 5 and before  # the last token is predicted, not read
        assert (*before, *piece) == tuple(range(piece[-1] - len(before) - len(piece) + 1, piece[-1] + 1))


REPORT = {
    "results": {"colours": {"alias": "colours", "acc,none": 0.75, "acc_stderr,none": 0.2, "acc,strict": 0.5}},
    "n-samples": {"colours": {"original": 9, "effective": 4}},
}


def test_metrics_have_the_names_of_the_harness_and_the_table_their_errors():
    values = harness.metrics(REPORT)
    assert values == {
        "test/colours/acc": 0.75,
        "test/colours/acc_stderr": 0.2,
        "test/colours/acc,strict": 0.5,
        "test/examples": 4,
    }
    assert quality(values) == ["test/colours/acc", "test/colours/acc,strict"]
    composed = compose("evaluate", ["method=none", "eval=lm_eval", "eval.tasks=[colours]"])
    run = Run.create(
        "outputs", stage="evaluate", config=composed.resolved, choices=composed.choices, overrides=[], command="lrk"
    )
    run.begin()
    run.finish(values)
    console = Terminal(width=100)
    with console.capture() as shown:
        console.print(end_of_run(run))
    assert "test colours acc 0.7500 (± 0.2000)" in " ".join(shown.get().split())


REFUSED = {
    "eval.tasks=[]": "eval.tasks: the list is empty",
    "eval.tasks=[x] eval.limit=0": "eval.limit: 0 is out of range",
    "eval.tasks=[x] evaluate.shots=2": "eval=lm_eval has eval.num_fewshot",
    "eval.tasks=[x] hardware.processes=2": "eval=lm_eval runs in one",
    "eval.taks=[x]": "did you mean 'eval.tasks'?",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_the_harness_cannot_do_is_refused_in_one_line(lrk, overrides):
    ended = lrk("evaluate", "--dry-run", "method=none", "eval=lm_eval", *overrides.split())
    assert ended.code == 2 and REFUSED[overrides] in ended.err and ended.err.count("\n") == 1


def test_without_the_harness_its_extra_is_named(lrk, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    ended = lrk("evaluate", "method=none", "eval=lm_eval", "eval.tasks=[x]")
    assert ended.code == 2 and "pip install 'lowrank-cli[eval]'" in ended.err
    assert not list(Path("outputs").rglob("config.yaml"))


def test_a_local_task_is_measured_by_the_harness(lrk):
    pytest.importorskip("lm_eval", reason="needs lowrank-cli[eval]")
    Path("mine").mkdir()
    rows = [{"question": f"is {word} red?", "label": index % 2} for index, word in enumerate("abcdef")]
    Path("mine/colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("mine/colours.yaml").write_text(TASK.replace("FILE", str(Path("mine/colours.jsonl").absolute())))
    asked = ("eval=lm_eval", "eval.include_path=mine", "hardware.threads=1")
    ended = lrk("evaluate", "method=none", *asked, "eval.tasks=[colours]", "eval.limit=5")
    assert ended.code == 0 and "test colours acc" in ended.out
    run = Run.open("outputs/latest")
    assert run.metrics["test/examples"] == 5 and 0 <= run.metrics["test/colours/acc"] <= 1
    assert run.path.name.endswith("-none-llama-colours") and "colours" in lrk("compare", str(run.path)).out
    assert run.read_json("lm_eval.json")["results"]["colours"]["acc,none"] == run.metrics["test/colours/acc"]
    unknown = lrk("evaluate", "method=none", *asked, "eval.tasks=[colour]")
    assert unknown.code == 2 and unknown.err == "error: eval.tasks: unknown task 'colour'; did you mean 'colours'?\n"
    Path("mine/colours.jsonl").unlink()
    missing = lrk("evaluate", "method=none", *asked, "eval.tasks=[colours]")
    assert missing.code == 2 and missing.err.startswith("error: eval.tasks: the data of colours cannot be read")
