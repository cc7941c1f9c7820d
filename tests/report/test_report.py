"""Tables and plots of runs, from run folders alone."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys

import pytest
from command import reconfigure
from rich.console import Console

from lowrank_cli.report import number_format, path_format, plots, scores, tables
from lowrank_cli.report.end_of_run import end_of_run
from lowrank_cli.runs import Run

CHOICES = {"method": "milora", "model": "llama", "task": "tiny_yesno"}
METRICS = {
    "dev/loss": 0.25,
    "test/accuracy": 0.9125,
    "dev/accuracy": 0.9,
    "trainable_parameters": 262_144,
    "activated_parameters": 81_920,
    "total_parameters": 3_600_000,
    "test/examples": 512,
    "best_step": 20,
    "train/steps": 30,
    "train/seconds": 112.0,
    "train/tokens_per_second": 12_345.0,
    "milora/load_balance": 1.5,
}


@pytest.fixture
def make(tmp_path):
    def make(name="a", stage="train", overrides=(), choices=CHOICES, seed=1):
        config = {"seed": seed, "score": {}}
        return Run.create(
            tmp_path, stage=stage, config=config, choices=choices, overrides=list(overrides), command="lrk",
            folder=tmp_path / name,
        )  # fmt: skip

    return make


def text(renderable, width=100):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable, crop=False)
    return console.file.getvalue()


@pytest.mark.parametrize(
    "show, value, expected",
    [
        (number_format.count, 0, "0"),
        (number_format.count, 999, "999"),
        (number_format.count, 1000, "1k"),
        (number_format.count, 262_144, "262k"),
        (number_format.count, 999_999, "1M"),
        (number_format.count, 3_600_000, "3.6M"),
        (number_format.count, 6_738_415_616, "6.74B"),
        (number_format.count, 81_920.5, "81.9k"),
        (number_format.size, 512, "512 B"),
        (number_format.size, 1023 * 1024, "1023 KiB"),
        (number_format.size, 612 * 2**20, "612 MiB"),
        (number_format.size, 1.5 * 2**30, "1.5 GiB"),
        (number_format.duration, 0.42, "0.42s"),
        (number_format.duration, 12.34, "12.3s"),
        (number_format.duration, 59.97, "1m 00s"),
        (number_format.duration, 112, "1m 52s"),
        (number_format.duration, 3599.6, "1h 00m"),
        (number_format.duration, 7500, "2h 05m"),
        (number_format.duration, 273_600, "3d 04h"),
        (number_format.number, 0.91254, "0.9125"),
        (number_format.number, 65.318, "65.32"),
        (number_format.number, 3.2e-5, "3.2e-05"),
        (number_format.number, 7, "7"),
        (number_format.number, math.nan, "nan"),
    ],
)
def test_human_formats(show, value, expected):
    assert show(value) == expected


def test_end_of_a_training_says_what_was_learned_and_what_comes_next(make):
    run = make()
    run.file("adapter/x").write_text("")
    run.finish(METRICS)
    run.update(seconds=150.0)
    lines = text(end_of_run(run)).splitlines()
    shown = {" ".join(line.strip("│ ").split()) for line in lines}
    assert "train · milora · llama · tiny_yesno · seed 1" in lines[0]
    assert {
        "test accuracy 0.9125 (512 examples)",
        "dev loss 0.2500 (best at step 20 of 30)",
        "trainable parameters 262k (7.28 % of 3.6M)",
        "activated parameters 81.9k (2.28 % of 3.6M)",
        "train time 1m 52s (12.3k tokens/s)",
        "time from start to end 2m 30s",
        "milora/load_balance 1.5000",
        "holds adapter/",
    } <= shown
    narrow = text(end_of_run(run), width=40).splitlines()
    assert f"  folder: {path_format.shown(run.path)}" in narrow  # whole, to be copied
    assert f"  next: lrk evaluate run={path_format.shown(run.path)}" in narrow


def test_end_of_an_evaluation_and_of_a_failure(make):
    evaluation = make("e", stage="evaluate")
    evaluation.finish({"test/exact_match": 0.5, "evaluate/seconds": 3.0})
    shown = text(end_of_run(evaluation), width=300)
    assert "test exact match" in shown and "3.00s" in shown and "lrk compare" in shown
    failed = make("f")
    failed.fail("train: the loss is nan at step [3]")
    shown = text(end_of_run(failed), width=300)
    assert "the loss is nan at step [3]" in shown and f"lrk train --resume {path_format.shown(failed.path)}" in shown


def test_how_answers_were_asked_for_is_shown_where_not_plainly(make):
    run = make(stage="evaluate")
    run.finish({"test/accuracy": 0.7})
    assert "shots" not in text(end_of_run(run))
    reconfigure(run, evaluate={"shots": 8, "num_beams": 1})
    shown = text(end_of_run(run))
    assert re.search(r"shots +8 ", shown) and "beams" not in shown


def test_results_over_arrangements_are_shown_with_their_spread(make):
    run = make(stage="evaluate")
    run.finish({"test/accuracy": 0.7})
    ways = [(0, 0, 0, 0.5), (0, 0, 1, 0.7), (0, 1, 0, 0.9), (0, 1, 1, 0.7)]
    keys = ("template", "draw", "permutation", "accuracy")
    run.write_json("arrangements.json", [{**dict(zip(keys, way)), "demonstrations": None} for way in ways])
    lines = {line.split()[0]: line.split()[1:] for line in text(end_of_run(run)).splitlines() if line.strip()}
    assert lines["all"] == ["4", "0.7000", "0.1633", "0.5000"]
    assert lines["draws"] == ["2", "0.7000", "0.2828", "0.5000"]
    assert lines["permutations"] == ["2", "0.6000", "0.1414", "0.5000"]
    assert "templates" not in lines


def test_an_older_metrics_file_is_not_shown_for_a_run_that_failed_later(make):
    run = make()
    run.finish(METRICS)
    run.fail("disk full")
    assert "accuracy" not in text(end_of_run(run))


@pytest.mark.parametrize(
    "error, expected",
    [
        ("one\ntwo", "one"),
        ('Traceback (most recent call last):\n  File "x"\nValueError: bad', "ValueError: bad"),
        ("", "–"),
        (None, "–"),
    ],
)
def test_first_line_of_an_error(error, expected):
    assert tables.first_line(error) == expected


def test_runs_table_names_every_run_at_80_columns(make):
    assert "lrk train" in text(tables.runs_table([], {}))
    done, failed = make("120000-milora-llama-tiny_yesno"), make("120001-lora")
    done.finish(METRICS)
    failed.fail("no space left")
    shown = text(tables.runs_table([done, failed], {}), width=80)
    for piece in ("120001-lora", "0.9125", "failed", "no space left"):
        assert piece in shown


def test_jobs_table_shows_what_varies_and_each_error(make):
    jobs = []
    for i, rank in enumerate((4, 8, 16)):
        overrides = ["task=tiny_yesno", f"method.rank={rank}", "method.target_modules=[Q,V]"]
        jobs.append(make(str(i), overrides=overrides))
    for job in jobs[:2]:
        job.finish(METRICS)
    jobs[2].fail("method.rank: 16 is out of range\nmore")
    lines = text(tables.jobs_table(jobs)).splitlines()
    assert lines[0].strip() == "3 jobs, 1 not done"
    assert lines[1].split() == ["job", "method.rank", "status", "test/accuracy", "dev/accuracy", "time"]
    assert [line.split()[:4] for line in lines[2:5]] == [
        ["0", "4", "done", "0.9125"],
        ["1", "8", "done", "0.9125"],
        ["2", "16", "failed", "–"],
    ]
    assert lines[5] == "2: method.rank: 16 is out of range"
    narrow = text(tables.jobs_table(jobs), width=50).splitlines()
    assert narrow[1].split() == ["method.", "test/", "dev/"]
    assert narrow[2].split() == ["job", "rank", "status", "accuracy", "accuracy", "time"]
    shown = text(tables.jobs_table([make("b", overrides=["a=[Q,V]"]), make("c", overrides=["a=[K]"])]))
    assert "[Q,V]" in shown  # an override's brackets are no markup


def test_stages_table_shows_stages_that_wait(make):
    run = make()
    run.finish(METRICS)
    shown = text(tables.stages_table([("fit", run), ("check", None)], "milora"), width=200)
    assert "test/accuracy 0.9125, dev/accuracy 0.9000" in shown
    assert "waiting" in shown and "milora" in shown


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_path_and_no_job_is_folded(make, width):
    names = [f"120000-sweep/1234abc{i}-milora-learning_rate0.00{i}-rank8-seed{i}-and-more-words" for i in (1, 2)]
    runs = [make(name, overrides=[f"train.learning_rate=0.00{name[20]}"]) for name in names]
    for run in runs:
        run.finish(METRICS)
    folder = f"{path_format.shown(runs[0].path.parent)}/"
    for table in (
        tables.runs_table(runs, {}),
        tables.jobs_table(runs),
        tables.stages_table([("fit", runs[0])], folder),
    ):
        shown = text(table, width)
        assert runs[0].path.name in shown.split() and "0.9125" in shown.replace(",", "").split()
    assert folder in text(tables.runs_table(runs, {}), width).split()
    assert folder in text(tables.stages_table([], folder), width).split()
    short = make("120001-sweep/1234abcd-milora-seed1")
    assert all(len(line) <= 80 for line in text(tables.jobs_table([short]), 80).splitlines())


HEATMAP = {
    "file": "activated_modules.png",
    "kind": "heatmap",
    "title": "Share of prompts",
    "rows": ["layer 0", "layer 1"],
    "columns": ["Q", "K", "V"],
    "values": [[0.1, None, 0.9], [0.0, math.nan, 1.0]],
    "label": "share",
}


def picture_size(path):
    """Width and height in pixels from a PNG's header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5000
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_draw_writes_the_losses_and_each_figure(make, pictures):
    run = make()
    for step in range(1, 151):
        run.log({"step": step, "train/loss": 2 / step, "learning_rate": 1e-3 * (1 - step / 150)})
        if step % 50 == 0:
            run.log({"step": step, "dev/loss": 2 / step + 0.1})
    lines = {**HEATMAP, "file": "ranks.png", "kind": "lines", "columns": [10, 20, 30], "column_label": "step"}
    run.write_json("figures.json", [HEATMAP, lines])
    files = plots.draw(run)
    assert [file.name for file in files] == ["loss.png", "activated_modules.png", "ranks.png"]
    assert all(file.parent == run.path.resolve() / "plots" for file in files)
    width, height = picture_size(files[0])
    assert 900 < width < 1400 and 500 < height < 900
    assert all(min(picture_size(file)) > 200 for file in files)


@pytest.mark.parametrize(
    "history",
    [
        [{"step": 1, "train/loss": 2.0}],
        [{"step": s, "train/loss": math.nan, "learning_rate": 0.0} for s in (1, 2)]
        + [{"step": 2, "dev/loss": math.nan}],
        [{"step": s, "train/loss": math.nan if s % 7 == 0 else 1.0, "learning_rate": math.nan} for s in range(200)],
        [{"step": 5, "dev/loss": 1.0}],
    ],
    ids=["one train row, no dev", "only NaN", "some NaN", "no train rows"],
)
def test_losses_are_drawn_from_whatever_there_is(make, history, pictures):
    run = make()
    for row in history:
        run.log(row)
    (file,) = plots.draw(run)
    picture_size(file)


def test_the_best_dev_step_is_marked():
    history = [{"step": s, "train/loss": 1.0, "dev/loss": v} for s, v in ((1, 3.0), (2, 1.5), (3, 2.0))]
    legends = plots.loss(history, "").axes[0].get_legend().get_texts()
    assert "best dev: 1.5 at step 2" in [entry.get_text() for entry in legends]


@pytest.mark.parametrize(
    "losses, marker, scale",
    [
        ([2.0], "o", "linear"),
        ([2.0, 1.8, 1.5], "o", "linear"),
        ([9.0] + [1.0] * 40, "None", "log"),
        ([9.0] + [0.0] * 9, "o", "linear"),
        ([math.nan, math.nan], "o", "linear"),
    ],
)
def test_the_axes_suit_the_losses(losses, marker, scale):
    figure = plots.loss([{"step": step, "train/loss": value} for step, value in enumerate(losses, 1)], "")
    figure.canvas.draw()
    axes = figure.axes[0]
    assert (axes.get_lines()[0].get_marker(), axes.get_yscale(), axes.get_xlim()[0]) == (marker, scale, 0)
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_nothing_to_draw(make):
    run = make()
    assert plots.draw(run) == []
    assert not (run.path / "plots").exists()


LONG = "Share of 512 prompts that activate a module (k = 2)"


@pytest.mark.parametrize("rows, columns", [(1, 1), (2, 4), (16, 7), (48, 7), (3, 40)])
def test_heatmaps_of_any_shape(rows, columns):
    values = [[(y * columns + x) / (rows * columns) for x in range(columns)] for y in range(rows)]
    figure = plots.heatmap({**HEATMAP, "title": LONG, "rows": range(rows), "columns": range(columns), "values": values})
    figure.canvas.draw()
    assert max(figure.get_size_inches()) < 16
    assert figure.axes[0]._left_title.get_window_extent().x1 <= figure.bbox.width
    texts = len(figure.axes[0].texts)
    assert texts == (rows * columns if rows * columns <= plots.ANNOTATED_CELLS else 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([6.0, 12.0, 0.0], ["6", "12", "0"]),
        ([0.25, 1.0, -3.0], ["0.25", "1.00", "-3.00"]),
        ([250.4, 1.5], ["250", "2"]),
    ],
)
def test_whole_numbers_are_drawn_whole(values, expected):
    entry = {**HEATMAP, "rows": ["Q"], "columns": range(len(values)), "values": [values]}
    panels = {**entry, "kind": "heatmaps", "panels": [{"title": "start", "values": [values]}]}
    for figure in (plots.heatmap(entry), plots.heatmaps(panels)):
        assert [text.get_text() for text in figure.axes[0].texts] == expected


def test_scores_are_shown_in_their_unit(make):
    run = make(stage="score")
    modules = [
        {"module": "layers.0.q_proj", "layer": 0, "role": "Q", "scores": [0.0, 0.0004]},
        {"module": "layers.0.v_proj", "layer": 0, "role": "V", "scores": [0.25, -0.000004]},
    ]
    run.write_json("scores.json", {"level": "rank", "kind": "ab", "modules": modules})
    assert scores.shown(run) == []
    run.finish({"score/ranks": 4, "score/loss": 0.05})
    says, roles, ranks = (text(part, 200).splitlines() for part in scores.shown(run))
    assert says[0].startswith("ab: dev loss (nats) without the rank") and says[0].endswith("in units of 0.001")
    assert [line.split() for line in roles[2:]] == [
        ["V", "1", "2", "125.0", "0.0", "250.0"],
        ["Q", "1", "2", "0.2", "0.0", "0.4"],
    ]
    assert [line.split()[0] for line in ranks[2:]] == [f"layers.0.{name}_proj" for name in "vqqv"]
    end = text(end_of_run(run))
    assert "scores.json" in end and "loss" in end and "score/" not in end


def test_scores_that_span_decades_keep_their_digits(make):
    """One module is far above the others: these are told apart in tables, cells and colours."""
    run = make(stage="score")
    values = [2.5e-5, 3.25e-9, 7.5e-10, 1e-12, 0.0]
    modules = [{"module": f"{i}.q", "layer": i, "role": "Q", "scores": [value]} for i, value in enumerate(values)]
    run.write_json("scores.json", {"level": "module", "kind": "kl", "modules": modules})
    run.finish({})
    _, _, ends = (text(part, 200).splitlines() for part in scores.shown(run))
    assert [line.split()[-1] for line in ends[2:]] == ["25", "0.00325", "0.00075", "1e-06", "0"]
    figure = plots.heatmap({**HEATMAP, "rows": ["Q"], "columns": range(5), "values": [values], "in_units": True})
    assert [cell.get_text() for cell in figure.axes[0].texts] == ["25", "0.0033", "0.00075", "1e-06", "0"]
    norm = figure.axes[0].images[0].norm
    assert (norm.vmin, norm.vmax) == pytest.approx((1e-6, 25)) and norm(5e-3) == pytest.approx(0.5)
    assert figure.axes[1].get_ylabel() == "share, in units of 1e-06"


def test_colours_of_values_with_both_signs_meet_at_0():
    for values in ([-1.0, 4.0], [-4.0, -1.0]):
        panel = {"title": "start", "values": [values]}
        entry = {**HEATMAP, "rows": ["Q"], "columns": [0, 1], "values": [values], "panels": [panel]}
        for figure in (plots.heatmap(entry), plots.heatmaps(entry)):
            image = figure.axes[0].images[0]
            assert (image.norm.vmin, image.norm.vmax) == (-4, 4)
            assert image.cmap(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.01), "white"


def test_the_unit_leaves_one_to_three_digits_in_front_of_the_point():
    for value, unit in ((0.25, 1e-3), (-1.5, 1.0), (4e-4, 1e-6), (0.0, 1.0), (2000.0, 1e3)):
        assert number_format.unit([0.0, value]) == pytest.approx(unit)


def test_many_lines_and_constant_or_negative_heatmaps():
    plots.lines({**HEATMAP, "rows": range(12), "columns": [0, 1], "values": [[i, 1] for i in range(12)]}).canvas.draw()
    for values in ([[0.0] * 3] * 2, [[-1.0, 2.0, 250.0]] * 2, [[None] * 3] * 2):
        plots.heatmap({**HEATMAP, "values": values}).canvas.draw()


def test_boxes_hold_rows_of_any_length():
    entry = {"title": LONG, "rows": ["all", "draws"], "values": [[0.5, 0.7, 0.9], [0.5]], "label": "accuracy"}
    axes = plots.box(entry).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["all\n(n = 3)", "draws\n(n = 1)"]
    assert axes.get_ylim()[0] < 0.5 < 0.9 < axes.get_ylim()[1]


def test_tables_and_compare_import_nothing_heavy():
    heavy = "torch transformers datasets evaluate matplotlib scipy numpy"
    code = (
        "import sys, lowrank_cli.report.tables, lowrank_cli.report.plots, lowrank_cli.report.compare; "
        f"print([name for name in '{heavy}'.split() if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def ticks(axis) -> list[float]:
    low, high = axis.get_view_interval()
    return [place for place in axis.get_major_locator()() if low <= place <= high]


def test_whole_numbers_have_whole_ticks_and_cells():
    entry = {
        "title": "t",
        "rows": ["a", "b"],
        "columns": [1, 2.0],
        "values": [[3, 4], [4, None]],
        "sizes": [[1, 2]] * 2,
    }
    for figure in (plots.lines(entry), plots.bubbles(entry)):
        assert all(place == int(place) for place in ticks(figure.axes[0].xaxis))
    assert all(place == int(place) for place in ticks(plots.lines(entry).axes[0].yaxis))
    (legend,) = plots.bubbles(entry).legends
    assert [text.get_text() for text in legend.texts][-1] == "2", "areas stand for sizes"
    assert plots.bubbles(entry | {"scale": (0, 9)}).axes[1].get_ylim() == (0, 9), "colours stand for values"
    heatmap = plots.heatmap(entry)
    assert [text.get_text() for text in heatmap.axes[0].texts] == ["3", "4", "4", "–"]
    assert all(place == int(place) for place in ticks(heatmap.axes[1].yaxis))
    shares = plots.heatmap(entry | {"values": [[0.5, 1.0], [0.25, 0.0]]})
    assert [text.get_text() for text in shares.axes[0].texts] == ["0.50", "1.00", "0.25", "0.00"]
    assert any(place != int(place) for place in ticks(plots.lines(entry | {"columns": [0.5, 1.0]}).axes[0].xaxis))


def test_numbers_that_double_stand_at_equal_distances_and_intervals_side_by_side():
    entry = {"title": "", "rows": ["a", "b", "c"], "columns": [1, 2, 4, 8], "values": [[0.5] * 4] * 3}
    entry |= {"low": [[0.4] * 4] * 3, "high": [[0.6] * 4] * 3}
    axes = plots.lines(entry).axes[0]
    axes.figure.canvas.draw()
    assert axes.get_xscale() == "log" and [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4", "8"]
    at_two = [line.get_xdata()[1] for line in axes.get_lines()]
    assert at_two[0] < at_two[1] == 2 < at_two[2]
    assert len(axes.collections) == 3  # the intervals
    assert plots.lines(entry | {"columns": [1, 2, 3, 5]}).axes[0].get_xscale() == "linear"


def test_a_narrow_box_plot_has_its_whole_title():
    title = "test accuracy over 10 arrangements of demonstrations"
    figure = plots.box({"title": title, "rows": ["all"], "values": [[0.5, 0.7]]})
    figure.canvas.draw()
    assert figure.axes[0].get_title(loc="left").replace("\n", " ") == title
    assert figure.axes[0]._left_title.get_window_extent().x1 <= figure.bbox.x1
