r"""Few-step quality on real digits: lowvar's samplers against diffusers' schedulers on the demo's own network.

What it claims, and how it is made to hold:

- every sampler runs the *same* network (the demo's, one a training seed) from the *same* starting noise;
- peers are diffusers' schedulers as shipped, each with all three timestep spacings and with the same clipping of x0
  as ours where it offers one; the table shows its best spacing a step count, chosen by the score itself (which favours
  it);
- cost is the number of network evaluations (NFE), the same for all in a row of the table;
- the score is the Frechet distance in features of the digit classifier against the held-out digits, with the kernel
  and energy distance beside it; intervals are 95% block-jackknife intervals over 32 blocks, paired on common noise,
  combined over training seeds as independent;
- "ahead" means that the paired interval excludes 0.

    python benchmarks/demo.py --seeds 0        # runs the cells of one seed; cells already there are not run again
    python benchmarks/demo.py --report         # writes benchmarks/results/demo.json, docs/results/demo.md and .svg
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "benchmarks" / "demo"
RESULTS = ROOT / "benchmarks" / "results" / "demo.json"
TABLE, PLOT = ROOT / "docs" / "results" / "demo.md", ROOT / "docs" / "results" / "demo.svg"

STEPS = (3, 5, 10, 20)
OWN = (
    "twin-flow",
    "twin-ode",
    "twin-sde",
    "adams-ode",
    "ddpm-basis",
    "ddpm-small",
    "ddpm-large",
    "ddpm-learned",
    "ddim-basis",
)
PEERS = ("diffusers:ddpm", "diffusers:ddim", "diffusers:dpmsolver++")
SPACINGS = ("trailing", "linspace", "leading")
METRICS = ("frechet", "kernel", "energy")


def network(seed: int) -> Path:
    """The demo's network of a training seed, trained and calibrated once; the folder of its pipeline."""
    from lowvar.cli import main

    trained, calibrated = CACHE / f"seed{seed}" / "train", CACHE / f"seed{seed}" / "model"
    if not trained.exists():
        command = ["train", "--data", "digits", "--seed", str(seed), "--out", str(trained)]
        partial = trained.with_name(trained.name + ".partial")
        _run(main, [*command, "--resume"] if partial.exists() else command)
    if not calibrated.exists():
        _run(main, ["calibrate", "--model", str(trained), "--data", "digits", "--out", str(calibrated)])
    return calibrated


def _run(main: Any, arguments: list[str]) -> None:
    status = main(arguments)
    if status:
        raise SystemExit(status)


def cells() -> list[tuple[str, int, str | None]]:
    """(sampler, steps, spacing) in the order they are run: few steps first."""
    found: list[tuple[str, int, str | None]] = []
    for steps in STEPS:
        found += [(name, steps, None) for name in OWN]
        found += [(name, steps, spacing) for name in PEERS for spacing in SPACINGS]
    return found


def run(seeds: Sequence[int], n: int, minutes: float, threads: int, only: str) -> None:
    """Runs missing cells whose label `sampler@steps` matches `only` until the budget is spent."""
    from tqdm import tqdm

    from lowvar.cli.models import open_model
    from lowvar.data import load
    from lowvar.evaluation import Cell, draw
    from lowvar.metrics import Scorer
    from lowvar.process.noise import Independent

    torch.set_num_threads(threads)
    begun, data = time.perf_counter(), load("digits")
    scorer = Scorer(data, metrics=METRICS, cache=CACHE)
    for seed in seeds:
        folder = CACHE / f"seed{seed}" / f"n{n}"
        folder.mkdir(parents=True, exist_ok=True)
        model = open_model(network(seed), torch.device("cpu"))
        assert model.calibration is not None
        if not (folder / "reference.json").exists():
            (folder / "reference.json").write_text(json.dumps(_reference(scorer, model, n, seed)))
        todo = [c for c in cells() if re.search(only, f"{c[0]}@{c[1]}") and not (folder / _file(*c)).exists()]
        for name, steps, spacing in tqdm(todo, desc=f"seed {seed}"):
            if time.perf_counter() - begun > 60 * minutes:
                print("budget spent; run again to go on")
                return
            drawn = draw(
                model.denoiser,
                Cell(name, steps, spacing),
                n,
                model.shape,
                calibration=model.calibration,
                noise=Independent(10_000 + seed),
                batch_size=512,
            )
            scores = scorer.replicates(drawn.samples)
            record: dict[str, Any] = {"nfe": drawn.nfe, "grid": drawn.grid, "seconds": drawn.seconds}
            record["scores"] = {
                metric: {"value": r.value, "leave_out": r.leave_out.tolist(), "sizes": r.sizes.tolist()}
                for metric, r in scores.items()
            }
            temporary = folder / (_file(name, steps, spacing) + ".tmp")
            temporary.write_text(json.dumps(record))
            temporary.rename(folder / _file(name, steps, spacing))


def _reference(scorer: Any, model: Any, n: int, seed: int) -> dict[str, Any]:
    """Floor (training images scored as samples) and the twin alone, which costs no evaluation."""
    from lowvar.process.noise import Independent

    z = Independent(10_000 + seed).normal(range(n), model.shape)
    twin = scorer.score(model.calibration.twin.sample(z).clamp(-1, 1))
    floor = scorer.floor()
    return {
        "floor": {m: floor[m].value for m in METRICS},
        "twin alone": {m: twin[m].value for m in METRICS},
        "scores": scorer.description,
        "network": model.about,
    }


def _file(name: str, steps: int, spacing: str | None) -> str:
    return f"{name.replace(':', '_')}@{steps}@{spacing or 'default'}.json"


# ------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Estimate:
    """A mean over training seeds with its 95% interval."""

    value: float
    low: float
    high: float


def _combined(intervals: list[Any]) -> Estimate:
    """Mean of independent estimates; half width from their standard errors."""
    value = sum(i.value for i in intervals) / len(intervals)
    half = sum(((i.high - i.low) / 2) ** 2 for i in intervals) ** 0.5 / len(intervals)
    return Estimate(value, value - half, value + half)


def report(n: int) -> None:
    """Writes the committed results from the cells that were run."""
    import diffusers

    import lowvar
    from lowvar.metrics import Replicates

    seeds = sorted(int(p.parent.name[4:]) for p in CACHE.glob(f"seed*/n{n}"))
    found: dict[tuple[str, int, str | None], list[dict[str, Any]]] = {}
    for cell in cells():
        files = [CACHE / f"seed{s}" / f"n{n}" / _file(*cell) for s in seeds]
        if all(f.exists() for f in files):
            found[cell] = [json.loads(f.read_text()) for f in files]
    references = [json.loads((CACHE / f"seed{s}" / f"n{n}" / "reference.json").read_text()) for s in seeds]

    def replicates(cell: tuple[str, int, str | None], metric: str) -> list[Replicates]:
        parts = [r["scores"][metric] for r in found[cell]]
        return [Replicates(p["value"], torch.tensor(p["leave_out"]).double(), torch.tensor(p["sizes"])) for p in parts]

    def score(cell: tuple[str, int, str | None], metric: str) -> Estimate:
        return _combined([r.interval() for r in replicates(cell, metric)])

    rows: list[dict[str, Any]] = []
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for cell in found:
        name, steps, _ = cell
        for metric in METRICS:
            e = score(cell, metric)
            row = {"sampler": name, "grid": found[cell][0]["grid"], "steps": steps, "nfe": found[cell][0]["nfe"]}
            row |= {"metric": metric, "value": e.value, "low": e.low, "high": e.high}
            rows.append(row)
            if metric == "frechet" and e.value < best.get((name, steps), {"value": float("inf")})["value"]:
                best[name, steps] = row | {"cell": cell}

    pairs = []
    for name, steps in best:
        for rival, at in best:
            calibrated = name == "ddpm-basis" and rival in ("ddpm-small", "ddpm-large", "ddpm-learned")
            against_peer = name in OWN and (rival in PEERS or (name.startswith("twin") and rival == "adams-ode"))
            if at != steps or not (calibrated or against_peer):
                continue
            for metric in METRICS:
                mine, theirs = (replicates(best[key, steps]["cell"], metric) for key in (name, rival))
                e = _combined([a.minus(b).interval() for a, b in zip(mine, theirs, strict=True)])
                pairs.append(
                    {"steps": steps, "metric": metric, "sampler": name, "against": rival}
                    | {"spacing": best[rival, steps]["grid"], "value": e.value, "low": e.low, "high": e.high}
                )

    floor = {m: sum(r["floor"][m] for r in references) / len(references) for m in METRICS}
    twin = {m: sum(r["twin alone"][m] for r in references) / len(references) for m in METRICS}
    results = {
        "what": (__doc__ or "").splitlines()[0],
        "date": dt.date.today().isoformat(),
        "n": n,
        "training_seeds": seeds,
        "floor": floor,
        "twin_alone": twin,
        "scores": references[0]["scores"],
        "network": references[0]["network"],
        "versions": {
            "lowvar": lowvar.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, CPU",
        },
        "rows": rows,
        "paired": pairs,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(_markdown(results, best))
    _plot(results, best)
    print(TABLE.read_text())


def _markdown(results: dict[str, Any], best: dict[tuple[str, int], dict[str, Any]]) -> str:
    steps = sorted({s for _, s in best})
    least = {s: min(row["value"] for (_, at), row in best.items() if at == s) for s in steps}
    lines = ["| sampler | " + " | ".join(f"{s} NFE" for s in steps) + " |", "|---" * (len(steps) + 1) + "|"]
    for name in (*OWN, *PEERS):
        texts = []
        for row in (best.get((name, s)) for s in steps):
            text = "" if row is None else f"{row['value']:.3f} ± {(row['high'] - row['low']) / 2:.3f}"
            if row is not None:
                text = f"**{text}**" if row["value"] == least[row["steps"]] else text
                text += f" ({row['grid']})" if name in PEERS else ""
            texts.append(text)
        lines.append("| " + " | ".join([name, *texts]) + " |")
    seeds = ", ".join(str(s) for s in results["training_seeds"])
    head = (
        f"Frechet distance on digits, {results['n']} samples, mean of training seeds {seeds} with 95% intervals; floor "
        f"(data against data) {results['floor']['frechet']:.3f}, Gaussian twin alone (0 NFE) "
        f"{results['twin_alone']['frechet']:.3f}; peers at their best spacing (in brackets). Measured "
        f"{results['date']} with torch {results['versions']['torch']}, diffusers {results['versions']['diffusers']}.\n"
    )
    lines += ["", "Paired differences (Frechet, common noise; below 0: the first is ahead):", ""]
    lines += ["| NFE | sampler | against | difference | |", "|---|---|---|---|---|"]
    for p in results["paired"]:
        if p["metric"] != "frechet" or not p["sampler"].startswith(("twin", "ddpm-basis")):
            continue
        verdict = "ahead" if p["high"] < 0 else ("behind" if p["low"] > 0 else "level")
        lines.append(
            f"| {p['steps']} | {p['sampler']} | {p['against']} ({p['spacing']}) | {p['value']:+.3f} "
            f"[{p['low']:+.3f}, {p['high']:+.3f}] | {verdict} |"
        )
    return head + "\n" + "\n".join(lines) + "\n"


def _plot(results: dict[str, Any], best: dict[tuple[str, int], dict[str, Any]]) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "lowvar"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    styles = dict(zip((*OWN, *PEERS), "osD^v<>ph*XP", strict=True))
    for name in (*OWN, *PEERS):
        mine = sorted((row for (n, _), row in best.items() if n == name), key=lambda row: row["steps"])
        points = [(r["steps"], r["value"], (r["high"] - r["low"]) / 2) for r in mine]
        if points:
            x, y, e = zip(*points, strict=True)
            line = "--" if name in PEERS else "-"
            axes.errorbar(x, y, e, marker=styles[name], linestyle=line, markersize=5, linewidth=1.2, label=name)
    axes.axhline(results["floor"]["frechet"], color="grey", linestyle=":", label="data against data")
    axes.set(xscale="log", yscale="log", xlabel="network evaluations (NFE)", ylabel="Frechet distance")
    axes.set_xticks(STEPS, [str(s) for s in STEPS])
    axes.minorticks_off()
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=8192, help="samples a cell")
    parser.add_argument("--seeds", default="0,1", help="training seeds, comma separated")
    parser.add_argument("--minutes", type=float, default=60, help="budget")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--only", default="", help="regular expression that a cell's sampler@steps must match")
    parser.add_argument("--report", action="store_true", help="only write the results from the cells that were run")
    arguments = parser.parse_args()
    if not arguments.report:
        run(
            [int(s) for s in arguments.seeds.split(",")],
            arguments.n,
            arguments.minutes,
            arguments.threads,
            arguments.only,
        )
    report(arguments.n)


if __name__ == "__main__":
    main()
