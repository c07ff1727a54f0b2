r"""A surrogate as control variate for a reward without derivative.

    grad E R = grad E h + grad E (R - h):     the pathwise gradient of h + the score times the residual R - h.

h is any differentiable function that does not know this run's noise. The better it predicts R, the smaller the residual
that has to go through the scores; a wrong h costs variance, never bias. `RidgeSurrogate` fits a quadratic of the
sample, or a sum of other `features` that say what the reward looks at, to the batch itself, each run's from the other
folds; a network fitted on earlier batches does as well.

**Residuals that are compared.** A run of fold f has h_f, fitted without f, and is judged beside residuals
R_j - h_f(x_j) of the others: under one function, which does not know it. Beside R_j - h_g(x_j), each run's under its
own, it would meet its own reward in h_g, and with a group of n runs the gradient would be up to n / (n - 1) times too
long.

The residual goes through the scores of *every* step, so the last one needs a density: `terminal=Floor(std)`.

Sources: W. Grathwohl, D. Choi, Y. Wu, G. Roeder, D. Duvenaud, "Backpropagation through the void", 2018 (the same split
for one site); the derivation for chains is above.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowvar.process.noise import NoiseSource
from lowvar.reward.advantages import Advantages
from lowvar.reward.claims import Claim, beside_paths, combined
from lowvar.reward.pathwise import AdvantageRule, RewardLoss, leave_one_out
from lowvar.reward.policy import Policy
from lowvar.reward.rewards import Reward, evaluated
from lowvar.reward.ridge import Ridge, cross_fitted, fold_numbers
from lowvar.reward.rollout import Rollout, rollout
from lowvar.reward.state_baselines import Features, linear_and_square
from lowvar.reward.surrogate import surrogate_loss

__all__ = ["RidgeSurrogate", "surrogate_control"]

Surrogate = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class RidgeSurrogate:
    """A function of the sample for each run of a batch, fitted to the others: by default a quadratic.

    Attributes:
        fits: one regression a fold.
        fold: number of each run's fold, (n,).
        features: of samples.
    """

    fits: Sequence[Ridge]
    fold: Tensor
    features: Features = linear_and_square

    @classmethod
    def fit(
        cls,
        samples: Tensor,
        rewards: Tensor,
        *,
        folds: int = 4,
        ridge: float | None = None,
        features: Features = linear_and_square,
        streams: Tensor | None = None,
    ) -> RidgeSurrogate:
        """Fits.

        Args:
            samples: (n, *shape).
            rewards: (n,).
            folds, ridge, features: as of `x0_baseline`; h has a derivative only where the features have one.
            streams: as of `advantages`: runs of one noise stay in one fold.

        Example:
            >>> x = torch.linspace(-1, 1, 16)[:, None]
            >>> h = RidgeSurrogate.fit(x, 3 * x[:, 0] ** 2, ridge=1e-6)
            >>> bool((h(x) - 3 * x[:, 0] ** 2).abs().max() < 1e-3)
            True
        """
        fold = fold_numbers(len(samples), folds, streams)
        return cls(cross_fitted(features(samples), rewards, fold, ridge=ridge), fold, features)

    def __call__(self, samples: Tensor) -> Tensor:
        """h of the batch's samples (n, *shape) in their order, (n,)."""
        x = self.features(samples)
        every = torch.stack([fit(x) for fit in self.fits])
        return every.gather(0, self.fold.to(x.device)[None])[0]

    @torch.no_grad()
    def judged(self, advantage: AdvantageRule, ran: Rollout, rewards: Tensor) -> Advantages | Tensor:
        """What a rule says of the residuals, every fold's under its own function (see the module).

        Args:
            advantage: the rule.
            ran: the batch's runs, in their order.
            rewards: (n,).
        """
        x = self.features(ran.samples)
        given = [advantage(ran, rewards - fit(x).to(rewards)) for fit in self.fits]
        values = [one.values if isinstance(one, Advantages) else one for one in given]
        out = values[0].clone()
        for f, own in enumerate(values):
            mine = (self.fold == f).to(out.device)
            out[..., mine] = own[..., mine]
        return replace(given[0], values=out) if isinstance(given[0], Advantages) else out


def surrogate_control(
    policy: Policy,
    reward: Reward,
    noise: NoiseSource,
    n: int,
    shape: Sequence[int],
    *,
    surrogate: Surrogate | None = None,
    advantage: AdvantageRule = leave_one_out,
    folds: int = 4,
    ridge: float | None = None,
    features: Features = linear_and_square,
    first: int = 0,
    prompts: Any = None,
    columns: Mapping[str, Any] | None = None,
    groups: Tensor | None = None,
    num_generations: int | None = None,
    checkpoint: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> RewardLoss:
    """The loss of a black-box reward with a surrogate as control variate.

    Args:
        policy: with a density in every step.
        reward: any.
        noise, n, shape, first, prompts, columns, groups, num_generations, checkpoint, dtype, device: as of
            `pathwise_loss`.
        surrogate: h, differentiable, (n, *shape) -> (n,); None: `RidgeSurrogate` on this batch.
        advantage: rule for the residuals.
        folds, ridge, features: of the ridge; a batch of fewer runs has a fold a run.

    Raises:
        ValueError: if the last step has no density.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, Independent, PixelBasis, ReverseKernel
        >>> from lowvar.reward import Floor
        >>> schedule, shift = CosineVP(), torch.zeros(2, requires_grad=True)
        >>> twin = GaussianTwin(shift, PixelBasis((2,)), torch.ones(2))
        >>> policy = Policy(twin.denoiser(schedule), ReverseKernel(), torch.linspace(1, 0, 5), Floor(0.1))
        >>> out = surrogate_control(policy, lambda x, p: x.sum(1).round(), Independent(0), 64, (2,))
        >>> out.loss.backward()
        >>> out.claim.label, bool((shift.grad < 0).all())
        ('unbiased', True)
    """
    if len(policy.scored) < policy.steps:
        raise ValueError(
            f"the last step has no density (terminal={policy.terminal!r}), and the residual's gradient there would be "
            "lost; choose terminal=Floor(std)"
        )
    run = {"first": first, "prompts": prompts, "dtype": dtype, "device": device}
    ran = rollout(policy, noise, n, shape, groups=groups, num_generations=num_generations, **run)
    R = evaluated(reward, ran.samples, prompts, columns).detach()
    h = surrogate
    if h is None:
        folds = min(folds, ran.independent)
        h = RidgeSurrogate.fit(ran.samples, R, folds=folds, ridge=ridge, features=features, streams=ran.streams)
        given = h.judged(advantage, ran, R)
    else:
        with torch.no_grad():
            given = advantage(ran, R - h(ran.samples).to(R))
    claim = Claim("none", source="Grathwohl et al. 2018")
    claim = combined(claim, beside_paths(given.claim)) if isinstance(given, Advantages) else claim
    path = policy.chain(prompts).surrogate(
        lambda x: -h(x), noise, first + torch.arange(n), shape, checkpoint=checkpoint, dtype=dtype, device=device
    )
    each = path.each + surrogate_loss(policy, ran, given).each
    return RewardLoss(each.mean(), each, R, ran.samples, policy.steps, claim)
