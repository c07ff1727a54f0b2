r"""The linear denoiser's loss as a control variate of any loss, with coefficients learned on the way.

The loss v = w ||D_lin(x_t) - x_0||^2 / d of the linear denoiser has an exactly known mean at every noise level, for any
data (`linear_loss`). It varies with a network's, because an image or a noise that is hard for one denoiser is hard for
the other, and it costs a change of basis and no network evaluation.

It lowers the variance of the loss's *value*: of a loss curve, a table of losses by noise level. D_lin has no
parameters, so its gradient is zero and that of the controlled loss is the plain one, sample by sample: **it does
nothing for the training gradient.**

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
from lowvar.process.schedule import Level
from lowvar.train.linear_loss import LinearLoss
from lowvar.train.objectives import Label

__all__ = ["LinearControl"]

_EDGES = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)


@dataclass(frozen=True, eq=False)
class LinearControl:
    """The linear control variate with coefficients by logsnr, fitted on earlier batches: a value.

    Args:
        linear: the linear denoiser's loss, with the data's mean and variances and the objective's weighting.
        edges: inner edges of the bins of logsnr, increasing.
        coefficients: what was learned; default: nothing yet.

    Raises:
        ValueError: if the edges do not increase or the state has another number of bins.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, Independent, NetworkDenoiser
        >>> from lowvar.process.basis import PixelBasis
        >>> from lowvar.train.objectives import Objective, Simple
        >>> twin = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.ones(2))
        >>> schedule, objective = CosineVP(), Objective(Simple())
        >>> denoiser = NetworkDenoiser(lambda x, t: 0.5 * x, schedule, "sample")
        >>> control = LinearControl(LinearLoss(twin, "sample"), edges=())
        >>> for batch in range(2):
        ...     x0, eps = (Independent(2 * batch + k).normal(range(64), (2,)) for k in range(2))
        ...     level = schedule.at(torch.full((64,), 0.5))
        ...     loss = objective.losses(denoiser, x0, eps, level).loss
        ...     better, control = control.applied(loss, x0, eps, level)
        >>> bool(better.var() < 0.5 * loss.var())
        True
    """

    linear: LinearLoss
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

    def applied(self, loss: Tensor, x0: Tensor, eps: Tensor, level: Level) -> tuple[Tensor, LinearControl]:
        """The controlled losses (B,) and the control that knows this batch.

        Args:
            loss: unweighted losses; with importance weights weigh the result.
            x0, eps: draws, (B, *event_shape).
            level: (B,) levels with t > 0.
        """
        v, mean = (part.to(loss.device) for part in (self.linear.loss(x0, eps, level), self.linear.mean(level)))
        bins = None
        if self.edges:
            edges = torch.tensor(self.edges, dtype=torch.float64, device=v.device)
            bins = torch.bucketize(level.logsnr.to(v.device), edges)
        result, state = lagged(loss, v, mean.expand_as(v), self.coefficients, bins=bins)
        return result, replace(self, coefficients=state)

    def state(self) -> dict[str, Tensor]:
        """What was learned, as tensors."""
        return self.coefficients.state()

    def restored(self, state: Mapping[str, Tensor]) -> LinearControl:
        """With what `state` gave."""
        return replace(self, coefficients=self.coefficients.restored(state))
