r"""The sampler's shadow: the Gaussian twin run by the same solver on the same noise, in closed form.

The twin's denoiser is affine and diagonal in its basis B, and so is every solver of this package. Hence the chain that
the sampler's noise (z_0, z_1, .., z_K) would have run with the twin's denoiser is one affine map,

    x~ = b + B sum_k F_k (B^T z_k),      with law N(b, B diag(sum_k F_k^2) B^T),

whose b and F_k are read off by pushing the zero and the unit noises through the solver once: K + 2 states. A shadow
costs no network evaluation; E f(x~) is known to any accuracy for the price of evaluating f. As f(x~) has seen the same
noise as f(x), it is a control variate (`lowvar.expect.twin`). Exact Gaussian data have x = x~.

The gains F_k also say how much of each step's noise is left in the sample: they are the weights with which fine noise
is summed into the noise of a coarser chain (`lowvar.expect.coupled`).

Source: this package's own; for the twin see `lowvar.process.twin`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowvar.process.basis import Basis
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.schedule import Schedule
from lowvar.process.solver import Solver
from lowvar.process.twin import GaussianTwin
from lowvar.sample.trajectory import trajectory

__all__ = ["Shadow", "shadow_of"]


@dataclass(frozen=True, eq=False)
class Shadow:
    """x~ = b + B sum_k F_k (B^T z_k).

    Attributes:
        mean: b, (*event_shape) float64.
        basis: B.
        gains: F, (K + 1, *event_shape) float64; K = 0 for a deterministic chain.
        clip: as the sampler's.
        dtype, device: as the sampler's.
        lift: as the sampler's.

    Example:
        >>> from lowvar.process.basis import PixelBasis
        >>> shadow = Shadow(torch.zeros(2), PixelBasis((2,)), torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
        >>> shadow.std.tolist()
        [5.0, 1.0]
    """

    mean: Tensor
    basis: Basis
    gains: Tensor
    clip: float | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    lift: Callable[[NoiseSource], NoiseSource] | None = field(default=None, repr=False)

    @property
    def std(self) -> Tensor:
        """Standard deviations along the directions, (*event_shape)."""
        return (self.gains**2).sum(0).sqrt()

    def at(self, c: Tensor) -> Tensor:
        """x~ = b + B c from its coefficients c (n, *event_shape), clipped as the sampler clips."""
        x = self.mean.to(c) + self.basis.inverse(c)
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def coefficients(self, index: Tensor, noise: NoiseSource) -> Tensor:
        """sum_k F_k (B^T z_k) on the sampler's own noise, (n, *event_shape)."""
        source = noise if self.lift is None else self.lift(noise)
        total: Tensor | None = None
        for k, gain in enumerate(self.gains):
            if k and not bool(gain.any()):
                continue
            z = source.normal(index, tuple(self.mean.shape), draw=k, dtype=self.dtype, device=self.device)
            part = gain.to(z) * self.basis.forward(z)
            total = part if total is None else total + part
        assert total is not None
        return total

    def __call__(self, index: Tensor, noise: NoiseSource) -> Tensor:
        """x~ on the sampler's own noise, (n, *event_shape)."""
        return self.at(self.coefficients(index, noise))

    def alone(self, index: Tensor, noise: NoiseSource) -> Tensor:
        """Samples of the law of x~ from one noise each (draw 0), (n, *event_shape).

        The noise is taken as coefficients of the twin's directions, so a net covers the directions themselves.
        """
        z = noise.normal(index, tuple(self.mean.shape), draw=0, dtype=self.dtype, device=self.device)
        return self.at(self.std.to(z) * z)


@dataclass(frozen=True, eq=False)
class _Given(NoiseSource):
    """Noise written out: draw k of sample i is given[k][i]."""

    given: Tensor

    def normal(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Row `index` of draw `draw`; zeros past the last draw."""
        return self.given[draw][torch.as_tensor(index)].to(device=device, dtype=dtype)

    def uniform(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """None of a chain's noise is uniform."""
        raise ValueError("written-out noise is normal")


@torch.no_grad()
def shadow_of(twin: GaussianTwin, schedule: Schedule, solver: Solver, grid: Tensor, draws: int) -> Shadow:
    """The twin's chain as an affine map.

    Args:
        twin: the twin.
        schedule, solver, grid: the sampler's.
        draws: step noises of a sample.

    Raises:
        ValueError: if the solver is not affine and diagonal in the twin's basis (checked on one noise).

    Example:
        >>> from lowvar.process import CosineVP, PixelBasis, ReverseKernel
        >>> twin = GaussianTwin(torch.ones(2), PixelBasis((2,)), torch.tensor([4.0, 0.25]))
        >>> grid = torch.linspace(1.0, 0.0, 101, dtype=torch.float64)
        >>> shadow = shadow_of(twin, CosineVP(), ReverseKernel(0.0, "small"), grid, 0)
        >>> [round(s, 1) for s in shadow.std.tolist()]
        [2.0, 0.5]
    """
    shape, basis = twin.mean.shape, twin.basis
    given = torch.zeros(1 + draws, draws + 3, *shape, dtype=torch.float64)
    unit = basis.inverse(torch.ones(1, *shape, dtype=torch.float64))[0]
    for k in range(1 + draws):
        given[k, 1 + k] = unit
        given[k, -1] = Independent(0).normal([0], shape, draw=k, dtype=torch.float64)[0]
    source, index = _Given(given), torch.arange(draws + 3)
    x = solver.initial(given[0], schedule.at(1.0), schedule.at(grid[0]))
    for state, _ in trajectory(twin.denoiser(schedule), solver, grid, x, source, index):
        x = state.x
    gains = basis.forward(x[1:-1] - x[0])
    found = Shadow(x[0], basis, gains, dtype=torch.float64)
    off = float((found(index[-1:], source)[0] - x[-1]).abs().max())
    if not off <= 1e-6 * (1 + float(x.abs().max())):
        raise ValueError(
            f"the solver is not affine and diagonal in the twin's basis (off by {off:.3g}): it has no shadow; leave "
            "the twin out"
        )
    return found
