r"""DPM-Solver++(2M) and its SDE form (Lu, Zhou, Bao, Chen, Li & Zhu 2022, Algorithm 2).

A predictor of two nodes on the scale of `lowvar.process.linear_multistep`, D_1 = (h / h_prev) (x0_hat_t - x0_hat_prev):

    x_s = a x_t + kappa x0_hat_t + alpha_s p_1 D_1 + lambda z,
    midpoint   p_1 = (1 - e^-H) / 2                the paper's Algorithm 2, diffusers' default
    heun       p_1 = 1 - (1 - e^-H) / H            the exact integral of the line through both values

eta = 0 is the ODE, eta = 1 SDE-DPM-Solver++(2M); between them lambda = eta sigma_s sqrt(1 - e^-2h) as for DDIM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lowvar.process.linear_multistep import LinearMultistep, first_moment, rho_of_eta

__all__ = ["DPMSolverPP"]


@dataclass(frozen=True)
class DPMSolverPP(LinearMultistep):
    """DPM-Solver++(2M), data prediction.

    Args:
        weights: midpoint or heun.
        eta: stochasticity in [0, 1].
        covariance: whether the first step, of one posterior, adds kappa^2 C (see `linear_multistep`).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> DPMSolverPP().order, DPMSolverPP(eta=1.0).stochastic
        (2, True)
    """

    weights: Literal["midpoint", "heun"] = "midpoint"
    eta: float = 0.0
    covariance: bool = False

    def __post_init__(self) -> None:
        """Checks the choices."""
        if self.weights not in ("midpoint", "heun"):
            raise ValueError(f"weights is {self.weights!r}; allowed: midpoint, heun")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; allowed: 0 (ODE) to 1 (SDE)")

    @property
    def nodes(self) -> tuple[int, int]:
        """See the base class."""
        return 2, 0

    @property
    def stochasticity(self) -> float:
        """See the base class."""
        return self.eta

    def rho(self, t: float, h: float) -> float:
        """See the base class."""
        return rho_of_eta(self.eta, h)

    def two_nodes(self, H: float, p: Sequence[float]) -> float:
        """See the base class."""
        return first_moment("bh2" if self.weights == "midpoint" else "exact", H, p)
