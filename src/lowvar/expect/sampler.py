r"""What an expectation needs of a sampler: samples as a function of noise.

    x_i = G(z_i0, z_i1, ..)        sample number i from its start's noise (draw 0) and its steps' noise (draws 1, 2, ..)

A `Sampler` maps sample numbers and a `NoiseSource` to samples and says what one costs; it has no other source of
randomness. So antithetic noise, scrambled nets and coupled chains are other noise sources for the same sampler, and the
same numbers give the same samples whatever the batch size.

Optional things make variance reduction possible: `shadow`, a Gaussian that runs on the same noise and costs no network
evaluation (`lowvar.expect.shadow`); `surrogate`, the same for a mixture (`lowvar.expect.surrogate`); `coarser`, the
same process in fewer steps on the same noise (`lowvar.expect.coupled`); and `parts`, the samplers of the classes that
a conditional sampler mixes.

`ChainSampler` is a denoiser, a solver and a grid. `FunctionSampler` wraps any function of noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowvar.expect.coupled import Coarse, block_weights
from lowvar.expect.shadow import Shadow, shadow_of
from lowvar.expect.surrogate import SurrogateDenoiser
from lowvar.process.basis import PixelBasis
from lowvar.process.denoiser import Denoiser
from lowvar.process.kernel import ReverseKernel
from lowvar.process.mixture import MixtureTwin
from lowvar.process.noise import NoiseSource
from lowvar.process.solver import Solver
from lowvar.process.twin import GaussianTwin
from lowvar.sample.trajectory import trajectory

__all__ = ["ChainSampler", "ClassSampler", "FunctionSampler", "Sampler", "alone"]


class Sampler(ABC):
    """Samples as a function of sample numbers and noise.

    Attributes:
        event_shape: shape of one sample.
        nfe: network evaluations a sample costs.
        noise_shape: shape of one draw of noise; None: that of a sample.
        draws: step noises a sample uses beside the start's (draws 1 .. `draws`); 0 for a deterministic chain.
        shadow: a Gaussian on the same noise that costs no evaluation, or None.
        surrogate: a sampler on the same noise that costs no evaluation and is no Gaussian, or None.
        coarser: the same process on every second level of its grid, coupled to this one, or None.
        parts: (probability, sampler) of each class, where this sampler draws a class first; else empty.
    """

    event_shape: torch.Size
    nfe: int
    draws: int = 0
    noise_shape: Sequence[int] | None = None
    shadow: Any = None
    surrogate: Any = None
    coarser: Any = None
    parts: Any = ()

    @abstractmethod
    def __call__(self, index: Tensor, noise: NoiseSource) -> Tensor:
        """Samples of the numbers `index` (n,), shape (n, *event_shape)."""


@dataclass(frozen=True, eq=False)
class FunctionSampler(Sampler):
    """A sampler from any function of noise: `function(index, noise)` returns (n, *event_shape).

    Attributes:
        function: the function; it may use `noise.normal` and `noise.uniform` and no other randomness.
        event_shape: shape of one sample.
        nfe: what a sample costs; a number of its own unit where there is no network.
        draws: step noises it uses.
        noise_shape: shape of the noise it asks for; default the event's.
        shadow, coarser, parts, surrogate: see `Sampler`.

    Example:
        >>> from lowvar.process import Independent
        >>> cubes = FunctionSampler(lambda index, noise: noise.normal(index, (2,)) ** 3, (2,))
        >>> cubes(torch.arange(4), Independent(0)).shape
        torch.Size([4, 2])
    """

    function: Callable[[Tensor, NoiseSource], Tensor]
    event_shape: Sequence[int]  # type: ignore[assignment]
    nfe: int = 1
    draws: int = 0
    shadow: Shadow | None = None
    coarser: Sampler | None = None
    parts: tuple[tuple[float, Sampler], ...] = ()
    noise_shape: Sequence[int] | None = None  # type: ignore[assignment]
    surrogate: Sampler | None = None

    def __call__(self, index: Tensor, noise: NoiseSource) -> Tensor:
        """See the base class."""
        return self.function(index, noise)


@dataclass(frozen=True, eq=False)
class ChainSampler(Sampler):
    """A reverse process: x_1 from draw 0, step k with draw k + 1 (`lowvar.sample.trajectory`).

    Attributes:
        denoiser, solver: of the process.
        grid: decreasing times (K + 1,).
        event_shape: shape of one sample.
        twin: the calibrated Gaussian twin; None leaves the designs that need it out.
        mixture: the calibrated mixture twin; likewise.
        clip: final clip to [-clip, clip], or None.
        dtype, device: of the states.
        lift: from the noise of the finest chain to this one's, set where it is coupled to a finer one.

    Example:
        >>> from lowvar.process import CosineVP, Independent, PixelBasis, ReverseKernel
        >>> from lowvar.process.grid import trailing
        >>> schedule, twin = CosineVP(), GaussianTwin(torch.zeros(3), PixelBasis((3,)), torch.ones(3))
        >>> chain = ChainSampler(twin.denoiser(schedule), ReverseKernel(), trailing(schedule, 8), (3,), twin=twin)
        >>> chain(torch.arange(5), Independent(0)).shape, chain.coarser.grid.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    denoiser: Denoiser
    solver: Solver
    grid: Tensor
    event_shape: Sequence[int]  # type: ignore[assignment]
    twin: GaussianTwin | None = None
    mixture: MixtureTwin | None = None
    clip: float | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    lift: Callable[[NoiseSource], NoiseSource] | None = field(default=None, repr=False)

    @property
    def nfe(self) -> int:  # type: ignore[override]
        """Evaluations of the solver on the grid times those of the denoiser."""
        return self._evaluations * self.denoiser.nfe

    @property
    def draws(self) -> int:  # type: ignore[override]
        """Evaluations, where the solver adds noise."""
        return self._evaluations if self.solver.stochastic else 0

    @cached_property
    def _evaluations(self) -> int:
        return len(self.solver.evaluations(self.denoiser.schedule.at(self.grid)))

    @torch.no_grad()
    def __call__(self, index: Tensor, noise: NoiseSource) -> Tensor:
        """See the base class."""
        source = noise if self.lift is None else self.lift(noise)
        schedule, shape = self.denoiser.schedule, tuple(self.event_shape)
        z = source.normal(index, shape, draw=0, dtype=self.dtype, device=self.device)
        x = self.solver.initial(z, schedule.at(1.0), schedule.at(self.grid[0]))
        for state, _ in trajectory(self.denoiser, self.solver, self.grid, x, source, index):
            x = state.x
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    @cached_property
    def shadow(self) -> Shadow | None:  # type: ignore[override]
        """The twin through this solver on this grid, in closed form; None without a twin."""
        return None if self.twin is None else self._shadow(self.twin)

    @cached_property
    def surrogate(self) -> ChainSampler | None:  # type: ignore[override]
        """The mixture twin through this solver on this grid; None without a mixture."""
        if self.mixture is None:
            return None
        denoiser = SurrogateDenoiser(self.mixture, self.denoiser)
        return replace(self, denoiser=denoiser, solver=_plain(self.solver), mixture=None)

    def _shadow(self, twin: GaussianTwin) -> Shadow:
        found = shadow_of(twin, self.denoiser.schedule, _plain(self.solver), self.grid, self.draws)
        return replace(found, clip=self.clip, dtype=self.dtype, device=self.device, lift=self.lift)

    @cached_property
    def coarser(self) -> ChainSampler | None:  # type: ignore[override]
        """Every second level of the grid, its noise the weighted sum of this chain's; None where K is odd or 1.

        Where the solver adds noise, its evaluations have to be its steps.
        """
        steps = len(self.grid) - 1
        if steps < 2 or steps % 2 or (self.draws and self.draws != steps):
            return None
        grid = self.grid[::2].clone()
        if not self.draws:
            return replace(self, grid=grid)
        unit = torch.ones(tuple(self.event_shape), dtype=torch.float64)
        twin = self.twin or GaussianTwin(torch.zeros_like(unit), PixelBasis(unit.shape), unit)
        weights, basis, mine = block_weights(self._shadow(twin).gains[1:], 2), twin.basis, self.lift

        def lift(noise: NoiseSource) -> NoiseSource:
            return Coarse(noise if mine is None else mine(noise), weights, basis)

        return replace(self, grid=grid, lift=lift)


def _plain(solver: Solver) -> Solver:
    """The solver for a denoiser without a learned variance: beta_tilde in its place."""
    if isinstance(solver, ReverseKernel) and solver.variance == "learned":
        return replace(solver, variance="small")
    return solver


@dataclass(frozen=True, eq=False)
class ClassSampler(Sampler):
    """A class from the noise's uniform number (draw 0), then a sample of it: the marginal of a conditional model.

    The twins are those of the first class: on the same noise they are controls of any class's samples.

    Attributes:
        parts: (probability, sampler) of each class; probabilities are scaled to sum 1.

    Raises:
        ValueError: if there is no class, a probability is not positive, or shapes or costs differ.

    Example:
        >>> from lowvar.process import Independent
        >>> def at(c):
        ...     return FunctionSampler(lambda index, noise: c + noise.normal(index, (1,)), (1,))
        >>> both = ClassSampler(((0.25, at(-9.0)), (0.75, at(9.0))))
        >>> bool(both(torch.arange(400), Independent(0)).mean() > 0)
        True
    """

    parts: tuple[tuple[float, Sampler], ...]  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Checks the classes."""
        if not self.parts or any(not p > 0 for p, _ in self.parts):
            raise ValueError(f"probabilities are {[p for p, _ in self.parts]}; give at least one class, all above 0")
        shapes, costs = {tuple(s.event_shape) for _, s in self.parts}, {s.nfe for _, s in self.parts}
        if len(shapes) > 1 or len(costs) > 1:
            raise ValueError(f"the classes' samplers have shapes {shapes} and costs {costs}; they must agree")
        total = sum(p for p, _ in self.parts)
        object.__setattr__(self, "parts", tuple((p / total, s) for p, s in self.parts))

    @property
    def event_shape(self) -> torch.Size:  # type: ignore[override]
        """That of the classes."""
        return torch.Size(self.parts[0][1].event_shape)

    @property
    def nfe(self) -> int:  # type: ignore[override]
        """That of the classes."""
        return self.parts[0][1].nfe

    @property
    def draws(self) -> int:  # type: ignore[override]
        """That of the classes."""
        return self.parts[0][1].draws

    @property
    def shadow(self) -> Any:  # type: ignore[override]
        """That of the first class."""
        return self.parts[0][1].shadow

    @property
    def surrogate(self) -> Any:  # type: ignore[override]
        """That of the first class."""
        return self.parts[0][1].surrogate

    def __call__(self, index: Tensor, noise: NoiseSource) -> Tensor:
        """See the base class."""
        u = noise.uniform(index, (1,), draw=0, dtype=torch.float64)[:, 0]
        edges = torch.tensor([p for p, _ in self.parts], dtype=torch.float64).cumsum(0)
        which = torch.searchsorted(edges.to(u), u).clamp_max(len(self.parts) - 1)
        x: Tensor | None = None
        for k, (_, sampler) in enumerate(self.parts):
            chosen = which == k
            if bool(chosen.any()):
                found = sampler(index[chosen], noise)
                x = found.new_empty((len(index), *found.shape[1:])) if x is None else x
                x[chosen.to(found.device)] = found
        assert x is not None
        return x


def alone(sampler: Sampler) -> Sampler:
    """A sampler on noise of its own: a chain that was coupled to a finer one, without the coupling."""
    if isinstance(sampler, ChainSampler) and sampler.lift is not None:
        return replace(sampler, lift=None)
    return sampler
