"""Crossed designs: every term against exact enumeration, unbiased block by block, intervals that cover."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from lowvar.process.noise import Independent
from lowvar.profile.crossed import SOURCES, Crossed, cell_numbers

N, T, E, P = 3, 2, 4, 5
WEIGHT = tuple(torch.tensor(p, dtype=torch.float64) for p in ([0.5, 0.3, 0.2], [0.7, 0.3], [0.1, 0.2, 0.3, 0.4]))
"""Laws of the three draws, none of them uniform."""


def gradients() -> Tensor:
    """A table of gradients (N, T, E, P) in which everything interacts."""
    g = Independent(5).normal(range(N * T * E), (P,), dtype=torch.float64).reshape(N, T, E, P)
    own = Independent(6).normal(range(N + T + E), (P,), dtype=torch.float64)
    return g + 2 * own[:N, None, None] + 3 * own[None, N : N + T, None] + own[None, None, N + T :] + 1


def mean_over(g: Tensor, axes: tuple[int, ...]) -> Tensor:
    for axis in axes:
        weight = WEIGHT[axis].reshape([-1 if k == axis else 1 for k in range(4)])
        g = (g * weight).sum(axis, keepdim=True)
    return g


def truth(g: Tensor) -> dict[str, Tensor]:
    """V_u a parameter, (P,), by Hoeffding's projections: the effect of u is orthogonal to all others."""
    names = ("x", "t", "eps")
    effects: dict[frozenset[int], Tensor] = {}
    for size in range(4):
        for u in (frozenset(c) for c in product(range(3), repeat=size) if len(set(c)) == size):
            conditional = mean_over(g, tuple(k for k in range(3) if k not in u))
            effects[u] = conditional - sum((v for w, v in effects.items() if w < u), torch.zeros(1, 1, 1, P))
    found = {}
    for u, effect in effects.items():
        if u:
            square = mean_over(effect.expand(N, T, E, P) ** 2, (0, 1, 2)).flatten()
            found[",".join(names[k] for k in sorted(u))] = square
    return found


def grams(g: Tensor, x: Tensor, t: Tensor, e: Tensor) -> Tensor:
    """Inner products by two parameter groups, (B, 2, 8, 8), of blocks with images x (B, 2) and so on."""
    c = cell_numbers()
    cells = g[x[:, c[:, 0]], t[:, c[:, 1]], e[:, c[:, 2]]]  # (B, 8, P)
    parts = (cells[..., :2], cells[..., 2:])
    return torch.stack([p @ p.mT for p in parts], 1)


def every_block() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All blocks and their probabilities."""
    x, t, e = (torch.tensor(list(product(range(n), repeat=2))) for n in (N, T, E))
    i, j, k = (v.flatten() for v in torch.meshgrid(*[torch.arange(len(v)) for v in (x, t, e)], indexing="ij"))
    p = torch.ones(len(i), dtype=torch.float64)
    for draws, law in ((x[i], WEIGHT[0]), (t[j], WEIGHT[1]), (e[k], WEIGHT[2])):
        p = p * law[draws].prod(1)
    return x[i], t[j], e[k], p


def test_expected_terms_are_hoeffdings() -> None:
    """Over all blocks, each with its probability: V_u by group, ||E g||^2 and the parts by time, 1e-12."""
    g, (x, t, e, p) = gradients(), every_block()
    block = Crossed.of(grams(g, x, t, e), t)
    wanted = truth(g)
    for k, u in enumerate(SOURCES):
        found = (p[:, None] * block.terms[:, k]).sum(0)
        assert torch.allclose(found, torch.stack([wanted[u][:2].sum(), wanted[u][2:].sum()]), atol=1e-12), u
    mean = mean_over(g, (0, 1, 2)).flatten()
    assert float((p * block.square.sum(1)).sum()) == pytest.approx(float(mean @ mean), abs=1e-12)
    total = mean_over(((g - mean) ** 2).sum(-1, keepdim=True), (0, 1, 2))
    assert float((p[:, None, None] * block.terms).sum()) == pytest.approx(float(total), abs=1e-12)
    for k in range(T):  # at a time of that number
        here = (block.bins == k).double()[..., None]
        found = (p[:, None, None] * here * block.levels).sum((0, 1)) / 2
        at = g[:, k : k + 1]
        a = mean_over(at, (2,)) - mean_over(at, (0, 2))
        b = mean_over(at, (0,)) - mean_over(at, (0, 2))
        c = at - mean_over(at, (0, 2)) - a - b
        for i, effect in enumerate((a, b, c)):
            square = mean_over((effect.expand(N, 1, E, P) ** 2).sum(-1, keepdim=True), (0, 2))
            assert float(found[i]) == pytest.approx(float(WEIGHT[1][k]) * float(square), abs=1e-12)


def drawn(blocks: int, seed: int) -> Crossed:
    columns = []
    for d, law in enumerate(WEIGHT):
        u = Independent(seed).uniform(range(blocks), (2,), draw=d, dtype=torch.float64).contiguous()
        columns.append(torch.searchsorted(law.cumsum(0) / law.sum(), u, right=True))
    x, t, e = columns
    return Crossed.of(grams(gradients(), x, t, e), t)


def test_shares_sum_to_one_and_parts_add_up() -> None:
    """Identities of one estimate, whatever its noise: sources, groups, and levels with the share of the time alone."""
    found = drawn(64, 3).decomposition(T)
    assert sum(i.value for i in found.shares.values()) == pytest.approx(1, abs=1e-12)
    for u in SOURCES:
        assert sum(group[u].value for group in found.groups) == pytest.approx(found.shares[u].value, abs=1e-12)
    assert sum(i.value for i in found.group_variance) == pytest.approx(1, abs=1e-12)


def test_noise_scale() -> None:
    """V / ||E g||^2 of the table, within its interval; without an upper end where the mean gradient is 0."""
    g = gradients()
    mean = mean_over(g, (0, 1, 2)).flatten()
    wanted = float(sum(v.sum() for v in truth(g).values())) / float(mean @ mean)
    found = drawn(800, 4).decomposition(T).noise_scale
    assert found.low < wanted < found.high < 2 * wanted
    x, t, e = (v[::7] for v in every_block()[:3])
    centred = Crossed.of(grams(g - mean_over(g, (0, 1, 2)), x, t, e), t).decomposition(T)
    assert centred.noise_scale.high == float("inf")


def test_one_estimate_in_two_halves() -> None:
    whole, both = drawn(40, 9), drawn(40, 9)
    halves = [Crossed(both.terms[s], both.square[s], both.levels[s], both.bins[s]) for s in (slice(20), slice(20, 40))]
    assert torch.equal(Crossed.joined(halves).terms, whole.terms)
    assert Crossed.joined(halves).decomposition(T) == whole.decomposition(T)


def test_too_few_blocks() -> None:
    with pytest.raises(ValueError, match="8 crossed blocks; an interval needs at least 16"):
        drawn(8, 0).decomposition(T)
    with pytest.raises(ValueError, match=r"give \(B, groups, 8, 8\) and \(B, 2\)"):
        Crossed.of(torch.zeros(2, 8, 8), torch.zeros(2, 2))


@pytest.mark.slow
def test_intervals_cover() -> None:
    """2,000 replicates of 200 blocks: the intervals of every share and of V hold the truth 93% to 97% of the time."""
    wanted = truth(gradients())
    total = float(sum(v.sum() for v in wanted.values()))
    hits = []
    for seed in range(2000):
        found = drawn(200, 100 + seed).decomposition(T)
        of = {u: (i.low, i.high, float(wanted[u].sum()) / total) for u, i in found.shares.items()}
        of["V"] = (found.variance.low, found.variance.high, total)
        hits.append([low <= value <= high for low, high, value in of.values()])
    share = torch.tensor(hits).double().mean(0)
    assert bool(((share > 0.93) & (share < 0.97)).all()), share
