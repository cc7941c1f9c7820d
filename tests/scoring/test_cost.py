"""``auto``: what scores cost beside a training, and which kind that leaves."""

import pytest
import small
from ablations import dev_batch

from lowrank_cli.scoring.cost import choose, costs
from lowrank_cli.scoring.cut import Cut, usual
from lowrank_cli.scoring.probe import Probe

TOKENS = 42  #: of :func:`dev_batch`


def test_costs_are_passes_times_tokens():
    """Two layers of seven modules with four ranks: an exact score runs both layers, or the second alone."""
    adapter, probe = small.adapted("lora", rank=4), Probe(dev_batch("llama"), 300)
    found = costs(adapter, "rank", probe, Cut(0.25, [(list(adapter.modules), 14)]))
    assert list(found) == ["ab", "mixed", "taylor"]
    passes = 2 * (28 * 1 + 28 * 0.5)
    assert found["ab"] == TOKENS * (passes + 2)
    assert found["taylor"] == TOKENS * 2 * 3
    assert found["mixed"] == pytest.approx(TOKENS * (6 + passes * 14 / 56 + 2))
    modules = costs(adapter, "module", probe, usual(adapter, "module", 0.1))
    assert modules["ablation"] == TOKENS * (2 * (7 * 1 + 7 * 0.5) + 2)
    assert modules["mixed"] == pytest.approx(TOKENS * (6 + 2 * (2 * 1 + 2 * 0.5) + 2))
    assert list(costs(adapter, "module", probe, None)) == ["ablation", "taylor"]


def test_auto_takes_the_best_that_costs_less_than_a_tenth_of_training():
    small_one = {"ab": 60.0, "mixed": 30.0, "taylor": 6.0}
    for training, kind in ((201, "ab"), (200, "mixed"), (101, "mixed"), (100, "taylor"), (21, "taylor")):
        assert choose(small_one, training)[0] == kind  # 3 a token of training: 60 of 600 is a tenth
    assert choose(small_one, 400)[0] == "ab" and choose(small_one, 400, times=2)[0] == "mixed"


def test_auto_says_why():
    passes = {"ab": 3360.0, "mixed": 400.0, "taylor": 6.0}
    assert choose(passes, 1000)[1] == "auto took taylor: it costs 0.2 % of training (ab 112 %, mixed 13 %)"
    assert choose(passes, 20000)[1] == "auto took ab: it costs 5.6 % of training"
    assert choose(passes, 5000, 2)[1] == "auto took mixed: 2 scorings cost 5.3 % of training (ab 45 %)"
    line = choose(passes, 10)[1]
    assert line == "auto took taylor, the cheapest: it costs 20 % of training (ab 11200 %, mixed 1333 %)"
