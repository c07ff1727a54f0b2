"""Gradients through the reverse process: closed forms of the linear-Gaussian chain, mixtures of rules, memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian

from lowvar.gradients import (
    Constant,
    Expectation,
    LeaveOneOut,
    Pathwise,
    ReverseChain,
    Roulette,
    Score,
    Sites,
    reverse_chain,
)
from lowvar.process import CosineVP, Independent, NoiseSource, ReverseKernel
from lowvar.process.covariance import Isotropic
from lowvar.process.denoiser import Denoiser, NetworkDenoiser
from lowvar.process.kernel import step_coefficients
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level
from lowvar.sample import generate
from lowvar.testing import exact_moments
from lowvar.testing.quadrature import hermite

SCHEDULE = CosineVP()
THETA = torch.tensor([0.35, 0.2], dtype=torch.float64)
C = 0.15


class Affine(Denoiser):
    """x0_hat = g x + h, covariance C I."""

    def __init__(self, theta: Tensor) -> None:
        self.theta, self.schedule = theta, SCHEDULE

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        variance = torch.full((1,), C, dtype=torch.float64)
        return Posterior(self.theta[0] * x + self.theta[1], Isotropic(variance, x.shape[1:]))


class Rows(NoiseSource):
    """Given numbers: normal (B, draws), uniform (draws,)."""

    def __init__(self, normal: Tensor, uniform: Sequence[float] = ()) -> None:
        self.numbers, self.coins = normal, uniform

    def normal(self, index: Any, shape: Any, *, draw: int = 0, dtype: Any = None, device: Any = "cpu") -> Tensor:
        return self.numbers[:, draw].reshape(-1, *shape)

    def uniform(self, index: Any, shape: Any, *, draw: int = 0, dtype: Any = None, device: Any = "cpu") -> Tensor:
        return torch.tensor([self.coins[draw - 1]], dtype=torch.float64)


def grid(steps: int, end: float = 0.0) -> Tensor:
    return torch.linspace(0.95, end, steps + 1, dtype=torch.float64)


def closed(theta: Tensor, steps: int, eta: float, end: float) -> Tensor:
    """E (x_K - 1)^2 by the recursion of mean and variance."""
    levels = SCHEDULE.at(grid(steps, end))
    mean, var = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for k in range(steps):
        c = step_coefficients(levels[k], levels[k + 1], eta)
        mean = (c.a + c.kappa * theta[0]) * mean + c.kappa * theta[1]
        var = (c.a + c.kappa * theta[0]) ** 2 * var
        if k + 1 < steps or end > 0:
            var = var + c.lambda2 + c.kappa**2 * C
    return (mean - 1) ** 2 + var


def cost(x: Tensor) -> Tensor:
    return (x[:, 0] - 1) ** 2


def chain_of(theta: Tensor, steps: int, eta: float = 1.0, end: float = 0.0) -> ReverseChain:
    return reverse_chain(Affine(theta), ReverseKernel(eta=eta), grid(steps, end))


def spread(draws: int) -> tuple[Tensor, Tensor]:
    """BaseNoise and weights that integrate every quadratic function of `draws` normal numbers exactly."""
    eye = torch.eye(draws, dtype=torch.float64)
    rows = torch.cat([torch.zeros(1, draws, dtype=torch.float64), eye, -eye])
    weight = torch.cat([torch.tensor([1.0 - draws], dtype=torch.float64), torch.full((2 * draws,), 0.5).double()])
    return rows, weight


@pytest.mark.parametrize("eta", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_pathwise_gradient_and_hessian_of_the_linear_chain(steps: int, eta: float) -> None:
    rows, weight = spread(steps + 1)

    def mine(theta: Tensor) -> Tensor:
        out = chain_of(theta, steps, eta).surrogate(
            cost, Rows(rows), range(len(rows)), (1,), checkpoint=0, dtype=torch.float64, weight=weight
        )
        return out.loss

    def truth(theta: Tensor) -> Tensor:
        return closed(theta, steps, eta, 0.0)

    assert torch.allclose(mine(THETA), truth(THETA), atol=1e-11)
    assert torch.allclose(grad(mine)(THETA), grad(truth)(THETA), atol=1e-10)
    assert torch.allclose(hessian(mine)(THETA), hessian(truth)(THETA), atol=1e-8, rtol=1e-9)


@pytest.mark.parametrize("checkpoint", [1, 3, 7])
def test_checkpoints_change_nothing(checkpoint: int) -> None:
    grads = []
    for size in (0, checkpoint):
        theta = THETA.clone().requires_grad_()
        chain = chain_of(theta, 7)
        chain.surrogate(
            cost, Independent(0), range(16), (1,), rules=chain.last(3), checkpoint=size, dtype=torch.float64
        ).loss.backward()
        grads.append(theta.grad)
    assert torch.equal(grads[0], grads[1])


def test_transforms_keep_everything_and_refuse_segments() -> None:
    """torch.func cannot run a segment again: by default none are made there."""

    def loss(theta: Tensor, checkpoint: int | None = None) -> Tensor:
        chain, index = chain_of(theta, 4), range(4)
        return chain.surrogate(cost, Independent(0), index, (1,), checkpoint=checkpoint, dtype=torch.float64).loss

    leaf = THETA.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    assert torch.allclose(grad(loss)(THETA), leaf.grad, atol=1e-12)
    with pytest.raises(ValueError, match="checkpoint is 2 under a transform"):
        grad(lambda theta: loss(theta, 2))(THETA)


@pytest.mark.parametrize("rules", ["pathwise", "score"])
def test_a_network_and_its_conditions_get_the_same_gradient_from_segments(rules: Any) -> None:
    """Segments of a NetworkDenoiser keep no graph: parameters, conditions and earlier states have all their parts."""
    network = torch.nn.Linear(2, 2).double()
    condition = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
            return torch.tanh(self.inner(x) + shift * t[:, None] / 1000)

    denoiser = NetworkDenoiser(Net(), SCHEDULE, "sample", conditioning={"shift": condition})
    chain = reverse_chain(denoiser, ReverseKernel(variance="small"), grid(6))
    found = []
    for checkpoint in (0, 1, 4):
        out = chain.surrogate(
            cost, Independent(0), range(8), (2,), rules=rules, checkpoint=checkpoint, dtype=torch.float64
        )
        found.append(torch.autograd.grad(out.loss, [*network.parameters(), condition]))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert float(a.abs().max()) > 0
            assert torch.allclose(a, b, atol=1e-14)


def _exact(rules: Any, steps: int, baseline: Any = None, coins: Sequence[float] = ()) -> tuple[Tensor, Tensor]:
    """Expectation of the estimate (over the normal numbers) and the truth, for a chain whose steps all add noise."""
    z, w = hermite(5)
    rows = torch.tensor(list(itertools.product(z.tolist(), repeat=steps + 1)), dtype=torch.float64)
    weight = torch.tensor(list(itertools.product(w.tolist(), repeat=steps + 1)), dtype=torch.float64).prod(1)
    theta = THETA.clone().requires_grad_()
    chain_of(theta, steps, end=0.1).surrogate(
        cost,
        Rows(rows, coins),
        range(len(rows)),
        (1,),
        rules=rules,
        baseline=baseline,
        dtype=torch.float64,
        weight=weight,
    ).loss.backward()
    assert theta.grad is not None
    return theta.grad, grad(lambda th: closed(th, steps, 1.0, 0.1))(THETA)


@pytest.mark.parametrize(
    "rules",
    [
        "pathwise",
        "score",
        ("score", "score", "pathwise"),
        ("pathwise", "score", "pathwise"),
        ("score", "pathwise", "score"),
        ("pathwise", "pathwise", "score"),
    ],
)
@pytest.mark.parametrize("baseline", [None, Constant(0.8)])
def test_mixed_rules_are_exactly_unbiased(rules: Any, baseline: Any) -> None:
    mean, truth = _exact(rules, 3, baseline)
    assert torch.allclose(mean, truth, atol=1e-11)


def test_roulette_is_exactly_unbiased() -> None:
    """All outcomes of two coins, weighted: the mean is the truth; without the division it is not."""
    keep = 0.6
    total = truth = torch.zeros(2, dtype=torch.float64)
    for coins in itertools.product((0.1, 0.9), repeat=2):
        p = 1.0
        for u in coins:
            p *= keep if u < keep else 1 - keep
        mean, truth = _exact(("pathwise", Roulette(keep), Roulette(keep)), 3, coins=(0.0, *coins))
        total += p * mean
    assert torch.allclose(total, truth, atol=1e-11)


def test_stopped_is_biased_and_says_so() -> None:
    mean, truth = _exact(("stop", "stop", "pathwise"), 3)
    assert float((mean - truth).abs().max()) > 0.01
    out = chain_of(THETA, 3).surrogate(cost, Independent(0), [0], (1,), rules=chain_of(THETA, 3).last(1, "stop"))
    assert out.label == "biased"


def test_states_are_those_of_generate() -> None:
    chain = chain_of(THETA, 6, eta=0.7)
    out = chain.surrogate(cost, Independent(3), range(5), (2,), dtype=torch.float64)
    same = generate(Affine(THETA), ReverseKernel(eta=0.7), grid(6), (2,), 5, Independent(3), dtype=torch.float64)
    assert torch.equal(out.samples, same)
    assert torch.equal(out.costs, cost(same))
    assert float(out.loss) == pytest.approx(float(cost(same).mean()))


def test_as_sites_of_a_program() -> None:
    """`s.markov` with the chain's kernels: certified, and the same numbers as the batch."""
    steps = 3

    def program(theta: Tensor, s: Sites) -> None:
        chain = chain_of(theta, steps, end=0.1)
        rules = [Score(), Pathwise(), Score()]
        z = s.sample("z", torch.distributions.Normal(torch.zeros(1).double(), 1.0), Pathwise())
        x = s.markov("x", chain.distribution, steps, z, rules)
        s.cost("square", (x[0] - 1) ** 2)

    certificate = exact_moments(program, THETA)
    truth = grad(lambda th: closed(th, steps, 1.0, 0.1))(THETA)
    assert certificate.holds()
    assert torch.allclose(certificate.mean, truth, atol=1e-11)
    E = Expectation(program, n=4)
    g = grad(lambda th: E.surrogate(th, Independent(0), E.init(THETA))[0])(THETA)
    assert bool(torch.isfinite(g).all())


def test_score_with_leave_one_out() -> None:
    theta = THETA.clone().requires_grad_()
    chain = chain_of(theta, 4)
    out = chain.surrogate(
        cost, Independent(0), range(4000), (1,), rules="score", baseline=LeaveOneOut(), dtype=torch.float64
    )
    out.loss.backward()
    truth = grad(lambda th: closed(th, 4, 1.0, 0.0))(THETA)
    assert theta.grad is not None
    assert torch.allclose(theta.grad, truth, atol=0.15)
    assert out.log_prob.shape == (4000,)


def test_bad_input() -> None:
    chain = chain_of(THETA, 3)
    run: dict[str, Any] = {"cost": cost, "source": Independent(0), "index": [0], "shape": (1,)}
    with pytest.raises(ValueError, match="2 rules for 3 steps"):
        chain.surrogate(**run, rules=("score", "score"))
    with pytest.raises(ValueError, match="adds no noise"):
        chain.surrogate(**run, rules=("score", "score", "score"))
    with pytest.raises(ValueError, match="rule 'reinforce'"):
        chain.surrogate(**run, rules=("score", "reinforce", "pathwise"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="checkpoint is -1"):
        chain.surrogate(**run, checkpoint=-1)
    with pytest.raises(ValueError, match="one number a chain"):
        chain.surrogate(lambda x: x, Independent(0), [0], (1,))
    with pytest.raises(ValueError, match="k is 4"):
        chain.last(4)
    with pytest.raises(ValueError, match="keep is 0"):
        Roulette(0.0)
    with pytest.raises(ValueError, match="not a diagonal Gaussian"):
        chain.distribution(2, torch.zeros(1).double())
