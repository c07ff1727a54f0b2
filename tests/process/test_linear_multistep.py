"""DPM-Solver++(2M), UniPC, SA-Solver: weights, limits, parity with diffusers, order of the mean and of the law."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from torch import Tensor

from lowvar.process.discrete import schedule_from_diffusers
from lowvar.process.dpm_solver_pp import DPMSolverPP
from lowvar.process.grid import trailing
from lowvar.process.heun import Heun
from lowvar.process.kernel import ReverseKernel
from lowvar.process.linear_multistep import LinearMultistep, LinearStep, moments
from lowvar.process.multistep import MultistepSolver
from lowvar.process.noise import Independent, NoiseSource, TorchGenerators
from lowvar.process.posterior import Posterior
from lowvar.process.sa_solver import SASolver
from lowvar.process.schedule import VE, CosineVP, Flow, Level, Schedule
from lowvar.process.solver import Solver
from lowvar.process.unipc import UniPC
from lowvar.sample import trajectory
from lowvar.testing import Moments, affine_law, anisotropic_gaussian, mixture2

TARGET = mixture2()
X = Independent(3).normal(range(5), (2,), dtype=torch.float64)
ALWAYS = (0.0, 1.0)
SOLVERS: dict[str, LinearMultistep] = {
    "2m": DPMSolverPP(),
    "2m heun": DPMSolverPP("heun"),
    "2m eta": DPMSolverPP(eta=0.3),
    "2m sde": DPMSolverPP("heun", eta=1.0),
    "unipc-1": UniPC(1),
    "unipc": UniPC(),
    "unipc bh1": UniPC(2, "bh1"),
    "unipc-3 eta": UniPC(3, eta=0.6),
    "sa": SASolver(),
    "sa 3-4": SASolver(3, 4, 0.7, ALWAYS),
    "sa exact": SASolver(2, 3, 1.0, ALWAYS, "exact"),
    "sa predictor": SASolver(3, 0, 0.2, ALWAYS),
}
SCHEDULES: dict[str, Schedule] = {
    "cosine": CosineVP(),
    "ve": VE(),
    "flow": Flow(3.0),
    "table": schedule_from_diffusers({}),
}


def final(schedule: Schedule, solver: Solver, x: Tensor, grid: Tensor, noise: NoiseSource | None = None) -> Tensor:
    for state, _ in trajectory(TARGET.denoiser(schedule, None), solver, grid, x, noise):
        x = state.x
    return x


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("H", [1e-8, 0.01, 0.999, 1.001, 4.0, 60.0])
def test_moments_are_the_integrals(H: float) -> None:
    for n, p in enumerate(moments(H, 4)):

        def integrand(theta: float, n: int = n) -> float:
            return H * math.exp(-H * (1 - theta)) * theta**n

        expected = quad(integrand, 0, 1, epsabs=0, epsrel=1e-12)[0]
        assert p == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_steps_belong_to_the_kernel_family(schedule: Schedule, solver: LinearMultistep) -> None:
    """sum of weights = kappa, a^2 sigma_t^2 + lambda^2 = sigma_s^2, and the correction moves nothing that is constant:
    for x0_hat constant along the path the step is exact."""
    levels = schedule.at(trailing(schedule, 6))
    for k, step in enumerate(solver.prepare(levels)):
        t, s = levels[k], levels[k + 1]
        assert sum(step.weights) == pytest.approx(float(s.alpha - t.alpha * step.a), rel=1e-10, abs=1e-12)
        assert step.a**2 * float(t.sigma) ** 2 + step.lambda2 == pytest.approx(
            float(s.sigma) ** 2, rel=1e-12, abs=1e-14
        )
        assert sum(step.correction) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("schedule", [CosineVP(), VE(), Flow()], ids=lambda s: s.family)
@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("q", "c"), [(1, 0), (2, 2), (3, 4)])
def test_exact_adams_is_the_multistep_solver_without_twin(schedule: Schedule, tau: float, q: int, c: int) -> None:
    """Two derivations of one method: moments in theta here, Gauss-Legendre quadrature in l there."""
    grid = torch.tensor([0.95, 0.8, 0.55, 0.3, 0.1], dtype=torch.float64)
    ours, house = SASolver(q, c, tau, ALWAYS, "exact"), MultistepSolver(None, q, c, tau)
    noise = Independent(5)
    torch.testing.assert_close(
        final(schedule, ours, X, grid, noise), final(schedule, house, X, grid, noise), rtol=1e-9, atol=1e-9
    )


def test_papers_agree_where_they_say_so() -> None:
    """UniP-2 bh2 is 2M midpoint; SA-Solver at tau = 0 is UniP-2 and UniC-1 with bh1; eta and tau agree at 0 and 1."""
    levels = CosineVP().at(torch.tensor([0.9, 0.7, 0.4, 0.3, 0.1], dtype=torch.float64))
    for one, two in zip(UniPC().prepare(levels), DPMSolverPP().prepare(levels), strict=True):
        assert one.weights == pytest.approx(two.weights)
    for one, two in zip(SASolver(tau=0.0).prepare(levels), UniPC(2, "bh1").prepare(levels), strict=True):
        assert one.weights == pytest.approx(two.weights)
    assert SASolver(1, 2, 0.0).prepare(levels)[1].correction == pytest.approx(
        UniPC(1, "bh1").prepare(levels)[1].correction
    )
    for one, two in zip(SASolver(2, 3, 1.0, ALWAYS).prepare(levels), UniPC(2, "bh1", 1.0).prepare(levels), strict=True):
        assert (one.a, one.lambda2, *one.weights) == pytest.approx((two.a, two.lambda2, *two.weights))


def test_first_order_step_is_the_kernel() -> None:
    schedule, noise = CosineVP(), Independent(2)
    grid = torch.tensor([0.7, 0.4], dtype=torch.float64)
    for eta in (0.0, 0.4, 1.0):
        for variance, covariance in (("small", False), ("posterior", True)):
            kernel, solver = ReverseKernel(eta, variance), DPMSolverPP(eta=eta, covariance=covariance)  # type: ignore[arg-type]
            results = []
            for s in (kernel, solver):
                *_, (state, _) = trajectory(TARGET.denoiser(schedule), s, grid, X, noise)
                results.append(state.x)
            torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)


# -------------------------------------------------------------------------------------------------------------- parity

INDICES = [999, 800, 700, 450, 300, 199, 120, 40]
TABLE = schedule_from_diffusers({})


def times_of(indices: Sequence[int]) -> Tensor:
    return (torch.tensor(indices, dtype=torch.float64) + 1) / 1000


GRID = times_of(INDICES)

numpy_warning = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' own, under NumPy 2


def peer(
    name: str,
    fields: dict,
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    indices: Sequence[int] = INDICES,
) -> Tensor:
    """A diffusers scheduler's own `step` on our sigmas in float64, the exact posterior mean as its prediction."""
    import diffusers

    levels = TABLE.at(times_of(indices))
    scheduler = getattr(diffusers, name)(prediction_type="sample", lower_order_final=False, **fields)
    scheduler.num_inference_steps = len(indices) - 1
    scheduler.timesteps, scheduler.sigmas = torch.tensor(indices[:-1]), torch.exp(-levels.logsnr / 2)
    scheduler._step_index = 0
    x = X
    for k, t in enumerate(scheduler.timesteps):
        extra: dict = {} if generator is None else {"generator": generator}
        if noise is not None:
            extra["variance_noise"] = noise.normal(range(len(X)), (2,), draw=k + 1, dtype=torch.float64)
        x = scheduler.step(TARGET.posterior(x, levels[k], None).mean, t, x, **extra, return_dict=False)[0]
    return x


@numpy_warning
@pytest.mark.parametrize("weights", ["midpoint", "heun"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpm_solver_is_diffusers(weights, eta: float) -> None:
    """To 1e-6: diffusers' DPM-Solver++ casts the sample to float32 in every step."""
    noise = Independent(9)
    fields = {"solver_type": weights, "final_sigmas_type": "sigma_min"}  # "zero" makes the last step first-order
    if eta:
        fields["algorithm_type"] = "sde-dpmsolver++"
    theirs = peer("DPMSolverMultistepScheduler", fields, noise if eta else None)
    torch.testing.assert_close(final(TABLE, DPMSolverPP(weights, eta), X, GRID, noise), theirs, rtol=0, atol=1e-6)


@numpy_warning
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_unipc_is_diffusers(variant, p: int) -> None:
    theirs = peer("UniPCMultistepScheduler", {"solver_type": variant, "solver_order": p})
    torch.testing.assert_close(final(TABLE, UniPC(p, variant), X, GRID), theirs, rtol=0, atol=1e-12)


ENDS = [999, 801, 800, 700, 450, 300, 200, 199, 120, 40]


@numpy_warning
@pytest.mark.parametrize("indices", [INDICES, ENDS, [801, 799, 201, 40], [900, 800, 300, 200, 40]], ids=str)
@pytest.mark.parametrize(("q", "c"), [(1, 2), (2, 2), (2, 3), (3, 4)])
def test_sa_solver_is_diffusers(q: int, c: int, indices: list[int]) -> None:
    """The same draws from one generator; tau = 1 from timestep 800 to 200, the ends included, as by diffusers' default
    and ours."""
    fields = {"predictor_order": q, "corrector_order": c}
    theirs = peer("SASolverScheduler", fields, generator=torch.Generator().manual_seed(5), indices=indices)
    noise = TorchGenerators(torch.Generator().manual_seed(5))
    torch.testing.assert_close(final(TABLE, SASolver(q, c), X, times_of(indices), noise), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("T", [250, 1000, 4000])
def test_sa_solver_has_noise_where_diffusers_has(T: int) -> None:
    """Every timestep of a table, however its time was computed: 200 <= n <= 800."""
    schedule = schedule_from_diffusers({"num_train_timesteps": T})
    solver = SASolver(between=(201 / T, min(801 / T, 1.0)))
    theirs = [200 <= n <= 800 for n in range(T)]
    for times in (schedule.time_of(torch.arange(T)), torch.linspace(0, 1, T + 1, dtype=torch.float64)[1:]):
        assert [solver.rho(float(t), 0.1) < 1 for t in times] == theirs
    assert T != 1000 or solver == SASolver()


# --------------------------------------------------------------------------------------------------------------- order


def exact_ode(schedule: Schedule, x: Tensor, l_t: float, l_s: float) -> Tensor:
    """dy/dl = e^l x0_hat, y = x / sigma, by an adaptive Runge-Kutta method of order 8."""

    def rate(l: float, y: np.ndarray) -> np.ndarray:
        level = schedule.level(2 * l)
        state = torch.from_numpy(y).reshape(x.shape) * level.sigma
        return (math.exp(l) * TARGET.posterior(state, level, None).mean).flatten().numpy()

    start = (x / schedule.level(2 * l_t).sigma).flatten().numpy()
    solution = solve_ivp(rate, (l_t, l_s), start, method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.from_numpy(solution.y[:, -1]).reshape(x.shape) * schedule.level(2 * l_s).sigma


def uniform_l(schedule: Schedule, span: tuple[float, float], steps: int) -> Tensor:
    return schedule.time(2 * torch.linspace(*span, steps + 1, dtype=torch.float64))


NEAR, FAR = (-1.0, 2.0), (-4.0, 2.0)
ODE = [DPMSolverPP(), DPMSolverPP("heun"), UniPC(1), UniPC(), UniPC(2, "bh1"), UniPC(3), SASolver(tau=0.0)]
ODE += [SASolver(3, 3, 0.0), SASolver(3, 4, 0.0), SASolver(2, 0, 0.0), Heun()]


@pytest.fixture(scope="module")
def truth() -> dict[tuple[float, float], Tensor]:
    return {span: exact_ode(CosineVP(), X, *span) for span in (NEAR, FAR)}


@pytest.mark.parametrize("solver", ODE, ids=repr)
@pytest.mark.parametrize("span", [NEAR, FAR], ids=["from the middle", "from noise"])
def test_declared_order_on_a_mixture(solver: Solver, span, truth) -> None:
    """At least the declared order, less .2 (pre-asymptotic); from the middle at most 3, which the first step allows."""
    steps = (60, 120)
    errors = [float((final(CosineVP(), solver, X, uniform_l(CosineVP(), span, n)) - truth[span]).norm()) for n in steps]
    order = math.log2(errors[0] / errors[1])
    assert order > min(solver.order, 3 if span is NEAR else 9) - 0.2
    if solver.order < 4:
        assert order < solver.order + 0.5


GAUSSIAN = anisotropic_gaussian((3,), ratio=100.0)


def error_of_law(solver: Solver, steps: int, span: tuple[float, float] = (-2.0, 2.0)) -> tuple[float, float]:
    """Largest errors of mean and covariance at the last level, started from the exact marginal."""
    schedule = CosineVP()
    grid = uniform_l(schedule, span, steps)
    law = affine_law(GAUSSIAN.denoiser(schedule), solver, grid, GAUSSIAN.marginal(schedule.at(grid[0])))
    end = Moments.of(GAUSSIAN.marginal(schedule.at(grid[-1])))
    return float((law.mean - end.mean).abs().max()), float((law.covariance - end.covariance).abs().max())


STOCHASTIC = [DPMSolverPP(eta=e, covariance=c) for e, c in itertools.product((0.0, 0.5, 1.0), (False, True))]
STOCHASTIC += [UniPC(eta=0.5), UniPC(eta=1.0), UniPC(covariance=True), UniPC(1, eta=0.5, covariance=True)]
STOCHASTIC += [SASolver(tau=0.5, between=ALWAYS), SASolver(between=ALWAYS), SASolver(3, 3, 1.0, ALWAYS)]
STOCHASTIC += [Heun(), Heun(5.0, schedule=CosineVP())]


@pytest.mark.parametrize("solver", STOCHASTIC, ids=repr)
def test_declared_order_of_the_law_on_a_gaussian(solver: Solver) -> None:
    """The mean is exact, the covariance of the declared order, whatever the noise."""
    coarse, fine = error_of_law(solver, 40), error_of_law(solver, 80)
    assert max(coarse[0], fine[0]) < 1e-12
    assert math.log2(coarse[1] / fine[1]) > solver.order - 0.15


class Everywhere(DPMSolverPP):
    """The mistake that the module warns of: kappa^2 C in steps of two posteriors as well."""

    def prepare(self, levels: Level) -> list[LinearStep]:
        kappa = [float(levels.alpha[k + 1] - levels.alpha[k] * s.a) for k, s in enumerate(super().prepare(levels))]
        return [replace(s, kappa2=v**2) for s, v in zip(super().prepare(levels), kappa, strict=True)]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_second_differences_carry_kappa2_C(eta: float) -> None:
    """kappa^2 C in every step costs an order of the covariance, and the excess is kappa^2 C to leading order."""
    wrong, right = Everywhere(eta=eta, covariance=True), DPMSolverPP(eta=eta)
    errors = [error_of_law(wrong, n)[1] for n in (40, 80)]
    assert 0.8 < math.log2(errors[0] / errors[1]) < 1.2
    assert errors[1] > 20 * error_of_law(right, 80)[1]


def test_one_posterior_leaves_exactly_kappa2_C() -> None:
    """A first step of any length has the exact marginal covariance with covariance=True; without it lacks kappa^2 C."""
    for eta, span in itertools.product((0.0, 0.7, 1.0), ((-3.0, 0.0), (-0.5, 2.0))):
        assert error_of_law(DPMSolverPP(eta=eta, covariance=True), 1, span)[1] < 1e-10
        assert error_of_law(DPMSolverPP(eta=eta), 1, span)[1] > 1e-2
    schedule = CosineVP()
    levels = schedule.at(torch.tensor([1.0, 0.7, 0.4, 0.2, 0.05], dtype=torch.float64))
    plan = {s: [step.kappa2 > 0 for step in s.prepare(levels)] for s in (DPMSolverPP(), UniPC(1), SASolver(1, 0, 0.5))}
    assert list(plan.values()) == [[True, False, False, False], [True, False, False, True], [True] * 4]
    too_late = UniPC(1).prepare(schedule.at(torch.tensor([0.9, 0.6, 0.4, 0.0], dtype=torch.float64)))
    assert [step.kappa2 > 0 for step in too_late] == [True, True, False]  # the second step is not corrected


# ---------------------------------------------------------------------------------------------------------------- rest


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_whole_chain_ends_in_the_posterior_mean(schedule: Schedule, solver: LinearMultistep) -> None:
    """From pure noise (flow) or not, to s = 0, whose step returns x0_hat; the laws say what was drawn."""
    grid, noise = trailing(schedule, 5), Independent(4)
    start = schedule.at(1.0)
    x, steps = X * float(start.sigma), []
    for k, (state, info) in enumerate(trajectory(TARGET.denoiser(schedule, None), solver, grid, x, noise)):
        z = noise.normal(range(5), (2,), draw=k + 1, dtype=torch.float64)
        if k < 4:
            torch.testing.assert_close(info.law.sample(z) if solver.stochastic else info.law.mean, state.x)
        steps.append((state, info))
    assert torch.equal(steps[-1][0].x, steps[-1][1].posterior.mean)
    assert all(bool(torch.isfinite(state.x).all()) for state, _ in steps)


def test_errors_name_what_is_allowed() -> None:
    for make, words in (
        (lambda: DPMSolverPP("simpson"), "midpoint, heun"),  # type: ignore[arg-type]
        (lambda: DPMSolverPP(eta=1.2), "eta is 1.2"),
        (lambda: UniPC(4), "allowed: 1, 2, 3"),
        (lambda: UniPC(2, "bh3"), "bh1, bh2"),  # type: ignore[arg-type]
        (lambda: UniPC(eta=-1.0), "eta is -1"),
        (lambda: SASolver(4), "predictor is 4"),
        (lambda: SASolver(2, 1), "corrector is 1"),
        (lambda: SASolver(tau=3.0), "tau is 3"),
        (lambda: SASolver(weights="bh2"), "bh1, exact"),  # type: ignore[arg-type]
        (lambda: SASolver(between=(0.9, 0.1)), "low <= high"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    schedule = CosineVP()
    grid = torch.tensor([0.9, 0.4, 0.2, 0.1], dtype=torch.float64)
    levels, solver = schedule.at(grid), DPMSolverPP(covariance=True)
    plan, posterior = solver.prepare(levels), Posterior(X)
    with pytest.raises(ValueError, match="calibrate one"):
        solver.step(plan, 0, solver.start(X), posterior, None)
    with pytest.raises(ValueError, match="from its first step"):
        solver.step(plan, 1, solver.start(X), posterior, None)
