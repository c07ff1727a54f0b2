r"""The linear denoiser's error as a control variate of the loss: its mean is known exactly, for any data.

With D_lin the Wiener filter of data with mean m and variances c along an orthonormal basis (`GaussianTwin`) and
s = sigma / alpha,

    v = ||D_lin(x_t) - x_0||^2 / d,      E[v | t] = (1 / d) sum_k c_k s^2 / (c_k + s^2) = tr(C s^2 (C + s^2)^-1) / d,

whatever the data's law: a filter that is linear and diagonal in the basis sees the moments only (the basis need not be
that of the principal components). Where m and c are the moments of the very set that is averaged over, divided by N,
the mean is exact for that set. v varies with ||D(x_t) - x_0||^2, because an image or a noise that is hard for one
denoiser is hard for the other, and it costs a change of basis and no network evaluation. The loss of a target is w
times the error of x0_hat (see `objectives`), so v and its mean are multiplied by the same factor.

It lowers the variance of the loss's *value*: of a validation loss, a loss curve, a table of losses by noise level.
D_lin has no parameters, so its gradient is zero and that of the controlled loss is the plain one, sample by sample:
**it does nothing for the training gradient.**

The coefficient differs between noise levels, near 1 where the network is nearly linear (much noise) and less where it
is not; `LinearControl` keeps one a bin of logsnr, fitted on earlier batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowvar.gradients import ControlState, lagged
from lowvar.process.denoiser import Prediction
from lowvar.process.head import expand
from lowvar.process.schedule import Level
from lowvar.process.twin import GaussianTwin
from lowvar.train.objectives import Label, Objective

__all__ = ["LinearControl", "linear_variate"]

_BOUND = 60.0  # as for an objective's weights
_EDGES = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)


def linear_variate(
    twin: GaussianTwin,
    x0: Tensor,
    eps: Tensor,
    level: Level,
    objective: Objective,
    prediction: Prediction,
    sigma_data: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """w v and its mean given the level, (B,) each, in float64.

    Args:
        twin: with the data's mean and variances.
        x0, eps: draws, (B, *event_shape).
        level: (B,) levels with t > 0.
        objective: whose weighting multiplies the squared error.
        prediction: of the network, which the plain weighting depends on.
        sigma_data: for `edm`.

    Example:
        >>> from lowvar.process import CosineVP, Independent
        >>> from lowvar.process.basis import PixelBasis
        >>> from lowvar.train.objectives import Simple
        >>> twin = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.tensor([4.0, 0.25]))
        >>> z, eps = (Independent(k).normal(range(4000), (2,)) for k in range(2))
        >>> level = CosineVP().at(torch.full((4000,), 0.5))
        >>> v, mean = linear_variate(twin, twin.sample(z), eps, level, Objective(Simple()), "sample")
        >>> abs(float(v.mean() - mean.mean())) < 0.02
        True
    """
    x0, eps = x0.double(), eps.double()
    x = expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps
    v = ((twin.posterior(x, level).mean - x0) ** 2).flatten(1).mean(1)
    logsnr = level.logsnr.double().clamp(-_BOUND, _BOUND)
    weight = torch.exp(objective.weighting.log_weight(logsnr, prediction, sigma_data))
    at = Level(level.t.cpu(), level.logsnr.cpu(), level.alpha.cpu(), level.sigma.cpu())
    mean = replace(twin, spectrum=twin.spectrum.cpu()).mmse(at).to(v).expand_as(v)
    return weight * v, weight * mean


@dataclass(frozen=True, eq=False)
class LinearControl:
    """The linear control variate with coefficients by logsnr, fitted on earlier batches: a value.

    Args:
        twin: with the data's mean and variances.
        edges: inner edges of the bins of logsnr, increasing.
        coefficients: what was learned; default: nothing yet.

    Raises:
        ValueError: if the edges do not increase or the state has another number of bins.

    Example:
        >>> from lowvar.process import CosineVP, Independent, NetworkDenoiser
        >>> from lowvar.process.basis import PixelBasis
        >>> from lowvar.train.objectives import Simple
        >>> twin = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.ones(2))
        >>> schedule, objective = CosineVP(), Objective(Simple())
        >>> denoiser = NetworkDenoiser(lambda x, t: 0.5 * x, schedule, "sample")
        >>> control = LinearControl(twin, edges=())
        >>> for batch in range(2):
        ...     x0, eps = (Independent(2 * batch + k).normal(range(64), (2,)) for k in range(2))
        ...     level = schedule.at(torch.full((64,), 0.5))
        ...     loss = objective.losses(denoiser, x0, eps, level).loss
        ...     better, control = control.applied(loss, x0, eps, level, objective, "sample")
        >>> bool(better.var() < 0.5 * loss.var())
        True
    """

    twin: GaussianTwin
    edges: Sequence[float] = _EDGES
    coefficients: ControlState = field(default=None)  # type: ignore[assignment]
    label: ClassVar[Label] = "unbiased"

    def __post_init__(self) -> None:
        """Fills in an empty state; checks the bins."""
        if any(b <= a for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError(f"edges are {tuple(self.edges)}; they must increase")
        if self.coefficients is None:
            object.__setattr__(self, "coefficients", ControlState.empty(n_bins=len(self.edges) + 1))
        if len(self.coefficients.moments) != len(self.edges) + 1:
            raise ValueError(
                f"the state has {len(self.coefficients.moments)} bins, {len(self.edges)} edges make "
                f"{len(self.edges) + 1}"
            )

    def applied(
        self,
        loss: Tensor,
        x0: Tensor,
        eps: Tensor,
        level: Level,
        objective: Objective,
        prediction: Prediction,
        sigma_data: float = 0.5,
    ) -> tuple[Tensor, LinearControl]:
        """The controlled losses (B,) and the control that knows this batch (arguments as of `linear_variate`).

        With importance weights the loss is the unweighted one; weigh the result.
        """
        v, mean = linear_variate(self.twin, x0, eps, level, objective, prediction, sigma_data)
        bins = None
        if self.edges:
            edges = torch.tensor(self.edges, dtype=torch.float64, device=v.device)
            bins = torch.bucketize(level.logsnr.to(v.device), edges)
        result, state = lagged(loss, v, mean, self.coefficients, bins=bins)
        return result, replace(self, coefficients=state)

    def state(self) -> dict[str, Tensor]:
        """What was learned, as tensors."""
        return self.coefficients.state()

    def restored(self, state: Mapping[str, Tensor]) -> LinearControl:
        """With what `state` gave."""
        return replace(self, coefficients=self.coefficients.restored(state))
