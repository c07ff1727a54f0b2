r"""Which noise belongs to a mean: marginal deficits against the residual form kappa^2 C, on the demo's digits networks.

For each mean (DDIM, ancestral, DPM-Solver++(2M), UniPC-2, SA-Solver) the same chain is run

    none        as published
    deficit     plus what its marginal lacks in the twin's basis (`lowvar.calibrate.marginal_deficit`, 2,048 chains)
    centred     the same, and the marginal's mean put right as well
    residual    plus kappa^2 C of the residual table in steps of one posterior: all of them at first order, the first
                one of a multistep method (`covariance=True`)
    both        residual, then the deficit of that chain

on common noise, and scored as in `benchmarks/demo.py`: Frechet distance in features of the digit classifier, energy
distance and the error of the covariance spectrum beside it; 95% block-jackknife intervals, paired, combined over
training seeds. The networks are those of `benchmarks/demo.py`; the trailing grid throughout.

    python benchmarks/calibrated_noise.py              # runs what is missing
    python benchmarks/calibrated_noise.py --report     # writes results/calibrated_noise.json, docs/results/..md

Training is deterministic: networks trained again give the same samples. So rows whose cells are not in the cache (which
is no part of the repository) are taken over from the committed results.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = Path(os.environ.get("LOWVAR_BENCHMARKS", ROOT / "build" / "benchmarks"))
NETWORKS, CACHE = BENCHMARKS / "demo", BENCHMARKS / "calibrated_noise"
RESULTS = ROOT / "benchmarks" / "results" / "calibrated_noise.json"
TABLE = ROOT / "docs" / "results" / "calibrated_noise.md"

SEEDS, STEPS = (0, 1), (3, 5, 10)
METRICS = ("frechet", "energy", "spectrum")
MEANS = {
    "ddim": ("none", "deficit", "centred", "residual", "both"),
    "ddpm": ("none", "deficit", "residual", "both"),
    "dpmpp-2m": ("none", "deficit", "centred", "residual", "both"),
    "unipc": ("none", "deficit", "centred", "residual"),
    "sa": ("none", "deficit", "residual"),
}
FIRST = ("none", "deficit", "residual")  # then the rest
CELLS = [(mean, form, steps) for steps in STEPS for mean, forms in MEANS.items() for form in forms]
CELLS.sort(key=lambda cell: (cell[1] not in FIRST or (cell[2] == 10 and cell[0] in ("ddpm", "sa")), cell[2]))


def solver_of(mean: str, form: str) -> Any:
    """The solver of a mean; with kappa^2 C where the form asks for it."""
    from lowvar.process import DPMSolverPP, ReverseKernel, SASolver, UniPC

    posterior = form in ("residual", "both")
    if mean in ("ddim", "ddpm"):
        return ReverseKernel(float(mean == "ddpm"), "posterior" if posterior else "small")
    made: dict[str, Callable[[], Any]] = {
        "dpmpp-2m": lambda: DPMSolverPP(covariance=posterior),
        "unipc": lambda: UniPC(covariance=posterior),
        "sa": lambda: SASolver(covariance=posterior),
    }
    return made[mean]()


def run(n: int, minutes: float, threads: int) -> None:
    """Runs missing cells until the budget is spent."""
    from tqdm import tqdm

    from lowvar.calibrate import marginal_deficit
    from lowvar.cli.models import open_model
    from lowvar.data import load
    from lowvar.evaluation import sampling_grid
    from lowvar.metrics import Scorer
    from lowvar.process.noise import Independent
    from lowvar.sample import generate

    torch.set_num_threads(threads)
    begun = time.perf_counter()
    scorer = Scorer(load("digits"), metrics=METRICS, cache=NETWORKS)
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / f"floor-n{n}.json").write_text(json.dumps({m: v.value for m, v in scorer.floor(n).items()}))
    models = {seed: open_model(NETWORKS / f"seed{seed}" / "model", torch.device("cpu")) for seed in SEEDS}
    todo = [(s, c) for c in CELLS for s in SEEDS if not _file(n, s, c).exists()]
    for seed, (mean, form, steps) in tqdm(todo):
        if time.perf_counter() - begun > 60 * minutes:
            print("budget spent; run again to go on")
            return
        model = models[seed]
        assert model.calibration is not None
        grid = sampling_grid("trailing", model.denoiser.schedule, steps)
        denoiser, solver = model.calibration.attach(model.denoiser, "basis"), solver_of(mean, form)
        record: dict[str, Any] = {"nfe": solver.nfe(steps)}
        if form in ("deficit", "centred", "both"):
            centre = form == "centred"
            deficit = marginal_deficit(denoiser, solver, grid, model.calibration.twin, centre=centre, batch_size=512)
            solver = deficit.attach(solver, centre=centre)
            axes = tuple(range(1, deficit.variance.ndim))
            record["added"] = deficit.variance.mean(axes).tolist()
            record["measured"] = deficit.measured.mean(axes).tolist()
            record["shift"] = (deficit.shift**2).mean(axes).sqrt().tolist()
        x = generate(denoiser, solver, grid, model.shape, n, Independent(20_000 + seed), batch_size=512, clip=1.0)
        record["scores"] = {
            metric: {"value": r.value, "leave_out": r.leave_out.tolist(), "sizes": r.sizes.tolist()}
            for metric, r in scorer.replicates(x).items()
        }
        temporary = _file(n, seed, (mean, form, steps)).with_suffix(".tmp")
        temporary.write_text(json.dumps(record))
        temporary.rename(temporary.with_suffix(".json"))


def _file(n: int, seed: int, cell: tuple[str, str, int]) -> Path:
    mean, form, steps = cell
    return CACHE / f"{mean}-{form}@{steps}-seed{seed}-n{n}.json"


def report(n: int) -> None:
    """Writes the committed results from the cells that were run."""
    from lowvar.metrics import Replicates

    found = {
        cell: [json.loads(_file(n, s, cell).read_text()) for s in SEEDS]
        for cell in CELLS
        if all(_file(n, s, cell).exists() for s in SEEDS)
    }

    def combined(intervals: list[Any]) -> dict[str, float]:
        value = sum(i.value for i in intervals) / len(intervals)
        half = sum(((i.high - i.low) / 2) ** 2 for i in intervals) ** 0.5 / len(intervals)
        return {"value": value, "low": value - half, "high": value + half}

    def replicates(cell: tuple[str, str, int], metric: str) -> list[Replicates]:
        parts = [r["scores"][metric] for r in found[cell]]
        return [Replicates(p["value"], torch.tensor(p["leave_out"]).double(), torch.tensor(p["sizes"])) for p in parts]

    rows, pairs = [], []
    for cell in found:
        mean, form, steps = cell
        about = {"mean": mean, "noise": form, "steps": steps, "nfe": found[cell][0]["nfe"]}
        about |= {key: found[cell][0][key] for key in ("added", "measured", "shift") if key in found[cell][0]}
        for metric in METRICS:
            rows.append(about | {"metric": metric, **combined([r.interval() for r in replicates(cell, metric)])})
            before = MEANS[mean][: MEANS[mean].index(form)]
            others = [(mean, other, steps) for other in before if (mean, other, steps) in found]
            for other in others:
                mine, theirs = replicates(cell, metric), replicates(other, metric)
                e = combined([a.minus(b).interval() for a, b in zip(mine, theirs, strict=True)])
                pairs.append({"mean": mean, "steps": steps, "metric": metric, "noise": form, "against": other[1], **e})
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": [], "paired": []}
    if kept["rows"] and kept["n"] != n:
        raise SystemExit(f"the committed results have {kept['n']} samples a cell; give --n {kept['n']}")
    rows += [r for r in kept["rows"] if (r["mean"], r["noise"], r["steps"]) not in found]
    done = {(p["mean"], p["steps"], p["noise"], p["against"], p["metric"]) for p in pairs}
    pairs += [p for p in kept["paired"] if (p["mean"], p["steps"], p["noise"], p["against"], p["metric"]) not in done]
    floor = json.loads((CACHE / f"floor-n{n}.json").read_text())
    head = {"what": (__doc__ or "").splitlines()[0], "date": dt.date.today().isoformat(), "n": n, "floor": floor}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(
        json.dumps(head | {"training_seeds": list(SEEDS), "rows": rows, "paired": pairs}, indent=1) + "\n"
    )
    TABLE.write_text(_markdown(head, rows))
    print(TABLE.read_text())


def _markdown(head: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    caption = (
        f"{head['n']} samples a cell, mean of two training seeds with 95% intervals; Frechet distance, and in brackets "
        f"the error of the covariance spectrum. Floor {head['floor']['frechet']:.3f} "
        f"({head['floor']['spectrum']:.3f}). Measured {head['date']}.\n"
    )
    lines = [
        caption,
        "| mean | noise | " + " | ".join(f"{s} NFE" for s in STEPS) + " |",
        "|---" * (2 + len(STEPS)) + "|",
    ]
    for mean, forms in MEANS.items():
        cells: dict[tuple[str, int, str], dict[str, Any]] = {
            (r["noise"], r["steps"], r["metric"]): r for r in rows if r["mean"] == mean
        }
        for form in forms:
            texts = []
            for steps in STEPS:
                f, s = cells.get((form, steps, "frechet")), cells.get((form, steps, "spectrum"))
                text = "" if f is None or s is None else f"{f['value']:.3f} ± {(f['high'] - f['low']) / 2:.3f}"
                texts.append(text if s is None else f"{text} ({s['value']:.3f})")
            lines.append("| " + " | ".join([mean, form, *texts]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=2048, help="samples a cell")
    parser.add_argument("--minutes", type=float, default=40, help="budget")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--report", action="store_true", help="only write the results from the cells that were run")
    arguments = parser.parse_args()
    if not arguments.report:
        run(arguments.n, arguments.minutes, arguments.threads)
    report(arguments.n)


if __name__ == "__main__":
    main()
