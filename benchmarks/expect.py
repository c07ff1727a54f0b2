r"""Evaluations to an interval of given width: the planner and every design, against independent sampling and peers.

What it claims, and how it is made to hold:

- exact targets: chains of 16 DDIM steps (and 16 ancestral ones) on the exact denoisers of the three published mixtures;
  twins are fitted to samples of the target (8,192), as a calibration fits them to data;
- learned networks, trained here by `lowvar train` (digits 800 updates, photos:16 400, one seed) and calibrated by
  `lowvar calibrate`: 16 DDIM steps;
- the tolerance is the half width that independent sampling reaches with `SAMPLES` samples, so the factor is 16 SAMPLES
  over what a run spends until its interval is that narrow, the pilot and everything that was tried included; a run that
  ends narrower than it had to gets nothing for it. Geometric mean over seeds of the noise, with its t interval;
- a twin's compute is no evaluation of the network; seconds are in the runs;
- peers: `scipy.stats.qmc.Sobol` by hand (16 scrambled nets over the start's noise, doubled until the interval from the
  nets is narrow enough; ODE only) and a two-level estimate by hand (16 and 8 steps, same start, independent step noise
  where there is any, allocation from 32 coupled samples).

Runs are kept in build/benchmarks/expect (or $LOWVAR_BENCHMARKS/expect) and in the results, and are not made again.

    python benchmarks/expect.py --minutes 45      # makes the runs that are missing, the most important first
    python benchmarks/expect.py --report          # writes the results, docs/results/expect.md and .svg
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
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from kept import Kept
from scipy.stats import qmc
from scipy.stats import t as student
from torch import Tensor

from lowvar import __version__
from lowvar.cli import main as lowvar
from lowvar.data import load
from lowvar.evaluation import sampler_of
from lowvar.expect import ChainSampler, estimate, estimates
from lowvar.metrics import statistic_named
from lowvar.pipelines import open_pipeline
from lowvar.process import Independent, ReverseKernel
from lowvar.testing import mixture2, mixture8, mixture64
from lowvar.testing.expectations import chain_on

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "expect.json"
TABLE, PLOT = ROOT / "docs" / "results" / "expect.md", ROOT / "docs" / "results" / "expect.svg"
PAGE = ROOT / "docs" / "expectations.md"
CACHE = Path(os.environ.get("LOWVAR_BENCHMARKS", ROOT / "build" / "benchmarks")) / "expect"
KEPT = Kept(CACHE / "runs", RESULTS)

STEPS = 16
SAMPLES = {"exact": 6400, "learned": 2000}
MIXTURES = {"mixture2": mixture2, "mixture8": mixture8, "mixture64": mixture64}
NETWORKS = {"digits": ("digits", 800), "photos": ("photos:16", 400)}
KERNELS = {"ODE": ReverseKernel(0.0, "small"), "SDE": ReverseKernel(1.0, "small")}
DESIGNS = ("antithetic", "twin", "antithetic+twin", "mixture", "antithetic+mixture", "sobol", "few-step", "multilevel")
PEERS = ("scipy Sobol by hand", "two levels by hand")
ROUGH = ("indicator", "fraction", "jpeg")
"""Statistics that are not smooth; all others are."""

Statistic = Callable[[Tensor], Tensor]
EXACT: dict[str, Statistic] = {
    "coordinate": lambda x: x[:, 0],
    "norm": lambda x: x.square().sum(1),
    "sigmoid": lambda x: torch.sigmoid(x[:, 0] + x[:, 1]),
    "indicator": lambda x: (x[:, 0] > 0.5).double(),
}
IMAGES: dict[str, Statistic] = {
    "coordinate": lambda x: x[:, 0, x.shape[2] // 2, x.shape[3] // 2],
    "norm": lambda x: x.square().flatten(1).sum(1),
    "brightness": lambda x: x.flatten(1).mean(1),
    "sigmoid": lambda x: torch.sigmoid(8 * x.flatten(1).mean(1) + 3),
    "indicator": lambda x: (x.flatten(1).mean(1) > -0.4).double(),
    "jpeg": statistic_named("jpeg"),
}
CLASSES = {"class": "class:3", "fraction": "fraction:3"}


def model(name: str) -> Path:
    """A calibrated network; trained where it is not there."""
    data, updates = NETWORKS[name]
    net, out = CACHE / "networks" / f"{name}-net", CACHE / "networks" / name
    common = ["--data", data, "--device", "cpu", "--quiet"]
    if not (net / "model_index.json").exists():
        words = ["train", *common, "--updates", str(updates), "--seed", "0", "--out", str(net), "--resume"]
        assert lowvar(words) == 0
    if not (out / "model_index.json").exists():
        assert lowvar(["calibrate", *common, "--model", str(net), "--choose", "0", "--out", str(out)]) == 0
    return out


@cache
def sampler(target: str, kernel: str) -> ChainSampler:
    """The chain of a target."""
    if target in MIXTURES:
        return chain_on(MIXTURES[target](), STEPS, KERNELS[kernel], mixture=True)
    return sampler_of(open_pipeline(model(target)), STEPS, sampler="ddim")


@cache
def statistic(target: str, name: str) -> Statistic:
    """A statistic of a target's samples."""
    if target in MIXTURES:
        return EXACT[name]
    if name in CLASSES:
        return statistic_named(CLASSES[name], data=load("digits"))
    return IMAGES[name]


def places() -> list[tuple[str, str, str]]:
    """(target, kernel, statistic) of the benchmark."""
    learned = [("digits", "ODE", s) for s in ("brightness", "class", "coordinate", "norm", "sigmoid", "jpeg")]
    learned += [("digits", "ODE", s) for s in ("indicator", "fraction")]
    learned += [("photos", "ODE", s) for s in IMAGES]
    return [(t, k, s) for t in MIXTURES for k in KERNELS for s in EXACT] + learned


def kind(target: str) -> str:
    """Exact or learned."""
    return "exact" if target in MIXTURES else "learned"


@cache
def spread(target: str, kernel: str) -> dict[str, float]:
    """Standard deviation of every statistic over independent samples, which set the tolerances."""
    name = f"spread/{target}/{kernel}"
    found = KEPT[name]
    if found is None:
        chain = sampler(target, kernel)
        number = 4096 if target in MIXTURES else 1024
        x = torch.cat([chain(i, Independent(99)) for i in torch.arange(number).split(256)])
        names = [s for t, k, s in places() if (t, k) == (target, kernel)]
        found = {s: float(statistic(target, s)(x).double().std()) for s in names}
        KEPT[name] = found
    return found


def by_hand_sobol(chain: ChainSampler, f: Statistic, tol: float, seed: int) -> int:
    """Nets of scipy over the start's noise of a deterministic chain, doubled until the interval fits."""
    d, points = math.prod(chain.event_shape), 4
    levels = chain.denoiser.schedule.at(chain.grid)
    spent = 0
    while points <= 1 << 16:
        means = []
        for net in range(16):
            u = torch.tensor(qmc.Sobol(d, seed=1000 * seed + 16 * points + net).random(points))
            z = torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12)).reshape(points, *chain.event_shape).to(chain.dtype)
            state, plan = chain.solver.start(z), chain.solver.prepare(levels)
            for k in range(len(levels) - 1):
                state, _ = chain.solver.step(plan, k, state, chain.denoiser(state.x, levels[k]), None)
            means.append(float(f(state.x).double().mean()))
        spent += 16 * points * chain.nfe
        if student.ppf(0.975, 15) * statistics.stdev(means) / 4 <= tol:
            return spent
        points *= 2
    return spent


def by_hand_two_levels(chain: ChainSampler, f: Statistic, tol: float, seed: int) -> int:
    """Two levels with the same start and no coupling of the steps' noise; n from 32 coupled samples."""
    coarse = chain.coarser
    assert coarse is not None
    plain = ChainSampler(coarse.denoiser, coarse.solver, coarse.grid, coarse.event_shape, dtype=chain.dtype)
    index, noise = torch.arange(32), Independent(seed)
    a, b = f(chain(index, noise)).double(), f(plain(index, noise)).double()
    c1, c0 = chain.nfe + plain.nfe, plain.nfe
    v1, v0 = float((a - b).var()), float(b.var())
    total = (math.sqrt(v1 * c1) + math.sqrt(v0 * c0)) ** 2 / (tol / 1.96) ** 2
    return round(max(total, 32 * c1))


def measured(target: str, kernel: str, name: str, design: str, seed: int) -> dict[str, Any]:
    """One run: evaluations to the tolerance, and what the planner said."""
    chain, f, number = sampler(target, kernel), statistic(target, name), SAMPLES[kind(target)]
    tol = 1.96 * spread(target, kernel)[name] / math.sqrt(number)
    begun = time.perf_counter()
    if design in PEERS:
        nfe = (by_hand_sobol if design == PEERS[0] else by_hand_two_levels)(chain, f, tol, seed)
        return {"nfe": nfe, "seconds": round(time.perf_counter() - begun, 2)}
    # no run is worth more than three times independent sampling
    limit = {"tol": tol, "budget": 3 * STEPS * number, "design": design, "batch_size": 512}
    found = estimate(chain, f, noise=Independent(seed), **limit)
    run: dict[str, Any] = {"nfe": found.nfe, "seconds": round(time.perf_counter() - begun, 2), "chosen": found.design}
    run |= {"reached": found.reached, "tol": tol, "half_width": found.half_width, "vrf": found.vrf}
    if design == "auto":
        run["gains"] = {c.design: round(c.gain, 3) for c in found.decision.candidates if not math.isnan(c.gain)}
    return run


def order(seeds: int) -> list[tuple[str, str, str, str, int]]:
    """All runs, the most important first."""
    where = places()
    first = [p for p in where if p[0] == "mixture64"] + [p for p in where if p[0] == "digits"]
    first += [p for p in where if p[0] in ("mixture8", "mixture2")]
    photos = [p for p in where if p[0] == "photos"]
    runs = [(*p, "auto", s) for s in range(2) for p in first]
    runs += [(*p, d, 0) for d in PEERS for p in first if d != PEERS[0] or p[1] == "ODE"]
    runs += [(*p, "auto", s) for s in range(2) for p in photos]
    runs += [(*p, d, 0) for p in first if p[0] in ("mixture8", "digits") for d in DESIGNS]
    runs += [(*p, "auto", s) for s in range(2, seeds) for p in where]
    runs += [(*p, d, 0) for p in where for d in DESIGNS if p[0] not in ("mixture8", "digits")]
    return runs


def factors(runs: dict[str, Any], place: tuple[str, str, str], design: str) -> dict[str, float] | None:
    """Geometric mean of the factor over seeds with its interval (none of one seed); None where nothing was run."""
    head = "/".join((*place, design)) + "/"
    found = [r for name, r in runs.items() if name.startswith(head)]
    if not found:
        return None
    logs = [math.log(STEPS * SAMPLES[kind(place[0])] / r["nfe"]) for r in found]
    middle, half = statistics.mean(logs), math.nan
    if len(logs) > 1:
        half = float(student.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"factor": math.exp(middle), "low": math.exp(middle - half), "high": math.exp(middle + half), "n": len(logs)}


def convergence() -> dict[str, Any]:
    """Half width by evaluations of three designs and of independent sampling on mixture8, ODE, norm; seed 0."""
    found = KEPT["convergence"]
    if found is None:
        chain, f, found = sampler("mixture8", "ODE"), EXACT["norm"], {}
        budget = STEPS * SAMPLES["exact"] // 2
        for design in ("independent", "sobol", "multilevel", "antithetic+mixture"):
            records = estimates(chain, f, budget=budget, design=design, batch_size=512)
            rows = [(r.nfe, r.estimate.half_width) for r in records if r.estimate is not None]
            found[design] = [list(row) for row in rows if row[1] > 0]
        KEPT["convergence"] = found
    return found


def square_law() -> dict[str, Any]:
    """Cost of a multilevel run of 64 steps against the tolerance, mixture2, norm."""
    found = KEPT["square law"]
    if found is None:
        chain, rows = chain_on(mixture2(), 64), []
        for tol in (0.2, 0.1, 0.05):
            *_, last = estimates(chain, EXACT["norm"], tol=tol, design="multilevel", batch_size=4096)
            rows.append({"tol": tol, "nfe": last.nfe, "nfe_tol2": last.nfe * tol**2})
        found = {"rows": rows}
        KEPT["square law"] = found
    return found


def _cell(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{found['factor']:.2g}" + ("" if found["n"] < 2 else f" [{found['low']:.2g}, {found['high']:.2g}]")


def summary(runs: dict[str, Any], which: str) -> dict[str, Any]:
    """Median factor of the planner over smooth statistics, the worst of all, and how many places were run."""
    auto = {p: f for p in places() if kind(p[0]) == which and (f := factors(runs, p, "auto")) is not None}
    if not auto:
        return {}
    smooth = [f["factor"] for p, f in auto.items() if p[2] not in ROUGH]
    worst = min(auto, key=lambda p: auto[p]["factor"])
    return {
        "places": len(auto),
        "median_smooth": statistics.median(smooth),
        "below_one": sum(f["factor"] < 1 for f in auto.values()),
        "worst": {"place": list(worst), **auto[worst]},
    }


def tables(found: dict[str, Any]) -> str:
    """The results page."""
    runs = found["runs"]
    names = [d for d in ("auto", *PEERS, *DESIGNS) if any(f"/{d}/" in name for name in runs)]
    lines = [
        (
            "Independent sampling's evaluations over a design's, for the half width that independent samples of "
            f"{STEPS} steps reach ({SAMPLES['exact']:,} on exact targets, {SAMPLES['learned']:,} on learned networks); "
            "everything spent is counted, the pilot included. Geometric mean over seeds with its 95% interval, where "
            f"there is more than one; empty: not run. Measured {found['date']}, {found['machine']}; script "
            "`benchmarks/expect.py`."
        ),
        "",
        "| target | chain | statistic | " + " | ".join(names) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    for p in places():
        cells = [_cell(factors(runs, p, n)) for n in names]
        if any(cells):
            lines.append("| " + " | ".join([*p, *cells]) + " |")
    for which, what in (("exact", "exact targets"), ("learned", "learned networks")):
        s = found["summary"][which]
        if s:
            worst = s["worst"]
            lines += [
                "",
                (
                    f"The planner (`auto`) on {what}: median factor of smooth statistics {s['median_smooth']:.1f}, "
                    f"worst of {s['places']} {worst['factor']:.2f} ({', '.join(worst['place'])}), below 1 in "
                    f"{s['below_one']}."
                ),
            ]
    if "square law" in runs:
        lines += [
            "",
            "Multilevel over 64 steps, mixture2, norm: the cost falls as the square of the tolerance.",
            "",
            "| tolerance | evaluations | times tolerance squared |",
            "|---|---|---|",
            *(f"| {r['tol']} | {r['nfe']:,} | {r['nfe_tol2']:.0f} |" for r in runs["square law"]["rows"]),
        ]
    return "\n".join(lines) + "\n"


def block(found: dict[str, Any]) -> str:
    """The table of docs/expectations.md: the planner's factors by target and statistic."""
    lines = [
        "| target | factor on the median smooth statistic | least factor | and on | runs below 1 |",
        "|---|---|---|---|---|",
    ]
    for target in (*MIXTURES, *NETWORKS):
        auto = {p: f for p in places() if p[0] == target and (f := factors(found["runs"], p, "auto")) is not None}
        if auto:
            smooth = statistics.median(f["factor"] for p, f in auto.items() if p[2] not in ROUGH)
            worst = min(auto, key=lambda p: auto[p]["factor"])
            below = sum(f["factor"] < 1 for f in auto.values())
            place = ", ".join(worst[1:])
            lines.append(
                f"| {target} | {smooth:.1f} | {auto[worst]['factor']:.1f} | {place} | {below} of {len(auto)} |"
            )
    return "\n".join(lines)


def plot(curves: dict[str, list[list[float]]]) -> None:
    """Half width by evaluations, one line a design."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "lowvar"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for (name, rows), style in zip(curves.items(), ("-", "--", "-.", ":"), strict=False):
        axes.loglog([r[0] for r in rows], [r[1] for r in rows], style, marker="o", markersize=3, label=name)
    axes.set_xlabel("network evaluations")
    axes.set_ylabel("half width of the 95% interval")
    axes.set_title("mixture8, 16 DDIM steps, squared norm")
    axes.legend(frameon=False)
    figure.savefig(PLOT, metadata={"Date": None})
    plt.close(figure)


def report() -> None:
    """Writes results, table and plot from the runs that were made."""
    runs = KEPT.all()
    found: dict[str, Any] = {
        "version": __version__,
        "date": dt.date.today().isoformat(),
        "machine": f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "samples": SAMPLES,
        "summary": {which: summary(runs, which) for which in SAMPLES},
        "runs": runs,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    if "convergence" in runs:
        plot(runs["convergence"])
    text = tables(found)
    TABLE.write_text(text)
    page = PAGE.read_text()
    head, tail = page.split("<!-- factors -->")[0], page.split("<!-- end factors -->")[1]
    PAGE.write_text(f"{head}<!-- factors -->\n{block(found)}\n<!-- end factors -->{tail}")
    print(text)


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of the planner's runs")
    parser.add_argument("--minutes", type=float, default=45, help="no run begins after so many")
    parser.add_argument("--only", default="", help="target, kernel and statistic that runs have to begin with")
    parser.add_argument("--designs", default="", help="comma separated; default: all")
    parser.add_argument("--report", action="store_true", help="make no run, write the report")
    options = parser.parse_args()
    begun = time.perf_counter()
    wanted = [] if options.report else order(options.seeds)
    for target, kernel, name, design, seed in wanted:
        run = f"{target}/{kernel}/{name}/{design}/{seed}"
        if not run.startswith(options.only) or (options.designs and design not in options.designs.split(",")):
            continue
        if KEPT[run] is not None:
            continue
        if time.perf_counter() - begun > 60 * options.minutes:
            print("time spent: the rest is left out")
            break
        KEPT[run] = found = measured(target, kernel, name, design, seed)
        factor = STEPS * SAMPLES[kind(target)] / found["nfe"]
        print(run, f"{factor:.2f}", found.get("chosen", ""), f"{found['seconds']:.1f} s", flush=True)
    if not options.report and not options.only:
        square_law()
        convergence()
    report()


if __name__ == "__main__":
    main()
