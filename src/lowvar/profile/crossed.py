r"""Where the variance of a training gradient comes from: data, time, noise and their interactions.

A sample's gradient g(x, t, eps) is a function of three independent draws. Its variance V = tr Cov g is a sum over the
non-empty sets u of draws (Hoeffding's decomposition, the analysis of variance),

    V = sum_u V_u,    V_u = sum_{w <= u} (-1)^{|u| - |w|} S_w,    S_w = E <g(a), g(b)>,

where a and b have the draws in w in common and are independent in the others: S of the empty set is ||E g||^2, S of all
three is E ||g||^2, and V_x = S_x - S_0 is the variance over images of the gradient that is averaged over times and
noises. Every share V_u / V is what a perfect treatment of u alone could remove.

A *crossed block* has 2 images, 2 times and 2 noises, and the gradients of all 8 combinations. Of the pairs of its
combinations 8 have all draws in common (a gradient with itself), 8 each have two in common, 8 each have one, 8 none,
counted with their order: the mean over the pairs that share w is an unbiased estimate of S_w, so every V_u and V have
unbiased estimates from one block (they may be negative), and their sum is exact. Blocks are independent. Shares are
ratios of means over blocks, with the delete-a-group jackknife's interval.

**By noise level.** With the time held, V(t) = tr Cov(g | t) has three parts, V_x(t), V_eps(t) and V_x,eps(t), from the
pairs within each of a block's two times. Averaged over the times in a bin, and over all bins,

    V = V_t + sum_bins E[V_x(t) + V_eps(t) + V_x,eps(t); t in bin],        V_t = S_t - S_0,

since E V_x(t) = V_x + V_x,t and so on: that is what a report stacks.

Sources: W. Hoeffding, "A class of statistics with asymptotically normal distribution", 1948; B. Efron, C. Stein, "The
jackknife estimate of variance", 1981; A. Owen, "Monte Carlo theory, methods and examples", Appendix A (pick-freeze
estimates of the terms).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lowvar.metrics.intervals import MIN_BLOCKS, Interval, Replicates

__all__ = ["CELLS", "SOURCES", "Crossed", "Decomposition", "cell_numbers"]

DRAWS = ("x", "t", "eps")
SOURCES: tuple[str, ...] = ("x", "t", "eps", "x,t", "x,eps", "t,eps", "x,t,eps")
"""The sets u, as a summary names them."""
LEVEL_SOURCES: tuple[str, ...] = ("x", "eps", "x,eps")
CELLS = 8
"""Gradients of a crossed block."""
_GROUPS = 512  # of the jackknife, at most: few groups of skewed terms cover too little


def cell_numbers() -> Tensor:
    """Which of its block's two images, times and noises a combination has, (8, 3) of 0 and 1.

    Example:
        >>> cell_numbers()[:3].tolist()
        [[0, 0, 0], [0, 0, 1], [0, 1, 0]]
    """
    return torch.cartesian_prod(*[torch.arange(2)] * 3)


def _subsets(draws: tuple[str, ...]) -> list[frozenset[str]]:
    return [frozenset(c) for n in range(len(draws) + 1) for c in combinations(draws, n)]


def _named(u: frozenset[str]) -> str:
    return ",".join(d for d in DRAWS if d in u)


def _masks() -> Tensor:
    """Weights of the 8 x 8 pairs in S_w, (8 sets, 8, 8), each summing to 1; sets in the order of `_subsets`."""
    cells = cell_numbers()
    same = cells[:, None] == cells[None]  # (8, 8, 3)
    masks = []
    for w in _subsets(DRAWS):
        wanted = torch.tensor([d in w for d in DRAWS])
        masks.append((same == wanted).all(-1).double())
    return torch.stack([m / m.sum() for m in masks])


def _moebius(draws: tuple[str, ...]) -> tuple[list[str], Tensor]:
    """Names of the non-empty u, and the signs that make V_u of S_w, (sets - 1, sets)."""
    sets = _subsets(draws)
    signs = torch.tensor([[float((-1) ** (len(u) - len(w))) if w <= u else 0.0 for w in sets] for u in sets[1:]])
    return [_named(u) for u in sets[1:]], signs.double()


def _by_time() -> Tensor:
    """Weights of the pairs within each time in S_w, w among x and eps, (2 times, 4 sets, 8, 8)."""
    cells = cell_numbers()
    same = cells[:, None] == cells[None]
    rows = []
    for j in range(2):
        both = (cells[:, None, 1] == j) & (cells[None, :, 1] == j)
        masks = [
            (both & (same[..., 0] == ("x" in w)) & (same[..., 2] == ("eps" in w))).double()
            for w in _subsets(("x", "eps"))
        ]
        rows.append(torch.stack([m / m.sum() for m in masks]))
    return torch.stack(rows)


@dataclass(frozen=True, eq=False)
class Crossed:
    """What blocks have said so far.

    Attributes:
        terms: V_u a block, columns as in `SOURCES`, float64 (B, 7, parameter groups).
        square: ||E g||^2 a block, (B, groups).
        levels: V_x, V_eps and V_x,eps given the time, of a block's two times, (B, 2, 3).
        bins: bins of those times, (B, 2).

    Example:
        >>> g = torch.tensor([3.0, 1.0])[cell_numbers()[:, 0]][:, None]  # 8 gradients that depend on the image alone
        >>> block = Crossed.of((g @ g.T)[None, None], torch.zeros(1, 2, dtype=torch.int64))
        >>> dict(zip(SOURCES, block.terms[0, :, 0].tolist())), float(block.square)
        ({'x': 2.0, 't': 0.0, 'eps': 0.0, 'x,t': 0.0, 'x,eps': 0.0, 't,eps': 0.0, 'x,t,eps': 0.0}, 3.0)
    """

    terms: Tensor
    square: Tensor
    levels: Tensor
    bins: Tensor

    @classmethod
    def of(cls, grams: Tensor, bins: Tensor) -> Crossed:
        """From inner products of the 8 gradients of each block.

        Args:
            grams: (B, groups, 8, 8), by parameter group; cells in the order of `cell_numbers`.
            bins: noise-level bins of the two times, (B, 2) int64.

        Raises:
            ValueError: for other shapes.
        """
        if grams.ndim != 4 or grams.shape[2:] != (CELLS, CELLS) or bins.shape != (len(grams), 2):
            raise ValueError(
                f"inner products are {tuple(grams.shape)}, bins {tuple(bins.shape)}; give (B, groups, 8, 8) and (B, 2)"
            )
        names, signs = _moebius(DRAWS)
        S = torch.einsum("wcd,bgcd->bwg", _masks(), grams.double())
        V = torch.einsum("uw,bwg->bug", signs, S)[:, [names.index(n) for n in SOURCES]]
        inner, inner_signs = _moebius(("x", "eps"))
        T = torch.einsum("jwcd,bgcd->bjw", _by_time(), grams.double())
        L = torch.einsum("uw,bjw->bju", inner_signs, T)[..., [inner.index(n) for n in LEVEL_SOURCES]]
        return cls(V, S[:, 0], L, bins)

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.terms)

    @classmethod
    def joined(cls, parts: Sequence[Crossed]) -> Crossed:
        """The blocks of all parts, in their order."""
        names = ("terms", "square", "levels", "bins")
        terms, square, levels, bins = (torch.cat([getattr(p, n) for p in parts]) for n in names)
        return cls(terms, square, levels, bins)

    def decomposition(self, bins: int) -> Decomposition:
        """Shares with 95% intervals.

        Args:
            bins: number of noise-level bins.

        Raises:
            ValueError: for fewer than 16 blocks: there is no interval.
        """
        if len(self) < MIN_BLOCKS:
            raise ValueError(f"{len(self)} crossed blocks; an interval needs at least {MIN_BLOCKS}")
        groups = min(len(self), _GROUPS)
        place = torch.arange(len(self)) * groups // len(self)
        sizes = torch.bincount(place, minlength=groups)

        def summed(values: Tensor) -> Tensor:
            out = torch.zeros(groups, *values.shape[1:], dtype=torch.float64)
            return out.index_add_(0, place, values.double())

        terms, square = summed(self.terms), summed(self.square)
        B = torch.nn.functional.one_hot(self.bins, bins).double() / 2  # of the two times
        levels = summed(torch.einsum("bju,bjk->bku", self.levels, B))
        whole, each, mean = terms.sum(-1), terms.sum(1), square.sum(-1)

        def ratio(above: Tensor, below: Tensor) -> Interval:
            a, b = above.sum(), below.sum()
            return Replicates(float(a / b), (a - above) / (b - below), sizes).interval()

        def average(values: Tensor) -> Interval:
            n = len(self)
            return Replicates(float(values.sum() / n), (values.sum() - values) / (n - sizes), sizes).interval()

        total = whole.sum(1)
        variance, mean_square = average(total), average(mean)
        scale = _scale(variance, mean_square, total, mean, sizes)
        return Decomposition(
            blocks=len(self),
            variance=variance,
            square=mean_square,
            noise_scale=scale,
            shares={u: ratio(whole[:, k], total) for k, u in enumerate(SOURCES)},
            groups=tuple(
                {u: ratio(terms[:, k, g], total) for k, u in enumerate(SOURCES)} for g in range(terms.shape[-1])
            ),
            group_variance=tuple(ratio(each[:, g], total) for g in range(terms.shape[-1])),
            levels=tuple({u: ratio(levels[:, k, i], total) for i, u in enumerate(LEVEL_SOURCES)} for k in range(bins)),
        )


def _scale(variance: Interval, square: Interval, above: Tensor, below: Tensor, sizes: Tensor) -> Interval:
    """V / ||E g||^2 with the jackknife's interval of its log; without an upper end where ||E g||^2 may be 0."""
    a, b = above.sum() - above, below.sum() - below
    if square.low <= 0 or bool((b <= 0).any()) or bool((a <= 0).any()):
        value = variance.value / square.value if square.value > 0 else math.inf
        return Interval(
            value, max(variance.low, 0.0) / square.high if square.high > 0 else math.inf, math.inf, math.inf
        )
    log = Replicates(math.log(variance.value / square.value), (a / b).log(), sizes).interval()
    return Interval(math.exp(log.value), math.exp(log.low), math.exp(log.high), math.exp(log.value) * log.se)


@dataclass(frozen=True)
class Decomposition:
    """Variance of a sample's gradient and its parts, with 95% intervals.

    Attributes:
        blocks: crossed blocks that it is from, 8 gradients each.
        variance: V = tr Cov g of one sample.
        square: ||E g||^2.
        noise_scale: V / ||E g||^2 (McCandlish et al. 2018): a batch far below it nearly halves the updates when
            doubled; without an upper end where ||E g||^2 cannot be told from 0.
        shares: V_u / V by source; they sum to 1, and single ones may be below 0 by noise.
        groups: parts of V by parameter group and source, over V of all parameters.
        group_variance: each group's V over V of all.
        levels: by noise-level bin, the parts of V given the time (`x`, `eps`, `x,eps`), over V.
    """

    blocks: int
    variance: Interval
    square: Interval
    noise_scale: Interval
    shares: Mapping[str, Interval]
    groups: tuple[Mapping[str, Interval], ...]
    group_variance: tuple[Interval, ...]
    levels: tuple[Mapping[str, Interval], ...]
