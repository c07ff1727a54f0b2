r"""Second moments of a control variate's remainder along reverse paths: how far to trust it, and where to measure it.

With M(a, b) = E r(l_a) r(l_b) along a direction of the twin's basis, r = x0_hat - D along paths of the reverse process,

    kappa(a, b) = M(a, b) / M(a, a)                      is the best multiple of r(l_a) to stand for r(l_b)

(the optimal coefficient of a control variate). What is left of a direction at l_b is uncorrelated with what was seen
at l_a: a remainder that the process forgets is not carried on, and one that is an error of the network is neither.
Since r enters a sample of the twin's flow (`lowvar.process.flow`) along direction i as

    x_0,i  =  (what the twin gives)  +  integral of w(l) r(l) dl,      w = sqrt(c) u v^-1/2,  v = 1 + c u^2,

asking the network at level a and next at level s costs the mean square error

    e(a, s) = E [ sum_{a <= b < s} w_b (r_b - kappa(a, b) r_a) dl ]^2,

a number. Relative to sqrt(c) and summed over directions it is the weight of an arrow a -> s; errors of different
steps are taken as uncorrelated, and the best K levels are the cheapest chain of K arrows (dynamic programming, as
Watson et al. 2021 do for the likelihood): the exact minimum over all grids on the L levels.

Of r itself only a share a(l) may be worth keeping (`lowvar.process.corrected`: a regression on images, where M is one
on paths of the network); M and kappa are then those of a r, and a is kept beside them.

Directions are pooled in groups of similar variance c, so that the statistics have one size whatever the dimension.
`lowvar.calibrate.path_moments` measures them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from lowvar.process.planning import chains
from lowvar.process.schedule import Schedule

__all__ = ["PathMoments", "spread_groups"]

_GROUPS = 24
_DEPTH = 13.8  # log of a million


def spread_groups(variance: Tensor) -> Tensor:
    """Groups 0 .. G - 1 of directions of similar variance, smallest first, (d,): equal shares of its logarithm.

    At most 24, from the largest variance down to a millionth of it; what is smaller is in the last one with its like.

    Example:
        >>> spread_groups(torch.tensor([1e-9, 2.0, 1.0, 0.0])).tolist()
        [0, 2, 1, 0]
    """
    flat = variance.flatten().double()
    depth = torch.log(flat.max().clamp_min(1e-300) / flat.clamp_min(1e-300)) / _DEPTH
    rung = (depth * _GROUPS).long().clamp(0, _GROUPS - 1)
    return torch.unique(_GROUPS - 1 - rung, return_inverse=True)[1]


@dataclass(frozen=True, eq=False)
class PathMoments:
    """Second moments of the remainder by group of directions.

    Attributes:
        logsnr: increasing levels, (L,) float64, equally spaced.
        moments: M, mean over a group's directions, (G, L, L) float64.
        variance: c of the groups, (G,) float64.
        size: directions a group, (G,).
        share: a, the share of the network's remainder that r is, (G, L); None is 1.

    Raises:
        ValueError: if shapes do not fit.

    Example:
        >>> logsnr = torch.linspace(-4.0, 4.0, 9, dtype=torch.float64)
        >>> decay = torch.exp(-(logsnr[:, None] - logsnr).abs())
        >>> moments = PathMoments(logsnr, decay[None], torch.ones(1), torch.ones(1))
        >>> [levels for _, levels in islice(moments.chosen(), 3)]
        [[6], [5, 7], [4, 6, 8]]
    """

    logsnr: Tensor
    moments: Tensor
    variance: Tensor
    size: Tensor
    share: Tensor | None = None

    def __post_init__(self) -> None:
        """Checks shapes."""
        L, G = len(self.logsnr), len(self.variance)
        if self.share is not None and self.share.shape != (G, L):
            raise ValueError(f"shares are {tuple(self.share.shape)} for {G} groups at {L} levels")
        if self.moments.shape != (G, L, L) or L < 2:
            raise ValueError(f"moments are {tuple(self.moments.shape)} for {G} groups at {L} levels, at least 2")

    @cached_property
    def kappa(self) -> Tensor:
        """Coefficients of r(l_a) for r(l_b), (G, L, L); 0 where nothing was left over."""
        size = self.moments.diagonal(dim1=1, dim2=2)[:, :, None]
        return torch.where(size > 0, self.moments / size.clamp_min(1e-300), torch.zeros_like(self.moments))

    def trust(self, at: float, to: Tensor) -> Tensor:
        """Multiples of the network's remainder: a kappa from logsnr `at` to the later `to` (n,), shape (n, G).

        kappa is that of the level measured next to `at`, a is linear in logsnr.
        """
        low, high = float(self.logsnr[0]), float(self.logsnr[-1])
        at = min(max(at, low), high)  # a chain may begin at -inf
        a = int((self.logsnr - at).abs().argmin())
        step = float(self.logsnr[1] - self.logsnr[0])
        place = (a + (to.double().clamp_min(low) - at) / step).clamp(0, len(self.logsnr) - 1)
        left = place.floor().long().clamp(max=len(self.logsnr) - 2)
        weight = (place - left)[:, None]
        row = self.kappa[:, a].T  # (L, G)
        return (row[left] * (1 - weight) + row[left + 1] * weight) * self._kept((at - low) / step)

    def _kept(self, place: float) -> Tensor:
        """a at a place among the levels, (G,)."""
        if self.share is None:
            return torch.ones_like(self.variance, dtype=torch.float64)
        left = min(int(place), len(self.logsnr) - 2)
        return torch.lerp(self.share[:, left].double(), self.share[:, left + 1].double(), place - left)

    @cached_property
    def _arrows(self) -> tuple[Tensor, Tensor]:
        """Costs (L + 1, L + 1) from start 0 or level i - 1 to level j - 1, and of the way from each to the end."""
        L, c = len(self.logsnr), self.variance
        v = 1 + c[:, None] * torch.exp(self.logsnr)
        w = torch.sqrt((v - 1) / v) * float(self.logsnr[1] - self.logsnr[0]) / 2
        weighted = self.moments * w[:, :, None] * w[:, None, :]
        relative = self.size.double() / self.size.sum() / c.clamp_min(1e-12).sqrt()
        cost = torch.full((L + 1, L + 1), torch.inf, dtype=torch.float64)
        last = torch.zeros(L + 1, dtype=torch.float64)
        for a in range(-1, L):
            for s in range(a + 1, L + 1):
                span = slice(max(a, 0), s)
                error = weighted[:, span, span].sum((1, 2))
                if a >= 0:
                    # E (sum w r)^2 - (sum w kappa)^2 M(a, a), as kappa M(a, a) = M(a, b)
                    error = error - (w[:, span] * self.kappa[:, a, span]).sum(1) ** 2 * self.moments[:, a, a]
                total = (error.clamp_min(0) * relative).sum()
                if s == L:
                    last[a + 1] = total
                else:
                    cost[a + 1, s + 1] = total
        return cost, last

    def chosen(self) -> Iterator[tuple[float, list[int]]]:
        """For K = 1, 2, .. evaluations: the predicted error of the best chain and its levels."""
        for error, path in islice(chains(*self._arrows), 1, None):
            yield error, [i - 1 for i in path[1:]]

    def grid(self, schedule: Schedule, steps: int) -> Tensor:
        """Times of the best `steps` evaluations, then 0; (steps + 1,) float64.

        More steps than the L levels measured are equally spaced in logsnr between the first and the last of these.

        Raises:
            ValueError: if steps is below 1.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}; give at least 1")
        if steps > len(self.logsnr):
            chosen = torch.linspace(float(self.logsnr[0]), float(self.logsnr[-1]), steps, dtype=torch.float64)
        else:
            chosen = self.logsnr[next(islice(self.chosen(), steps - 1, None))[1]]
        return torch.cat([schedule.time(chosen), torch.zeros(1, dtype=torch.float64)])
