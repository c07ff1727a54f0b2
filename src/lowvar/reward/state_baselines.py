r"""Baselines that know more than the rewards: the size of a run's score, and the state each step starts from.

**Optimal constant.** Of all constants b* = E[|S|^2 R] / E[|S|^2] gives the least variance of S (R - b). Estimated from
the other folds of the batch it costs no bias.

**A baseline a step.** b_t(x_t) may know the state x_t, since E[S_t | x_t] = 0. The best is a weighted value function,
E[|S_t|^2 R | x_t] / E[|S_t|^2 | x_t]; here it is a ridge regression of R on features of x0_hat(x_t), a step at a time,
weighted by |S_t|^2 and cross-fitted: no critic network, no further reward calls. |S_t|^2 is taken with respect to the
step's mean (`Rollout.score2`), which the rollout has at no cost; exact norms for the parameters are `score_norms`. The
weights matter where R has tails: unweighted fits can be worse than a constant. Predictions are kept within the rewards
of the runs that were fitted: where x0_hat saturates (modes), a regression extrapolates without bound.

**A learned value.** `ValueNetwork` is a regression on earlier batches, for prompts and long runs. Whatever predicts
*before* it is fitted to a batch costs no bias there.

**One step ahead.** V(x_s) - V(x_t) in place of R - V(x_t) also takes out what happens after the step. Biased, unless V
is exact.

Sources: E. Greensmith, P. Bartlett, J. Baxter, "Variance reduction techniques for gradient estimates in reinforcement
learning", 2004 (optimal baselines); the cross-fitted regression on x0_hat is this package's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowvar.reward.policy import Policy
from lowvar.reward.ridge import cross_fitted, fold_numbers, spread_folds
from lowvar.reward.rollout import Rollout
from lowvar.reward.surrogate import replayed

__all__ = ["linear_and_square", "optimal_constant", "score_norms", "x0_baseline"]

Features = Callable[[Tensor], Tensor]


def linear_and_square(x0: Tensor) -> Tensor:
    """The elements of x0 (n, *shape) and their squares, (n, 2 d).

    Example:
        >>> linear_and_square(torch.tensor([[2.0, 3.0]])).tolist()
        [[2.0, 3.0, 4.0, 9.0]]
    """
    flat = x0.flatten(1)
    return torch.cat([flat, flat.square()], 1)


def score_norms(policy: Policy, ran: Rollout, parameters: Sequence[Tensor]) -> Tensor:
    """|grad log p(x_s | x_t)|^2 with respect to the parameters, by run and step, (m, n).

    One backward pass a run and step: for small networks and pilots.

    Args:
        policy, ran: the policy and its rollout.
        parameters: that require gradients.
    """
    norms = torch.zeros(len(ran.steps), ran.n, dtype=ran.samples.dtype, device=ran.samples.device)
    for row, k, law in replayed(policy, ran):
        if k not in policy.scored:
            continue
        log_prob = law.log_prob(ran.actions[row].to(law.mean))
        for i in range(ran.n):
            grads = torch.autograd.grad(log_prob[i], list(parameters), retain_graph=i + 1 < ran.n, allow_unused=True)
            norms[row, i] = sum(float(g.square().sum()) for g in grads if g is not None)
    return norms


def optimal_constant(
    rewards: Tensor,
    weights: Tensor,
    *,
    folds: int = 4,
    groups: Tensor | None = None,
    streams: Tensor | None = None,
) -> Tensor:
    """b* for each run from runs other than itself, (n,): a baseline of `advantages`.

    Args:
        rewards: (n,).
        weights: |S|^2 of each run, (n,), or of each step, (m, n), which are summed.
        folds: number of folds; a run's constant comes from the other folds.
        groups: number of each run's group, (n,): a constant for each group, from the others of it; None: one for all.
        streams: as of `advantages`: runs that share noise do not count among the others.

    Raises:
        ValueError: if shapes do not fit.

    Example:
        >>> optimal_constant(torch.tensor([1.0, 1.0, 4.0, 4.0]), torch.tensor([1.0, 1.0, 2.0, 2.0]), folds=2).tolist()
        [4.0, 4.0, 1.0, 1.0]
    """
    rewards = rewards if rewards.is_floating_point() else rewards.to(torch.get_default_dtype())
    w = (weights.sum(0) if weights.ndim == 2 else weights).detach().to(rewards)
    if rewards.ndim != 1 or w.shape != rewards.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and weights {tuple(weights.shape)}: give (n,) and (n,) or (m, n)"
        )
    if groups is None:  # all but the own fold
        fold = fold_numbers(len(rewards), folds, streams).to(rewards.device)
        parts = [v.new_zeros(folds).index_add_(0, fold, v) for v in (w, w * rewards)]
        total, top = ((part.sum() - part)[fold] for part in parts)
    else:  # all of the group but the own run, and what shares its noise
        place = groups.to(rewards.device)
        stream = torch.arange(len(rewards)) if streams is None else streams
        own = torch.stack([place, stream.to(place)], 1).unique(dim=0, return_inverse=True)[1]
        place = place.unique(return_inverse=True)[1]
        total, top = (_sums(v, place) - _sums(v, own) for v in (w, w * rewards))
    return torch.where(total > 0, top / total.clamp_min(torch.finfo(w.dtype).tiny), 0.0)


def _sums(values: Tensor, place: Tensor) -> Tensor:
    """Of all with the same place, (n,)."""
    return values.new_zeros(int(place.max()) + 1).index_add_(0, place, values)[place]


def x0_baseline(
    ran: Rollout,
    rewards: Tensor,
    *,
    folds: int = 4,
    ridge: float | None = None,
    weights: Tensor | None = None,
    features: Features = linear_and_square,
) -> Tensor:
    """A baseline for every run and step, (m, n): the cross-fitted, weighted ridge of R on features of x0_hat(x_t).

    With several groups an indicator of each is among the features, and folds are spread over groups, so that a prompt's
    mean is known. Runs that share noise (`Rollout.streams`) stay in one fold.

    Args:
        ran: a rollout with `x0_hat`.
        rewards: (n,).
        folds: number of folds.
        ridge: number of runs that say "no slope"; None: by generalised cross-validation, a step and fold at a time.
        weights: |S_t|^2, (m, n); None: `ran.score2`.
        features: of denoised states (n, *shape), (n, p).

    Raises:
        ValueError: if the rollout has no x0_hat.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, Independent, PixelBasis, ReverseKernel
        >>> from lowvar.reward import Floor, Policy, rollout
        >>> schedule = CosineVP()
        >>> twin = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.ones(2))
        >>> policy = Policy(twin.denoiser(schedule), ReverseKernel(), torch.linspace(1, 0, 5), Floor(0.1))
        >>> ran = rollout(policy, Independent(0), 64, (2,))
        >>> R = ran.samples.sum(1)
        >>> b = x0_baseline(ran, R)
        >>> tuple(b.shape), bool((R - b[-1]).var() < 0.1 * R.var())  # the last state says nearly all
        ((4, 64), True)
    """
    if ran.x0_hat is None:
        raise ValueError("the rollout kept no x0_hat; make it with x0_hat=True")
    fold = spread_folds(ran.groups, folds, ran.streams)
    rewards = rewards if rewards.is_floating_point() else rewards.to(ran.samples.dtype)
    W = ran.score2 if weights is None else weights
    place = ran.groups.unique(return_inverse=True)[1].to(rewards.device)
    out = torch.zeros(len(ran.steps), ran.n, dtype=rewards.dtype, device=rewards.device)
    for row in range(len(ran.steps)):
        x = features(ran.x0_hat[row].to(rewards.device)).double()
        if int(place.max()):
            x = torch.cat([x, torch.nn.functional.one_hot(place).to(x)], 1)
        w = W[row].to(x) if float(W[row].sum()) > 0 else None
        for f, fit in enumerate(cross_fitted(x, rewards, fold, w, ridge)):
            mine = (fold == f).to(rewards.device)
            seen = rewards[~mine]
            out[row, mine] = fit(x[mine]).to(out).clamp(seen.min(), seen.max())
    return out
