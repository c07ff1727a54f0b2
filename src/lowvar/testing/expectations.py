r"""Samplers for tests of expectations: a map whose moments are known exactly, and chains on exact targets.

`smooth_map` is x_1 = z_1 + 0.5 sin(z_1) + 0.2 z_2 + 0.1 z_1^2, x_2 = 2 z_2 + 0.3 z_1^2 - 0.3, with a shadow, a
surrogate and a coarser version that are all wrong in a known way; `expectation`
integrates any statistic of it by Gauss-Hermite quadrature.
`chain_on` is the reverse chain of a mixture with everything attached that a calibrated model would have: the Gaussian
twin of the exact moments, and a mixture twin fitted to samples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from lowvar.calibrate.mixture import fit_mixture
from lowvar.expect.sampler import ChainSampler, FunctionSampler
from lowvar.expect.shadow import Shadow
from lowvar.process.basis import MatrixBasis, PixelBasis
from lowvar.process.grid import trailing
from lowvar.process.kernel import ReverseKernel
from lowvar.process.mixture import MixtureTwin
from lowvar.process.noise import NoiseSource
from lowvar.process.schedule import CosineVP
from lowvar.process.solver import Solver
from lowvar.process.twin import GaussianTwin
from lowvar.testing.mixture import MixtureTarget
from lowvar.testing.quadrature import hermite

__all__ = ["chain_on", "expectation", "mixture_of", "smooth_map", "twin_of"]


def _mapped(z: Tensor, bend: float) -> Tensor:
    a, b = z[:, 0], z[:, 1]
    return torch.stack([a + bend * torch.sin(a) + 0.2 * b + 0.1 * a**2, 2 * b + 0.6 * bend * (a**2 - 1)], 1)


def smooth_map() -> FunctionSampler:
    """The map, with shadow, surrogate and three coarser maps.

    Example:
        >>> from lowvar.process import Independent
        >>> smooth_map()(torch.arange(3), Independent(0)).shape
        torch.Size([3, 2])
    """

    def of(bend: float) -> Callable[[Tensor, NoiseSource], Tensor]:
        return lambda index, noise: _mapped(noise.normal(index, (2,), dtype=torch.float64), bend)

    shadow = Shadow(
        torch.zeros(2, dtype=torch.float64),
        PixelBasis((2,)),
        torch.tensor([[1.3, 1.9]], dtype=torch.float64),
        dtype=torch.float64,
    )
    surrogate = FunctionSampler(of(0.42), (2,), nfe=0)
    coarser = None
    for nfe, bend in ((1, 0.1), (2, 0.3), (4, 0.4)):
        coarser = FunctionSampler(of(bend), (2,), nfe=nfe, coarser=coarser)
    return FunctionSampler(of(0.5), (2,), nfe=8, shadow=shadow, coarser=coarser, surrogate=surrogate)


def expectation(statistic: Callable[[Tensor], Tensor], points: int = 80) -> float:
    """E f of `smooth_map`, f smooth, by a product of Gauss-Hermite rules.

    Example:
        >>> abs(expectation(lambda x: x[:, 1])) < 1e-12
        True
    """
    nodes, weights = hermite(points)
    z = torch.cartesian_prod(nodes, nodes)
    w = torch.outer(weights, weights).flatten()
    return float((w * statistic(_mapped(z, 0.5))).sum() / w.sum())


def twin_of(target: MixtureTarget) -> GaussianTwin:
    """The Gaussian of a mixture's own mean and covariance."""
    values, vectors = torch.linalg.eigh(target.covariance)
    basis = MatrixBasis(vectors, target.event_shape)
    return GaussianTwin(target.mean, basis, values.clamp_min(0).reshape(target.event_shape))


@lru_cache(maxsize=8)
def mixture_of(target: MixtureTarget, n: int = 8192) -> MixtureTwin:
    """A mixture twin fitted to n samples of a target, in the basis of its covariance."""
    x = target.sample(range(n + n // 8))
    return fit_mixture([x[:n]], [x[n:]], twin_of(target), (10, 30, 60))


def chain_on(
    target: MixtureTarget, steps: int = 16, solver: Solver | None = None, *, mixture: bool = False
) -> ChainSampler:
    """The reverse chain on a target's exact denoiser, float64, with its twin and (if asked for) a fitted mixture.

    Example:
        >>> from lowvar.testing import mixture2
        >>> chain_on(mixture2(), 4).nfe
        4
    """
    schedule = CosineVP()
    return ChainSampler(
        target.denoiser(schedule, None),
        solver or ReverseKernel(0.0, "small"),
        trailing(schedule, steps),
        target.event_shape,
        twin=twin_of(target),
        mixture=mixture_of(target) if mixture else None,
        dtype=torch.float64,
    )
