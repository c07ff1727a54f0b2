r"""The loss whose gradient is the score-function estimate, at and near the parameters that ran.

    loss = - (1/n) sum_i sum_t min(rho_t A, clip(rho_t) A),   rho_t = p_theta(x_s | x_t) / p_old(x_s | x_t),

rho the true ratio of the densities, over all dimensions, of mean 1 under p_old. At theta = old, rho = 1 and the
gradient is -(1/n) sum S A, unbiased wherever the advantages are. After a step it is not: the states are still those
of p_old. Clipping keeps that in bounds (Schulman et al. 2017); `epsilon` bounds rho to [1 - epsilon, 1 + epsilon],
`trust_nats` bounds |log rho|, which means the same at any resolution. (DDPO's 1e-4 bounds the *mean* log ratio over d
dimensions: 1.64 nats at d = 16,384, 0.0064 at d = 64.) A step whose KL to the old one is k nats has log rho of mean -k
and standard deviation sqrt(2 k).

The sum over steps is a sum of losses (`surrogate_losses` yields them), so that a loop which calls `backward` on each
holds the graph of one step only.

Sources: J. Schulman, F. Wolski, P. Dhariwal, A. Radford, O. Klimov, "Proximal policy optimization algorithms", 2017;
K. Black et al., "Training diffusion models with reinforcement learning", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.gradients.estimator import zero
from lowvar.process.kernel import Gaussian
from lowvar.reward.advantages import Advantages
from lowvar.reward.claims import Claim, beside_paths, combined
from lowvar.reward.policy import Policy
from lowvar.reward.rollout import Rollout

__all__ = ["OFF_POLICY", "SurrogateLoss", "replayed", "surrogate_loss", "surrogate_losses"]

_MOVED = 0.01  # nats: a ratio that far from 1 is no rounding, however many dimensions it is summed over
OFF_POLICY = Claim("direction", "the parameters have moved since the rollout: states are the old policy's", "PPO")


@dataclass(frozen=True, eq=False)
class SurrogateLoss:
    """Of a batch of runs, or of one step of it.

    Attributes:
        loss: to be minimised: its gradient is minus the estimate of grad E R.
        each: the runs' terms, (n,); loss is their mean.
        log_ratio: log rho of the steps with a density, (m', n), without gradient.
        clipped: share of terms that clipping left without a gradient.
        claim: what holds for the estimate.
    """

    loss: Tensor
    each: Tensor
    log_ratio: Tensor
    clipped: float
    claim: Claim


def replayed(policy: Policy, ran: Rollout) -> Iterator[tuple[int, int, Gaussian]]:
    """The laws of a rollout's steps at the policy's present parameters, with a graph.

    Yields:
        (row, k, law): place among the kept steps, number of the step, p_theta(. | states[row]).
    """
    chain = policy.chain(ran.prompts)
    device = ran.samples.device
    for row, k in enumerate(ran.steps):
        yield row, k, chain.law(k, ran.states[row].to(device))


def _range(epsilon: float | None, trust_nats: float | None) -> tuple[float, float] | None:
    if epsilon is not None and trust_nats is not None:
        raise ValueError("epsilon and trust_nats are one bound in two units; give one of them")
    if epsilon is not None:
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon is {epsilon}; allowed: above 0, below 1")
        return math.log1p(-epsilon), math.log1p(epsilon)
    if trust_nats is not None:
        if not trust_nats > 0:
            raise ValueError(f"trust_nats is {trust_nats}; give a bound above 0")
        return -trust_nats, trust_nats
    return None


def _steps(
    policy: Policy,
    ran: Rollout,
    A: Tensor,
    claim: Claim,
    limits: tuple[float, float] | None,
    reward_gradient: Tensor | None,
) -> Iterator[SurrogateLoss]:
    scored = set(policy.scored)
    A = A.to(ran.samples)
    if A.shape not in ((ran.n,), (len(ran.steps), ran.n)):
        raise ValueError(
            f"advantages have shape {tuple(A.shape)}; give ({ran.n},), or ({len(ran.steps)}, {ran.n}): one a kept step"
        )
    A = A.expand(len(ran.steps), ran.n)
    if policy.terminal == "pathwise" and reward_gradient is None:
        raise ValueError(
            "the policy's last step is differentiated, so the loss needs reward_gradient, dR/dx_0 at the samples; for "
            "a reward without derivative choose terminal=Floor(std)"
        )
    nothing = A.new_zeros((0, ran.n))
    for row, k, law in replayed(policy, ran):
        if k not in scored:
            if policy.terminal == "pathwise" and reward_gradient is not None:
                each = -(reward_gradient.to(law.mean) * zero(law.mean)).flatten(1).sum(1)
                yield SurrogateLoss(each.mean(), each, nothing, 0.0, claim)
            continue
        log_ratio = law.log_prob(ran.actions[row].to(law.mean)) - ran.log_prob[row].to(law.mean)
        gain = log_ratio.exp() * A[row]
        cut = torch.zeros_like(A[row], dtype=torch.bool)
        if limits is not None:
            bounded = log_ratio.clamp(*limits).exp() * A[row]
            cut = bounded < gain
            gain = torch.minimum(gain, bounded)
        each = -ran.weight * gain
        at = log_ratio.detach()
        rounding = 1e3 * torch.finfo(at.dtype).eps * max(float(ran.log_prob[row].abs().max()), 1.0)
        moved = bool((at.abs() > min(rounding, _MOVED)).any())
        now = combined(claim, OFF_POLICY) if moved else claim
        yield SurrogateLoss(each.mean(), each, at[None], float(cut.double().mean()), now)


def surrogate_losses(
    policy: Policy,
    ran: Rollout,
    advantages: Advantages | Tensor,
    *,
    epsilon: float | None = None,
    trust_nats: float | None = None,
    reward_gradient: Tensor | None = None,
) -> Iterator[SurrogateLoss]:
    """`surrogate_loss`, a step at a time: the gradients of what it yields add up to it.

    Args:
        policy, ran, advantages, epsilon, trust_nats, reward_gradient: as of `surrogate_loss`.

    Yields:
        A loss a step.
    """
    A = advantages.values if isinstance(advantages, Advantages) else advantages
    own = advantages.claim if isinstance(advantages, Advantages) else Claim("none")
    own = beside_paths(own) if policy.terminal == "pathwise" else own
    yield from _steps(policy, ran, A, combined(policy.claim, own), _range(epsilon, trust_nats), reward_gradient)


def surrogate_loss(
    policy: Policy,
    ran: Rollout,
    advantages: Advantages | Tensor,
    *,
    epsilon: float | None = None,
    trust_nats: float | None = None,
    reward_gradient: Tensor | None = None,
) -> SurrogateLoss:
    """The score-function loss of a rollout.

    Args:
        policy: with the present parameters.
        ran: the rollout, by this policy before it moved.
        advantages: of the runs, (n,), or of steps, (m, n).
        epsilon: bound of the ratio (PPO, TRL's name), or
        trust_nats: bound of the log ratio, in nats. None of both: no clipping.
        reward_gradient: dR/dx_0 at the samples, (n, *shape), for `terminal="pathwise"`.

    Raises:
        ValueError: if shapes do not fit, a bound is out of range, or the reward's gradient is missing.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, Independent, PixelBasis, ReverseKernel
        >>> from lowvar.reward import Floor, advantages, rollout
        >>> schedule, shift = CosineVP(), torch.zeros(2, requires_grad=True)
        >>> twin = GaussianTwin(shift, PixelBasis((2,)), torch.ones(2))
        >>> policy = Policy(twin.denoiser(schedule), ReverseKernel(), torch.linspace(1, 0, 5), Floor(0.1))
        >>> ran = rollout(policy, Independent(0), 64, (2,))
        >>> out = surrogate_loss(policy, ran, advantages(ran.samples.sum(1)), trust_nats=0.5)
        >>> out.loss.backward()
        >>> bool((shift.grad < 0).all()), out.claim.label  # the loss falls where the reward, the sum, grows
        (True, 'unbiased')
    """
    parts = list(
        surrogate_losses(
            policy, ran, advantages, epsilon=epsilon, trust_nats=trust_nats, reward_gradient=reward_gradient
        )
    )
    each = torch.stack([part.each for part in parts]).sum(0)
    ratios = [part.log_ratio for part in parts if len(part.log_ratio)]
    log_ratio = torch.cat(ratios) if ratios else parts[0].log_ratio
    clipped = sum(part.clipped for part in parts) / max(len(ratios), 1)
    return SurrogateLoss(each.mean(), each, log_ratio, clipped, combined(*(part.claim for part in parts)))
