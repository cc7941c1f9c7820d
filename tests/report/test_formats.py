"""The files that ``lrk compare --output`` writes: LaTeX, plots, and PEFT's method comparison."""

from __future__ import annotations

import csv
import json
import re

import pytest

from lowrank_cli.report import formats
from lowrank_cli.report.compare import build_comparison
from lowrank_cli.report.formats import figures

NAMES = ["lora", "do_ra", "100%_of {x}", "a&b"]


@pytest.fixture
def comparison(add):
    """Four methods with awkward names on two tasks; the last has one seed."""
    for task in ("tiny_yesno", "tiny_topic"):
        for place, method in enumerate(NAMES):
            for seed in range(3 if method != NAMES[-1] else 1):
                run = add(method, seed, 0.5 + 0.1 * place + 0.01 * seed * place, task=task,
                          config={"train.note": f"#{place}_$x^2~<\\"}, activated_parameters=81920,
                          **{"train/seconds": 10.0 * (place + 1), "total_parameters": 10**6})  # fmt: skip
                run.log({"step": 4, "train/loss": 0.7, "train/tokens": 90, "dev/loss": 0.9})
    return build_comparison([add.outputs], baseline="lora", across_tasks=True)


def test_every_format_is_written(comparison, tmp_path, pictures):
    formats.write(comparison, tmp_path / "out")
    tasks = ("tiny_topic", "tiny_yesno")
    plots = {f"{kind}-llama-{task}.png" for kind in ("forest", "pareto", "seeds") for task in tasks} | {
        "forest-llama-all.png"
    }
    expected = {"compare.md", "compare.csv", "compare.tex", "method_comparison", *plots}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").read_text().splitlines()))
    assert [row["task"] for row in rows] == ["tiny_topic"] * 4 + ["tiny_yesno"] * 4 + [""] * 3


# LaTeX


def check_latex(text):
    """Raise AssertionError for what TeX would stop at: braces, environments, columns, unescaped characters."""
    bare = re.sub(r"\\[\\&%$#_{}]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    opened = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert not opened
    for columns, body in re.findall(r"\\begin\{tabular\}\{([lrc]+)\}(.*?)\\end\{tabular\}", text, re.S):
        for line in body.strip().splitlines():
            if not line.strip().startswith(("\\toprule", "\\midrule", "\\bottomrule")):
                assert line.endswith(r"\\")
                assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1, line
    prose = re.sub(r"(?<!\\)\$.*?(?<!\\)\$", "", re.sub(r"^%.*|\\label\{.*?\}|(?<!\\)&", "", text, flags=re.M))
    assert not re.search(r"(?<!\\)[%#_^~<>]", prose)
    assert text.isascii()


def test_latex_tables_compile(comparison):
    text = formats.latex(comparison)
    check_latex(text)
    assert text.count(r"\begin{table}") == 3
    assert r"100\%\_of \{x\} & " in text and r"a\&b & " in text
    assert r"note=\#1\_\$x\textasciicircum{}2\textasciitilde{}\textless{}" in text
    assert re.search(r"do\\_ra & .*? & 3 & 0\.6100 & \$0\.6100 \\pm 0\.0100\$ & \$\+0\.1100\$ & \$\[\+0\.0852, ", text)


@pytest.mark.parametrize("broken", ["a_b", "50% off", r"\begin{table} x", "{"])
def test_the_checker_finds_what_does_not_compile(comparison, broken):
    with pytest.raises(AssertionError):
        check_latex(formats.latex(comparison) + broken)


def test_the_best_row_is_bold(add):
    for seed in range(3):
        add("lora", seed, 0.5 + seed / 100)
        add("milora", seed, 0.7 + seed / 100)
    assert r"\textbf{milora} & 3" in formats.latex(build_comparison([add.outputs]))


# Plots


def test_forest_plots_mark_differences_whose_interval_excludes_0():
    figure = figures.forest("t", "difference", [("a", 0.1, 0.05, 0.15), ("b$", 0.1, -0.1, 0.3), ("c", 0.2, None, None)])
    (axes,) = figure.axes
    figure.canvas.draw()
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", r"b\$", "c"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first row is on top"
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in points] == [0.1, 0.1, 0.2]
    assert points[0].get_color() == figures.FRONT and {line.get_color() for line in points[1:]} == {figures.OTHER}


def test_pareto_plots_have_a_panel_for_each_cost_that_differs(comparison):
    figure = figures.pareto(comparison.sections[0])
    (axes,) = figure.axes  # parameters and memory are the same for all
    assert axes.get_xlabel() == "training time in s"
    marked = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "D"]
    front = [(row.seconds, row.median) for row in comparison.sections[0].rows if "seconds" in row.pareto]
    assert sorted(marked) == sorted(front) and len(front) == 4


# PEFT


def loaded(record):
    """The row that ``preprocess`` and ``load_df`` of PEFT's method_comparison/processing.py make of a record."""
    run, train, meta = record["run_info"], record["train_info"], record["meta_info"]
    assert train["status"] == "success" and run["peft_config"]["peft_type"]
    last = train["metrics"][-1]
    whole = {key: int(train[f"accelerator_memory_{key}"]) for key in ("reserved_avg", "max", "reserved_99th")}
    whole |= {"file_size": int(train["file_size"]), "samples": int(last["train samples"])}
    whole |= {"tokens": int(last["train total tokens"]), "parameters": int(train["num_trainable_params"])}
    numbers = [run["total_time"], train["train_time"], last["test accuracy"], last["train loss"]]
    versions = [meta["package_info"][f"{name}-version"] for name in ("peft", "transformers", "datasets", "torch")]
    versions.append(meta["package_info"]["bitsandbytes-version"])
    assert run["train_config"]["model_id"] and run["created_at"] and run["peft_branch"] and meta["system_info"]
    return run["experiment_name"], [float(number) for number in numbers], whole, versions


def test_runs_in_the_layout_of_pefts_method_comparison(comparison, tmp_path):
    formats.write(comparison, tmp_path)
    files = sorted((tmp_path / "method_comparison" / "llama--tiny_yesno").iterdir())
    assert len(files) == 10 and files[0].name.startswith("100-_of-x-")
    records = [json.loads(file.read_text()) for file in files]
    rows = {name: (numbers, whole) for name, numbers, whole, _ in map(loaded, records)}
    (name,) = (name for name in rows if name.startswith("do_ra") and name.endswith("seed2"))
    numbers, whole = rows[name]
    assert numbers == [60.0, 20.0, pytest.approx(0.62), 0.7]
    assert (whole["tokens"], whole["max"]) == (90, 0)
    first = records[0]["train_info"]
    assert (first["num_trainable_params"], first["num_total_params"]) == (262144, 10**6)
    assert first["metrics"][0] == {"step": 4, "valid loss": 0.9, "train loss": 0.7, "train samples": 0}
