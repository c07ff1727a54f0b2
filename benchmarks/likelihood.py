r"""Bits per dimension on held-out digits: calibrated variances on chosen grids against fixed and analytic variances.

What it claims, and how it is made to hold:

- one network (the demo's) a seed, the same 300 held-out images (the first of them where a row has fewer) and the same
  noise at step k for all;
- the variational bound of the ancestral chain with the data's 17 grey levels decoded, no clipping of covariances;
- peers are DDPM's fixed variances (Ho et al. 2020) and Analytic-DPM (Bao et al. 2022) on equally spaced timesteps, the
  better of `uniform` and `trailing` at its number of steps; and on the grids made for them here, as Analytic-DPM is
  also used with an optimal trajectory;
- grids are made from the calibration split, never from the images that are scored;
- intervals are 95% over images, of paired differences where two rows are compared; an image's value is its mean over
  the training seeds, so that the spread between networks is not in them.

    python benchmarks/likelihood.py            # runs the cells that are missing
    python benchmarks/likelihood.py --report   # writes benchmarks/results/likelihood.json, docs/results/likelihood.md
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "benchmarks" / "likelihood"
MODELS = ROOT / "build" / "benchmarks" / "demo"
RESULTS = ROOT / "benchmarks" / "results" / "likelihood.json"
TABLE = ROOT / "docs" / "results" / "likelihood.md"
LN2 = 0.6931471805599453


class Cell(NamedTuple):
    """A row of the table."""

    variance: str
    steps: int
    grid: str

    @property
    def file(self) -> str:
        """Where it is kept."""
        return f"{self.variance}@{self.steps}@{self.grid.replace(':', '_')}.json"


def cells() -> list[Cell]:
    """In the order they are run."""
    found = []
    for steps in (10, 20, 50):
        for variance in ("small", "large", "analytic", "isotropic", "pixel", "basis"):
            chosen = {"large": None, "analytic": "isotropic"}.get(variance, variance)
            grids = ["uniform", "trailing"]
            grids += [f"variance-matched:{chosen}", f"optimal:{chosen}"] if chosen else []
            found += [Cell(variance, steps, grid) for grid in grids]
    found += [Cell(variance, 100, "uniform") for variance in ("small", "analytic", "basis")]
    found += [Cell("small", 1000, "uniform")]
    return found


def run(models: Path, seeds: list[int], minutes: float, threads: int, only: str, images: int) -> None:
    """Runs missing cells whose file name matches `only` until the budget is spent."""
    from tqdm import tqdm

    from lowvar.calibrate import calibrated_grid, cost_curve
    from lowvar.cli.models import open_model
    from lowvar.data import load
    from lowvar.process import Independent, ReverseKernel
    from lowvar.sample import vlb

    torch.set_num_threads(threads)
    begun, data = time.perf_counter(), load("digits")
    x0 = data.test.images(torch.arange(min(images, len(data.test))))
    for seed in seeds:
        folder = CACHE / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        model = open_model(models / f"seed{seed}" / "model", torch.device("cpu"))
        calibration, schedule = model.calibration, model.denoiser.schedule
        assert calibration is not None
        for cell in tqdm(
            [c for c in cells() if re.search(only, c.file) and not (folder / c.file).exists()], desc=f"seed {seed}"
        ):
            if time.perf_counter() - begun > 60 * minutes:
                print("budget spent; run again to go on")
                return
            fixed = cell.variance in ("small", "large")
            structure = {"large": "small", "analytic": "isotropic"}.get(cell.variance, cell.variance)
            plan = calibrated_grid(cell.grid, calibration, schedule, cell.steps, structure, data.levels)
            denoiser = model.denoiser if fixed else calibration.attach(model.denoiser, cell.variance)
            kernel = ReverseKernel(1.0, cell.variance if fixed else "posterior", "decoder")  # type: ignore[arg-type]
            start = time.perf_counter()
            bound = vlb(denoiser, kernel, plan.grid, x0, data.levels, Independent(20_000 + seed))
            curve = cost_curve(calibration, schedule, structure, data.levels)
            from_start = curve.continuous - curve.information(schedule.logsnr(plan.grid[0]).clamp_min(-12.0))
            record: dict[str, Any] = {
                "bits": bound.total.tolist(),
                "prior": float(bound.prior.mean()),
                "decoder": float(bound.decoder.mean()),
                "kl": bound.kl.mean(0).tolist(),
                "times": plan.grid.tolist(),
                "predicted": plan.path_kl / LN2 + float(from_start) / curve.d / LN2 + float(bound.prior.mean()),
                "seconds": time.perf_counter() - start,
                "network": model.about,
            }
            temporary = folder / (cell.file + ".tmp")
            temporary.write_text(json.dumps(record))
            temporary.rename(folder / cell.file)


# ------------------------------------------------------------------------------------------------------------- report


def _interval(values: torch.Tensor) -> dict[str, float]:
    mean, half = float(values.mean()), 1.96 * float(values.std()) / len(values) ** 0.5
    return {"value": mean, "low": mean - half, "high": mean + half}


PEERS = (
    ("fixed-small at 1000, equally spaced", "small", 1000, False),
    ("analytic at 50, equally spaced", "analytic", 50, False),
    ("analytic at 50, on the grid made for it here", "analytic", 50, True),
)


def report(seeds: list[int]) -> None:
    """Writes the committed results from the cells that were run for all of the seeds."""
    import lowvar

    records: dict[Cell, list[dict[str, Any]]] = {}
    for cell in cells():
        files = [CACHE / f"seed{s}" / cell.file for s in seeds]
        if all(f.exists() for f in files):
            records[cell] = [json.loads(f.read_text()) for f in files]
    bits = {cell: torch.tensor([r["bits"] for r in found]).double().mean(0) for cell, found in records.items()}

    def mean(cell: Cell, name: str) -> float:
        return sum(r[name] for r in records[cell]) / len(seeds)

    rows = []
    for cell in records:
        row = {"variance": cell.variance, "steps": cell.steps, "nfe": cell.steps, "grid": cell.grid}
        row["images"] = len(bits[cell])
        row |= _interval(bits[cell]) | {name: mean(cell, name) for name in ("prior", "decoder", "predicted")}
        row["by_seed"] = [sum(r["bits"]) / len(r["bits"]) for r in records[cell]]
        rows.append(row)

    def best(variance: str, steps: int, *, chosen: bool) -> Cell | None:
        """A variance's cell on the grid that dynamic programming chose for it, or its better one on spaced times."""
        found = [c for c in records if c.variance == variance and c.steps == steps]
        found = [c for c in found if (c.grid.startswith("optimal") if chosen else ":" not in c.grid)]
        return min(found, key=lambda c: float(bits[c].mean()), default=None)

    paired = []
    for steps in (10, 20):
        for what, peer, peer_steps, chosen in PEERS:
            for variance in ("isotropic", "pixel", "basis"):
                a, b = best(variance, steps, chosen=True), best(peer, peer_steps, chosen=chosen)
                if a is None or b is None:
                    continue
                both = min(len(bits[a]), len(bits[b]))
                head = {"what": what, "ours": a._asdict(), "peer": b._asdict(), "images": both}
                paired.append(head | _interval(bits[a][:both] - bits[b][:both]))
    results = {
        "what": (__doc__ or "").splitlines()[0],
        "date": dt.date.today().isoformat(),
        "training_seeds": seeds,
        "images": max(len(b) for b in bits.values()),
        "network": next(iter(records.values()))[0]["network"],
        "versions": {
            "lowvar": lowvar.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, CPU",
        },
        "rows": rows,
        "paired": paired,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(_markdown(results))
    print(TABLE.read_text())


def _markdown(results: dict[str, Any]) -> str:
    steps = (10, 20, 50, 100, 1000)
    table: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in results["rows"]:
        table.setdefault((row["variance"], row["grid"].split(":")[0]), {})[row["steps"]] = row
    lines = ["| variance | grid | " + " | ".join(f"{s} NFE" for s in steps) + " |", "|---" * (len(steps) + 2) + "|"]
    for (variance, grid), found in sorted(table.items(), key=lambda item: _ORDER.index(item[0][0])):
        texts = [
            f"{found[s]['value']:.3f} ± {(found[s]['high'] - found[s]['low']) / 2:.3f}" if s in found else ""
            for s in steps
        ]
        lines.append("| " + " | ".join([variance, grid, *texts]) + " |")
    seeds = ", ".join(str(s) for s in results["training_seeds"])
    head = (
        f"Bits per dimension on {results['images']} held-out digits (17 grey levels decoded), mean of training seeds "
        f"{seeds} with 95% intervals over images. Measured {results['date']} with torch "
        f"{results['versions']['torch']}.\n"
    )
    lines += ["", "Paired differences over images (below 0: ours needs fewer bits):", ""]
    lines += ["| ours | against | peer | images | difference | |", "|---|---|---|---|---|---|"]
    for p in results["paired"]:
        verdict = "ahead" if p["high"] < 0 else ("behind" if p["low"] > 0 else "level")
        ours, peer = (f"{c['variance']}@{c['steps']} ({c['grid']})" for c in (p["ours"], p["peer"]))
        interval = f"{p['value']:+.4f} [{p['low']:+.4f}, {p['high']:+.4f}]"
        lines.append(f"| {ours} | {p['what']} | {peer} | {p['images']} | {interval} | {verdict} |")
    gaps = [
        abs(r["value"] - r["predicted"]) for r in results["rows"] if r["variance"] in ("isotropic", "pixel", "basis")
    ]
    tail = (
        "\nThe calibration predicts these rows before any is run: for the tables the median gap between predicted and "
        f"measured is {sorted(gaps)[len(gaps) // 2]:.3f} bits a dimension, the largest {max(gaps):.3f}.\n"
    )
    return head + "\n" + "\n".join(lines) + "\n" + tail


_ORDER = ("small", "large", "analytic", "isotropic", "pixel", "basis")


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the demo benchmark's networks")
    parser.add_argument("--seeds", default="0,1", help="training seeds, comma separated")
    parser.add_argument("--minutes", type=float, default=60, help="budget")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--only", default="", help="regular expression that a cell's file name must match")
    parser.add_argument("--images", type=int, default=300, help="held-out images; pairs are taken over those both have")
    parser.add_argument("--report", action="store_true", help="only write the results from the cells that were run")
    arguments = parser.parse_args()
    seeds = [int(s) for s in arguments.seeds.split(",")]
    if not arguments.report:
        run(arguments.models, seeds, arguments.minutes, arguments.threads, arguments.only, arguments.images)
    report(seeds)


if __name__ == "__main__":
    main()
