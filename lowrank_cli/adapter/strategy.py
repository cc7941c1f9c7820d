"""Strategies over time: probe the dev loss, reward the policy, fold, look at the spectrum again, choose, open."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_cli.adapter.core import Adapter
from lowrank_cli.adapter.policy import Baseline, Policy, features, share_out, shares
from lowrank_cli.adapter.spectrum import Moving, Spectrum, decompose, reachable, weight_gradients, window_start
from lowrank_cli.adapter.state import load_moments, moments

#: Smaller side up to which a spectrum is computed again in every phase (LAPACK: about 30 ms on one core).
SMALL = 256
INERTIA = 0.5  #: of the smoothed gradient energies, a phase


class Strategies:
    """The windows of all M matrices of an ``adapter`` whose modules are :class:`Moving`, and who chooses them.

    ``budget`` ranks are shared out exactly, at most ``limit`` to a matrix; windows lie at ``places`` places evenly
    spaced from principal to minor components. ``refresh``: change of a larger matrix since its last decomposition,
    relative to its norm, above which it is decomposed again. Choices are the same in every process.
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
        self.parts = [part for part in adapter.modules.values() if isinstance(part, Moving)]
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
        self.baseline = Baseline(count if per_matrix else 1)
        self.choice: dict[str, Tensor] = {}  #: features, places and logits of the phase that runs; its first dev loss
        self.log: dict[str, list[Tensor]] = {}  #: a value for each switch, see :meth:`switch`
        self.seconds = 0.0

    def _weight(self, m: int) -> Tensor:
        site = self.sites[m]
        return self.adapter.linears[site.path].rows(site.span)

    def switch(
        self,
        step: int,
        progress: float,
        losses: Sequence[Callable[[], Tensor]],
        average: Callable[[Tensor], Tensor],
        forget: Callable[[nn.Parameter], Any],
        *,
        last: bool,
    ) -> dict[str, Any]:
        """End a phase and begin the next; ``last`` opens the greedy windows. Returns a line for the log.

        ``losses`` give this process's share of the loss of each probed dev batch, the same in every phase. ``forget``
        is told of parameters that now mean something else.
        """
        began = time.monotonic()
        if not self.spectra:
            self.spectra = [decompose(self._weight(m), index) for m, index in enumerate(self.reachable)]
        loss, credit = self._probe(losses, average)
        rewards = torch.full((len(self.keys),), torch.nan)
        if self.choice:
            drop, steps = float(self.choice["loss"]) - loss, step - int(self.choice["step"])
            rewards = (shares(credit, drop) if self.per_matrix else torch.full_like(credit, drop)) / steps
            self._learn(rewards)
        self._fold()
        x = features(self.sites, self.spectra, self._drift(), self.energy, progress)
        greedy = last and self.learns
        places, logits = self.policy.greedy(x) if greedy else self.policy.sample(x, self.generator)
        widths = share_out(logits, self.budget, self.limits)
        starts = [window_start(self.places[p], k, w) for p, k, w in zip(places.tolist(), self.sizes, widths)]
        self._open(starts, widths, forget)
        self.choice = {
            "x": x,
            "places": places,
            "logits": logits,
            "loss": torch.tensor(loss, dtype=torch.float64),
            "step": torch.tensor(step),
        }
        row = {"step": step, "dev_loss": loss, "rewards": rewards.tolist(), "starts": starts, "widths": widths}
        for name, value in row.items():
            self.log.setdefault(name, []).append(torch.tensor(value))
        self.seconds += time.monotonic() - began
        return row

    def _probe(
        self, losses: Sequence[Callable[[], Tensor]], average: Callable[[Tensor], Tensor]
    ) -> tuple[float, Tensor]:
        """Dev loss and each matrix's credit −⟨∇L, ΔW of this phase⟩ (M,); the gradient's energies by the way."""
        model = self.adapter.model
        credit = torch.zeros(len(self.keys), device=model.device)
        signals = [torch.zeros(len(spectrum.index), device=model.device) for spectrum in self.spectra]
        total = torch.zeros((), device=model.device)

        def see(key: str, gradient: Tensor) -> None:
            m = self.keys.index(key)
            part = self.parts[m]
            with torch.no_grad():
                credit[m] -= part.scale * ((part.up().t() @ gradient.float()) * part.down()).sum()
                signals[m] += self.spectra[m].project(gradient)

        training = model.training
        model.train(False)
        with weight_gradients(self.adapter, see):
            for loss_of in losses:
                loss = loss_of() / len(losses)
                torch.autograd.backward(loss)
                total += loss.detach()
        model.train(training)
        model.zero_grad()
        for m, signal in enumerate(signals):
            self._note_energy(m, average(signal).cpu())
        return average(total).item(), average(credit).cpu()

    def _note_energy(self, m: int, signal: Tensor) -> None:
        """``signal`` (C,): uᵢᵀ G vᵢ. Smooths the share that each place's widest window has in its square."""
        index, limit = self.reachable[m], self.limits[m]
        starts = [window_start(place, self.sizes[m], limit) for place in self.places]
        bands = [signal[(index >= start) & (index < start + limit)].square().sum() for start in starts]
        energy = torch.stack(bands)
        share = energy / energy.sum().clamp_min(1e-30)
        self.energy[m] = INERTIA * self.energy[m] + (1 - INERTIA) * share

    def _learn(self, rewards: Tensor) -> None:
        advantage = self.baseline.advantage(rewards if self.per_matrix else rewards[:1]).expand_as(rewards)
        if self.learns:
            made = (self.choice["x"], self.choice["places"], self.choice["logits"])
            self.optimizer.zero_grad()
            torch.autograd.backward(self.policy.loss(*made, advantage, self.entropy))
            self.optimizer.step()

    @torch.no_grad()
    def _fold(self) -> None:
        """Move every update into its weight; decompose what has changed by much."""
        for m, part in enumerate(self.parts):
            self.stale[m] += product_norm(part.scale * part.up(), part.down()) / self.norms[m]
            part.fold(self._weight(m))
            if self.sizes[m] <= SMALL or self.stale[m] > self.refresh:
                self.spectra[m] = decompose(self._weight(m), self.reachable[m])
                self.stale[m] = 0

    def _drift(self) -> Tensor:
        """‖W − W₀‖_F / ‖W₀‖_F of the stored weights, (M,)."""
        return torch.stack([product_norm(part.folded_b, part.folded_a) for part in self.parts]) / self.norms

    def _open(self, starts: list[int], widths: list[int], forget: Callable[[nn.Parameter], Any]) -> None:
        """Open the windows; one that stays where it was goes on as it is."""
        before = [values[-1].tolist() for values in (self.log["starts"], self.log["widths"])] if self.log else None
        for m, (part, start, width) in enumerate(zip(self.parts, starts, widths)):
            if before is None or (start, width) != (before[0][m], before[1][m]):
                part.take(*self.spectra[m].window(start, width))
                for parameter in part.tensors().values():
                    parameter.grad = None
                    forget(parameter)

    def preference(self) -> tuple[list[float], list[int]]:
        """By matrix: the mean place (0 principal, 1 minor) and the width that the policy prefers now."""
        with torch.no_grad():
            log_places, means = self.policy(self.choice["x"])
        return (log_places.exp() @ torch.tensor(self.places)).tolist(), share_out(means, self.budget, self.limits)

    def state(self) -> dict[str, Tensor]:
        """All of the above as tensors by name."""
        found = {
            "rng": self.generator.get_state(),
            "energy": self.energy,
            "stale": self.stale,
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
            **{f"baseline.{name}": value for name, value in vars(self.baseline).items()},
            **{f"policy.{name}": value for name, value in self.policy.state_dict().items()},
            **{f"moments.{name}": value for name, value in moments(self.optimizer).items()},
            **{f"choice.{name}": value for name, value in self.choice.items()},
            **{f"log.{name}": torch.stack(values) for name, values in self.log.items()},
        }
        for m, spectrum in enumerate(self.spectra):
            for name in ("values", "left", "right"):
                found[f"spectrum.{m}.{name}"] = getattr(spectrum, name)
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue where :meth:`state` was taken."""

        def below(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        self.generator.set_state(state["rng"])
        self.energy, self.stale, self.seconds = state["energy"], state["stale"], float(state["seconds"])
        vars(self.baseline).update(below("baseline."))
        self.policy.load_state_dict(below("policy."))
        load_moments(self.optimizer, below("moments."))
        self.choice = below("choice.")
        self.log = {name: list(values) for name, values in below("log.").items()}
        device, saved = self.adapter.model.device, below("spectrum.")
        if saved:
            self.spectra = [
                Spectrum(
                    index=index,
                    **{name: saved[f"{m}.{name}"].to(device) for name in ("values", "left", "right")},
                )
                for m, index in enumerate(self.reachable)
            ]


def product_norm(b: Tensor, a: Tensor) -> Tensor:
    """‖b a‖_F of factors b (O, R) and a (R, I) without forming the product; a number on the CPU."""
    return ((b.t() @ b) * (a @ a.t())).sum().clamp_min(0).sqrt().cpu()
