r"""UniPC: a unified predictor-corrector (Zhao, Bai, Rao, Zhou & Lu 2023, data prediction).

UniP-p uses the last p posteriors, UniC-p these and the new one; both fit the moments of `linear_multistep` (their
R rho = b), except that with two nodes p_1 is B(H) / 2,

    bh1   B(H) = H               bh2   B(H) = 1 - e^-H,

as their code does it ("for order 2, we use a simplified version"). UniP-2 with bh2 is DPM-Solver++(2M) midpoint. UniC
raises the order by one: UniPC-p has order p + 1. The paper treats the ODE, eta = 0; with eta > 0 the same formula is
used in H (see `linear_multistep`), and the correction keeps the step's noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lowvar.process.linear_multistep import LinearMultistep, first_moment, rho_of_eta

__all__ = ["UniPC"]


@dataclass(frozen=True)
class UniPC(LinearMultistep):
    """UniPC-p, multistep.

    Args:
        p: posteriors the prediction uses, 1 to 3.
        variant: bh1 or bh2.
        eta: stochasticity in [0, 1].
        covariance: whether the first step adds kappa^2 C (see `linear_multistep`).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> UniPC().order, UniPC(p=1).order
        (3, 2)
    """

    p: int = 2
    variant: Literal["bh1", "bh2"] = "bh2"
    eta: float = 0.0
    covariance: bool = False

    def __post_init__(self) -> None:
        """Checks the choices."""
        if self.p not in (1, 2, 3):
            raise ValueError(f"p is {self.p}; allowed: 1, 2, 3")
        if self.variant not in ("bh1", "bh2"):
            raise ValueError(f"variant is {self.variant!r}; allowed: bh1, bh2")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; allowed: 0 (ODE) to 1 (SDE)")

    @property
    def nodes(self) -> tuple[int, int]:
        """See the base class."""
        return self.p, self.p + 1

    @property
    def stochasticity(self) -> float:
        """See the base class."""
        return self.eta

    def rho(self, t: float, h: float) -> float:
        """See the base class."""
        return rho_of_eta(self.eta, h)

    def two_nodes(self, H: float, p: Sequence[float]) -> float:
        """See the base class."""
        return first_moment(self.variant, H, p)
