r"""Second moments of a control variate's remainder along reverse paths: how far to trust it, and where to measure it.

With M(a, b) = E r(l_a) r(l_b) along a direction of the twin's basis, r = x0_hat - D along paths of the reverse process,

    kappa(a, b) = M(a, b) / M(a, a)                      is the best multiple of r(l_a) to stand for r(l_b)

(the optimal coefficient of a control variate). What is left of a direction at l_b is uncorrelated with what was seen
at l_a: a remainder that the process forgets is not carried on, and one that is an error of the network is neither. The
remainder before, r(l_o), costs nothing more: of both, the best combination for r(l_b) is, with k = kappa(a, o),

    (kappa(a, b) - beta k) r(l_a) + beta r(l_o),         beta = (M(o, b) - k M(a, b)) / (M(o, o) - k M(a, o)),

which extrapolates where the remainder is smooth and averages where it is noise. Between the levels where r was measured
it is taken as linear, so that M is bilinear there. Since r enters a sample of the twin's flow (`lowvar.process.flow`)
along direction i as

    x_0,i  =  (what the twin gives)  +  integral of w(l) r(l) dl,      w = sqrt(c) u v^-1/2,  v = 1 + c u^2,

asking the network at level a and next at level s, after level o, costs the mean square error

    e(o, a, s) = E [ sum_{a <= b < s} w_b (r_b - its best combination of r_a and r_o) dl ]^2
               = E (sum_b w_b r_b)^2 - p^2 / M(a, a) - (q - k p)^2 / (M(o, o) - k M(a, o)),

p = sum_b w_b M(a, b) and q = sum_b w_b M(o, b): a number. Relative to sqrt(c) and summed over directions it is the
weight of an arrow (o, a) -> (a, s); errors of different steps are taken as uncorrelated, and the best K levels are the
cheapest chain of K arrows (dynamic programming, as Watson et al. 2021 do for the likelihood, over pairs of levels): the
exact minimum over all grids on the L levels.

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

from lowvar.process.schedule import Schedule

__all__ = ["PathMoments", "spread_groups"]

_GROUPS = 24
_DEPTH = 13.8  # log of a million
_NEW = 1e-6  # share of an older remainder that the newer one must leave for both to be combined


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

    def trust(self, at: float, to: Tensor, before: float | None = None) -> Tensor:
        """Multiples of the network's remainders that stand for r, (R, n, G).

        Args:
            at: logsnr of the newest remainder.
            to: later levels, (n,).
            before: logsnr of the remainder before; None: there is none, R = 1, and else 2, the newest first.
        """
        weights = self._weights(to)
        newest = self._row(at)
        row, size = weights @ newest.T, self._row(at, at)  # M(a, b) (n, G), M(a, a)
        alpha = _ratio(row, size)
        if before is None:
            return (alpha * self._kept(at))[None]
        k = _ratio(self._row(at, before), size)
        own = self._row(before, before)
        left = own - k * self._row(at, before)
        left = torch.where(left > _NEW * own, left, torch.zeros_like(left))
        beta = _ratio(weights @ self._row(before).T - k * row, left)
        return torch.stack([(alpha - beta * k) * self._kept(at), beta * self._kept(before)])

    def _weights(self, logsnr: Tensor) -> Tensor:
        """What each measured level counts at others, which are limited to their range: linear, (n, L)."""
        place = (logsnr.double() - self.logsnr[0]) / (self.logsnr[1] - self.logsnr[0])
        numbers = torch.arange(len(self.logsnr), dtype=torch.float64)
        return (1 - (place.clamp(0, len(numbers) - 1)[:, None] - numbers).abs()).clamp_min(0)

    def _at(self, logsnr: float) -> Tensor:
        return self._weights(torch.tensor([logsnr], dtype=torch.float64))[0]

    def _row(self, a: float, b: float | None = None) -> Tensor:
        """M(a, .), (G, L), or M(a, b), (G,)."""
        row = self.moments.double() @ self._at(a)
        return row if b is None else row @ self._at(b)

    def _kept(self, at: float) -> Tensor:
        """a at a level, (G,)."""
        return (
            torch.ones_like(self.variance, dtype=torch.float64)
            if self.share is None
            else self.share.double() @ self._at(at)
        )

    @cached_property
    def _arrows(self) -> tuple[Tensor, Tensor]:
        """Costs (L,) of all before a first evaluation, and e (L + 1, L, L + 1): o = L is none, s = L the end."""
        L, G, c, M = len(self.logsnr), len(self.variance), self.variance, self.moments.double()
        v = 1 + c[:, None] * torch.exp(self.logsnr)
        w = torch.sqrt((v - 1) / v) * float(self.logsnr[1] - self.logsnr[0]) / 2
        relative = self.size.double() / self.size.sum() / c.clamp_min(1e-12).sqrt()
        seen, both = torch.zeros(G, L, L + 1, dtype=torch.float64), torch.zeros(G, L + 1, L + 1, dtype=torch.float64)
        seen[:, :, 1:] = (M * w[:, None, :]).cumsum(2)
        both[:, 1:] = (seen * w[:, :, None]).cumsum(1)
        to = both.diagonal(dim1=1, dim2=2)  # E (sum_{b < s} w r)^2
        whole = to[:, None, :] + to[:, :-1, None] - 2 * both[:, :-1]  # from a to s
        p = seen - seen.diagonal(dim1=1, dim2=2)[:, :, None]
        size = M.diagonal(dim1=1, dim2=2)
        one = whole - _ratio(p**2, size[:, :, None])
        cost = torch.full((L + 1, L, L + 1), torch.inf, dtype=torch.float64)
        for o in range(L + 1):
            error = one
            if o < L:
                k = _ratio(M[:, o], size)  # (G, L), by a
                left = size[:, o, None] - k * M[:, o]
                left = torch.where(left > _NEW * size[:, o, None], left, torch.zeros_like(left))
                q = seen[:, o, None, :] - seen[:, o, :-1, None]
                error = one - _ratio((q - k[:, :, None] * p) ** 2, left[:, :, None])
            cost[o] = (error.clamp_min(0) * relative[:, None, None]).sum(0)
        a, s = torch.arange(L)[:, None], torch.arange(L + 1)
        cost = torch.where(s > a, cost, torch.inf)
        cost[:L] = torch.where(a[None, :, :] > torch.arange(L)[:, None, None], cost[:L], torch.inf)
        return (to[:, :-1] * relative[:, None]).sum(0), cost

    def chosen(self) -> Iterator[tuple[float, list[int]]]:
        """For K = 1, 2, .. evaluations: the predicted error of the best chain and its levels."""
        first, step = self._arrows
        L = len(first)
        best = torch.full((L + 1, L), torch.inf, dtype=torch.float64)  # of chains whose last two levels are (o, a)
        best[L] = first
        back: list[Tensor] = []
        for _ in range(L):
            total = best + step[:, :, L]
            o, a = divmod(int(total.argmin()), L)
            path = [a]
            for arrows in reversed(back):
                path.append(o)
                o, a = int(arrows[o, a]), o
            yield float(total.min()), path[::-1]
            reached, arrows = (best[:, :, None] + step[:, :, :L]).min(0)
            best = torch.cat([reached, torch.full((1, L), torch.inf, dtype=torch.float64)])
            back.append(arrows)

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


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where nothing is there."""
    return torch.where(whole > 0, part / whole.clamp_min(1e-300), torch.zeros_like(part))
