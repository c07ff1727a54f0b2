r"""SA-Solver: the stochastic Adams predictor-corrector (Xue, Yi, Luo, Zhang, Sun, Li & Ma 2023, data prediction).

The reverse SDE of stochasticity tau(t) has rho = e^(-tau^2 h) on the scale of `lowvar.process.linear_multistep`; the
predictor is stochastic Adams-Bashforth of q posteriors, the corrector stochastic Adams-Moulton of q' with the new one,
redoing the step with the same noise. With two nodes their code replaces p_1 by H / 2 (a change of third order, "similar
to UniPC"): `weights="bh1"`; `exact` is the paper's integral. tau = 0 with q = q' = 2 is UniP-2 with UniC-1 (bh1).

tau is piecewise constant: `tau` for steps that begin at a time within `between`, 0 elsewhere (their experiments inject
noise in the middle of the process only). The default is diffusers': from timestep 800 to 200 of 1000, both included;
timestep n of T is the time (n + 1) / T (`lowvar.process.discrete`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lowvar.process.linear_multistep import LinearMultistep, first_moment, rho_of_tau

__all__ = ["SASolver"]

_ROUNDING = 1e-9


@dataclass(frozen=True)
class SASolver(LinearMultistep):
    """SA-Solver.

    Args:
        predictor: q, posteriors of the prediction, 1 to 3.
        corrector: q', posteriors of the correction, the new one included; 0 for none, else 2 to 4.
        tau: stochasticity in [0, 1].
        between: (low, high): steps that begin at a time in it have noise, ends included to 1e-9. diffusers counts
            timesteps 200 to 800 whatever T is: (201 / T, 801 / T).
        weights: bh1 (as the authors' code) or exact.
        covariance: whether steps of one posterior, and the first, add kappa^2 C (see `linear_multistep`).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> SASolver().order, SASolver(tau=0.0).stochastic
        (2, False)
    """

    predictor: int = 2
    corrector: int = 2
    tau: float = 1.0
    between: tuple[float, float] = (0.201, 0.801)
    weights: Literal["bh1", "exact"] = "bh1"
    covariance: bool = False

    def __post_init__(self) -> None:
        """Checks the choices."""
        if self.predictor not in (1, 2, 3):
            raise ValueError(f"predictor is {self.predictor}; allowed: 1, 2, 3")
        if self.corrector not in (0, 2, 3, 4):
            raise ValueError(f"corrector is {self.corrector}; allowed: 0 (none), 2, 3, 4")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau is {self.tau}; allowed: 0 (ODE) to 1 (SDE)")
        if self.weights not in ("bh1", "exact"):
            raise ValueError(f"weights is {self.weights!r}; allowed: bh1, exact")
        if not 0 <= self.between[0] <= self.between[1] <= 1:
            raise ValueError(f"between is {self.between}; give two times 0 <= low <= high <= 1")

    @property
    def nodes(self) -> tuple[int, int]:
        """See the base class."""
        return self.predictor, self.corrector

    @property
    def stochasticity(self) -> float:
        """See the base class."""
        return self.tau

    def rho(self, t: float, h: float) -> float:
        """See the base class."""
        low, high = self.between
        return rho_of_tau(self.tau if low - _ROUNDING <= t <= high + _ROUNDING else 0.0, h)

    def two_nodes(self, H: float, p: Sequence[float]) -> float:
        """See the base class."""
        return first_moment(self.weights, H, p)
