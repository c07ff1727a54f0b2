"""Policy-gradient estimators on the linear-Gaussian chain: exact bias and variance, and what the code does.

- T = 10 steps of DDPM (cosine schedule), d = 1, data N(0.5, 0.25), reward -(x - 1.5)^2, a floor of 0.05 at the last
  step; parameters: a factor and a shift of x0_hat at every level (20);
- *exact* rows: `lowvar.testing.tuning`, moments by recursion, no sampling error; antithetic rows are a pair's mean, so
  cost 2 runs;
- *measured* rows: estimators that are no polynomials (a std, a clip, a fitted baseline), `--runs` rollouts by the code
  in batches of 256, groups of 8; 95% intervals from the batches.

    python benchmarks/reward_oracle.py    # writes benchmarks/results/reward_oracle.json, docs/results/reward_oracle.md
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvar import __version__
from lowvar.process import CosineVP, Independent, ReverseKernel
from lowvar.process.grid import trailing
from lowvar.reward import Floor, Policy, Rollout, advantages, optimal_constant, rollout, x0_baseline
from lowvar.testing.affine import AffineDenoiser, exact_affine, linear_policy
from lowvar.testing.polynomial import Polynomial
from lowvar.testing.tuning import ExactEstimate, LinearPolicy

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reward_oracle.json"
TABLE = ROOT / "docs" / "results" / "reward_oracle.md"
STEPS, FLOOR, REWARD, BATCH = 10, 0.05, [-2.25, 3.0, -1.0], 256


def made(steps: int = STEPS) -> tuple[Policy, LinearPolicy]:
    schedule = CosineVP()
    grid = trailing(schedule, steps)
    denoiser = AffineDenoiser(exact_affine(schedule, grid, 0.5, 0.25), schedule, grid)
    policy = Policy(denoiser, ReverseKernel(variance="small"), grid, Floor(FLOOR))
    return policy, linear_policy(denoiser, REWARD, floor=FLOOR)


def exact_rows(policy: Policy, chain: LinearPolicy) -> dict[str, ExactEstimate]:
    mu, x, R = chain.mean_reward(), Polynomial.variables(1)[0], chain.R
    theta = policy.bound().theta  # pyright: ignore[reportAttributeAccessIssue]

    def at_x0_hat(k: int) -> Polynomial:
        return R.of([float(theta[k, 0]) * x + float(theta[k, 1])])

    cut = [chain.last(k, "stop") for k in range(1, STEPS + 1)]
    mean = torch.stack([e.mean for e in cut]).mean(0)
    second = sum(e.variance + float(e.mean.square().sum()) for e in cut) / STEPS
    surrogate = [-0.6, 1.2, -0.6]
    wrong = -0.6 * (x - 1.0) ** 2
    return {
        "no baseline": chain.score(),
        "batch mean, itself included (8)": chain.leave_one_out(8, including=True),
        "leave-one-out (8)": chain.leave_one_out(8),
        "true mean": chain.score(mu),
        "optimal constant": chain.score(chain.optimal_baseline()),
        "exact V(x_t)": chain.values(),
        "V(x_s) - V(x_t)": chain.differences(),
        "R(x0_hat), raw": chain.estimate(R, baseline=at_x0_hat),
        "antithetic pair, true mean": chain.score(mu, pair=True),
        "pathwise": chain.pathwise(),
        "antithetic pathwise": chain.pathwise(pair=True),
        "last 1 (DRaFT-1)": chain.last(1, "stop"),
        "last 2": chain.last(2, "stop"),
        "last 5": chain.last(5, "stop"),
        "random truncation": ExactEstimate(mean, second - float(mean.square().sum())),
        "roulette 0.8": chain.pathwise(gates=[0.8] * STEPS),
        "last 2 pathwise, rest scores": chain.last(2),
        "wrong surrogate": chain.estimate(
            R - wrong - (mu - replace(chain, reward=surrogate, _values={}).mean_reward()), wrong
        ),
        "last step dropped": chain.estimate(R - mu, scored=[True] * (STEPS - 1) + [False]),
    }


def rules() -> dict[str, Callable[[Rollout, Tensor, Tensor], Tensor]]:
    """From a batch, its rewards and |S_t|^2 to advantages."""

    def clipped(ran: Rollout, R: Tensor, norms: Tensor) -> Tensor:
        A = advantages(R, ran.groups)
        return advantages(R, ran.groups, clip=2 * float(A.values.std())).values

    return {
        "leave-one-out (8), the code": lambda ran, R, w: advantages(R, ran.groups).values,
        "group mean and std (GRPO)": lambda ran, R, w: (
            advantages(R, ran.groups, baseline="group-including", scale_rewards="group").values
        ),
        "leave-one-out, clipped at 2 sd": clipped,
        "optimal constant, cross-fitted": lambda ran, R, w: advantages(R, baseline=optimal_constant(R, w)).values,
        "ridge on x0_hat (256 runs)": lambda ran, R, w: advantages(R, baseline=x0_baseline(ran, R)).values,
        "the same, weighted by the exact norms": lambda ran, R, w: (
            advantages(R, baseline=x0_baseline(ran, R, weights=w)).values
        ),
    }


def measured(policy: Policy, chain: LinearPolicy, runs: int) -> dict[str, dict[str, float]]:
    truth, found = chain.gradient(), {name: [] for name in rules()}
    s = torch.tensor(chain.s, dtype=torch.float64)[:, None]
    kappa = torch.tensor([chain.q[k][2 * k + 1] for k in range(STEPS)], dtype=torch.float64)[:, None]
    a, b = (torch.tensor(v, dtype=torch.float64)[:, None] for v in (chain.a, chain.b))
    big = 100 * BATCH
    for first in range(0, runs, big):
        whole = rollout(
            policy, Independent(0), big, (1,), first=first, num_generations=8, batch_size=big, dtype=torch.float64
        )
        for low in range(0, big, BATCH):
            ran = whole.part(torch.arange(low, low + BATCH))
            x, y = ran.states[..., 0], ran.actions[..., 0]
            S = kappa * (y - a * x - b) / s**2  # of the shift; of the factor x times it
            R = sum(c * ran.samples[:, 0] ** i for i, c in enumerate(REWARD))
            assert isinstance(R, Tensor)
            for name, rule in rules().items():
                A = rule(ran, R, S**2 * (1 + x**2))
                found[name].append(torch.stack([S * x * A, S * A], 2).mean(1).flatten())
    rows = {}
    for name, each in found.items():
        g = torch.stack(each)
        spread = (g - g.mean(0)).square().sum(1)
        variance, half = BATCH * float(spread.mean()), BATCH * 1.96 * float(spread.std()) / len(g) ** 0.5
        rows[name] = {
            "bias": float((g.mean(0) - truth).norm() / truth.norm()),
            "noise": (variance / runs) ** 0.5 / float(truth.norm()),
            "cosine": float(torch.cosine_similarity(g.mean(0), truth, 0)),
            "variance": variance,
            "low": variance - half,
            "high": variance + half,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=409600)
    runs = parser.parse_args().runs
    policy, chain = made()
    truth = chain.gradient()
    exact = {name: {"bias": e.bias(truth), "variance": e.variance} for name, e in exact_rows(policy, chain).items()}
    dropped = {}
    for steps in (10, 50):
        g = made(steps)[1].gradient()
        dropped[steps] = float(g[-2:].abs().sum() / g.abs().sum())
    result: dict[str, Any] = {
        "exact": exact,
        "measured": measured(policy, chain, runs),
        "runs": runs,
        "dropped": dropped,
        "gradient": float(truth.norm()),
        "version": __version__,
        "date": str(dt.datetime.now(dt.UTC).date()),
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    TABLE.write_text(table(result))


def table(result: dict[str, Any]) -> str:
    lines = [
        "# Policy gradients on the linear-Gaussian chain",
        "",
        "Made by `python benchmarks/reward_oracle.py`. Ten steps, one dimension, a quadratic reward, a factor and a",
        "shift of the denoiser at every level. *Bias*: relative, of the expectation; *variance*: of one run, summed",
        "over the 20 parameters. Exact rows are integrals by recursion; measured ones have 95% intervals, and a bias",
        "whose own noise is in brackets. A pair costs two runs.",
        "",
        "| estimator | bias | variance |",
        "|---|---|---|",
    ]
    for name, row in result["exact"].items():
        bias = "0" if row["bias"] < 1e-9 else f"{row['bias']:.3f}"
        lines.append(f"| {name} | {bias} | {row['variance']:.4g} |")
    lines += ["", f"Measured, {result['runs']:,} runs:", "", "| estimator | bias | cosine | variance | 95% |"]
    lines.append("|---|---|---|---|---|")
    for name, row in result["measured"].items():
        lines.append(
            f"| {name} | {row['bias']:.3f} ({row['noise']:.3f}) | {row['cosine']:.3f} | {row['variance']:.4g} | "
            f"{row['low']:.4g} to {row['high']:.4g} |"
        )
    ten, fifty = (result["dropped"][k] if k in result["dropped"] else result["dropped"][str(k)] for k in (10, 50))
    lines += [
        "",
        f"The last step's share of the gradient (sum of sizes): {ten:.0%} at 10 steps, {fifty:.0%} at 50: what is lost",
        "where a step without noise is dropped.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
