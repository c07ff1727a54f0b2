"""Estimators by name, as `lowvar tune --estimator` takes them.

auto                                    a pilot measures
none, leave-one-out, batch, running     scores with that baseline (`Scores`)
x0, optimal, value                      scores with a regression on x0_hat, the optimal constant, a value network
grpo                                    scores as GRPO has them: group mean and group std
ddpo                                    scores as DDPO has them: running mean and std of the prompt, clipped at 10
branches                                scores with several ends a run (`Branches`)
surrogate                               a quadratic as control variate
x0-edges, surrogate-edges               the same two on a picture's details (`lowvar.reward.edges`)
pathwise                                every step by the reward's derivative
pathwise-K                              the last K steps so, those before by scores: unbiased
draft-K                                 the last K steps only: biased
roulette                                random truncation without bias
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

from lowvar.errors import UserError
from lowvar.reward.advantages import SCALES, ScaleRewards
from lowvar.reward.branches import Branches
from lowvar.reward.edges import edges
from lowvar.reward.estimators import Paths, RewardEstimator, Scores, SurrogateControl
from lowvar.reward.pathwise import Full, Last, Roulette

__all__ = ["ESTIMATORS", "estimator_named"]

_BASELINES: tuple[Literal["none", "leave-one-out", "batch", "running", "x0", "optimal", "value"], ...] = (
    "none",
    "leave-one-out",
    "batch",
    "running",
    "x0",
    "optimal",
    "value",
)
_OTHERS: Mapping[str, Callable[[int], RewardEstimator]] = {
    "grpo": lambda steps: Scores("group-including", "group"),
    "ddpo": lambda steps: Scores("running-including", "prompt", 10.0),
    "branches": lambda steps: Branches(max(steps // 2, 1)),
    "surrogate": lambda steps: SurrogateControl(),
    "x0-edges": lambda steps: Scores("x0", features=edges),
    "surrogate-edges": lambda steps: SurrogateControl(features=edges),
    "pathwise": lambda steps: Paths(Full()),
    "roulette": lambda steps: Paths(Roulette(0.8)),
}
ESTIMATORS: tuple[str, ...] = ("auto", *_BASELINES, *_OTHERS, "pathwise-K", "draft-K")


def estimator_named(
    name: str, *, scale_rewards: ScaleRewards = "none", steps: int = 10
) -> RewardEstimator | Literal["auto"]:
    """The estimator of a name.

    Args:
        name: see the module.
        scale_rewards: of scores.
        steps: of the policy.

    Raises:
        UserError: for an unknown name, a K out of range, or a scale where there are no scores.

    Example:
        >>> estimator_named("x0").name, estimator_named("pathwise").name
        ('scores, x0 baseline', 'pathwise, Full()')
    """
    if scale_rewards not in SCALES:
        raise UserError(f"scale_rewards is {scale_rewards!r}; allowed: {', '.join(SCALES)}")
    for baseline in _BASELINES:
        if name == baseline:
            return Scores(baseline, scale_rewards)
    if scale_rewards != "none":
        raise UserError(
            f"scale_rewards is {scale_rewards!r}, and estimator {name!r} takes none; give one of "
            f"{', '.join(_BASELINES)}, or scale_rewards 'none'"
        )
    if name == "auto":
        return "auto"
    if name in _OTHERS:
        return _OTHERS[name](steps)
    word = re.fullmatch(r"(pathwise|draft)-(\d+)", name)
    if word is None:
        raise UserError(f"estimator is {name!r}; allowed: {', '.join(ESTIMATORS)}")
    k = int(word[2])
    if not 1 <= k <= steps:
        raise UserError(f"estimator is {name!r}, and the sampler has {steps} steps; give K from 1 to {steps}")
    if word[1] == "draft":
        return Paths(Last(k))
    return Paths(Last(k, "score"), Scores("x0")) if k < steps else Paths(Full())
