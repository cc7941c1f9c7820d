"""Differences over test examples, and ``lrk compare`` of a study's folder."""

from __future__ import annotations

import json
from statistics import fmean

import numpy as np
import pytest
import scipy.stats

from lowrank_cli.errors import UserError
from lowrank_cli.report import formats
from lowrank_cli.report.compare import build_comparison
from lowrank_cli.report.statistics import crossed_mean, holm

SKILL = {"lora": 0.6, "dora": 0.6, "rslora": 0.8, "random1": 0.4, "random2": 0.5}
EXAMPLES = 40


def right_answers(arm, task, seed):
    draw = np.random.default_rng([ord(task[-1]), seed])
    hardness = np.random.default_rng(ord(task[-1])).uniform(0.3, 1.1, EXAMPLES)
    return (draw.normal(SKILL[arm], 0.15, EXAMPLES) > hardness * 0.6).tolist()


@pytest.fixture
def study(add, tmp_path):
    """A study of five arms on two tasks over three seeds; returns its folder and a way to write its runs."""
    folder = tmp_path / "study"
    folder.mkdir()
    record = {
        "name": "small",
        "command": "lrk study study=small",
        "status": "running",
        "process": None,
        "baseline": "lora",
        "arms": list(SKILL),
        "pools": {"random": ["random1", "random2"]},
        "seeds": [0, 1, 2],
        "groups": {"bundled": ["task_a", "task_b"]},
    }
    (folder / "study.json").write_text(json.dumps(record))

    def fill(skip=(), answers=True):
        for task in record["groups"]["bundled"]:
            for arm in record["arms"]:
                for seed in record["seeds"]:
                    if (task, arm, seed) not in skip:
                        right = right_answers(arm, task, seed)
                        add("lora", seed, fmean(right), task=task, right=right if answers else None,
                            folder=folder / "runs" / "bundled" / task / arm / str(seed),
                            **{"train/seconds": 10.0 + seed})  # fmt: skip

    return folder, fill


def test_a_study_has_a_section_for_each_task_and_a_row_for_each_arm_and_pool(study):
    folder, fill = study
    fill()
    comparison = build_comparison([folder])
    assert [(s.model, s.task) for s in comparison.sections] == [("bundled", "task_a"), ("bundled", "task_b")]
    assert (comparison.study, comparison.baseline, comparison.missing) == ("small", "lora", 0)
    for section in comparison.sections:
        rows = {row.method: row for row in section.rows}
        assert set(rows) == {*SKILL, "random"} and section.metric == "test/accuracy"
        assert rows["random"].values == {
            seed: pytest.approx(fmean([rows["random1"].values[seed], rows["random2"].values[seed]]))
            for seed in range(3)
        }
        assert rows["lora"].difference is None
        assert all(row.baseline is rows["lora"] for row in section.rows if row.method != "lora")
        assert rows["rslora"].runs[2] == [folder / "runs" / "bundled" / section.task / "rslora" / "2"]
    assert [result.method for result in comparison.across_tasks if result.tasks == 2 and result.pairs == 6]


def test_the_error_of_the_test_set_is_in_the_interval(study):
    folder, fill = study
    fill()
    row = next(row for row in build_comparison([folder]).sections[0].rows if row.method == "rslora")
    table = np.array([right_answers("rslora", "task_a", s) for s in range(3)], dtype=float)
    table -= np.array([right_answers("lora", "task_a", s) for s in range(3)], dtype=float)
    assert row.difference.examples == EXAMPLES
    assert row.difference.mean == pytest.approx(table.mean())
    assert (row.difference.low, row.difference.high) == pytest.approx(crossed_mean(table).interval())
    assert row.difference.bootstrap[0] < row.difference.mean < row.difference.bootstrap[1]
    assert row.difference.p_holm >= row.difference.p_value


def test_a_pool_is_compared_by_the_mean_of_its_arms_answers(study):
    folder, fill = study
    fill()
    row = next(row for row in build_comparison([folder]).sections[0].rows if row.method == "random")
    arms = [[right_answers(arm, "task_a", s) for s in range(3)] for arm in ("random1", "random2", "lora")]
    first, second, lora = np.array(arms, dtype=float)
    assert row.difference.examples == EXAMPLES
    assert (row.difference.low, row.difference.high) == pytest.approx(
        crossed_mean((first + second) / 2 - lora).interval()
    )


def test_a_view_is_another_metric_of_an_arms_runs(study):
    folder, fill = study
    fill()
    record = json.loads((folder / "study.json").read_text())
    record["views"] = {
        "calibrated": {"arm": "lora", "metric": "calibrated", "bound": False},
        "oracle": {"arm": "lora", "metric": "oracle", "bound": True},
    }
    (folder / "study.json").write_text(json.dumps(record))
    shares = {}
    for seed in range(3):  # the calibration answers as another arm does
        cell = folder / "runs" / "bundled" / "task_a" / "lora" / str(seed)
        shares[seed] = right_answers("rslora", "task_a", seed)
        lines = [json.loads(line) for line in (cell / "predictions.jsonl").read_text().splitlines()]
        lines = [
            {**line, "beside": {"calibrated": float(right)}} for line, right in zip(lines, shares[seed], strict=True)
        ]
        (cell / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        metrics = json.loads((cell / "metrics.json").read_text())
        metrics |= {"test/accuracy_calibrated": fmean(shares[seed]), "test/accuracy_oracle": 1.0}
        (cell / "metrics.json").write_text(json.dumps(metrics))
    comparison = build_comparison([folder])
    rows = {row.method: row for row in comparison.sections[0].rows}
    assert rows["calibrated"].values == {seed: fmean(right) for seed, right in shares.items()}
    assert "calibrated" not in {row.method for row in comparison.sections[1].rows}
    ours, theirs = rows["calibrated"].difference, rows["rslora"].difference
    assert (ours.low, ours.high, ours.examples) == (theirs.low, theirs.high, EXAMPLES)
    bound = rows["oracle"]
    assert bound.difference.mean > 0 and bound.difference.p_value is None and not bound.best
    assert all(result.method != "oracle" for result in comparison.across_tasks)
    text = formats.markdown(comparison)
    assert "oracle †" in text and "† a bound, found with the test labels" in text


def test_missing_cells_are_counted_and_refuse_nothing(study):
    folder, fill = study
    empty = build_comparison([folder])
    assert (empty.sections, empty.missing) == ([], 30)
    assert "Missing: 30 of the study's 30 cells have no finished run." in formats.markdown(empty)
    fill(skip={("task_a", "random1", 1), *(("task_b", arm, seed) for arm in SKILL for seed in range(3))})
    comparison = build_comparison([folder])
    assert [section.task for section in comparison.sections] == ["task_a"]
    assert (comparison.cells, comparison.missing) == (30, 16) and not comparison.across_tasks
    pool = next(row for row in comparison.sections[0].rows if row.pool)
    assert list(pool.values) == [0, 2]


def test_a_study_whose_baseline_has_not_run_yet_has_no_differences(study):
    folder, fill = study
    fill(skip={(task, arm, seed) for task in ("task_a", "task_b") for arm in ("lora", "dora") for seed in range(3)})
    comparison = build_comparison([folder])
    assert comparison.baseline is None and {len(section.rows) for section in comparison.sections} == {4}


def test_a_broken_cell_is_named_and_a_broken_study_is_refused(study):
    folder, fill = study
    fill()
    (folder / "runs" / "bundled" / "task_a" / "dora" / "0" / "run.json").write_text("{")
    comparison = build_comparison([folder])
    assert comparison.missing == 1 and "cannot be read as JSON" in comparison.broken[0]
    with pytest.raises(UserError, match="is a study, which is compared alone"):
        build_comparison([folder, folder / "runs"])
    with pytest.raises(UserError, match=r"--metric: unknown value 'test/acc'; did you mean 'test/accuracy'"):
        build_comparison([folder], metric="test/acc")
    (folder / "study.json").write_text(json.dumps({"name": "x", "baseline": "../x"}))
    with pytest.raises(UserError, match=r"study.json: baseline is '../x'; expected a plain name, no path"):
        build_comparison([folder])


def test_runs_of_a_study_are_left_out_of_other_comparisons(study, add):
    folder, fill = study
    fill()
    with pytest.raises(UserError, match="30 in studies, which are compared by their own folders"):
        build_comparison([folder.parent])
    add("milora", 0, 0.5)
    comparison = build_comparison([folder.parent])
    assert [row.method for section in comparison.sections for row in section.rows] == ["milora"]
    assert "30 in studies" in formats.markdown(comparison)
    named = build_comparison([folder / "runs" / "bundled" / "task_a" / "dora"])
    assert list(named.sections[0].rows[0].values) == [0, 1, 2]


def test_without_saved_answers_the_error_is_over_seeds_alone(study):
    folder, fill = study
    fill(answers=False)
    comparison = build_comparison([folder])
    row = next(row for row in comparison.sections[0].rows if row.method == "rslora")
    values = [fmean(right_answers("rslora", "task_a", s)) - fmean(right_answers("lora", "task_a", s)) for s in range(3)]
    assert row.difference.examples is None and row.difference.bootstrap is None
    assert row.difference.p_value == pytest.approx(scipy.stats.ttest_1samp(values, 0).pvalue)
    assert "over seeds alone" in formats.markdown(comparison)


def test_answers_that_the_metric_did_not_measure_are_not_used(add):
    right = [True] * 6 + [False] * 4
    for seed in range(2):
        add("lora", seed, 0.6, right=right)
        add("milora", seed, 0.7 + seed / 10, right=right)  # of the first of several arrangements
    (row,) = [row for row in build_comparison([add.outputs], baseline="lora").sections[0].rows if row.difference]
    assert row.difference.examples is None


def test_two_single_runs_are_compared_by_mcnemar(add):
    first, second = [True] * 30 + [False] * 10, [True] * 22 + [False] * 8 + [True] * 1 + [False] * 9
    add("lora", 0, fmean(second), right=second)
    add("milora", 0, fmean(first), right=first)
    comparison = build_comparison([add.outputs], baseline="lora")
    (row,) = [row for row in comparison.sections[0].rows if row.difference]
    assert row.difference.p_value == pytest.approx(scipy.stats.binomtest(8, 9).pvalue)
    assert row.difference.low < row.difference.mean == pytest.approx(7 / 40)
    assert "McNemar's exact test" in formats.markdown(comparison)


def test_holm_counts_the_rows_of_a_section(add):
    for seed, noise in enumerate((0.01, 0.0, -0.01, 0.005)):
        for method, gain in (("lora", 0), ("milora", 0.02 + noise), ("dora", 0.001 * seed)):
            add(method, seed, 0.5 + gain)
    rows = {r.method: r.difference for r in build_comparison([add.outputs], baseline="lora").sections[0].rows}
    tested = [rows["milora"], rows["dora"]]
    assert [d.p_holm for d in tested] == pytest.approx(holm([d.p_value for d in tested]))
    assert min(d.p_holm for d in tested) == pytest.approx(2 * min(d.p_value for d in tested))


def test_the_pareto_front_is_marked(add):
    for method, value, parameters in (("a", 0.9, 400), ("b", 0.8, 100), ("c", 0.7, 200), ("d", 0.9, 400)):
        add(method, 0, value, trainable_parameters=parameters)
    rows = {row.method: row.pareto for row in build_comparison([add.outputs]).sections[0].rows}
    assert {method for method, costs in rows.items() if "trainable" in costs} == {"a", "b", "d"}
