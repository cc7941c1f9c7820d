"""lrk new: files that say what is missing, and are accepted once it is filled in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command import lrk, one_line  # noqa: F401 (a fixture)

from lowrank_cli.models.load import BUNDLED

#: Kind -> what is said of the file as it is written, and what a user fills in.
FILLED = {
    "task": (
        "task.answer, task.target, task.template: missing",
        {
            "path: FILE": "path: rows.jsonl",
            "answer: ???": "answer: labels",
            "template: ???": 'template: "Review: {review}"',
            "target: ???": "target: stars",
            "# label_words: [negative, positive]": "label_words: [bad, good]",
        },
    ),
    "model": ("model: nothing to load; set model.id", {"id: null": f"path: {BUNDLED}"}),
    "method": ("", {"rank: 16": "rank: 4"}),
    "study": ("study.tasks: null is not allowed", {"# mine: [task=TASK]": "yesno: [task=tiny_yesno]"}),
}


@pytest.mark.parametrize("kind", FILLED)
def test_a_new_file_says_what_is_missing_and_is_accepted_once_filled_in(lrk, kind):  # noqa: F811
    Path("rows.jsonl").write_text("".join(json.dumps({"review": f"fine {n}", "stars": 1}) + "\n" for n in range(20)))
    said, filled = FILLED[kind]
    ended = lrk("new", kind, "own")
    assert (ended.code, ended.err) == (0, "")
    file = Path("conf", kind, "own.yaml")
    assert ended.out == f"wrote {file}; fill it in, then: lrk check {kind}=own --config-dir conf\n"
    check = ["check", f"{kind}=own", "--config-dir", "conf", *(["--no-probe"] if kind == "study" else [])]
    if said:
        assert said in one_line(lrk(*check))
    text = file.read_text()
    for before, after in filled.items():
        assert before in text
        text = text.replace(before, after)
    file.write_text(text)
    assert not re.search(r"\bNAME\b(?!\.)|\?\?\?", re.sub(r"#.*", "", text))
    ended = lrk(*check)
    assert (ended.code, ended.err) == (0, ""), ended
    assert "own" in lrk("list", {"study": "studies"}.get(kind, f"{kind}s"), "--config-dir", "conf").out


def test_nothing_is_overwritten(lrk):  # noqa: F811
    assert lrk("new", "model", "own", "--config-dir", "mine").code == 0
    for words, message in [
        (
            ("model", "own", "--config-dir", "mine"),
            "new: there is a model 'own' already: mine/model/own.yaml; take another",
        ),
        (("task", "sst2"), "new: there is a task 'sst2' already: "),
        (("model", "../own"), "new: '../own' cannot name a model; take letters"),
        (("tsk", "own"), "new: unknown value 'tsk'; did you mean 'task'? (allowed: task, model, method, study)"),
    ]:
        assert one_line(lrk("new", *words)).startswith(message)


@pytest.mark.parametrize(
    ("answer", "metric", "labels", "row"),
    [
        ("number", "pearson", "", {"words": "fine", "y": 2.5}),
        ("multi_label", "micro_f1", "label_words: [bad, good]", {"words": "fine", "y": ["good"]}),
        ("tags", "entity_f1", "label_words: [O, B-X]", {"words": ["so", "fine"], "y": ["O", "B-X"]}),
    ],
)
def test_a_new_task_takes_what_encoders_answer(answer, metric, labels, row, lrk):  # noqa: F811
    assert lrk("new", "task", "own").code == 0
    file = Path("conf/task/own.yaml")
    text = file.read_text()
    for before, after in {
        "path: FILE": "path: rows.jsonl",
        "answer: ???": f"answer: {answer}",
        "template: ???": 'template: "{words}"',
        "target: ???": "target: y",
        "# label_words: [negative, positive]": labels,
        "# metric: accuracy": f"metric: {metric}",
    }.items():
        assert before in text
        text = text.replace(before, after)
    file.write_text(text)
    lines = [json.dumps(row).replace("fine", f"fine{n}") for n in range(20)]  # equal texts go into one split
    Path("rows.jsonl").write_text("\n".join(lines))
    ended = lrk("check", "task=own", "--config-dir", "conf", "model=minilm", "method=lora")
    assert (ended.code, ended.err) == (0, ""), ended
