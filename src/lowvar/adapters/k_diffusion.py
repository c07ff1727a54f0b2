r"""k-diffusion's models and lowvar's denoisers, each as the other.

A k-diffusion model is a callable D(y, s, **extra_args) -> denoised for variance-exploding states y = x_0 + s eps, with
one s a sample. A state x_t = alpha x_0 + sigma eps of any schedule is one of those after division by alpha:

    y = x_t / alpha,   s = sigma / alpha = exp(-logsnr / 2),   E[x_0 | x_t] = D(y, s),

because x_t and y determine each other: their posteriors of x_0 are the same law, covariance included.

Two of its wrappers know a variance that their `forward` drops; `KDenoiser(variance=...)` reads it off the network they
wrap, in the same one evaluation:

    logvar   `layers.DenoiserWithVariance`: F and h (B,) = network(c_in y, s, return_variance=True) are trained by the
             Gaussian likelihood of the target (x_0 - c_skip y) / c_out, so C = c_out^2 exp(h) I
    range    `external.OpenAIDenoiser`: the second half of the channels is the v of Nichol & Dhariwal 2021, Eq. 15;
             a property of a step, not of C, handed on as `Posterior.fraction` = (v + 1) / 2
    output   a callable that returns (denoised, variance of x_0); `KModel` is one

Sources: Crowson et al., k-diffusion (`external.py`, `layers.py`, `sampling.py`); Karras et al. 2022, Table 1 (c_skip,
c_out, c_in).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.process.covariance import Covariance, Diagonal, Isotropic
from lowvar.process.denoiser import Denoiser, expand
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import VE, Level, Schedule

__all__ = ["KDenoiser", "KModel", "KVariance"]

KVariance = Literal["logvar", "range", "output"]
_NEEDED = {"logvar": ("inner_model", "get_scalings"), "range": ("inner_model", "get_scalings", "sigma_to_t")}


class KDenoiser(Denoiser):
    """A k-diffusion model as a denoiser on any schedule.

    Networks are asked at s = sigma / alpha whatever the schedule says, so the schedule only sets the times of the
    grid: give one whose noise ends where the model's training did.

    Args:
        model: called as model(y, s, **extra_args) with y (B, *event_shape) and s (B,) of y's dtype.
        schedule: of the states; default `VE(80, 7)`: grids uniform in t are those of Karras et al. 2022 with
            sigma_min = 0.
        variance: where the model has a variance, see the module; None if nowhere.
        clip: bound b of data in [-b, b], or None.
        extra_args: further keyword arguments of the model, as k-diffusion's samplers take them.

    Raises:
        UserError: if `variance` is unknown or the model is not the wrapper that it names.

    Example:
        >>> denoiser = KDenoiser(lambda y, s: y / (1 + s[:, None] ** 2))  # exact for data N(0, I)
        >>> level = denoiser.schedule.level(0.0)  # alpha = sigma = 1
        >>> denoiser(torch.ones(2, 3), level).mean.tolist()[0]
        [0.5, 0.5, 0.5]
    """

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: Schedule | None = None,
        variance: KVariance | None = None,
        clip: float | None = None,
        extra_args: Mapping[str, Any] | None = None,
    ) -> None:
        if variance not in (None, "logvar", "range", "output"):
            raise UserError(f"variance is {variance!r}; allowed: None, logvar, range, output")
        lacking = [name for name in _NEEDED.get(variance or "", ()) if not hasattr(model, name)]
        if lacking:
            wrapper = "layers.DenoiserWithVariance" if variance == "logvar" else "external.OpenAIDenoiser"
            raise UserError(
                f"variance {variance!r} is read off k-diffusion's {wrapper}, and {type(model).__name__} has no "
                f"{' and no '.join(lacking)}: give that wrapper, or variance=None"
            )
        self.model, self.variance, self.clip = model, variance, clip
        self.schedule = VE() if schedule is None else schedule
        self.extra_args = dict(extra_args or {})

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        """See the base class.

        Raises:
            UserError: if the level is pure noise, alpha = 0, or the model's output does not have the states' shape.
        """
        if not bool((level.alpha > 0).all()):
            raise UserError(
                "a k-diffusion model has no noise level sigma / alpha = inf: start the grid below t = 1, or take a "
                "schedule whose last alpha is not 0"
            )
        y = x / expand(level.alpha, x)
        s = (level.sigma / level.alpha).to(x).expand(x.shape[0])
        posterior = self._posterior(y, s)
        if posterior.mean.shape != x.shape:
            raise UserError(
                f"the k-diffusion model returned shape {tuple(posterior.mean.shape)} for states {tuple(x.shape)}; "
                "both must be one"
            )
        return posterior if self.clip is None else posterior.clip(self.clip)

    def _posterior(self, y: Tensor, s: Tensor) -> Posterior:
        model = cast("Any", self.model)
        if self.variance == "logvar":
            c_skip, c_out, c_in = (expand(c, y) for c in model.get_scalings(s))
            out, h = model.inner_model(y * c_in, s, return_variance=True, **self.extra_args)
            return Posterior(_wide(out) * c_out + y * c_skip, _covariance(c_out.flatten() ** 2 * _wide(h).exp(), y))
        if self.variance == "range":
            c_out, c_in = (expand(c, y) for c in model.get_scalings(s))
            out = _wide(model.inner_model(y * c_in, model.sigma_to_t(s), **self.extra_args))
            if out.shape[1] != 2 * y.shape[1]:
                raise UserError(
                    f"variance 'range' needs {2 * y.shape[1]} output channels, the network has {out.shape[1]}: "
                    "give variance=None"
                )
            eps, v = out.chunk(2, dim=1)
            return Posterior(y + eps * c_out, None, (v + 1) / 2)
        out = model(y, s, **self.extra_args)
        if self.variance == "output":
            mean, variance = out
            return Posterior(_wide(mean), _covariance(_wide(variance), y))
        return Posterior(_wide(out))


class KModel:
    """A denoiser as a k-diffusion model: its samplers take it as `model`.

    At noise s the denoiser is asked at the level of its own schedule with sigma / alpha = s, for the state alpha y.
    Beyond the schedule's ends a network keeps its first or last time, as k-diffusion's own discrete wrappers do.

    Args:
        denoiser: of any schedule.

    Attributes:
        sigma_min, sigma_max: s at the denoiser's first time and at t = 1 (`inf` where alpha_1 = 0), the ends of the
            grids that k-diffusion's `get_sigmas_*` make.

    Example:
        >>> from lowvar.process.schedule import CosineVP
        >>> from lowvar.testing import GaussianTarget
        >>> model = KModel(GaussianTarget(torch.zeros(3), torch.eye(3)).denoiser(CosineVP()))
        >>> model(torch.ones(2, 3), torch.tensor([1.0, 3.0])).tolist()[1]
        [0.1..., 0.1..., 0.1...]
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        ends = denoiser.schedule.at(torch.tensor([denoiser.schedule.t_min, 1.0], dtype=torch.float64))
        self.sigma_min, self.sigma_max = torch.exp(-ends.logsnr / 2).tolist()

    def posterior(self, y: Tensor, s: Tensor) -> Posterior:
        """The whole posterior of x_0 at y = x_0 + s eps: mean, covariance and fraction.

        Args:
            y: states, (B, *event_shape).
            s: standard deviation of their noise, > 0, scalar or (B,).
        """
        level = self.denoiser.schedule.level(-2 * torch.log(s.to(torch.float64)))
        return self.denoiser(expand(level.alpha, y) * y, level)

    def __call__(self, y: Tensor, s: Tensor, return_variance: bool = False) -> Any:
        """x0_hat in y's dtype; with `return_variance` also the variances of x_0's entries, (B or 1, *event_shape).

        Raises:
            UserError: if the variance is asked for and the denoiser has none.
        """
        posterior = self.posterior(y, s)
        mean = posterior.mean.to(y.dtype)
        if not return_variance:
            return mean
        if posterior.covariance is None:
            raise UserError("return_variance needs a denoiser with a covariance, and this one has none: calibrate one")
        return mean, posterior.covariance.diagonal()


def _wide(value: Tensor) -> Tensor:
    """Float32 at least."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def _covariance(variance: Tensor, y: Tensor) -> Covariance:
    """One variance for all or one a sample: isotropic; one an entry: diagonal."""
    return Isotropic(variance, y.shape[1:]) if variance.ndim <= 1 else Diagonal(variance)
