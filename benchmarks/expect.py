r"""Evaluations to an interval of given width: every design on exact targets, against independent sampling and peers.

What it claims, and how it is made to hold:

- chains of 16 DDIM steps (and 16 ancestral ones) on the exact denoisers of the three published mixtures; the tolerance
  is the half width that independent sampling reaches with `--samples` samples (100 pilots), so 1.0 is its cost;
- `nfe` is everything a run spends, the pilot included, mean over seeds; the factor is independent sampling's over it;
- twins are fitted to samples of the target (8,192), as a calibration fits them to data; they cost no evaluation of the
  network's place, but they cost compute, so seconds are beside;
- peers: `scipy.stats.qmc.Sobol` used by hand (16 scrambled nets over the start's noise, doubled until the interval from
  the nets is narrow enough; ODE only) and a plain two-level estimate by hand (16 and 8 steps, same start,
  independent step noise where there is any, allocation from 32 coupled samples).

    python benchmarks/expect.py            # writes benchmarks/results/expect.json and docs/results/expect.md
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.stats import qmc
from scipy.stats import t as student
from torch import Tensor

from lowvar import __version__
from lowvar.expect import ChainSampler, estimate, estimates
from lowvar.process import Independent, ReverseKernel
from lowvar.testing import mixture2, mixture8, mixture64
from lowvar.testing.expectations import chain_on

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "expect.json"
TABLE = ROOT / "docs" / "results" / "expect.md"
TARGETS = {"mixture2": mixture2, "mixture8": mixture8, "mixture64": mixture64}
KERNELS = {"ODE": ReverseKernel(0.0, "small"), "SDE": ReverseKernel(1.0, "small")}
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "coordinate": lambda x: x[:, 0],
    "norm": lambda x: x.square().sum(1),
    "sigmoid": lambda x: torch.sigmoid(x[:, 0] + x[:, 1]),
    "indicator": lambda x: (x[:, 0] > 0.5).double(),
}
DESIGNS = (
    "auto",
    "antithetic",
    "twin",
    "antithetic+twin",
    "mixture",
    "antithetic+mixture",
    "sobol",
    "sobol+mixture",
    "few-step",
    "multilevel",
)


def by_hand_sobol(sampler: ChainSampler, f: Callable[[Tensor], Tensor], tol: float, seed: int) -> int:
    """Nets of scipy over the start's noise of a deterministic chain, doubled until the interval fits."""
    d, points = sampler.event_shape[0], 4
    levels = sampler.denoiser.schedule.at(sampler.grid)
    spent = 0
    while points <= 1 << 16:
        means = []
        for net in range(16):
            u = torch.tensor(qmc.Sobol(d, seed=1000 * seed + 16 * points + net).random(points))
            z = torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))
            state, plan = sampler.solver.start(z), sampler.solver.prepare(levels)
            for k in range(len(levels) - 1):
                state, _ = sampler.solver.step(plan, k, state, sampler.denoiser(state.x, levels[k]), None)
            means.append(float(f(state.x).mean()))
        spent += 16 * points * sampler.nfe
        if student.ppf(0.975, 15) * statistics.stdev(means) / 4 <= tol:
            return spent
        points *= 2
    return spent


def by_hand_two_levels(sampler: ChainSampler, f: Callable[[Tensor], Tensor], tol: float, seed: int) -> int:
    """Two levels with the same start and no coupling of the steps' noise; n from 32 coupled samples."""
    coarse = sampler.coarser
    assert coarse is not None
    plain = ChainSampler(coarse.denoiser, coarse.solver, coarse.grid, coarse.event_shape, dtype=torch.float64)
    index, noise = torch.arange(32), Independent(seed)
    a, b = f(sampler(index, noise)), f(plain(index, noise))
    c1, c0 = sampler.nfe + plain.nfe, plain.nfe
    v1, v0 = float((a - b).var()), float(b.var())
    total = (math.sqrt(v1 * c1) + math.sqrt(v0 * c0)) ** 2 / (tol / 1.96) ** 2
    return round(max(total, 32 * c1))


def cells(samples: int, seeds: int, minutes: float) -> list[dict[str, Any]]:
    """A row a target, kernel, statistic and design."""
    begun, rows = time.perf_counter(), []
    places = []
    for target, make in TARGETS.items():
        mixture = make()
        for kernel, solver in KERNELS.items():
            sampler = chain_on(mixture, 16, solver, mixture=True)
            x = sampler(torch.arange(4096), Independent(99))
            for name, f in STATISTICS.items():
                tol = 1.96 * float(f(x).std()) / math.sqrt(samples)
                head = {"target": target, "kernel": kernel, "statistic": name, "tol": tol}
                places.append((head, sampler, f, tol))
    peers = {"two levels by hand": by_hand_two_levels, "scipy Sobol by hand": by_hand_sobol}
    for design in (DESIGNS[0], *peers, *DESIGNS[1:]):
        for head, sampler, f, tol in places:
            if time.perf_counter() - begun > 60 * minutes:
                print("budget spent: the rest is left out")
                return rows
            row: dict[str, Any] = {**head, "design": design}
            start = time.perf_counter()
            if design in peers:
                if design.startswith("scipy") and head["kernel"] != "ODE":
                    continue
                spent = [peers[design](sampler, f, tol, seed) for seed in range(seeds)]
            else:
                # no run is worth more than three times independent sampling
                limit = {"tol": tol, "budget": 3 * 16 * samples, "design": design, "batch_size": 512}
                runs = [estimate(sampler, f, noise=Independent(seed), **limit) for seed in range(seeds)]
                spent = [e.nfe for e in runs]
                row |= {"chosen": [e.design for e in runs], "widest": max(e.half_width for e in runs) / tol}
            row |= _factor([16 * samples / n for n in spent])
            row |= {"nfe": statistics.mean(spent), "seconds": (time.perf_counter() - start) / seeds}
            rows.append(row)
            print(*head.values(), design, f"{row['factor']:.2f}", f"{row['seconds']:.1f} s", flush=True)
    return rows


def _factor(factors: list[float]) -> dict[str, float]:
    """Geometric mean over seeds with its 95% interval."""
    logs = [math.log(x) for x in factors]
    middle = statistics.mean(logs)
    half = float(student.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"factor": math.exp(middle), "low": math.exp(middle - half), "high": math.exp(middle + half)}


def square_law(tols: tuple[float, ...] = (0.2, 0.1, 0.05)) -> list[dict[str, float]]:
    """Cost of a multilevel run of 64 steps against the tolerance, mixture2, norm."""
    sampler, rows = chain_on(mixture2(), 64), []
    for tol in tols:
        *_, last = estimates(sampler, STATISTICS["norm"], tol=tol, design="multilevel", batch_size=4096)
        rows.append({"tol": tol, "nfe": float(last.nfe), "nfe_tol2": last.nfe * tol**2})
    return rows


def tables(found: dict[str, Any]) -> str:
    """The results page."""
    names = list(dict.fromkeys(r["design"] for r in found["rows"]))
    lines = [
        (
            f"Independent sampling's evaluations over a design's, for the half width that {found['samples']} "
            "independent samples of 16 steps reach; everything spent is counted, the pilot included. Geometric mean of "
            f"{found['seeds']} seeds; empty: not run. Measured {found['date']}, {found['machine']}."
        ),
        "",
        "| target | chain | statistic | " + " | ".join(names) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    keys = list(dict.fromkeys((r["target"], r["kernel"], r["statistic"]) for r in found["rows"]))
    for key in keys:
        cell = {r["design"]: r for r in found["rows"] if (r["target"], r["kernel"], r["statistic"]) == key}
        texts = [f"{cell[n]['factor']:.2g}" if n in cell else "" for n in names]
        lines.append("| " + " | ".join([*key, *texts]) + " |")
    auto = [r for r in found["rows"] if r["design"] == "auto"]
    smooth = [r["factor"] for r in auto if r["statistic"] != "indicator"]
    worst = min(auto, key=lambda r: r["factor"])
    lines += [
        "",
        (
            f"The planner (`auto`): median factor of smooth statistics {statistics.median(smooth):.1f}, worst of all "
            f"{worst['factor']:.2f} ({worst['low']:.2f} to {worst['high']:.2f}; {worst['target']}, {worst['kernel']}, "
            f"{worst['statistic']})."
        ),
        "",
        "| tolerance | evaluations, multilevel | times tolerance squared |",
        "|---|---|---|",
        *(f"| {r['tol']} | {r['nfe']:.0f} | {r['nfe_tol2']:.0f} |" for r in found["square_law"]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=6400, help="independent samples that set the tolerance")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=20, help="budget")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "version": __version__,
        "date": dt.date.today().isoformat(),
        "machine": f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "samples": options.samples,
        "seeds": options.seeds,
        "rows": cells(options.samples, options.seeds, options.minutes),
        "square_law": square_law(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    text = tables(found)
    if options.out == RESULTS:
        TABLE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
