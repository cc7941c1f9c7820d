"""lrk score and lrk prune as users run them: train, score, prune, evaluate, train on."""

import json
from pathlib import Path

import pytest
import small
import torch
from command import one_line

from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.ranks import resize
from lowrank_cli.errors import UserError
from lowrank_cli.launch import single_run
from lowrank_cli.report.run_results import collect
from lowrank_cli.runs import Run
from lowrank_cli.schema import PruneConfig
from lowrank_cli.scoring.keep import keep_ranks, ranks_to_drop

QUICK = ["task=tiny_sentiment", "task.limit=16", "hardware.threads=1"]
TRAIN = ["train.max_steps=3", "train.batch_size=8", "train.eval_every=3", "train.log_every=1"]


def lrk_run(verb: str, *overrides: str) -> Run:
    single_run.start(verb, list(overrides), None, f"lrk {verb}")
    return Run.open("outputs/latest")


def ramp(adapter):
    """Scores 0, 1, 2, … in the order of modules and ranks."""
    numbers = iter(range(1000))
    return {key: [float(next(numbers)) for _ in range(rank)] for key, rank in adapter.ranks().items()}


def test_the_lowest_ranks_of_the_model_go():
    adapter = small.adapted()  # 2 layers × 7 modules × 4 ranks
    keep = keep_ranks(PruneConfig(drop=6, budget=None, per_layer=False), adapter, ramp(adapter))
    assert list(keep.values())[:3] == [[], [2, 3], [0, 1, 2, 3]]
    assert sum(map(len, keep.values())) == 50
    assert keep_ranks(PruneConfig(drop=None, budget=50, per_layer=False), adapter, ramp(adapter)) == keep


def test_each_layer_gives_the_same_number():
    adapter = small.adapted()
    keep = keep_ranks(PruneConfig(drop=6, budget=None, per_layer=True), adapter, ramp(adapter))
    layers = [sum(len(ranks) for key, ranks in keep.items() if f"layers.{layer}." in key) for layer in (0, 1)]
    assert layers == [25, 25]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((56, None, False), "prune.drop: 56 is out of range .allowed: 1 to 55"),
        ((None, 60, False), "prune.budget: 60 is out of range .*the adapter has 56"),
        ((3, None, True), "prune.drop: 3 is out of range .allowed: 2 to 54 in steps of 2, as prune.per_layer=true"),
        ((None, 3, True), "prune.budget: 3 is out of range .allowed: 2 to 54 in steps of 2"),
    ],
)
def test_amounts_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ranks_to_drop(PruneConfig(*settings), small.adapted())


def test_what_is_allowed_of_unlike_layers_can_be_taken_out():
    """The first layer has 5 of 33 ranks: 10 is the most that both can give alike, and 23 the least that is left."""
    adapter = small.adapted()
    resize(adapter, {key: ([0], 0) for key in list(adapter.modules)[:5]})
    resize(adapter, {key: ([], 0) for key in list(adapter.modules)[5:7]})
    with pytest.raises(UserError, match=r"prune.budget: 12 .*allowed: 23 to 31 in steps of 2, .* has only 5"):
        ranks_to_drop(PruneConfig(drop=None, budget=12, per_layer=True), adapter)
    for budget in (23, 31):
        keep = keep_ranks(PruneConfig(drop=None, budget=budget, per_layer=True), adapter, ramp(adapter))
        assert sum(map(len, keep.values())) == budget


def test_mistakes_are_one_line(lrk):
    assert "prune.drop=1 and prune.budget=2 are given" in one_line(
        lrk("check", "prune", "prune.drop=1", "prune.budget=2", "method=none")
    )
    assert "did you mean 'taylor'" in one_line(lrk("check", "score", "score.kind=tailor", "method=none"))
    assert "no finished run" in one_line(lrk("score"))
    for verb in (["score"], ["prune", "prune.drop=4"]):
        line = one_line(lrk("check", *verb, "score.window=1.5", "method=none"))
        assert line == "score.window: 1.5 is out of range (allowed: above 0 to 1)"
    line = one_line(lrk("check", "score", "score.kind=auto", "score.level=layer", "method=none"))
    assert line.startswith("score.level: unknown value 'layer' (allowed: rank, module")
    line = one_line(lrk("check", "prune", "prune.keep=2", "prune.same_roles=true", "score.kind=mixed", "method=none"))
    assert line.startswith("score.kind: 'mixed' needs a cut between modules, but prune.same_roles adds")


@pytest.mark.parametrize("verb", [["score"], ["prune", "prune.drop=10"]], ids=lambda verb: verb[0])
def test_ranks_that_are_not_judged_one_by_one_are_refused(verb, lrk, fake_stages):
    assert lrk("train", "method=pissa").code == 0
    ended = lrk(*verb)
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert ended.err.startswith(f"error: method: 'pissa' has no {verb[0]}: its update is the trained components minus")
    assert "(allowed: adalora, " in ended.err and "lelora" not in ended.err


@pytest.mark.slow
def test_train_score_prune_evaluate_and_train_on(capsys, pictures):
    trained = lrk_run("train", *QUICK, *TRAIN, "method=lora", "method.rank=4", "train.learning_rate=1e-2")
    scored = lrk_run("score", "score.batch=4")
    record = scored.read_json("scores.json")
    assert record["kind"] == "ab" and len(record["modules"]) == 42
    for module in record["modules"]:
        parts = zip(module["scores"], module["without"], module["alone"], strict=True)
        assert all(abs(s - (record["whole"] - a + b - record["bare"])) < 1e-9 for s, a, b in parts)
    assert record["meaning"].keys() == {"scores", "whole", "bare", "without", "alone"}
    assert scored.metrics["score/ranks"] == 168 and (scored.path / "plots" / "scores.png").is_file()

    pruned = lrk_run("prune", "prune.budget=100")  # of the scoring, the newest
    assert pruned.config()["run"] == str(scored.path.absolute())
    ranks = json.loads((pruned.path / "adapter" / save_load.PROOF).read_text())["ranks"]
    assert sum(ranks.values()) == pruned.metrics["ranks"] == 100
    worst = sorted(score for module in record["modules"] for score in module["scores"])[68]
    kept = {m["module"]: sum(score >= worst for score in m["scores"]) for m in record["modules"]}
    assert {key: rank for key, rank in kept.items() if rank} == ranks
    assert pruned.metrics["trainable_parameters"] < trained.metrics["trainable_parameters"]

    with pytest.raises(UserError, match=r"score.kind: 'taylor' is asked for, but .* scored by 'ab' .*run="):
        lrk_run("prune", f"run={scored.path}", "prune.budget=100", "score.kind=taylor")

    mixed_run = lrk_run("score", f"run={trained.path}", "score.batch=4", "score.kind=mixed")
    mixed = mixed_run.read_json("scores.json")
    assert sum(value is not None for module in mixed["modules"] for value in module["exact"]) == 17  # of 168
    assert mixed["meaning"].keys() == {"scores", "whole", "bare", "slope_at_1", "slope_at_0", "exact"}
    cheapest = lrk_run("score", f"run={trained.path}", "score.batch=4", "score.kind=auto").read_json("scores.json")
    assert cheapest["kind"] == "taylor" and cheapest["reason"].startswith("auto took taylor, the cheapest: it costs ")
    lrk_run("prune", f"run={trained.path}", "prune.budget=100", "score.batch=4", "score.kind=mixed")
    assert "around another cut" not in capsys.readouterr().err
    lrk_run("prune", f"run={mixed_run.path}", "prune.budget=100")
    assert "measured exactly around another cut than this" in capsys.readouterr().err

    direct = lrk_run("prune", f"run={trained.path}", "prune.budget=100", "score.batch=4")
    files = [save_load.load_file(run.path / "adapter" / save_load.WEIGHTS) for run in (pruned, direct)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())

    evaluated = lrk_run("evaluate", f"run={pruned.path}")
    assert evaluated.metrics["test/accuracy"] == pruned.metrics["test/accuracy"]
    exported = lrk_run("export", f"run={pruned.path}")
    assert exported.metrics["export/logit_error"] < 1e-5
    config = json.loads((exported.path / "export" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == len(ranks) and config["r"] == max(ranks.values())
    further = lrk_run("train", f"run={pruned.path}", *TRAIN, "train.learning_rate=1e-3")
    assert further.metrics["trainable_parameters"] == pruned.metrics["trainable_parameters"]
    assert further.history()[0]["train/loss"] < trained.history()[0]["train/loss"]  # not from the start

    collected = collect(["outputs"], "outputs")
    made = [json.loads(result.config["adapter"]) for result in collected.results]
    assert sorted(made) == ["train", *["train + prune"] * 4, "train + prune + train"]
    assert (collected.unfinished, collected.broken) == (0, [])


@pytest.mark.slow
def test_scores_of_another_adapter_are_refused():
    lrk_run("train", *QUICK, *TRAIN, "method=lora", "method.rank=2")
    scored = lrk_run("score", "score.kind=magnitude")
    record = scored.read_json("scores.json")
    record["modules"].pop()
    scored.write_json("scores.json", record)
    with pytest.raises(UserError, match=r"scores.json does not belong to the adapter of"):
        lrk_run("prune", f"run={scored.path}", "prune.drop=4")
    assert len(list(Path("outputs").glob("2*/*/run.json"))) == 2  # nothing was left behind
