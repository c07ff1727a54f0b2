"""Stable targets: exact by enumeration with the source inside, biased without, and never more noise."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowvar.data import load
from lowvar.process import CosineVP, Flow, Level, NetworkDenoiser, Schedule
from lowvar.process.denoiser import Prediction, from_prediction
from lowvar.process.noise import Independent
from lowvar.testing.mixture import mixture8
from lowvar.train import MinSNR, Objective, Simple, UniformTimes
from lowvar.train.conditional import of_classes
from lowvar.train.draws import DrawPlan
from lowvar.train.objectives import Weighting
from lowvar.train.stable_target import ReferencePlan, Source, StableInfo, StableTarget, memorisation, reference_noise
from lowvar.train.targets import PlainTarget, Target, implied_noise

DATA = torch.tensor([[[[-0.9]]], [[[0.1]]], [[[0.6]]]], dtype=torch.float64)  # 3 images of one pixel
GRID = torch.linspace(-10, 10, 201, dtype=torch.float64)  # x_t / sigma: the trapezoid rule is exact to rounding on it


class Tiny(nn.Module):
    """A network of x and t with 8 parameters, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-0.8, 1.1, 8, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        w, t = self.w, t.double().reshape(-1, 1, 1, 1) / 1000
        return w[0] * torch.tanh(w[1] * x + w[2] * t + w[3]) + w[4] * torch.sin(w[5] * x) + w[6] * t + w[7]


def gradient(
    targets: list[tuple[float, Target]], prediction: Prediction, schedule: Schedule, t: float, weighting: Weighting
) -> Tensor:
    """Expected gradient over sources, noise and targets (chance, target)."""
    network = Tiny()
    objective = Objective(weighting)
    denoiser = NetworkDenoiser(network, schedule, prediction)
    level = schedule.at(torch.tensor(t, dtype=torch.float64))
    # the noise is integrated over a grid of x_t, the same for every source
    ratio = float(level.alpha / level.sigma)
    total = torch.zeros((), dtype=torch.float64)
    levels = schedule.at(torch.full((len(GRID),), t, dtype=torch.float64))
    for x0 in DATA:
        eps = GRID - ratio * float(x0)
        chance = torch.exp(-0.5 * eps**2) / math.sqrt(2 * math.pi) * (GRID[1] - GRID[0]) / len(DATA)
        draws = x0.expand(len(GRID), 1, 1, 1), eps.reshape(-1, 1, 1, 1)
        for share, target in targets:
            losses = objective.losses(denoiser, *draws, levels, target)
            total = total + share * (chance * losses.loss).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(network.parameters()))])


def reference_sets(n: int, source: Source, **options: Any) -> list[tuple[float, Target]]:
    """Every set of n independent draws of the data, each with its chance."""
    chance = len(DATA) ** -n
    return [
        (chance, StableTarget(DATA[list(rows)], source, **options))
        for rows in itertools.product(range(len(DATA)), repeat=n)
    ]


CASES: list[tuple[Prediction, Schedule, float, Weighting]] = [
    ("epsilon", CosineVP(), 0.5, Simple()),
    ("v_prediction", CosineVP(), 0.4, MinSNR(0.8)),
    ("sample", Flow(), 0.6, Simple()),
    ("flow", Flow(), 0.45, Simple()),
    ("edm", CosineVP(), 0.7, Simple()),
]


@pytest.mark.parametrize(("prediction", "schedule", "t", "weighting"), CASES, ids=lambda v: str(v)[:12])
@pytest.mark.parametrize("neighbours", [None, 1, 2])
def test_expected_gradient_is_the_plain_one(
    prediction: Prediction, schedule: Schedule, t: float, weighting: Weighting, neighbours: int | None
) -> None:
    plain = gradient([(1.0, PlainTarget())], prediction, schedule, t, weighting)
    added = gradient(reference_sets(2, "added", neighbours=neighbours), prediction, schedule, t, weighting)
    among = gradient([(1.0, StableTarget(DATA, "among", neighbours=neighbours))], prediction, schedule, t, weighting)
    left_out = gradient(reference_sets(2, "left out", neighbours=neighbours), prediction, schedule, t, weighting)
    assert float(plain.abs().max()) > 0.05
    assert float((added - plain).abs().max()) < 1e-9  # data that are drawn twice tie
    assert float((among - plain).abs().max()) < 1e-9
    assert float((left_out - plain).abs().max()) > 1e-3


def test_a_source_that_counts_twice_is_biased() -> None:
    """The known bug: all data as references, and the source added once more."""
    plain = gradient([(1.0, PlainTarget())], "sample", CosineVP(), 0.5, Simple())
    twice = gradient([(1.0, StableTarget(DATA, "added"))], "sample", CosineVP(), 0.5, Simple())
    assert float((twice - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("neighbours", [None, 3])
def test_labels_give_the_class_conditional_target(neighbours: int | None) -> None:
    """Three classes of 5, 4 and 1 data: each source's target is that of its class alone."""
    data = Independent(3).normal(range(10), (2,), dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1, 2, 0, 0, 1, 1, 0])
    source = torch.tensor([0, 1, 4, 7])
    eps = Independent(4).normal(range(4), (2,), dtype=torch.float64)
    level = CosineVP().at(torch.tensor([0.3, 0.5, 0.6, 0.8]))
    found, info = StableTarget(data, "among", labels, labels[source], neighbours).weighted(data[source], eps, level)
    for i, k in enumerate(source.tolist()):
        own = StableTarget(data[labels == labels[k]], "among", neighbours=neighbours)
        expected = own.clean(data[k : k + 1], eps[i : i + 1], level[i : i + 1])
        assert torch.allclose(found[i], expected[0], atol=1e-12)
    assert info.references.tolist() == [5, 4, 1, 4]
    assert torch.equal(found[2], data[4])


class TinyOfClasses(Tiny):
    """A network that knows the class; 2 is the null class."""

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        assert class_labels is not None
        shift = class_labels.double().reshape(-1, 1, 1, 1)
        return super().forward(x, t) + self.w[3] * shift * torch.tanh(x + self.w[2] * shift)


CLASSES = torch.tensor([0, 0, 1, 0])
FOUR = torch.tensor([-0.9, 0.1, 0.6, 0.7], dtype=torch.float64).reshape(-1, 1, 1, 1)


def conditional_gradient(
    targets: list[tuple[float, list[int]]], source: Source | None, blind: bool = False, **options: Any
) -> Tensor:
    """Expected gradient over sources, dropout of their class (chance .3), noise and reference sets (chance, rows)."""
    network, schedule = TinyOfClasses(), CosineVP()
    denoiser, objective = NetworkDenoiser(network, schedule, "v_prediction"), Objective(Simple())
    level = schedule.at(torch.full((len(GRID),), 0.55, dtype=torch.float64))
    ratio = float((level.alpha / level.sigma)[0])
    total = torch.zeros((), dtype=torch.float64)
    for x0, label in zip(FOUR, CLASSES.tolist(), strict=True):
        eps = GRID - ratio * float(x0)
        chance = torch.exp(-0.5 * eps**2) / math.sqrt(2 * math.pi) * (GRID[1] - GRID[0]) / len(FOUR)
        draws = x0.expand(len(GRID), 1, 1, 1), eps.reshape(-1, 1, 1, 1)
        for share, dropped in ((0.7, False), (0.3, True)):
            known = torch.full((len(GRID),), -1 if dropped else label)
            conditioned = of_classes(denoiser, torch.where(known < 0, 2, known))
            for weight, rows in targets:
                target: Target = PlainTarget()
                if source is not None:
                    labels = (None, None) if blind else (CLASSES[rows], known)
                    target = StableTarget(FOUR[rows], source, *labels, **options)
                total = (
                    total + share * weight * (chance * objective.losses(conditioned, *draws, level, target).loss).sum()
                )
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(network.parameters()))])


@pytest.mark.parametrize("neighbours", [None, 1])
def test_expected_gradient_with_classes_that_are_dropped(neighbours: int | None) -> None:
    plain = conditional_gradient([(1.0, [])], None)
    sets = [(len(FOUR) ** -2.0, list(rows)) for rows in itertools.product(range(len(FOUR)), repeat=2)]
    added = conditional_gradient(sets, "added", neighbours=neighbours)
    among = conditional_gradient([(1.0, list(range(len(FOUR))))], "among", neighbours=neighbours)
    assert float(plain.abs().max()) > 0.05
    assert float((added - plain).abs().max()) < 1e-9
    assert float((among - plain).abs().max()) < 1e-9


def test_references_of_all_classes_are_biased_for_a_network_that_knows_the_class() -> None:
    """The known bug: the labels are left out."""
    plain = conditional_gradient([(1.0, [])], None)
    blind = conditional_gradient([(1.0, list(range(len(FOUR))))], "among", blind=True)
    assert float((blind - plain).abs().max()) > 1e-3


def test_no_reference_of_the_class_leaves_the_source() -> None:
    x0, eps, labels = torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([0, 1])
    target = StableTarget(torch.zeros(1, 1), "left out", torch.tensor([1]), labels)
    found, info = target.weighted(x0, eps, CosineVP().at(torch.tensor([0.5, 0.5])))
    assert found[:, 0].tolist() == [1.0, 0.0]
    assert info.fallback.tolist() == [True, False]


# ---------------------------------------------------------------------------------------------- oracle: a mixture

MIXTURE = mixture8()


def at_sigma(sigma: float, n: int) -> Level:
    """Levels with alpha = 1 (an arbitrary scale of both changes nothing)."""
    value = torch.full((n,), sigma, dtype=torch.float64)
    return Level(value, -2 * value.log(), torch.ones_like(value), value)


def stable_means(source: Source, sigma: float, n: int, draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """T - D*, x_0 - D*, D* of draws from the joint law, each with references of its own."""
    level = at_sigma(sigma, draws)
    x0 = MIXTURE.sample(range(draws))
    eps = Independent(1).normal(range(draws), MIXTURE.event_shape, dtype=torch.float64)
    exact = MIXTURE.posterior(x0 + sigma * eps, level, None).mean
    references = MIXTURE.sample(range(10**6, 10**6 + draws * n)).reshape(draws, n, -1)
    rows = [
        StableTarget(references[i], source).clean(x0[i : i + 1], eps[i : i + 1], level[i : i + 1]) for i in range(draws)
    ]
    return torch.cat(rows) - exact, x0 - exact, exact


@pytest.mark.parametrize("sigma", [0.7, 3.0])
def test_mixture_oracle(sigma: float) -> None:
    """E[T | x_t] = D*: T - D* is uncorrelated with any function of x_t; with the source left out it is not."""
    n, draws = (64, 2000) if sigma == 3.0 else (6, 4000)
    inside, plain, exact = stable_means("added", sigma, n, draws)
    outside, _, _ = stable_means("left out", sigma, n, draws)

    def z(error: Tensor) -> float:
        """Of the slope on the centred D*, a direction in which leaving the source out shows."""
        product = (error * (exact - exact.mean(0))).sum(1)
        return float(product.mean() / product.std() * math.sqrt(draws))

    assert abs(z(inside)) < 3
    assert abs(z(outside)) > 4
    ratio = float((plain**2).sum() / (inside**2).sum())  # 41 at sigma 3
    assert ratio > (35 if sigma == 3.0 else 1.2)


# --------------------------------------------------------------------------------------------------- numbers and plans


def test_implied_noise_is_that_of_x_t() -> None:
    x0, eps, clean = (Independent(k).normal(range(3), (2, 2), dtype=torch.float64) for k in range(3))
    level = Flow().at(torch.tensor([0.1, 0.5, 1.0]))
    noise = implied_noise(clean, x0, eps, level)
    alpha, sigma = (v.reshape(-1, 1, 1) for v in (level.alpha, level.sigma))
    assert torch.allclose(alpha * clean + sigma * noise, alpha * x0 + sigma * eps, atol=1e-14)
    assert torch.equal(implied_noise(x0, x0, eps, level), eps)


@pytest.mark.parametrize("off", [False, True])
def test_weights_are_those_of_the_distances_at_any_snr(off: bool) -> None:
    """float32 images, from logsnr -25 to 25: as summed squares of float64 differences say."""
    images = load("digits").train.images(range(300)) * (0.01 if off else 1.0) + (0.9 if off else 0.0)
    logsnr = torch.linspace(-25, 25, 51, dtype=torch.float64)
    x0, eps = images[:51], Independent(7).normal(range(51), (1, 8, 8))
    variance = torch.sigmoid(-logsnr)
    level = Level(variance, logsnr, (1 - variance).sqrt(), variance.sqrt())
    found, info = StableTarget(images, "among").weighted(x0.double(), eps.double(), level)
    x, e = images.double().flatten(1), eps.double().flatten(1)
    steps = e[:, None] + torch.exp(0.5 * logsnr)[:, None, None] * (x[:51, None] - x[None])
    w = torch.softmax(-0.5 * (steps**2).sum(2), 1)
    assert float((found.flatten(1) - w @ x).abs().max()) < 1e-12
    assert torch.allclose(info.ess, 1 / (w**2).sum(1), rtol=1e-8)
    assert float(info.ess.max()) > 299.9
    assert float(info.ess.min()) == 1.0
    assert int(((info.ess > 1.001) & (info.ess < 299)).sum()) >= 8


@pytest.mark.parametrize("neighbours", [None, 7])
@pytest.mark.parametrize(("block", "page"), [(9, 2**23), (40, 40), (2**18, 50)])  # page 40: draws go in twos
def test_blocks_of_references_change_nothing(
    neighbours: int | None, block: int, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Independent(0).normal(range(50), (3,))
    level, eps = CosineVP().at(torch.tensor([0.2, 0.4, 0.6, 0.9])), Independent(1).normal(range(4), (3,))
    target = StableTarget(data, "added", neighbours=neighbours)
    whole, info = target.weighted(data[:4], eps, level)
    monkeypatch.setattr("lowvar.train.stable_target._BLOCK", block)
    monkeypatch.setattr("lowvar.train.stable_target._PAGE", page)
    parts, info2 = target.weighted(data[:4], eps, level)
    assert torch.allclose(whole, parts, atol=1e-6)
    assert torch.allclose(info.ess, info2.ess)
    assert torch.equal(info.references, info2.references)


def test_weights_at_the_ends() -> None:
    """At pure noise every reference weighs the same; at very little noise the source is all."""
    data = Independent(0).normal(range(20), (3,))
    eps = Independent(1).normal(range(2), (3,))
    level = Flow().at(torch.tensor([1e-4, 1.0]))
    found, info = StableTarget(data, "among").weighted(data[:2], eps, level)
    assert torch.allclose(found[0], data[0], atol=1e-6)
    assert torch.allclose(found[1], data.mean(0), atol=1e-6)
    assert info.ess.tolist() == pytest.approx([1.0, 20.0])
    assert found.dtype == torch.float32


def test_references_are_a_function_of_the_update() -> None:
    images = load("digits").train
    plan, again = (ReferencePlan(images, 50, reference_noise(3)) for _ in range(2))
    assert torch.equal(plan.rows(7), again.rows(7))
    assert not torch.equal(plan.rows(7), plan.rows(8))
    assert not torch.equal(plan.rows(7), ReferencePlan(images, 50, reference_noise(4)).rows(7))
    counts = torch.bincount(torch.cat([plan.rows(u) for u in range(100)]), minlength=len(images)).double()
    mean = 100 * 50 / len(images)
    chi2 = float(((counts - mean) ** 2 / mean).sum())  # with replacement: multinomial
    assert abs(chi2 - (len(images) - 1)) < 4 * math.sqrt(2 * len(images))
    drawn = DrawPlan(images, CosineVP(), 50, 3).draws(7, UniformTimes())
    assert not torch.equal(drawn.image, plan.rows(7))


def test_all_data_hold_the_source() -> None:
    images = load("digits").train
    whole = ReferencePlan(images, len(images))
    assert (whole.source, len(whole.target(0).references)) == ("among", len(images))
    assert whole.target(5).label == ReferencePlan(images, 9).target(5).label == "unbiased"
    assert ReferencePlan(images, len(images), include_source=False).target(0).label == "biased"
    assert images.labels is not None
    labelled = ReferencePlan(images, 9, labels=images.labels).target(2, source_labels=torch.tensor([1, 2]))
    assert labelled.labels is not None


def test_memorisation_is_said_of_all_data_only() -> None:
    info = StableInfo(torch.tensor([1.0, 1.1, 1.6, 1.49]), torch.full((4,), 9), torch.zeros(4).bool())
    assert info.alone.tolist() == [True, True, False, True]
    assert "75% of the targets" in str(memorisation(0.75, "among"))
    assert memorisation(0.75, "added") is None
    assert memorisation(0.5, "among") is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: StableTarget(torch.zeros(0, 2)),
        lambda: StableTarget(torch.zeros(3, 2), "inside"),  # type: ignore[arg-type]
        lambda: StableTarget(torch.zeros(3, 2), neighbours=0),
        lambda: StableTarget(torch.zeros(3, 2), labels=torch.zeros(3)),
        lambda: StableTarget(torch.zeros(3, 2), labels=torch.zeros(2), source_labels=torch.zeros(1)),
        lambda: StableTarget(torch.zeros(3, 2)).clean(
            torch.zeros(1, 3), torch.zeros(1, 3), CosineVP().at(torch.tensor([0.5]))
        ),
        lambda: ReferencePlan(load("digits").train, 0),
        lambda: ReferencePlan(load("digits").train, 4, labels=torch.zeros(3)),
    ],
)
def test_what_does_not_fit_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"reference|allowed|neighbours|labels"):
        wrong()


# ---------------------------------------------------------------------------------------------------- in an objective


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "edm"])
def test_objective_asks_for_the_target(prediction: Prediction) -> None:
    """A network that says T has no loss; x_t is still the source's."""
    schedule = CosineVP()
    x0, eps = (Independent(k).normal(range(4), (1, 2, 2), dtype=torch.float64) for k in range(2))
    level = schedule.at(torch.tensor([0.1, 0.4, 0.7, 0.95]))
    target = StableTarget(x0, "among")
    clean = target.clean(x0, eps, level)
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    denoiser = NetworkDenoiser(network, schedule, prediction)
    alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in (level.alpha, level.sigma))
    x = alpha * x0 + sigma * eps
    Objective(Simple()).losses(denoiser, x0, eps, level, target)
    if prediction != "edm":
        assert torch.equal(seen[0], x)
    # the output that stands for T: invert the linear map by its two ends
    zero = from_prediction(prediction, x, torch.zeros_like(x), level)
    slope = from_prediction(prediction, x, torch.ones_like(x), level) - zero
    losses = Objective(Simple()).from_output(denoiser, x0, eps, x, level, (clean - zero) / slope, None, target)
    assert float(losses.loss.max()) < 1e-20
