r"""Drawing streams: the sums of a run, on one process or several, and what they say.

A `Run` is the only thing of this package that changes: it holds the sums of each stream, the number of units drawn and
the evaluations spent. Unit u of a draw belongs to process u mod world; the sums are added over processes after every
draw, so all processes hold the same sums and take the same decisions.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from lowvar.expect.catalogue import Catalogue
from lowvar.expect.design import FREE, Combined, Design, ManyStreams, Pooled, allocation
from lowvar.expect.estimate import Candidate, Decision, Estimate, Norm, RunState
from lowvar.expect.streams import Stream
from lowvar.expect.sums import FOLDS, Sums, log_error
from lowvar.process.noise import NoiseSource

__all__ = ["Run", "half_width", "quantile"]


def quantile(confidence: float, freedom: float) -> float:
    """Two-sided quantile of the t distribution.

    Example:
        >>> round(quantile(0.95, 15), 3), round(quantile(0.95, 1e9), 3)
        (2.131, 1.96)
    """
    from scipy.stats import t

    return float(t.ppf(0.5 + confidence / 2, freedom))


def half_width(var: Tensor, norm: Norm, t: float) -> float:
    """t times the standard error: the largest, or the root of their mean square."""
    return t * math.sqrt(float(var.max() if norm == "max" else var.mean()))


class Run:
    """The sums of a run.

    Args:
        catalogue: sampler, statistic and streams.
        noise: independent noise.
        batch_size: samples evaluated at once.
        accelerator: accelerate's `Accelerator`, or None for one process.
    """

    def __init__(self, catalogue: Catalogue, noise: NoiseSource, batch_size: int, accelerator: Any = None) -> None:
        self.catalogue, self.noise, self.batch_size, self.accelerator = catalogue, noise, batch_size, accelerator
        self.sums: dict[str, Sums] = {}
        self.next: dict[str, int] = {}
        self.nfe = 0
        self.samples = 0
        self.decision: Decision | None = None
        self.memory: dict[str, Any] = {}

    @property
    def world(self) -> int:
        """Number of processes."""
        return 1 if self.accelerator is None else int(self.accelerator.num_processes)

    def batch(self, stream: Stream) -> int:
        """Units that a batch on every process holds, at least 1 a process."""
        return self.world * max(1, self.batch_size // stream.size)

    def draw(self, stream: Stream, units: int) -> None:
        """Adds `units` >= 1 units."""
        first = self.next.get(stream.key, 0)
        numbers = torch.arange(first, first + units)
        if self.world == 1:
            found = stream.sums(self.noise, numbers, self.batch_size)
        else:
            found = self._shared(stream, numbers)
        held = self.sums.get(stream.key)
        self.sums[stream.key] = found if held is None else held + found
        self.next[stream.key] = first + units
        self._count(stream, numbers)

    def add(self, stream: Stream, numbers: Tensor, values: tuple[Tensor, Tensor | None]) -> None:
        """Adds units whose values are known, on every process the same."""
        found = Sums.of(*values, numbers, stream.size)
        held = self.sums.get(stream.key)
        self.sums[stream.key] = found if held is None else held + found
        self.next[stream.key] = int(numbers[-1]) + 1
        self._count(stream, numbers)

    def room(self, stream: Stream, units: int, limit: float) -> int:
        """How many of the next `units` fit into `limit` evaluations, by what they really cost."""
        if not stream.nfe or not math.isfinite(limit):
            return units
        if stream.cost is None:
            return min(units, int((limit - self.nfe) // stream.nfe))
        first = self.next.get(stream.key, 0)
        while units and self.nfe + stream.spent(self.noise, torch.arange(first, first + units)) > limit:
            units -= max(1, units // 16)
        return units

    def _count(self, stream: Stream, numbers: Tensor) -> None:
        self.nfe += stream.spent(self.noise, numbers)
        self.samples += len(numbers) * stream.size if stream.nfe else 0

    def _shared(self, stream: Stream, numbers: Tensor) -> Sums:
        rank, world = self.accelerator.process_index, self.world
        mine = numbers[rank::world]
        own = stream.sums(self.noise, mine if len(mine) else numbers[:1], self.batch_size)
        scale = 1.0 if len(mine) else 0.0

        def total(x: Tensor) -> Tensor:
            return self.accelerator.reduce((scale * x).to(self.accelerator.device), reduction="sum").to(x.device)

        n = total(own.n.sum())
        shift, shift_h = total(own.n.sum() * own.shift) / n, total(own.n.sum() * own.shift_h) / n
        return own.reduced(total, shift, shift_h)

    # ------------------------------------------------------------------------------------------------------- results

    def focus(self, var: Tensor, norm: Norm) -> Tensor:
        """Weights over numbers whose variance the norm looks at, (D,)."""
        if norm == "rms":
            return torch.full_like(var, 1 / len(var))
        return torch.nn.functional.one_hot(var.argmax(), len(var)).to(var)

    def cost(self, stream: Stream) -> float:
        """What a unit is charged in planning."""
        return stream.nfe or FREE * self.catalogue.sampler.nfe * stream.size

    def wanted(
        self, combined: Combined, focus: Tensor, *, variance: float | None = None, budget: float | None = None
    ) -> list[float]:
        """Units of each part for a variance or a budget."""
        variances = [float((p.variance * focus).sum()) for p in combined.parts]
        return allocation(variances, [self.cost(p.stream) for p in combined.parts], variance=variance, budget=budget)

    def independent(self, design: Design, combined: Combined) -> float:
        """Samples that count as independent where all have one value: half of those in pairs and nets.

        Of a weighted sum of streams (classes) the one that says least of its share counts.
        """
        n = {p.stream.key: p.n * (p.stream.size / 2 if p.stream.size > 1 else 1) for p in combined.parts}
        main = design.main if isinstance(design, Pooled) else design
        if isinstance(main, ManyStreams):
            return min(n[s.key] / w for s, w in zip(main.streams, main.weights, strict=True))
        return sum(n[p.stream.key] for p in combined.parts if p.stream.nfe)

    def _silent(self, design: Design) -> Tensor:
        """Numbers of the statistic that had one value in all samples, (D,) of booleans."""
        sums = self.sums[design.streams[0].key]
        single, _ = design.spread(self.sums)
        return single <= 1e-24 * sums.shift**2

    def unseen(self, design: Design, combined: Combined, confidence: float) -> float:
        """log(2 / (1 - confidence)) where an indicator had one value in all samples, else 0 (`lowvar.expect.loop`)."""
        silent = self.catalogue.statistic.indicator and bool(self._silent(design).any())
        return math.log(2 / (1 - confidence)) if silent else 0.0

    def result(self, design: Design, combined: Combined, *, confidence: float, norm: Norm, reached: bool) -> Estimate:
        """The estimate of a design."""
        statistic = self.catalogue.statistic
        var = combined.var
        focus = self.focus(var, norm)
        t = quantile(confidence, combined.freedom(focus))
        silent = self._silent(design)
        if statistic.indicator:
            reach = math.log(2 / (1 - confidence)) / self.independent(design, combined)
            var = torch.where(silent, torch.full_like(var, (reach / t) ** 2), var)
        h = half_width(var, norm, t)
        single, leave = design.spread(self.sums)
        z = quantile(confidence, math.inf)
        alone = float(single.max() if norm == "max" else single.mean())
        needed = math.inf if h == 0 else self.catalogue.sampler.nfe * z**2 * alone / h**2
        needed = float(self.nfe) if alone == 0 else needed
        vrf = needed / self.nfe if alone > 0 else 1.0
        low, high = _around(vrf, self._log_spread(combined, leave, focus, norm))
        shape = statistic.shape
        se = var.sqrt()
        return Estimate(
            statistic.name,
            combined.mean.reshape(shape).cpu(),
            (combined.mean - t * se).reshape(shape).cpu(),
            (combined.mean + t * se).reshape(shape).cpu(),
            se.reshape(shape).cpu(),
            confidence,
            h,
            self.nfe,
            self.samples,
            design.name,
            vrf,
            low,
            high,
            needed,
            reached,
            self._declared(design, silent),
            self.decision or Decision(design.name, "it was named"),
        )

    def _declared(self, design: Design, silent: Tensor) -> str | None:
        """Why the interval may cover too little: what the design says, and values that were never seen."""
        count = int(silent.sum())
        if not count or self.catalogue.statistic.indicator:
            return design.declared
        which = "all samples have" if len(silent) == 1 else f"{count} of {len(silent)} numbers have"
        seen = f"{which} one value, and nothing is known of values rarer than 1 in {max(self.samples // 4, 1)}"
        return seen if design.declared is None else f"{design.declared}; {seen}"

    def _log_spread(self, combined: Combined, leave: Tensor, focus: Tensor, norm: Norm) -> float:
        """Jackknife standard error of log(variance of a sample / variance of the estimate) over folds."""
        alone = leave.amax(1) if norm == "max" else leave.mean(1)
        own = sum(((p.leave_out / p.n) @ focus for p in combined.parts), torch.zeros_like(alone))
        return float(log_error(alone / own))

    # --------------------------------------------------------------------------------------------------------- state

    def state(self) -> RunState:
        """All of it, for a checkpoint."""
        tensors = {f"{key}/{name}": v for key, sums in self.sums.items() for name, v in sums.state().items()}
        decision = None
        if self.decision is not None:
            decision = {**vars(self.decision), "candidates": [vars(c) for c in self.decision.candidates]}
        plain = {"next": dict(self.next), "nfe": self.nfe, "samples": self.samples, "decision": decision}
        return RunState(tensors, json.loads(json.dumps({**plain, "memory": self.memory})))

    def restore(self, state: RunState) -> None:
        """Goes on from a checkpoint."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, v in state.tensors.items():
            key, _, part = name.rpartition("/")
            found.setdefault(key, {})[part] = v
        self.sums = {key: Sums.restored(v) for key, v in found.items()}
        self.next = dict(state.plain["next"])
        self.nfe, self.samples = int(state.plain["nfe"]), int(state.plain["samples"])
        self.memory = dict(state.plain["memory"])
        d = state.plain["decision"]
        if d is not None:
            self.decision = Decision(**{**d, "candidates": tuple(Candidate(**c) for c in d["candidates"])})


def _around(value: float, error: float) -> tuple[float, float]:
    if not math.isfinite(value) or value == 0:
        return value, value
    factor = math.exp(quantile(0.95, FOLDS - 1) * error)
    return value / factor, value * factor
