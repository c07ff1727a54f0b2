"""The gradient of the KL to a reference: variance of each estimator, and the bias of those that leave a part out.

Ten steps of DDPM (cosine schedule), d = 16, data N(0.5, 0.25) in every direction; parameters: a factor and a shift of
x0_hat at every level (20), all moved by the same amount, so that the KL of a run has the size in the first column. The
truth is the mean of the "exact" estimator, whose own noise is in brackets; variances are of one run, summed over the
parameters, with 95% intervals from 64 blocks.

    python benchmarks/reward_kl.py    # writes benchmarks/results/reward_kl.json, docs/results/reward_kl.md
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
from pathlib import Path
from typing import Any

import torch

from lowvar import __version__
from lowvar.process import CosineVP, Independent, ReverseKernel
from lowvar.process.grid import trailing
from lowvar.reward import KL_ESTIMATORS, Floor, Policy, kl_loss, rollout
from lowvar.testing import AffineDenoiser, exact_affine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reward_kl.json"
TABLE = ROOT / "docs" / "results" / "reward_kl.md"
D, STEPS, BLOCKS = 16, 10, 64


def measured(move: float, runs: int) -> dict[str, Any]:
    schedule = CosineVP()
    grid = trailing(schedule, STEPS)
    old = exact_affine(schedule, grid, 0.5, 0.25)
    theta = (old + move).requires_grad_()
    kernel = ReverseKernel(variance="small")
    policy, reference = (Policy(AffineDenoiser(v, schedule, grid), kernel, grid, Floor(0.05)) for v in (theta, old))
    found: dict[str, list[torch.Tensor]] = {name: [] for name in KL_ESTIMATORS}
    kl, n = 0.0, runs // BLOCKS
    for block in range(BLOCKS):
        ran = rollout(policy, Independent(0), n, (D,), first=block * n, batch_size=n, dtype=torch.float64)
        for name in KL_ESTIMATORS:
            out = kl_loss(policy, reference, ran, estimator=name)  # pyright: ignore[reportArgumentType]
            found[name].append(torch.autograd.grad(out.loss, theta)[0].flatten())
            kl += float(out.kl.sum(0).mean()) / BLOCKS / len(KL_ESTIMATORS)
    g = {name: torch.stack(each) for name, each in found.items()}
    truth = g["exact"].mean(0)
    rows = {}
    for name, each in g.items():
        square = n * (each - each.mean(0)).square().sum(1) * BLOCKS / (BLOCKS - 1)
        variance, half = float(square.mean()), 1.96 * float(square.std()) / BLOCKS**0.5
        rows[name] = {
            "variance": variance,
            "low": variance - half,
            "high": variance + half,
            "bias": float((each.mean(0) - truth).norm() / truth.norm()),
            "noise": (variance / runs) ** 0.5 / float(truth.norm()),
        }
    return {"kl": kl, "rows": rows}


def table(result: dict[str, Any]) -> str:
    lines = [
        "# Gradients of the KL to a reference",
        "",
        "Made by `python benchmarks/reward_kl.py`. Ten steps, 16 dimensions; variance of one run, summed over the",
        f"parameters; bias relative to the mean of `exact`, the estimate's noise in brackets; {result['runs']:,} runs.",
        "",
        "| KL, nats | estimator | declared | variance | 95% | bias |",
        "|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        for name, row in case["rows"].items():
            label = KL_ESTIMATORS[name].label
            lines.append(
                f"| {case['kl']:.3g} | {name} | {label} | {row['variance']:.3g} | {row['low']:.3g} to "
                f"{row['high']:.3g} | {'the reference' if name == 'exact' else format(row['bias'], '.3f')} "
                f"({row['noise']:.3f}) |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=32768)
    runs = parser.parse_args().runs
    result = {
        "cases": [measured(move, runs) for move in (0.01, 0.05)],
        "runs": runs,
        "version": __version__,
        "date": str(dt.datetime.now(dt.UTC).date()),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    TABLE.write_text(table(result))


if __name__ == "__main__":
    main()
