r"""Calibrated noise for any solver: what its marginal lacks is added after each step, independent of everything.

    x_s <- x_s + B (v_s^1/2 z),     Cov(x_s) <- Cov(x_s) + B diag(v_s) B^T.

v_s (and a shift of the mean) are measured once for a solver on a grid: `lowvar.calibrate.MarginalDeficit`. The solver's
own noise and this one are drawn together, as one Gaussian of the sum of both covariances. Where the solver corrects x_s
once the posterior there is known, the noise comes before: the network is asked at the noisy prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowvar.process.basis import Basis
from lowvar.process.covariance import BasisDiagonal, Covariance, Isotropic
from lowvar.process.kernel import Gaussian
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level
from lowvar.process.solver import Solver, State, StepInfo

__all__ = ["WithNoise"]


@dataclass(frozen=True, eq=False)
class WithNoise(Solver):
    """A solver with calibrated extra noise on one grid.

    Args:
        solver: one evaluation a step; if it has noise of its own, isotropic or in the same basis.
        basis: B.
        logsnr: of the grid the noise belongs to, (K + 1,).
        variance: v after each step, (K, *event_shape), >= 0.
        shift: in the basis, subtracted from the state after each step, same shape; None: nothing.

    Raises:
        ValueError: if shapes disagree, the grid is another one, or the solver's own noise has another form.

    Example:
        >>> from lowvar.process import CosineVP, DPMSolverPP, PixelBasis
        >>> levels = CosineVP().at(torch.tensor([1.0, 0.5, 0.0]))
        >>> solver = WithNoise(DPMSolverPP(), PixelBasis((2,)), levels.logsnr, torch.zeros(2, 2))
        >>> solver.order, solver.stochastic
        (2, True)
    """

    solver: Solver
    basis: Basis
    logsnr: Tensor
    variance: Tensor
    shift: Tensor | None = None

    def __post_init__(self) -> None:
        """Checks shapes."""
        wanted = (len(self.logsnr) - 1, *self.basis.event_shape)
        for value in (self.variance, self.variance if self.shift is None else self.shift):
            if tuple(value.shape) != wanted:
                raise ValueError(f"the noise of {wanted[0]} steps has shape {wanted}, got {tuple(value.shape)}")
        if self.solver.nfe(wanted[0]) != wanted[0]:
            raise ValueError(f"calibrated noise is for solvers of one evaluation a step, and {self.solver} has more")

    def to(self, like: Tensor) -> WithNoise:
        """With the noise in the dtype and on the device of `like`: steps then copy nothing."""
        shift = None if self.shift is None else self.shift.to(like)
        return replace(self, variance=self.variance.to(like), shift=shift)

    @property
    def order(self) -> int:
        """The solver's; the noise vanishes with its error."""
        return self.solver.order

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def prepare(self, levels: Level) -> Any:
        """See the base class; the grid must be the calibrated one."""
        same = len(levels) == len(self.logsnr) and torch.allclose(levels.logsnr, self.logsnr, rtol=1e-5, atol=1e-5)
        if not same:
            raise ValueError(
                f"this noise was calibrated for {len(self.logsnr) - 1} steps at other levels: calibrate it for this "
                "grid, as a solver's deficit belongs to its grid"
            )
        return self.solver.prepare(levels)

    def start(self, x: Tensor) -> State:
        """See the base class."""
        return self.solver.start(x)

    def corrects(self, plan: Any, k: int) -> bool:
        """See the base class."""
        return self.solver.corrects(plan, k)

    def corrected(self, plan: Any, k: int, state: State, posterior: Posterior) -> Tensor:
        """See the base class."""
        return self.solver.corrected(plan, k, state, posterior)

    def step(self, plan: Any, k: int, state: State, posterior: Posterior, z: Tensor | None) -> tuple[State, StepInfo]:
        """See the base class."""
        state, info = self.solver.step(plan, k, state, posterior, None)
        mean = state.x
        if self.shift is not None:
            mean = mean - self.basis.inverse(self.shift[k : k + 1].to(mean))
        law = Gaussian(mean, self._covariance(info, self.variance[k : k + 1].to(mean)))
        return State(mean if z is None else law.sample(z), state.memory), StepInfo(k, posterior, law)

    def _covariance(self, info: StepInfo, extra: Tensor) -> Covariance:
        own = None if info.law is None else info.law.covariance
        if own is None and not self.solver.stochastic:
            return BasisDiagonal(self.basis, extra)
        if isinstance(own, Isotropic):
            return BasisDiagonal(self.basis, extra + own.variance.reshape(-1, *([1] * (extra.ndim - 1))))
        if isinstance(own, BasisDiagonal) and own.basis.same_as(self.basis):
            return BasisDiagonal(self.basis, extra + own.variance)
        raise ValueError(
            f"{self.solver} has noise of its own that is neither isotropic nor in the calibrated basis; allowed: a "
            "solver without noise, or one whose noise is"
        )
