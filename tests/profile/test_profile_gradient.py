"""The sources of a network's gradient variance: inner products, their sketches, and every share against the truth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowvar.data import TensorImages
from lowvar.process import CosineVP, NetworkDenoiser
from lowvar.process.noise import Independent, NoiseSource
from lowvar.profile.crossed import SOURCES, Crossed
from lowvar.profile.gradient import CrossedDraws, crossed_blocks
from lowvar.profile.inner import Exact, Sketched, parameter_groups
from lowvar.train import NetworkConfig, Objective, Simple, UniformTimes, build_network

D, STEPS = 2, 4
IMAGES = torch.tensor([[0.9, -0.3], [-0.6, 0.5], [0.1, 0.8]])
EDGES = [9.0, 0.0, -9.0]


class Line(nn.Module):
    """W x, whatever the time: its gradient is of degree two in the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D, bias=False, dtype=torch.float64)
        self.layer.weight.data = torch.tensor([[0.7, -0.4], [0.25, 0.3]], dtype=torch.float64)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(x.double())


def line() -> NetworkDenoiser:
    return NetworkDenoiser(Line(), CosineVP(), "sample")


def draws(seed: int = 0) -> CrossedDraws:
    return CrossedDraws(TensorImages(IMAGES), UniformTimes(STEPS), Independent(seed))


def exact(network: nn.Module) -> Exact:
    return Exact(parameter_groups(network))


def enumerated() -> Tensor:
    """Gradients (images, times, noises, D D) of the line and the noises' weights: Gauss-Hermite, exact to degree 9."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(5))
    eps, w = torch.cartesian_prod(nodes, nodes), torch.cartesian_prod(weights, weights).prod(1)
    level = CosineVP().at((torch.arange(STEPS) + 1).double() / STEPS)
    W = Line().layer.weight.detach()
    x0 = IMAGES.double()[:, None, None]
    x = level.alpha[None, :, None, None] * x0 + level.sigma[None, :, None, None] * eps[None, None]
    g = -2 / D * (x0 - x @ W.T)[..., :, None] * x[..., None, :]
    return torch.cat([g.flatten(3), (w / w.sum()).expand(3, STEPS, -1)[..., None]], -1)


def truth() -> dict[str, float]:
    """V_u by projections."""
    table = enumerated()
    g, w = table[..., :-1], table[0, 0, :, -1]

    def mean(v: Tensor, axes: Sequence[int]) -> Tensor:
        for axis in axes:
            weight = w.reshape(1, 1, -1, 1) if axis == 2 else 1 / v.shape[axis]
            v = (v * weight).sum(axis, keepdim=True)
        return v

    found: dict[str, float] = {}
    effects: dict[tuple[int, ...], Tensor] = {(): mean(g, (0, 1, 2))}
    for u in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        smaller = [v for k, v in effects.items() if set(k) < set(u)]
        effects[u] = mean(g, [k for k in range(3) if k not in u]) - sum(smaller, torch.zeros(()))
        square = mean((effects[u].expand_as(g) ** 2).sum(-1, keepdim=True), (0, 1, 2))
        found[",".join(("x", "t", "eps")[k] for k in u)] = float(square)
    return found


def test_shares_of_a_line_are_the_enumerated_ones() -> None:
    """500 blocks: every V_u within four standard errors of the truth, and the largest known to a fifth."""
    denoiser = line()
    stream = crossed_blocks(denoiser, Objective(Simple()), draws(), exact(denoiser.network), EDGES)  # type: ignore[arg-type]
    terms = Crossed.joined(list(islice(stream, 500))).terms[..., 0]
    wanted = truth()
    for k, u in enumerate(SOURCES):
        se = float(terms[:, k].std()) / len(terms) ** 0.5
        assert abs(float(terms[:, k].mean()) - wanted[u]) < 4 * se, u
    assert float(terms[:, 2].std()) / len(terms) ** 0.5 < 0.2 * wanted["eps"]


def unet() -> NetworkDenoiser:
    network = build_network((1, 8, 8), NetworkConfig(width=8), None, seed=0)
    return NetworkDenoiser(network, CosineVP(), "v_prediction")


class Basis(NoiseSource):
    """Directions sqrt(P) e_k instead of normal ones: their mean outer product is the identity, exactly."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)

    def normal(self, index, event_shape, draw=0, dtype=torch.float32, device="cpu"):  # type: ignore[no-untyped-def]
        total, begin = sum(self.sizes), sum(self.sizes[:draw])
        rows = torch.zeros(len(index), self.sizes[draw], dtype=dtype)
        for row, k in enumerate(index):
            if begin <= k % total < begin + self.sizes[draw]:
                rows[row, k % total - begin] = total**0.5
        return rows.reshape(len(index), *event_shape)

    def uniform(self, index, event_shape, draw=0, dtype=torch.float32, device="cpu"):  # type: ignore[no-untyped-def]
        raise NotImplementedError


def test_a_sketch_by_a_basis_is_exact() -> None:
    """1e-10 for the line, whose four numbers are four directions."""
    denoiser = line()
    groups = parameter_groups(denoiser.network)  # type: ignore[arg-type]
    found = [
        Crossed.joined(list(islice(crossed_blocks(denoiser, Objective(Simple()), draws(), inner, EDGES), 3)))
        for inner in (Exact(groups), Sketched(groups, D * D, Basis([D * D])))
    ]
    assert torch.allclose(found[0].terms, found[1].terms, atol=1e-10)


def test_sketches_of_a_unet_are_its_gradients_along_directions() -> None:
    """Attention and group norms, differentiated twice: one direction's products against gradients, rtol 1e-3."""
    denoiser, noise = unet(), Independent(7)
    groups = parameter_groups(denoiser.network)  # type: ignore[arg-type]
    assert {"conv_in", "mid_block", "conv_out", "down_blocks.0", "up_blocks.1"} <= groups.keys()
    x, eps = (Independent(3).normal(range(2), (1, 8, 8), draw=k) for k in range(2))
    level = CosineVP().at(torch.tensor([0.3, 0.8]))

    def losses(rows: slice) -> Tensor:
        return Objective(Simple()).losses(denoiser, x[rows], eps[rows], level[rows]).loss

    found = Sketched(groups, 1, noise).of(losses, 2, 2, 5)[0]
    weights = [w for group in groups.values() for w in group]
    place = 0
    for k, group in enumerate(groups.values()):
        along = torch.zeros(2, dtype=torch.float64)
        for w in group:
            r = noise.normal([5], w.shape, draw=place)[0]
            for a in range(2):
                g = torch.autograd.grad(losses(slice(a, a + 1)).sum(), w)[0]
                along[a] += (g * r).sum().double()
            place += 1
        assert torch.allclose(found[k], along[:, None] * along, rtol=1e-3, atol=1e-9)
    assert place == len(weights)


def test_blocks_follow_from_their_numbers() -> None:
    """A run that goes on has the blocks of one that was not stopped."""
    denoiser = line()
    inner = exact(denoiser.network)  # type: ignore[arg-type]
    whole = list(islice(crossed_blocks(denoiser, Objective(Simple()), draws(), inner, EDGES), 4))
    rest = next(crossed_blocks(denoiser, Objective(Simple()), draws(), inner, EDGES, begin=3))
    assert torch.equal(whole[3].terms, rest.terms)
    assert not torch.equal(whole[2].terms, rest.terms)


def test_bins_are_those_of_the_times() -> None:
    denoiser = line()
    inner = exact(denoiser.network)  # type: ignore[arg-type]
    blocks = Crossed.joined(list(islice(crossed_blocks(denoiser, Objective(Simple()), draws(), inner, EDGES), 20)))
    t = torch.stack([draws().of(k)[1] for k in range(20)])
    assert torch.equal(blocks.bins, (CosineVP().at(t).logsnr < 0).long())


def test_no_directions() -> None:
    with pytest.raises(ValueError, match="directions is 0; a sketch needs at least 1"):
        Sketched({}, 0, Independent(0))
