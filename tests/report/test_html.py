"""``lrk report``: what the page says, that it is escaped and needs no network, and that broken folders do no harm."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import chromium
import pytest
from command import one_line
from study_folder import ARMS, BASELINE, make_run, make_study

from lowrank_cli.errors import UserError
from lowrank_cli.report.html import page, predictions
from lowrank_cli.report.html.charts import figures, history
from lowrank_cli.report.html.charts.svg import Axis

GIVEN = Path(__file__).resolve().parents[1] / "golden"
HOSTILE = "</script><script>alert(1)</script><img src=http://evil/x onerror=alert(2)>\x1b[31m\u202e"
HEATMAP = {
    "file": "ranks.png",
    "kind": "heatmap",
    "title": "Ranks of each module",
    "rows": ["Q", "K"],
    "columns": [0, 1, 2],
    "values": [[8.0, 4.0, 0.0], [None, 12.0, 6.0]],
    "label": "rank",
    "column_label": "layer",
}


@dataclass
class Parsed(HTMLParser):
    """A page, taken apart."""

    html: str
    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self):
        super().__init__()
        self._open = []
        self.feed(self.html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, {name: value or "" for name, value in attributes}))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        if inside in ("script", "style"):
            (self.scripts if inside == "script" else self.styles).append(data)
        else:
            self.text += data

    def attributes(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]

    def answers(self):
        """The rows of each browser of predictions."""
        return [json.loads(text) for text in self.scripts if text.startswith("[")]


def written(paths, baseline=None, output=None):
    return Parsed(page.write([str(path) for path in paths], baseline, output, "outputs").read_text())


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", "lora", "tiny_yesno", 0, [0.1, 0.5, 0.95, 0.99], [HEATMAP])


def test_page_of_a_run_has_its_settings_metrics_curves_figures_and_answers(run):
    parsed = written([run.path])
    for text in ("method=lora", "lora", "seed", "Every key", "test/accuracy", "108k", "torch"):
        assert text in parsed.text or text == "Every key"
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", parsed.html)
    assert titles == ["Loss", "Learning rate", "Ranks of each module"]
    assert "Q, layer 1\n4" in parsed.attributes("data-tip")
    (rows,) = parsed.answers()
    assert [row[0] for row in rows] == [0, 1, 2, 3]
    assert {row[4] for row in rows} == {True, False}
    assert "./predictions.jsonl" in parsed.attributes("href")


def test_nothing_is_loaded_and_only_the_pages_own_script_may_run(run):
    parsed = written([run.path])
    assert not parsed.attributes("src") and not parsed.attributes("style")
    assert all(not re.match(r"[a-z]+:|//", link) for link in parsed.attributes("href"))
    assert "@import" not in parsed.html and "url(" not in parsed.html
    (policy,) = [tag["content"] for _, tag in parsed.tags if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    for kind, (text,) in (("style-src", parsed.styles), ("script-src", parsed.scripts[-1:])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}';" in policy


def test_text_of_a_run_is_never_markup(run):
    entry = {**HEATMAP, "title": HOSTILE, "rows": [HOSTILE, "K"], "label": HOSTILE, "column_label": HOSTILE}
    every = [entry, {**entry, "kind": "heatmaps", "panels": [{"title": HOSTILE, "values": HEATMAP["values"]}]}]
    every.append({**entry, "kind": "lines"})
    run.write_json("figures.json", every)
    answer = {"prompt": HOSTILE, "prediction": HOSTILE, "references": [HOSTILE]}
    run.write_text("predictions.jsonl", json.dumps(answer) + "\n")
    run.write_json("metrics.json", {f"test/{HOSTILE}": 1.0})
    run.update(
        command=HOSTILE, error=HOSTILE, overrides=[f"name={HOSTILE}"], model=HOSTILE, packages={HOSTILE: HOSTILE},
        device=HOSTILE, choices={"method": HOSTILE, "model": HOSTILE, "task": HOSTILE},
    )  # fmt: skip
    run.log({"step": 1, HOSTILE: 1.0})
    run.log({"step": 2, HOSTILE: 2.0})
    parsed = written([run.path])
    assert "img" not in {tag for tag, _ in parsed.tags}
    assert [tag for tag, _ in parsed.tags].count("script") == 2, "the answers and the page's own"
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert "\x1b" not in parsed.html and "\u202e" not in parsed.html
    ((row,),) = parsed.answers()
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert row[1:4] == [shown, shown, shown] and row[4] is True
    assert parsed.text.count("alert(1)") > 8


def test_folders_are_linked_by_relative_paths(tmp_path):
    for name in ("javascript:alert(1)", 'a "b" #?&<'):
        made = tmp_path / "all" / name
        make_run(made, "lora", "tiny_yesno", len(name), [0.5])
    parsed = written([tmp_path / "all"], output=str(tmp_path / "page.html"))
    links = [link for link in parsed.attributes("href") if link.endswith("/")]
    assert links == ["all/a%20%22b%22%20%23%3F%26%3C/", "all/javascript%3Aalert%281%29/"]


@pytest.mark.parametrize(
    "record, right",
    [
        ({"prediction": "yes", "label": 1, "choice": 1, "references": ["yes"]}, True),
        ({"prediction": "yes", "label": 0, "choice": 1, "references": ["no"]}, False),
        ({"prediction": " Yes  sir", "references": ["no", "yes sir"]}, True),
        ({"prediction": "maybe", "references": ["no", "yes"]}, False),
        ({"prediction": "3", "references": ["three"], "correct": True}, True),
        ({"prediction": None, "references": ["None"]}, False),
    ],
)
def test_an_answer_is_right_by_its_choice_or_a_reference(run, record, right):
    run.write_text("predictions.jsonl", json.dumps({"prompt": "Is it?", **record}) + "\n")
    (row,) = predictions.rows(run, {"test/accuracy": 1.0})
    assert row[3:] == (" | ".join(record["references"]), right)
    graded = predictions.rows(run, {"test/rouge_l": 1.0})[0][4]
    noted = record.get("correct", right if "choice" in record else None)
    assert graded is noted, "without a note or a choice, such a metric has no right and wrong"


def test_a_page_holds_so_many_answers_and_says_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "ANSWERS", 3)
    for seed in (0, 1, 2):
        make_run(tmp_path / str(seed), "lora", "tiny_yesno", seed, [0.1, 0.9])
    parsed = written([tmp_path])
    assert [len(rows) for rows in parsed.answers()] == [2, 1]
    assert "Here are the first 1 of 2 answers" in parsed.text
    assert "2 answers are in predictions.jsonl; this page is full." in parsed.text


def test_each_kind_of_figure_shows_its_values():
    table = {**HEATMAP, "columns": [1, 2, 4], "low": [[7.0, 3, 0], [0, 11, 5]], "high": [[9.0, 5, 1], [1, 13, 7]]}
    marks = {
        "heatmap": 6,
        "heatmaps": 6,
        "lines": 5,
        "bubbles": 5 + 2,
        "bars": 5 + 2,
        "box": 2 * 2 + 5 + 2,
    }
    extra = {"panels": [{"title": "start", "values": table["values"]}], "sizes": [[1.0, 2, 3], [4, 5, 6]]}
    for kind, number in marks.items():
        drawn = figures.chart({**table, **extra, "kind": kind})
        assert sum(drawing.count("data-tip") for _, drawing in drawn.drawings) == number, kind
        assert "nan" not in str(drawn.drawings)


@pytest.mark.parametrize(
    "change",
    [
        {"values": [[1.0]]},
        {"values": None},
        {"kind": "lines", "columns": ["a", "b", "c"]},
        {"kind": "bars"},
        {"kind": "lines", "values": [[1e308, -1e308, 0.0]] * 2},
        {"scale": [1, 1]},
    ],
)
def test_figures_that_do_not_fit_are_one_line(change):
    with pytest.raises(UserError, match=r"figures.json: 'ranks.png' cannot be drawn"):
        figures.chart({**HEATMAP, **change})


def test_long_histories_are_thinned_and_their_last_point_stays():
    rows = [{"step": step, "train/loss": 1 / step, "learning_rate": 1e-3} for step in range(1, 1001)]
    loss, rate = history.charts(rows)
    tips = re.findall(r'data-tip="step (\d+)', loss.drawings[0][1])
    assert len(tips) == history.POINTS and tips[-1] == "1000"
    assert loss.legend == [("train, smoothed", "s0")] and rate.title == "Learning rate"


@pytest.mark.parametrize("values", [[math.nan, 1.0], [None, 2.0], [0.0, 0.0], [-1.0, 5.0], [1e-12, 1e12]])
def test_losses_that_are_missing_or_extreme_are_drawn(values):
    rows = [{"step": step, "train/loss": value, "dev/loss": value} for step, value in enumerate(values)]
    (chart,) = history.charts(rows)
    assert "nan" not in chart.drawings[0][1]


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.71, 0.9, ["0.75", "0.80", "0.85", "0.90"]),
        (0, 8, ["0", "2", "4", "6", "8"]),
        (0, 200_000, ["0", "5e+04", "1e+05", "1.5e+05", "2e+05"]),
    ],
)
def test_ticks_are_round_and_agree_in_decimals(low, high, expected):
    assert [text for _, text in Axis("loss", low, high).ticks()] == expected


def test_ticks_between_whole_numbers_are_whole():
    assert [text for _, text in Axis.over("step", [0, 3]).ticks()] == ["0", "1", "2", "3"]
    assert [text for _, text in Axis.over("step", [0, 3.5]).ticks()][:2] == ["0", "1"]
    assert [text for _, text in Axis.over("loss", [0, 0.5]).ticks()][1] == "0.1"


def test_logarithmic_ticks_lie_in_the_range():
    for low, high in ((0.02, 5), (1e-4, 3e-3), (1, 1e9), (3.1, 3.3)):
        places = [place for place, _ in Axis("loss", low, high, log=True).ticks()]
        assert places == sorted(places) and 2 <= len(places) <= 9
        assert low * 0.999 <= places[0] and places[-1] <= high * 1.001


def test_broken_runs_are_a_line_each(tmp_path):
    shutil.copytree(GIVEN / "given" / "broken_runs", tmp_path / "broken")
    make_run(tmp_path / "broken" / "good", "lora", "tiny_yesno", 0, [0.5, 0.9])
    make_run(tmp_path / "broken" / "cut", "lora", "tiny_yesno", 1, [0.5, 0.9])
    (tmp_path / "broken" / "cut" / "predictions.jsonl").write_text('{"prompt": 1}\n')
    (tmp_path / "broken" / "cut" / "history.jsonl").write_text('{"step": "one"}\n')
    (tmp_path / "broken" / "gone").mkdir()
    (tmp_path / "broken" / "gone" / "run.json").write_text("{")
    parsed = written([tmp_path / "broken"])
    assert "gone/run.json cannot be read as JSON" in parsed.text
    assert "cut/predictions.jsonl, line 1: prompt is 1; expected text" in parsed.text
    assert "cut/history.jsonl, line 1: step is 'one'; expected a whole number, 0 or more" in parsed.text
    assert "altered/config.yaml: it was altered after the run began" in parsed.text
    assert str(tmp_path) not in parsed.text, "a published page does not tell where it was made"


@pytest.mark.parametrize("name", ["idaicl", "lora", "recipe", "sweep", "unfinished"])
def test_recorded_runs_can_be_read(tmp_path, name):
    shutil.copytree(GIVEN / "runs" / name, tmp_path / name)
    parsed = written([tmp_path / name])
    assert "cannot be drawn" not in parsed.text
    assert not [tag for tag in parsed.attributes("class") if tag == "status broken"]


def test_unequal_budgets_are_named(tmp_path):
    folder = make_study(tmp_path / "study", arms=["lora", "dora"], tasks=["tiny_yesno"], seeds=[0])
    assert "different numbers" not in written([folder]).text
    tuning = json.loads((folder / "tuning.json").read_text())
    tuning[1]["trials"] = tuning[1]["trials"][1:]
    (folder / "tuning.json").write_text(json.dumps(tuning))
    assert "tiny_yesno: the arms had different numbers of trials: lora 4, dora 3." in written([folder]).text


def test_a_study_of_one_seed_says_so(tmp_path):
    folder = make_study(tmp_path / "study", tasks=["tiny_yesno"], seeds=[0], examples=600)
    (folder / "runs/llama/tiny_yesno/lora_fa/0/predictions.jsonl").unlink()
    text = " ".join(written([folder]).text.split())
    assert re.search(r"rslora is better by 0\.\d+ with the one seed that was compared \(95 % interval", text)
    assert "no test is possible for lora_fa (one seed, or no spread)" in text
    assert "no difference found for lora_fa" not in text


def test_a_study_is_summarised_compared_and_linked(tmp_path):
    folder = make_study(tmp_path / "study", examples=150)
    shutil.rmtree(folder / "runs" / "llama" / "tiny_yesno" / "dora" / "3")
    parsed = written([folder])
    text = " ".join(parsed.text.split())
    assert "4 arms, 2 tasks, 5 seeds; baseline lora; runs: 39 done, 1 pending" in text
    assert re.search(r"Against lora: rslora is better by 0\.\d+ \(95 % interval \+0\.\d+ to \+0\.\d+\)", text)
    assert re.search(r"no difference found for dora; one of 0\.\d+ would have been found with 80 % power", text)
    assert "lora_fa on tiny_yesno: the best train.learning_rate, 0.003, is at the upper end of the search" in text
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", parsed.html)
    for title in ("Every seed", f"Difference from {BASELINE}", "test/accuracy against cost"):
        assert titles.count(title) == 2, "one for each task"
    assert titles.count("tiny_yesno") == 1, "its tuning"
    cells = len(ARMS) * 2 * 5
    assert parsed.attributes("class").count("run") == cells
    links = {link for link in parsed.attributes("href") if link.startswith("runs/") and link.endswith("/")}
    assert len(links) == cells and "runs/llama/tiny_yesno/dora/3/" in links


def test_a_study_that_has_only_begun_lists_its_runs(tmp_path):
    folder = make_study(tmp_path / "study", arms=("lora", "dora"), tasks=("tiny_yesno",), seeds=(0, 1))
    shutil.rmtree(folder / "runs")
    (folder / "tuning.json").write_text("[{}]")
    parsed = written([folder])
    assert "runs: 4 pending" in parsed.text
    assert "tuning.json: [0].group is missing" in parsed.text


def test_failed_trials_are_counted(tmp_path):
    folder = make_study(tmp_path / "study", arms=("lora",), tasks=("tiny_yesno",), seeds=(0,), examples=2)
    (entry,) = json.loads((folder / "tuning.json").read_text())
    for trial in entry["trials"]:
        trial["mean"] = None
    (folder / "tuning.json").write_text(json.dumps([entry | {"best": None, "at_edge": {}}]))
    assert "lora on tiny_yesno: every trial failed." in written([folder]).text


def test_a_study_of_an_earlier_version_named_no_ends(tmp_path):
    folder = make_study(tmp_path / "study", arms=("lora",), tasks=("tiny_yesno",), seeds=(0,), examples=2)
    (entry,) = json.loads((folder / "tuning.json").read_text())
    (folder / "tuning.json").write_text(json.dumps([entry | {"at_edge": ["train.learning_rate"]}]))
    assert "is at the outer end of the search" in " ".join(written([folder]).text.split())


def test_several_folders_make_one_page_here(lrk, tmp_path, monkeypatch):
    for seed in (0, 1):
        make_run(tmp_path / "runs" / str(seed), "lora", "tiny_yesno", seed, [0.2, 0.9])
    ended = lrk("report", str(tmp_path / "runs" / "0"))
    assert ended.code == 0 and (tmp_path / "runs" / "0" / "report.html").is_file()
    monkeypatch.chdir(tmp_path)
    ended = lrk("report", "runs/0", "runs/1", "--baseline", "lora")
    assert (ended.code, ended.out) == (0, "report: report.html\n")
    assert "2 done" in Parsed(Path("report.html").read_text()).text
    assert lrk("report", "runs/1", "--output", "one.html").out == "report: one.html\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "report: there is no folder 'nothing'; did you mean 'other'?"),
        (["empty"], "report: there are no runs in empty (a run has a run.json)"),
        (["run", "--output", "empty"], "--output: 'empty' is a folder; name a file, such as empty/report.html"),
        (["run", "--output", "no/page.html"], "--output: there is no folder 'no'"),
        (["run", "--baseline", "dora"], None),
        (
            ["run", "other", "--baseline", "dor"],
            "--baseline: unknown value 'dor'; did you mean 'dora'? (allowed: lora, dora)",
        ),
        ([], "report: there is no folder 'latest'"),
    ],
)
def test_mistakes_are_one_line(lrk, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    make_run(tmp_path / "run", "lora", "tiny_yesno", 0, [0.5])
    make_run(tmp_path / "other", "dora", "tiny_yesno", 0, [0.5])
    ended = lrk("report", *arguments)
    if message is None:
        assert ended.code == 0, "one run is not compared"
    else:
        assert one_line(ended) == message


@pytest.mark.skipif(chromium.PROGRAM is None, reason="LRK_BROWSER names no Chromium (LRK_BROWSER=chromium)")
@pytest.mark.slow
def test_a_browser_shows_filters_and_switches(tmp_path):
    difficulty = [index / 40 for index in range(40)]
    run = make_run(tmp_path / "run", "lora", "tiny_yesno", 0, difficulty, [HEATMAP])
    file = page.write([str(run.path)], None, None, "outputs")
    with chromium.Browser() as browser:
        browser.open(file)
        shown = "document.querySelectorAll('.answers tbody tr').length"
        assert browser.run(shown) == 20, "one page"
        browser.run("[...document.querySelectorAll('button')].find(b => b.textContent.startsWith('Wrong')).click()")
        wrong = browser.run(shown)
        assert 0 < wrong < 20 and browser.run("document.querySelectorAll('.answers .wrong').length") == wrong
        browser.run("[...document.querySelectorAll('button')].find(b => b.textContent.startsWith('All')).click()")
        browser.run("[...document.querySelectorAll('button')].find(b => b.textContent == 'Next').click()")
        assert browser.run("document.querySelector('.tools .count').textContent") == "21–40 of 40"
        browser.run(
            "{const i = document.querySelector('input'); i.value = 'ZORP 7 '; i.dispatchEvent(new Event('input'))}"
        )
        assert browser.run(shown) == 1 and browser.run("document.querySelector('mark').textContent") == "zorp 7 "

        browser.run("document.querySelector('rect[data-tip]').scrollIntoView({block: 'center'})")
        x, y = browser.run("(({x, y}) => [x, y])(document.querySelector('rect[data-tip]').getBoundingClientRect())")
        browser.move(x + 5, y + 5)
        assert browser.run("document.getElementById('tip').textContent") == "Q, layer 0\n8"
        browser.run("document.querySelector('svg.chart').focus()")
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
        assert browser.run("document.getElementById('tip').textContent").startswith("step 10\ntrain loss")

        colour = "getComputedStyle(document.body).backgroundColor"
        seen = {browser.run(colour)}
        for name in ("light", "dark"):
            browser.run("document.getElementById('theme').click()")
            assert browser.run("document.documentElement.dataset.theme") == name
            seen.add(browser.run(colour))
        assert len(seen) == 2, "light and dark"
        assert browser.loads == [file.resolve().as_uri()] and browser.complaints == []
