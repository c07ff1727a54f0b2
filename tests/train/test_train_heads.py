"""Heads for Cov[x_0 | x_t]: likelihoods against torch.distributions, gradients of the mean, what training reaches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from lowvar.process import (
    CosineVP,
    DCTBasis,
    Flow,
    GaussianTwin,
    Level,
    MatrixBasis,
    NetworkDenoiser,
    ReverseKernel,
    Schedule,
    schedule_from_diffusers,
)
from lowvar.process.denoiser import Prediction
from lowvar.process.head import Head, Spectrum, covariance_of, head_channels
from lowvar.process.kernel import step_coefficients
from lowvar.process.noise import Independent
from lowvar.sample.likelihood import vlb
from lowvar.testing import mixture8
from lowvar.train import HybridVLB, LikelihoodOnly, MinSNR, Objective, PosteriorNLL, Simple
from lowvar.train.objectives import VarianceTerm

SHAPE = (2, 3, 4)
D = 24
HEADS: list[tuple[Head, int]] = [("logvar", 0), ("basis", 0), ("lowrank", 0), ("lowrank", 1), ("lowrank", 5)]
IDS = ["logvar", "basis", "rank 0", "rank 1", "rank 5"]
T4 = schedule_from_diffusers({"trained_betas": [0.1, 0.3, 0.5, 0.8]})


def spectrum(kind: str = "pca", shape: tuple[int, ...] = SHAPE) -> Spectrum:
    """An anisotropic one, in a random orthonormal basis or the DCT."""
    d = math.prod(shape)
    c = torch.exp(torch.linspace(2, -3, d, dtype=torch.float64)).reshape(shape)
    noise = Independent(8).normal(range(d), (d,), dtype=torch.float64)
    return Spectrum(MatrixBasis(torch.linalg.qr(noise)[0], shape) if kind == "pca" else DCTBasis(shape), c)


def setting(head: Head, rank: int, t: list[float], schedule: Schedule | None = None) -> tuple[Any, ...]:
    """x0, eps, x, level, out and raw head output of a small batch, float64, and the denoiser they belong to."""
    schedule = CosineVP() if schedule is None else schedule
    source, n = Independent(4), len(t)
    x0 = source.uniform(range(n), SHAPE, dtype=torch.float64) * 2 - 1
    eps = source.normal(range(n), SHAPE, dtype=torch.float64)
    level = schedule.at(torch.tensor(t, dtype=torch.float64))
    alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in (level.alpha, level.sigma))
    shape = (head_channels(head, SHAPE[0], rank) - SHAPE[0], *SHAPE[1:])
    raw = 0.7 * source.normal(range(n), shape, draw=9, dtype=torch.float64)
    out = 0.8 * x0 + 0.1
    made = NetworkDenoiser(lambda x, t: x, schedule, "sample", head, spectrum=spectrum() if head == "basis" else None)
    return x0, eps, alpha * x0 + sigma * eps, level, out, raw, made


def written_out(head: Head, raw: Tensor, level: Level) -> Tensor:
    """The dense covariances of the module's table, from their formulas, (B, d, d)."""
    alpha2, sigma2 = level.alpha**2, level.sigma**2
    rows = []
    for k in range(raw.shape[0]):
        p = sigma2[k] / (alpha2[k] + sigma2[k])
        scale = torch.exp(raw[k, :2].flatten())
        if head == "basis":
            own = spectrum()
            c = own.variance.flatten()
            B = own.basis.matrix()
            rows.append(B @ torch.diag(c * sigma2[k] / (alpha2[k] * c + sigma2[k]) * scale) @ B.T)
        else:
            U = raw[k, 2:].reshape(-1, D).T
            rows.append(p * (torch.diag(scale) + U @ U.T))
    return torch.stack(rows)


# --------------------------------------------------------------------------------------------------------- the formulas


@pytest.mark.parametrize(("head", "rank"), HEADS, ids=IDS)
@pytest.mark.parametrize("schedule", [CosineVP(), Flow(3.0)], ids=["vp", "flow"])
def test_likelihood_is_the_multivariate_normal(head: Head, rank: int, schedule: Schedule) -> None:
    x0, _, x, level, out, raw, denoiser = setting(head, rank, [0.08, 0.5, 0.97], schedule)
    exact = MultivariateNormal(out.flatten(1), written_out(head, raw, level)).log_prob(x0.flatten(1))
    bits = PosteriorNLL().bits(denoiser, x0, x, level, out, raw)
    torch.testing.assert_close(bits, -exact / (D * math.log(2)), rtol=1e-9, atol=1e-9)
    posterior = denoiser.interpret(x, level, out, raw)  # sampling sees the same matrix
    torch.testing.assert_close(posterior.covariance.dense(), written_out(head, raw, level), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("head", "rank"), HEADS, ids=IDS)
def test_bound_of_a_step_is_the_divergence(head: Head, rank: int) -> None:
    """KL(N(m, lambda^2 I) || N(m + kappa gap, lambda^2 I + kappa^2 C)), by torch.distributions."""
    x0, _, x, level, out, raw, denoiser = setting(head, rank, [0.5, 0.75, 1.0], T4)
    s = T4.at(level.t - 0.25)
    c = step_coefficients(level, s)
    eye = torch.eye(D, dtype=torch.float64)
    lambda2, kappa2 = (v.reshape(-1, 1, 1) for v in (c.lambda2, c.kappa2))
    mean = c.kappa.reshape(-1, 1) * (out - x0).flatten(1)
    p = MultivariateNormal(mean, lambda2 * eye + kappa2 * written_out(head, raw, level))
    q = MultivariateNormal(torch.zeros_like(mean), lambda2 * eye)
    bits = HybridVLB(levels=17, steps=4).bits(denoiser, x0, x, level, out, raw)
    torch.testing.assert_close(bits, kl_divergence(q, p) / (D * math.log(2)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["pca", "dct"])
def test_basis_head_begins_at_the_gaussians_posterior(kind: str) -> None:
    """h = 0 is exact for Gaussian data, at every level and in every basis."""
    own = spectrum(kind)
    twin = GaussianTwin(torch.zeros(SHAPE, dtype=torch.float64), own.basis, own.variance)
    for schedule in (CosineVP(), Flow()):
        level = schedule.at(torch.tensor([0.01, 0.4, 0.99], dtype=torch.float64))
        x = Independent(1).normal(range(3), SHAPE, dtype=torch.float64)
        found = covariance_of("basis", torch.zeros_like(x), level, 2, own)
        exact = twin.posterior(x, level).covariance
        assert exact is not None
        torch.testing.assert_close(found.dense(), exact.dense(), rtol=1e-10, atol=1e-14)


def test_directions_without_variance_stay_finite() -> None:
    c = torch.tensor([1.0, 0.25, 0.0, 0.0], dtype=torch.float64)
    own = Spectrum(DCTBasis((4,)), c)
    level = CosineVP().at(0.3)
    found = covariance_of("basis", torch.zeros(1, 4, dtype=torch.float64), level, 4, own)
    assert bool(torch.isfinite(found.logdet()).all())
    floor = 1e-4 * c.mean()
    expected = floor * level.sigma**2 / (level.alpha**2 * floor + level.sigma**2)
    torch.testing.assert_close(found.variance[0, 2], expected)  # pyright: ignore[reportAttributeAccessIssue]


def test_extreme_outputs_stay_finite() -> None:
    """A head that says exp(+-1000) is read as exp(+-20), in value and gradient."""
    for head, rank in HEADS:
        x0, _, x, level, out, raw, denoiser = setting(head, rank, [0.02, 0.5])
        for sign in (1.0, -1.0):
            wild = raw.clone()
            wild[:, : SHAPE[0]] = sign * 1e3
            wild = wild.float().requires_grad_()
            for term in (PosteriorNLL(), HybridVLB(levels=17)):
                bits = term.bits(denoiser, x0.float(), x.float(), level, out.float(), wild)
                (gradient,) = torch.autograd.grad(bits.sum(), wild)
                assert bool(torch.isfinite(bits).all()), (head, term, sign)
                assert bool(torch.isfinite(gradient).all()), (head, term, sign)


# ------------------------------------------------------------------------------------------------ the mean's gradient

TERMS: list[VarianceTerm] = [PosteriorNLL(1.0), HybridVLB(1.0, 17)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("term", TERMS, ids=["nll", "vlb"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("head", "rank"), HEADS[1:], ids=IDS[1:])
def test_detached_term_leaves_the_mean_alone(
    head: Head, rank: int, prediction: Prediction, term: VarianceTerm, dtype: torch.dtype
) -> None:
    """Bit for bit, at the first timestep (decoder), inside the chain and at its noisy end."""
    table = schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2"})
    x0, eps, x, level, _, raw, made = setting(head, rank, [0.001, 0.4, 1.0], table)
    x0, eps, x = x0.to(dtype), eps.to(dtype), x.to(dtype)

    def gradient(objective: Objective, with_head: bool) -> tuple[Tensor, Tensor | None]:
        out = torch.sin(2 * x).requires_grad_()
        own = raw.to(dtype).requires_grad_() if with_head else None
        extra: dict[str, Any] = {"head": head, "spectrum": made.spectrum} if with_head else {}
        denoiser = NetworkDenoiser(lambda x, t: x, table, prediction, **extra)
        objective.from_output(denoiser, x0, eps, x, level, out, own).loss.mean().backward()
        assert out.grad is not None
        return out.grad, None if own is None else own.grad

    for weighting in (Simple(), MinSNR()):
        alone, _ = gradient(Objective(weighting), with_head=False)
        detached, of_head = gradient(Objective(weighting, term), with_head=True)
        assert torch.equal(alone, detached)
        assert of_head is not None
        assert bool(torch.isfinite(of_head).all())
        assert bool((of_head.abs().amax((2, 3)) > 0).all())  # every channel of every sample is trained
        attached, same = gradient(Objective(weighting, term, detach_mean=False), with_head=True)
        assert not torch.equal(alone, attached)
        assert same is not None
        assert torch.equal(same, of_head)


@pytest.mark.parametrize(("head", "rank"), HEADS, ids=IDS)
def test_attached_likelihood_has_the_gradient_of_its_formula(head: Head, rank: int) -> None:
    """C^-1 (x0_hat - x_0) for the likelihood and kappa^2 S^-1 (x0_hat - x_0) for a step's bound, over d log 2."""
    x0, eps, x, level, out, raw, denoiser = setting(head, rank, [0.5, 1.0], T4)
    C = written_out(head, raw, level)
    c = step_coefficients(level, T4.at(level.t - 0.25))
    lambda2, kappa2 = (v.reshape(-1, 1, 1) for v in (c.lambda2, c.kappa2))
    S = lambda2 * torch.eye(D, dtype=torch.float64) + kappa2 * C
    gap = (out - x0).flatten(1)[:, :, None]
    by_hand = {
        PosteriorNLL(0.3): 0.3 * torch.linalg.solve(C, gap),
        HybridVLB(0.02, 17): 0.02 * 4 * kappa2 * torch.linalg.solve(S, gap),
    }
    for term, expected in by_hand.items():
        mean = out.clone().requires_grad_()
        objective = Objective(LikelihoodOnly(), term, detach_mean=False)
        losses = objective.from_output(denoiser, x0, eps, x, level, mean, raw)
        losses.loss.sum().backward()
        assert mean.grad is not None
        torch.testing.assert_close(mean.grad.flatten(1), expected[..., 0] / (D * math.log(2)), rtol=1e-8, atol=1e-12)


class Fixed(nn.Module):
    """A network of a formula, with a head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        n = (t / 4).reshape(-1, 1, 1, 1).to(x)
        return torch.cat([torch.sin((k + 1) * x / 3 + n)[:, :1] for k in range(self.channels)], 1)


@pytest.mark.parametrize(("head", "rank"), [("range", 0), *HEADS], ids=["range", *IDS])
def test_likelihood_only_is_the_variational_bound(head: Head, rank: int) -> None:
    """The mean over the table's steps of the loss, weight 1, is the bound of the chain, its prior aside: all terms."""
    own = spectrum() if head == "basis" else None
    denoiser = NetworkDenoiser(Fixed(head_channels(head, 2, rank)), T4, "sample", head, spectrum=own)
    objective = Objective(LikelihoodOnly(), HybridVLB(1.0, 17), detach_mean=False)
    noise, index = Independent(3), range(3)
    levels = torch.tensor([[k % 17 for k in range(D)]] * 3, dtype=torch.float64)
    x0 = (levels / 8 - 1).reshape(3, *SHAPE)
    kernel = ReverseKernel(variance="learned" if head == "range" else "posterior", last="decoder")
    grid = torch.linspace(1, 0, 5, dtype=torch.float64)
    bound = vlb(denoiser, kernel, grid, x0, 17, noise, index)
    total = torch.zeros(3, dtype=torch.float64)
    for k, t in enumerate(grid[:-1].tolist()):
        eps = noise.normal(index, SHAPE, draw=k, dtype=torch.float64)
        total += objective.losses(denoiser, x0, eps, T4.at(torch.full((3,), t, dtype=torch.float64))).loss / 4
    torch.testing.assert_close(total, bound.kl.sum(1) + bound.decoder, rtol=1e-9, atol=1e-12)


def test_something_must_train_the_mean() -> None:
    for make in (
        lambda: Objective(LikelihoodOnly()),
        lambda: Objective(LikelihoodOnly(), PosteriorNLL()),
    ):
        with pytest.raises(ValueError, match="must train the mean"):
            make()


# ------------------------------------------------------------------------------------------------ what training reaches


class Head8(nn.Module):
    """The exact mean of the 8-dimensional mixture, and a small network for the head's channels."""

    def __init__(self, schedule: Schedule, channels: int) -> None:
        super().__init__()
        self.schedule, self.target = schedule, mixture8()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            layers = nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, channels)
        with torch.no_grad():
            layers[-1].weight.mul_(0.3)
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = self.schedule.at(self.schedule.time_of(t.double()))
        with torch.no_grad():
            mean = self.target.posterior(x.double(), level, None).mean.float()
        scaled = (level.logsnr / 4).clamp(-3, 3).float()[:, None]
        return torch.cat([mean, self.body(torch.cat([x, scaled], 1))], 1)


def reached(head: Head, rank: int, updates: int) -> tuple[float, float]:
    """Mean KL(N(m, C) || N(m, head's C)) in nats after training, and the least that any diagonal matrix could have."""
    schedule, target = CosineVP(), mixture8()
    own = None
    if head == "basis":
        values, vectors = torch.linalg.eigh(target.covariance)
        own = Spectrum(MatrixBasis(vectors.flip(1), (8,)), values.flip(0))
    network = Head8(schedule, head_channels(head, 8, rank) - 8)
    denoiser = NetworkDenoiser(network, schedule, "sample", head, spectrum=own)
    optimizer = torch.optim.Adam(network.parameters(), 4e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    objective, noise = Objective(Simple(), PosteriorNLL(1.0)), Independent(5)
    pool = target.sample(range(128 * updates)).float()
    eps = noise.normal(range(len(pool)), (8,), draw=2)
    levels = schedule.at(0.1 + 0.8 * noise.uniform(range(len(pool)), (), draw=1, dtype=torch.float64))
    for rows in torch.arange(len(pool)).split(128):
        losses = objective.losses(denoiser, pool[rows], eps[rows], levels[rows])
        optimizer.zero_grad()
        losses.loss.mean().backward()
        optimizer.step()
        scheduler.step()
    gaps, diagonal = [], []
    for t in (0.2, 0.4, 0.6, 0.8):
        level = schedule.at(t)
        x = target.noisy(range(10**6, 10**6 + 200), level)
        exact = target.posterior(x, level, "dense").covariance
        with torch.no_grad():
            found = denoiser(x.float(), level).covariance
        assert exact is not None
        assert found is not None
        C, zero = exact.dense(), torch.zeros(200, 8, dtype=torch.float64)
        gaps.append(kl_divergence(MultivariateNormal(zero, C), MultivariateNormal(zero, found.dense().double())).mean())
        diagonal.append(0.5 * (torch.diagonal(C, dim1=1, dim2=2).log().sum(1) - torch.linalg.slogdet(C)[1]).mean())
    return float(torch.stack(gaps).mean()), float(torch.stack(diagonal).mean())


def test_structured_heads_learn_what_no_diagonal_holds() -> None:
    """Posterior covariances of a correlated mixture; bound 1.00, seen 1.19 logvar, .68 PCA basis, .54 rank 3 (nats)."""
    logvar, bound = reached("logvar", 0, 150)
    assert bound < logvar
    assert reached("basis", 0, 150)[0] < 0.8 * bound
    assert reached("lowrank", 3, 150)[0] < 0.7 * bound
