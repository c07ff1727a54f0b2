"""The twin's solver: its order on a mixture, its weights, its limits (DPM-Solver++), its noise.

Exactness on Gaussian data is in test_gaussian_exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from torch import Tensor

from lowvar.process.basis import MatrixBasis, PixelBasis
from lowvar.process.flow import TwinFlow
from lowvar.process.kernel import ReverseKernel
from lowvar.process.multistep import MultistepPlan, MultistepSolver
from lowvar.process.noise import Independent
from lowvar.process.schedule import VE, CosineVP, Flow, Level, Schedule
from lowvar.process.solver import Solver, State
from lowvar.process.twin import GaussianTwin
from lowvar.sample import trajectory
from lowvar.testing import mixture2, rotation

TARGET = mixture2()
X = Independent(3).normal(range(6), (2,), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- order of convergence


def grid_in_l(schedule: Schedule, l_t: float, l_s: float, steps: int) -> Tensor:
    return schedule.time(2 * torch.linspace(l_t, l_s, steps + 1, dtype=torch.float64))


def exact_ode(schedule: Schedule, x: Tensor, l_t: float, l_s: float) -> Tensor:
    """dy/dl = e^l x0_hat, y = x / sigma, by an adaptive Runge-Kutta method of order 8."""

    def rate(l: float, y: np.ndarray) -> np.ndarray:
        level = schedule.level(2 * l)
        state = torch.from_numpy(y).reshape(x.shape) * level.sigma
        return (math.exp(l) * TARGET.posterior(state, level, None).mean).flatten().numpy()

    start = (x / schedule.level(2 * l_t).sigma).flatten().numpy()
    solution = solve_ivp(rate, (l_t, l_s), start, method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.from_numpy(solution.y[:, -1]).reshape(x.shape) * schedule.level(2 * l_s).sigma


def final(schedule: Schedule, solver: Solver, x: Tensor, grid: Tensor) -> Tensor:
    for state, _ in trajectory(TARGET.denoiser(schedule, None), solver, grid, x):
        x = state.x
    return x


def slope(schedule: Schedule, solver: Solver, l_t: float, l_s: float, steps: tuple[int, ...], truth: Tensor) -> float:
    """Least-squares slope of log error against log step size."""
    errors = [float((final(schedule, solver, X, grid_in_l(schedule, l_t, l_s, n)) - truth).norm()) for n in steps]
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


PAIRS = [(1, 0), (2, 0), (3, 0), (1, 2), (2, 2), (2, 3), (3, 4)]
FAR = (-4.0, 2.0)  # from almost pure noise, where the remainder of the twin vanishes
NEAR = (-1.0, 2.0)  # from the middle of the process


@pytest.fixture(scope="module")
def truths() -> Callable[[Schedule, tuple[float, float]], Tensor]:
    kept: dict[tuple[Schedule, tuple[float, float]], Tensor] = {}

    def find(schedule: Schedule, span: tuple[float, float]) -> Tensor:
        if (schedule, span) not in kept:
            kept[schedule, span] = exact_ode(schedule, X, *span)
        return kept[schedule, span]

    return find


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("q", "c"), PAIRS)
def test_declared_order(q: int, c: int, decay: float, truths) -> None:
    schedule = CosineVP()
    solver = MultistepSolver(TARGET.twin, q, c, decay=decay)
    measured = slope(schedule, solver, *FAR, (80, 160), truths(schedule, FAR))
    assert measured > solver.order - 0.15


@pytest.mark.parametrize(("q", "c"), PAIRS)
def test_order_with_start_up(q: int, c: int, truths) -> None:
    """From a state whose remainder is not small, the first steps count: one step of order 1 leaves an error of h^2, and
    with a corrector (whose first use has two values) h^3. So orders above 2, and above 3 with a corrector, show only
    where the chain starts near pure noise, as reverse processes do."""
    schedule = CosineVP()
    solver = MultistepSolver(TARGET.twin, q, c)
    measured = slope(schedule, solver, *NEAR, (60, 120), truths(schedule, NEAR))
    assert measured > min(solver.order, 3 if c else 2) - 0.15


@pytest.mark.parametrize("schedule", [VE(), Flow(3.0)], ids=lambda s: s.family)
@pytest.mark.parametrize(("q", "c"), [(2, 0), (2, 3)])
def test_declared_order_of_other_families(schedule: Schedule, q: int, c: int, truths) -> None:
    solver = MultistepSolver(TARGET.twin, q, c)
    span = (-3.0, 2.0)
    assert slope(schedule, solver, *span, (60, 120), truths(schedule, span)) > solver.order - 0.15


@pytest.mark.parametrize(("q", "c"), [(1, 0), (2, 0), (1, 2), (2, 3)])
def test_declared_order_without_twin(q: int, c: int, truths) -> None:
    schedule = CosineVP()
    solver = MultistepSolver(None, q, c)
    assert slope(schedule, solver, *NEAR, (60, 120), truths(schedule, NEAR)) > solver.order - 0.15


def test_ddim_has_order_one(truths) -> None:
    schedule = CosineVP()
    kernel = ReverseKernel(0.0, "small")
    measured = slope(schedule, kernel, *NEAR, (60, 120), truths(schedule, NEAR))
    assert abs(measured - kernel.order) < 0.1


def test_twin_lowers_the_error_constant(truths) -> None:
    schedule = CosineVP()
    truth, grid = truths(schedule, FAR), grid_in_l(schedule, *FAR, 12)
    errors = {
        (twin is not None, q): float((final(schedule, MultistepSolver(twin, q), X, grid) - truth).norm())
        for twin in (None, TARGET.twin)
        for q in (1, 2)
    }
    assert errors[True, 1] < errors[False, 1] / 2
    assert errors[True, 2] < errors[False, 2]


# ---------------------------------------------------------------------------------------------------- weights and noise


def check_weights(solver: MultistepSolver, levels: Level, plan: MultistepPlan, k: int, tolerance: float = 1e-9) -> None:
    """Step k's weights against adaptive quadrature of the formula in the solver's module, direction by direction."""
    step = plan.steps[k]
    assert step is not None
    spectrum = torch.zeros(1) if solver.twin is None else solver.twin.spectrum.flatten()
    l = [float(v) / 2 for v in levels.logsnr]
    tau2, p = solver.tau**2, solver.decay
    old = l[k::-1]
    knots = {"predictor": old[: solver.predictor], "corrector": [l[k + 1], *old[: max(solver.corrector - 1, 0)]]}
    for name, nodes in knots.items():
        weights = step.predictor
        if name == "corrector":
            if step.correction is None:
                continue
            weights = step.correction.clone()  # corrector minus predictor, the new value first
            weights[1 : 1 + len(step.predictor)] += step.predictor
            weights = weights[: len(nodes)]
        rows = weights.reshape(len(weights), -1)
        assert len(rows) == len(nodes)
        for i, node in enumerate(nodes):
            for j, c in enumerate(spectrum.tolist()):

                def v(s: float, c: float = c) -> float:
                    return 1 + c * math.exp(2 * s)

                def integrand(
                    s: float, i: int = i, nodes: list[float] = nodes, v: Callable[[float], float] = v
                ) -> float:
                    phi = math.exp(-tau2 * (l[k + 1] - s)) * (v(l[k + 1]) / v(s)) ** ((1 + tau2) / 2)
                    lagrange = math.prod((s - o) / (nodes[i] - o) for m, o in enumerate(nodes) if m != i)
                    return (1 + tau2) * phi * math.exp(s) * v(s) ** -p * lagrange

                expected = v(node) ** p * quad(integrand, l[k], l[k + 1], epsabs=1e-13, epsrel=1e-12, limit=200)[0]
                assert float(rows[i, j]) == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("schedule", [CosineVP(), VE(), Flow()], ids=lambda s: s.family)
def test_weights_are_the_integrals(schedule: Schedule, tau: float, decay: float) -> None:
    twin = GaussianTwin(torch.zeros(3), PixelBasis((3,)), torch.tensor([0.0, 1.0, 25.0], dtype=torch.float64))
    levels = schedule.at(torch.tensor([0.95, 0.8, 0.55, 0.3, 0.1], dtype=torch.float64))
    for q, c in ((1, 0), (2, 2), (3, 4)):
        solver = MultistepSolver(twin, q, c, tau, decay)
        plan = solver.prepare(levels)
        for k in range(3):
            check_weights(solver, levels, plan, k)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_transition_and_noise_solve_the_linear_sde(tau: float) -> None:
    """dy = A y dl + sqrt(2) tau dW, A = -tau^2 + (1 + tau^2)(v - 1)/v: Phi and Var by a Runge-Kutta method; and the
    twin's own marginal variance v is kept: Var + Phi^2 v_t = v_s."""
    c, schedule = 3.0, CosineVP()
    twin = GaussianTwin(torch.zeros(1), PixelBasis((1,)), torch.tensor([c], dtype=torch.float64))
    levels = schedule.at(torch.tensor([0.8, 0.3, 0.0], dtype=torch.float64))
    l_t, l_s = (float(v) / 2 for v in levels.logsnr[:2])

    def rate(l: float, state: np.ndarray) -> np.ndarray:
        v = 1 + c * math.exp(2 * l)
        A = -(tau**2) + (1 + tau**2) * (v - 1) / v
        return np.array([A * state[0], 2 * A * state[1] + 2 * tau**2])

    phi, variance = solve_ivp(rate, (l_t, l_s), [1.0, 0.0], rtol=1e-11, atol=1e-13).y[:, -1]
    step = MultistepSolver(twin, 1, 0, tau).prepare(levels).steps[0]
    assert step is not None
    assert float(step.phi) == pytest.approx(phi, rel=1e-8)
    assert float(step.std) ** 2 == pytest.approx(variance, rel=1e-8, abs=1e-12)
    v_t, v_s = 1 + c * math.exp(2 * l_t), 1 + c * math.exp(2 * l_s)
    assert float(step.std) ** 2 + float(step.phi) ** 2 * v_t == pytest.approx(v_s, rel=1e-12)


def test_sde_solver_without_twin_is_the_ancestral_kernel() -> None:
    """tau = 1, order 1, no twin: the mean and noise of SDE-DPM-Solver++(1) = DDPM with beta_tilde (mean part)."""
    schedule = CosineVP()
    grid = torch.tensor([0.7, 0.4], dtype=torch.float64)
    z = Independent(1).normal(range(len(X)), (2,), dtype=torch.float64)
    levels = schedule.at(grid)
    posterior = TARGET.posterior(X, levels[0], None)
    solver, kernel = MultistepSolver(None, 1, 0, 1.0), ReverseKernel(1.0, "small")
    one, _ = solver.step(solver.prepare(levels), 0, solver.start(X), posterior, z)
    two, _ = kernel.step(kernel.prepare(levels), 0, kernel.start(X), posterior, z)
    torch.testing.assert_close(one.x, two.x, rtol=1e-10, atol=1e-10)


def test_step_to_clean_data_is_the_posterior_mean() -> None:
    schedule = CosineVP()
    for tau in (0.0, 1.0):
        grid = torch.tensor([0.6, 0.3, 0.0], dtype=torch.float64)
        *_, (state, info) = trajectory(TARGET.denoiser(schedule), MultistepSolver(TARGET.twin, 2, 2, tau), grid, X)
        assert torch.equal(state.x, info.posterior.mean)


def test_long_chains_use_the_newest_remainders() -> None:
    """Ten steps of order 1 are ten single steps (history must not leak)."""
    schedule = CosineVP()
    solver = MultistepSolver(TARGET.twin, 1, 0)
    grid = torch.linspace(0.95, 0.05, 11, dtype=torch.float64)
    x = X
    for k in range(10):
        x = final(schedule, solver, x, grid[k : k + 2])
    torch.testing.assert_close(final(schedule, solver, X, grid), x, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ limits: DPM-Solver++


def dpm_solver(schedule: Schedule, grid: Tensor, x: Tensor, order: int) -> Tensor:
    """diffusers' own update functions in float64 on the same sigmas (`solver_type="heun"`, no Euler step at last)."""
    from diffusers import DPMSolverMultistepScheduler

    peer = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_type="heun", lower_order_final=False)
    levels = schedule.at(grid)
    peer.sigmas = torch.exp(-levels.logsnr / 2)
    outputs: list[Tensor] = []
    for k in range(len(grid) - 1):
        peer._step_index = k
        outputs.append(TARGET.posterior(x, levels[k], None).mean)
        if order == 1 or k == 0:
            x = peer.dpm_solver_first_order_update(outputs[-1], sample=x)
        else:
            x = peer.multistep_dpm_solver_second_order_update(outputs[-2:], sample=x)
    return x


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("spectrum", [None, 0.0, 1e-12])
def test_vanishing_twin_is_dpm_solver(order: int, spectrum: float | None) -> None:
    schedule = CosineVP()
    mean = torch.tensor([0.3, -0.7], dtype=torch.float64)
    twin = None if spectrum is None else GaussianTwin(mean, PixelBasis((2,)), torch.full((2,), spectrum).double())
    grid = torch.linspace(0.98, 0.02, 9, dtype=torch.float64)
    ours = final(schedule, MultistepSolver(twin, order, 0), X, grid)
    torch.testing.assert_close(ours, dpm_solver(schedule, grid, X, order), rtol=1e-9, atol=1e-9)


def test_order_one_without_twin_is_ddim() -> None:
    for schedule in (CosineVP(), VE(), Flow()):
        grid = torch.tensor([0.95, 0.6, 0.2, 0.0], dtype=torch.float64)
        one = final(schedule, MultistepSolver(None, 1), X, grid)
        torch.testing.assert_close(one, final(schedule, ReverseKernel(0.0, "small"), X, grid), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_starts_from_pure_noise(tau: float) -> None:
    """alpha_1 = 0, where l = -inf: order 1 is the limit of starts just below; higher orders leave that knot out."""
    schedule = Flow()
    grids = [torch.tensor([t, 0.6, 0.3, 0.1], dtype=torch.float64) for t in (1.0, 1 - 1e-7)]
    one, two = (final(schedule, MultistepSolver(TARGET.twin, 1, 0, tau), X, grid) for grid in grids)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(final(schedule, MultistepSolver(TARGET.twin, 3, 4, tau), X, grids[0])).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"predictor": 0}, "1, 2, 3"), ({"corrector": 5}, "0 .none. to 4"), ({"tau": 1.5}, "ODE.* to 1")],
)
def test_errors_name_what_is_allowed(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultistepSolver(**arguments)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("corrector", "which"), [(0, []), (2, [1, 2]), (3, [1, 2])])
@pytest.mark.parametrize("with_twin", [False, True])
def test_a_step_goes_on_from_the_corrected_state(corrector: int, which: list[int], with_twin: bool) -> None:
    """y_{k+1} = Phi y + predictor remainders with y of `corrected`; a correction is due after every step but the last
    noisy one. The twin has a mean and a basis of its own."""
    mean = torch.tensor([0.7, -0.4], dtype=torch.float64)
    twin = GaussianTwin(mean, MatrixBasis(rotation(2, 3), (2,)), torch.tensor([2.0, 0.1], dtype=torch.float64))
    solver = MultistepSolver(twin if with_twin else None, 2, corrector, decay=0.5 * with_twin)
    denoiser = TARGET.denoiser(CosineVP(), None)
    levels = denoiser.schedule.at(torch.tensor([0.9, 0.7, 0.4, 0.2, 0.0], dtype=torch.float64))

    def y(x: Tensor, k: int) -> Tensor:
        centred = x - levels.alpha[k] * mean if with_twin else x
        return (twin.basis.forward(centred) if with_twin else centred) / levels.sigma[k]

    plan, state = solver.prepare(levels), solver.start(X)
    for k in range(3):
        posterior, step = denoiser(state.x, levels[k]), plan.steps[k]
        corrected = solver.corrected(plan, k, state, posterior)
        assert solver.corrects(plan, k) == (k in which) == (not torch.equal(corrected, state.x))
        state, _ = solver.step(plan, k, state, posterior, None)
        assert step is not None
        expected = step.phi * y(corrected, k)
        expected = expected + sum(w * r for w, r in zip(step.predictor, state.memory.values, strict=False))
        torch.testing.assert_close(y(state.x, k + 1), expected, rtol=1e-10, atol=1e-10)
    assert not any(solver.corrects(plan, k) for k in (3, 4))


# -------------------------------------------------------------------------------------- coefficients kept between steps


class CountingBasis(MatrixBasis):
    """Counts transforms to coefficients."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def kept(basis: MatrixBasis) -> list[Solver]:
    twin = GaussianTwin(
        torch.tensor([0.7, -0.4], dtype=torch.float64), basis, torch.tensor([2.0, 0.3], dtype=torch.float64)
    )
    return [MultistepSolver(twin, 2, 2), MultistepSolver(twin, 2, 0, 0.6), TwinFlow(twin)]


@pytest.mark.parametrize("number", range(3), ids=["ode", "sde", "flow"])
def test_coefficients_are_kept_only_for_the_state_they_belong_to(number: int) -> None:
    """A second step transforms x0_hat only, to the result of a state that is the same in value; a state changed in
    place, replaced, or of inference mode, is transformed again."""
    basis, schedule = CountingBasis(rotation(2, 5), (2,)), CosineVP()
    solver, levels, z = kept(basis)[number], schedule.at(torch.tensor([0.8, 0.5, 0.3, 0.1])), X.flip(0)
    plan, noises = solver.prepare(levels), 1 if number == 1 else 0

    def first() -> State:
        return solver.step(plan, 0, solver.start(X), TARGET.posterior(X, levels[0], None), z)[0]

    def second(state: State) -> Tensor:
        basis.calls = 0
        posterior = TARGET.posterior(state.x, levels[1], None)
        return solver.step(plan, 1, state, posterior, z)[0].x

    state = first()
    same = second(state)
    assert basis.calls == 1 + noises
    again = second(State(state.x.clone(), state.memory))
    assert basis.calls == 2 + noises
    torch.testing.assert_close(same, again, rtol=0, atol=1e-13)
    torch.testing.assert_close(second(state), same, rtol=0, atol=0)  # what is kept was not written over
    other = second(State(state.x + 0.25, state.memory))
    assert float((other - same).abs().max()) > 0.01
    state.x.add_(0.25)
    torch.testing.assert_close(second(state), other, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(second(first()), same, rtol=0, atol=1e-13)
        assert basis.calls == 2 + noises


@pytest.mark.parametrize("number", range(3), ids=["ode", "sde", "flow"])
def test_steps_are_differentiable_and_leave_their_arguments_alone(number: int) -> None:
    """Three steps written over their own memory only: gradients by finite differences, x, x0_hat and z unchanged."""
    schedule = CosineVP()
    levels, z = schedule.at(torch.tensor([0.8, 0.5, 0.3, 0.1])), X.flip(0)
    for solver in (kept(CountingBasis(rotation(2, 5), (2,)))[number], MultistepSolver(None, 2, 2)):
        plan = solver.prepare(levels)

        def run(x: Tensor, solver: Solver = solver, plan=plan) -> Tensor:
            state = solver.start(x)
            for k in range(3):
                posterior = TARGET.posterior(state.x, levels[k], None)
                held = [v.detach().clone() for v in (state.x, posterior.mean, z)]
                before, state = state, solver.step(plan, k, state, posterior, z)[0]
                for new, old in zip((before.x, posterior.mean, z), held, strict=True):
                    assert torch.equal(new, old)
            return state.x

        x = X.clone().requires_grad_()
        weight = torch.linspace(-1, 1, X.numel(), dtype=torch.float64).reshape(X.shape)
        (gradient,) = torch.autograd.grad((weight * run(x)).sum(), x)
        moved = [float((weight * (run(X + h * weight))).sum()) for h in (1e-6, -1e-6)]
        assert float((gradient * weight).sum()) == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-6)
