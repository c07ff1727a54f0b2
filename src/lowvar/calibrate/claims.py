r"""What an estimator of Cov[x_0 | x_t] claims, as data: tests read it and check it, the docs' table is made from it.

`centre` says around which mean the second moment is taken. With x0_hat the network's mean and m = E[x_0 | x_t],

    network      E[(x_0 - x0_hat)(x_0 - x0_hat)^T | x_t] = C + (m - x0_hat)(m - x0_hat)^T: right for *this* network,
                 however wrong its mean; what a kernel around x0_hat should have
    posterior    C itself, for an exact network; an inexact one makes it wrong, at first order of its error where C
                 comes from a difference of moments (analytic, SN), through its Jacobian's error otherwise
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Claims"]


@dataclass(frozen=True)
class Claims:
    """What an estimator claims.

    Attributes:
        source: paper or rule.
        centre: see the module.
        exact: what is exact in the limit of many data, for an exact network.
        bias: what is left, in words.
        per_sample: whether C depends on x_t, or on the noise level only.
        nfe: network evaluations a step beyond the denoiser's own (a JVP 1, a VJP 2).
        training_nfe: network evaluations a training draw (heads), 0 where nothing is trained.
    """

    source: str
    centre: Literal["network", "posterior"]
    exact: str
    bias: str
    per_sample: bool = True
    nfe: int = 0
    training_nfe: int = 0
