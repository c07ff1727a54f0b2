"""How to tune (`TuneConfig`) and what an update was like (`TuneRecord`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from lowvar.reward.estimators import RewardEstimator, Scores
from lowvar.reward.kl import BetaController
from lowvar.reward.monitor import Check

__all__ = ["TuneConfig", "TuneRecord"]


@dataclass(frozen=True)
class TuneConfig:
    """How to tune.

    Args:
        updates: how many.
        batch: B, runs an update, over all processes; a multiple of the problem's `num_generations` x processes x parts.
        estimator: an estimator, or "auto".
        learning_rate: of AdamW (no weight decay).
        num_iterations: gradient steps on the same runs (TRL's name); above 1 for `Scores` only.
        trust_nats: bound of the log ratio then.
        beta: factor of the KL to the reference (TRL's name).
        target_kl: KL in nats that beta is steered to; None: beta stays.
        stop_kl: KL in nats at which tuning ends; None: never.
        max_grad_norm: bound of the gradient's norm.
        pilot_every: updates between pilots of "auto"; 0: only before the first.
        pilot_batch, pilot_repeats: of a pilot.
        checkpoint_every: updates between checkpoints; 0: none.
        gradient_accumulation_steps: parts whose gradients are added to one (the name of transformers): memory of a
            part only, and with 2 or more the gradient's variance is measured in every update, at no cost.
        average: decay of the moving average of the parameters, below 1; 0: none.
        mixed_precision: of the network's evaluations, by accelerate: "no" or "bf16".
        check_every: updates between checks by the monitor; 0: none.
        stop_quality: held-out distance at which tuning ends; None: never.
        measure_kl: whether the KL is measured in every update; without, where beta or stop_kl need it only.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> TuneConfig(updates=10, batch=32).estimator
        'auto'
    """

    updates: int = 100
    batch: int = 64
    estimator: RewardEstimator | Literal["auto"] = "auto"
    learning_rate: float = 1e-4
    num_iterations: int = 1
    trust_nats: float | None = 0.2
    beta: float = 0.0
    target_kl: float | None = None
    stop_kl: float | None = None
    max_grad_norm: float = 1.0
    pilot_every: int = 0
    pilot_batch: int = 64
    pilot_repeats: int = 8
    checkpoint_every: int = 0
    gradient_accumulation_steps: int = 1
    average: float = 0.0
    mixed_precision: Literal["no", "bf16"] = "no"
    check_every: int = 0
    stop_quality: float | None = None
    measure_kl: bool = True

    def __post_init__(self) -> None:
        """Checks the ranges."""
        least = {"updates": 1, "batch": 1, "num_iterations": 1, "pilot_every": 0, "checkpoint_every": 0}
        least |= {"gradient_accumulation_steps": 1, "check_every": 0, "pilot_batch": 1, "pilot_repeats": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; give {low} or more")
        for name in ("learning_rate", "max_grad_norm", "trust_nats", "stop_kl", "stop_quality"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; give a number above 0")
        if not 0 <= self.average < 1:
            raise ValueError(f"average is {self.average}; give a decay from 0 (none), below 1")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision is {self.mixed_precision!r}; allowed: 'no', 'bf16'")
        if self.num_iterations > 1 and not isinstance(self.estimator, Scores):
            raise ValueError(
                f"num_iterations is {self.num_iterations}, and only a score function can use its runs again; give "
                "estimator=Scores(...), or num_iterations=1"
            )
        BetaController(self.beta, self.target_kl)


@dataclass(frozen=True)
class TuneRecord:
    """Of one update.

    Attributes:
        update: its number, from 0.
        reward, reward_std: mean and standard deviation over the runs.
        kl: to the reference, nats a run; nan where there is none.
        beta: factor of it.
        gradient_norm: before clipping.
        estimator: its name.
        why: why it was chosen, in updates where it was.
        log_ratio: largest size of a log ratio in the last iteration.
        clipped: share of terms that clipping left without a gradient there.
        idle: share of groups whose rewards were all equal.
        reward_calls: so far, pilots included.
        seconds: of the update.
        variance: of the gradient, of one run, from the parts; nan where there is one part.
        snr: squared length of the gradient over the variance of the batch's, its own noise taken off; may be below 0.
        check: of the parameters after the update, where one was due.
    """

    update: int
    reward: float
    reward_std: float
    kl: float
    beta: float
    gradient_norm: float
    estimator: str
    why: str
    log_ratio: float
    clipped: float
    idle: float
    reward_calls: int
    seconds: float
    variance: float = math.nan
    snr: float = math.nan
    check: Check | None = None

    def plain(self) -> dict[str, Any]:
        """A line of `metrics.jsonl`: JSON has no nan, so null."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values["check"] = None if self.check is None else self.check.plain()
        return {k: v for k, v in _finite(values).items() if k != "check" or v is not None}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
