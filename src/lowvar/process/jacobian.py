r"""Products with a denoiser's Jacobian J = d x0_hat / d x_t, and the covariance (sigma^2 / alpha) J made of them.

Second-order Tweedie: C = Cov[x_0 | x_t] = (sigma^2 / alpha) J. Three ways to a product J v, the last of them
approximate; their price in network evaluations is counted as (a tangent 1, a cotangent 2, what it is based on 0):

    way          J v                                                            J v    (J + J^T) v / 2
    forward      forward mode                                                    1      1 + 2
    reverse      g(u) = J^T u is linear, and J v its own transpose at v:         3      3
                 reverse mode through reverse mode; J^T v comes with it
    difference   (x0_hat(x + h v) - x0_hat(x - h v)) / 2 h, relative error       2      2 + 2
                 of order h^2

Forward mode is missing in fused attention and fails in group norms of the usual U-Nets; reverse mode twice is missing
in fused attention only, which is why both run with the plain kernel of `scaled_dot_product_attention`. What fails in
both (attention of other libraries) is differenced, with a step of 3 epsilon^(1/3) sigma a number, epsilon of the
states' dtype: near where truncation and rounding are equal. A network in half precision rounds more than its states
say: give it a way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from lowvar.process.denoiser import Denoiser, expand
from lowvar.process.matrix import Implicit
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level

__all__ = ["WAYS", "JacobianCovariance", "Way", "jacobian_product", "transposed_product"]

Way = Literal["forward", "reverse", "difference"]
WAYS: tuple[Way, ...] = ("forward", "reverse", "difference")

_COST: dict[Way, tuple[int, int]] = {"forward": (1, 3), "reverse": (3, 3), "difference": (2, 4)}
"""Evaluations of one product: J v, and its symmetrised form."""


def jacobian_product(denoiser: Denoiser, x: Tensor, level: Level, v: Tensor, way: Way, symmetric: bool) -> Tensor:
    """J v, or (J + J^T) v / 2, (B, *event_shape); detached.

    Args:
        denoiser: differentiable; samples of a batch must not depend on each other.
        x: states, (B, *event_shape).
        level: noise level, scalar or (B,).
        v: directions, of x's shape.
        way: see the module.
        symmetric: whether to symmetrise.

    Raises:
        RuntimeError: torch's own, if the network does not support this way.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, PixelBasis
        >>> twin, schedule = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.tensor([1.0, 4.0])), CosineVP()
        >>> x, level = torch.ones(1, 2, dtype=torch.float64), schedule.at(0.5)  # J = alpha c / (alpha^2 c + sigma^2)
        >>> product = jacobian_product(twin.denoiser(schedule), x, level, x, "reverse", symmetric=True)
        >>> [round(v, 3) for v in product[0].tolist()]
        [0.703, 1.133]
    """

    def mean(state: Tensor) -> Tensor:
        return denoiser(state, level).mean

    if way == "reverse":
        with _differentiable():
            state, u = x.detach().clone().requires_grad_(), v.detach().clone().requires_grad_()
            (transposed,) = torch.autograd.grad(mean(state), state, u, create_graph=True)
            (product,) = torch.autograd.grad(transposed, u, v.detach().clone())
        return (product + transposed.detach()) / 2 if symmetric else product
    if way == "forward":
        with _differentiable():  # forward mode refuses expanded batches
            product = torch.func.jvp(mean, (x.detach().clone(),), (v.detach().clone(),))[1].detach()
    else:
        h = 3 * torch.finfo(x.dtype).eps ** (1 / 3) * expand(level.sigma, x)
        size = v.flatten(1).square().mean(1).sqrt().clamp_min(torch.finfo(x.dtype).tiny)
        h = h / expand(size, x)  # a number of h v is sigma times the step in the root mean square
        with torch.no_grad():
            product = (mean(x + h * v) - mean(x - h * v)) / (2 * h)
    return (product + transposed_product(denoiser, x, level, v)) / 2 if symmetric else product


def transposed_product(denoiser: Denoiser, x: Tensor, level: Level, v: Tensor) -> Tensor:
    """J^T v by reverse mode, (B, *event_shape), detached; supported by every network that can be trained."""
    with torch.inference_mode(False), torch.enable_grad():
        state = x.detach().clone().requires_grad_()
        return torch.autograd.grad(denoiser(state, level).mean, state, v.detach().clone())[0]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Within: `scaled_dot_product_attention` by the kernel that has all derivatives."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _differentiable() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad(), plain_attention():
        yield


class JacobianCovariance(Denoiser):
    """Second-order Tweedie without training: C v = (sigma^2 / alpha) J v with J = d x0_hat / d x by autodiff.

    A learned Jacobian is not symmetric; products use (J + J^T) / 2, or J alone with `symmetric=False`. `nfe` counts one
    root of k products, by the module's table: 1 + 3 k symmetrised (4 k where only quotients work), 1 + k, 1 + 3 k or
    1 + 2 k otherwise.

    Args:
        denoiser: a differentiable denoiser.
        steps: k, Lanczos steps of the covariance's root.
        symmetric: whether to symmetrise.
        way: how products are made; None chooses at the first call what the network supports (one product more, once):
            the cheapest exact way, otherwise difference quotients.

    Attributes:
        way: the way in use; None before the first call where it was not given.

    Raises:
        ValueError: if the way is unknown.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, PixelBasis
        >>> twin, schedule = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.tensor([1.0, 4.0])), CosineVP()
        >>> denoiser = JacobianCovariance(twin.denoiser(schedule))
        >>> C = denoiser(torch.ones(1, 2), schedule.at(0.5)).covariance
        >>> denoiser.way, [round(v, 3) for v in C.diagonal()[0].tolist()]
        ('reverse', [0.506, 0.816])
    """

    def __init__(self, denoiser: Denoiser, steps: int = 8, symmetric: bool = True, way: Way | None = None) -> None:
        if way not in (None, *WAYS):
            raise ValueError(f"way is {way!r}; allowed: {', '.join(WAYS)}, or None to choose")
        self.denoiser, self.steps, self.symmetric, self.schedule = denoiser, steps, symmetric, denoiser.schedule
        self._use(way)

    def _use(self, way: Way | None) -> None:
        self.way: Way | None = way
        self.nfe = self.denoiser.nfe * (1 + self.steps * _COST[way or self._preferred()[0]][self.symmetric])

    def _preferred(self) -> tuple[Way, ...]:
        return ("reverse", "forward", "difference") if self.symmetric else WAYS

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        """See the base class; the covariance's products run the network again."""
        posterior = self.denoiser(x, level)

        def attempt(way: Way) -> Tensor:
            return jacobian_product(self.denoiser, x, level, torch.ones_like(x), way, self.symmetric)

        way = self.way or first_supported(attempt, self._preferred())
        self._use(way)
        scale = expand(level.sigma**2 / level.alpha, x)

        def product(v: Tensor) -> Tensor:
            return scale * jacobian_product(self.denoiser, x, level, v.expand(x.shape), way, self.symmetric)

        covariance = Implicit(product, x.shape[1:], self.steps, like=x)
        return Posterior(posterior.mean, covariance, posterior.fraction)


def first_supported(attempt: Callable[[Way], object], ways: tuple[Way, ...]) -> Way:
    """The first way whose attempt torch does not refuse; the last one is not tried. Lack of memory is no refusal."""
    for way in ways[:-1]:
        try:
            attempt(way)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # NotImplementedError is one
            continue
        return way
    return ways[-1]
