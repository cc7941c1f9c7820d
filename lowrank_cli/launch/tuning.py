"""The search for an arm's settings: which values are tried, and which of them are best."""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from lowrank_cli.errors import UserError
from lowrank_cli.schema import TuneConfig

MARGIN = 0.05  #: share of a range that counts as its end
DIGITS = 3  #: significant ones of a value drawn from a range
DRAWS = 20  #: times the budget that values are drawn at random, to find as many different ones

Values = dict[str, Any]


@dataclass
class Trial:
    """One setting, trained for ``1 / part`` of the steps, and its score for each seed: None where the run failed."""

    values: Values
    part: int = 1
    scores: dict[int, float | None] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """Over the seeds; None where one is missing or no number."""
        values = [value for value in self.scores.values() if value is not None and math.isfinite(value)]
        return math.fsum(values) / len(values) if values and len(values) == len(self.scores) else None


class Search:
    """The trials of one arm on one task.

    Args:
        tune: what is searched.
        keys: those of the searched keys that the arm knows.
        lower: whether lower scores are better.
    """

    def __init__(self, tune: TuneConfig, keys: Sequence[str], lower: bool):
        self.tune, self.lower = tune, lower
        self.search = {key: tune.search[key] for key in keys}
        self.trials: list[Trial] = []
        self._grid = {key: list(values) for key, values in self.search.items() if isinstance(values, list)}
        self._sampler = _tpe(self.search, lower) if tune.sampler == "tpe" else None
        self._open: Any = None  # Optuna's trial of the values that are being tried

    def propose(self) -> list[Trial]:
        """The next trials, to be told before more are asked for; none when all were made."""
        if self.tune.halving:
            return self._next_rung(self.tune.halving)
        if self._sampler is None:
            tried = [trial.values for trial in self.trials]
            return [Trial(values) for values in self._every() if values not in tried]
        assert self.tune.budget is not None
        if len(self.trials) >= self.tune.budget:
            return []
        self._open = self._sampler.ask(_distributions(self.search))
        return [Trial({key: _rounded(value) for key, value in self._open.params.items()})]

    def _every(self) -> list[Values]:
        """The values of all trials, in a grid or at random; the same for every arm that knows the keys."""
        if self.tune.sampler == "grid":
            return [dict(zip(self._grid, values, strict=True)) for values in product(*self._grid.values())]
        assert self.tune.budget is not None
        drawn: list[Values] = []
        for number in range(DRAWS * self.tune.budget):  # of a short list some values are drawn again, which is no trial
            if len(drawn) < self.tune.budget and (values := self._drawn(number)) not in drawn:
                drawn.append(values)
        return drawn

    def _next_rung(self, factor: int) -> list[Trial]:
        """The first rung without trials: those of the rung before it with the best scores."""
        values = self._every()
        for size, part in rungs(len(values), factor):
            here = [trial for trial in self.trials if trial.part == part]
            if not here:
                return [Trial(value, part) for value in values[:size]]
            values = [trial.values for trial in self._ranked(here)]
        return []

    def _ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those with a score, the best one first."""
        scored = [(score, trial) for trial in trials if (score := trial.mean) is not None]
        return [trial for _, trial in sorted(scored, key=lambda item: item[0] if self.lower else -item[0])]

    def tell(self, trial: Trial, scores: dict[int, float | None]) -> None:
        """What a trial gave for each seed, None where it failed."""
        trial.scores = scores
        self.trials.append(trial)
        if self._sampler is not None:
            value = trial.mean
            self._sampler.tell(self._open, value, **({} if value is not None else {"state": _failed()}))

    def best(self) -> Values | None:
        """The values with the best mean of those that were trained to the end; None if all of these failed."""
        ranked = self._ranked([trial for trial in self.trials if trial.part == 1])
        return ranked[0].values if ranked else None

    def at_edge(self) -> dict[str, str]:
        """``lower`` or ``upper`` for each key whose best value lies at that end: an even better one may lie beyond."""
        best = self.best()
        ends = {key: self._end(key, best[key]) for key in self.search} if best is not None else {}
        return {key: "upper" if end else "lower" for key, end in ends.items() if end is not None}

    def _end(self, key: str, value: Any) -> int | None:
        """0 at the lower end, -1 at the upper one, None between them or where there is no order.

        The ends of a list are its smallest and largest number, those of a range its outer twentieths.
        """
        given = self._grid.get(key, self.search[key])
        if isinstance(given, dict):
            scale = math.log if given.get("log") else float
            low, high, at = scale(given["low"]), scale(given["high"]), scale(value)
            share = (at - low) / (high - low)
            return 0 if share < MARGIN else -1 if share > 1 - MARGIN else None
        if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in given):
            return None
        return 0 if value == min(given) else -1 if value == max(given) else None

    def beyond(self) -> Any:
        """The value beyond the end at which the best one lies, in the ratio of the last two; None if there is none.

        Of whole numbers it is a whole one; of numbers that are not negative it is positive.
        """
        (key,) = self._grid
        best = self.best()
        end = None if best is None else self._end(key, best[key])
        if end is None:
            return None
        tried = sorted(self._grid[key], key=float)
        last, before = (tried[0], tried[1]) if end == 0 else (tried[-1], tried[-2])
        value = last * last / before if last * before > 0 else 2 * last - before
        value = round(value) if all(isinstance(item, int) for item in tried) else _rounded(value)
        return None if value in tried or value <= 0 <= tried[0] else value

    def widen(self, value: Any) -> None:
        """Try one more value."""
        (key,) = self._grid
        if value not in self._grid[key]:
            self._grid[key].append(value)

    def _drawn(self, number: int) -> Values:
        """The same values for every arm."""
        drawn = {}
        for key, values in self.search.items():
            chance = random.Random(f"{key} {number}")
            if isinstance(values, list):
                drawn[key] = chance.choice(values)
            elif values.get("log"):
                drawn[key] = _rounded(math.exp(chance.uniform(math.log(values["low"]), math.log(values["high"]))))
            else:
                drawn[key] = _rounded(chance.uniform(values["low"], values["high"]))
        return drawn


def first(values: Any) -> Any:
    """One of the values, or the low end of the range, that are searched."""
    return values["low"] if isinstance(values, dict) else values[0]


def trials(tune: TuneConfig, keys: Sequence[str]) -> int:
    """Settings of one arm that are tried, before any widening."""
    return tune.budget or math.prod(len(tune.search[key]) for key in keys)


def rungs(count: int, factor: int | None) -> list[tuple[int, int]]:
    """Trials and ``part`` of each rung of successive halving, which starts with ``count`` trials.

    The last rung, trained to the end, has two trials or more; each one before it trains for ``1 / factor`` of the steps
    of the next. Without a ``factor`` there is one rung.
    """
    sizes = [count]
    while factor and sizes[-1] // factor >= 2:
        sizes.append(sizes[-1] // factor)
    return [(size, (factor or 1) ** (len(sizes) - 1 - number)) for number, size in enumerate(sizes)]


def require_sampler(name: str) -> None:
    """Raise UserError where a sampler's library is not installed."""
    if name == "tpe" and importlib.util.find_spec("optuna") is None:
        raise UserError("tune.sampler: tpe needs Optuna; install it with: pip install 'lowrank-cli[tpe]'")


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _tpe(search: Values, lower: bool) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=0), direction="minimize" if lower else "maximize"
    )


def _distributions(search: Values) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return {
        key: CategoricalDistribution(values)
        if isinstance(values, list)
        else FloatDistribution(float(values["low"]), float(values["high"]), log=values.get("log", False))
        for key, values in search.items()
    }


def _failed() -> Any:
    from optuna.trial import TrialState

    return TrialState.FAIL
