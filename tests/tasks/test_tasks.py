"""Tasks: prompts and answers of rows, splits, sources, and what a wrong file or config is told."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lowrank_cli import tasks
from lowrank_cli.config.composition import compose
from lowrank_cli.errors import UserError
from lowrank_cli.schema import TaskConfig
from lowrank_cli.tasks import sources, splits
from lowrank_cli.tasks.batches import Batches, batch_indices, share
from lowrank_cli.tasks.task import columns, content_free, flipped, template_hash

CONF = Path(__file__).resolve().parents[2] / "conf" / "task"


@cache
def values_of(name: str) -> dict:
    labels = ["task.label_words=[a,b]"] if name == "image_folder" else []  # it has those of the folder it is given
    return compose("train", [f"task={name}", *labels]).resolved["task"]


def config(name: str, **overrides) -> TaskConfig:
    values = copy.deepcopy(values_of(name))
    found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TaskConfig), values, overrides))
    found.validate()
    return found


def write(folder: Path, **rows: list[dict]) -> str:
    folder.mkdir(exist_ok=True)
    for split, items in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(folder)


def reviews(count: int, start: int = 0) -> list[dict]:
    return [{"sentence": f"film {start + number}", "label": number % 2} for number in range(count)]


# Rows of each paper's set: as in a folder, then as on the Hub; both read the same.
OPTIONS = ["ice", "steam", "rain"]
ROWS = {
    "sst2": [{"sentence": "fine", "label": 1}, {"idx": 3, "sentence": "fine", "label": 1}],
    "rte": [{"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0}],
    "trec": [{"text": "Who ?", "coarse_label": 3}, {"text": "Who ?", "coarse_label": 3, "fine_label": 9}],
    "boolq": [{"question": "is ice cold", "answer": True}],
    "arc_easy": [
        {"question": "Hot water?", "choices": OPTIONS, "answer": 1},
        {"question": "Hot water?", "choices": {"text": OPTIONS, "label": ["A", "B", "C"]}, "answerKey": "B"},
        {"question": "Hot water?", "choices": {"text": OPTIONS, "label": ["1", "2", "3"]}, "answerKey": "2"},
    ],
    "openbookqa": [
        {"question": "Hot water?", "choices": OPTIONS, "answer": 1},
        {"question_stem": "Hot water?", "choices": {"text": OPTIONS, "label": list("ABC")}, "answerKey": "B"},
    ],
    "sst5": [{"text": "fine", "label": 3, "label_text": "positive"}],
    "mr": [{"text": "fine", "label": 1}],
    "cr": [{"text": "fine", "label": 1, "label_text": "positive"}],
    "amazon": [{"id": "en_1", "text": "fine", "label": 3, "label_text": "3"}],
    "subj": [{"text": "fine", "label": 1, "label_text": "subjective"}],
    "agnews": [{"text": "A bank lends.", "label": 2}],
    "dbpedia": [{"label": 5, "title": "Boat", "content": "A boat."}],
    "cb": [{"premise": "It rains.", "hypothesis": "it is wet", "idx": 1, "label": 2}],
    "piqa": [{"goal": "Cool it.", "sol1": "Use ice.", "sol2": "Use steam.", "label": 0}],
    "winogrande": [{"sentence": "It is _ .", "option1": "ice", "option2": "steam", "answer": "2"}],
    "siqa": [
        {
            "context": "Jo ran.",
            "question": "Why?",
            "answerA": "late",
            "answerB": "fun",
            "answerC": "fear",
            "label": label,
        }
        for label in ("3", 3)
    ],
    "hellaswag": [{"activity_label": "Ice", "ctx": "It is", "endings": ["hot", "up", "me", "cold"], "label": "3"}],
    "arc_challenge": [
        {"question": "Hot water?", "choices": {"text": OPTIONS, "label": ["A", "B", "C"]}, "answerKey": "B"}
    ],
    "aqua": [{"question": "1 + 1?", "options": ["A)1", "B)2", "C)3"], "rationale": "Add.", "correct": "B"}],
    "copa": [{"premise": "It rained.", "choice1": "It is wet.", "choice2": "No.", "question": "effect", "label": 0}],
    "record": [{"passage": "Jo won.", "query": "@placeholder won", "entities": ["Jo"], "answers": ["Jo"]}],
    "squad": [
        {"title": "T", "context": "Jo won.", "question": "Who?", "answers": {"text": ["Jo", "Jo"], "answer_start": [0]}}
    ],
    "qnli": [{"question": "Who?", "sentence": "Jo won.", "label": 0}],
    "cola": [{"sentence": "Won Jo.", "label": 0}],
    "mnli": [{"premise": "It rains.", "hypothesis": "It is wet.", "label": 1}],
    "qqp": [{"question1": "Who?", "question2": "What?", "label": 0}],
    "mrpc": [{"sentence1": "Jo won.", "sentence2": "She won.", "label": 1}],
    "gsm8k": [{"question": "2 + 2?", "answer": "Add.\n#### 4"}],
    "e2e_nlg": [{"meaning_representation": "name : Zizzi", "human_reference": "It is Zizzi ."}],
}
READ = {
    "sst2": ("Review: fine\nSentiment:", " positive", 1),
    "rte": ('It rains.\nDoes it follow that "It is wet."?\nAnswer:', " yes", 0),
    "trec": ("Question: Who ?\nType:", " human", 3),
    "boolq": ("Question: is ice cold\nAnswer:", " yes", 1),
    "arc_easy": ("Question: Hot water?\nA. ice\nB. steam\nC. rain\nAnswer:", " B", 1),
    "openbookqa": ("Question: Hot water?\nA. ice\nB. steam\nC. rain\nAnswer:", " B", 1),
    "sst5": ("Review: fine\nSentiment:", " good", 3),
    "mr": ("Review: fine\nSentiment:", " positive", 1),
    "cr": ("Review: fine\nSentiment:", " positive", 1),
    "amazon": ("Review: fine\nSentiment:", " good", 3),
    "subj": ("Input: fine\nType:", " subjective", 1),
    "agnews": ("Input: A bank lends.\nType:", " business", 2),
    "dbpedia": ("Input: A boat.\nType:", " transportation", 5),
    "cb": ("Premise: It rains.\nHypothesis: it is wet\nPrediction:", " neither", 2),
    "piqa": ("Goal: Cool it.\nA. Use ice.\nB. Use steam.\nAnswer:", " A", 0),
    "winogrande": ("Sentence: It is _ .\nWhat fills the blank _?\nA. ice\nB. steam\nAnswer:", " B", 1),
    "siqa": ("Jo ran.\nQuestion: Why?\nA. late\nB. fun\nC. fear\nAnswer:", " C", 2),
    "hellaswag": ("Ice: It is\nA. hot\nB. up\nC. me\nD. cold\nAnswer:", " D", 3),
    "arc_challenge": ("Question: Hot water?\nA. ice\nB. steam\nC. rain\nAnswer:", " B", 1),
    "aqua": ("Question: 1 + 1?\nA. 1\nB. 2\nC. 3\nAnswer:", " B", 1),
    "copa": ("It rained.\nWhat was the effect?\nA. It is wet.\nB. No.\nAnswer:", " A", 0),
    "record": ("Jo won.\nQuestion: What is @placeholder in this sentence? @placeholder won\nAnswer:", " Jo", None),
    "squad": ("Jo won.\nQuestion: Who?\nAnswer:", " Jo", None),
    "qnli": ("Who?\nJo won.\nQuestion: Does this response answer the question?\nAnswer:", " yes", 0),
    "cola": ("Won Jo.\nQuestion: Does this sentence make sense?\nAnswer:", " no", 0),
    "mnli": ("It rains.\nQuestion: It is wet. True, False or Neither?\nAnswer:", " neither", 1),
    "qqp": ("Question 1: Who?\nQuestion 2: What?\nQuestion: Do both questions ask the same thing?\nAnswer:", " no", 0),
    "mrpc": (
        "Sentence 1: Jo won.\nSentence 2: She won.\nQuestion: Do both sentences mean the same thing?\nAnswer:",
        " yes",
        1,
    ),
    "gsm8k": ("Question: 2 + 2?\nAnswer:", " Add.\n#### 4", None),
    "e2e_nlg": ("name : Zizzi\nIn words:", " It is Zizzi .", None),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_read_as(name):
    for example in tasks.examples(config(name), ROWS[name], "rows"):
        assert (example.prompt, example.answer, example.label) == READ[name]
        assert example.references == (example.answer[1:],)
        if example.label is not None:
            assert example.choices[example.label] == example.answer


@pytest.mark.parametrize("name", ROWS)
def test_every_wording_of_a_task_reads_its_rows(name):
    wordings = config(name).wordings()
    read = [
        tasks.examples(config(name, template=text, label_words=words, templates=[]), ROWS[name], "rows")[0]
        for text, words in wordings
    ]
    assert len({(example.prompt, example.choices) for example in read}) == len(read)
    assert len({example.label for example in read}) == 1
    if name in ("sst2", "sst5", "mr", "cr", "amazon"):
        assert len(read) >= 6
    if config(name).answer == "labels":
        for text, _ in wordings:
            probe = content_free(config(name, template=text), {key: f"<{key}>" for key in columns(text)})
            assert all(f"<{key}>" in probe.prompt for key in columns(text)) and columns(text)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"template": "{sentence}"}, "is neither a template nor {template: TEXT"),
        ({"template": "{sentence}", "label_words": ["a"]}, "must be 2 different words"),
        ({"template": "{sentence}", "label_words": ["a", "A"]}, "must be 2 different words"),
        ({"template": "{sentence}", "label_words": [False, True]}, "must be words (quote numbers and yes, no"),
        ({"template": "same", "label_words": ["a", "b"]}, "'same' names no {column}"),
        (3, "3 is neither a template"),
    ],
)
def test_a_wording_that_cannot_be_read_is_refused(entry, message):
    with pytest.raises(UserError) as caught:
        config("sst2", templates=[entry])
    assert message in str(caught.value) and str(caught.value).startswith("task.templates")


def test_an_example_the_other_way_round():
    (example,) = tasks.examples(config("cb"), ROWS["cb"][:1], "rows")
    entailed, *_ = flipped(config("cb"), example)
    assert entailed.prompt == "Prediction: true" and entailed.label == 0
    assert entailed.answer == "\nPremise: It rains.\nHypothesis: it is wet" and entailed.choices == (entailed.answer,)
    bare = config("cb", template="{premise} {hypothesis}")
    assert flipped(bare, tasks.examples(bare, ROWS["cb"][:1], "rows")[0])[2].prompt == "neither"


def test_each_column_of_an_input_without_content_has_its_own_text():
    pair = config("cb")
    (example,) = tasks.examples(pair, ROWS["cb"][:1], "rows")
    assert example.columns == (ROWS["cb"][0]["premise"], ROWS["cb"][0]["hypothesis"])
    probe = content_free(pair, dict(zip(columns(pair.template), example.columns)))
    assert probe.prompt == example.prompt and probe.choices == example.choices


def test_every_task_file_fits_the_schema_and_describes_itself():
    for file in CONF.glob("[!_]*.yaml"):
        assert file.read_text().startswith("# ")
        assert config(file.stem).name == file.stem


@pytest.mark.parametrize(
    ("values", "value", "label"),
    [
        ([], 0, 0),
        ([], True, 1),
        ([], "Negative ", 0),
        (["bad", "good"], "good", 1),
        (["bad", "good"], "positive", 1),
        (["-1", "1"], 1, 1),
        (["-1", "1"], -1, 0),
    ],
)
def test_label_values(values, value, label):
    rows = [{"sentence": "x", "label": value}]
    assert tasks.examples(config("sst2", label_values=values), rows, "rows")[0].label == label


@pytest.mark.parametrize("value", [2, -1, 1.0, "1", "fine", None, [0]])
def test_label_outside_names_place_value_and_allowed(value):
    with pytest.raises(UserError) as error:
        tasks.examples(config("sst2"), [{"sentence": "x", "label": 0}, {"sentence": "x", "label": value}], "a.jsonl")
    assert str(error.value) == (
        f"a.jsonl:2: label {value!r} in column 'label' is outside the task's labels "
        "(allowed: 0 to 1, false, true, negative, positive)"
    )


@pytest.mark.parametrize("value", [3, -1, True, "D", "ice", None])
def test_answer_outside_the_options(value):
    row = {"question": "?", "choices": OPTIONS, "answer": value}
    with pytest.raises(UserError, match=r"^f:1: answer .* none of the row's options \(allowed: 0 to 2, A, B, C\)$"):
        tasks.examples(config("arc_easy"), [row], "f")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"text": ["ice", "tea"], "label": 3}, "must have a label for each text, not 3"),
        ({"text": ["ice", "tea"], "label": ["A"]}, "must have a label for each text, not ['A']"),
        ({"text": ["ice", "tea"], "label": ["A", ["B"]]}, "must hold text, not ['B']"),
        (["ice", {"text": "tea"}], "must hold text, not {'text': 'tea'}"),
        (["ice", float("nan")], "must hold text, not NaN"),
    ],
)
def test_choices_of_another_shape(choices, message):
    row = {"question": "?", "choices": choices, "answer": 0}
    with pytest.raises(UserError) as refused:
        tasks.examples(config("arc_easy"), [row], "f")
    assert str(refused.value) == f"f:1: column 'choices' {message}"


@pytest.mark.parametrize("value", [True, float("nan"), float("-inf"), None, ["x"]])
def test_text_must_be_text(value):
    with pytest.raises(UserError, match=r"^f:1: column 'sentence' must hold text, not "):
        tasks.examples(config("sst2"), [{"sentence": value, "label": 0}], "f")


@pytest.mark.parametrize("choices", [[], ["one"], "ice", {"label": ["A"]}, ["x"] * 27])
def test_choices_must_be_a_list(choices):
    row = {"question": "?", "choices": choices, "answer": 0}
    with pytest.raises(UserError, match=r"^f:1: column 'choices' must list 2 to 26 options"):
        tasks.examples(config("arc_easy"), [row], "f")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"sentnce": "x", "label": 0},
            r"f:1: no column 'sentence'; did you mean 'sentnce'\? \(columns: sentnce, label\)",
        ),
        ({"sentence": "x"}, r"f:1: no column 'label' \(columns: sentence\)"),
        ({"sentence": None, "label": 0}, "f:1: column 'sentence' must hold text, not None"),
        ({"sentence": ["x"], "label": 0}, "f:1: column 'sentence' must hold text"),
    ],
)
def test_columns_must_be_there(row, message):
    with pytest.raises(UserError, match=f"^{message}"):
        tasks.examples(config("sst2"), [row], "f")


@pytest.mark.parametrize(
    ("answer", "message"), [("", "holds no answer"), ("so 4", "task.extract=.* matches nothing in 'so 4'")]
)
def test_free_answers_must_hold_one(answer, message):
    with pytest.raises(UserError, match=f"^f:1: .*{message}"):
        tasks.examples(config("gsm8k"), [{"question": "?", "answer": answer}], "f")


def test_labels_are_generated_by_their_words():
    (example,) = tasks.examples(config("sst2", answer="free"), [{"sentence": "x", "label": 1}], "f")
    assert example.answer == " positive" and example.references == ("positive",) and not example.choices


def test_answer_has_no_space_after_white_space():
    example = tasks.examples(config("sst2", template="{sentence}\n"), reviews(1), "f")[0]
    assert example.prompt + example.answer == "film 0\nnegative"


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("sst2", {"template": "{sentence"}, "task.template: .* in '{sentence'"),
        ("sst2", {"template": "{}"}, "task.template: an empty {}"),
        ("sst2", {"template": "{sentence} {options}"}, "task.template: .*task.answer=labels has none"),
        ("arc_easy", {"template": "{question}"}, "task.template: .*it is missing"),
        ("sst2", {"text": ["sentence"] * 3}, "task.text: an encoder reads one or two columns"),
        ("gsm8k", {"extract": "("}, "task.extract: .*not a regular expression"),
        ("gsm8k", {"extract": r"((\d+,?)+)$"}, "task.extract: .* has nested repeats"),
        ("gsm8k", {"extract": r"(?:x|a(?:b*c)?){2,}"}, "task.extract: .* has nested repeats"),
        ("gsm8k", {"extract": "(" * 5000 + ")" * 5000}, "task.extract: .*not a regular expression"),
        ("sst2", {"hub": None}, "task: no data; set task.path"),
    ],
)
def test_config_that_cannot_work(name, overrides, message):
    with pytest.raises(UserError, match=f"^{message}"):
        tasks.load(config(name, **overrides))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "train.jsonl: the file is empty"),
        ("\n\n", "train.jsonl: the file is empty"),
        ('{"sentence": "a", "label": 0}\n{"sentence": "a"', "train.jsonl:2 cannot be read as JSON"),
        ('{"sentence": "a", "label": 0}\n\n{"sentence": "a", "label": 0}', "train.jsonl:2 cannot be read as JSON"),
        ("[1]", r"train.jsonl:1: it is a list \(1\); expected keys with values"),
        ('{"sentence": "\\ud800", "label": 0}', r"train.jsonl:1: sentence is '\\ud800'; expected text of whole char"),
        ("[" * 50_000, "train.jsonl:1 cannot be read as JSON: it is nested too deep"),
        ('{"sentence": ' + "[" * 500 + "]" * 500 + "}", "train.jsonl:1: .* is nested more than 32 levels deep"),
    ],
)
def test_malformed_file_names_file_and_line(tmp_path, text, message):
    path = write(tmp_path / "data", validation=reviews(2))
    (tmp_path / "data" / "train.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        tasks.load(config("sst2", path=path))


def test_file_that_is_not_utf8(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"train\.jsonl' cannot be read: 'utf-8'"):
        sources.read_jsonl(tmp_path / "train.jsonl")


def test_byte_order_mark_and_separators_inside_text(tmp_path):
    (tmp_path / "train.jsonl").write_text('\ufeff{"a": "x\u2028y"}\r\n{"a": "z"}\r\n', encoding="utf-8")
    assert sources.read_jsonl(tmp_path / "train.jsonl") == [{"a": "x\u2028y"}, {"a": "z"}]


def test_folder_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("{}")
    for path, message in [
        ("absent", "task.path: absent: no such file or folder"),
        ("empty", r"task.path: empty holds no data \(.jsonl, .json, .csv, .tsv, .parquet\); a split is a file such as"),
        ("notes.md", r"task.path: notes.md is no data file \(allowed: .jsonl, .json, .csv, .tsv, .parquet, also compr"),
    ]:
        with pytest.raises(UserError, match=f"^{message}"):
            tasks.load(config("sst2", path=path))


def test_absent_split_lists_those_found(tmp_path):
    path = write(tmp_path / "data", validation=reviews(4), test=reviews(4))
    with pytest.raises(UserError) as error:
        tasks.load(config("sst2", path=path))
    assert str(error.value) == (
        f"task.train_split: {path} has no split 'train' (found: test, validation); "
        "set task.train_split=NAME to one of them"
    )
    task = tasks.load(config("sst2", path=path, train_split="validation"))
    assert (len(task.train), len(task.dev), len(task.test)) == (4, 2, 2)
    with pytest.raises(UserError, match=r"^task: .* nothing to evaluate on .* \(found: validation\)"):
        tasks.load(config("sst2", path=write(tmp_path / "one", validation=reviews(4)), train_split="validation"))
    with pytest.raises(UserError, match=r"^task.dev_split: .* no split 'dev'"):
        tasks.load(config("sst2", path=path, splits="given", train_split="test", dev_split="dev"))
    path = write(tmp_path / "two", train=reviews(4), validation=reviews(4))
    with pytest.raises(
        UserError, match=r"set task\.test_split=NAME .*, or task\.splits=paper to make dev and test out of"
    ):
        tasks.load(config("sst2", path=path, splits="given"))
    task = tasks.load(config("sst2", path=path, splits="paper"))
    assert (len(task.dev), len(task.test)) == (2, 2)


def test_small_training_set_halves_the_validation_set(tmp_path):
    path = write(tmp_path / "data", train=reviews(9), validation=reviews(5, 100), test=reviews(3, 200))
    task = tasks.load(config("sst2", path=path))
    prompts = [{example.text[0] for example in part} for part in (task.train, task.dev, task.test)]
    assert [len(part) for part in prompts] == [9, 3, 2]
    assert prompts[1] | prompts[2] == {f"film {100 + number}" for number in range(5)}
    again = tasks.load(config("sst2", path=path))
    assert (task.dev, task.test) == (again.dev, again.test)


def test_large_training_set_gives_a_thousand_to_dev(tmp_path):
    path = write(tmp_path / "data", train=reviews(splits.SMALL), test=reviews(5, 50_000))
    task = tasks.load(config("sst2", path=path))
    assert (len(task.train), len(task.dev), len(task.test)) == (9_000, 1_000, 5)
    assert {e.text for e in task.train}.isdisjoint(e.text for e in task.dev)
    assert {e.label for e in tasks.load(config("sst2", path=path, limit=20)).train} == {0, 1}


def test_the_whole_evaluation_set_may_be_the_test(tmp_path):
    path = write(tmp_path / "data", train=reviews(50), validation=reviews(7, 50_000))
    task = tasks.load(config("sst2", path=path, splits="whole"))
    assert (len(task.train), len(task.dev), len(task.test)) == (40, 10, 7)
    assert not {example.prompt for example in task.train} & {example.prompt for example in task.dev}
    assert config("cb").splits == "whole"


def test_given_splits(tmp_path):
    path = write(tmp_path / "data", train=reviews(3), validation=reviews(4, 10), test=reviews(5, 20))
    task = tasks.load(config("sst2", path=path, splits="given"))
    assert (len(task.train), len(task.dev), len(task.test)) == (3, 4, 5)


def test_one_split_alone_needs_no_other(tmp_path):
    path = write(tmp_path / "given", test=reviews(5))
    for splits_ in ("given", "paper"):
        task = tasks.load(config("sst2", path=path, splits=splits_), "test")
        assert (len(task.train), len(task.dev), len(task.test)) == (0, 0, 5)
        assert ("has no split 'train', so the test set is all of 'test'" in task.note) == (splits_ == "paper")
    with pytest.raises(UserError, match=r"^task.dev_split: .* no split 'validation' \(found: test\)"):
        tasks.load(config("sst2", path=path, splits="given"), "dev")
    path = write(tmp_path / "paper", train=reviews(9), validation=reviews(5, 100))  # the training set decides
    assert tasks.load(config("sst2", path=path), "test").test == tasks.load(config("sst2", path=path)).test


def test_splits_held_out_of_the_training_split(tmp_path):
    rows = [{"prompt": f"question {n // 2}", "messages": [{"content": "?"}, {"content": f"{n}"}]} for n in range(40)]
    task = tasks.load(config("ultrachat", path=write(tmp_path / "data", train_sft=rows)))
    assert (len(task.train), len(task.dev), len(task.test)) == (32, 2, 2)  # two answers to each question
    prompts = [{example.prompt for example in part} for part in (task.train, task.dev, task.test)]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 20
    assert all(len(example.references) == 2 for example in task.dev + task.test)


def test_a_column_is_read_inside():
    rows = [{"prompt": "Why?", "messages": [{"content": "Why?"}, {"content": "Because."}]}]
    (example,) = tasks.examples(config("ultrachat"), rows, "a.jsonl")
    assert (example.prompt, example.answer) == ("Instruction: Why?\nResponse:", " Because.")
    for broken in ([], [{"content": "Why?"}], {"1": {}}, "none"):
        with pytest.raises(UserError, match=r"^a\.jsonl:1: no column 'messages\.1\.content'"):
            tasks.examples(config("ultrachat"), [{"prompt": "Why?", "messages": broken}], "a.jsonl")


def test_empty_answers_are_left_out_where_the_task_is_lenient():
    rows = [{"instruction": "Say it.", "input": "", "output": answer} for answer in ("Done.", " ", "Yes.")]
    assert [example.answer for example in tasks.examples(config("alpaca"), rows, "a.jsonl")] == [" Done.", " Yes."]
    with pytest.raises(UserError, match=r"^a\.jsonl:2: column 'output' holds no answer"):
        tasks.examples(config("alpaca", lenient=False), rows, "a.jsonl")
    with pytest.raises(UserError, match=r"^task\.lenient: true is for task\.answer=free or chat, not labels"):
        config("sst2", lenient=True)


def test_a_split_must_not_be_empty(tmp_path):
    path = write(tmp_path / "data", train=reviews(9), validation=reviews(1, 100))
    with pytest.raises(UserError) as error:
        tasks.load(config("sst2", path=path))
    assert str(error.value) == f"task: {path} leaves no example for test (train 9, dev 1, test 0)"


def test_training_must_not_be_empty(tmp_path):
    rows = [{"meaning_representation": "one", "human_reference": f"{n}"} for n in range(splits.SMALL)]  # one prompt
    path = write(tmp_path / "data", train=rows, validation=rows[:1])
    with pytest.raises(UserError, match=r"leaves no example for train \(train 0, dev 1, test 1\)$"):
        tasks.load(config("e2e_nlg", path=path))


def test_limits_are_nested():
    few, more = splits.limited(100, 5), splits.limited(100, 9)
    assert len(few) == 5 and set(few) < set(more) and more == sorted(more)
    assert splits.limited(3, 5) == splits.limited(3, None) == [0, 1, 2]


def test_held_out_prompts_stay_together():
    kept, held = splits.hold_out([number // 3 for number in range(30)], count=7)
    assert len(held) == 9 and sorted(kept + held) == list(range(30))
    assert {number // 3 for number in kept}.isdisjoint(number // 3 for number in held)


def test_free_answers_to_one_prompt_are_one_example_when_held_out(tmp_path):
    rows = [
        {"meaning_representation": f"name : {name}", "human_reference": f"{name} {number}"}
        for name in ("Zizzi", "Alimentum")
        for number in range(3)
    ]
    task = tasks.load(config("e2e_nlg", path=write(tmp_path / "data", train=rows, validation=rows)))
    assert len(task.train) == 6 and len(task.dev) == len(task.test) == 1
    assert {part[0].references for part in (task.dev, task.test)} == {
        ("Zizzi 0", "Zizzi 1", "Zizzi 2"),
        ("Alimentum 0", "Alimentum 1", "Alimentum 2"),
    }


def test_template_hash_follows_what_shapes_prompts_and_answers():
    base = template_hash(config("sst2"))
    assert base == template_hash(config("sst2", limit=3, path="elsewhere", max_length=9))
    changes = [{"template": "{sentence}"}, {"label_words": ["bad", "good"]}, {"text": ["sentence", "label"]}]
    changes.append({"label_values": ["1", "0"]})  # reverses what the words mean
    assert len({base, *(template_hash(config("sst2", **change)) for change in changes)}) == 5


def test_hub_out_of_reach_is_one_line_within_seconds():
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^task.hub: 'stanfordnlp/sst2' is not in the local cache .* task.path="):
        tasks.load(config("sst2"))
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("parquet", [True, False], ids=["cached", "not cached"])
def test_a_data_set_with_a_loading_script_is_looked_up_in_the_cache_as_parquet(monkeypatch, parquet):
    import datasets

    def load(repository, subset, revision=None):
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found sst2.py")
        if not parquet:
            raise ConnectionError("offline")
        return {"train": datasets.Dataset.from_list([{"branch": revision}])}

    monkeypatch.setattr(datasets, "load_dataset", load)
    if parquet:
        assert sources.from_hub("a/b", None).read("train").rows == [{"branch": "refs/convert/parquet"}]
    else:
        with pytest.raises(UserError, match="'a/b' is not in the local cache"):
            sources.from_hub("a/b", None)


def test_cached_data_set_needs_no_network(tmp_path, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list(reviews(4))
    made = datasets.DatasetDict({"train": rows, "validation": rows})
    folder = tmp_path / "stanfordnlp___sst2" / "default" / "0.0.0" / "0123456789abcdef"
    folder.mkdir(parents=True)
    for split, data in made.items():
        data.to_parquet(tmp_path / f"{split}.parquet")
    files = {split: str(tmp_path / f"{split}.parquet") for split in made}
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "build"))
    built = next((tmp_path / "build").rglob("dataset_info.json")).parent
    for file in built.iterdir():
        (folder / file.name.replace("parquet-", "sst2-")).write_bytes(file.read_bytes())
    info = json.loads((folder / "dataset_info.json").read_text())
    info.update(builder_name="sst2", dataset_name="sst2", config_name="default")
    (folder / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    task = tasks.load(config("sst2"))
    assert (len(task.train), len(task.dev), len(task.test)) == (4, 2, 2)
    assert not datasets.config.HF_HUB_OFFLINE


def test_importing_tasks_is_light():
    code = "import sys, lowrank_cli.tasks; print({'torch', 'datasets', 'evaluate', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CONF.parents[1])
    assert out.stdout.strip() == "set()"


# Batches.

LENGTHS = [1 + number * 7 % 50 for number in range(1003)]


def test_every_index_once_an_epoch_and_alike_lengths_together():
    batches = batch_indices(LENGTHS, 16, seed=1, epoch=0)
    assert sorted(index for batch in batches for index in batch) == list(range(1003))
    assert [len(batch) for batch in batches] == [16] * 62 + [11]
    spread = [max(LENGTHS[i] for i in batch) - min(LENGTHS[i] for i in batch) for batch in batches[:-1]]
    assert sum(spread) / len(spread) < 3


def test_order_is_a_function_of_seed_and_epoch():
    first = batch_indices(LENGTHS, 16, 1, 0)
    assert first == batch_indices(LENGTHS, 16, 1, 0)
    assert first != batch_indices(LENGTHS, 16, 1, 1) and first != batch_indices(LENGTHS, 16, 2, 0)


def test_a_window_of_one_batch_draws_at_random():
    batches = batch_indices(LENGTHS, 16, seed=1, epoch=0, window=1)
    assert sorted(index for batch in batches for index in batch) == list(range(1003))
    assert batches == batch_indices(LENGTHS, 16, 1, 0, 1)
    spread = [max(LENGTHS[i] for i in batch) - min(LENGTHS[i] for i in batch) for batch in batches[:-1]]
    assert sum(spread) / len(spread) > 35
    assert Batches(LENGTHS, 16, 1, window=1)[70] == batch_indices(LENGTHS, 16, 1, 1, 1)[7]


def test_steps_walk_through_the_epochs():
    batches = Batches(LENGTHS, 16, seed=1)
    assert len(batches) == 63
    assert batches[65] == batch_indices(LENGTHS, 16, 1, 1)[2]
    assert batches[0] == batch_indices(LENGTHS, 16, 1, 0)[0]
    assert len(Batches([3, 4], 16, 0)) == 1 and sorted(Batches([3, 4], 16, 0)[5]) == [0, 1]


@pytest.mark.parametrize("size", [1, 3, 8, 11])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_shares_divide_a_batch(size, world, accumulation):
    batch = list(range(10, 10 + size))
    shares = [part for rank in range(world) for part in share(batch, rank, world, accumulation)]
    assert len(shares) == world * accumulation
    assert sorted(index for part in shares if part.counts for index in part.indices) == batch
    assert all(part.indices for part in shares)
