"""ALoRA: which ranks go, who gets new ones, and when; the trainer that follows."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import torch
from ablations import dev_batch
from forked import forked_workers

from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.ranks import rebuild
from lowrank_cli.errors import UserError
from lowrank_cli.launch import single_run
from lowrank_cli.methods.alora import count_pruned, describe_round, reallocated
from lowrank_cli.runs import Run
from lowrank_cli.scoring.probe import Probe
from lowrank_cli.scoring.rank_scores import Scores, score

#: The paper's schedule.
SETTINGS = {"first_epochs": 1.0, "round_epochs": 0.25, "settle": 1.0, "tokens": 4096}
adapted, method_with = partial(small.adapted, "alora", **SETTINGS), partial(small.method, "alora", **SETTINGS)
LIMITS = dict.fromkeys("abcd", 100)


def step(adapter, number, *, epoch=4, total=100, rows=None, lines=None):
    """What the trainer hands over after step ``number``."""
    optimizer = torch.optim.AdamW(adapter.trained.values(), lr=1e-3)
    return SimpleNamespace(
        number=number,
        total=total,
        epoch=epoch,
        adapter=adapter,
        optimizer=optimizer,
        probe=lambda size, tokens: Probe(dev_batch("llama"), tokens),
        log=(rows if rows is not None else []).append,
        say=(lines if lines is not None else []).append,
        watch=lambda name, units: nullcontext(lambda done: None),
    )


# ------------------------------------------------------------------------------------------------ one round


def test_eight_ranks_for_three_modules_are_three_three_two():
    """The paper's example: as evenly as possible, the remainder to the modules of highest mean importance."""
    scores = {"a": [0.1] * 9, "b": [5.0, 5.0], "c": [7.0, 7.0], "d": [6.0, 6.0]}
    plan = reallocated(scores, LIMITS, 8)
    assert plan == {"a": ([8], 0), "b": ([0, 1], 2), "c": ([0, 1], 3), "d": ([0, 1], 3)}


def test_the_lowest_of_the_model_go():
    plan = reallocated({"a": [3.0, 1.0, 4.0], "b": [2.0, 9.0], "c": [8.0]}, LIMITS, 2)
    assert plan == {"a": ([0, 2], 0), "b": ([1], 0), "c": ([0], 2)}


def test_nothing_is_added_where_every_module_lost_a_rank():
    plan = reallocated({"a": [0.0, 5.0], "b": [0.0, 5.0]}, LIMITS, 2)
    assert plan == {"a": ([1], 0), "b": ([1], 0)}


def test_a_module_may_lose_everything_and_none_outgrows_its_matrix():
    plan = reallocated({"a": [0.0, 0.0], "b": [5.0], "c": [4.0]}, {"a": 9, "b": 1, "c": 9}, 2)
    assert plan == {"a": ([], 0), "b": ([0], 0), "c": ([0], 2)}


def test_a_round_prunes_the_lowest_scores_and_changes_the_function_by_them_only():
    adapter = adapted()
    method = method_with()
    method.adapt(small.model())  # its settings, for as many modules
    found = score("ab", adapter, Probe(dev_batch("llama"), 300))
    scores = found.values
    lowest = sorted((value, key, i) for key, row in scores.items() for i, value in enumerate(row))[:14]
    for _, key, i in lowest:
        part = adapter.modules[key]
        part.rank_gate = torch.ones(4) if part.rank_gate is None else part.rank_gate
        part.rank_gate[i] = 0
    expected = adapter.model(input_ids=small.ids()).logits
    for part in adapter.modules.values():
        part.rank_gate = None
    scale = {key: part.scale for key, part in adapter.modules.items()}
    rows = []
    method.after_step(step(adapter, 4, rows=rows))
    torch.testing.assert_close(adapter.model(input_ids=small.ids()).logits, expected, atol=1e-5, rtol=1e-5)
    assert sum(adapter.ranks().values()) == 56 and len(set(adapter.ranks().values())) > 1
    assert scale == {key: part.scale for key, part in adapter.modules.items()}
    assert rows == [{"round": 1, "ranks": adapter.ranks(), "dev_batch_loss": pytest.approx(-found.whole, abs=1e-5)}]


# ------------------------------------------------------------------------------------------------ when


def test_rounds_come_at_k1_and_then_every_k2_until_n_a():
    method = method_with(first_epochs=1.5, round_epochs=0.5, rounds=3, moved=2)
    adapter = method.adapt(small.model())
    with torch.no_grad():
        for part in adapter.modules.values():
            part.lora_b.normal_()
    rows = []
    for number in range(1, 20):
        before = len(rows)
        assert (method.unsettled() is None) == (before > 0)
        method.after_step(step(adapter, number, rows=rows))
        assert (len(rows) > before) == (number in (6, 8, 10))
    metrics, figures = method.observations(adapter, lambda tensor: tensor)
    assert metrics["reallocations"] == 3 and metrics["ranks"] == sum(adapter.ranks().values()) <= 56
    assert [figure["file"] for figure in figures] == ["ranks.png", "allocation.png"]
    assert [panel["title"] for panel in figures[1]["panels"]] == ["start", "step 6", "step 8", "step 10"]
    assert figures[0]["values"] == figures[1]["panels"][-1]["values"]


def test_it_settles_where_the_lowest_ranks_are_those_of_the_round_before():
    """New ranks that nothing has trained add nothing, so they are the next to go, unless a share of them ends it."""
    swinging, settling = (method_with(score="magnitude", settle=settle) for settle in (1.0, 0.5))
    for method in (swinging, settling):
        adapter, rows, lines = method.adapt(small.model()), [], []
        with torch.no_grad():
            for part in adapter.modules.values():
                part.lora_a.normal_(generator=torch.Generator().manual_seed(1))
                part.lora_b.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
        for number in range(4, 8):
            method.after_step(step(adapter, number, rows=rows, lines=lines))
        moves = [row for row in rows if "round" in row]
        assert len(moves) == (4 if method is swinging else 1) and len(lines) == (4 if method is swinging else 2)
    assert rows[-1]["settled"] and rows[-1]["new_among_lowest"] > 7
    assert "lowest ranks are new" in lines[-1]
    metrics, _ = method.observations(adapter, lambda tensor: tensor)
    assert (metrics["reallocations"], metrics["settled_step"]) == (1, 5)
    later = method_with(score="magnitude", settle=0.5)
    later.adapt(small.model())
    later.load_state(adapter, method.state())
    seen = len(rows)
    later.after_step(step(adapter, 8, rows=rows))
    assert len(rows) == seen and int(later.state()["settled"]) == 5  # it does not ask again


def test_a_round_says_what_it_did():
    plan = {"a": ([0], 0), "b": ([0, 1], 1)}
    scores = Scores("ab", {"a": [-1.0, -2.001], "b": [-1.5, -1.75]}, bare=-2.0)
    assert describe_round(plan, scores, {"a": "Q", "b": "V"}) == (
        "1 of 4 ranks pruned, 1 added\n  scores: pruned -0.001 to -0.001, kept up to 1\n  pruned: Q 1\n  added: V 1"
    )
    assert count_pruned(plan, {"a": 2, "b": 2}, {"a": 1}) == (1, 1)
    assert count_pruned(plan, {"a": 2, "b": 2}, {"b": 2}) == (1, 0)


def test_training_that_ends_before_any_round_is_refused():
    method = method_with()
    adapter = method.adapt(small.model())
    with pytest.raises(UserError, match=r"method.first_epochs: 1.0 epochs are 200 steps, but training has 100"):
        method.after_step(step(adapter, 1, epoch=200))
    with pytest.raises(UserError, match=r"method.moved: 56 in a round leaves none of the 56 ranks that there are"):
        adapted(moved=56)
    with pytest.raises(UserError, match=r"method.round_epochs: 0.0 is out of range \(allowed: above 0\)"):
        method_with(round_epochs=0.0).config.validate()


def test_at_rank_1_a_round_moves_half_of_the_ranks():
    method = method_with(rank=1)
    adapter = method.adapt(small.model())
    rows = []
    method.after_step(step(adapter, 4, rows=rows))
    assert sum(adapter.ranks().values()) == 14 and len(adapter.modules) == 7 and len(rows) == 1


@pytest.mark.parametrize("kind", ["dnas", "sensitivity"])
def test_variants_score_otherwise(kind):
    exact, other = adapted(), adapted()
    for adapter, name in ((exact, "ab"), (other, kind)):
        method = method_with(score=name)
        method.adapt(small.model())
        method.after_step(step(adapter, 4))
    assert exact.ranks() != other.ranks()


def test_auto_scores_by_what_training_affords_and_says_so():
    """The longer the training, the better the scores of each round: taylor, mixed, exact."""
    kinds = []
    for tokens in (3_000, 20_000, 10**6):
        adapter, rows, lines = adapted(), [], []
        method = method_with(score="auto", window=0.2, rounds=2)
        method.adapt(small.model())
        now = step(adapter, 4, rows=rows, lines=lines)
        now.tokens = tokens
        method.after_step(now)
        assert rows[0]["score"] in rows[0]["reason"] and lines[0] == rows[0]["reason"]
        assert "2 scorings cost" in lines[0]
        kinds.append(rows[0]["score"])
        chosen, named = adapter.ranks(), adapted()
        method_with(score=kinds[-1], window=0.2).after_step(step(named, 4))
        assert named.ranks() == chosen
    assert kinds == ["taylor", "mixed", "ab"]


@pytest.mark.parametrize("window", [0.0, -0.1, 1.5, float("nan")])
def test_a_window_is_a_share(window):
    with pytest.raises(UserError, match=rf"^method.window: {window} is out of range \(allowed: above 0 to 1\)$"):
        method_with(window=window).config.validate()


def test_its_state_continues_between_rounds():
    method, later = method_with(), method_with()
    adapter = method.adapt(small.model())
    later.adapt(small.model())
    method.after_step(step(adapter, 4))
    later.load_state(adapter, method.state())
    assert not later.unsettled() and later.observations(adapter, None) == method.observations(adapter, None)


def test_a_trajectory_starts_from_what_was_loaded():
    """``lrk train run=FOLDER``: an earlier run has moved ranks already."""
    method = method_with()
    adapter = method.adapt(small.model())
    rebuild(adapter, dict.fromkeys(list(adapter.sites)[:-1], 3), "here")
    method.after_step(step(adapter, 4))
    start, after = method.state()["allocations"].tolist()
    assert start == [3] * 13 + [0] and after == [adapter.ranks().get(key, 0) for key in adapter.sites]


@pytest.mark.parametrize(("modules", "rank", "pruned"), [(5, 3, 5), (3, 1, 1)])
def test_a_round_moves_as_many_ranks_as_a_pruned_adapter_has_modules_at_most_half(modules, rank, pruned):
    method = method_with(score="magnitude", settle=1.0)
    adapter, lines = method.adapt(small.model()), []
    rebuild(adapter, dict.fromkeys(list(adapter.sites)[:modules], rank), "here")
    with torch.no_grad():
        for part in adapter.modules.values():
            part.lora_b.normal_()
    method.after_step(step(adapter, 1, lines=lines))
    method.after_step(step(adapter, 4, lines=lines))
    assert f"{pruned} of {modules * rank} ranks pruned" in lines[0]
    left = sum(adapter.ranks().values())
    with pytest.raises(UserError, match=f"method.moved: {left} in a round leaves none of the {left} ranks"):
        method_with(moved=left).after_step(step(adapter, 1))


# ------------------------------------------------------------------------------------------------ in training


def train(*overrides: str) -> Run:
    quick = ["task=tiny_sentiment", "task.limit=16", "hardware.threads=1", "train.max_steps=6", "train.batch_size=8"]
    quick += [
        "train.log_every=1",
        "train.eval_every=1",
        "method=alora",
        "method.rank=2",
        "method.dev_batch=4",
        "method.settle=1",
    ]
    quick += ["method.first_epochs=1", "method.round_epochs=0.25"]
    single_run.start("train", [*quick, *overrides], None, "lrk train")
    return Run.open("outputs/latest")


@pytest.mark.slow
def test_the_trajectory_is_logged_and_drawn_and_the_kept_adapter_has_moved(pictures):
    run = train("method.moved=5")
    rounds = [row for row in run.history() if "round" in row]
    assert [row["step"] for row in rounds] == [2, 3, 4, 5]
    assert all(sum(row["ranks"].values()) == 84 for row in rounds)
    saved = json.loads((run.path / "adapter" / save_load.PROOF).read_text())["ranks"]
    assert saved == [row["ranks"] for row in rounds if row["step"] <= run.metrics["best_step"]][-1]
    assert [row["step"] for row in run.history() if row.get("not_kept")] == [1]
    assert {"ranks.png", "allocation.png"} <= {path.name for path in (run.path / "plots").iterdir()}
    assert run.metrics["reallocations"] == 4 and run.metrics["ranks"] == 84


@pytest.mark.slow
def test_two_processes_move_the_same_ranks():
    with forked_workers():
        run = train("method.moved=5", "hardware.processes=2", "method.score=taylor")
    rounds = [row["ranks"] for row in run.history() if "round" in row]
    assert len(rounds) == 4 and all(sum(ranks.values()) == 84 for ranks in rounds)
    assert run.metrics["reallocations"] == 4
    alone = train("method.moved=5", "method.score=taylor")
    assert rounds[0] == next(row["ranks"] for row in alone.history() if "round" in row), "scores of the same examples"


@pytest.mark.slow
def test_no_reallocation_is_an_error_that_leaves_nothing():
    with pytest.raises(UserError, match=r"method.first_epochs: 10.0 epochs are 20 steps"):
        train("method.first_epochs=10")
    assert not list(Path("outputs").rglob("run.json"))
