"""Gradient estimators: variance x cost on problems with an exact gradient, a VAE, and what the interpreter costs.

- problems (`gradients_problems.py`): Gaussian, 4 and 200 bits, Bayesian logistic regression. Variance of the gradient
  summed over its entries, with a 95% interval, times the evaluations of f that one estimate takes; and the largest
  |mean - truth| / standard error over the entries. Peers (storchastic, pyro) where their cells exist
  (`gradients_peers.py`, run first by an interpreter that has them); Gaussian rows of lowvar are exact (quadrature).
- vae (`gradients_vae.py`): the encoder's gradient variance along training, the negative bound on training and held-out
  images, several seeds;
- overhead: the interpreter against the same estimator (DisARM) written by hand for this VAE, interleaved, median ratio
  of CPU time: program mapped sample by sample, or run on the batch at once (`batched=True`).

Cells are kept under build/benchmarks/gradients; those that are there are not run again.

    python benchmarks/gradients.py             # writes benchmarks/results/gradients.json, docs/results/gradients.md
    python benchmarks/gradients.py --report    # from the cells alone
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from gradients_problems import Problem, problems
from gradients_vae import ESTIMATORS, control, overhead, train
from torch import Tensor
from torch.distributions import Bernoulli

from lowvar import __version__
from lowvar.gradients import (
    ARM,
    REBAR,
    RELAX,
    Antithetic,
    DisARM,
    Enumerate,
    Estimator,
    Expectation,
    LeaveOneOut,
    MeasureValued,
    MultiSample,
    Optimal,
    Pathwise,
    Score,
    Sites,
    Taylor,
    diagnose,
)
from lowvar.process import Independent
from lowvar.testing import QuadratureRule, exact_moments

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gradients.json"
TABLE = ROOT / "docs" / "results" / "gradients.md"
CACHE = Path(os.environ.get("LOWVAR_BENCHMARKS", ROOT / "build" / "benchmarks")) / "gradients"
Row = dict[str, Any]
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 7: 2.36}  # Student's t, degrees of freedom


# --------------------------------------------------------------------------------------------------------- problems


def candidates(problem: Problem) -> dict[str, tuple[Callable[[], Estimator], int]]:
    """What runs on a problem, and with how many samples."""
    bits, d = isinstance(problem.law(problem.theta), Bernoulli), problem.law(problem.theta).mean.numel()
    found: dict[str, tuple[Callable[[], Estimator], int]] = {
        "Score": (Score, 1),
        "Score(LeaveOneOut), n = 2": (lambda: Score(LeaveOneOut()), 2),
        "Score(Optimal), n = 4": (lambda: Score(Optimal()), 4),
    }
    if bits:
        found |= {
            "MultiSample(2)": (lambda: MultiSample(2), 1),
            "ARM": (ARM, 1),
            "DisARM": (DisARM, 1),
            "Antithetic(DisARM)": (lambda: Antithetic(DisARM()), 1),
            "REBAR": (lambda: REBAR(1.0, 0.5), 1),
            "RELAX": (lambda: RELAX(fitted(problem)), 1),
        }
        if d <= 4:
            found |= {"MeasureValued": (MeasureValued, 1), "Enumerate": (Enumerate, 1)}
        return found
    return found | {
        "Pathwise": (Pathwise, 1),
        "Antithetic(Pathwise)": (lambda: Antithetic(Pathwise()), 1),
        "MeasureValued": (MeasureValued, 1),
        "Score(Taylor)": (lambda: Score(Taylor(problem.f)), 1),
        "Score(LeaveOneOut + Taylor), n = 4": (lambda: Score(LeaveOneOut() + Taylor(problem.f)), 4),
    }


def program_of(problem: Problem, rule: Estimator) -> Callable[..., None]:
    """The problem as a program, which broadcasts."""

    def program(theta: Tensor, s: Sites) -> None:
        s.cost("f", problem.f(s.sample("x", problem.law(theta), rule)))
        s.cost("known", problem.known(theta), parents=())

    return program


def fitted(problem: Problem, updates: int = 500) -> torch.nn.Module:
    """RELAX's control variate, trained on its own variance at the problem's parameters."""
    learned = control(len(problem.theta))
    E = Expectation(program_of(problem, RELAX(learned)), 8, batched=True)
    state = E.init(problem.theta)
    optimiser = torch.optim.Adam(learned.parameters(), lr=3e-3)
    for step in range(updates):
        _, state, info = E.surrogate(problem.theta, Independent(5), state, step=step)
        optimiser.zero_grad()
        info.auxiliary.backward()
        optimiser.step()
    return learned.requires_grad_(False)


def cell(problem: Problem, name: str, repeats: int) -> Row:
    """One estimator on one problem."""
    make, n = candidates(problem)[name]
    rule = make()
    program = program_of(problem, rule)
    E = Expectation(program, n, batched=True)
    state = E.init(problem.theta)
    found = diagnose(E, problem.theta, Independent(1), state, repeats=repeats)
    row: Row = {
        "mean": found.mean.tolist(),
        "parameters": found.parameters.tolist(),
        "variance": found.variance,
        "half": found.high - found.variance,
        "evaluations": float(n * len(state.worlds.choices)),
        "ms": milliseconds(E, problem.theta, state),
        "repeats": repeats,
    }
    if problem.name.startswith("gaussian") and n <= 2 and name != "Score(Taylor)":
        exact = exact_moments(program, problem.theta.double(), n=n, rule=QuadratureRule(60, 40))
        row |= {"variance": float(exact.variance.sum()), "half": 0.0, "exact": True}
    return {"problem": problem.name, "library": "lowvar", "estimator": name, **row}


def milliseconds(E: Expectation, theta: Tensor, state: Any) -> float:
    """CPU time of a gradient with fresh noise, median of 30."""
    leaf, times = theta.clone().requires_grad_(), []
    for step in range(30):
        begin = time.process_time()
        E.surrogate(leaf, Independent(2), state, step=step)[0].backward()
        times.append(time.process_time() - begin)
    return 1e3 * statistics.median(times)


def judged(row: Row) -> Row:
    """The row with its bias: the largest z of an entry, and whether it is wrong (0.1% for all entries together)."""
    if "refusal" in row:
        return row
    truth = problems()[row["problem"]].truth
    mean = torch.tensor(row["mean"], dtype=torch.float64)
    error = (torch.tensor(row["parameters"], dtype=torch.float64) / row["repeats"]).sqrt()
    off = (mean - truth).abs()
    rounding = 1e-5 * float(truth.abs().max())  # the estimators run in float32
    z = float(((off - rounding).clamp_min(0) / error.clamp_min(1e-30)).max()) if float(error.max()) > rounding else 0.0
    allowed = statistics.NormalDist().inv_cdf(1 - 0.0005 / len(truth))
    wrong = z > allowed if float(error.max()) > rounding else float(off.max()) > 1e-3 * float(truth.abs().max())
    kept = {k: v for k, v in row.items() if k not in ("mean", "parameters")}
    return kept | {
        "z": z,
        "allowed": allowed,
        "wrong": bool(wrong),
        "bias": float(off.norm() / truth.norm()),
        "work": row["variance"] * row["evaluations"],
    }


# ------------------------------------------------------------------------------------------------------------- cells


def cached(name: str, make: Callable[[], Row], report: bool) -> Row | None:
    """A cell's file, or a run that makes it."""
    file = CACHE / f"{name}.json".replace("/", ":")
    if not file.exists():
        if report:
            return None
        file.parent.mkdir(parents=True, exist_ok=True)
        row = make()
        file.write_text(json.dumps(row) + "\n")
        print(name, flush=True)
    return json.loads(file.read_text())


def collected(options: argparse.Namespace) -> dict[str, Any]:
    """All cells, run or read."""
    rows: list[Row] = []
    for problem in problems().values():
        for name in candidates(problem):
            row = cached(
                f"lowvar, {problem.name}, {name}",
                lambda problem=problem, name=name: cell(problem, name, options.repeats),
                options.report,
            )
            rows += [] if row is None else [row]
    for file in sorted(CACHE.glob("storchastic, *.json")) + sorted(CACHE.glob("pyro, *.json")):
        rows.append(json.loads(file.read_text()))
    order = list(problems())
    judgements = sorted(map(judged, rows), key=lambda r: (order.index(r["problem"]), r.get("work", math.inf)))
    runs = [
        cached(
            f"vae, {name}, {seed}",
            lambda name=name, seed=seed: train(name, seed, options.updates),
            options.report,
        )
        for seed in range(options.seeds)
        for name in ESTIMATORS
    ]
    ratios = cached("overhead", lambda: {"rows": overhead(options.rounds)}, options.report)
    return {"problems": judgements, "vae": vae([r for r in runs if r]), "overhead": ratios["rows"] if ratios else []}


def vae(runs: list[Row]) -> list[Row]:
    """Over seeds: mean and half a 95% interval; held-out bounds also against DisARM, paired."""
    rows = []
    reference = {r["seed"]: r for r in runs if r["estimator"] == "DisARM"}
    for name in ESTIMATORS:
        mine = [r for r in runs if r["estimator"] == name]
        if len(mine) < 2:
            continue
        away = [r["held_out"] - reference[r["seed"]]["held_out"] for r in mine if r["seed"] in reference]
        rows.append(
            {
                "estimator": name,
                "seeds": len(mine),
                "updates": mine[0]["updates"],
                "cost": mine[0]["cost"],
                "variance": [statistics.geometric_mean(v) for v in zip(*[r["variance"] for r in mine], strict=True)],
                "train": interval([r["train"] for r in mine]),
                "held_out": interval([r["held_out"] for r in mine]),
                "against_disarm": interval(away) if len(away) > 1 else None,
                "ms": statistics.median(r["ms"] for r in mine),
            }
        )
    return rows


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half a 95% interval by Student's t."""
    half = T95.get(len(values) - 1, 2.0) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


# ------------------------------------------------------------------------------------------------------------ report


def summary(rows: list[Row]) -> list[Row]:
    """For each problem the least variance x evaluations of a right gradient here and among peers."""
    found = []
    for name in dict.fromkeys(r["problem"] for r in rows):
        right = [r for r in rows if r["problem"] == name and "work" in r and not r["wrong"]]
        best = {side: [r for r in right if (r["library"] == "lowvar") == side] for side in (True, False)}
        tops = {side: min(best[side], key=lambda r: r["work"], default=None) for side in best}
        found.append({"problem": name, "lowvar": tops[True], "peer": tops[False]})
    return found


def _top(row: Row | None) -> str:
    if row is None:
        return "none ran"
    library = "" if row["library"] == "lowvar" else f"{row['library']} "
    half = row["half"] * row["evaluations"]
    return f"{library}{row['estimator']}: {row['work']:.3g}" + (f" ± {half:.2g}" if half else "")


def tables(found: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = ["| problem | least variance x evaluations, lowvar | among peers |", "|---|---|---|"]
    lines += [f"| {s['problem']} | {_top(s['lowvar'])} | {_top(s['peer'])} |" for s in summary(found["problems"])]
    lines += [
        "",
        "| problem | library | estimator | variance | evaluations | variance x evaluations | ms | bias, largest z |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in found["problems"]:
        head = f"| {r['problem']} | {r['library']} | {r['estimator']} |"
        if "refusal" in r:
            lines.append(f"{head} does not run: {r['refusal'].split(':')[0]} | | | | |")
            continue
        half = "" if r["half"] == 0 else f" ± {r['half']:.2g}"
        verdict = f"**{r['z']:.1f}, wrong** ({100 * r['bias']:.0f}% off)" if r["wrong"] else f"{r['z']:.1f}"
        lines.append(
            f"{head} {r['variance']:.3g}{half} | {r['evaluations']:.3g} | {r['work']:.3g} | {r['ms']:.2f} | {verdict} |"
        )
    if found["vae"]:
        first = found["vae"][0]
        places = " | ".join(f"variance, {k * first['updates'] // 4}" for k in range(5))
        head = f"| VAE, {first['updates']} updates, {first['seeds']} seeds | {places} | evaluations | "
        tail = "negative bound, training images | held out | held out, less DisARM's | ms a step |"
        lines += ["", head + tail, "|---|" + "---|" * 10]
    for r in found["vae"]:
        away = "" if r["against_disarm"] is None else "{:+.2f} ± {:.2f}".format(*r["against_disarm"])
        lines.append(
            f"| {r['estimator']} | {' | '.join(f'{v:.3g}' for v in r['variance'])} | {r['cost']} | "
            f"{r['train'][0]:.2f} ± {r['train'][1]:.2f} | {r['held_out'][0]:.2f} ± {r['held_out'][1]:.2f} | "
            f"{'' if r['estimator'] == 'DisARM' else away} | {r['ms']:.1f} |"
        )
    lines += ["", "| interpreter / by hand | way | median | 95% | by hand, ms |", "|---|---|---|---|---|"]
    for r in found["overhead"]:
        lines.append(
            f"| {r['row']} | {r['way']} | {r['ratio']:.2f} | {r['low']:.2f} to {r['high']:.2f} | {r['ms_hand']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--updates", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--report", action="store_true", help="only write the results from the cells that were run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "version": __version__,
        "date": dt.date.today().isoformat(),
        "machine": f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        **collected(options),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    text = tables(found)
    TABLE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
