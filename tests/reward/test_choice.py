"""Which estimator: the bimodal chain where paths lose, exactly; what the pilot says; what it must not be fooled by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.process import CosineVP, Independent, ReverseKernel
from lowvar.process.denoiser import Denoiser
from lowvar.process.kernel import step_coefficients
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level
from lowvar.reward import Floor, Full, Last, Paths, Policy, RewardProblem, Scores, choose, gradient_report
from lowvar.testing.quadrature import hermite

SCHEDULE, FLOOR = CosineVP(), 0.2


class Bimodal(Denoiser):
    """x0_hat = tanh(c (x + theta)): modes at -1 and 1."""

    def __init__(self, theta: Tensor, c: float) -> None:
        self.theta, self.c, self.schedule = theta, c, SCHEDULE

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        return Posterior(torch.tanh(self.c * (x + self.theta)))


def reward(x: Tensor, prompts: Any = None) -> Tensor:
    return -((x[:, 0] - 1) ** 2)


reward.differentiable = True  # pyright: ignore[reportFunctionMemberAccess]


def grid(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def problem(steps: int, c: float) -> RewardProblem:
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    policy = Policy(Bimodal(theta, c), ReverseKernel(variance="small"), grid(steps), Floor(FLOOR))
    return RewardProblem(policy, reward, [theta], (1,), dtype=torch.float64)


@dataclass(frozen=True)
class Exact:
    """First and second moments of both estimators, by a recursion of functions of x on a line."""

    gradient: float
    path: float
    score: float
    mean_baseline: float


def exact(steps: int, c: float, points: int = 3001) -> Exact:
    """E and Var of R' J and of S (R - b) at theta = 0.

    Ahead of a state x every moment is a polynomial of (J, S), degree 2, with functions of x as coefficients:
    E R = r1, E R^2 = r2; E R' J = d1 j + p1, E (R' J)^2 = d2 j^2 + 2 e j + p2; E S R = s r1 + c1, E S R^2 = s r2 + c2,
    E S^2 = s^2 + q0, E S^2 R = s^2 r1 + 2 s c1 + q1, E S^2 R^2 = s^2 r2 + 2 s c2 + q2. A step back integrates over z.
    """
    levels = SCHEDULE.at(grid(steps))
    x = torch.sinh(torch.linspace(-9, 9, points, dtype=torch.float64))
    x = x / x.max() * 7  # dense where the modes part
    z, w = hermite(50)
    R, slope, none = -((x - 1) ** 2), -2 * (x - 1), torch.zeros_like(x)
    f = {"r1": R, "r2": R**2, "d1": slope, "d2": slope**2}
    f |= dict.fromkeys(("p1", "p2", "e", "c1", "c2", "q0", "q1", "q2"), none)
    for k in reversed(range(steps)):
        co = step_coefficients(levels[k], levels[k + 1])
        s = float(torch.sqrt(co.lambda2 + (FLOOR**2 if k + 1 == steps else 0.0)))
        t = torch.tanh(c * x)
        p = float(co.kappa) * c * (1 - t**2)  # d mean / d theta
        a, q = float(co.a) + p, p / s  # d mean / d x; S' = S + q z
        at = ((float(co.a) * x + float(co.kappa) * t)[:, None] + s * z).clamp(-6.99, 6.99)
        i = torch.searchsorted(x, at).clamp(1, points - 1)
        u = (at - x[i - 1]) / (x[i] - x[i - 1])
        g: list[dict[str, Tensor]] = [{}, {}, {}]  # E z^m f(x'), m = 0, 1, 2
        for name, values in f.items():
            moved = values[i - 1] * (1 - u) + values[i] * u
            for m in range(3):
                g[m][name] = moved @ (w * z**m)
        f = {
            "r1": g[0]["r1"],
            "r2": g[0]["r2"],
            "d1": a * g[0]["d1"],
            "d2": a**2 * g[0]["d2"],
            "p1": g[0]["p1"] + p * g[0]["d1"],
            "p2": g[0]["p2"] + 2 * p * g[0]["e"] + p**2 * g[0]["d2"],
            "e": a * (g[0]["e"] + p * g[0]["d2"]),
            "c1": g[0]["c1"] + q * g[1]["r1"],
            "c2": g[0]["c2"] + q * g[1]["r2"],
            "q0": g[0]["q0"] + q**2,
            "q1": g[0]["q1"] + 2 * q * g[1]["c1"] + q**2 * g[2]["r1"],
            "q2": g[0]["q2"] + 2 * q * g[1]["c2"] + q**2 * g[2]["r2"],
        }
    dense = torch.linspace(-7, 7, 20001, dtype=torch.float64)
    i = torch.searchsorted(x, dense).clamp(1, points - 1)
    u = ((dense - x[i - 1]) / (x[i] - x[i - 1])).clamp(0, 1)
    law = torch.exp(-(dense**2) / 2) / torch.exp(-(dense**2) / 2).sum()
    end = {name: float((v[i - 1] * (1 - u) + v[i] * u) @ law) for name, v in f.items()}
    gradient, b = end["p1"], end["r1"]
    assert abs(end["c1"] - gradient) < 0.01 * abs(gradient)  # the score function has the same expectation
    square = gradient**2
    return Exact(
        gradient,
        end["p2"] - square,
        end["q2"] - square,
        end["q2"] - 2 * b * end["q1"] + b**2 * end["q0"] - square,
    )


def test_the_recursion_is_what_runs_do() -> None:
    truth, one = exact(3, 2.0), problem(3, 2.0)
    report = gradient_report(one, [Scores("none"), Paths(checkpoint=0)], Independent(5), n=96, repeats=60)
    for name, wanted in (("pathwise, Full()", truth.path), ("scores, none baseline", truth.score)):
        row = report.rows[name]
        assert row.low < wanted < row.high
        assert float(row.mean) == pytest.approx(truth.gradient, abs=4 * (row.variance / 5760) ** 0.5)


def test_paths_lose_by_five_orders_of_magnitude_and_scores_are_chosen() -> None:
    truth = exact(20, 10.0)
    assert truth.path > 1e5 * truth.mean_baseline
    assert truth.mean_baseline < truth.score
    choice = choose(problem(20, 10.0), Independent(0), among=[Scores(), Paths(checkpoint=0)], n=128, repeats=8)
    assert choice.estimator == Scores()
    assert "pathwise, Full()" in choice.why


def test_a_pilot_that_misses_rare_events_does_not_fool_the_choice() -> None:
    """Saturated: nearly every run has no pathwise gradient at all, so its measured variance is next to nothing."""
    one, among = problem(20, 16.0), [Scores(), Paths(checkpoint=0)]
    report = gradient_report(one, among, Independent(1), n=64, repeats=8)
    assert report.rows["pathwise, Full()"].variance < 1e-6 * report.rows["scores, leave-one-out baseline"].variance
    assert report.rows["pathwise, Full()"].claim.label == "unbiased"
    choice = choose(one, Independent(1), among=among, n=64, repeats=8)
    assert choice.estimator == Scores()
    assert "rare events" in choice.why


def test_paths_are_chosen_where_they_win(make: Any) -> None:
    world = make(3, 2)
    one = RewardProblem(world.policy, world.reward, [world.theta], (1,), dtype=torch.float64)
    choice = choose(one, Independent(0), n=64, repeats=8)
    assert isinstance(choice.estimator, Paths)
    assert choice.report.rows[choice.estimator.name].variance < choice.report.rows["scores, x0 baseline"].variance
    table = choice.report.table()
    assert table.count("unbiased") == len(choice.report.rows) == 6


def test_without_a_derivative_paths_are_left_out_and_biased_ones_wait_to_be_asked(make: Any) -> None:
    world = make(3, 2)
    one = RewardProblem(world.policy, lambda x, p: (x[:, 0] > 0.5).double(), [world.theta], (1,), dtype=torch.float64)
    among = [Paths(), Scores("group-including", "group"), Scores()]
    choice = choose(one, Independent(0), among=among, n=64, repeats=4)
    assert choice.estimator == Scores()
    assert "the reward has no derivative" in choice.why
    with pytest.raises(ValueError, match="allow biased=True"):
        choose(one, Independent(0), among=among[:2], n=64, repeats=4)
    assert choose(one, Independent(0), among=among[:2], biased=True, n=64, repeats=4).estimator == among[1]


@pytest.mark.slow  # 80 batches of four estimators
def test_variances_are_the_recursion_s(make: Any) -> None:
    """A report of the linear chain: every unbiased row's interval holds the exact variance of a run."""
    world = make(3, 2)
    one = RewardProblem(world.policy, world.reward, [world.theta], (1,), num_generations=8, dtype=torch.float64)
    wanted = {
        Scores(): world.exact.leave_one_out(8).variance,
        Scores("none"): world.exact.score().variance,
        Paths(Full(), checkpoint=0): world.exact.pathwise().variance,
        Paths(Last(1), checkpoint=0): world.exact.last(1, "stop").variance,
    }
    report = gradient_report(one, list(wanted), Independent(5), n=32, repeats=80)
    for estimator, variance in wanted.items():
        row = report.rows[estimator.name]
        assert row.variance == pytest.approx(variance, rel=0.4)
        assert row.low < variance < row.high
