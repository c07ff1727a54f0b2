"""Parts of draw plans: exact unbiasedness by enumeration, exact laws, no dependence on how a batch is split."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.data import TensorImages
from lowvar.process import Independent, schedule_from_diffusers
from lowvar.process.noise import NoiseSource
from lowvar.train import (
    CrossPairs,
    DrawPlan,
    Draws,
    Immiscible,
    IndependentSamples,
    LossSecondMomentTimes,
    OptimalTransport,
    OrthogonalNoise,
    Pairing,
    SameImagePairs,
    SobolPoints,
    Times,
    UniformTimes,
    nearest_noise,
    optimal_transport,
    proportional_order,
    strata_order,
    stratified_uniforms,
)

SCHEDULE = schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2"})
T, B, UPDATES = 4, 4, 3  # 3 updates of 4 samples are whole epochs of 6 images, shared by pairs or not


class Given(NoiseSource):
    """Normal and uniform numbers that the test chooses, as functions of (index, draw)."""

    def __init__(self, normal: Callable[[Tensor], Tensor], uniform: Callable[[Tensor, int], Tensor]) -> None:
        self._normal, self._uniform = normal, uniform

    def normal(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        index = torch.as_tensor(index)
        return self._normal(index).to(dtype).reshape(len(index), *shape)

    def uniform(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        index = torch.as_tensor(index)
        return self._uniform(index, draw).to(dtype).reshape(len(index), *shape)


def full(index: Tensor, value: float) -> Tensor:
    return torch.full((len(index),), value, dtype=torch.float64)


def importance() -> LossSecondMomentTimes:
    return LossSecondMomentTimes(T, 1, 0.1).updated(torch.arange(T), torch.tensor([5.0, 1.0, 0.3, 2.0]).double())


def data(d: int, n: int = 6) -> TensorImages:
    x = torch.cos(torch.arange(n * d).double() * 1.7 + 0.3).reshape(n, 1, 1, d)
    return TensorImages(x.round(decimals=1).float())


def gradients(x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Of ||eps - (W x_t + c t)||^2 in (W, c) a sample, (n, d d + d) float64: a linear network away from its optimum."""
    x0, eps = x0.flatten(1).double(), eps.flatten(1).double()
    d = x0.shape[1]
    w = torch.linspace(-0.5, 0.8, d * d, dtype=torch.float64).reshape(d, d)
    c = torch.linspace(0.2, 0.7, d, dtype=torch.float64)
    level = SCHEDULE.at(t)
    x = level.alpha[:, None] * x0 + level.sigma[:, None] * eps
    r = 2 * (x @ w.T + c * t[:, None] - eps)
    return torch.cat([(r[:, :, None] * x[:, None, :]).flatten(1), r * t[:, None]], 1)


def signs(d: int) -> Tensor:
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=d)), dtype=torch.float64)


def plain(d: int) -> Tensor:
    """The plain expected gradient: images, T timesteps and sign noise, each uniform."""
    images = data(d).all().double()
    rows = [(x, (n + 1) / T, e) for x in images for n in range(T) for e in signs(d)]
    x, t, e = zip(*rows, strict=True)
    return gradients(torch.stack(x), torch.tensor(t).double(), torch.stack(e)).mean(0)


def mean_gradient(draws: Draws) -> Tensor:
    return (draws.weight[:, None] * gradients(draws.x0, draws.level.t, draws.eps)).mean(0)


def epoch_mean(times: Times, noise: NoiseSource, d: int, **parts: Any) -> Tensor:
    """Mean over the updates of whole epochs, for given noise."""
    plan = DrawPlan(data(d), SCHEDULE, B, seed=4, noise=noise, **parts)
    return torch.stack([mean_gradient(plan.draws(u, times)) for u in range(UPDATES)]).mean(0)


def pieces(times: LossSecondMomentTimes, shifts: Sequence[float] = (0.0,)) -> Iterator[tuple[float, float]]:
    """(length, middle) of the intervals of u on which all times at (u + shift) mod 1 are constant."""
    inner = times.probabilities().cumsum(0).tolist()
    edges = sorted({0.0, 1.0, *((e - s) % 1.0 for e in [0.0, *inner] for s in shifts)})
    for a, b in itertools.pairwise(edges):
        if b - a > 1e-13:
            yield b - a, (a + b) / 2


# ---------------------------------------------------------------------------------- exactly the plain expected gradient


@pytest.mark.parametrize("pairing", [IndependentSamples(), SameImagePairs(), CrossPairs()])
@pytest.mark.parametrize("importance_sampled", [False, True])
def test_pairs_are_unbiased(pairing: Pairing, importance_sampled: bool) -> None:
    """Each sample's law is enumerated: the sum over u's pieces and the signs of the noise, with their probabilities."""
    times = importance() if importance_sampled else LossSecondMomentTimes(T)
    total = torch.zeros_like(plain(2))
    for length, middle in pieces(times):
        for z in signs(2):
            noise = Given(lambda i, z=z: z.expand(len(i), 2), lambda i, _, m=middle: full(i, m))
            total += length / 4 * epoch_mean(times, noise, 2, pairing=pairing)
    assert torch.allclose(total, plain(2), rtol=0, atol=1e-9)


@pytest.mark.parametrize("pairing", [IndependentSamples(), SameImagePairs(), CrossPairs()])
def test_stratified_is_unbiased(pairing: Pairing) -> None:
    """Over all pieces of the shift, all turns of the strata and all signs; with importance sampling."""
    times, n = importance(), B // pairing.times
    total = torch.zeros_like(plain(2))
    for length, middle in pieces(times, [k / n for k in range(n)]):
        for turn, z in itertools.product(range(n), signs(2)):

            def uniform(i: Tensor, draw: int, middle: float = middle, turn: int = turn) -> Tensor:
                return full(i, middle) if draw == -1 else ((5 * i + turn) % n + 0.5) / n

            noise = Given(lambda i, z=z: z.expand(len(i), 2), uniform)
            total += length / n / 4 * epoch_mean(times, noise, 2, pairing=pairing, stratified=True)
    assert torch.allclose(total, plain(2), rtol=0, atol=1e-9)


def test_sobol_is_unbiased() -> None:
    """Over all leading bits of the shift: T = 4 takes two bits of a time, a sign one of a noise."""
    times = UniformTimes(T)
    total = torch.zeros_like(plain(2))
    plan = DrawPlan(data(2), SCHEDULE, B, pairing=SobolPoints(B))
    for bits in itertools.product(range(4), range(2), range(2)):
        shift = torch.tensor([bits[0] / 4, bits[1] / 2, bits[2] / 2]).double() + 0.1
        plan.noise = Given(lambda i: i, lambda i, _, s=shift: s.expand(len(i), 3))
        for u in range(UPDATES):
            draws = plan.draws(u, times)
            g = gradients(draws.x0, draws.level.t, draws.eps.sign())
            total += g.mean(0) / 16 / UPDATES
    assert torch.allclose(total, plain(2), rtol=0, atol=1e-9)


def test_orthogonal_is_unbiased() -> None:
    """Over the group of signed permutations, which has the first two moments of all rotations, at fixed norms."""
    d, times = 3, importance()
    z = torch.tensor([[1.0, 0.2, -0.7], [0.5, 1.1, 0.4]]).double()
    got, expected = (torch.zeros_like(plain(d)) for _ in range(2))
    for length, middle in pieces(times):
        for order in itertools.permutations(range(d)):
            for sign in signs(d):
                turned = z[:, list(order)] * sign
                noise = Given(lambda i, z=turned: z[i % 2], lambda i, _, m=middle: full(i, m))
                plan = DrawPlan(data(d), SCHEDULE, B, seed=4, noise=noise, pairing=OrthogonalNoise(2))
                for u in range(UPDATES):
                    draws = plan.draws(u, times)
                    norm = draws.eps.double().flatten(1).norm(dim=1)
                    got += length / 48 / UPDATES * mean_gradient(draws)
                    flat = (sign * norm[:, None] / d**0.5).reshape(draws.eps.shape)
                    w = draws.weight[:, None]
                    expected += length / 48 / UPDATES * (w * gradients(draws.x0, draws.level.t, flat)).mean(0)
    assert torch.allclose(got, expected, rtol=0, atol=1e-9)


def test_mirrored_images_alone_would_be_biased() -> None:
    """The enumeration sees a bias: noise that is not mirrored but shifted."""
    times, total = UniformTimes(T), torch.zeros_like(plain(2))
    for middle, z in itertools.product([0.125, 0.375, 0.625, 0.875], signs(2)):
        noise = Given(
            lambda i, z=z: z.expand(len(i), 2) + 0.01,
            lambda i, _, m=middle: full(i, m),
        )
        total += epoch_mean(times, noise, 2) / 16
    assert not torch.allclose(total, plain(2), rtol=0, atol=1e-3)


# ----------------------------------------------------------------------------------------------------------- stratified


def lattice(n: int, shift: float) -> Tensor:
    def uniform(i: Tensor, draw: int) -> Tensor:
        return full(i, shift) if draw == -1 else ((3 * i) % n + 0.5) / n

    return stratified_uniforms(Given(lambda i: i, uniform), 2, n)


@pytest.mark.parametrize("n", [4, 5, 64])
def test_lattice_has_its_variance(n: int) -> None:
    """Linear f: VRF 1 / (1 - S_t (1 - 1/n)); a cosine of fewer than n periods: 1 / (1 - S_t). Gauss-Legendre in u."""
    v_noise = 0.03
    node = torch.tensor([-(0.6**0.5), 0.0, 0.6**0.5], dtype=torch.float64)
    weight = torch.tensor([5 / 18, 8 / 18, 5 / 18], dtype=torch.float64).repeat(n) / n
    shifts = ((torch.arange(n)[:, None] + (node + 1) / 2) / n).flatten()
    linear = torch.stack([lattice(n, float(s)).mean() for s in shifts])
    variance = float((weight * (linear - 0.5) ** 2).sum())
    assert float((weight * linear).sum()) == pytest.approx(0.5, abs=1e-12)
    v_f = 1 / 12
    share = v_f / (v_f + v_noise)
    assert (v_f + v_noise) / (n * variance + v_noise) == pytest.approx(1 / (1 - share * (1 - 1 / n)), rel=1e-10)
    cosines = torch.stack([torch.cos(2 * torch.pi * 3 * lattice(n, float(s))).mean() for s in shifts])
    assert float(cosines.abs().max()) < 1e-10


def test_strata_are_hit_once_and_permuted() -> None:
    seen = set()
    for update in range(20):
        u = stratified_uniforms(Independent(5), update, 6)
        k = (u * 6).long()
        assert k.sort().values.tolist() == list(range(6))
        assert float(((u * 6) % 1).std()) < 1e-12
        seen.add(tuple(k.tolist()))
    assert len(seen) > 15
    with pytest.raises(ValueError, match="n is 0"):
        stratified_uniforms(Independent(0), 0, 0)


# ---------------------------------------------------------------------------------------------------- several processes

KINDS: list[dict[str, Any]] = [
    {},
    {"stratified": True},
    {"pairing": SameImagePairs()},
    {"pairing": SameImagePairs(), "stratified": True},
    {"pairing": CrossPairs(), "stratified": True},
    {"pairing": OrthogonalNoise(2), "stratified": True},
    {"pairing": OrthogonalNoise(3)},
    {"pairing": SobolPoints(24)},
    {"pairing": SobolPoints(12, limit=2)},
    {"coupling": OptimalTransport(), "stratified": True},
    {"coupling": Immiscible(3)},
    {"labels": torch.arange(10) % 3, "pairing": CrossPairs()},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_make_the_batch_bit_for_bit(kind: dict[str, Any], parts: int) -> None:
    plan = DrawPlan(data(4, 10), SCHEDULE, 24, seed=5, **kind)
    for update in (0, 3, 100_000):
        whole = plan.draws(update, importance())
        split = [plan.draws(update, importance(), k, parts) for k in range(parts)]
        for name in ("number", "image", "x0", "eps", "weight", "bin", "group"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in split])), name
        assert torch.equal(whole.level.t, torch.cat([part.level.t for part in split]))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_image_once_an_epoch(kind: dict[str, Any]) -> None:
    plan = DrawPlan(data(4, 10), SCHEDULE, 24, seed=5, **kind)
    shared = plan.pairing.images
    image = torch.cat([plan.draws(u, UniformTimes()).image for u in range(5 * shared)])
    assert torch.equal(image[::shared], image[shared - 1 :: shared])
    epochs = image[::shared].reshape(12, 10).sort().values
    assert torch.equal(epochs, torch.arange(10).expand(12, 10))


def test_the_plain_plan_is_as_before() -> None:
    """Each tensor from its formula: the stream numbers are part of what checkpoints promise."""
    draws = DrawPlan(data(4, 10), SCHEDULE, 6, seed=5).draws(7, UniformTimes())
    number = torch.arange(42, 48)
    source = Independent(5)
    assert torch.equal(draws.eps, source.normal(number, (1, 1, 4), draw=0))
    assert torch.equal(draws.level.t, UniformTimes().draw(source, number, draw=1).t)
    order = source.uniform(range(10), (), draw=2 + 4, dtype=torch.float64).argsort(stable=True)
    assert torch.equal(draws.image, order[number % 10])
    assert torch.equal(draws.group, number)


def test_groups() -> None:
    def group(**kind: Any) -> list[int]:
        return DrawPlan(data(4, 10), SCHEDULE, 4, **kind).draws(1, UniformTimes()).group.tolist()

    assert group() == [4, 5, 6, 7]
    assert group(pairing=CrossPairs()) == [2, 2, 3, 3]
    assert group(pairing=OrthogonalNoise(4)) == [1] * 4
    assert group(pairing=SobolPoints(4)) == [1] * 4
    assert group(stratified=True) == group(coupling=OptimalTransport()) == [1] * 4
    assert group(coupling=Immiscible()) == [4, 5, 6, 7]
    plain_draws = DrawPlan(data(4, 10), SCHEDULE, 4).draws(0, UniformTimes())
    made = Draws(*(getattr(plain_draws, n) for n in ("number", "image", "x0", "eps", "level", "weight", "bin")))
    assert torch.equal(made.group, plain_draws.number)


def test_labels_of_plans() -> None:
    assert DrawPlan(data(4), SCHEDULE, 4, pairing=CrossPairs(), stratified=True).label == "unbiased"
    for coupling in (OptimalTransport(), Immiscible()):
        assert DrawPlan(data(4), SCHEDULE, 4, coupling=coupling).label == "changes the objective"


def test_plans_refuse() -> None:
    for kind, message in [
        ({"pairing": OrthogonalNoise(3)}, "batch_size is 4 and OrthogonalNoise makes groups of 3"),
        ({"pairing": SobolPoints(4), "stratified": True}, "SobolPoints stratify the times already"),
        ({"pairing": CrossPairs(), "coupling": OptimalTransport()}, "OptimalTransport chooses noises that CrossPairs"),
        ({"labels": torch.zeros(3)}, "labels are of shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            DrawPlan(data(4), SCHEDULE, 4, **kind)
    with pytest.raises(ValueError, match=r"4 parts of 1 samples would split the groups of 2.*multiple of 8"):
        DrawPlan(data(4), SCHEDULE, 4, pairing=CrossPairs()).draws(0, UniformTimes(), 0, 4)
    for make, message in [
        (lambda: OrthogonalNoise(1), "size is 1"),
        (lambda: OrthogonalNoise(5).normal(Independent(0), torch.arange(5), (4,)), "a noise has 4 elements"),
        (lambda: SobolPoints(0), "size is 0"),
        (lambda: SobolPoints(4, limit=30_000), "limit 30000"),
        (lambda: Immiscible(1), "candidates is 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


# ---------------------------------------------------------------------------------------------------- laws of the noise


def test_orthogonal_noises_are_orthogonal_with_their_norms() -> None:
    number = torch.arange(30)
    z = Independent(2).normal(number, (5,), dtype=torch.float64)
    eps = OrthogonalNoise(3).normal(Independent(2), number, (5,)).double()
    gram = eps.reshape(10, 3, 5) @ eps.reshape(10, 3, 5).mT
    assert float((gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))).abs().max()) < 1e-5
    assert torch.allclose(eps.norm(dim=1), z.norm(dim=1), rtol=1e-6)
    assert torch.allclose(eps[::3], z[::3], rtol=0, atol=1e-6)  # Gram-Schmidt leaves the first as it is


def test_orthogonal_noises_turn_with_their_source() -> None:
    """eps(Q z) = Q eps(z) for a rotation Q and eps(c z) = c eps(z): uniform directions, so each is N(0, I) exactly."""
    z = Independent(3).normal(range(12), (4,), dtype=torch.float64)
    q = torch.linalg.qr(Independent(4).normal(range(4), (4,), dtype=torch.float64)).Q
    scale = torch.linspace(0.5, 3, 12).double()[:, None]

    def eps(z: Tensor) -> Tensor:
        return OrthogonalNoise(4).normal(Given(lambda i: z[i], lambda i, _: i), torch.arange(12), (4,))

    assert torch.allclose(eps(z @ q.T), eps(z) @ q.T.float(), atol=1e-5)
    assert torch.allclose(eps(z * scale), eps(z) * scale.float(), atol=1e-5)


def test_sobol_points_are_a_net_and_normal() -> None:
    """Each coordinate has one point in each of 2^m intervals; the noises' moments are within 5 standard errors."""
    n, d = 64, 9
    pairing = SobolPoints(n)
    for net in (0, 5):
        number = net * n + torch.arange(n)
        z = pairing.normal(Independent(1), number, (d,)).double()
        u = torch.cat([pairing.uniform(Independent(1), number, (d,))[:, None], torch.special.ndtr(z)], 1)
        assert torch.equal((u * n).long().sort(0).values, torch.arange(n)[:, None].expand(n, d + 1))
    z = pairing.normal(Independent(1), torch.arange(400 * n), (d,)).double()
    assert float(z.mean(0).abs().max()) < 5 / (400 * n) ** 0.5
    assert float((z.var(0) - 1).abs().max()) < 5 * (2 / (400 * n)) ** 0.5
    first = z.reshape(400, n, d)[:, 0]  # of one point, over nets
    assert float(first.mean(0).abs().max()) < 5 / 20
    assert float((first.var(0) - 1).abs().max()) < 5 * (2 / 400) ** 0.5


def test_sobol_beyond_its_limit_is_independent() -> None:
    number = torch.arange(16)
    z = SobolPoints(16, limit=2).normal(Independent(1), number, (5,))
    assert torch.equal(z[:, 2:], Independent(1).normal(number, (5,))[:, 2:])
    inside = SobolPoints(16, limit=2).normal(Independent(1), number, (2,))
    assert torch.equal(z[:, :2], inside)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_sobol_never_gives_infinity(shift: float) -> None:
    source = Given(lambda i: i, lambda i, _: torch.full((len(i), 3), shift))
    z = SobolPoints(4).normal(source, torch.arange(4), (2,))
    assert bool(torch.isfinite(z).all())


# ---------------------------------------------------------------------------------------------------- couplings, strata


def test_optimal_transport_is_the_best_permutation() -> None:
    x = Independent(1).normal(range(6), (3,))
    eps = Independent(2).normal(range(6), (3,))
    best = min(itertools.permutations(range(6)), key=lambda p: float(((x - eps[list(p)]).double() ** 2).sum()))
    assert optimal_transport(x, eps).tolist() == list(best)
    assert OptimalTransport()(x, eps).sort(0).values.equal(eps.sort(0).values)
    with pytest.raises(ValueError, match="one noise an image"):
        optimal_transport(x, eps[:3])


def test_nearest_noise_is_nearest() -> None:
    plan = DrawPlan(data(4, 10), SCHEDULE, 8, seed=5, coupling=Immiscible(5))
    draws = plan.draws(2, UniformTimes())
    drawn = torch.stack([Independent(5).normal(draws.number, (1, 1, 4), draw=j) for j in range(5)])
    distance = (drawn - draws.x0).flatten(2).norm(dim=2)
    mine = (draws.eps - draws.x0).flatten(1).norm(dim=1)
    assert torch.allclose(mine, distance.min(0).values)
    with pytest.raises(ValueError, match="candidates are"):
        nearest_noise(draws.x0, drawn[:, :3])


def test_places_of_an_epoch_hold_each_image_equally_often() -> None:
    """Exact, over all turns: each place has each image once, for any u and v and classes of any size."""
    labels = torch.tensor([3, 1, 1, 3, 3, 3, 0])
    u = Independent(3).uniform(range(7), (), dtype=torch.float64)
    v = Independent(3).uniform(range(3), (), draw=1, dtype=torch.float64)
    orders = torch.stack([proportional_order(labels, u, v, s) for s in range(7)])
    assert torch.equal(orders.sort(0).values, torch.arange(7)[:, None].expand(7, 7))
    assert torch.equal(orders.sort(1).values, torch.arange(7).expand(7, 7))
    with pytest.raises(ValueError, match="2 offsets v for 7 images of 3 classes"):
        proportional_order(labels, u, v[:2], 0)


def test_batches_are_in_proportion() -> None:
    labels = torch.arange(10).repeat_interleave(20)
    for epoch in range(5):
        order = strata_order(Independent(7), labels, draw=2 + epoch)
        counts = torch.stack([labels[part].bincount(minlength=10) for part in order.split(25)])
        assert 2 <= int(counts.min()) <= int(counts.max()) <= 3
    orders = {tuple(strata_order(Independent(7), labels, draw=2 + e).tolist()) for e in range(5)}
    assert len(orders) == 5
    sizes = torch.tensor([90, 9, 1])
    skewed = torch.arange(3).repeat_interleave(sizes)
    counts = torch.stack([skewed[p].bincount(minlength=3) for p in strata_order(Independent(1), skewed, 0).split(20)])
    assert float((counts - sizes / 5).abs().max()) < 2
