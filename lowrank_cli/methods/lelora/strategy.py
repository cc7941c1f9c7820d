"""Strategies over time: reward a phase, train the policy, fold, decompose again, choose and open windows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.files.optimizer_state import load_moments, moments
from lowrank_cli.adapter.kinds.svd_window import (
    MovingWindow,
    Spectrum,
    decompose,
    output_gradients,
    reachable,
    window_start,
)
from lowrank_cli.adapter.low_rank import LowRank
from lowrank_cli.adapter.ranks import carry
from lowrank_cli.errors import Diverged
from lowrank_cli.methods.lelora.policy import Policy, advantages, features, share_out, without_trend
from lowrank_cli.methods.protocol import Average, same

#: Largest smaller side of matrices that are decomposed again in every phase (LAPACK: about 30 ms on one core).
SMALL = 256
INERTIA = 0.5  #: weight of the old value when gradient energies are smoothed, once a phase
PHASES = 6  #: last phases that the policy is trained on
PASSES = 8  #: passes over them between two phases


class Strategies:
    """The windows of all M matrices of an adapter with :class:`MovingWindow` modules, and the policy that chooses them.

    Learning is a reconstruction: a run has a dozen phases, too few for REINFORCE with one step each, so the policy
    takes ``PASSES`` clipped steps over the last ``PHASES`` of them (Schulman et al. 2017). On simulated runs of
    11 phases, with windows worth 0.3 … 1, its greedy choices improved from 0.65 (chance) to 0.81.

    Args:
        budget: sum of all widths, shared out exactly.
        limit: largest width.
        places: number of window positions, evenly spaced from principal to minor components.
        refresh: relative change of a larger matrix since its last decomposition, above which it is decomposed again.
        learns: whether the policy is trained.
        per_matrix: reward each matrix by its own credit; else all by the drop of the dev loss.
        learning_rate: of the policy (Adam).
        entropy: weight of the entropy bonus.
    """

    def __init__(
        self,
        adapter: Adapter,
        *,
        budget: int,
        limit: int,
        places: int,
        refresh: float,
        learns: bool,
        per_matrix: bool,
        learning_rate: float,
        entropy: float,
    ):
        self.keys, self.sites = list(adapter.modules), list(adapter.sites.values())
        count = len(self.keys)
        self.modules = [module for module in adapter.modules.values() if isinstance(module, MovingWindow)]
        self.adapter, self.budget, self.refresh = adapter, budget, refresh
        self.learns, self.per_matrix, self.entropy = learns, per_matrix, entropy
        self.places = [i / (places - 1) for i in range(places)]
        self.sizes = [min(site.in_features, site.out_features) for site in self.sites]
        self.limits = [min(size, limit) for size in self.sizes]
        self.reachable = [reachable(self.places, *pair) for pair in zip(self.sizes, self.limits)]
        self.spectra: list[Spectrum] = []
        self.generator = torch.Generator().manual_seed(torch.initial_seed())
        self.energy = torch.full((count, places), 1 / places)
        self.stale = torch.zeros(count)
        self.norms = torch.stack([self._weight(m).float().norm().cpu() for m in range(count)])
        self.policy = Policy(places)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=learning_rate)
        self.choice: dict[str, Tensor] = {}  #: features, places, logits and likelihood of the current phase
        self.phases: list[dict[str, Tensor]] = []  #: the choices of the last phases, with their rewards
        self.held = [torch.zeros(0, dtype=torch.long)] * count  #: initial component of each open rank
        self.slopes: dict[str, Tensor] = {}  #: dev gradients of A and B at the start of the phase: "<matrix>.<factor>"
        self.log: dict[str, list[Tensor]] = {}  #: a value for each switch, see :meth:`switch`
        self.seconds = 0.0

    def _weight(self, m: int) -> Tensor:
        site = self.sites[m]
        return self.adapter.linears[site.path].rows(site.span)

    def _decompose(self, m: int) -> Spectrum:
        with self.adapter.linears[self.sites[m].path].whole():
            return decompose(self._weight(m), self.reachable[m])

    @torch.no_grad()
    def credit(self) -> Tensor:
        """−⟨∇L_dev(θ), θ_now − θ⟩ over A and B, (M,), where θ are the factors at the start of the phase.

        This is the progress of each matrix along the dev loss's slope. The gradient comes from dev examples, so fitting
        noise earns nothing, and from the start of the phase, so neither does moving back and forth. Both would hide the
        value of a window: at the peak learning rate the loss soon plateaus at a level that rises with the step length,
        most for principal and wide windows. (Credited with the drop of each step, the policy moved to narrow windows of
        minor components, and the runs ended worse.)
        """
        credits = []
        for m, module in enumerate(self.modules):
            along_a = (self.slopes[f"{m}.a"] * (module.lora_a - module.start_a)).sum()
            along_b = (self.slopes[f"{m}.b"] * (module.lora_b - module.start_b)).sum()
            credits.append(-along_a - along_b)
        return torch.stack(credits).cpu()

    def switch(
        self,
        step: int,
        progress: float,
        losses: Sequence[Callable[[], Tensor]],
        optimizer: torch.optim.Optimizer | None,
        *,
        last: bool,
        average: Average = same,
        agree: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """End a phase and begin the next. Returns a line for the log.

        Rewards are shares of the phase's credit, or for all matrices the drop of the log dev loss per step, which takes
        further forward passes.

        Args:
            step: optimizer steps done.
            progress: share of training done.
            losses: give the loss of each dev batch, the same in every phase.
            optimizer: of the factors; its moments follow the ranks that stay.
            last: open the greedy windows, which then stay.
            average: gives the mean over all processes.
            agree: gives all processes the adapter of the first, as singular vectors may differ between machines.
        """
        began = time.monotonic()
        if not self.spectra:
            self.spectra = [self._decompose(m) for m in range(len(self.keys))]
        row: dict[str, Any] = {"step": step}
        rewards = torch.full((len(self.keys),), torch.nan)
        if rewarded := bool(self.choice):
            credit = self.credit()
            if not credit.isfinite().all():
                raise Diverged(f"the factors are not finite at step {step}; try a smaller train.learning_rate")
            row["credit"] = credit.sum().item()
            if self.per_matrix:
                rewards = credit / credit.abs().sum().clamp_min(1e-30)
            else:
                fall = math.log(
                    max(self.log["dev_loss"][-1].item(), 1e-30) / max(self._dev_loss(losses, average), 1e-30)
                )
                rewards = torch.full_like(credit, fall / (step - int(self.log["step"][-1])))
            self.phases = [*self.phases, {**self.choice, "rewards": rewards}][-PHASES:]
            self._learn()
        self.fold()
        x = features(self.sites, self.spectra, self._drift(), self.energy, progress)
        greedy = last and self.learns
        places, logits = self.policy.greedy(x) if greedy else self.policy.sample(x, self.generator)
        widths = share_out(logits, self.budget, self.limits)
        starts = [window_start(self.places[p], k, w) for p, k, w in zip(places.tolist(), self.sizes, widths)]
        self.open(starts, widths, optimizer)
        agree()
        likelihood = self.policy.log_likelihood(x, places, logits)[0].detach()
        self.choice = {"x": x, "places": places, "logits": logits, "likelihood": likelihood}
        if last:
            self.spectra = []  # as large as the weights, and no longer needed
        row["dev_loss"] = self._dev_loss(losses, average) if last else self._measure_gradients(losses, average)
        row |= {"starts": starts, "widths": widths}
        for name, value in {"credit": 0.0, **row, "rewards": rewards.tolist()}.items():
            self.log.setdefault(name, []).append(torch.tensor(value))
        self.seconds += time.monotonic() - began
        return row | ({"rewards": rewards.tolist()} if rewarded else {})

    @torch.no_grad()
    def _dev_loss(self, losses: Sequence[Callable[[], Tensor]], average: Average) -> float:
        with self._evaluating():
            return statistics.mean(average(loss_of()).item() for loss_of in losses)

    def _measure_gradients(self, losses: Sequence[Callable[[], Tensor]], average: Average) -> float:
        """The dev loss. Keeps its gradients in the new windows, for :meth:`credit`.

        Also updates the energies, features of the next choice, from the first batch.
        """

        signals = [spectrum.values.new_zeros(len(spectrum.index)) for spectrum in self.spectra]

        def see(key: str, inputs: Tensor, gradients: Tensor) -> None:
            m = self.keys.index(key)
            signals[m] += self.spectra[m].project(inputs, gradients)

        total = torch.zeros((), device=self.adapter.model.device)
        with self._evaluating():
            for number, loss_of in enumerate(losses):
                with nullcontext() if number else output_gradients(self.adapter, see):
                    loss = loss_of() / len(losses)
                    torch.autograd.backward(loss)
                total += loss.detach()
        for m, module in enumerate(self.modules):
            self._note_energy(m, average(signals[m]).cpu())
            for name, factor in (("a", module.lora_a), ("b", module.lora_b)):
                slope = torch.zeros_like(factor) if factor.grad is None else factor.grad
                self.slopes[f"{m}.{name}"] = average(slope)
        self.adapter.model.zero_grad()
        return average(total).item()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Disable dropout inside."""
        training = self.adapter.model.training
        self.adapter.model.train(False)
        try:
            yield
        finally:
            self.adapter.model.train(training)

    def _note_energy(self, m: int, signal: Tensor) -> None:
        """Update the smoothed share of each place's widest window in the energy of ``signal`` (C,) = uᵢᵀ G vᵢ."""
        index, limit = self.reachable[m], self.limits[m]
        starts = [window_start(place, self.sizes[m], limit) for place in self.places]
        bands = [signal[(index >= start) & (index < start + limit)].square().sum() for start in starts]
        energy = torch.stack(bands)
        share = energy / energy.sum().clamp_min(1e-30)
        self.energy[m] = INERTIA * self.energy[m] + (1 - INERTIA) * share

    def _learn(self) -> None:
        if not self.learns or len(self.phases) < (2 if self.per_matrix else 3):
            return
        made = {name: torch.stack([phase[name] for phase in self.phases]) for name in self.phases[0]}
        rewards = made.pop("rewards")
        advantage = advantages(rewards if self.per_matrix else without_trend(rewards))
        for _ in range(PASSES):
            self.optimizer.zero_grad()
            torch.autograd.backward(self.policy.loss(**made, advantage=advantage, entropy=self.entropy))
            self.optimizer.step()

    @torch.no_grad()
    def fold(self) -> None:
        """Fold every update into its weight, and decompose matrices that have changed enough."""
        for m, module in enumerate(self.modules):
            self.stale[m] += product_norm(module.scale * module.up(), module.down()) / self.norms[m]
            with self.adapter.linears[self.sites[m].path].whole():
                module.fold(self._weight(m))
                if self.sizes[m] <= SMALL or self.stale[m] > self.refresh:
                    self.spectra[m] = self._decompose(m)
                    self.stale[m] = 0

    def _drift(self) -> Tensor:
        """‖W − W₀‖_F / ‖W₀‖_F of the stored weights, (M,)."""
        return torch.stack([product_norm(module.folded_b, module.folded_a) for module in self.modules]) / self.norms

    def open(self, starts: list[int], widths: list[int], optimizer: torch.optim.Optimizer | None) -> None:
        """Open the windows; ranks whose component is also in the new window stay, with their optimizer moments."""
        self.slopes.clear()
        for m, (module, start, width) in enumerate(zip(self.modules, starts, widths)):
            held, wanted = self.held[m], torch.arange(start, start + width)
            keep = torch.isin(held, wanted).nonzero().flatten()
            fresh = wanted[~torch.isin(wanted, held)]
            if optimizer is not None:
                carry(module.tensors(), LowRank.rank_axes, keep, len(fresh), optimizer)
            module.replace_components(keep, *self.spectra[m].components(fresh))
            self.held[m] = torch.cat((held[keep], fresh))

    def preference(self) -> tuple[list[float], list[int]]:
        """By matrix, the policy's current mean place (0 principal, 1 minor) and width."""
        with torch.no_grad():
            log_places, means = self.policy(self.choice["x"])
        return (log_places.exp() @ torch.tensor(self.places)).tolist(), share_out(means, self.budget, self.limits)

    def state(self) -> dict[str, Tensor]:
        """Policy, its optimizer, phases, current choice, spectra and log, as tensors by name."""
        state = {
            "rng": self.generator.get_state(),
            "energy": self.energy,
            "stale": self.stale,
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
            **{f"policy.{name}": value for name, value in self.policy.state_dict().items()},
            **{f"moments.{name}": value for name, value in moments(self.optimizer).items()},
            **{f"choice.{name}": value for name, value in self.choice.items()},
            **{f"log.{name}": torch.stack(values) for name, values in self.log.items()},
            **{f"slopes.{name}": value for name, value in self.slopes.items()},
            **{f"held.{m}": value for m, value in enumerate(self.held)},
        }
        for k, phase in enumerate(self.phases):
            state |= {f"phase.{k}.{name}": value for name, value in phase.items()}
        for m, spectrum in enumerate(self.spectra):
            for name in ("values", "left", "right"):
                state[f"spectrum.{m}.{name}"] = getattr(spectrum, name)
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state`."""

        def below(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        self.generator.set_state(state["rng"])
        self.energy, self.stale, self.seconds = state["energy"], state["stale"], float(state["seconds"])
        self.policy.load_state_dict(below("policy."))
        load_moments(self.optimizer, below("moments."), "the policy's optimizer")
        self.choice = below("choice.")
        count = len({name.partition(".")[0] for name in below("phase.")})
        self.phases = [below(f"phase.{k}.") for k in range(count)]
        self.log = {name: list(values) for name, values in below("log.").items()}
        device, saved = self.adapter.model.device, below("spectrum.")
        self.slopes = {name: value.to(device) for name, value in below("slopes.").items()}
        self.held = [state[f"held.{m}"] for m in range(len(self.keys))]
        if saved:
            self.spectra = [
                Spectrum(
                    index=index,
                    **{name: saved[f"{m}.{name}"].to(device) for name in ("values", "left", "right")},
                )
                for m, index in enumerate(self.reachable)
            ]


def product_norm(b: Tensor, a: Tensor) -> Tensor:
    """‖b a‖_F of factors b (O, R) and a (R, I) without forming the product; a scalar on the CPU."""
    return ((b.t() @ b) * (a @ a.t())).sum().clamp_min(0).sqrt().cpu()
