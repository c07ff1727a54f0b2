r"""Bits per dimension of hybrid and variational training, with and without importance-sampled timesteps.

The claim of Nichol & Dhariwal 2021, Sec. 3.3 (improved-diffusion): the gradient of L_vlb is too noisy to train on;
their resampler, times by the losses' second moments as published, makes it trainable and gives the best likelihood.

One small U-Net with a learned-range variance, noise prediction, cosine schedule (their setting); four recipes of as
many updates, batches of 64, 3 training seeds; held-out bits a dimension of the averaged weights on the ancestral chain
of 100 equally spaced steps with the learned variance (the variational bound, grey levels decoded), the same images and
noise for all. Intervals: Student's t over training seeds, of differences paired by seed.

    python benchmarks/training_likelihood.py --minutes 90    # runs what is missing, then writes the results
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from kept import Kept

from lowvar.data import load
from lowvar.process import Independent, NetworkDenoiser, ReverseKernel
from lowvar.process.grid import uniform
from lowvar.sample import vlb
from lowvar.train import config_from, fit

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "training_likelihood.json"
TABLE = ROOT / "docs" / "results" / "training_likelihood.md"
KEPT = Kept(Path(os.environ.get("LOWVAR_BENCHMARKS", ROOT / "build" / "benchmarks")) / "training-likelihood", RESULTS)

SEEDS, STEPS, IMAGES = range(3), 100, 300
UPDATES = {"digits": 1500, "photos:16": 800}
VLB = {"weighting": "none", "detach_mean": False, "head_weight": 1.0}
RECIPES: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "hybrid, importance": {"times": "loss-second-moment"},
    "vlb": VLB,
    "vlb, importance": VLB | {"times": "loss-second-moment"},
}
TRIALS: dict[str, dict[str, Any]] = {
    "vlb, importance by gradient norms": RECIPES["vlb"] | {"times": "gradient-norm"},
    "vlb; lower rate": RECIPES["vlb"] | {"lr": 3e-4},
    "vlb, importance; lower rate": RECIPES["vlb, importance"] | {"lr": 3e-4},
    "vlb; twice as long": RECIPES["vlb"] | {"updates": 3000},
    "vlb, importance; twice as long": RECIPES["vlb, importance"] | {"updates": 3000},
}
"""Where the claim about the bound could hold if it does not at the settings of the others; one seed, digits."""
ALL = RECIPES | TRIALS


def _name(data: str, recipe: str, seed: int) -> str:
    return f"{data.replace(':', '')}/{recipe}@{seed}"


def run(name: str, recipe: str, seed: int) -> dict[str, Any]:
    """One training run and its likelihood."""
    data, begun = load(name), time.perf_counter()
    settings = {"updates": UPDATES[name], "seed": seed, "prediction": "epsilon", "head": "range", "lr": 1e-3}
    settings |= {"validate_every": 10**6} | ALL[recipe]
    fitted = fit(data, config_from(settings), device="cpu", progress=False)
    denoiser = NetworkDenoiser(fitted.network, fitted.schedule, "epsilon", "range", clip=1.0)  # as theirs
    x0 = data.test.images(torch.arange(min(IMAGES, len(data.test))))
    with torch.no_grad():
        kernel = ReverseKernel(1.0, "learned", "decoder")
        bound = vlb(denoiser, kernel, uniform(fitted.schedule, STEPS), x0, data.levels, Independent(20_000))
    made = {"bits": float(bound.total.mean()), "seconds": time.perf_counter() - begun}
    print(f"{name} {recipe} seed {seed}: {made['bits']:.4f} ({made['seconds']:.0f} s)", flush=True)
    return made


def interval(values: list[float]) -> list[float | None]:
    """[mean, low, high]; one value has no interval."""
    from scipy.stats import t

    x = torch.tensor(values, dtype=torch.float64)
    mean = float(x.mean())
    if len(x) < 2:
        return [mean, None, None]
    reach = float(t.ppf(0.975, len(x) - 1)) * float(x.std()) / len(x) ** 0.5
    return [mean, mean - reach, mean + reach]


def report() -> None:
    """Writes what was run."""
    kept = KEPT.all()
    results: dict[str, Any] = {"date": dt.date.today().isoformat(), "torch": torch.__version__, "data": {}}
    results["runs"] = kept
    head = (
        f"Held-out bits a dimension, chain of {STEPS} steps, learned variance, noise prediction; {len(SEEDS)} training "
        f"seeds at most, 95% intervals over seeds. Measured {results['date']} with torch {torch.__version__}; script "
        "`benchmarks/training_likelihood.py`."
    )
    lines = [head, "", "| data | recipe | seeds | bits/dim | less the hybrid's |", "|---|---|---|---|---|"]

    def shown(row: list[float | None]) -> str:
        return f"{row[0]:.3f}" + ("" if row[1] is None else f" [{row[1]:.3f}, {row[2]:.3f}]")

    for name in UPDATES:
        bits = {r: {s: run["bits"] for s in SEEDS if (run := kept.get(_name(name, r, s)))} for r in ALL}
        rows = []
        for recipe, found in bits.items():
            both = sorted(found.keys() & bits["hybrid"].keys())
            if not both:
                continue
            row = {"recipe": recipe, "seeds": both, "bits": interval([found[s] for s in both])}
            row["difference"] = interval([found[s] - bits["hybrid"][s] for s in both])
            rows.append(row)
            lines.append(f"| {name} | {recipe} | {len(both)} | {shown(row['bits'])} | {shown(row['difference'])} |")
        results["data"][name] = rows
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    TABLE.write_text("\n".join(lines) + "\n")
    print(TABLE.read_text())


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=",".join(UPDATES), help="comma separated")
    parser.add_argument("--minutes", type=float, default=90, help="budget, processor minutes; 0 only reports")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="number of training seeds")
    parser.add_argument("--trials", action="store_true", help="the trials too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end = time.process_time() + 60 * arguments.minutes
    for seed in SEEDS[: arguments.seeds]:
        for name in arguments.data.split(","):
            for recipe in ALL if arguments.trials else RECIPES:
                cell = _name(name, recipe, seed)
                if KEPT[cell] is None and time.process_time() < end:
                    KEPT[cell] = run(name, recipe, seed)
    report()


if __name__ == "__main__":
    main()
