r"""The hybrid objective (Nichol & Dhariwal 2021, Sec. 3.1), for any variance head.

    L_hybrid = L_simple + lambda L_vlb,      lambda = 0.001,      L_vlb = sum over the T steps of the bound's terms,

in bits a dimension, with the mean detached in L_vlb. A single step t -> t - 1/T drawn uniformly estimates the sum by
T times its term, so a sample's loss is mse + lambda T term: T / 1000 of the term, as in improved-diffusion's rescaled
loss. The term is KL(q(x_s | x_t, x_0) || p(x_s | x_t)), at the first timestep (s = 0) the decoder's -log P(x_0 |
x_t). With a learned-range head the step's variance is the head's; with the others, which say what C = Cov[x_0 | x_t]
is, it is that of the ancestral kernel, lambda^2 I + kappa^2 C, and lambda^2 keeps it from collapsing. The decoder uses
the diagonal of C.

A step of size snr_s - snr_t sees C through (snr_s - snr_t) C only, and squared: at T = 1000 the bound says little about
C (the range head has the same trouble). `PosteriorNLL` asks about C itself.

A continuous schedule has no table. Its T-step grids are t_min + (1 - t_min) (k + w) / T, k = 0 .. T - 1, and clean data
below: a uniform time in [t_min, 1] is a uniform w and a uniform k, so that T times its term estimates the bound's sum
averaged over the shifts w.

Where the mean is not detached (`Objective.detach_mean`), the bound trains the mean as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.denoiser import NetworkDenoiser, from_prediction
from lowvar.process.discrete import DiscreteVP
from lowvar.process.kernel import ReverseKernel
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level, Schedule
from lowvar.sample.likelihood import step_bits
from lowvar.train.nll import posterior_of
from lowvar.train.objectives import VarianceTerm

__all__ = ["HybridVLB", "neighbours", "training_steps"]


def training_steps(schedule: Schedule, default: int = 1000) -> int:
    """T: the number of timesteps of a table, `default` for a continuous schedule."""
    return schedule.steps if isinstance(schedule, DiscreteVP) else default


def neighbours(schedule: Schedule, t: Tensor, steps: int, t_min: float = 0.0) -> tuple[Level, Level]:
    """The levels at t - 1/T (clean data for t <= 1/T) and at t + 1/T (at most 1), (B,) each.

    With `t_min` the step is (1 - t_min) / T, and clean data follow on times up to t_min plus a step.

    Example:
        >>> from lowvar.process import CosineVP
        >>> s, before = neighbours(CosineVP(), torch.tensor([0.001, 0.5, 1.0]), 1000)
        >>> [round(v, 6) for v in s.t.tolist()], [round(v, 6) for v in before.t.tolist()]
        ([0.0, 0.499, 0.999], [0.002, 0.501, 1.0])
    """
    position = (t.double() - t_min) / (1 - t_min) * steps
    whole = position.round()
    position = torch.where((position - whole).abs() < 1e-6, whole, position)  # a knot of the table stays one
    down, up = (position - 1).clamp_min(0) / steps, (position + 1).clamp_max(steps) / steps
    down = torch.where(down > 0, t_min + (1 - t_min) * down, 0.0)
    return schedule.at(down), schedule.at((t_min + (1 - t_min) * up).clamp_max(1.0))


@dataclass(frozen=True)
class HybridVLB(VarianceTerm):
    """lambda L_vlb for networks with a variance head.

    Args:
        weight: lambda.
        levels: grey levels of the data (its likelihood bins); None: a density at the first timestep.
        steps: T for continuous schedules; a table has its own.
    """

    weight: float = 0.001
    levels: int | None = 256
    steps: int = 1000

    def factor(self, denoiser: NetworkDenoiser) -> float:
        """See the base class: lambda T."""
        return self.weight * training_steps(denoiser.schedule, self.steps)

    def bits(self, denoiser: NetworkDenoiser, x0: Tensor, x: Tensor, level: Level, out: Tensor, head: Tensor) -> Tensor:
        """See the base class."""
        posterior, data = self._posterior(denoiser, x0, x, level, out, head)
        schedule = denoiser.schedule
        t_min = 0.0 if isinstance(schedule, DiscreteVP) else schedule.t_min
        s, before = neighbours(schedule, level.t.cpu(), training_steps(schedule, self.steps), t_min)
        kernel = ReverseKernel(variance="learned" if denoiser.head == "range" else "posterior", last="decoder")
        where = level.t.device
        return step_bits(data, x, posterior, kernel, level, s.to(where), before.to(where), self.levels)

    def _posterior(
        self, denoiser: NetworkDenoiser, x0: Tensor, x: Tensor, level: Level, out: Tensor, head: Tensor
    ) -> tuple[Posterior, Tensor]:
        """The posterior and the data; with a covariance in float64, since S / lambda^2 is close to I."""
        if denoiser.head == "range":
            mean = from_prediction(denoiser.prediction, x, out, level, denoiser.sigma_data)
            return Posterior(mean, None, (head + 1) / 2), x0
        return posterior_of(denoiser, x, level, out, head), x0.double()
