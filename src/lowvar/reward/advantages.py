r"""Advantages: what multiplies a run's score, and what each choice does to the expectation.

    grad E R = E [S (R - b)],     S = sum_t grad log p(x_s | x_t),     for any b that does not know this run's noise.

Baselines b of a group of G runs of one prompt, R_i the reward of run i:

    none                0                                                             unbiased
    batch               mean of the other n - 1 runs: n / (n - 1) (R_i - mean)        unbiased
    batch-including     mean of all n: the gradient is multiplied by 1 - 1/n          factor
    leave-one-out       mean of the other G - 1 of the group                          unbiased
    group-including     mean of the group (GRPO): 1 - 1/G                             factor
    running             mean of the prompt in earlier batches                         unbiased
    running-including   the same with this batch in it (DDPO)                         direction
    a number, or a tensor (n,) or (m, n) of ones that do not know their own reward    unbiased

"The others" are those that share no noise with the run: of antithetic pairs (`streams`) both are left out of each
other's baseline, or the gradient of a linear reward would be 1 + 1 / (G - 1) times too long.

Scales, which divide (R - b):

    none      the default                                                                               unbiased
    group     std of the group (GRPO). Prompts are weighted by 1 / std: those where nothing is at stake, most  direction
    batch     std of the batch                                                                          direction
    running   std of all rewards of earlier batches: a constant, given the past                         factor
    prompt    std of the prompt's buffer, this batch included (DDPO)                                     direction

Two prompts with opposed preferences and rewards of scale 1 and 0.1 turn a per-group std round: the cosine with the true
gradient is negative (`tests/reward`). Where a std is 0, nothing was learned and the advantage is 0: no NaN.

Clipping bounds |R - b| (after scaling): direction, since rare rewards of large size count for less.

Sources: W. Kool, H. van Hoof, M. Welling, "Buy 4 REINFORCE samples, get a baseline for free!", 2019; Z. Shao et al.,
"DeepSeekMath", 2024 (GRPO); K. Black et al., "Training diffusion models with reinforcement learning", 2024 (DDPO);
names as in TRL's GRPO.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowvar.reward.claims import Claim, combined
from lowvar.reward.running import RunningStatistics

__all__ = ["BASELINES", "SCALES", "AdvantageBaseline", "Advantages", "ScaleRewards", "advantages"]

AdvantageBaseline = Literal[
    "none", "batch", "batch-including", "leave-one-out", "group-including", "running", "running-including"
]
ScaleRewards = Literal["none", "group", "batch", "running", "prompt"]

_KOOL, _GRPO, _DDPO = "Kool et al. 2019", "Shao et al. 2024", "Black et al. 2024"

BASELINES: Mapping[str, Claim] = {
    "none": Claim("none", source="Williams 1992"),
    "batch": Claim("none", source=_KOOL),
    "batch-including": Claim("factor", "the batch mean includes the run itself: 1 - 1/n", "common practice"),
    "leave-one-out": Claim("none", source=_KOOL),
    "group-including": Claim("factor", "the group mean includes the run itself: 1 - 1/G", _GRPO),
    "running": Claim("none", source=_DDPO),
    "running-including": Claim("direction", "the prompt's buffer includes the run itself", _DDPO),
}
SCALES: Mapping[str, Claim] = {
    "none": Claim("none"),
    "group": Claim("direction", "groups are weighted by 1 / std of their rewards", _GRPO),
    "batch": Claim("direction", "the batch's std includes the run itself", "TRL"),
    "running": Claim("factor", "divided by the std of earlier rewards", "own derivation: a constant given the past"),
    "prompt": Claim("direction", "prompts are weighted by 1 / std of their rewards", _DDPO),
}
_CLIP = Claim("direction", "advantages of large size are cut")


@dataclass(frozen=True)
class Advantages:
    """Of a batch of runs.

    Attributes:
        values: (n,), or (m, n) with a baseline a step; without gradient.
        claim: of the estimator that multiplies scores by them.
        state: the running statistics with this batch.
        idle: share of groups whose rewards are all equal: with a group baseline they teach nothing.
    """

    values: Tensor
    claim: Claim
    state: RunningStatistics
    idle: float


def _group_sums(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of each sample's group and its size, (n,), and each sample's group by place."""
    _, place = groups.unique(return_inverse=True)
    count = int(place.max()) + 1
    total = values.new_zeros(count).index_add_(0, place, values)
    size = values.new_zeros(count).index_add_(0, place, torch.ones_like(values))
    return total[place], size[place], place


def others_mean(rewards: Tensor, groups: Tensor, what: str, streams: Tensor | None = None) -> Tensor:
    """Mean of the other runs of each run's group, (n,), those of its stream left out.

    Args:
        rewards: or other values, (n,).
        groups: (n,).
        what: is named in the error where there are none.
        streams: as of `advantages`.
    """
    total, size, place = _group_sums(rewards, groups)
    own, count = rewards, torch.ones_like(size)
    if streams is not None:
        stream = streams.to(place.device).unique(return_inverse=True)[1]
        own, count, _ = _group_sums(rewards, place * (int(stream.max()) + 1) + stream)
    if bool((size <= count).any()):
        one, two = ("run", "2") if streams is None else ("stream of noise", "2 streams of runs")
        raise ValueError(
            f"baseline {what!r} is the mean of the others, and a group has one {one}; give num_generations >= {two}, "
            "or a baseline over the batch"
        )
    return (total - own) / (size - count)


def _baseline(
    name: str,
    rewards: Tensor,
    groups: Tensor,
    past: RunningStatistics,
    now: RunningStatistics,
    streams: Tensor | None,
) -> Tensor:
    everyone = torch.zeros_like(groups)
    if name == "none":
        return torch.zeros_like(rewards)
    if name == "batch":
        return others_mean(rewards, everyone, name, streams)
    if name == "leave-one-out":
        return others_mean(rewards, groups, name, streams)
    if name == "batch-including":
        return rewards.mean().expand_as(rewards)
    if name == "group-including":
        total, size, _ = _group_sums(rewards, groups)
        return total / size
    if name == "running":
        mean, _, own = past.before(groups)
        return torch.where(own, mean, others_mean(rewards, everyone, name, streams) if len(rewards) > 1 else 0.0)
    mean, _, own = now.before(groups)
    return torch.where(own, mean, rewards.mean())


def _std(name: str, rewards: Tensor, groups: Tensor, past: RunningStatistics, now: RunningStatistics) -> Tensor | None:
    if name == "none":
        return None
    if name == "group":
        total, size, place = _group_sums(rewards, groups)
        square, _, _ = _group_sums((rewards - total / size).square(), place)
        return (square / (size - 1).clamp_min(1)).sqrt()
    if name == "batch":
        return rewards.std().expand_as(rewards) if len(rewards) > 1 else torch.zeros_like(rewards)
    if name == "running":
        return torch.full_like(rewards, past.std if past.count > 1 else 1.0)
    _, std, own = now.before(groups)
    return torch.where(own, std, rewards.std(correction=0))


def advantages(
    rewards: Tensor,
    groups: Tensor | None = None,
    *,
    baseline: AdvantageBaseline | float | Tensor = "leave-one-out",
    scale_rewards: ScaleRewards = "none",
    clip: float | None = None,
    state: RunningStatistics | None = None,
    streams: Tensor | None = None,
) -> Advantages:
    """What multiplies the scores of a batch of runs.

    Args:
        rewards: of each run, (n,), finite.
        groups: number of each run's group, (n,); None: all are one. For the running choices a number means the same
            prompt in every batch.
        baseline: see the module.
        scale_rewards: see the module.
        clip: bound of the advantages' size, after scaling; None: no bound.
        state: running statistics before this batch; None: none yet.
        streams: `Rollout.streams`, (n,): runs of equal number share noise. None: no two do.

    Raises:
        ValueError: if a name is unknown, a reward is not finite or shapes do not fit.

    Example:
        >>> rewards, groups = torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1])
        >>> advantages(rewards, groups).values.tolist()
        [-2.0, 2.0, 0.0, 0.0]
        >>> grpo = advantages(rewards, groups, baseline="group-including", scale_rewards="group")
        >>> [round(v, 3) for v in grpo.values.tolist()], grpo.claim.bias, grpo.idle
        ([-0.707, 0.707, 0.0, 0.0], 'direction', 0.5)
    """
    if rewards.ndim != 1 or not len(rewards):
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}; give one number a run, (n,)")
    bad = ~torch.isfinite(rewards)
    if bool(bad.any()):
        raise ValueError(f"the rewards of runs {bad.nonzero()[:8, 0].tolist()} are not finite; mend or leave out those")
    R = rewards.detach().double()
    groups = torch.zeros(len(R), dtype=torch.int64, device=R.device) if groups is None else groups.to(R.device)
    if groups.shape != R.shape:
        raise ValueError(f"groups has shape {tuple(groups.shape)}; give one number a run, ({len(R)},)")
    if isinstance(baseline, str) and baseline not in BASELINES:
        raise ValueError(f"baseline is {baseline!r}; allowed: {', '.join(BASELINES)}, a number or a tensor")
    if scale_rewards not in SCALES:
        raise ValueError(f"scale_rewards is {scale_rewards!r}; allowed: {', '.join(SCALES)}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}; give a bound above 0, or None")
    past = RunningStatistics() if state is None else state
    now = past.updated(groups, R)
    if isinstance(baseline, Tensor):
        if baseline.shape[-1:] != R.shape or baseline.ndim > 2:
            raise ValueError(f"the baseline has shape {tuple(baseline.shape)}; give ({len(R)},) or (m, {len(R)})")
        b, claim = baseline.detach().to(R), Claim("none")
    elif isinstance(baseline, str):
        b, claim = _baseline(baseline, R, groups, past, now, streams), BASELINES[baseline]
    else:
        b, claim = torch.full_like(R, float(baseline)), Claim("none")
    A = R - b
    std = _std(scale_rewards, R, groups, past, now)
    if std is not None:
        tiny = 1e-12 * (1 + R.abs().max())  # equal rewards differ by rounding only
        A = torch.where(std > tiny, A / std.clamp_min(tiny), 0.0)
    if clip is not None:
        A = A.clamp(-clip, clip)
    claim = combined(claim, SCALES[scale_rewards], *([] if clip is None else [_CLIP]))
    kind = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    return Advantages(A.to(kind), claim, now, _idle(R, groups))


def _idle(R: Tensor, groups: Tensor) -> float:
    total, size, place = _group_sums(R, groups)
    square, _, _ = _group_sums((R - total / size).square(), place)
    equal = square <= 1e-24 * (1 + R.square().max()) * size
    first = torch.zeros(int(place.max()) + 1, dtype=torch.bool, device=R.device).index_copy_(0, place, equal)
    return float(first.double().mean())
