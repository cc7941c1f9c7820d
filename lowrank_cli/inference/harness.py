"""The lm-evaluation-harness over a session's model, with its adapter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from io import StringIO
from typing import TYPE_CHECKING, Any

from lowrank_cli.errors import UserError, nearest
from lowrank_cli.inference import continuations
from lowrank_cli.runs import progress
from lowrank_cli.schema.harness import HarnessConfig
from lowrank_cli.session.session import Session

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

NEW_TOKENS = 256  #: of a generated answer whose task does not say, as in the harness
BOOTSTRAPS = 1000  #: samples for standard errors that have no closed form


def load_tasks(config: HarnessConfig) -> dict[str, Any]:
    """``config.tasks`` with their data, as the harness holds them.

    Raises:
        UserError: the harness is not installed, it has no such task, or a task's data cannot be read.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError:
        raise UserError("eval=lm_eval needs the harness; install it with: pip install 'lowrank-cli[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with _quiet():
        manager = TaskManager(include_path=config.include_path)
        for name in config.tasks:
            if not manager.match_tasks([name]):
                raise UserError(f"eval.tasks: unknown task '{name}'{nearest(name, manager.all_tasks)}")
        try:
            return dict(manager.load(list(config.tasks)))
        except Exception as error:  # of the Hub, of files, and of whatever a task's own code does
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"eval.tasks: the data of {', '.join(config.tasks)} cannot be read ({reason}); data on the Hub need "
                f"the network once, a task file of yours may name local files (eval.include_path=FOLDER)"
            ) from error


def evaluate(session: Session, config: HarnessConfig, loaded: dict[str, Any]) -> dict[str, Any]:
    """What the harness reports on tasks of :func:`load_tasks`: results by task, versions, and their configurations.

    Demonstrations are drawn with the run's seed.
    """
    import lm_eval

    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:  # a task that rules demonstrations out keeps doing so
            task.set_config(key="num_fewshot", value=(own or 0) if config.num_fewshot is None else config.num_fewshot)
        task.set_fewshot_seed(seed=session.config.seed)
    with progress.bar("evaluating", 0, shown=True) as bar, _quiet():
        report = lm_eval.evaluate(
            lm=_language_model()(session, config, bar),
            task_dict=loaded,
            limit=config.limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
    assert report is not None, "only processes after the first get None"
    return dict(report)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the harness and its libraries print neither warnings nor bars."""
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        yield


def metrics(report: dict[str, Any]) -> dict[str, float]:
    """``test/TASK/METRIC`` and ``test/TASK/METRIC_stderr`` by the harness's names; a filter's name follows a comma."""
    values: dict[str, float] = {}
    for task, entries in report["results"].items():
        for key, value in entries.items():
            name, _, filtered = key.partition(",")
            if isinstance(value, int | float) and filtered:
                values[f"test/{task}/{name}" + ("" if filtered == "none" else f",{filtered}")] = value
    counts = report.get("n-samples", {})
    return values | {"test/examples": sum(count["effective"] for count in counts.values())}


@cache
def _language_model() -> type:
    """The harness's interface to a session; made on first use, because its base class is the harness's."""
    from lm_eval.api.model import LM

    class SessionLM(LM):
        """Scores and generates with a session's model."""

        def __init__(self, session: Session, config: HarnessConfig, bar: progress.Bar):
            super().__init__()
            self.session, self.bar = session, bar
            self.limit = config.max_length or continuations.longest(session)

        def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
            texts = [request.args for request in requests]
            pairs = [continuations.pair(self.session, text[0], text[1], self.limit) for text in texts]
            return self._scored(pairs)

        def _scored(self, pairs: Sequence[continuations.Pair]) -> list[tuple[float, bool]]:
            self.bar.expect(len(set(pairs)))
            return continuations.log_likelihoods(self.session, pairs, self.bar.advance)

        def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
            tokenizer, start = self.session.prompt_tokenizer, continuations.start_token(self.session)
            texts = [tokenizer(request.args[0], add_special_tokens=False)["input_ids"] for request in requests]
            pieces = [list(continuations.windows(text, start, self.limit)) for text in texts]
            scores = iter(self._scored([one for text in pieces for one in text]))
            return [sum(next(scores)[0] for _ in text) for text in pieces]

        def generate_until(self, requests: Sequence[Instance]) -> list[str]:
            answers: dict[int, str] = {}
            groups: dict[str, list[int]] = {}
            self.bar.expect(len(requests))
            for index, request in enumerate(requests):
                groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
            for indices in groups.values():
                settings = dict(requests[indices[0]].args[1])
                until, new_tokens = settings.pop("until", []), settings.pop("max_gen_toks", NEW_TOKENS)
                texts = continuations.generate_until(
                    self.session,
                    [requests[index].args[0] for index in indices],
                    [until] if isinstance(until, str) else until,
                    new_tokens,
                    self.limit,
                    self.bar.advance,
                    **_of_transformers(settings.items()),
                )
                answers |= dict(zip(indices, texts, strict=True))
            return [answers[index] for index in range(len(requests))]

    return SessionLM


def _of_transformers(settings: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Settings of a generation without a temperature of 0, by which the harness means greedy decoding."""
    given = dict(settings)
    if given.get("temperature") == 0:
        given.pop("temperature")
        given.setdefault("do_sample", False)
    if not given.get("do_sample", False):
        given.pop("temperature", None)
        given["do_sample"] = False
    return given
