r"""How far the policy has gone from a reference, and the gradient of that.

    KL(p || q) = E_p sum_t KL_t(x_t),   KL_t(x) = KL(p(. | x) || q(. | x)),

every KL_t the exact one of two Gaussians: |m_p - m_q|^2 / (2 var) where both have one isotropic variance. Its gradient
has two parts, since the parameters move the law at each state *and* which states come:

    grad = E sum_t [ grad KL_t(x_t)  +  S_t (sum_{u > t} KL_u(x_u) - b_t) ].

    "exact"     both parts; b_t is the mean of the group's other runs. Unbiased. As a loss: sum_t w_t (KL_t - c_t) + c_t
                with w_t = prod_{u < t} p / p_old of the actions and c_t the others' mean, which is right at moved
                parameters too, so it holds in every inner iteration on the same runs
    "direct"    the first part only (DPOK, Flow-GRPO): direction, the states' part is missing
    "k1"        S_t times sum_{u >= t} log p/q of the actions: unbiased, of far larger variance
    "k2"        grad of (log p/q)^2 / 2, the actions held: the first part, unbiased of "direct", with more variance
    "k3"        grad of q/p - 1 - log q/p, the actions held (GRPO): in expectation the first part of grad KL(q || p),
                the other way round; for kernels of one variance that is "direct", with heavy tails

Sources: J. Schulman, "Approximating KL divergence", 2020 (k1, k2, k3); Y. Fan et al., "DPOK", 2023; J. Liu et al.,
"Flow-GRPO", 2025; the score part is the policy gradient theorem applied to -KL as a reward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lowvar.gradients.estimator import zero
from lowvar.reward.advantages import others_mean
from lowvar.reward.claims import Claim, combined
from lowvar.reward.policy import Policy
from lowvar.reward.rollout import Rollout
from lowvar.reward.surrogate import replayed

__all__ = ["KL_ESTIMATORS", "BetaController", "KLEstimator", "KLLoss", "kl_loss"]

KLEstimator = Literal["exact", "direct", "k1", "k2", "k3"]

KL_ESTIMATORS: Mapping[str, Claim] = {
    "exact": Claim("none", source="own derivation"),
    "direct": Claim("direction", "the KL of later steps does not reach earlier ones", "Fan et al. 2023"),
    "k1": Claim("none", source="Schulman 2020"),
    "k2": Claim("direction", "the KL of later steps does not reach earlier ones", "Schulman 2020"),
    "k3": Claim(
        "direction",
        "of KL(q || p), and the KL of later steps does not reach earlier ones",
        "Schulman 2020; Shao et al. 2024",
    ),
}


@dataclass(frozen=True, eq=False)
class KLLoss:
    """Of a rollout.

    Attributes:
        loss: its value is the mean KL of a run in nats, its gradient the estimate.
        each: the runs' terms, (n,); loss is their mean.
        kl: exact KL_t by step and run, (m, n), without gradient.
        claim: of the gradient; the value is unbiased.
    """

    loss: Tensor
    each: Tensor
    kl: Tensor
    claim: Claim


def kl_loss(policy: Policy, reference: Policy, ran: Rollout, *, estimator: KLEstimator = "exact") -> KLLoss:
    """The KL of the policy to a reference with the same grid and kernel, to be added to a loss with a factor beta.

    With "exact" the parameters may have moved since the rollout; the others need one of the present parameters. A last
    step without density counts with neither.

    Args:
        policy: p.
        reference: q, which gets no gradient.
        ran: a rollout of the policy, all its steps.
        estimator: see the module.

    Raises:
        ValueError: if the estimator is unknown, steps differ or are missing, or "exact" has one run only.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, Independent, PixelBasis, ReverseKernel
        >>> from lowvar.reward import Floor, rollout
        >>> schedule, shift = CosineVP(), torch.full((2,), 0.3, requires_grad=True)
        >>> def made(mean):
        ...     twin = GaussianTwin(mean, PixelBasis((2,)), torch.ones(2))
        ...     return Policy(twin.denoiser(schedule), ReverseKernel(), torch.linspace(0.9, 0, 5), Floor(0.1))
        >>> policy = made(shift)
        >>> out = kl_loss(policy, made(torch.zeros(2)), rollout(policy, Independent(0), 64, (2,)))
        >>> out.loss.backward()
        >>> bool(out.loss > 0), bool((shift.grad > 0).all()), out.claim.label
        (True, True, 'unbiased')
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"the KL estimator is {estimator!r}; allowed: {', '.join(KL_ESTIMATORS)}")
    if policy.steps != reference.steps or not torch.equal(policy.grid, reference.grid):
        raise ValueError(f"the policy has {policy.steps} steps, the reference {reference.steps}, or other times")
    missing = sorted(set(policy.scored) - set(ran.steps))
    if missing:
        raise ValueError(
            f"the rollout kept steps {ran.steps} and lacks {tuple(missing)}, whose KL would be missing; make it "
            "without `steps`"
        )
    if estimator == "exact" and ran.n < 2:
        raise ValueError("the score part needs the mean of other runs; give at least 2 runs")
    scored = set(policy.scored)
    q_chain = reference.chain(ran.prompts)
    kl, log_p, log_q, log_old = [], [], [], []
    for row, k, law in replayed(policy, ran):
        if k not in scored:
            continue
        action = ran.actions[row].to(law.mean)
        with torch.no_grad():
            other = q_chain.law(k, ran.states[row].to(law.mean))
            log_q.append(other.log_prob(action))
        kl.append(law.kl(other))
        log_p.append(law.log_prob(action))
        log_old.append(ran.log_prob[row].to(law.mean))
    KL, S, log_ratio = torch.stack(kl), torch.stack(log_p), torch.stack(log_p) - torch.stack(log_q)
    value = KL.detach()
    if estimator == "exact":
        moved = S - torch.stack(log_old)
        w = (moved.cumsum(0) - moved).exp()
        groups = ran.groups.to(value.device)
        _, place, size = groups.unique(return_inverse=True, return_counts=True)
        small = int(size.min()) < 2 or ran.streams is not None  # a group may be one stream
        groups = torch.zeros_like(place) if small else groups
        c = torch.stack([others_mean(row, groups, estimator, ran.streams) for row in value])
        each = w * (KL - c) + c
    elif estimator == "direct":
        each = KL
    elif estimator == "k1":
        to_go = log_ratio.detach().flip(0).cumsum(0).flip(0)
        each = value + to_go * zero(S)
    elif estimator == "k2":
        each = value + zero(log_ratio.square() / 2)
    else:
        each = value + zero(torch.expm1(-log_ratio) + log_ratio)
    each = each.sum(0)
    claim = combined(policy.claim, KL_ESTIMATORS[estimator])
    return KLLoss(each.mean(), each, value, claim)


@dataclass(frozen=True)
class BetaController:
    """A factor beta that steers the KL to a target (Ziegler et al. 2019).

    beta <- beta (1 + rate clip(KL / target - 1, -0.2, 0.2)).

    Args:
        beta: the factor (TRL's name), >= 0.
        target: KL of a run in nats; None: beta stays.
        rate: of the adaptation, above 0.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> control = BetaController(beta=0.1, target=2.0)
        >>> control.updated(4.0).beta > 0.1 > control.updated(1.0).beta
        True
    """

    beta: float
    target: float | None = None
    rate: float = 0.1

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not (math.isfinite(self.beta) and self.beta >= 0) or not self.rate > 0:
            raise ValueError(f"beta is {self.beta}, rate {self.rate}; need beta >= 0 and a rate above 0")
        if self.target is not None and not (self.target > 0 and self.beta > 0):
            raise ValueError(f"target is {self.target}, beta {self.beta}; a target needs both above 0")

    def updated(self, kl: float) -> BetaController:
        """After a batch of this mean KL."""
        if self.target is None:
            return self
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return replace(self, beta=self.beta * (1 + self.rate * error))
