"""Objectives: weights by their papers' formulas, the hybrid loss against improved-diffusion, the mean left alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lowvar.process import CosineVP, DiscreteVP, Flow, Level, NetworkDenoiser, Schedule, schedule_from_diffusers
from lowvar.process.denoiser import Head, Prediction, from_prediction, to_target
from lowvar.process.noise import Independent
from lowvar.train import EDM, P2, HybridVLB, MinSNR, Objective, PosteriorNLL, Simple, Weighting
from lowvar.train.objectives import Label, VarianceTerm, log_error_factor

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "sample" / "improved_diffusion_vlb.json").read_text())
LOGSNR = torch.tensor([-9.0, -2.0, 0.0, 1.3, 2.5, 8.0], dtype=torch.float64)
SNR = LOGSNR.exp()
SHAPE = (2, 3, 3)


def batch(schedule: Schedule, t: list[float]) -> tuple[Tensor, Tensor, Tensor, Level]:
    """x0, eps, x and levels of a small batch, float64."""
    source, n = Independent(4), len(t)
    x0 = source.uniform(range(n), SHAPE, dtype=torch.float64) * 2 - 1
    eps = source.normal(range(n), SHAPE, dtype=torch.float64)
    level = schedule.at(torch.tensor(t, dtype=torch.float64))
    alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in (level.alpha, level.sigma))
    return x0, eps, alpha * x0 + sigma * eps, level


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("weighting", "prediction", "expected"),
    [
        (MinSNR(), "epsilon", SNR.clamp_max(5) / SNR),
        (MinSNR(), "v_prediction", SNR.clamp_max(5) / (SNR + 1)),
        (MinSNR(), "sample", SNR.clamp_max(5)),
        (MinSNR(2.0), "sample", SNR.clamp_max(2)),
        (P2(), "epsilon", 1 / (1 + SNR)),
        (P2(0.5, 2.0), "epsilon", (2 + SNR) ** -0.5),
        (P2(0.0), "epsilon", torch.ones(6)),
        (EDM(0.3), "sample", (1 / SNR + 0.09) / (0.09 / SNR)),  # (s^2 + sd^2) / (s sd)^2 with s^2 = 1 / snr
        (EDM(0.5), "edm", torch.ones(6)),
        (Simple(), "flow", torch.ones(6)),
    ],
)
def test_weight_on_the_target(weighting: Weighting, prediction: Prediction, expected: Tensor) -> None:
    assert torch.allclose(weighting.target_weight(LOGSNR, prediction), expected.double(), rtol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(CosineVP(), p) for p in get_args(Prediction)] + [(Flow(), p) for p in get_args(Prediction) if p[0] != "v"],
    ids=str,
)
def test_error_factor(schedule: Schedule, prediction: Prediction) -> None:
    """||target - out||^2 = k ||x0 - x0_hat||^2 for any output."""
    x0, eps, x, level = batch(schedule, [0.02, 0.3, 0.8])
    out = torch.sin(3 * x)
    of_target = ((to_target(prediction, x0, eps, level) - out) ** 2).flatten(1).sum(1)
    of_data = ((x0 - from_prediction(prediction, x, out, level)) ** 2).flatten(1).sum(1)
    assert torch.allclose(of_target, log_error_factor(prediction, level.logsnr).exp() * of_data, rtol=1e-9)


@pytest.mark.parametrize("weighting", [MinSNR(), P2(), EDM()], ids=lambda w: type(w).__name__)
def test_a_weighting_means_the_same_for_every_prediction(weighting: Weighting) -> None:
    schedule = CosineVP()
    x0, eps, x, level = batch(schedule, [0.05, 0.4, 0.7])
    guess = 0.8 * x0 + 0.1  # what every network is made to say
    values = []
    for prediction in ("epsilon", "sample", "v_prediction"):
        implied = (x - level.alpha.reshape(-1, 1, 1, 1) * guess) / level.sigma.reshape(-1, 1, 1, 1)
        out = to_target(prediction, guess, implied, level)
        denoiser = NetworkDenoiser(lambda x, t: x, schedule, prediction)
        values.append(Objective(weighting).from_output(denoiser, x0, eps, x, level, out, None).loss)
    assert torch.allclose(values[0], values[1], rtol=1e-9)
    assert torch.allclose(values[0], values[2], rtol=1e-9)


def test_pure_noise_has_finite_weights() -> None:
    for weighting in (MinSNR(), P2(), EDM(), Simple()):
        for prediction in get_args(Prediction):
            assert bool(torch.isfinite(weighting.target_weight(Flow().logsnr(1.0), prediction)).all())


def test_labels() -> None:
    assert Objective(Simple()).label == "unbiased"
    others = [Objective(w) for w in (MinSNR(), P2(), EDM())] + [Objective(Simple(), HybridVLB())]
    assert {o.label for o in others} == {"changes the objective"} < set(get_args(Label))


@pytest.mark.parametrize("make", [lambda: MinSNR(0.0), lambda: P2(-1.0), lambda: P2(1.0, 0.0), lambda: EDM(0.0)])
def test_parameters_out_of_range(make: Any) -> None:
    with pytest.raises(ValueError, match=r"gamma|sigma_data"):
        make()


# -------------------------------------------------------------------------------------------------- hybrid: parity


@pytest.mark.parametrize("weight", [0.001, 0.02])
def test_hybrid_equals_improved_diffusion(weight: float) -> None:
    """Its RESCALED_MSE loss in float64: mse + T / 1000 vb, for lambda = 0.001."""
    betas = torch.linspace(GOLDEN["betas"][0], GOLDEN["betas"][1], GOLDEN["T"], dtype=torch.float64)
    schedule = schedule_from_diffusers({"trained_betas": betas.tolist()})
    levels = (torch.arange(4 * 18) * 37 % 256).reshape(4, 2, 3, 3)
    levels[0, 0, 0, 0], levels[1, 1, 2, 2] = 0, 255
    x0 = levels.double() / 127.5 - 1
    eps = Independent(GOLDEN["seed"]).normal(range(4), (2, 3, 3), draw=100, dtype=torch.float64)

    def network(x: Tensor, t: Tensor) -> Tensor:
        n = t.double().reshape(-1, 1, 1, 1)
        return torch.cat([0.9 * x * (n + 1) / 20 + 0.1 * torch.sin(3 * x), torch.tanh(x + n / 10 - 0.5)], 1)

    t = (torch.tensor(GOLDEN["training_t"]).double() + 1) / GOLDEN["T"]
    losses = Objective(Simple(), HybridVLB(weight, 256)).losses(
        NetworkDenoiser(network, schedule, "epsilon", "range"), x0, eps, schedule.at(t)
    )
    golden = {k: torch.tensor(v, dtype=torch.float64) for k, v in GOLDEN["training_exact"].items()}
    assert torch.allclose(losses.error, golden["mse"], atol=1e-9, rtol=0)
    assert losses.variance is not None
    assert torch.allclose(losses.variance * GOLDEN["T"] / 1000, golden["vb"], atol=1e-9, rtol=0)
    assert torch.allclose(losses.loss, golden["mse"] + weight / 0.001 * golden["vb"], atol=1e-9, rtol=0)


# ------------------------------------------------------------------------------------ the mean's gradient, bit for bit

TERMS: list[tuple[Head, VarianceTerm]] = [("range", HybridVLB(1.0, 17)), ("logvar", PosteriorNLL(1.0))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighting", [Simple(), MinSNR()], ids=["simple", "min-snr"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("head", "term"), TERMS, ids=["range", "logvar"])
def test_variance_term_leaves_the_mean_alone(
    head: Head, term: VarianceTerm, prediction: Prediction, weighting: Weighting, dtype: torch.dtype
) -> None:
    schedule = schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2"})
    x0, eps, x, level = batch(schedule, [0.001, 0.002, 0.4, 1.0])
    x0, eps, x = x0.to(dtype), eps.to(dtype), x.to(dtype)

    def gradient(objective: Objective, with_head: bool) -> tuple[Tensor, Tensor | None]:
        out = torch.sin(2 * x).requires_grad_()
        raw = torch.cos(x).requires_grad_() if with_head else None
        denoiser = NetworkDenoiser(lambda x, t: x, schedule, prediction, head if with_head else None)
        objective.from_output(denoiser, x0, eps, x, level, out, raw).loss.mean().backward()
        assert out.grad is not None
        return out.grad, None if raw is None else raw.grad

    alone, _ = gradient(Objective(weighting), with_head=False)
    together, of_head = gradient(Objective(weighting, term), with_head=True)
    assert torch.equal(alone, together)
    assert of_head is not None
    assert bool(torch.isfinite(of_head).all())
    assert float(of_head.abs().max()) > 0


def test_not_detaching_would_be_seen() -> None:
    """The known bug: a term that sees the mean changes its gradient."""
    schedule = CosineVP()
    x0, eps, x, level = batch(schedule, [0.2, 0.5])

    denoiser = NetworkDenoiser(lambda x, t: x, schedule, "epsilon", "logvar")
    out, head = torch.sin(x).requires_grad_(), torch.zeros_like(x)
    loss = Objective(Simple()).from_output(
        NetworkDenoiser(lambda x, t: x, schedule, "epsilon"), x0, eps, x, level, out, None
    ).loss + PosteriorNLL().bits(denoiser, x0, x, level, out, head)
    loss.mean().backward()
    plain = torch.sin(x).requires_grad_()
    ((eps - plain) ** 2).flatten(1).mean(1).mean().backward()
    assert out.grad is not None
    assert plain.grad is not None
    assert not torch.equal(out.grad, plain.grad)


def test_logvar_optimum_is_the_squared_error() -> None:
    """The likelihood's gradient vanishes where C = (x0 - x0_hat)^2, and its value is the Gaussian's."""
    schedule = CosineVP()
    x0, _, x, level = batch(schedule, [0.3, 0.6])
    denoiser = NetworkDenoiser(lambda x, t: x, schedule, "sample", "logvar")
    out = 0.9 * x0 + 0.05
    prior = (level.sigma**2 / (level.alpha**2 + level.sigma**2)).reshape(-1, 1, 1, 1)
    head = torch.log((x0 - out) ** 2 / prior).requires_grad_()
    bits = PosteriorNLL().bits(denoiser, x0, x, level, out, head)
    expected = 0.5 * (torch.log(2 * math.pi * (x0 - out) ** 2) + 1).flatten(1).mean(1) / math.log(2)
    assert torch.allclose(bits, expected, atol=1e-12)
    bits.sum().backward()
    assert head.grad is not None
    assert float(head.grad.abs().max()) < 1e-12
    posterior = denoiser.interpret(x, level, out, head.detach())  # the same C as sampling will see
    assert posterior.covariance is not None
    assert torch.allclose(posterior.covariance.diagonal(), (x0 - out) ** 2, rtol=1e-10)


def test_heads_and_terms_must_agree() -> None:
    schedule = CosineVP()
    x0, eps, x, level = batch(schedule, [0.3])
    plain = NetworkDenoiser(lambda x, t: x, schedule)
    ranged = NetworkDenoiser(lambda x, t: x, schedule, head="range")
    with pytest.raises(ValueError, match="no variance head"):
        Objective(Simple(), HybridVLB()).from_output(plain, x0, eps, x, level, x, None)
    with pytest.raises(ValueError, match="no term of the objective trains"):
        Objective(Simple()).from_output(ranged, x0, eps, x, level, x, x)
    with pytest.raises(ValueError, match="trains the heads logvar, basis, lowrank, the network has 'range'"):
        Objective(Simple(), PosteriorNLL()).from_output(ranged, x0, eps, x, level, x, x)


def test_neighbours_of_a_table_are_its_knots() -> None:
    from lowvar.train.hybrid import neighbours, training_steps

    schedule = schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2"})
    assert isinstance(schedule, DiscreteVP)
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    s, before = neighbours(schedule, t, training_steps(schedule))
    knots = schedule.logsnr(t)
    assert float(s.sigma[0]) == 0
    assert torch.equal(s.logsnr[1:], knots[:-1])
    assert torch.equal(before.logsnr[:-1], knots[1:])
