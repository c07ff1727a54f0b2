"""Calibrated noise: exact on Gaussians in closed form, its estimate within its error, nothing added for nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowvar.calibrate import MarginalDeficit, marginal_deficit
from lowvar.calibrate.deficit import describe, shrink
from lowvar.errors import UserError
from lowvar.process import (
    CosineVP,
    Denoiser,
    DPMSolverPP,
    GaussianTwin,
    Heun,
    Independent,
    MatrixBasis,
    MultistepSolver,
    PixelBasis,
    Posterior,
    ReverseKernel,
    SASolver,
    Schedule,
    Solver,
    UniPC,
    WithNoise,
)
from lowvar.process.grid import trailing
from lowvar.process.schedule import VE, Flow, Level
from lowvar.sample import generate
from lowvar.testing import Moments, affine_law, anisotropic_gaussian, mixture8, rotation

TARGET = anisotropic_gaussian((4,), ratio=100.0)
DDIM = ReverseKernel(0.0, "small")


def exact_deficit(schedule: Schedule, grid: Tensor) -> Tensor:
    """kappa^2 C along the eigenvectors after each step of DDIM, from the formulas; (K, 4)."""
    levels, c = schedule.at(grid), TARGET.twin.spectrum
    rows = []
    for k in range(len(grid) - 1):
        a = levels.sigma[k + 1] / levels.sigma[k]
        kappa = levels.alpha[k + 1] - levels.alpha[k] * a
        rows.append(kappa**2 * c * levels.sigma[k] ** 2 / (levels.alpha[k] ** 2 * c + levels.sigma[k] ** 2))
    return torch.stack(rows)


def marginals(schedule: Schedule, grid: Tensor) -> Tensor:
    """The variances that the forward process has after each step, (K, 4)."""
    return torch.stack([TARGET.twin.marginal_variance(schedule.at(t), TARGET.mean) for t in grid[1:]])


@pytest.mark.parametrize("schedule", [CosineVP(), VE(), Flow()], ids=lambda s: s.family)
@pytest.mark.parametrize("steps", [2, 3, 5])
def test_restores_the_marginal_of_a_gaussian_exactly(schedule: Schedule, steps: int) -> None:
    grid = torch.linspace(1.0, 0.1, steps + 1, dtype=torch.float64)
    levels = schedule.at(grid)
    solver = WithNoise(DDIM, TARGET.twin.basis, levels.logsnr, exact_deficit(schedule, grid))
    start, end = (TARGET.marginal(levels[k]) for k in (0, -1))
    law = affine_law(TARGET.denoiser(schedule), solver, grid, start)
    assert law.distance(Moments.of(end)) < 1e-10
    assert affine_law(TARGET.denoiser(schedule), DDIM, grid, start).distance(Moments.of(end)) > 0.05


def test_measured_deficit_is_kappa2_C_within_its_error() -> None:
    """n = 8,192: the standard error of a variance w is w sqrt(2 / n) = .016 w, and 5 of them are allowed. With the
    noise the law of the output comes 10 times nearer to the marginal."""
    schedule, n = CosineVP(), 8192
    grid = torch.linspace(1.0, 0.1, 4, dtype=torch.float64)
    found = marginal_deficit(TARGET.denoiser(schedule), DDIM, grid, TARGET.twin, n=n, dtype=torch.float64)
    levels, exact, marginal = schedule.at(grid), exact_deficit(schedule, grid), marginals(schedule, grid)
    assert bool((found.variance >= 0).all())
    assert bool(((found.variance - exact).abs() < 5 * math.sqrt(2 / n) * marginal).all())
    start, end = (TARGET.marginal(levels[k]) for k in (0, -1))
    errors = [
        affine_law(TARGET.denoiser(schedule), s, grid, start).distance(Moments.of(end))
        for s in (DDIM, found.attach(DDIM))
    ]
    assert errors[1] < errors[0] / 10


class Wide(Denoiser):
    """A denoiser whose means are too far out and off by 0.3 along every axis."""

    def __init__(self, schedule: Schedule, scale: float, offset: float) -> None:
        self.schedule, self.scale, self.offset = schedule, scale, offset

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        return Posterior(self.scale * TARGET.twin.posterior(x, level).mean + self.offset)


def test_never_removes() -> None:
    """A chain that is too wide everywhere gets nothing; one that is too narrow along some directions, there only."""
    schedule = CosineVP()
    grid = torch.linspace(1.0, 0.1, 4, dtype=torch.float64)
    found = marginal_deficit(Wide(schedule, 2.0, 0.0), DDIM, grid, TARGET.twin, n=1024)
    marginal = torch.stack(
        [TARGET.twin.marginal_variance(level, found.variance) for level in map(schedule.at, grid[1:])]
    )
    wide = found.measured > 1.2 * marginal
    assert bool(wide.any())
    assert not bool((found.variance[wide] > 0).any())


@pytest.mark.parametrize("corrector", [0, 2])
def test_exact_chain_gets_almost_nothing(corrector: int) -> None:
    """The twin's own solver is exact, its corrector changes nothing: what is added is sampling error that stands
    out of itself, below .05 w (2.3 se), and most entries get nothing."""
    schedule, n = CosineVP(), 4096
    grid = torch.linspace(1.0, 0.1, 5, dtype=torch.float64)
    solver = MultistepSolver(TARGET.twin, 2, corrector)
    found = marginal_deficit(TARGET.denoiser(schedule), solver, grid, TARGET.twin, n=n)
    marginal = torch.stack(
        [TARGET.twin.marginal_variance(level, found.variance) for level in map(schedule.at, grid[1:])]
    )
    share = found.variance / marginal
    assert float(share.max()) < 0.05
    assert float((share == 0).double().mean()) > 0.6


def test_centre_takes_the_shift_away() -> None:
    schedule = CosineVP()
    grid = torch.linspace(1.0, 0.1, 4, dtype=torch.float64)
    denoiser = Wide(schedule, 1.0, 0.3)
    found = marginal_deficit(denoiser, DDIM, grid, TARGET.twin, n=4096, centre=True)
    for centre, expected in ((False, 0.1), (True, None)):
        solver = found.attach(DDIM, centre=centre)
        x = generate(denoiser, solver, grid, (4,), 4096, Independent(5))
        end = schedule.at(grid[-1])
        off = (x.double().mean(0) - end.alpha * TARGET.mean).abs().max()
        standard_error = math.sqrt(float(TARGET.twin.marginal_variance(end, TARGET.mean).max()) / 4096)
        if expected is None:
            assert off < 6 * standard_error  # two samples of 4,096: sqrt(2) x 4 of their errors
        else:
            assert off > expected


def test_shrinking_beats_the_raw_estimate_and_vanishes() -> None:
    """Mean square error over 20,000 draws of d = D + N(0, 1), that of d itself being 1: the garrote's known risk is .34
    at D = 0 and at most 1.47 (near D = 2); its bias vanishes like 1 / D."""
    z = Independent(0).normal(range(20_000), (), dtype=torch.float64)
    one = torch.ones_like(z)
    error = {D: float(((shrink(D + z, one) - D) ** 2).mean()) for D in (0.0, 1.0, 2.0, 4.0, 10.0)}
    assert error[0.0] < 0.4
    assert max(error.values()) < 1.5
    assert abs(float(shrink(10 + z, one).mean()) - 9.9) < 0.05


@pytest.mark.parametrize("end", [(), (0.0,)], ids=["last-noisy", "output"])
@pytest.mark.parametrize(
    ("solver", "lacks"),
    [
        (DPMSolverPP(), True),
        (UniPC(), True),
        (ReverseKernel(1.0, "small"), True),
        (SASolver(), False),
        (MultistepSolver(None, 2, 2), False),
    ],
    ids=lambda v: describe(v) if isinstance(v, Solver) else "",
)
def test_any_solver_on_a_mixture(solver: Solver, lacks: bool, end: tuple[float, ...]) -> None:
    """The rms relative error of the variances, too much counted like too little, at the last noisy level and of the
    posterior means returned from there. Chains that lack variance lose more than half of it. Two already end with too
    much (SA-Solver twice the truth): theirs is not increased, by more than a standard error (.03 with n = 2,048)."""
    target, schedule = mixture8(), CosineVP()
    grid = torch.tensor([1.0, 0.6, 0.3, 0.1, *end], dtype=torch.float64)
    denoiser, noisy = target.denoiser(schedule, None), schedule.at(0.1)
    found = marginal_deficit(denoiser, solver, grid, target.twin, n=2048)
    truth = target.twin.marginal_variance(noisy, torch.zeros(8))
    if end:
        z = Independent(9).normal(range(16_384), (8,))
        x0 = target.sample(range(16_384), Independent(8)).to(z)
        x = float(noisy.alpha) * x0 + float(noisy.sigma) * z
        truth = target.twin.rotate(denoiser(x, noisy).mean, schedule.at(0.0)).var(0)

    def error(s: Solver) -> float:
        c = target.twin.rotate(generate(denoiser, s, grid, (8,), 4096, Independent(6)), schedule.at(grid[-1]))
        return float(((c.var(0) - truth) / truth).square().mean().sqrt())

    before, after = error(solver), error(found.attach(solver))
    assert after < (0.5 * before if lacks else before + 0.03)


@pytest.mark.parametrize(
    "solver", [UniPC(), UniPC(eta=0.3), MultistepSolver(None, 2, 2), MultistepSolver(None, 2, 3)], ids=describe
)
def test_corrected_states_have_the_marginal_of_a_gaussian(solver: Solver) -> None:
    """Along every direction that was given noise, the state after the corrector has the true variance: within 5
    standard errors of two samples of 8,192, .11 of it. The states that the network is asked at need not."""
    schedule, n = CosineVP(), 8192
    denoiser, grid = TARGET.denoiser(schedule), torch.linspace(1.0, 0.05, 4, dtype=torch.float64)
    found = marginal_deficit(denoiser, solver, grid, TARGET.twin, n=n, dtype=torch.float64, batch_size=n)
    chain, levels = found.attach(solver), schedule.at(grid)
    draws = [Independent(7).normal(range(n), (4,), draw=k, dtype=torch.float64) for k in range(4)]
    plan, state, seen = chain.prepare(levels), chain.start(draws[0]), 0
    for k in range(3):
        posterior = denoiser(state.x, levels[k])
        if chain.corrects(plan, k):
            given = found.variance[k - 1] > 0
            x = TARGET.twin.rotate(chain.corrected(plan, k, state, posterior), levels[k])
            ratio = x.var(0) / TARGET.twin.marginal_variance(levels[k], TARGET.mean)
            assert bool(((ratio - 1).abs() < 0.11)[given].all())
            seen += int(given.sum())
        state, _ = chain.step(plan, k, state, posterior, draws[k + 1])
    assert seen >= 3  # of 8; noise is .07 to .27 of the prediction's variance there


@pytest.mark.parametrize("steps", [4, 6])
def test_the_corrector_does_not_fill_the_deficit_twice(steps: int) -> None:
    """Output variance of UniPC-2 against that of the exact chain (the twin's own solver), rms over a spectrum from
    10^-1.5 to 10. With exact deficits it is .030 and .045 (.206 and .088 without noise; .22 and .17 if what the
    prediction lacks is added); n = 8,192 moves a variance by .016."""
    schedule, c = CosineVP(), torch.logspace(-1.5, 1, 6, dtype=torch.float64)
    twin = GaussianTwin(torch.zeros(6, dtype=torch.float64), PixelBasis((6,)), c)
    denoiser, grid = twin.denoiser(schedule), torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    found = marginal_deficit(denoiser, UniPC(), grid, twin, n=8192, dtype=torch.float64, batch_size=8192)
    exact, plain, noisy = (
        affine_law(denoiser, s, grid, twin.marginal(schedule.at(1.0))).covariance.diagonal()
        for s in (MultistepSolver(twin, 1, 0), UniPC(), found.attach(UniPC()))
    )
    error = ((noisy - exact) / exact).square().mean().sqrt()
    assert error < 0.06 < ((plain - exact) / exact).square().mean().sqrt()


def test_own_noise_and_added_noise_are_one_gaussian() -> None:
    """Variances add: isotropic noise, noise in the same basis, none; other noise is refused."""
    schedule, basis = CosineVP(), TARGET.twin.basis
    grid = torch.tensor([0.8, 0.4], dtype=torch.float64)
    levels, extra = schedule.at(grid), torch.tensor([[0.1, 0.0, 0.5, 0.2]], dtype=torch.float64)
    for own in (DPMSolverPP(eta=0.6), ReverseKernel(0.5), ReverseKernel(0.0, "small"), MultistepSolver(None)):
        start = TARGET.marginal(levels[0])
        one = affine_law(TARGET.denoiser(schedule), own, grid, start)
        two = affine_law(TARGET.denoiser(schedule), WithNoise(own, basis, levels.logsnr, extra), grid, start)
        added = basis.matrix() @ torch.diag(extra[0]) @ basis.matrix().T
        torch.testing.assert_close(two.covariance, one.covariance + added, rtol=0, atol=1e-12)
        torch.testing.assert_close(two.mean, one.mean, rtol=0, atol=1e-12)
    other = MatrixBasis(rotation(4, 9), (4,))
    for own, where in ((ReverseKernel(0.5), other), (MultistepSolver(None, tau=0.5), basis)):
        solver = WithNoise(own, where, levels.logsnr, extra)
        with pytest.raises(ValueError, match="neither isotropic nor in the calibrated basis"):
            affine_law(TARGET.denoiser(schedule), solver, grid, TARGET.marginal(levels[0]))


def test_the_step_to_data_adds_nothing_and_batches_do_not_matter() -> None:
    schedule = CosineVP()
    grid = trailing(schedule, 3)
    made = [
        marginal_deficit(TARGET.denoiser(schedule), DDIM, grid, TARGET.twin, n=300, batch_size=b, dtype=torch.float64)
        for b in (300, 64)
    ]
    torch.testing.assert_close(made[0].variance, made[1].variance, rtol=1e-10, atol=1e-12)
    assert not bool(made[0].variance[-1].any() | made[0].shift[-1].any())
    assert bool(made[0].variance[0].any())


def test_written_and_read_again() -> None:
    schedule = Flow()  # starts from pure noise: logsnr -inf, and +inf at the end
    grid = trailing(schedule, 3)
    found = marginal_deficit(TARGET.denoiser(schedule), DDIM, grid, TARGET.twin, n=256)
    fields, tensors = found.to_json()
    again = MarginalDeficit.from_json(fields, tensors, TARGET.twin.basis)
    solvers = [d.attach(DDIM) for d in (found, again)]
    samples = [generate(TARGET.denoiser(schedule), s, grid, (4,), 8) for s in solvers]
    torch.testing.assert_close(samples[0], samples[1], rtol=1e-6, atol=1e-6)
    assert again.n == 256
    with pytest.raises(UserError, match="incomplete"):
        MarginalDeficit.from_json(fields, {}, TARGET.twin.basis)
    with pytest.raises(UserError, match="basis"):
        MarginalDeficit.from_json(fields, tensors, PixelBasis((4,)))


def test_noise_belongs_to_a_solver_and_a_grid() -> None:
    schedule = CosineVP()
    grid = trailing(schedule, 3)
    found = marginal_deficit(TARGET.denoiser(schedule), DDIM, grid, TARGET.twin, n=64)
    with pytest.raises(UserError, match="calibrated for ReverseKernel"):
        found.attach(UniPC())
    for other in (trailing(schedule, 4), torch.tensor([1.0, 0.5, 0.2, 0.0])):
        with pytest.raises(ValueError, match="other levels"):
            found.attach(DDIM).prepare(schedule.at(other))
    with pytest.raises(ValueError, match="one evaluation a step"):
        marginal_deficit(TARGET.denoiser(schedule), Heun(), grid, TARGET.twin, n=64)
    with pytest.raises(ValueError, match="at least 2"):
        marginal_deficit(TARGET.denoiser(schedule), DDIM, grid, TARGET.twin, n=1)
    with pytest.raises(ValueError, match="has shape"):
        WithNoise(DDIM, TARGET.twin.basis, schedule.at(grid).logsnr, torch.zeros(2, 4))
    assert "twin=GaussianTwin" in describe(MultistepSolver(GaussianTwin(*_unit())))


def _unit() -> tuple[Tensor, PixelBasis, Tensor]:
    return torch.zeros(2), PixelBasis((2,)), torch.ones(2)
