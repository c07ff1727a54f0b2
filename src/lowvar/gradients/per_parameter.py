r"""Control variates with a coefficient for each of the site's own parameters.

The score function's gradient in one parameter theta_e of the site (a logit, a location, a scale) is f s_e,
s_e = d log p(x) / d theta_e. Two kinds of terms have mean 0 for every e, each on its own:

    q_e0 = s_e                                  E s_e = 0                      (a baseline)
    q_ej = (h_j(x) - m_j) s_e - dm_j / dtheta_e      m_j(theta) = E h_j        (a control variate of known mean)

so g_e = f s_e - sum_j beta_ej q_ej is unbiased for any beta_e that does not know x, and the best is the regression of
f s_e on q_e, an entry at a time. A scalar coefficient has to serve all entries at once: one beta for a common bit and a
rare one, for a location and a scale. For j = 0 alone, beta_e0 = E[f s_e^2] / E[s_e^2] is the classical baseline a
parameter.

Coefficients are fitted to the other n - 1 samples of the batch (cross-fitted), at a cost of n^2 numbers a parameter.

Sources: E. Greensmith, P. Bartlett, J. Baxter, "Variance reduction techniques for gradient estimates in reinforcement
learning", 2004; J. Peters, S. Schaal, "Reinforcement learning of motor skills with policy gradients", 2008 (a baseline
a parameter); R. Ranganath, S. Gerrish, D. Blei, "Black box variational inference", 2014 (a coefficient a parameter).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.func import grad, jacrev

from lowvar.gradients.baselines import StatelessBaseline, Subtracted
from lowvar.gradients.controlled import _coefficient
from lowvar.gradients.distributions import log_prob, natural, with_natural
from lowvar.gradients.estimator import SiteRecord, SiteState, zero
from lowvar.gradients.variates import Variate

__all__ = ["PerParameter"]


@dataclass(frozen=True)
class PerParameter(StatelessBaseline):
    """A baseline, and the functions of a control variate if one is given, with coefficients of their own a parameter.

    In a sum it comes last: what it takes away differs from parameter to parameter, so baselines after it are fitted to
    what is there before it.

    Args:
        variate: `Regression` or `Taylor`, whose own coefficient is not used; None: the baseline alone.
        ridge: of the fit, a number of samples that say 0 (see `controlled`).

    Raises:
        ValueError: if the ridge is negative.

    Example:
        >>> from torch.distributions import Bernoulli
        >>> record = PerParameter().record(Bernoulli(torch.tensor([0.25, 0.5])), torch.tensor([1.0, 0.0]), {})
        >>> [round(s, 6) for s in record["score"].tolist()], record["terms"].shape  # b - p; one term, two parameters
        ([0.75, -0.5], torch.Size([1, 2]))
    """

    fits: ClassVar[bool] = True
    knows: ClassVar[bool] = True

    variate: Variate | None = None
    ridge: float = 1.0

    def __post_init__(self) -> None:
        """Checks the ridge."""
        if self.ridge < 0:
            raise ValueError(f"ridge is {self.ridge}; give a number >= 0 (samples that say beta = 0)")

    def record(self, d: Distribution, x: Tensor, state: SiteState) -> dict[str, Tensor]:
        """s (P,), q (terms, P), and zero(theta) (P,)."""
        live = natural(d)
        fixed = {name: v.detach() for name, v in live.items()}
        score = _flat(grad(lambda th: log_prob(with_natural(d, th), x))(fixed))
        terms = [score[None]]
        variate = self.variate
        if variate is not None:
            deviation = variate.deviation(with_natural(d, fixed), x)[0].detach().reshape(-1)
            slope = jacrev(lambda th: variate.deviation(with_natural(d, th), x)[1].reshape(-1))(fixed)
            each = torch.cat([v.reshape(len(deviation), -1) for v in slope.values()], 1)
            terms.append(deviation[:, None] * score - each)
        moved = _flat({name: zero(v) for name, v in live.items()})
        return {"score": score.detach(), "terms": torch.cat(terms).detach(), "moved": moved}

    def predict(self, record: SiteRecord, others: SiteRecord, costs: Tensor, state: SiteState) -> Subtracted:
        """Nothing from the cost itself; a term of value 0 with the gradient -sum_j beta_ej q_ej."""
        theirs = others["terms"].detach().transpose(-1, -2)  # (k, ..., P, terms)
        y = costs[..., None] * others["score"].detach()
        rows = torch.cat([torch.ones_like(y)[..., None], y[..., None], theirs], -1).to(torch.float64)
        beta = _coefficient(torch.einsum("n...i,n...j->...ij", rows, rows), self.ridge).to(costs)
        taken = (beta * record["terms"].detach().transpose(-1, -2)).sum(-1)  # (m, ..., P)
        known = -(taken * record["moved"]).sum(-1)
        return Subtracted(torch.zeros_like(known.detach()), known)

    def auxiliary(self, record: SiteRecord, costs: Tensor) -> Tensor | None:
        """None."""
        return None


def _flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.reshape(-1) for v in values.values()])
