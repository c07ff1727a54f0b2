r"""What an estimate is: a value with its interval, what it cost, and what it would have cost without a design.

    interval = value -+ t se                     95% unless asked otherwise, t with Satterthwaite's degrees of freedom
    nfe_independent = c t^2 sigma^2 / h^2        evaluations that independent sampling needs for the same half width h
    vrf = nfe_independent / nfe                  the pilot and everything that was tried is in `nfe`

For vectors and images h is the largest half width of a number (norm "max"), or the root of their mean square ("rms").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Candidate", "Decision", "Estimate", "Norm", "Progress", "RunState"]

Norm = Literal["max", "rms"]


@dataclass(frozen=True)
class Candidate:
    """A design as the pilot sees it.

    Attributes:
        design: its name.
        gain: variance x evaluations of independent sampling over its own; above 1 it helps, `nan` where not measured.
        nfe: evaluations predicted to the tolerance, or within the budget; `nan` likewise.
        note: "chosen", or why not.
    """

    design: str
    gain: float
    nfe: float
    note: str


@dataclass(frozen=True)
class Decision:
    """Why a design was used.

    Attributes:
        chosen: the design.
        sentence: the reason.
        candidates: what was compared, the best first.
        pilot: evaluations spent on comparing; its samples are part of the estimate.
    """

    chosen: str
    sentence: str
    candidates: tuple[Candidate, ...] = ()
    pilot: int = 0

    def table(self) -> str:
        """The candidates, one a line.

        Example:
            >>> best = Candidate("antithetic", 4.0, 250.0, "chosen")
            >>> rows = (best, Candidate("independent", 1.0, 1000.0, "baseline"))
            >>> print(Decision("antithetic", "because", rows).table())
            design                    gain        nfe  note
            antithetic                4.00        250  chosen
            independent               1.00       1000  baseline
        """
        lines = [f"{'design':<22}{'gain':>8}{'nfe':>11}  note"]
        lines += [f"{c.design:<22}{c.gain:>8.2f}{c.nfe:>11.0f}  {c.note}" for c in self.candidates]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Estimate:
    """E f of a sampler.

    Attributes:
        statistic: its name.
        value, low, high, se: the estimate, its interval and standard error, float64 of the statistic's shape.
        confidence: of the interval.
        half_width: h, the one number that a tolerance is compared with.
        nfe: network evaluations spent, the pilot included.
        samples: samples drawn.
        design: the design's name.
        vrf, vrf_low, vrf_high: variance-reduction factor against independent sampling, with its interval.
        nfe_independent: evaluations that independent sampling needs for the same interval, predicted.
        reached: whether the tolerance was reached (False where a budget ended the run; True without a tolerance).
        undercovers: why the interval may cover less than it says, or None.
        decision: how the design was chosen.
    """

    statistic: str
    value: Tensor
    low: Tensor
    high: Tensor
    se: Tensor
    confidence: float
    half_width: float
    nfe: int
    samples: int
    design: str
    vrf: float
    vrf_low: float
    vrf_high: float
    nfe_independent: float
    reached: bool
    undercovers: str | None
    decision: Decision

    @property
    def shape(self) -> torch.Size:
        """Shape of the statistic."""
        return self.value.shape

    def sentence(self) -> str:
        """The result in words.

        Example:
            >>> one = torch.tensor(1.0)
            >>> decision = Decision("antithetic", "it was named")
            >>> e = Estimate("norm", one, 0.9 * one, 1.1 * one, 0.05 * one, 0.95, 0.1, 640, 64, "antithetic", 2.0, 1.5,
            ...              2.6, 1280.0, True, None, decision)
            >>> print(e.sentence())
            norm = 1 [0.9, 1.1] (95%) for 640 evaluations by antithetic; independent sampling needs 1280
            (factor 2, 1.5 to 2.6)
        """
        if self.value.ndim == 0:
            head = f"{self.statistic} = {float(self.value):.6g} [{float(self.low):.6g}, {float(self.high):.6g}]"
        else:
            head = f"{self.statistic}: {tuple(self.value.shape)} numbers to within {self.half_width:.3g}"
        text = (
            f"{head} ({100 * self.confidence:g}%) for {self.nfe} evaluations by {self.design}; independent sampling "
            f"needs {self.nfe_independent:.0f} (factor {self.vrf:.3g}, {self.vrf_low:.3g} to {self.vrf_high:.3g})"
        )
        return text if self.undercovers is None else f"{text}; the interval may cover too little: {self.undercovers}"

    def summary(self) -> dict[str, Any]:
        """Plain numbers and text (scalars as numbers, arrays as lists of the first 16)."""

        def plain(v: Tensor) -> Any:
            return float(v) if v.ndim == 0 else v.flatten()[:16].tolist()

        out: dict[str, Any] = {k: plain(getattr(self, k)) for k in ("value", "low", "high", "se")}
        for k in ("statistic", "confidence", "half_width", "nfe", "samples", "design", "vrf", "vrf_low", "vrf_high"):
            out[k] = getattr(self, k)
        out |= {"nfe_independent": self.nfe_independent, "reached": self.reached, "undercovers": self.undercovers}
        out["decision"] = self.decision.sentence
        out["candidates"] = [vars(c) for c in self.decision.candidates]
        return out


@dataclass(frozen=True, eq=False)
class RunState:
    """All that a run needs to go on: tensors (for safetensors) and plain values (for JSON).

    Attributes:
        tensors: sums by stream and name.
        plain: units drawn by stream, evaluations, the decision.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    plain: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Progress:
    """A record of `estimates`.

    Attributes:
        estimate: the estimate so far; None in the pilot.
        nfe: evaluations spent.
        expected: evaluations at the end, predicted.
        state: of the run, for `estimates(..., state=)`.
        done: whether this is the last record.
    """

    estimate: Estimate | None
    nfe: int
    expected: float
    state: RunState
    done: bool

    @property
    def fraction(self) -> float:
        """Part of the run that is done, 0 to 1."""
        return (
            1.0 if self.done else min(self.nfe / max(self.expected, 1.0), 1.0) if math.isfinite(self.expected) else 0.0
        )
