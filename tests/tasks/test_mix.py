"""Tasks trained together: a mix of other tasks, each answered and measured in its own way."""

import json
import shutil
from pathlib import Path
from statistics import fmean

import pytest
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from lowrank_cli import tasks
from lowrank_cli.config.composition import compose
from lowrank_cli.errors import UserError
from lowrank_cli.inference.choice_scores import with_demonstrations
from lowrank_cli.launch import single_run
from lowrank_cli.models.load import BUNDLED
from lowrank_cli.runs import Run

QUICK = ["hardware.threads=1", "train.max_steps=2", "train.batch_size=8", "train.checkpoint_every=0"]


def mix(*parts: str) -> list[str]:
    """A user's own mix, as overrides that choose it."""
    lines = ["defaults:", "  - _mix", *(f"  - {part}@parts.{part}" for part in parts)]
    lines += ["  - _self_", "name: mine", "max_length: 96", "max_new_tokens: 4"]
    Path("groups/task").mkdir(parents=True, exist_ok=True)
    Path("groups/task/mine.yaml").write_text("\n".join(lines) + "\n")
    return ["task=mine"]


def load(overrides: list[str]) -> tasks.Task:
    return tasks.load(compose("train", overrides, "groups").config.task)


def test_every_split_holds_the_parts_examples():
    mixed = load(mix("tiny_yesno", "tiny_topic"))
    alone = {name: load([f"task={name}"]) for name in ("tiny_yesno", "tiny_topic")}
    for split in ("train", "dev", "test"):
        found = [(example.task, example.prompt) for example in getattr(mixed, split)]
        assert found == [(name, e.prompt) for name, task in alone.items() for e in getattr(task, split)]
    assert mixed.label_words == alone["tiny_yesno"].label_words + alone["tiny_topic"].label_words
    assert {example.first for example in mixed.test} == {0, 2}


def test_limits_of_a_part_and_of_the_whole():
    task = load([*mix("tiny_yesno", "tiny_topic"), "task.parts.tiny_topic.limit=8"])
    assert sum(example.task == "tiny_topic" for example in task.train) == 8
    task = load([*mix("tiny_yesno", "tiny_topic"), "task.limit=40"])
    assert len(task.train) == 40 and {example.task for example in task.train} == {"tiny_yesno", "tiny_topic"}


def test_demonstrations_are_of_the_query_s_own_task():
    task = load(mix("tiny_yesno", "tiny_topic"))
    shown = [next(example for example in task.train if example.task == part) for part in ("tiny_yesno", "tiny_topic")]
    for query in (task.test[0], task.test[-1]):
        (own,) = [example for example in shown if example.task == query.task]
        assert with_demonstrations([query], shown) == [f"{own.prompt}{own.answer}\n\n{query.prompt}"]


@pytest.mark.slow
def test_a_part_is_measured_with_the_demonstrations_that_it_has_alone():
    asked = ["method=none", "evaluate.shots=2", "task.parts.tiny_yesno.limit=8", "task.parts.tiny_topic.limit=8"]
    single_run.start("evaluate", [*mix("tiny_yesno", "tiny_topic"), *asked], "groups", "lrk evaluate")
    mixed = Run.open("outputs/latest").metrics
    single_run.start("evaluate", ["task=tiny_topic", "task.limit=8", *asked[:2]], None, "lrk evaluate")
    assert Run.open("outputs/latest").metrics["test/accuracy"] == mixed["test/tiny_topic/accuracy"]


def test_a_template_of_any_part_changes_the_mix():
    plain, other = load(mix("tiny_yesno")), load([*mix("tiny_yesno"), "task.parts.tiny_yesno.template='{question}'"])
    assert plain.template_hash != other.template_hash


@pytest.mark.slow
def test_scored_and_generated_parts_are_measured_one_by_one(pictures):
    overrides = [*mix("tiny_topic", "tiny_arithmetic"), "method=milora", "task.limit=24", *QUICK]
    single_run.start("train", overrides, "groups", "lrk train")
    run = Run.open("outputs/latest")
    parts = [run.metrics[f"test/{name}"] for name in ("tiny_topic/accuracy", "tiny_arithmetic/number_match")]
    assert run.metrics["test/mean"] == pytest.approx(sum(parts) / 2)
    records = [json.loads(line) for line in (run.path / "predictions.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(24))
    for record in records:
        assert ("scores" in record) == (record["task"] == "tiny_topic")
    for name, part in zip(("tiny_topic", "tiny_arithmetic"), parts):
        assert part == pytest.approx(fmean(record["correct"] for record in records if record["task"] == name))
    figure = next(figure for figure in run.read_json("figures.json") if figure["file"] == "activated_modules.png")
    assert [panel["title"] for panel in figure["panels"]] == ["tiny_topic", "tiny_arithmetic"]
    for panel in figure["panels"]:
        assert [sum(row) for row in panel["values"]] == pytest.approx([3] * len(panel["values"])), "k of each prompt"
    assert (run.path / "plots" / "activated_modules.png").is_file()
    alone = [f"run={run.path.resolve()}", "task=tiny_topic", "task.limit=8"]
    single_run.start("evaluate", alone, None, "lrk evaluate")
    assert "test/accuracy" in Run.open("outputs/latest").metrics
    with pytest.raises(UserError, match=r"task\.template: 'tiny_topic' was trained with another template"):
        single_run.start("evaluate", [*alone, "task.template='{sentence} Topic:'"], None, "lrk evaluate")


@pytest.mark.slow
def test_an_encoder_answers_each_part_with_its_own_labels(tmp_path):
    folder = tmp_path / "encoder"
    folder.mkdir()
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copy(file, folder)
    size = len(AutoTokenizer.from_pretrained(folder))
    config = BertConfig(
        vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    model = ["model=minilm", f"model.path={folder}", "method=lora"]
    overrides = [*mix("tiny_yesno", "tiny_topic"), *model, "task.limit=32", *QUICK]
    single_run.start("train", overrides, "groups", "lrk train")
    for line in (Path("outputs/latest") / "predictions.jsonl").read_text().splitlines():
        record = json.loads(line)
        words = {"tiny_yesno": ("negative", "positive"), "tiny_topic": ("food", "work", "climate", "leisure")}
        assert record["prediction"] in words[record["task"]]
    with pytest.raises(UserError, match=r"task=tiny_choice has task\.answer=choices"):
        single_run.start("train", [*mix("tiny_yesno", "tiny_choice"), *model, *QUICK], "groups", "lrk train")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=tiny_yesno", "task.answer=mix", "task.metric=mean"], "task.parts: task.answer=mix names its tasks"),
        (
            ["task=tiny_mix", "task.parts.tiny_choice.metric=bleau"],
            "task.parts.tiny_choice.metric: .* did you mean 'bleu'",
        ),
        (["task=tiny_mix", "task.parts.tiny_choice.limit=0"], "^task.parts.tiny_choice.limit: 0 is out of range"),
        (["task=tiny_mix", "task.template='{question}'"], "task.template: a mix has none of its own"),
        (["task=tiny_mix", "task.path=data"], "task.path: a mix has none of its own"),
        (["task=tiny_mix", "task.parts.tiny_choise.limit=3"], "tiny_choise"),
        (
            ["task=tiny_mix", "task.parts.tiny_choice.path=nowhere"],
            "task.parts.tiny_choice.path: there is no file or folder",
        ),
    ],
)
def test_mistakes_are_one_line(overrides, message):
    with pytest.raises(UserError, match=message):
        single_run.start("train", overrides, None, "lrk train")
    assert not Path("outputs").exists()


def test_mistakes_in_the_data_name_the_part():
    with pytest.raises(UserError, match=r"^task\.parts\.tiny_topic\.template: an empty"):
        load([*mix("tiny_yesno", "tiny_topic"), "task.parts.tiny_topic.template='{}'"])


def test_a_limit_that_leaves_a_part_out_is_refused():
    with pytest.raises(UserError, match=r"task\.limit: 1 leaves no train example of tiny_"):
        load([*mix("tiny_yesno", "tiny_topic"), "task.limit=1"])


def test_a_part_keeps_its_own_length_within_that_of_the_mix(monkeypatch):
    from lowrank_cli.session.session import start

    asked = [*mix("tiny_yesno", "tiny_topic"), "method=none", "task.limit=8"]
    shorter = [*asked, "task.parts.tiny_topic.max_length=12", "task.parts.tiny_topic.max_new_tokens=2"]
    session = start(compose("evaluate", shorter, "groups").config)
    rooms = {
        part: (session.max_length(task=part), session.max_length(2, part)) for part in ("tiny_yesno", "tiny_topic")
    }
    assert rooms == {"tiny_yesno": (96, 288), "tiny_topic": (12, 36)}
    assert (session.max_new_tokens("tiny_yesno"), session.max_new_tokens("tiny_topic")) == (4, 2)
    longest = dict.fromkeys(rooms, 0)
    for example, encoded in zip(session.task.test, session.encode(session.task.test), strict=True):
        longest[example.task] = max(longest[example.task], len(encoded.input_ids))
        assert session.tokenizer.decode(encoded.input_ids[encoded.prompt_length : -1]) == example.answer
    assert longest["tiny_topic"] <= 12 < longest["tiny_yesno"] <= 96
    session.config.task.parts["tiny_topic"].max_length = 500
    assert session.max_length(task="tiny_topic") == 96


def test_a_mix_of_mixes_is_refused():
    with pytest.raises(UserError, match="is a mix itself"):
        compose("train", mix("tiny_mix"), "groups")
