"""Processes of the trainer: the objective of its draws in closed form, settings, validation, resume, folders."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowvar.cli.train import save_trained, weighting_figure
from lowvar.data import Data, TensorImages, load
from lowvar.errors import UserError
from lowvar.pipelines import ImagePipeline, denoiser_of, open_pipeline
from lowvar.process import VE, CosineVP, Flow, NetworkDenoiser, ReverseKernel
from lowvar.process.discrete import DiscreteVP
from lowvar.process.grid import uniform
from lowvar.process.multistep import MultistepSolver
from lowvar.process.noise import Independent, TorchGenerators
from lowvar.sample import generate
from lowvar.sample.likelihood import step_bits
from lowvar.train import (
    HybridVLB,
    LogitNormalTimes,
    LognormalTimes,
    LossSecondMomentTimes,
    NonFiniteError,
    TrainConfig,
    Trainer,
    UniformTimes,
    Update,
    ValidationSet,
    config_from,
    make_objective,
    make_schedule,
    make_times,
    measured_sigma_data,
)
from lowvar.train.hybrid import neighbours
from lowvar.train.processes import objective_times
from lowvar.train.timesteps import TimeDraw, Times
from lowvar.train.validation import logsnr_edges

torch.set_num_threads(1)

ROWS = torch.tensor([[0.9, -0.3], [-0.6, 0.5], [0.1, 0.8]])
D = 2
LOW, HIGH, MEAN, STD = 0.002, 80.0, -1.2, 1.2  # Karras et al. 2022, Table 1


class Rows:
    """Three rows of two numbers."""

    def __init__(self, rows: Tensor = ROWS) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Tensor) -> Tensor:
        return self.rows[torch.as_tensor(indices)]


class Line(nn.Module):
    """F = A x, whatever the time."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.tensor([[0.7, -0.4], [0.25, 0.3]], dtype=torch.float64))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x.double() @ self.A.T


def table_data(rows: Tensor = ROWS) -> Data:
    return Data("rows", TensorImages(rows), TensorImages(rows), TensorImages(rows), levels=None, fingerprint="rows")


def line(settings: dict[str, Any]) -> Trainer:
    return Trainer(table_data(), config_from({"batch_size": 4} | settings), network=Line(), device="cpu")


def network_of(trainer: Trainer) -> Line:
    found = trainer.accelerator.unwrap_model(trainer._network)  # pyright: ignore[reportPrivateUsage]
    assert isinstance(found, Line)
    return found


# --------------------------------------------------------------------------------- the objective, for a linear network


def expected(trainer: Trainer, times: Times, u: Tensor, weight: Tensor) -> tuple[float, Tensor]:
    """The trainer's expected loss and its gradient in A: images enumerated, noise and times by quadrature.

    The loss of a linear network is a square of the noise: two nodes +-1 a direction are exact.
    """
    nodes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * D)
    drawn = times.at(u)
    j, i, k = (
        g.flatten() for g in torch.meshgrid(torch.arange(len(u)), torch.arange(3), torch.arange(4), indexing="ij")
    )
    denoiser = trainer.denoiser
    level = trainer.schedule.at(drawn.t[j])
    losses = trainer.objective.losses(denoiser, ROWS.double()[i], nodes[k], level)
    mean = (weight[j] * drawn.weight[j] * losses.loss).sum() / (3 * 4)
    (gradient,) = torch.autograd.grad(mean, [network_of(trainer).A])
    return float(mean.detach()), gradient


def edm_error(A: Tensor, sigma: Tensor, sd: float) -> Tensor:
    """lambda(sigma) E ||D(x_0 + sigma eps) - x_0||^2 / d, D = c_skip + c_out A c_in: Karras et al. 2022, Eq. 7."""
    total = sigma**2 + sd**2
    skip, out, into = sd**2 / total, sigma * sd / total.sqrt(), 1 / total.sqrt()
    eye = torch.eye(D, dtype=torch.float64)
    M = skip[:, None, None] * eye + (out * into)[:, None, None] * A
    bias = torch.einsum("sij,nj->sni", M - eye, ROWS.double())
    error = (bias**2).sum(2).mean(1) + sigma**2 * (M**2).sum((1, 2))
    return total / (sigma * sd) ** 2 * error / D


def flow_error(A: Tensor, u: Tensor) -> Tensor:
    """E ||(eps - x_0) - A ((1 - u) x_0 + u eps)||^2 / d."""
    eye = torch.eye(D, dtype=torch.float64)
    bias = torch.einsum("sij,nj->sni", eye + (1 - u)[:, None, None] * A, ROWS.double())
    noise = eye - u[:, None, None] * A
    return ((bias**2).sum(2).mean(1) + (noise**2).sum((1, 2))) / D


def normal_rule() -> tuple[Tensor, Tensor]:
    """Nodes z and weights of the trapezoidal rule for N(0, 1), which has kinks where sigma is limited."""
    z = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    weight = torch.exp(-(z**2) / 2)
    return z, weight / weight.sum()


def unit_rule(n: int = 32) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre on [0, 1]."""
    node, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(n))
    return (node + 1) / 2, weight / 2


@pytest.mark.parametrize(
    ("given", "sd"),
    [({}, 0.5), ({"sigma_data": 0.8}, 0.8), ({"sigma_data": "data"}, 0.5528), ({"weighting": "simple"}, 0.5)],
)
def test_edm_minimises_karras_loss(given: dict[str, Any], sd: float) -> None:
    """Loss and gradient, 1e-10, against the paper's own formulas in sigma; `simple` is the same for the raw network."""
    trainer = line({"process": "edm"} | given)
    assert trainer.sigma_data == sd
    z, weight = normal_rule()
    loss, gradient = expected(trainer, trainer.times, torch.special.ndtr(z), weight)
    sigma = torch.exp(MEAN + STD * z).clamp(LOW, HIGH)
    A = network_of(trainer).A
    own = (weight * edm_error(A, sigma, sd)).sum()
    (exact,) = torch.autograd.grad(own, [A])
    assert loss == pytest.approx(float(own.detach()), rel=1e-10)
    torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-10)


FLOWS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "shift": {"shift": 3.0},
    "logit-normal": {"times": "logit-normal"},
    "logit-normal, shift": {"times": "logit-normal", "shift": 0.5},
}


@pytest.mark.parametrize("name", FLOWS)
def test_flow_minimises_the_velocitys_error(name: str) -> None:
    """Loss and gradient, 1e-10, against E ||eps - x_0 - out||^2; of uniform times without shift in closed form."""
    trainer = line({"process": "flow"} | FLOWS[name])
    if "times" in FLOWS[name]:
        z, weight = normal_rule()
        number, v = torch.special.ndtr(z), torch.sigmoid(z)
    else:
        v, weight = unit_rule()
        number = v
    loss, gradient = expected(trainer, trainer.times, number, weight)
    s, t = FLOWS[name].get("shift", 1.0), 0.001 + 0.999 * v
    A = network_of(trainer).A
    own = (weight * flow_error(A, s * t / (1 + (s - 1) * t))).sum()
    (exact,) = torch.autograd.grad(own, [A])
    assert loss == pytest.approx(float(own.detach()), rel=1e-10)
    torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-10)
    if name == "uniform":  # moments of u ~ U(0.001, 1)
        one, two = 0.5005, (1 - 0.001**3) / 3 / 0.999
        B, S = A.detach(), ROWS.double().T @ ROWS.double() / 3
        closed = torch.trace(S) + 2 * (1 - one) * torch.trace(B @ S) + (1 - 2 * one + two) * torch.trace(B @ S @ B.T)
        closed = closed + D - 2 * one * torch.trace(B) + two * (B**2).sum()
        assert loss == pytest.approx(float(closed) / D, rel=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"process": "edm"},
        {"process": "edm", "stratified": True, "pairing": "cross"},
        {"process": "flow", "shift": 3.0},
        {"process": "flow", "times": "logit-normal", "pairing": "same"},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_the_draws_have_that_expectation(settings: dict[str, Any]) -> None:
    """Mean loss of 150 batches of 12 of the draw plan, |z| < 3 by the spread among batches, which are independent."""
    trainer = line(settings | {"batch_size": 12})
    rule = unit_rule() if trainer.config.times == "uniform" else normal_rule()
    number = rule[0] if trainer.config.times == "uniform" else torch.special.ndtr(rule[0])
    exact, _ = expected(trainer, trainer.times, number, rule[1])
    means = []
    with torch.no_grad():
        for update in range(150):
            d = trainer.plan.draws(update, trainer.times)
            losses = trainer.objective.losses(trainer.denoiser, d.x0, d.eps, d.level)
            means.append(float((d.weight * losses.loss).mean()))
    found = torch.tensor(means, dtype=torch.float64)
    assert abs(float(found.mean()) - exact) < 3 * float(found.std()) / math.sqrt(150)
    assert float(found.std()) / math.sqrt(150) < 0.05 * exact


# ------------------------------------------------------------------------------------------- importance-sampled times


def over_bins(times: Times, cumulated: Tensor, f: Callable[[TimeDraw], Tensor]) -> float:
    """E of weight f over the uniform number, bin by bin."""
    node, weight = unit_rule(12)
    low = torch.cat([torch.zeros(1, dtype=torch.float64), cumulated[:-1]])
    total = 0.0
    for a, b in zip(low.tolist(), cumulated.tolist(), strict=True):
        drawn = times.at(a + (b - a) * node)
        total += (b - a) * float((weight * drawn.weight * f(drawn)).sum())
    return total


def test_second_moments_by_bin_are_unbiased() -> None:
    """Whatever was learned, E[weight f(t)] is the uniform times' mean, 1e-12, and the bins' weights are 1 / (K q)."""
    config = config_from({"process": "flow", "times": "loss-second-moment"})
    schedule = make_schedule(config)
    times = make_times(config, schedule)
    assert isinstance(times, LossSecondMomentTimes)
    assert times.label == "unbiased"
    K = times.steps
    bins = torch.arange(K).repeat(10)
    times = times.updated(bins, (1.0 + bins % 7) ** 2)
    assert times.warm
    q = times.probabilities()
    assert float(q.max() / q.min()) > 30
    assert times.at(q.cumsum(0) - q / 2).bin.tolist() == list(range(K))
    t_min = schedule.t_min
    found = over_bins(times, q.cumsum(0), lambda drawn: 3 * drawn.t**5 - drawn.t)
    exact = (0.5 * (1 - t_min**6) - 0.5 * (1 - t_min**2)) / (1 - t_min)
    assert found == pytest.approx(exact, abs=1e-12)
    again = make_times(config, schedule).restored(times.state())
    u = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    assert torch.equal(again.at(u).t, times.at(u).t)


@pytest.mark.parametrize("times", ["lognormal", "logit-normal", "mode"])
@pytest.mark.parametrize("process", ["edm", "flow"])
def test_weighted_times_have_the_loss_of_the_process(times: str, process: str) -> None:
    """Of the linear network's loss, 1e-9: both at 12 nodes in each of the 256 bins of the process's own times."""
    trainer = line({"process": process, "times": times, "times_weighted": True})
    assert trainer.times.label == "unbiased"
    q = trainer.times.probabilities()  # type: ignore[attr-defined]
    node, weight = unit_rule(12)
    low = q.cumsum(0) - q
    u, w = (low[:, None] + q[:, None] * node).flatten(), (q[:, None] * weight).flatten()
    found, gradient = expected(trainer, trainer.times, u, w)
    v, w = ((torch.arange(256)[:, None] + node) / 256).flatten(), (weight / 256).expand(256, -1).flatten()
    exact, plain = expected(trainer, objective_times(trainer.config, trainer.schedule), v, w)
    assert found == pytest.approx(exact, rel=1e-9)
    torch.testing.assert_close(gradient, plain, rtol=1e-8, atol=1e-9)
    if process == "edm":  # uniform ones are another objective
        other, _ = expected(trainer, UniformTimes(None, trainer.schedule.t_min), v, w)
        assert other != pytest.approx(exact, rel=0.05)
    even = process == "edm" and times == "lognormal"  # the process's own times
    assert bool((q * 256 - 1).abs().max() < 1e-9) == even


def test_the_weightings_figure_is_of_the_datas_own_deviation() -> None:
    """Over plain, min-snr is min(snr, 5) / (snr + 1 / sd^2), scaled to mean 1: sd the run's, not 0.5."""
    shown = weighting_figure(line({"process": "edm", "sigma_data": 2.0, "weighting": "min-snr"}))
    assert shown is not None
    snr = shown["logsnr"].exp()
    ratio = snr.clamp_max(5) / (snr + 1 / 4)
    torch.testing.assert_close(shown["relative"]["min-snr"], ratio / ratio.mean(), rtol=1e-9, atol=1e-9)


def test_weighted_times_follow_their_law() -> None:
    """Where edm's lognormal times are weighted for, logit-normal ones still fall where they fall without weights."""
    u = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    schedule = VE()
    own = LognormalTimes(schedule)
    plain = UniformTimes(None, schedule.t_min)
    weighted = LogitNormalTimes(weighted=True, plain=plain, own=own, uniform=1e-6).at(u).t
    given = LogitNormalTimes(plain=plain).at(u).t
    low, high = own.at(torch.tensor([0.02, 0.98])).t  # a bin of lognormal times spans more and more beyond
    inner = (given > low) & (given < high)
    assert int(inner.sum()) > 2000
    assert float((weighted - given)[inner].abs().max()) < 0.02
    with pytest.raises(ValueError, match="leave own out"):
        LogitNormalTimes(weighted=True, plain=UniformTimes(10), own=own)


# ------------------------------------------------------------------------------------------------------------ settings


def test_defaults_of_a_process() -> None:
    """What is not given is the process's own; a resolved config is a config of the same run; vp is what it was."""
    edm, flow = config_from({"process": "edm"}), config_from({"process": "flow"})
    assert (edm.prediction, edm.times, edm.weighting, edm.head) == ("edm", "lognormal", "edm", "none")
    assert (flow.prediction, flow.times, flow.weighting, flow.head) == ("flow", "uniform", "simple", "none")
    assert config_from({"process": "edm", "times": "uniform", "weighting": "p2"}).times == "uniform"
    assert TrainConfig(5, process="flow").updates == 5
    assert config_from({"process": "vp"}) == TrainConfig()
    assert (TrainConfig().prediction, TrainConfig().head) == ("v_prediction", "range")
    assert isinstance(make_schedule(TrainConfig()), DiscreteVP)
    assert make_times(TrainConfig(), make_schedule(TrainConfig())) == UniformTimes(1000)
    for config in (edm, flow):
        values = {k: v for k, v in vars(config).items() if not k.startswith("_") and k != "network"}
        assert config_from(values) == config


def test_auto_keeps_the_process_objective() -> None:
    edm = config_from({"process": "edm", "variance_reduction": "auto"})
    assert (edm.times, edm.stratified, edm.pairing, edm.target) == ("gradient-norm", True, "cross", "stable")
    for word in ("loss-second-moment", "gradient-norm", "entropy-rate", "learned-schedule"):
        times: Any = make_times(config_from({"process": "edm", "times": word}), VE())
        assert times.plain == LognormalTimes(VE())
    flow = config_from({"process": "flow", "variance_reduction": "auto"})
    assert (flow.times, flow.stratified, flow.pairing, flow.target) == ("gradient-norm", True, "cross", "stable")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"process": "flow", "prediction": "v_prediction"},
            "prediction is v_prediction and process flow, which",
        ),
        ({"process": "edm", "prediction": "epsilon"}, "prediction is epsilon and process edm, which allows edm; give"),
        ({"prediction": "flow"}, "epsilon, v_prediction, sample; give one of these.*or give process flow"),
        ({"process": "edm", "head": "range"}, "head is range and process edm.*logvar, basis, lowrank or none"),
        ({"process": "flow", "sigma_data": 0.6}, "sigma_data is 0.6 and process flow.*belongs to process edm: leave"),
        ({"sigma_data": "data"}, "sigma_data is data and process vp"),
        ({"process": "edm", "shift": 3}, "shift is 3.0 and process edm; shift belongs to process flow: leave it out"),
        ({"process": "flow", "beta_schedule": "linear"}, "beta_schedule is linear and process flow.*process vp"),
        (
            {"process": "edm", "train_timesteps": 100},
            "train_timesteps is 100 and process edm.*process vp: leave",
        ),
        ({"process": "ve"}, "process is 've': input should be 'vp', 'edm' or 'flow'"),
        ({"process": ["edm"]}, "input should be 'vp', 'edm' or 'flow'"),
        ({"process": "edm", "sigma_data": 0}, "sigma_data is 0; give a number above 0, or data to measure it"),
        ({"process": "edm", "sigma_data": "big"}, "sigma_data is 'big'; give a number above 0, or data"),
        ({"process": "flow", "shift": 0}, "shift is 0: input should be greater than 0"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        config_from(settings)


def test_sigma_data_is_the_spread_of_the_data() -> None:
    x = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0)) * 0.3 + 4
    assert measured_sigma_data(Rows(x)) == float(f"{float(x.double().std(unbiased=False)):.4g}")
    with pytest.raises(UserError, match="all numbers of the training data are equal; give a number above 0"):
        measured_sigma_data(Rows(torch.ones(5, 2)))


# ---------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("process", ["edm", "flow"])
def test_validation_is_the_mean_over_the_plain_times(process: str) -> None:
    """The 95% interval of the network that says 0 holds its exact loss on the digits, in total and with 4 se by bin."""
    config = config_from({"process": process})
    schedule, images = make_schedule(config), load("digits").calibration
    objective = make_objective(config)
    own = ValidationSet(
        images,
        schedule,
        UniformTimes(None, schedule.t_min),
        limit=128,
        prediction=config.prediction,
        weighting=objective.weighting,
    )
    zero = NetworkDenoiser(lambda x, t: torch.zeros_like(x), schedule, config.prediction)
    found = own.summary(own.values(zero, objective), has_variance=False)
    x = images.images(torch.arange(128)).double().flatten(1)
    energy = float((x**2).mean())
    node, weight = unit_rule(48)
    v = (torch.arange(8)[:, None] + node) / 8
    level = schedule.at((schedule.t_min + (1 - schedule.t_min) * v).flatten())
    if process == "flow":
        loss = torch.full_like(level.t, 1 + energy)  # eps - x_0
    else:  # (x_0 - c_skip y) / c_out
        s2, sd2 = level.sigma**2, 0.25
        loss = (s2 * energy / (s2 + sd2) + sd2**2 / (s2 + sd2)) / sd2
    bins = (weight * loss.reshape(8, -1)).sum(1)
    assert found.low < float(bins.mean()) < found.high
    assert found.high - found.low < 0.03 * found.loss
    for k, one in enumerate(found.bins):
        assert abs(one.loss - float(bins[k])) < 4 * one.se + 1e-6
    assert found.bins[0].logsnr_high == pytest.approx(min(30.0, float(schedule.logsnr(schedule.t_min))))


def test_bins_of_continuous_times_are_those_that_are_drawn() -> None:
    schedule = VE()
    edges = logsnr_edges(schedule, schedule.t_min)
    t = UniformTimes(None, schedule.t_min).at(torch.arange(8).double() / 8).t
    assert edges[:-1] == pytest.approx(schedule.logsnr(t).tolist())
    assert edges[0] == pytest.approx(-2 * math.log(0.002))


def test_what_is_not_finite_is_named_by_its_bin() -> None:
    """A NaN at sigma in 20 to 80 is in the last bins of the trainer's own times."""
    trainer = line({"process": "edm", "times": "uniform"})
    draws = trainer.plan.draws(0, trainer.times)
    bad = torch.where(draws.level.t == draws.level.t.max(), math.nan, 1.0)
    sentence = str(NonFiniteError.of_losses(bad, draws, trainer.watch.validation, 0, trainer.config, ""))
    low, high = (float(w) for w in sentence.split("logsnr bin ")[1].split(" (")[0].split(" to "))
    logsnr = float(draws.level.logsnr.min())
    assert low - 0.1 * abs(low) <= logsnr <= high + 0.1 * abs(high)


# -------------------------------------------------------------------------------------------------------- hybrid bound


@pytest.mark.parametrize("schedule", [VE(), Flow(2.0), CosineVP()], ids=lambda s: s.family)
def test_steps_of_the_bound_are_a_shifted_grid(schedule: Any) -> None:
    """From any time the chain of neighbours goes down in equal steps to one within [t_min, t_min + step], then data."""
    steps, low = 5, schedule.t_min
    t = torch.tensor([low + (1 - low) * 0.93], dtype=torch.float64)
    seen = [float(t)]
    while float(t) > 0:
        s, before = neighbours(schedule, t, steps, low)
        assert float(before.t) == pytest.approx(min(1.0, float(t) + (1 - low) / steps))
        t = s.t
        seen.append(float(t))
    assert len(seen) == steps + 1
    assert np.allclose(np.diff(seen[:-1]), -(1 - low) / steps)
    assert low <= seen[-2] <= low + (1 - low) / steps
    assert seen[-1] == 0.0


@pytest.mark.parametrize(("schedule", "prediction"), [(VE(), "edm"), (Flow(2.0), "flow")], ids=["edm", "flow"])
def test_bound_of_a_continuous_step(schedule: Any, prediction: Any) -> None:
    """Terms at three times = the library's for steps of (1 - t_min) / T, the decoder's within the first of them."""
    low, steps, kernel = schedule.t_min, 8, ReverseKernel(variance="posterior", last="decoder")
    t = low + (1 - low) * torch.tensor([0.1, 0.4, 0.95], dtype=torch.float64)
    level, noise = schedule.at(t), Independent(5)
    x0, eps, raw = (noise.normal(range(3), (1, 2, 2), draw=k, dtype=torch.float64) for k in range(3))
    x = level.alpha.reshape(3, 1, 1, 1) * x0 + level.sigma.reshape(3, 1, 1, 1) * eps
    denoiser = NetworkDenoiser(
        lambda x, _: torch.cat([0.3 * x, raw], 1), schedule, prediction, "logvar", sigma_data=0.8
    )
    out, head = denoiser.raw(x, level)
    assert head is not None
    found = HybridVLB(levels=17, steps=steps).bits(denoiser, x0, x, level, out, head)
    down = torch.where(t - (1 - low) / steps > low, t - (1 - low) / steps, 0.0)
    assert (down > 0).tolist() == [False, True, True]
    for k in range(3):
        one = schedule.at(t[k])
        posterior = denoiser.interpret(x[k : k + 1], one, out[k : k + 1], head[k : k + 1])
        exact = step_bits(x0[k : k + 1], x[k : k + 1], posterior, kernel, one, schedule.at(down[k]), levels=17)
        torch.testing.assert_close(found[k : k + 1], exact, rtol=1e-9, atol=1e-10)


# ----------------------------------------------------------------------------------------------------- the loop, resume


BASE: dict[str, Any] = {"updates": 6, "batch_size": 8, "warmup": 1, "checkpoint_every": 2, "validate_every": 6}


class Tiny(nn.Module):
    """A network with dropout, whose random numbers a resumed run must repeat."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.time = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(1, 6)
            self.drop, self.last = nn.Dropout(0.2), nn.Conv2d(6, outputs, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.first(x) + self.time(t[:, None] / 100)[:, :, None, None]
        return self.last(self.drop(torch.nn.functional.silu(hidden)))


@pytest.fixture(scope="module")
def digits() -> Data:
    few = load("digits")
    parts = [TensorImages(part.images(range(20))) for part in (few.train, few.calibration, few.test)]
    return Data("few digits", *parts, levels=17, fingerprint="few")


def weights(trainer: Trainer, updates: int | None = None) -> Tensor:
    for record in trainer.run():
        if updates is not None and isinstance(record, Update) and record.update == updates:
            break
    network = trainer.accelerator.unwrap_model(trainer._network)  # pyright: ignore[reportPrivateUsage]
    both = [*network.parameters(), *trainer.ema_network().parameters()]
    return torch.cat([p.detach().flatten() for p in both])


KINDS: list[dict[str, Any]] = [
    {"process": "edm"},
    {"process": "edm", "sigma_data": "data", "target": "stable", "pairing": "cross", "stratified": True},
    {"process": "edm", "times": "loss-second-moment", "stratified": True, "batch_size": 64, "updates": 14},
    {"process": "flow", "shift": 2.0, "times": "logit-normal"},
    {"process": "flow", "times": "entropy-rate", "head": "logvar"},
    {"process": "flow", "times": "gradient-norm", "target": "stable"},
    {"process": "flow", "coupling": "optimal-transport", "head": "basis", "head_loss": "vlb"},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_resumed_run_is_bit_identical(kind: dict[str, Any], digits: Data, tmp_path: Path) -> None:
    def make(folder: Path | None = None, resume: bool = False) -> Trainer:
        config = config_from(BASE | kind)
        network = Tiny(1 if config.head == "none" else 2)
        return Trainer(digits, config, folder, network=network, resume=resume, device="cpu")

    expected = weights(make())
    assert bool(torch.isfinite(expected).all())
    last = kind.get("updates", 6) - 1
    weights(make(tmp_path), last)
    resumed = make(tmp_path, resume=True)
    assert 0 < resumed.update < last
    assert torch.equal(weights(resumed), expected)
    if kind["process"] == "edm" and "updates" in kind:
        assert isinstance(resumed.times, LossSecondMomentTimes)
        assert resumed.times.warm
    other = config_from(BASE | {"process": "flow" if kind["process"] == "edm" else "edm"})
    with pytest.raises(UserError, match="was made with"):
        Trainer(digits, other, tmp_path, network=Tiny(1), resume=True, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{"process": "edm", "variance_reduction": "auto"}, {"process": "flow"}], ids=str)
def test_two_processes_draw_what_one_does(kind: dict[str, Any], on_one_and_two_processes: Any) -> None:
    """Predictions after 6 updates on one and two CPU processes agree, 1e-5."""
    (a, _), (b, _) = on_one_and_two_processes(BASE | {"lr": 1e-4, "warmup": 0, "network": {"width": 8}} | kind)
    assert torch.allclose(a, b, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- folders


FOLDERS: dict[str, dict[str, Any]] = {
    "edm": {"process": "edm", "sigma_data": "data"},
    "edm, logvar": {"process": "edm", "head": "logvar"},
    "flow": {"process": "flow", "shift": 3.0},
    "flow, low rank": {"process": "flow", "head": "lowrank", "rank": 2},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_reopened_folder_is_what_was_trained(name: str, digits: Data, tmp_path: Path) -> None:
    config = config_from({"updates": 3, "batch_size": 6, "warmup": 0, "network": {"width": 8}} | FOLDERS[name])
    made = Trainer(digits, config, device="cpu")
    for _ in made.run():
        pass
    save_trained(made, tmp_path)
    pipeline = open_pipeline(tmp_path)
    assert isinstance(pipeline, ImagePipeline) == (config.process == "edm")
    denoiser = denoiser_of(pipeline)
    assert (denoiser.prediction, denoiser.head) == (config.prediction, config.network_head)
    assert denoiser.schedule == made.schedule
    assert config.process != "edm" or denoiser.sigma_data == made.sigma_data
    own = NetworkDenoiser(
        made.ema_network(), made.schedule, config.prediction, denoiser.head, clip=1.0, sigma_data=made.sigma_data
    )
    x = Independent(2).normal(range(3), (1, 8, 8))
    for t in (0.3, 1.0):
        level = made.schedule.at(t)
        with torch.no_grad():
            a, b = denoiser(x, level), own(x, level)
        assert torch.equal(a.mean, b.mean)
        assert (a.covariance is None) == (config.head == "none")
    assert pipeline.scheduler.config["variance"] == ("small" if config.head == "none" else "learned")


@pytest.mark.parametrize("process", ["edm", "flow"])
def test_the_pipeline_takes_the_steps_of_the_library(process: str, digits: Data, tmp_path: Path) -> None:
    """A folder's own call = the probability flow of `lowvar.sample` from the same noise: start and input are scaled."""
    config = config_from({"updates": 2, "batch_size": 6, "warmup": 0, "network": {"width": 8}, "process": process})
    made = Trainer(digits, config, device="cpu")
    for _ in made.run():
        pass
    save_trained(made, tmp_path)
    pipeline = open_pipeline(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    kind = {"output_type": "pt"} if process == "edm" else {"output_type": "np"}
    images = pipeline(4, torch.Generator().manual_seed(3), num_inference_steps=5, **kind).images
    images = images if process == "edm" else torch.from_numpy(images).permute(0, 3, 1, 2)
    schedule = made.schedule
    solver = MultistepSolver(None, 2, 0)
    noise = TorchGenerators(torch.Generator().manual_seed(3))
    own = generate(denoiser_of(pipeline), solver, uniform(schedule, 5), (1, 8, 8), 4, noise, clip=1.0)
    torch.testing.assert_close(images.float(), (own / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
