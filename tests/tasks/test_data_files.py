"""Data files of every kind: the same rows, one split where there is none, and what a malformed file is told."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
from command import lrk, one_line  # noqa: F401 (a fixture)

from lowrank_cli import tasks
from lowrank_cli.config.composition import compose
from lowrank_cli.errors import UserError
from lowrank_cli.reader import MAX_BYTES
from lowrank_cli.tasks import files, sources

ROWS = [{"sentence": f'film {n}, "fine"\nNA', "label": n % 2} for n in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def table(delimiter: str) -> str:
    cells = ('"' + row["sentence"].replace('"', '""') + f'"{delimiter}{row["label"]}\n' for row in ROWS)
    return f"sentence{delimiter}label\n" + "".join(cells)


def parquet(path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(path)


def task(path: str, *overrides: str):
    return tasks.load(compose("train", ["task=sst2", f"task.path={path}", *overrides]).config.task)


WRITERS = {
    "reviews.jsonl": lambda path: path.write_text(LINES),
    "reviews.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_text(LINES),
    "inside.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "reviews.csv": lambda path: path.write_text("\ufeff" + table(",")),
    "semicolons.csv": lambda path: path.write_text(table(";")),
    "reviews.tsv": lambda path: path.write_text(table("\t")),
    "reviews.parquet": parquet,
    "reviews.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "reviews.csv.bz2": lambda path: path.write_bytes(bz2.compress(table(",").encode())),
    "reviews.json.xz": lambda path: path.write_bytes(lzma.compress(json.dumps(ROWS).encode())),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_every_kind_has_the_same_rows_and_is_split_once(name):
    WRITERS[name](Path(name))
    assert files.read(Path(name)).rows == ROWS
    loaded = task(name)
    assert [len(loaded.train), len(loaded.dev), len(loaded.test)] == [16, 2, 2]
    shown = {example.text[0] for split in (loaded.train, loaded.dev, loaded.test) for example in split}
    assert shown == {row["sentence"] for row in ROWS}
    assert loaded.note == f"{name} has no splits: 16 train, 2 dev, 2 test, the same for every seed"
    assert task(name).dev == loaded.dev


def test_zstandard_is_read_where_its_library_is_installed():
    Path("reviews.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    try:
        import zstandard
    except ImportError:
        with pytest.raises(
            UserError, match=r"^'reviews.jsonl.zst' cannot be read: run pip install 'lowrank-cli\[zst\]'$"
        ):
            files.read(Path("reviews.jsonl.zst"))
    else:
        Path("reviews.jsonl.zst").write_bytes(zstandard.compress(LINES.encode()))
        assert files.read(Path("reviews.jsonl.zst")).rows == ROWS


def test_a_folder_holds_a_file_for_each_split():
    Path("data").mkdir()
    WRITERS["reviews.csv"](Path("data/train.csv"))
    WRITERS["reviews.parquet"](Path("data/validation.parquet"))
    Path("data/README.md").write_text("about")
    assert sources.folder("data").splits == ("train", "validation")
    loaded = task("data")
    assert [len(loaded.train), len(loaded.dev), len(loaded.test), loaded.note] == [20, 10, 10, ""]
    WRITERS["reviews.jsonl"](Path("data/train.jsonl"))
    with pytest.raises(UserError, match=r"^task.path: data holds train.csv and train.jsonl of one split; remove one"):
        sources.folder("data")


def test_texts_in_folders_named_for_their_labels():
    for split in ("train", "test"):
        for label in ("bad", "good"):
            folder = Path("films", split, label)
            folder.mkdir(parents=True)
            for number in range(6):
                (folder / f"{number}.txt").write_text(f"{split} {label} {number}\n")
    words = ["task.columns.sentence=text", "task.label_values=[bad,good]"]
    loaded = task("films", *words)
    assert [len(loaded.train), len(loaded.dev), len(loaded.test)] == [12, 6, 6]
    assert {(item.text[0].split()[1], item.answer) for item in loaded.train} == {
        ("bad", " negative"),
        ("good", " positive"),
    }
    alone = task("films/train", *words)
    assert "no splits" in alone.note and len(alone.train) + len(alone.dev) + len(alone.test) == 12


def test_columns_may_have_other_names(lrk):  # noqa: F811
    Path("reviews.csv").write_text("review,stars\nfine,1\ndull,0\n" + "".join(f"film {n},{n % 2}\n" for n in range(9)))
    loaded = task("reviews.csv", "task.columns.sentence=review", "task.columns.label=stars")
    assert {example.prompt for example in loaded.train} <= {
        f"Review: {text}\nSentiment:" for text in ("fine", "dull", *(f"film {n}" for n in range(9)))
    }
    words = ["task=sst2", "task.path=reviews.csv", "method=none"]
    assert one_line(lrk("evaluate", *words)).endswith("/reviews.csv:2: no column 'label' (columns: review, stars)")
    wrong = one_line(lrk("evaluate", *words, "task.columns.sentence=reveiw"))
    assert wrong.startswith("task.columns: ") and "no column 'reveiw'; did you mean 'review'?" in wrong
    assert one_line(lrk("evaluate", *words, "task.colums.sentence=review")).startswith(
        "task.colums.sentence: unknown key"
    )


MALFORMED = {
    "ragged.csv": ('a,b\n1,2\n"x\ny",2\n3\n', "ragged.csv:5: 1 columns, but the header has 2"),
    "quote.csv": ('a,b\n"x"y,2\n', "quote.csv:2: ',' expected after '\"'"),
    "head.csv": ("a,b\n", "head.csv: the file has no rows below its header"),
    "twice.tsv": ("a\ta\n1\t2\n", "twice.tsv:1: the header needs a different name for each column, not a, a"),
    "line.jsonl": ('{"a": 1}\n{"a": \n', "line.jsonl:2 cannot be read as JSON"),
    "list.json": ("[1, 2]", "list.json: [0] is 1; expected keys with values"),
    "two.json": ('{"a": [], "b": []}', "two.json: expected a list of rows, or an object with one key that holds it"),
    "none.json": ("[]", "none.json: the file is empty"),
    "broken.parquet": ("PAR1", "'broken.parquet' cannot be read as Parquet: "),
    "broken.csv.gz": ("a,b\n1,2\n", "'broken.csv.gz' cannot be read: Not a gzipped file"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_one_line(name):
    text, message = MALFORMED[name]
    Path(name).write_text(text)
    with pytest.raises(UserError) as caught:
        files.read(Path(name))
    assert str(caught.value).startswith(message)


def test_a_compressed_file_is_bounded_by_its_text(monkeypatch):
    monkeypatch.setitem(MAX_BYTES, "rows", 2000)
    Path("big.jsonl.gz").write_bytes(gzip.compress(b" " * 10**6))
    with pytest.raises(UserError, match=r"^'big.jsonl.gz' cannot be read: more than 2000 bytes of rows, decompressed$"):
        files.read(Path("big.jsonl.gz"))


def test_numbers_that_would_change_as_numbers_stay_texts():
    Path("x.csv").write_text("code,count,price\n007,1,1.50\n12,-3,2\n")
    assert files.read(Path("x.csv")).rows == [
        {"code": "007", "count": 1, "price": "1.50"},
        {"code": "12", "count": -3, "price": "2"},
    ]


def test_a_task_file_may_leave_out_what_has_a_default():
    Path("mine/task").mkdir(parents=True)
    Path("mine/task/notes.yaml").write_text('answer: labels\ntemplate: "{note}:"\ntarget: kind\nlabel_words: [a, b]\n')
    resolved = compose("train", ["task=notes", "task.path=notes.csv"], "mine").resolved["task"]
    assert (resolved["name"], resolved["max_length"], resolved["metric"]) == ("notes", 512, "accuracy")
    Path("mine/task/notes.yaml").write_text("hub: a/b\n")
    with pytest.raises(
        UserError, match=r"^task.answer, task.target, task.template: missing; give task.answer=VALUE task"
    ):
        compose("train", ["task=notes"], "mine")
    Path("mine/method").mkdir()
    Path("mine/method/small.yaml").write_text("defaults: [_lora]\nname: lora\nrank: 2\nalpha: 4\n")
    method = compose("train", ["method=small"], "mine").config.method
    assert (method.rank, method.dropout, list(method.target_modules)) == (2, 0.0, ["all"])
