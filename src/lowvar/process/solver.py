r"""The common form of everything that runs a reverse process.

A solver turns posteriors into states. It is a value without hidden state: what a step needs from earlier steps travels
in `State`, what depends on the grid only is computed once by `prepare`. `order` is the declared order of convergence of
its means; the tests measure it. `evaluations` says at which levels it wants the network: once a level, t_0 .. t_{K-1},
for all but the methods with inner stages (Heun); `step` is called once an evaluation.

    plan = solver.prepare(levels)                        # levels of a grid, decreasing times
    at = solver.evaluations(levels)
    state = solver.start(x)
    for k in range(len(at)):
        state, info = solver.step(plan, k, state, denoiser(state.x, at[k]), z_k)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowvar.process.posterior import Posterior
from lowvar.process.schedule import VE, Level

__all__ = ["Solver", "State", "StepInfo"]


@dataclass(frozen=True)
class State:
    """The chain's state: x (B, *event_shape), and what a multistep solver remembers."""

    x: Tensor
    memory: Any = None


@dataclass(frozen=True)
class StepInfo:
    """What a step knows about itself.

    Attributes:
        k: number of the step, 0 the noisiest.
        posterior: the denoiser's answer the step used.
        law: the Gaussian the new state was drawn from (`lowvar.process.kernel.Gaussian`), or None where the solver has
            no density (a deterministic multistep method).
    """

    k: int
    posterior: Posterior
    law: Any = None


class Solver(ABC):
    """A rule for reverse steps; subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def order(self) -> int:
        """Declared order of convergence of the mean."""

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether steps need noise."""

    @abstractmethod
    def prepare(self, levels: Level) -> Any:
        """Everything that depends on the grid only; levels (K + 1,) with decreasing times."""

    def initial(self, z: Tensor, prior: Level, first: Level) -> Tensor:
        """The start of a chain from standard normal z, (B, *event_shape): sqrt(alpha^2 + sigma^2) z at the first level.

        That is the standard deviation of x_t for data of mean 0 and variance 1: 1 for VP, sqrt(1 + sigma_max^2) for VE.

        Args:
            z: standard normal noise.
            prior: the schedule's level at t = 1.
            first: the grid's first level.
        """
        return float(torch.sqrt(first.alpha**2 + first.sigma**2) if float(first.alpha) > 0 else first.sigma) * z

    @abstractmethod
    def start(self, x: Tensor) -> State:
        """The state at the first level."""

    @abstractmethod
    def step(self, plan: Any, k: int, state: State, posterior: Posterior, z: Tensor | None) -> tuple[State, StepInfo]:
        """Evaluation k: from level k to level k + 1, with standard normal z of the state's shape (None: no noise)."""

    def corrects(self, plan: Any, k: int) -> bool:
        """Whether step k (0 to K) begins by correcting the state at level k with the posterior there."""
        return False

    def corrected(self, plan: Any, k: int, state: State, posterior: Posterior) -> Tensor:
        """The state at level k that step k goes on from: x itself unless `corrects`; affine in x and the mean."""
        return state.x

    def evaluations(self, levels: Level) -> Level:
        """The levels of a grid (K + 1,) at which the posterior is asked for, in order."""
        return levels[:-1]

    def nfe(self, steps: int) -> int:
        """Evaluations that a grid of K steps costs.

        Example:
            >>> from lowvar.process.heun import Heun
            >>> Heun().nfe(5)
            9
        """
        return len(self.evaluations(VE().at(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64))))
