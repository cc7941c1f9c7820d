"""``lrk compare``: the grouping, the differences, the no-winner rule, the files."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
from pathlib import Path
from statistics import median

import pytest
from command import reconfigure
from rich.console import Console
from scipy.stats import ttest_rel

from lowrank_cli.errors import UserError
from lowrank_cli.report import formats, plots
from lowrank_cli.report.compare import build_comparison, compare
from lowrank_cli.report.run_results import IRRELEVANT


def run_compare(add, paths=(), **options):
    """Rows of compare.csv, compare.md and the terminal's text."""
    comparison = build_comparison(paths, **{"outputs": str(add.outputs)} | options)
    console = Console(width=200, file=io.StringIO())
    console.print(formats.terminal(comparison))
    rows = list(csv.DictReader(io.StringIO(formats.csv_text(comparison))))
    return rows, formats.markdown(comparison), console.file.getvalue()


def draw_compare(add, monkeypatch, **options):
    """The entries drawn as lines, and the names of all plots."""
    drawn = []
    monkeypatch.setattr(plots, "lines", lambda entry, lines=plots.lines: drawn.append(entry) or lines(entry))
    folder = add.outputs.parent / "out"
    compare([], options.get("baseline"), None, str(folder), str(add.outputs))
    return drawn, {path.name for path in folder.glob("*.png")}


# Grouping


def test_rows_hold_median_interval_test_and_costs(add):
    lora, milora = [0.80, 0.84, 0.82], [0.81, 0.86, 0.85]
    for seed, (a, b) in enumerate(zip(lora, milora)):
        add("lora", seed, a, **{"train/seconds": 100.0 + seed, "activated_parameters": 262144})
        add("milora", seed, b, **{"train/seconds": 200.0, "activated_parameters": 81920})
    rows, markdown, shown = run_compare(add, baseline="lora")
    assert [row["method"] for row in rows] == ["milora", "lora"]
    first, second = rows
    assert (float(first["median"]), float(second["median"])) == (median(milora), median(lora))
    assert (float(first["interval_low"]), float(first["interval_high"])) == (0.81, 0.86)
    assert float(first["mean_difference"]) == pytest.approx((0.01 + 0.02 + 0.03) / 3)
    assert float(first["p_sign_flip"]) == 0.25 and first["pairs"] == "3" and first["test_examples"] == ""
    assert float(first["p_value"]) == pytest.approx(ttest_rel(milora, lora).pvalue)
    assert float(first["difference_low"]) == pytest.approx(ttest_rel(milora, lora).confidence_interval().low)
    assert second["pairs"] == "" and second["p_value"] == ""
    assert (second["train_seconds"], second["peak_memory_bytes"]) == ("101.0", str(2**29))
    assert first["seeds"] == "0 1 2" and first["metric"] == "test/accuracy"
    tested = "+0.0200 | -0.0048 to +0.0448 | 0.074 | 0.250 (3) | ±0.0326"
    assert (
        f"| milora | 3 | 0.8500 | 0.8100–0.8600 | 0.0265 | {tested} | 262k ◆ | 81.9k | 3m 20s ◆ | 512 MiB ◆ |"
        in markdown
    )
    assert (
        "| lora | 3 | 0.8200 | 0.8000–0.8400 | 0.0200 | – | – | – | – | – | 262k | 262k | 1m 41s ◆ | 512 MiB |"
        in markdown
    )
    assert "### llama · tiny_yesno · test/accuracy (higher is better)" in markdown
    assert "0.250 (3)" in shown and "sign-flip" in shown


def test_runs_over_arrangements_show_their_spread(add):
    for seed, worst in enumerate((0.5, 0.6, 0.4)):
        add("idaicl", seed, 0.8, **{"test/accuracy_std": 0.125, "test/accuracy_worst": worst})
        add("none", seed, 0.7)
    add("lora", 0, 0.9, task="tiny_topic")
    rows, markdown, _ = run_compare(add)
    found = {row["method"]: (row["arrangement_std"], row["arrangement_worst"]) for row in rows}
    assert found == {"idaicl": ("0.125", "0.5"), "none": ("", ""), "lora": ("", "")}
    assert "| idaicl ★ | 3 | 0.8000 | 0.8000–0.8000 | 0.0000 | 0.1250 | 0.5000 |" in markdown
    assert (
        "| none | 3 | 0.7000 | 0.7000–0.7000 | 0.0000 | – | – |" in markdown
        and "| lora | 1 | 0.9000 | – | 262k" in markdown
    )
    assert "several arrangements of demonstrations" in markdown


def test_pairs_are_by_seed_and_one_pair_has_no_p(add):
    add("lora", 1, 0.5)
    add("lora", 2, 0.6)
    add("milora", 2, 0.9)
    add("milora", 3, 0.1)
    add("full", 7, 0.3)
    rows, markdown, _ = run_compare(add, baseline="lora")
    by_method = {row["method"]: row for row in rows}
    assert float(by_method["milora"]["mean_difference"]) == pytest.approx(0.3)
    assert (by_method["milora"]["pairs"], by_method["milora"]["p_value"]) == ("1", "")
    assert (by_method["full"]["pairs"], by_method["full"]["mean_difference"]) == ("", "")
    assert "| +0.3000 | – | – | – | – |" in markdown


def test_settings_are_not_pooled_and_tasks_stand_apart(add):
    for seed in (1, 2):
        add("lora", seed, 0.7, config={"method.rank": 8})
        add("lora", seed, 0.8, config={"method.rank": 16})
        add("milora", seed, 0.9)
        add("lora", seed, 0.4, task="tiny_arithmetic", config={"train.batch_size": 4})
        add("milora", seed, 0.4, task="tiny_arithmetic", config={"train.batch_size": 8})
    rows, _, _ = run_compare(add)
    assert [(row["task"], row["method"], row["setting"], row["n"]) for row in rows] == [
        ("tiny_arithmetic", "lora", "batch_size=4", "2"),
        ("tiny_arithmetic", "milora", "batch_size=8", "2"),
        ("tiny_yesno", "milora", "", "2"),
        ("tiny_yesno", "lora", "rank=16", "2"),
        ("tiny_yesno", "lora", "rank=8", "2"),
    ]
    with pytest.raises(UserError, match=r"several settings; name one of: 'lora rank=16'; 'lora rank=8'"):
        run_compare(add, baseline="lora")
    rows, _, _ = run_compare(add, baseline="lora rank=8")
    assert [row["pairs"] for row in rows] == ["", "", "2", "2", ""]


def test_a_baseline_of_the_same_setting_is_taken(add):
    for method, better in (("lora", 0), ("milora", 0.1)):
        for rate, value in ((1e-3, 0.5), (1e-4, 0.3)):
            for seed in (1, 2):
                add(method, seed, value + better * (1 if rate == 1e-3 else 2), config={"train.learning_rate": rate})
    rows, _, _ = run_compare(add, baseline="lora")
    differences = {row["setting"]: float(row["mean_difference"]) for row in rows if row["method"] == "milora"}
    assert differences == pytest.approx({"learning_rate=0.001": 0.1, "learning_rate=0.0001": 0.2})


def test_a_baseline_of_the_same_swept_number_is_taken_and_drawn_over_it(add, monkeypatch):
    for rank in (2, 4, 16):
        for seed in (1, 2):
            add("lora", seed, rank / 100, config={"method.rank": rank, "method.alpha": 2.0 * rank})
            add("sora", seed, rank / 50, config={"method.rank": rank, "method.alpha": 4.0 * rank})
    rows, _, _ = run_compare(add, baseline="lora")
    differences = {row["setting"]: float(row["mean_difference"]) for row in rows if row["method"] == "sora"}
    assert differences == pytest.approx(
        {"alpha=8.0 rank=2": 0.02, "alpha=16.0 rank=4": 0.04, "alpha=64.0 rank=16": 0.16}
    )
    (entry,), _ = draw_compare(add, monkeypatch)
    assert (entry["columns"], entry["column_label"], sorted(entry["rows"])) == ([2, 4, 16], "rank", ["lora", "sora"])


def test_what_most_runs_have_is_said_once_and_names_stay_distinct(add):
    for seed in (1, 2):
        add("lora", seed, 0.5, config={"train.batch_size": 16, "task.limit": None, "method.rank": 8})
        add("milora", seed, 0.7, config={"train.batch_size": 16, "task.limit": None})
        add("lora", seed, 0.6, config={"train.batch_size": 16, "task.limit": None, "method.rank": 4})
    add("milora", 1, 0.3, config={"train.batch_size": 8, "task.limit": 20})
    add("none", 1, 0.2, stage="evaluate", run=add.outputs / "gone", config={"task.limit": None})
    rows, markdown, shown = run_compare(add, baseline="milora")
    assert [row["method"] + " " + row["setting"] for row in rows] == [
        "milora ",
        "lora rank=4",
        "lora rank=8",
        "milora limit=20 batch_size=8",
        "none ",
    ]
    line = "unless a setting says otherwise: limit=null batch_size=16"
    assert line in markdown and line in shown
    assert [row["pairs"] for row in rows] == ["", "2", "2", "", "1"]  # of its own setting, or else the row "milora"
    add("none", 1, 0.1, stage="evaluate", run=add.outputs / "gone")  # does not say its limit
    rows, _, _ = run_compare(add)
    assert {row["setting"] for row in rows if row["method"] == "none"} == {"", "limit=null"}


def test_keys_with_the_same_last_word_keep_their_section(add):
    for name, value in (("one", 1), ("two", 2)):
        add("lora", value, 0.5, config={"model.path": f"/data/{name}", "hardware.path": f"/data/{name}"})
    assert {row["setting"] for row in run_compare(add)[0]} == {
        f"hardware.path=/data/{name} model.path=/data/{name}" for name in ("one", "two")
    }


def test_the_newest_run_of_a_seed_counts_once(add):
    add("lora", 1, 0.1)
    add("lora", 1, 0.3, config={"train.log_every": 5})
    add("lora", 2, 0.5)
    rows, markdown, _ = run_compare(add)
    assert (rows[0]["n"], rows[0]["values"], rows[0]["setting"]) == ("2", "0.3 0.5", "")
    assert "1 replaced by a newer run of the same seed" in markdown


def test_an_evaluation_joins_its_training(add):
    training = add("lora", 3, 0.4, metric="dev/loss", **{"train/seconds": 90.0})
    add("lora", 1, 0.9, stage="evaluate", run=training.path, **{"test/loss": 1.0})
    rows, _, _ = run_compare(add)
    (row,) = rows
    assert (row["seeds"], row["median"], row["train_seconds"], row["metric"]) == ("3", "0.9", "90.0", "test/accuracy")
    add("lora", 1, 0.95, stage="evaluate", run=training.path, config={"evaluate.num_beams": 4})
    rows, _, _ = run_compare(add)
    assert {row["setting"]: row["median"] for row in rows} == {
        "num_beams=1": "0.9",
        "num_beams=4": "0.95",
    }


def test_evaluations_alone_keep_the_training_settings_apart(add):
    for rate in (1e-3, 1e-4):
        training = add("lora", 5, 0.4, metric="dev/loss", config={"train.learning_rate": rate},
                       folder=add.outputs.parent / "elsewhere" / str(rate))  # fmt: skip
        add("lora", 1, rate, stage="evaluate", run=training.path)
    rows, _, _ = run_compare(add)
    assert {(row["setting"], row["seeds"]) for row in rows} == {
        ("learning_rate=0.001", "5"),
        ("learning_rate=0.0001", "5"),
    }


def test_an_adapter_measured_with_other_values_is_a_row_of_its_own(add):
    three = add("milora", 0, 0.8, config={"method.k": 3})
    add("milora", 0, 0.9, config={"method.k": 5})
    add("milora", 0, 0.1, stage="evaluate", run=three.path, config={"method.k": 5})
    add("milora", 0, 0.2, stage="evaluate", run=three.path, config={"method.k": 3}, task="tiny_topic")
    elsewhere = {("tiny_topic", "trained.task=tiny_yesno"): 0.2}
    others = [path for path in sorted((add.outputs / "day").iterdir()) if path != three.path]
    for paths, expected in (
        ([], {"k=3": 0.8, "k=5": 0.9, "k=5 trained.k=3": 0.1}),
        (others, {"": 0.9, "trained.k=3": 0.1}),  # the training is not among them
    ):
        rows, markdown, _ = run_compare(add, paths)
        found = {(row["task"], row["setting"]): float(row["median"]) for row in rows}
        assert found == elsewhere | {("tiny_yesno", setting): value for setting, value in expected.items()}
        assert "replaced" not in markdown


def test_statistics_are_not_trained_with_the_settings_of_an_evaluation(add):
    lora = add("lora", 0, 0.8, config={"method.rank": 4})
    fit = add("idaicl", 0, 0.5, config={"method.calibration": "ida"})
    above = add("idaicl", 0, 0.6, config={"method.calibration": "ida", "train.x": 1})
    for run, below in ((fit, None), (above, lora)):
        (run.path / "statistics").mkdir()
        reconfigure(run, run=below and str(below.path))
        add("idaicl", 0, 0.7, stage="evaluate", run=run.path, config={"method.calibration": "conca"})
    settings = {row["setting"] for row in run_compare(add)[0] if row["method"] == "idaicl"}
    assert sum("trained.method=lora" in setting for setting in settings) == 2 and len(settings) == 4


def test_sweep_and_recipe_folders_and_single_runs(add):
    day = add.outputs / "day"
    for job in range(3):
        add("lora", job, 0.5 + job / 10, folder=day / "100-sweep" / str(job))
    (day / "100-sweep" / "sweep.json").write_text(json.dumps({}))
    add("milora", 0, 0.9, folder=day / "101-recipe-x" / "train")
    alone = add("full", 0, 0.2)
    add("lora", 9, 0.9, status="failed")
    add("lora", 10, 0.9, status="running")
    assert len(run_compare(add, [day / "100-sweep"])[0]) == 1
    rows, markdown, _ = run_compare(add, [day / "100-sweep", day / "101-recipe-x", alone.path, alone.path])
    assert {row["method"]: row["n"] for row in rows} == {"lora": "3", "milora": "1", "full": "1"}
    assert "not finished" not in markdown
    rows, markdown, _ = run_compare(add, ["day"])  # a path inside outputs
    assert len(rows) == 3 and "Left out: 2 not finished." in markdown


def test_a_swept_number_is_drawn_as_a_line_with_the_other_methods_level(add, monkeypatch, pictures):
    for seed in range(2):
        add("lora", seed, 0.5 + seed)
        for k in (10, 1, 7):
            add("milora", seed, k / 100 + seed, config={"method.k": k})
            add("milora", seed, 0.4, task="tiny_choice", config={"method.gate": f"kind{k}"})
        add("milora", seed, 0.4, task="tiny_topic", config={"method.k": 1})
        add("milora", seed, 0.4, task="tiny_topic", config={"method.k": 7})
    (entry,), names = draw_compare(add, monkeypatch)
    assert (entry["columns"], entry["column_label"]) == ([1, 7, 10], "k")
    values = dict(zip(entry["rows"], entry["values"], strict=True))
    assert values["lora"] == [1.0] * 3
    assert values["milora"] == pytest.approx([0.51, 0.57, 0.6])
    assert [name for name in names if name.startswith("compare")] == ["compare-llama-tiny_yesno.png"]
    assert (add.outputs.parent / "out" / "compare-llama-tiny_yesno.png").read_bytes().startswith(b"\x89PNG")


# Metrics and the winner


def spread(add, method, values, **options):
    for seed, value in enumerate(values):
        add(method, seed, value, **options)


@pytest.mark.parametrize(
    "values, best",
    [
        ({"lora": [0.80, 0.81, 0.82], "milora": [0.83, 0.84, 0.85]}, "milora"),
        ({"lora": [0.80, 0.81, 0.84], "milora": [0.83, 0.84, 0.85]}, None),
        ({"lora": [0.80, 0.81, 0.83], "milora": [0.83, 0.84, 0.85]}, None),
        ({"lora": [0.80, 0.81], "milora": [0.83, 0.84, 0.85]}, None),
        ({"lora": [0.80, 0.81, 0.82], "milora": [0.83, 0.84]}, None),
        ({"lora": [0.80, 0.81, 0.82]}, None),
        ({"lora": [0.8] * 3, "milora": [0.9] * 3, "full": [0.89, 0.90, 0.95]}, None),
    ],
    ids=["apart", "overlap", "touch", "baseline has two", "best has two", "alone", "third overlaps"],
)
def test_no_winner_where_intervals_overlap_or_seeds_are_few(add, values, best):
    for method, of_method in values.items():
        spread(add, method, of_method)
    rows, markdown, shown = run_compare(add)
    assert [row["method"] for row in rows if row["best"] == "True"] == ([best] if best else [])
    assert (f"| {best} ★ |" in markdown) == ("★ the interval" in markdown) == ("★" in shown) == bool(best)
    assert ("No row is marked best" in markdown) == (best is None and len(values) > 1)


def test_footnotes_stand_only_where_they_apply(add):
    add("lora", 1, 0.8)
    add("milora", 1, 0.9)
    _, markdown, _ = run_compare(add)
    assert "n counts seeds" in markdown and "interval:" not in markdown and "marked best" not in markdown


def test_lower_is_better_for_losses(add):
    spread(add, "lora", [1.0, 1.1, 1.2], metric="dev/loss")
    spread(add, "milora", [0.7, 0.8, 0.9], metric="dev/loss")
    rows, markdown, _ = run_compare(add, metric="dev/loss")
    assert [(row["method"], row["best"]) for row in rows] == [("milora", "True"), ("lora", "False")]
    assert "dev/loss (lower is better)" in markdown


def test_default_metric_is_the_tasks_own_on_test(add):
    spread(add, "lora", [0.5], metric="dev/accuracy", **{"test/other": 0.1, "test/accuracy": 0.7, "test/loss": 2.0})
    assert run_compare(add)[0][0]["metric"] == "test/accuracy"
    assert run_compare(add, metric="test/other")[0][0]["median"] == "0.1"


def test_runs_without_a_finite_value_are_left_out_and_counted(add):
    spread(add, "lora", [0.5, math.nan])
    add("milora", 0, 0.4, metric="dev/accuracy")
    rows, markdown, _ = run_compare(add)
    assert [(row["method"], row["n"]) for row in rows] == [("lora", "1")]
    assert "Left out: 2 without the metric." in markdown
    assert "| lora | 1 | 0.5000 | – |" in markdown


def test_runs_on_other_examples_are_never_ranked(add):
    for seed in (1, 2):
        add("lora", seed, 0.5, **{"test/examples": 48})
        add("milora", seed, 0.9, **{"test/examples": 48})
        add("dora", seed, 1.0, **{"test/examples": 8})
    rows, markdown, _ = run_compare(add, baseline="lora")
    differences = {(row["task"], row["method"]): row["mean_difference"] for row in rows}
    assert differences == {
        ("tiny_yesno, 48 examples", "milora"): "0.4",
        ("tiny_yesno, 48 examples", "lora"): "",
        ("tiny_yesno, 8 examples", "dora"): "",
    }
    assert "in tables of their own: they are not compared" in markdown
    assert "covers the median with probability 1 - 2^(1-n): 50 % for 2 seeds" in markdown


def test_a_difference_that_cannot_be_is_not_called_detectable(add):
    for seed, other in ((1, 0.9), (2, 0.3)):
        add("lora", seed, 0.5)
        add("dora", seed, other)
    rows, markdown, _ = run_compare(add, baseline="lora")
    assert [row["detectable"] for row in rows] == ["", ""] and rows[0]["p_value"]
    assert "detectable –: it would be more than 1" in markdown


def test_shares_in_percent(add):
    spread(add, "lora", [0.81, 0.82, 0.83])
    spread(add, "dora", [0.83, 0.84, 0.87])
    console = Console(width=160, file=io.StringIO())
    console.print(compare([], "lora", None, "paper", str(add.outputs), percent=True))
    text = console.file.getvalue()
    assert "test/accuracy in % (higher is better)" in text and "84.00 83.00–87.00" in text and "+2.6667" in text
    assert "0.84" in Path("paper/compare.csv").read_text() and "84.00" in Path("paper/compare.tex").read_text()


def test_keys_that_a_run_does_not_read_are_no_setting(add):
    for seed, (tokens, beams) in enumerate(((4, 1), (8, 2))):
        add(
            "lora",
            seed,
            0.5,
            config={"task.answer": "labels", "task.max_new_tokens": tokens, "evaluate.num_beams": beams},
        )
    ((method, setting, n),) = [(row["method"], row["setting"], row["n"]) for row in run_compare(add)[0]]
    assert (method, setting, n) == ("lora", "", "2")


def test_the_range_is_shown_where_the_interval_is_narrower(add):
    spread(add, "lora", [0.1 * i for i in range(1, 10)])
    rows, markdown, _ = run_compare(add)
    assert (float(rows[0]["interval_low"]), float(rows[0]["min"])) == pytest.approx((0.2, 0.1))
    assert "| 0.5000 | 0.2000–0.8000 | 0.1000–0.9000 |" in markdown


def test_a_narrow_terminal_shows_every_number_whole(add):
    for method in ("lora", "milora"):
        spread(add, method, [0.81, 0.82, 0.83], activated_parameters=81920)
    shown = compare([], "lora", None, None, str(add.outputs))
    for width, tables in ((160, 1), (100, 2), (60, 3)):
        console = Console(width=width, file=io.StringIO())
        console.print(shown)
        text = console.file.getvalue()
        assert text.count("method") == tables
        assert max(map(len, text.splitlines())) <= width
        for cell in ("0.8100–0.8300", " 0.0000 ", "1.000 (3)", "262k", "81.9k", "512 MiB"):
            assert cell in text


# Bad input


def test_errors_name_what_is_wrong(add, tmp_path):
    spread(add, "lora", [0.5, 0.6])
    add("milora", 1, 0.5)
    with pytest.raises(UserError, match=r"--baseline: unknown value 'lroa'; did you mean 'lora'\?"):
        run_compare(add, baseline="lroa")
    with pytest.raises(UserError, match=r"--metric: unknown value 'test/acc'.*allowed: test/accuracy, trainable_param"):
        run_compare(add, metric="test/acc")
    with pytest.raises(UserError, match="there is no folder 'dax'; did you mean 'day'"):
        run_compare(add, ["dax"])
    with pytest.raises(UserError, match=r"there is no folder '/hom'$"):
        run_compare(add, ["/hom"])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="is no run and holds none"):
        run_compare(add, [empty])
    with pytest.raises(UserError, match="is no run and holds none"):
        run_compare(add, outputs=str(empty))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file' is a file; name a folder"):
        compare([], None, None, str(tmp_path / "file" / "below"), str(add.outputs))
    with pytest.raises(UserError, match="is a file; name a folder"):
        compare([], None, None, str(tmp_path / "file"), str(add.outputs))
    assert not (tmp_path / "out").exists()


def test_a_baseline_of_several_rows_with_nothing_to_compare_names_them(add):
    for calibration in ("none", "ida"):
        add("idaicl", 0, 0.5, config={"method.calibration": calibration})
    with pytest.raises(UserError, match=r"several settings; name one of: 'idaicl calibration=(none|ida)'; 'idaicl c"):
        run_compare(add, baseline="idaicl")
    with pytest.raises(UserError, match=r"unknown value 'none'; did you mean 'idaicl calibration=none'\?"):
        run_compare(add, baseline="none")
    with pytest.raises(UserError, match=r"--metric: unknown value 'acc'; did you mean 'test/accuracy'\?"):
        run_compare(add, metric="acc")


def test_no_finished_runs_and_no_quality_metric(add):
    failed = add("lora", 1, 0.5, status="failed")
    with pytest.raises(UserError, match=r"no finished runs in .*\(1 not finished\)"):
        run_compare(add, [failed.path])
    add("lora", 2, 3.0, metric="train/seconds")
    with pytest.raises(UserError, match="has a finite test or dev metric; name one with --metric"):
        run_compare(add)
    assert run_compare(add, metric="train/seconds")[0][0]["lower_is_better"] == "True"


def test_nothing_that_changes_a_result_is_ignored():
    named = {"method.setting", "method.layers"}  # what they hold goes by its name, method.chosen_by
    named |= {"method.ranks"}  # goes by method.rank_pattern
    assert not any(key.startswith(("method.", "model.", "task.")) for key in IRRELEVANT - named)


def test_settings_of_modules_go_by_their_name(add):
    """One found for each seed is one row, another rule is another row."""
    for seed in (0, 1):
        for name in ("ablation keep=2", "random"):
            path, layers = f"/runs/{name}{seed}/setting.yaml", {"0": ["Q"] if seed else ["V", name[0]]}
            settings = {"method.setting": path, "method.layers": layers, "method.chosen_by": name}
            add("fanlora", seed, 0.5 + seed / 10, config=settings)
    rows, *_ = run_compare(add)
    found = {(row["setting"], row["n"]) for row in rows}
    assert found == {("chosen_by=ablation keep=2", "2"), ("chosen_by=random", "2")}
    add("fanlora", 0, 0.4, config=settings | {"method.layers": {"0": ["D"]}})
    assert "1 of the runs replaced below kept other modules under the same name" in " ".join(
        run_compare(add)[1].split()
    )


def test_prunings_of_scorings_of_two_kinds_are_two_rows(add):
    trained = add("lora", 0, 0.9)
    for kind, value in (("ablation", 0.7), ("kl", 0.8)):
        scored = add("lora", 0, 0.5, stage="score", metric="score/ranks", config={"score.kind": kind})
        unused = {"score.kind": None, "prune.keep": 2}
        pruned = add("lora", 0, value, stage="prune", config=unused)
        for run, source in ((scored, trained), (pruned, scored)):
            reconfigure(run, run=str(source.path))
    rows, *_ = run_compare(add)
    found = {(row["setting"], row["median"]) for row in rows}
    assert found == {("adapter=train", "0.9"), ("kind=ablation", "0.7"), ("kind=kl", "0.8")}


def test_across_tasks_fits_random_effects_of_task_and_seed(add):
    """Differences by hand: +0.1, +0.2, +0.3 on one task, +0.2, +0.2 on the other; seed 2 is on the first alone."""
    for task, gains in {"tiny_yesno": (0.1, 0.2, 0.3), "tiny_topic": (0.2, 0.2)}.items():
        for seed, gain in enumerate(gains):
            add("lora", seed, 0.5, task=task)
            add("milora", seed, 0.5 + gain, task=task)
    _, written, shown = run_compare(add, baseline="lora", across_tasks=True)
    row = next(line.split() for line in shown.split("all tasks together")[1].splitlines() if "milora" in line)
    # tasks do not differ, so the estimate is a mean of seeds; the three means by seed have one sign: p = 2^(1-3)
    assert row[:4] == ["milora", "2", "5", "+0.2100"] and "0.250" in row, row
    assert "| milora | 2 | 5 | +0.2100 |" in written


def test_across_tasks_takes_logarithms_of_losses(add):
    for task, scale in {"tiny_yesno": 1.0, "tiny_topic": 10.0}.items():
        for seed in range(2):
            add("lora", seed, scale, task=task, metric="test/loss")
            add("milora", seed, scale / math.e, task=task, metric="test/loss")
    _, _, shown = run_compare(add, baseline="lora", metric="test/loss", across_tasks=True)
    row = next(line.split() for line in shown.split("all tasks together")[1].splitlines() if "milora" in line)
    assert row[3].startswith("-1"), row


def test_across_tasks_leaves_out_a_loss_without_logarithm(add):
    for task in ("tiny_yesno", "tiny_topic", "tiny_choice"):
        for seed in range(3):
            add("lora", seed, 1.0, task=task, metric="test/loss")
            exact = task == "tiny_choice" or (task, seed) == ("tiny_topic", 0)
            add("milora", seed, 0.0 if exact else 0.9, task=task, metric="test/loss")
    _, _, shown = run_compare(add, baseline="lora", metric="test/loss", across_tasks=True)
    row = next(line.split() for line in shown.split("all tasks together")[1].splitlines() if "milora" in line)
    assert row[:4] == ["milora", "2", "5", "-0.1054"], row  # two tasks, five pairs, log(0.9)


@pytest.mark.parametrize("write", ["compare", "report"])
def test_an_output_that_cannot_be_written_is_named(add, lrk, monkeypatch, write):
    add("lora", 0, 0.5)

    def refused(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere")

    monkeypatch.setattr("lowrank_cli.report.formats.atomic_write", refused)
    monkeypatch.setattr("lowrank_cli.report.html.page.atomic_write", refused)
    ended = lrk(write, "--outputs", str(add.outputs), str(add.outputs), "--output", "made.html")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "error: --output: 'made.html' cannot be written (Permission denied)\n"


def test_across_tasks_needs_a_baseline_and_two_tasks(add):
    add("lora", 0, 0.5)
    add("milora", 0, 0.6)
    with pytest.raises(UserError, match=r"^--across-tasks: methods are tested against a baseline"):
        compare([], None, None, None, str(add.outputs), across_tasks=True)
    with pytest.raises(UserError, match=r"^--across-tasks: no method shares seeds with the baseline on two tasks"):
        compare([], "lora", None, None, str(add.outputs), across_tasks=True)
