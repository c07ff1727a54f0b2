r"""Control variates with a fitted coefficient, for a loss a sample and for its gradient.

A variate v_i that varies with the loss l_i and whose mean mu_i is known takes variance away,

    l_i - beta . d_i,      d_i = v_i - mu_i,      beta* = Cov(d, d)^-1 Cov(d, l),

and a share R^2 = Cov(l, d) beta* / Var l of the variance goes. With several variates d_i and beta are vectors. What
keeps it unbiased is that beta does not know sample i: then E[beta d_i] = E[beta] E[d_i] = 0. A coefficient fitted on
the very samples it is applied to does not, E[beta_hat d_i] != 0, a bias of order 1 / n. So beta is

    cross-fitted   of fold f from the other folds of the batch (`controlled`): samples of different folds must be
                   independent: pairs belong into one fold, and for times stratified over the batch lag
    lagged         from earlier batches, exponentially weighted (`lagged`): right for any dependence within a batch

and always detached. The same holds for gradients, E grad(l - beta . d) = grad E l, if the gradient of mu is that of E
v: a mean that depends on the parameters has to carry its gradient. beta* is best for the loss's value; for its gradient
the best factor is another, and the fitted one is a guess that costs no bias. With importance weights control the
weighted loss by the weighted variate.

All that a fit needs is M = sum_i z_i z_i^T with z = (1, l, d), a matrix a bin: batches and processes add up. With
correlations R of d and their covariances with l in standard units r, beta = D^-1 (R + (ridge / n) I)^-1 r, D the
standard deviations of d and n the (weighted) number of samples: ridge is a number of samples that say beta = 0, and
keeps a fit on few samples or collinear variates small. A variate that does not vary has coefficient 0.

Sources: R. Y. Rubinstein, R. Marcus, "Efficiency of multivariate control variates", 1985; A. N. Avramidis,
J. R. Wilson, "A splitting scheme for control variates", 1993 (the bias, and splitting against it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["ControlState", "Controlled", "controlled", "lagged"]


def _difference(loss: Tensor, variate: Tensor, expectation: Tensor | float) -> Tensor:
    """d = variate - expectation, (n, k)."""
    if loss.ndim != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}; give one number a sample, (n,), before any mean")
    shape = tuple(expectation.shape) if isinstance(expectation, Tensor) else ()
    fits = variate.ndim in (1, 2) and len(variate) == len(loss)
    if not fits or shape not in ((), tuple(variate.shape), *([tuple(variate.shape[1:])] if variate.ndim == 2 else [])):
        raise ValueError(
            f"variate {tuple(variate.shape)} and expectation {shape} do not fit {len(loss)} losses; give the variate "
            "as (n,) or (n, k) and its mean as a number, (k,) or the variate's shape"
        )
    d = variate - expectation
    return d[:, None] if d.ndim == 1 else d


def _moments(loss: Tensor, d: Tensor, group: Tensor, groups: int) -> Tensor:
    """M of each group, (groups, k + 2, k + 2) float64; samples that are not finite are left out."""
    z = torch.cat([torch.ones_like(loss, dtype=torch.float64)[:, None], loss[:, None].double(), d.double()], 1).detach()
    z = torch.where(torch.isfinite(z).all(1, keepdim=True), z, 0.0)
    return z.new_zeros(groups, z.shape[1], z.shape[1]).index_add_(0, group, z[:, :, None] * z[:, None, :])


def _covariance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Number of samples (...,) and covariance of (l, d), (..., k + 1, k + 1)."""
    n = moments[..., 0, 0]
    mean = moments[..., 0, 1:] / n.clamp_min(1e-300)[..., None]
    second = moments[..., 1:, 1:] / n.clamp_min(1e-300)[..., None, None]
    return n, second - mean[..., :, None] * mean[..., None, :]


def _coefficient(moments: Tensor, ridge: float) -> Tensor:
    """Beta of moments (..., k + 2, k + 2), (..., k)."""
    n, covariance = _covariance(moments)
    cross, within = covariance[..., 0, 1:], covariance[..., 1:, 1:]
    variance = within.diagonal(dim1=-2, dim2=-1)
    size = moments.diagonal(dim1=-2, dim2=-1)[..., 2:] / n.clamp_min(1e-300)[..., None]
    varies = variance > 1e-12 * size  # else the variance is what rounding leaves
    std = torch.where(varies, variance.clamp_min(0).sqrt(), 1.0)
    both = varies[..., :, None] & varies[..., None, :]
    eye = torch.eye(variance.shape[-1], dtype=variance.dtype, device=variance.device)
    correlation = torch.where(both, within / (std[..., :, None] * std[..., None, :]), 0.0)
    correlation = torch.where(eye.bool(), 1.0, correlation)
    small = (ridge / n.clamp_min(1e-300)).clamp(1e-12, 1e12)
    fit = torch.linalg.solve(correlation + small[..., None, None] * eye, (cross / std)[..., None])
    return torch.where(varies, fit[..., 0] / std, 0.0)


def _subtract(loss: Tensor, d: Tensor, beta: Tensor) -> Tensor:
    return loss - (beta.detach().to(d) * d).sum(1).to(loss)


def controlled(
    loss: Tensor,
    variate: Tensor,
    expectation: Tensor | float,
    *,
    folds: int | Tensor = 2,
    bins: Tensor | None = None,
    ridge: float = 1.0,
) -> Tensor:
    """The loss less a cross-fitted multiple of a variate of known mean: the same mean and mean gradient, exactly.

    Args:
        loss: a sample each, (n,).
        variate: correlated with the loss, (n,) or (n, k).
        expectation: its mean given what is not averaged over (a noise level, say): a number, (k,) or the variate's
            shape; with the gradient of that mean, where it depends on the parameters.
        folds: number of folds, contiguous and as equal as they can be (so neighbouring pairs stay together where n
            divides by twice the folds), or each sample's fold number, (n,) int64.
        bins: numbers of bins with a coefficient of their own, (n,) int64, >= 0.
        ridge: see the module; >= 0.

    Returns:
        (n,); its mean is what to minimise. With one fold there are no other samples: beta is 0.

    Raises:
        ValueError: if shapes do not fit or a number is out of range.

    Example:
        >>> from lowvar.process import Independent
        >>> theta = torch.tensor(1.0, requires_grad=True)
        >>> z = Independent(0).normal(range(256), ())
        >>> loss = (theta + z) ** 2
        >>> better = controlled(loss, z, 0.0, folds=4)
        >>> better.mean().backward()
        >>> bool(better.var() < 0.5 * loss.var())
        True
    """
    d = _difference(loss, variate, expectation)
    n = len(loss)
    if ridge < 0 or (isinstance(folds, int) and folds < 1):
        raise ValueError(f"folds is {folds}, ridge {ridge}; give at least 1 fold and a ridge >= 0")
    fold = torch.arange(n) * folds // max(n, 1) if isinstance(folds, int) else folds
    fold = fold.to(loss.device)
    where = torch.zeros_like(fold) if bins is None else bins.to(loss.device)
    if fold.shape != (n,) or where.shape != (n,):
        raise ValueError(f"folds {tuple(fold.shape)} and bins {tuple(where.shape)}: give one number a sample, ({n},)")
    if n == 0:
        return loss
    count, wide = int(fold.max()) + 1, int(where.max()) + 1
    own = _moments(loss, d, fold * wide + where, count * wide)
    own = own.reshape(count, wide, *own.shape[1:])
    others = torch.stack([torch.cat([own[:f], own[f + 1 :]]).sum(0) for f in range(count)])
    return _subtract(loss, d, _coefficient(others, ridge)[fold, where])


@dataclass(frozen=True, eq=False)
class ControlState:
    """What earlier batches say about the coefficient: exponentially weighted moments a bin.

    Args:
        moments: M, (bins, k + 2, k + 2) float64.
        decay: weight of a batch after another one, in [0, 1]; 1 forgets nothing.
        ridge: see the module.

    Raises:
        ValueError: if a number is out of range or the moments have another shape.

    Example:
        >>> state = ControlState.empty(n_bins=2)
        >>> z = torch.tensor([-1.0, 1.0, 0.5])
        >>> state = state.updated(3 * z + 5, z, 0.0, bins=torch.tensor([0, 0, 1]))
        >>> [round(v, 6) for v in state.coefficient()[:, 0].tolist()]  # two samples against one that says 0; one sample
        [2.0, 0.0]
    """

    moments: Tensor
    decay: float = 0.99
    ridge: float = 1.0

    def __post_init__(self) -> None:
        """Checks ranges and shape."""
        if not 0 <= self.decay <= 1 or self.ridge < 0:
            raise ValueError(f"decay is {self.decay}, ridge {self.ridge}; need a decay in [0, 1] and a ridge >= 0")
        shape = self.moments.shape
        if len(shape) != 3 or shape[1] != shape[2] or shape[1] < 3 or shape[0] < 1:
            raise ValueError(f"moments have shape {tuple(shape)}; they are (bins, k + 2, k + 2) for k variates")

    @classmethod
    def empty(cls, variates: int = 1, n_bins: int = 1, *, decay: float = 0.99, ridge: float = 1.0) -> ControlState:
        """The state before any batch: every coefficient is 0."""
        return cls(torch.zeros(n_bins, variates + 2, variates + 2, dtype=torch.float64), decay, ridge)

    def coefficient(self) -> Tensor:
        """Beta of every bin, (bins, k) float64."""
        return _coefficient(self.moments, self.ridge)

    def explained(self) -> Tensor:
        """R^2 of every bin, (bins,) float64: the share of the loss's variance that the coefficient takes away."""
        _, covariance = _covariance(self.moments)
        beta, total = self.coefficient(), covariance[:, 0, 0]
        share = 2 * (beta * covariance[:, 0, 1:]).sum(1) - torch.einsum(
            "bi,bij,bj->b", beta, covariance[:, 1:, 1:], beta
        )
        return torch.where(total > 0, share / torch.where(total > 0, total, 1.0), 0.0)

    def updated(
        self, loss: Tensor, variate: Tensor, expectation: Tensor | float, *, bins: Tensor | None = None
    ) -> ControlState:
        """The state after a batch (arguments as of `controlled`); samples that are not finite are left out."""
        d = _difference(loss, variate, expectation)
        where = self._numbers(loss, d, bins)
        old = self.moments.to(loss.device)
        return replace(self, moments=self.decay * old + _moments(loss, d, where, len(old)))

    def applied(
        self, loss: Tensor, variate: Tensor, expectation: Tensor | float, *, bins: Tensor | None = None
    ) -> Tensor:
        """The losses controlled by this state's coefficient, (n,) (arguments as of `controlled`)."""
        d = _difference(loss, variate, expectation)
        where = self._numbers(loss, d, bins)
        return _subtract(loss, d, self.coefficient().to(loss.device)[where])

    def state(self) -> dict[str, Tensor]:
        """What was learned, as tensors."""
        return {"moments": self.moments}

    def restored(self, state: Mapping[str, Tensor]) -> ControlState:
        """With what `state` gave."""
        return replace(self, moments=state["moments"].double())

    def _numbers(self, loss: Tensor, d: Tensor, bins: Tensor | None) -> Tensor:
        count, k = len(self.moments), self.moments.shape[1] - 2
        if d.shape[1] != k:
            raise ValueError(f"the state is of {k} variates, the batch brings {d.shape[1]}; keep a state for each kind")
        if (bins is None) != (count == 1):
            raise ValueError(f"the state has {count} bins; {'give bins, (n,)' if bins is None else 'leave bins out'}")
        where = torch.zeros(len(loss), dtype=torch.int64) if bins is None else bins
        if where.shape != loss.shape:
            raise ValueError(f"bins has shape {tuple(where.shape)}; give one number a sample, ({len(loss)},)")
        return where.to(loss.device)


def lagged(
    loss: Tensor,
    variate: Tensor,
    expectation: Tensor | float,
    state: ControlState,
    *,
    bins: Tensor | None = None,
) -> tuple[Tensor, ControlState]:
    """The loss less a multiple of a variate fitted on earlier batches, and the state with this batch.

    Args:
        loss, variate, expectation: as of `controlled`.
        state: of the batches before this one; `ControlState.empty()` at first, whose coefficient is 0.
        bins: numbers of bins, (n,) int64, if the state has several.

    Returns:
        The controlled losses, (n,), and the next state.

    Raises:
        ValueError: if shapes, bins or numbers of variates do not fit.

    Example:
        >>> state = ControlState.empty()
        >>> for batch in range(3):
        ...     z = torch.linspace(-1, 1, 8) + 0.1 * batch
        ...     loss, state = lagged(2 * z, z, 0.0, state)
        >>> bool(loss.abs().max() < 0.3)
        True
    """
    controlled_loss = state.applied(loss, variate, expectation, bins=bins)
    return controlled_loss, state.updated(loss, variate, expectation, bins=bins)


class Controlled:
    """`lagged` with the state kept inside, for a training loop.

    Args:
        variates: k.
        n_bins: number of bins with coefficients of their own.
        decay: see `ControlState`.
        ridge: see the module.

    Attributes:
        state: the `ControlState`; keep `state.state()` in checkpoints, and set it to `state.restored(...)`.

    Example:
        Two lines in a loop::

            control = Controlled()                                     # before it
            loss = control(loss_per_sample, variate, its_mean).mean()  # in it

        >>> control = Controlled()
        >>> z = torch.linspace(-1, 1, 8)
        >>> first, second = control(3 * z, z, 0.0), control(3 * z, z, 0.0)
        >>> bool(first.var() > 50 * second.var())
        True
    """

    def __init__(self, variates: int = 1, n_bins: int = 1, *, decay: float = 0.99, ridge: float = 1.0) -> None:
        self.state = ControlState.empty(variates, n_bins, decay=decay, ridge=ridge)

    def __call__(
        self, loss: Tensor, variate: Tensor, expectation: Tensor | float, *, bins: Tensor | None = None
    ) -> Tensor:
        """The controlled losses, (n,); the state then knows this batch."""
        result, self.state = lagged(loss, variate, expectation, self.state, bins=bins)
        return result
