"""The linear denoiser's error: its mean exactly, on the digits themselves; its coefficient; what it does not do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowvar.data import load
from lowvar.process import CosineVP, Flow, GaussianTwin, Level, NetworkDenoiser, Schedule
from lowvar.process.basis import Basis, DCTBasis, MatrixBasis, PixelBasis
from lowvar.process.denoiser import Prediction
from lowvar.process.noise import Independent
from lowvar.train import EDM, MinSNR, Objective, Simple
from lowvar.train.linear_control import LinearControl
from lowvar.train.linear_loss import LinearLoss
from lowvar.train.objectives import Weighting


def digits() -> Tensor:
    return load("digits").calibration.images(range(150)).double()


def twin_of(x: Tensor, kind: str) -> GaussianTwin:
    """The set's own mean and variances, with 1/N."""
    shape = x.shape[1:]
    centred = x - x.mean(0)
    basis: Basis = PixelBasis(shape) if kind == "pixel" else DCTBasis(shape)
    if kind == "pca":
        flat = centred.flatten(1)
        basis = MatrixBasis(torch.linalg.eigh(flat.mT @ flat / len(x))[1], shape)
    return GaussianTwin(x.mean(0), basis, (basis.forward(centred) ** 2).mean(0))


@pytest.mark.parametrize("kind", ["pixel", "dct", "pca"])
@pytest.mark.parametrize(("schedule", "t"), [(CosineVP(), 0.3), (Flow(), 0.7), (Flow(), 1.0)], ids=str)
def test_mean_is_exact_on_the_digits(kind: str, schedule: Schedule, t: float) -> None:
    """Oracle 4. D_lin is affine in eps, so E over eps = value at 0 + sum over directions of squared differences."""
    x = digits()
    twin = twin_of(x, kind)
    n, d = len(x), x[0].numel()
    level = schedule.at(torch.full((n,), t, dtype=torch.float64))
    linear = LinearLoss(twin, "sample")

    def value(eps: Tensor) -> Tensor:
        return linear.loss(x, eps.expand_as(x), level)

    centre = value(torch.zeros_like(x[:1]))
    total = centre.clone()
    for k in range(d):  # (v(e) + v(-e)) / 2 - v(0) is the quadratic part along e
        e = torch.zeros(d, dtype=torch.float64).index_fill_(0, torch.tensor(k), 1.0).reshape(1, *x.shape[1:])
        total += (value(e) + value(-e)) / 2 - centre
    mean = linear.mean(level)
    assert float(total.mean()) == pytest.approx(float(mean[0]), abs=1e-9)
    if kind == "pca" and t < 1:
        s2 = float(level.sigma[0] / level.alpha[0]) ** 2
        flat = (x - x.mean(0)).flatten(1)
        C = flat.mT @ flat / n
        formula = torch.trace(C @ torch.linalg.inv(C + s2 * torch.eye(d, dtype=torch.float64))) * s2 / d
        assert float(mean[0]) == pytest.approx(float(formula), abs=1e-9)


@pytest.mark.parametrize("weighting", [Simple(), MinSNR(), EDM()], ids=lambda w: type(w).__name__)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "edm"])
def test_variate_is_the_loss_of_the_linear_denoiser(weighting: Weighting, prediction: Prediction) -> None:
    """A network that says what D_lin says has the loss w v, so the controlled loss with coefficient 1 is its mean."""
    from lowvar.process.denoiser import to_target

    x0, schedule = digits()[:20], CosineVP()
    twin = twin_of(digits(), "dct")
    eps = Independent(0).normal(range(20), x0.shape[1:], dtype=torch.float64)
    level = schedule.at(torch.linspace(0.05, 0.99, 20, dtype=torch.float64))
    alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in (level.alpha, level.sigma))
    x = alpha * x0 + sigma * eps
    guess = twin.posterior(x, level).mean
    out = to_target(prediction, guess, (x - alpha * guess) / sigma, level)
    objective = Objective(weighting)
    denoiser = NetworkDenoiser(lambda x, t: x, schedule, prediction)
    loss = objective.from_output(denoiser, x0, eps, x, level, out, None).loss
    linear, plain = LinearLoss(twin, prediction, weighting), LinearLoss(twin, "sample")  # plain: weight 1
    v, mean = linear.loss(x0, eps, level), linear.mean(level)
    assert torch.allclose(loss, v, rtol=1e-9)
    assert torch.allclose(mean / plain.mean(level), v / plain.loss(x0, eps, level), rtol=1e-9)


def batch(number: int, n: int, images: Tensor) -> tuple[Tensor, Tensor, Level]:
    source = Independent(number)
    rows = (source.uniform(range(n), (), dtype=torch.float64) * len(images)).long()
    eps = source.normal(range(n), images.shape[1:], draw=1, dtype=torch.float64)
    return images[rows], eps, CosineVP().at(0.02 + 0.97 * source.uniform(range(n), (), draw=2, dtype=torch.float64))


def test_value_varies_less_and_the_gradient_is_the_same() -> None:
    """On a denoiser that is nearly the best one of the digits: 4 lagged batches, then one with the same gradient."""
    images = digits()
    twin = twin_of(images, "pca")
    theta = torch.tensor(0.95, dtype=torch.float64, requires_grad=True)

    def network(x: Tensor, t: Tensor) -> Tensor:
        at = CosineVP().at(t.double() / 1000)
        return theta * torch.tanh(1.2 * twin.posterior(x, at).mean)

    denoiser, objective = NetworkDenoiser(network, CosineVP(), "sample"), Objective(Simple())
    control = LinearControl(LinearLoss(twin, "sample"))
    values, better = [], []
    for k in range(40):
        x0, eps, level = batch(k, 64, images)
        loss = objective.losses(denoiser, x0, eps, level).loss
        mine, control = control.applied(loss, x0, eps, level)
        grads = [torch.autograd.grad(v.mean(), theta, retain_graph=True)[0] for v in (loss, mine)]
        assert torch.equal(*grads)  # zero difference: D_lin has no parameters
        if k >= 4:
            # at given levels the mean moves with t: compare the part that the variate can see
            values.append(loss.detach() - _mean_given_level(loss.detach(), level))
            better.append(mine.detach() - _mean_given_level(mine.detach(), level))
    plain, controlled = torch.cat(values).var(), torch.cat(better).var()
    assert float(controlled) < 0.5 * float(plain)
    share = control.coefficients.explained()
    assert float(share.median()) > 0.3


def _mean_given_level(loss: Tensor, level: Level) -> Tensor:
    """A cubic fit of the loss by time."""
    powers = torch.stack([level.t**k for k in range(5)], 1)
    return powers @ torch.linalg.lstsq(powers, loss[:, None]).solution[:, 0]


def test_state_is_restored_and_bins_are_checked() -> None:
    images = digits()
    linear = LinearLoss(twin_of(images, "dct"))
    x0, eps, level = batch(0, 32, images)
    loss = (x0**2).flatten(1).mean(1)
    _, control = LinearControl(linear).applied(loss, x0, eps, level)
    again = LinearControl(linear).restored(control.state())
    first, second = (c.applied(loss, x0, eps, level)[0] for c in (control, again))
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="must increase"):
        LinearControl(linear, edges=(1.0, 0.0))
    with pytest.raises(ValueError, match="bins"):
        LinearControl(linear, (0.0,), control.coefficients)
    assert math.isfinite(float(second.sum()))
