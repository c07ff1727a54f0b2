"""The chain a scheduler is in the middle of: what it remembers from one step to the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowvar.process.covariance import Covariance
from lowvar.process.denoiser import CovarianceModel
from lowvar.process.multistep import MultistepPlan
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level
from lowvar.process.solver import Solver, State

__all__ = ["Chain"]

_CACHE_LIMIT = 2**24  # numbers of covariance tables kept on the device between trajectories


class Chain:
    """A solver on a grid, with its state.

    A step that does not follow the last one (another number, another shape of the sample) begins a new chain. The
    sample handed in is used as it is, so that a caller may change it between steps (guidance, inpainting).

    Args:
        levels: of the grid, (K + 1,).
        solver: what steps.
        model: the calibrated covariance, or None.
    """

    def __init__(self, levels: Level, solver: Solver, model: CovarianceModel | None) -> None:
        self.levels, self.solver, self.model = levels, solver, model
        self._state: State | None = None
        self._next = self._begin = 0
        self._plan: Any = None
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._cache: dict[int, Covariance] = {}

    def covariance(self, k: int, x: Tensor) -> Covariance | None:
        """The covariance at level k, kept on the device of the states x for the next chain."""
        if self.model is None:
            return None
        self._move(x)
        if k not in self._cache:
            if (len(self._cache) + 1) * x[0].numel() > _CACHE_LIMIT:
                self._cache.clear()
            self._cache[k] = self.model(x, self.levels[k], Posterior(x))
        return self._cache[k]

    def step(self, k: int, x: Tensor, posterior: Posterior, z: Tensor | None) -> Tensor:
        """The state at level k + 1."""
        self._move(x)
        last = self._state
        follows = last is not None and k == self._next and last.x.shape == x.shape
        memory = last.memory if last is not None and follows else None
        if memory is None:
            state = self.solver.start(x)
            # a solver's weights count the values since the first step, so that a plan belongs to a beginning
            if state.memory is not None and k != self._begin:
                self._begin, self._plan = k, None
        else:
            state = State(x, memory)
        if self._plan is None:
            plan = self.solver.prepare(self.levels[self._begin :])
            self._plan = plan.to(x) if isinstance(plan, MultistepPlan) else plan
        self._state, _ = self.solver.step(self._plan, k - self._begin, state, posterior, z)
        self._next = k + 1
        return self._state.x

    def _move(self, x: Tensor) -> None:
        """Drops what lies on another device or in another dtype."""
        if self._place != (x.device, x.dtype):
            self._place, self._state, self._plan, self._cache = (x.device, x.dtype), None, None, {}
