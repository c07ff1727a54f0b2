"""Chains a scheduler is in the middle of: what depends on the grid, and what is remembered from one step to the next.

A `Recipe` holds what all chains on a grid share, computed when it is first asked for and kept on the device of the
states: the solver's plan, and the noise of each step where that is known before the network is asked. A `Chain` holds
the state. A first-order kernel whose noise is known is one pass over the numbers a term,

    x_s = a x_t + kappa x0_hat + R z,      R R^T = lambda^2 I + kappa^2 C,

with floats a and kappa; anything else goes through `Solver.step`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowvar.calibrate.conditional import Labelled
from lowvar.calibrate.table import CovarianceTable
from lowvar.errors import UserError
from lowvar.process.basis import Basis
from lowvar.process.covariance import BasisDiagonal, Covariance, Diagonal, Isotropic
from lowvar.process.denoiser import CovarianceModel, expand
from lowvar.process.flow import FlowPlan
from lowvar.process.kernel import ReverseKernel
from lowvar.process.multistep import MultistepPlan
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level
from lowvar.process.solver import Solver, State
from lowvar.process.twin import GaussianTwin
from lowvar.process.with_noise import WithNoise

__all__ = ["Chain", "Recipe", "TwinCovariance"]

_CACHE_LIMIT = 2**24  # numbers of standard deviations kept on the device between trajectories


class TwinCovariance:
    """The posterior covariance of the Gaussian twin, as a `CovarianceModel`."""

    def __init__(self, twin: GaussianTwin) -> None:
        self.twin = twin

    def __call__(self, x: Tensor, level: Level, posterior: Posterior) -> Covariance:
        return self.twin.posterior(torch.zeros_like(x[:1]), level).covariance  # type: ignore[return-value]


@dataclass(frozen=True)
class _Noise:
    """R: a number, one a pixel (1, *event_shape), or one a direction of a basis; of labelled samples one each."""

    std: float | Tensor
    basis: Basis | None = None

    def add(self, x: Tensor, z: Tensor, any_root: bool, spare: Tensor | None = None) -> Tensor:
        """Adds R z to x in place; `any_root`: R = B diag(std) by one transform, over z, and not B diag(std) B^T."""
        if not isinstance(self.std, Tensor):
            return x.add_(z, alpha=self.std)
        if self.basis is None:
            return x.addcmul_(z, self.std)
        rotated = z.mul_(self.std) if any_root else self.std * self.basis.forward(z)
        return self.basis.accumulate(x, rotated, spare)


class Recipe:
    """A solver on a grid.

    Args:
        levels: of the grid, (K + 1,).
        solver: what steps.
        model: the calibrated covariance, or None.

    Attributes:
        evaluations: the levels at which the network is asked, (N,).
    """

    def __init__(self, levels: Level, solver: Solver, model: CovarianceModel | None) -> None:
        self.levels, self.solver, self.model = levels, solver, model
        self.evaluations = solver.evaluations(levels)
        self.labelled = isinstance(model, Labelled)
        self.by_level = model is None or self.labelled or isinstance(model, CovarianceTable | TwinCovariance)
        fixed = isinstance(solver, ReverseKernel) and solver.variance in ("small", "large")
        self._early = fixed or (isinstance(solver, ReverseKernel) and model is not None and self.by_level)
        self._place: tuple[Any, ...] | None = None
        self._plans: dict[int, Any] = {}
        self._noise: dict[int, _Noise | None] = {}
        self._tables: dict[int, Covariance] = {}
        self._spare: Tensor | None = None

    def draws(self, k: int) -> bool:
        """Whether evaluation k takes noise: the last one, to clean data, takes none."""
        return self.solver.stochastic and k + 1 < len(self.evaluations)

    def at(self, x: Tensor) -> None:
        """Drops what was made for another device or dtype than that of the states x, or for another batch of labels."""
        place = (x.device, x.dtype, len(x) if self.labelled else None)
        if self._place != place:
            self._place, self._plans, self._noise, self._tables = place, {}, {}, {}
            self._spare = None
            if isinstance(self.solver, WithNoise):
                self.solver = self.solver.to(x)

    def spare(self, x: Tensor, noise: _Noise) -> Tensor | None:
        """A buffer for a transform of the noise, kept from step to step."""
        if noise.basis is None or x.numel() > _CACHE_LIMIT:
            return None
        if self._spare is None or self._spare.shape != x.shape:
            self._spare = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return self._spare

    def _entries(self, x: Tensor) -> int:
        """Numbers of a step's table: one for all samples, or one each."""
        return x.numel() if self.labelled else x.numel() // max(len(x), 1)

    def plan(self, begin: int, x: Tensor) -> Any:
        """The solver's plan of the grid from level `begin` on.

        Raises:
            UserError: if the solver's noise was calibrated for the whole grid.
        """
        if begin and isinstance(self.solver, WithNoise):
            raise UserError(
                "calibrated noise belongs to a chain from the first timestep: to begin later, as image-to-image does, "
                "take the sampler without it"
            )
        if begin not in self._plans:
            plan = self.solver.prepare(self.levels[begin:])
            self._plans[begin] = plan.to(x) if isinstance(plan, MultistepPlan | FlowPlan) else plan
        return self._plans[begin]

    def covariance(self, k: int, x: Tensor, posterior: Posterior) -> Covariance | None:
        """The calibrated covariance of evaluation k.

        Raises:
            UserError: if it is for events of another shape.
        """
        if self.model is None:
            return None
        if k in self._tables:
            found = self._tables[k]
        else:
            found = self.model(x, self.evaluations[k], posterior)
        _require_shape(found, x)
        if self.by_level and k not in self._tables:
            if (len(self._tables) + 1) * self._entries(x) > _CACHE_LIMIT:
                self._tables.clear()
            self._tables[k] = found
        return found

    def noise(self, k: int, x: Tensor) -> _Noise | None:
        """The noise of a first-order kernel's step k where it is known before the network is asked, else None."""
        if not self._early:
            return None
        if k not in self._noise:
            if (len(self._noise) + 1) * self._entries(x) > _CACHE_LIMIT:
                self._noise.clear()
            self._noise[k] = self._make_noise(k, x)
        return self._noise[k]

    def _make_noise(self, k: int, x: Tensor) -> _Noise | None:
        kernel = self.solver
        assert isinstance(kernel, ReverseKernel)
        probe = torch.zeros(1, *x.shape[1:], dtype=torch.float64)  # on the CPU: coefficients are made there
        probe = probe.expand_as(x) if self.labelled else probe
        posterior = Posterior(probe)
        if self.model is not None:
            covariance = self.model(probe, self.levels[k], posterior)
            _require_shape(covariance, x)
            posterior = Posterior(probe, covariance)
        law = kernel(probe, posterior, self.levels[k], self.levels[k + 1]).covariance
        if isinstance(law, Isotropic) and self.labelled:
            return _Noise(expand(law.variance.sqrt(), x))
        if isinstance(law, Isotropic):
            return _Noise(float(law.variance.sqrt()))
        if isinstance(law, Diagonal):
            return _Noise(law.variance.sqrt().to(x))
        if isinstance(law, BasisDiagonal):
            return _Noise(law.variance.sqrt().to(x), law.basis)
        return None


class Chain:
    """A recipe's state.

    A step that does not follow the last one (another number, another shape of the sample) begins a new chain. The
    sample handed in is used as it is, so that a caller may change it between steps (guidance, inpainting).

    Attributes:
        next: number of the evaluation that would follow.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.next = recipe, 0
        self._state: State | None = None
        self._begin = 0

    def step(self, k: int, x: Tensor, posterior: Posterior, z: Tensor | None, any_root: bool = False) -> Tensor:
        """The state after evaluation k.

        Args:
            k: number of the evaluation.
            x: states.
            posterior: the network's answer there.
            z: standard normal noise, or None for none.
            any_root: whether the noise may be coloured by any root of its covariance, and overwritten.

        Raises:
            UserError: if k is the second evaluation of a step whose first was not seen.
        """
        recipe = self.recipe
        recipe.at(x)
        noise = recipe.noise(k, x)
        if noise is not None:
            c, self.next = recipe.plan(0, x)[k], k + 1
            made = x * c.a
            made.add_(posterior.mean, alpha=c.kappa)
            return made if z is None else noise.add(made, z, any_root, recipe.spare(x, noise))
        covariance = recipe.covariance(k, x, posterior)
        if covariance is not None:
            posterior = Posterior(posterior.mean, covariance, posterior.fraction)
        last = self._state
        follows = last is not None and k == self.next and last.x.shape == x.shape and _same_place(last.x, x)
        memory = last.memory if last is not None and follows else None
        if memory is None:
            state = recipe.solver.start(x)
            if state.memory is not None:  # such a solver's weights count the values since the first step
                self._begin = k
            elif len(recipe.evaluations) >= len(recipe.levels) and k % 2:
                raise UserError("a step of two evaluations was begun with the second: start at the beginning of a step")
            else:
                self._begin = 0
        else:
            state = State(x, memory)
        plan = recipe.plan(self._begin, x)
        self._state, _ = recipe.solver.step(plan, k - self._begin, state, posterior, z)
        self.next = k + 1
        return self._state.x


def _require_shape(covariance: Covariance, x: Tensor) -> None:
    if covariance.event_shape != x.shape[1:]:
        raise UserError(
            f"the calibration is for samples {tuple(covariance.event_shape)}, got {tuple(x.shape[1:])}: calibrate at "
            "this size"
        )


def _same_place(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype
