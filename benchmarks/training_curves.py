r"""Does less gradient variance train better? The preset at batch B against the plain recipe at B and at 2 B.

Every run makes the same number of updates with a constant learning rate (so that every point of a curve is a model one
could stop at), U-Net of the default size, v prediction, averaged weights. Held-out loss is the loss meter's plain
squared error on the calibration split, whatever a recipe minimises: the same images, times and noise for all. Per data
set and training seed:

    recovered   (L_plain(B) - L_preset(B)) / (L_plain(B) - L_plain(2 B)) at the end: the share of the gain of a doubled
                batch, at half its evaluations
    share       evaluations at which the preset first has the final loss of plain(B), over all of plain(B)'s (linear
                between validations)
    energy      energy distance of 2,048 samples (photos 512) of diffusers' DDIM at 20 steps

Runs are made one after the other on a machine that may be busy, so their seconds do not compare: for the price of an
update see benchmarks/training_overhead.py. Means over seeds; intervals are Student's t over seeds, of a ratio by the
jackknife over seeds. Runs are kept in build/benchmarks/curves (or $LOWVAR_BENCHMARKS/curves) and in the results, and
are not made again.

    python benchmarks/training_curves.py --data digits --minutes 60
    python benchmarks/training_curves.py --report
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kept import Kept

from lowvar.data import load
from lowvar.evaluation import Cell, draw
from lowvar.metrics import Scorer
from lowvar.process import Independent, NetworkDenoiser
from lowvar.train import PRESETS, Trainer, Validation, config_from

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TABLE = (
    ROOT / "benchmarks" / "results" / "training_curves.json",
    ROOT / "docs" / "results" / "training_curves.md",
)
KEPT = Kept(Path(os.environ.get("LOWVAR_BENCHMARKS", ROOT / "build" / "benchmarks")) / "curves", RESULTS)

SEEDS = range(5)
UPDATES = {"digits": 1200, "photos:16": 400}
VALIDATIONS, SAMPLES = {"digits": 20, "photos:16": 10}, {"digits": 2048, "photos:16": 512}
BATCH = 32
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, doubled batch": {"batch_size": 2 * BATCH},
    "auto": PRESETS["auto"],
    "auto, times by losses": PRESETS["auto"] | {"times": "loss-second-moment"},
    "improved-diffusion's resampler": {"times": "loss-second-moment"},
    "min-snr": {"weighting": "min-snr"},
    "lognormal times, edm weighting": {"times": "lognormal", "weighting": "edm"},
}
TRIALS: dict[str, dict[str, Any]] = {
    "600 updates": {"updates": 600},
    "twice the learning rate": {"lr": 2e-3},
    "batches of 16": {"batch_size": BATCH // 2},
}
"""Other settings of both plain and auto: where the share of evaluations depends on how noisy training is."""
ARMS |= {f"{arm}; {trial}": ARMS[arm] | changed for trial, changed in TRIALS.items() for arm in ("plain", "auto")}


def _name(data: str, seed: int, arm: str) -> str:
    return f"{data.replace(':', '')}/{arm}@{seed}"


def run(data_name: str, seed: int, arm: str) -> dict[str, Any]:
    """One training run: its curve and the quality of its samples."""
    data = load(data_name)
    settings = {"updates": UPDATES[data_name], "batch_size": BATCH, "seed": seed, "head": "none", "lr": 1e-3} | ARMS[
        arm
    ]
    settings |= {"lr_schedule": "constant", "validate_every": UPDATES[data_name] // VALIDATIONS[data_name]}
    trainer = Trainer(data, config_from(settings), device="cpu")
    begun, curve = time.perf_counter(), []
    for record in trainer.run():
        if isinstance(record, Validation):
            found = record.validation
            curve.append([record.update, found.error, found.error_low, found.error_high])
    seconds = trainer.seconds
    denoiser = NetworkDenoiser(trainer.ema_network(), trainer.schedule, trainer.config.prediction, clip=1.0)
    drawn = draw(
        denoiser, Cell("diffusers:ddim", 20, "trailing"), SAMPLES[data_name], data.shape, noise=Independent(500 + seed)
    )
    energy = Scorer(data, metrics=("energy",)).replicates(drawn.samples)["energy"].value
    made = {"data": data_name, "seed": seed, "arm": arm, "curve": curve, "seconds": seconds, "energy": energy}
    print(f"{data_name} {arm} seed {seed}: {curve[-1][1]:.5f}, {time.perf_counter() - begun:.0f} s", flush=True)
    return made


def reached(curve: list[list[float]], target: float) -> float:
    """Updates at which a curve first is at a target, linear between validations; inf if it never is."""
    before = None
    for update, loss, *_ in curve:
        if loss <= target:
            if before is None:
                return float(update)
            w = (before[1] - target) / (before[1] - loss)
            return before[0] + w * (update - before[0])
        before = (update, loss)
    return math.inf


def estimate(values: list[dict[str, float]], statistic: Callable[[dict[str, float]], float]) -> list[float]:
    """[value, low, high] of a statistic of means over seeds, by the jackknife over seeds."""
    from scipy.stats import t

    def of(rows: list[dict[str, float]]) -> float:
        return statistic({k: sum(r[k] for r in rows) / len(rows) for k in rows[0]})

    n, value = len(values), of(values)
    if n < 2:
        return [value, -math.inf, math.inf]
    without = [of([r for j, r in enumerate(values) if j != i]) for i in range(n)]
    mean = sum(without) / n
    reach = float(t.ppf(0.975, n - 1)) * math.sqrt((n - 1) / n * sum((w - mean) ** 2 for w in without))
    return [value, value - reach, value + reach]


COLUMNS = {"loss": 4, "recovered": 2, "share": 2, "energy": 4}


def _row(arm: str, runs: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """A line of the table, of runs by seed: the arm's, plain's and, but for trials, those of plain's doubled batch."""
    values = []
    for own, plain, *double in runs.values():
        updates = plain["curve"][-1][0]
        target = plain["curve"][-1][1]
        share = min(reached(own["curve"], target), 2 * updates) / updates
        value = {"own": own["curve"][-1][1], "plain": target, "share": share, "energy": own["energy"]}
        values.append(value | ({"double": double[0]["curve"][-1][1]} if double else {}))
    row: dict[str, Any] = {"arm": arm, "seeds": list(runs), "loss": estimate(values, lambda v: v["own"])}
    row["recovered"] = None
    if "double" in values[0]:
        row["recovered"] = estimate(values, lambda v: (v["plain"] - v["own"]) / (v["plain"] - v["double"]))
    factor = 2.0 if arm == "plain, doubled batch" else 1.0
    row["share"] = estimate(values, lambda v: factor * v["share"])
    row["energy"] = estimate(values, lambda v: v["energy"])
    return row


def _shown(interval: list[float] | None, digits: int) -> str:
    if interval is None:
        return "–"
    value, low, high = interval
    return f"{value:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if math.isfinite(low) else "")


def report() -> None:
    """Writes what was run."""
    kept = KEPT.all()
    results: dict[str, Any] = {"date": dt.date.today().isoformat(), "torch": torch.__version__, "data": {}}
    results["runs"] = kept
    head = (
        f"U-Net of the default size, v prediction, batches of {BATCH}, constant learning rate, equally many updates; "
        f"means over training seeds with 95% intervals. Measured {results['date']} with torch {torch.__version__}; "
        "script `benchmarks/training_curves.py`."
    )
    titles = ("data", "recipe", "seeds", "held-out loss", "gain of a doubled batch recovered")
    titles += ("share of plain's evaluations", "energy distance")
    trials = []
    lines = [head, "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    earlier = json.loads(RESULTS.read_text())["data"] if RESULTS.exists() else {}
    for name in UPDATES:
        runs = {a: {s: r for s in SEEDS if (r := kept.get(_name(name, s, a)))} for a in ARMS}
        before = {row["arm"]: row for row in earlier.get(name, [])}
        rows = []
        for arm in ARMS:
            plain = "; ".join(["plain", *arm.split("; ")[1:]])
            needed = (arm, plain) if ";" in arm else (arm, plain, "plain, doubled batch")
            seeds = [s for s in SEEDS if all(s in runs[a] for a in needed)]
            if len(seeds) < len(before.get(arm, {"seeds": ()})["seeds"]):
                rows.append(before[arm])  # its runs are not here
            elif seeds:
                rows.append(_row(arm, {s: [runs[a][s] for a in needed] for s in seeds}))
        for row in rows:
            texts = [_shown(row[key], digits) for key, digits in COLUMNS.items()]
            (trials if ";" in row["arm"] else lines).append(
                f"| {name} | {row['arm']} | {len(row['seeds'])} | " + " | ".join(texts) + " |"
            )
        results["data"][name] = rows
    if trials:
        lines += [
            "",
            "Both recipes under other settings; the share is of plain's evaluations under the same settings.",
            "",
        ]
        lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *trials]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    TABLE.write_text("\n".join(lines) + "\n")
    print(TABLE.read_text())


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=",".join(UPDATES), help="comma separated")
    parser.add_argument("--minutes", type=float, default=90, help="budget, processor minutes")
    parser.add_argument("--arms", default="", help="regular expression that an arm's name must match")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="number of training seeds")
    parser.add_argument("--report", action="store_true", help="only write the results from the runs that were made")
    arguments = parser.parse_args()
    if not arguments.report:
        torch.set_num_threads(1)
        end = time.process_time() + 60 * arguments.minutes
        for seed in SEEDS[: arguments.seeds]:
            for name in arguments.data.split(","):
                for arm in (a for a in ARMS if re.search(arguments.arms, a)):
                    cell = _name(name, seed, arm)
                    if KEPT[cell] is None and time.process_time() <= end:
                        KEPT[cell] = run(name, seed, arm)
    report()


if __name__ == "__main__":
    main()
