"""The laws catch known bugs: each is put back, and the check that should fail fails (and passes without it)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.process import kernel as kernel_module
from lowvar.process.covariance import Covariance, Diagonal, LowRankPlusDiagonal
from lowvar.process.discrete import DiscreteVP, schedule_from_diffusers
from lowvar.process.grid import trailing
from lowvar.process.kernel import ReverseKernel, StepCoefficients
from lowvar.process.matrix import Dense
from lowvar.process.multistep import MultistepSolver, _Step
from lowvar.process.noise import Antithetic, Independent, NoiseSource, TorchGenerators, philox
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import CosineVP, Flow, Level, Schedule
from lowvar.testing import Moments, affine_law, anisotropic_gaussian, mixture8
from lowvar.testing.laws import covariance as covariance_laws
from lowvar.testing.laws import kernel as kernel_laws
from lowvar.testing.laws import noise as noise_laws
from lowvar.testing.laws import schedule as schedule_laws

SCHEDULE = CosineVP()
MIXTURE = mixture8()
GAUSSIAN = anisotropic_gaussian((3,))


@contextlib.contextmanager
def caught():
    """The block must fail a law."""
    with pytest.raises(AssertionError):
        yield


# ------------------------------------------------------------------------------------------------------------- kernels

true_coefficients = kernel_module.step_coefficients


def wrong(change: Callable[[StepCoefficients, Level, Level, float], StepCoefficients]):
    def step_coefficients(t: Level, s: Level, eta: float = 1.0, *args: Any) -> StepCoefficients:
        return change(true_coefficients(t, s, eta, *args), t, s, eta)

    return step_coefficients


def r(t: Level, s: Level) -> Tensor:
    return -torch.expm1(t.logsnr - s.logsnr)


KERNEL_BUGS = {
    "sigma_t for sigma_s in the noise": lambda c, t, s, eta: replace(c, lambda2=eta**2 * t.sigma**2 * r(t, s)),
    "std for variance": lambda c, t, s, eta: replace(c, lambda2=c.lambda2**0.5),
    "eta for eta^2": lambda c, t, s, eta: replace(c, lambda2=eta * s.sigma**2 * r(t, s)),
    "kappa without alpha_t a": lambda c, t, s, eta: replace(c, kappa=s.alpha * torch.ones_like(c.a)),
    "kappa for kappa^2": lambda c, t, s, eta: replace(c, kappa2=c.kappa),
    "kappa^2 of the ancestral step": lambda c, t, s, eta: replace(c, kappa2=(s.alpha * r(t, s)) ** 2),
    "no posterior covariance": lambda c, t, s, eta: replace(c, kappa2=0 * c.kappa2),
    "DDIM mean with ancestral noise": lambda c, t, s, eta: replace(c, a=s.sigma / t.sigma * torch.ones_like(c.a)),
}


def kernel_check(eta: float = 0.5) -> None:
    kernel, t, s = ReverseKernel(eta), SCHEDULE.at(0.6), SCHEDULE.at(0.3)
    x = MIXTURE.noisy(range(3), t)
    posterior = MIXTURE.posterior(x, t, "dense")
    kernel_laws.check_mean(kernel, x, posterior, t, s)
    kernel_laws.check_noise(kernel, x, posterior, t, s)
    kernel_laws.check_sample(kernel, x, posterior, t, s)


def chain_check(solver: Any = None, grid: Tensor | None = None) -> None:
    """Exactness on a Gaussian target."""
    solver = ReverseKernel(0.5) if solver is None else solver
    grid = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64) if grid is None else grid
    start, end = (GAUSSIAN.marginal(SCHEDULE.at(t)) for t in (grid[0], grid[-1]))
    distance = affine_law(GAUSSIAN.denoiser(SCHEDULE), solver, grid, start).distance(Moments.of(end))
    if not distance < 1e-10:
        raise AssertionError(f"the output's law is off by {distance:.3g}")


def test_kernel_checks_pass() -> None:
    kernel_check()
    chain_check()


@pytest.mark.parametrize("bug", KERNEL_BUGS.values(), ids=KERNEL_BUGS.keys())
def test_kernel_bugs_are_caught(bug, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_module, "step_coefficients", wrong(bug))
    with caught():
        kernel_check()
    with caught():
        chain_check()


def test_noise_at_the_last_step_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, t, clean = ReverseKernel(1.0), SCHEDULE.at(0.3), SCHEDULE.at(0.0)
    x = MIXTURE.noisy(range(3), t)
    posterior = MIXTURE.posterior(x, t, "dense")
    kernel_laws.check_clean_step(kernel, x, posterior, t, clean)
    noisy = wrong(lambda c, t, s, eta: replace(c, kappa2=c.kappa**2))
    monkeypatch.setattr(kernel_module, "step_coefficients", noisy)
    with caught():
        kernel_laws.check_clean_step(kernel, x, posterior, t, clean)
    large = ReverseKernel(1.0, "large")
    monkeypatch.setattr(kernel_module, "step_coefficients", wrong(lambda c, t, s, eta: replace(c, large=t.sigma**2)))
    with caught():
        kernel_laws.check_clean_step(large, x, posterior, t, clean)


def test_float32_plan_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coefficients rounded to float32 on the way: steps by a plan are no longer the kernel's own."""
    t = SCHEDULE.at(0.9)
    x = MIXTURE.noisy(range(2), t)
    posterior, levels = MIXTURE.posterior(x, t, "dense"), SCHEDULE.at(torch.tensor([0.9, 0.4, 0.1]).double())
    kernel_laws.check_plan(ReverseKernel(1.0), x, posterior, levels)
    true_prepare = ReverseKernel.prepare

    def prepare(self: ReverseKernel, levels: Level) -> list[StepCoefficients]:
        plan = true_prepare(self, levels)
        return [StepCoefficients(*(float(torch.tensor(v)) for v in vars(c).values())) for c in plan]

    monkeypatch.setattr(ReverseKernel, "prepare", prepare)
    with caught():
        kernel_laws.check_plan(ReverseKernel(1.0), x, posterior, levels)


def test_wrong_densities_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    t, s = SCHEDULE.at(0.6), SCHEDULE.at(0.3)
    x = MIXTURE.noisy(range(3), t)
    law = ReverseKernel(1.0)(x, MIXTURE.posterior(x, t, "dense"), t, s)
    other = replace(law, mean=law.mean + 0.1, covariance=law.covariance.affine(0.01, 2.0))
    kernel_laws.check_log_prob(law)
    kernel_laws.check_kl(law, other)
    true_logdet = Dense.logdet
    monkeypatch.setattr(Dense, "logdet", lambda self: 0.5 * true_logdet(self))
    with caught():
        kernel_laws.check_log_prob(law)
    with caught():
        kernel_laws.check_kl(law, other)


# ------------------------------------------------------------------------------------------------------- twin's solver

true_weights = MultistepSolver._weights


def with_weights(change: Callable[[MultistepSolver, _Step], _Step]):
    def weights(self: MultistepSolver, *args: Any) -> _Step | None:
        step = true_weights(self, *args)
        return None if step is None else change(self, step)

    return weights


SOLVER_BUGS = {
    "phi without the SDE's exponential": lambda solver, step: replace(step, phi=step.phi * 1.1),
    "noise of the ancestral kernel": lambda solver, step: replace(step, std=0.8 * step.std),
    "noise forgotten": lambda solver, step: replace(step, std=0 * step.std),
}


@pytest.mark.parametrize("bug", SOLVER_BUGS.values(), ids=SOLVER_BUGS.keys())
def test_solver_bugs_are_caught(bug, monkeypatch: pytest.MonkeyPatch) -> None:
    solver = MultistepSolver(GAUSSIAN.twin, 2, 2, 1.0)
    chain_check(solver)
    monkeypatch.setattr(MultistepSolver, "_weights", with_weights(bug))
    with caught():
        chain_check(solver)


def ancestral_check() -> None:
    """tau = 1, no twin, order 1 is the ancestral kernel: this is what fixes the factor (1 + tau^2) of the remainder."""
    t = SCHEDULE.at(torch.tensor([0.7, 0.4], dtype=torch.float64))
    x = MIXTURE.noisy(range(3), t[0])
    posterior = MIXTURE.posterior(x, t[0], None)
    solver, kernel = MultistepSolver(None, 1, 0, 1.0), ReverseKernel(1.0, "small")
    one, _ = solver.step(solver.prepare(t), 0, solver.start(x), posterior, x)
    two, _ = kernel.step(kernel.prepare(t), 0, kernel.start(x), posterior, x)
    torch.testing.assert_close(one.x, two.x, rtol=1e-10, atol=1e-10)


def test_missing_factor_of_the_remainder_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropping (1 + tau^2): invisible on Gaussian data, where the remainder is 0."""
    ancestral_check()

    def halved(solver: MultistepSolver, step: _Step) -> _Step:
        return replace(step, predictor=step.predictor / (1 + solver.tau**2))

    monkeypatch.setattr(MultistepSolver, "_weights", with_weights(halved))
    chain_check(MultistepSolver(GAUSSIAN.twin, 1, 0, 1.0))
    with caught():
        ancestral_check()


def test_stale_history_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeping the oldest remainders instead of the newest: single steps are right, long chains are not."""
    target, solver = mixture8(), MultistepSolver(mixture8().twin, 1, 0)
    x, grid = target.noisy(range(3), SCHEDULE.at(0.9)), torch.linspace(0.9, 0.1, 9, dtype=torch.float64)

    def check() -> None:
        def run(x: Tensor, grid: Tensor) -> Tensor:
            levels = SCHEDULE.at(grid)
            plan, state = solver.prepare(levels), solver.start(x)
            for k in range(len(grid) - 1):
                posterior = target.posterior(state.x, levels[k], None)
                state, _ = solver.step(plan, k, state, posterior, None)
            return state.x

        single = x
        for k in range(len(grid) - 1):
            single = run(single, grid[k : k + 2])
        torch.testing.assert_close(run(x, grid), single, rtol=1e-10, atol=1e-10)

    check()
    from lowvar.process import multistep

    true_add = multistep._add

    def stale(y: Tensor, weights: Tensor, remainders: tuple[Tensor, ...]) -> Tensor:
        return true_add(y, weights, remainders[-len(weights) :])

    monkeypatch.setattr(multistep, "_add", stale)
    with caught():
        check()


def test_wrong_start_is_caught() -> None:
    """The chain's last step leaves C out under last="mean"; the exactness check notices."""
    chain_check(ReverseKernel(0.5, last="decoder"), trailing(SCHEDULE, 4))
    with caught():
        chain_check(ReverseKernel(0.5, last="mean"), trailing(SCHEDULE, 4))


# -------------------------------------------------------------------------------------------------------- covariances

D3 = torch.tensor([[1.0, 2.0, 3.0], [0.5, 1.0, 0.1]], dtype=torch.float64)


class NoRoot(Diagonal):
    def sqrt_matvec(self, z: Tensor) -> Tensor:
        return self.variance * z


class StdLogdet(Diagonal):
    def logdet(self) -> Tensor:
        return super().logdet() / 2


class ForgetsShift(Diagonal):
    def affine(self, a: Tensor | float, b: Tensor | float) -> Diagonal:
        return super().affine(0.0, b)


class SquaredScale(Diagonal):
    def affine(self, a: Tensor | float, b: Tensor | float) -> Diagonal:
        return super().affine(a, torch.as_tensor(b) ** 2)


class MeanTrace(Diagonal):
    def trace(self) -> Tensor:
        return super().trace() / self.d


class Signed(Diagonal):
    def __init__(self, variance: Tensor) -> None:
        super().__init__(variance)
        self.variance = variance


class Unbounded(Diagonal):
    def bounded(self, limit: Tensor) -> Diagonal:
        return self


@dataclass(frozen=True)
class Case:
    make: Callable[[], Covariance]
    check: Callable[[Covariance, Tensor, float], None]
    truth: Tensor


COVARIANCE_BUGS = {
    "variance for its root": Case(lambda: NoRoot(D3), covariance_laws.check_root, torch.diag_embed(D3)),
    "log of std": Case(lambda: StdLogdet(D3), covariance_laws.check_logdet, torch.diag_embed(D3)),
    "affine without a I": Case(lambda: ForgetsShift(D3), covariance_laws.check_affine, torch.diag_embed(D3)),
    "affine with b^2": Case(lambda: SquaredScale(D3), covariance_laws.check_affine, torch.diag_embed(D3)),
    "mean for trace": Case(lambda: MeanTrace(D3), covariance_laws.check_trace, torch.diag_embed(D3)),
    "negative variance": Case(lambda: Signed(-D3), covariance_laws.check_positive, torch.diag_embed(D3)),
    "bound ignored": Case(lambda: Unbounded(D3), covariance_laws.check_bounded, torch.diag_embed(D3)),
    "diagonal for dense": Case(
        lambda: Diagonal(D3),
        covariance_laws.check_matvec,
        torch.diag_embed(D3) + 0.1,
    ),
    "factors without scale": Case(
        lambda: LowRankPlusDiagonal(D3, 2 * D3[:, None]),
        covariance_laws.check_diagonal,
        torch.diag_embed(D3) + D3[:, :, None] * D3[:, None],
    ),
}


@pytest.mark.parametrize("case", COVARIANCE_BUGS.values(), ids=COVARIANCE_BUGS.keys())
def test_covariance_bugs_are_caught(case: Case) -> None:
    with caught():
        case.check(case.make(), case.truth, 1e-10)
    if isinstance(case.make(), Diagonal) and case.check is not covariance_laws.check_matvec:
        case.check(Diagonal(D3), case.truth, 1e-10)


# ----------------------------------------------------------------------------------------------------------- schedules


@dataclass(frozen=True)
class WrongInverse(CosineVP):
    def time(self, logsnr: Tensor | float) -> Tensor:
        return (super().time(logsnr) * 1000).round() / 1000


@dataclass(frozen=True)
class Increasing(CosineVP):
    def logsnr(self, t: Tensor | float) -> Tensor:
        return -super().logsnr(t)


@dataclass(frozen=True)
class Single(CosineVP):
    def logsnr(self, t: Tensor | float) -> Tensor:
        return super().logsnr(t).float()


@dataclass(frozen=True)
class NotPreserving(CosineVP):
    def level(self, logsnr: Tensor | float, t: Tensor | None = None) -> Level:
        level = super().level(logsnr, t)
        return replace(level, sigma=1 - level.alpha)


@dataclass(frozen=True)
class NoisyData(Flow):
    def logsnr(self, t: Tensor | float) -> Tensor:
        return super().logsnr(torch.as_tensor(t, dtype=torch.float64).clamp_min(1e-3))


@dataclass(frozen=True)
class ForgetfulConfig(CosineVP):
    def config(self) -> dict[str, Any]:
        return {"schedule": "cosine"}


@dataclass(frozen=True)
class OffByOne(Flow):
    def time_of(self, timestep: Tensor | float) -> Tensor:
        return super().time_of(torch.as_tensor(timestep) + 1)


SCHEDULE_BUGS: dict[str, tuple[Schedule, Callable[[Schedule], None]]] = {
    "inverse rounded to a timestep": (WrongInverse(), schedule_laws.check_inverse),
    "reversed": (Increasing(), schedule_laws.check_decreasing),
    "float32": (Single(), schedule_laws.check_decreasing),
    "sigma = 1 - alpha under VP": (NotPreserving(), schedule_laws.check_family),
    "noise left at t = 0": (NoisyData(), schedule_laws.check_ends),
    "config forgets a parameter": (ForgetfulConfig(s=0.1), schedule_laws.check_config),
    "timesteps off by one": (OffByOne(), schedule_laws.check_timestep),
}


@pytest.mark.parametrize(("schedule", "check"), SCHEDULE_BUGS.values(), ids=SCHEDULE_BUGS.keys())
def test_schedule_bugs_are_caught(schedule: Schedule, check: Callable[[Schedule], None]) -> None:
    with caught():
        check(schedule)
    check(CosineVP())


def test_float32_tables_are_told_apart_by_precision() -> None:
    """alpha_bar accumulated in float32 (as shipped by libraries) is another table at the precision of the laws."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32)
    shipped = DiscreteVP(torch.cumprod(1 - betas, 0))
    exact = schedule_from_diffusers({})
    assert float((shipped.logsnr(0.5) - exact.logsnr(0.5)).abs()) > 1e-9


# --------------------------------------------------------------------------------------------------------------- noise


class Shifted(NoiseSource):
    """Independent noise through a change of its numbers."""

    def __init__(self, change: Callable[[Tensor, str], Tensor]) -> None:
        self.change = change

    def normal(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        return self.change(Independent(0).normal(index, shape, draw=draw, dtype=dtype), "normal")

    def uniform(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        return self.change(Independent(0).uniform(index, shape, draw=draw, dtype=dtype), "uniform")


class SameDraws(Shifted):
    def normal(self, index, shape, *, draw=0, dtype=torch.float32, device="cpu"):
        return super().normal(index, shape, draw=0, dtype=dtype)


def first_minus(z: Tensor, kind: str) -> Tensor:
    return z - z[:1] * 0.1 if kind == "normal" else z


NOISE_BUGS: dict[str, tuple[NoiseSource, Callable[[NoiseSource], None]]] = {
    "one stream for the batch": (TorchGenerators(torch.Generator().manual_seed(0)), noise_laws.check_batches),
    "depends on the batch's first sample": (Shifted(first_minus), noise_laws.check_batches),
    "draw ignored": (SameDraws(lambda z, kind: z), noise_laws.check_draws),
    "wrong variance": (Shifted(lambda z, kind: 1.03 * z), noise_laws.check_normal_marginal),
    "uniform noise of variance 1": (
        Shifted(lambda z, kind: (torch.special.ndtr(z) - 0.5) * 12**0.5),
        noise_laws.check_normal_marginal,
    ),
    "zero can come out": (Shifted(lambda u, kind: (u - 1e-4).clamp_min(0)), noise_laws.check_open_interval),
    "squashed uniforms": (Shifted(lambda u, kind: u**1.1), noise_laws.check_uniform_marginal),
    "independent pairs": (Independent(0), noise_laws.check_mirrored),
}


@pytest.mark.parametrize(("source", "check"), NOISE_BUGS.values(), ids=NOISE_BUGS.keys())
def test_noise_bugs_are_caught(source: NoiseSource, check: Callable[[NoiseSource], None]) -> None:
    with caught():
        check(source)
    check(Antithetic(Independent(0)) if check is noise_laws.check_mirrored else Independent(0))


def test_wrong_philox_is_caught() -> None:
    with caught():
        noise_laws.check_known_answers(lambda counter, key: philox(counter, (key[0] ^ 1, key[1])))


def test_posterior_is_what_the_laws_read() -> None:
    """A guard of this file: the checks above run on posteriors with a covariance."""
    t = SCHEDULE.at(0.5)
    posterior = MIXTURE.posterior(MIXTURE.noisy(range(1), t), t, "dense")
    assert isinstance(posterior, Posterior)
    assert isinstance(posterior.covariance, Dense)
