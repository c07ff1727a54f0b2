"""The loss meter against plain evaluation: variance of the validation loss at equal network evaluations.

- one small U-Net a data set, trained here (v-prediction, default recipe, few updates) and then fixed;
- plain: every image 4 times, times uniform and independent, noise independent; its variance given the images is the
  pooled variance within images of `--plain` such evaluations, divided by the number of evaluations;
- meter: `ValidationSet` as `lowvar train` uses it, and the same with times allocated by what an earlier, independent
  validation left over; each at `--replicates` seeds of times and noise;
- two figures each: plain's variance over the replicates' empirical variance, and over their mean reported se^2, which
  is what the interval is made of. The reference for coverage is the mean of all of a row's replicates.

    python benchmarks/loss_meter.py            # writes benchmarks/results/loss_meter.json, docs/results/loss_meter.md
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
from pathlib import Path
from typing import Any

import torch

from lowvar import __version__
from lowvar.data import load
from lowvar.process import Independent, NetworkDenoiser
from lowvar.train import Objective, Simple, TrainConfig, UniformTimes, ValidationSet, fit, make_schedule
from lowvar.train.meter import Estimate, allocation

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "loss_meter.json"
TABLE = ROOT / "docs" / "results" / "loss_meter.md"
UPDATES = {"digits": 400, "photos:16": 400}
BATCH = {"digits": 64, "photos:16": 32}


def plain_variance(validation: ValidationSet, denoiser: NetworkDenoiser, rounds: int) -> tuple[float, float]:
    """Mean, and variance given the images, of one evaluation at a uniform time."""
    source, n = Independent(77), validation.n
    rows = torch.arange(n * rounds)
    u = source.uniform(rows, (), draw=1, dtype=torch.float64)
    losses = []
    for some in rows.split(256):
        x0 = validation.images.images(some % n)
        level = validation.schedule.at(validation.times.at(u[some]).t)
        with torch.no_grad():
            losses.append(Objective(Simple()).losses(denoiser, x0, source.normal(some, x0.shape[1:]), level).loss)
    table = torch.cat(losses).double().reshape(rounds, n)
    return float(table.mean()), float(table.var(0).mean())


def row(name: str, found: list[Estimate], plain: float) -> dict[str, Any]:
    """One row of the table."""
    value = torch.tensor([e.value for e in found], dtype=torch.float64)
    se2 = sum(e.se**2 for e in found) / len(found)
    mean, n = float(value.mean()), len(found)
    return {
        "row": name,
        "replicates": n,
        "loss": mean,
        "se": se2**0.5,
        "population_se": (sum(e.population_se**2 for e in found) / n) ** 0.5,
        "gain_empirical": plain / float(value.var()),
        "gain_interval": plain / se2,
        "inside": sum(e.interval[0] < mean < e.interval[1] for e in found) / n,
    }


def measured(data_name: str, replicates: int, rounds: int) -> dict[str, Any]:
    """All rows of a data set."""
    data = load(data_name)
    config = TrainConfig(
        updates=UPDATES[data_name],
        batch_size=BATCH[data_name],
        head="none",
        network={"width": 16},  # pyright: ignore[reportArgumentType]
        validate_every=10**6,
    )
    network = fit(data, config, device="cpu", progress=False).network.eval()
    schedule = make_schedule(config)
    denoiser = NetworkDenoiser(network, schedule, "v_prediction")
    objective = Objective(Simple())

    def meter(seed: int, density: torch.Tensor | None = None) -> ValidationSet:
        return ValidationSet(
            data.calibration, schedule, UniformTimes(), seed=seed, density=density, prediction="v_prediction"
        )

    default, own = [], []
    pilot = meter(10_000)
    density = allocation(pilot.measured(pilot.values(denoiser, objective)).residual)
    for seed in range(replicates):
        for found, validation in ((default, meter(seed)), (own, meter(seed, density))):
            found.append(validation.measured(validation.values(denoiser, objective)).total)
    mean, within = plain_variance(pilot, denoiser, rounds)
    plain = within / len(pilot)
    return {
        "images": pilot.n,
        "evaluations": len(pilot),
        "updates": config.updates,
        "plain": {"loss": mean, "se": plain**0.5, "rounds": rounds},
        "rows": [row("as in training", default, plain), row("times from an earlier validation", own, plain)],
    }


def table(results: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Loss meter",
        "",
        "Made by `python benchmarks/loss_meter.py`. Variance of a validation loss given its images, at equal network",
        "evaluations: plain evaluation (independent uniform times, independent noise) over the meter's, by the spread",
        "of replicates (*measured*, relative standard error (2 / replicates)^1/2) and by the meter's own standard",
        "error (*by its interval*). *Inside*: share of the 95% intervals that hold the mean of all replicates.",
        "",
        "| data | evaluations | times | se, plain | se, meter | measured | by its interval | inside | se, population |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, data in results["data"].items():
        for r in data["rows"]:
            lines.append(
                f"| {name} | {data['evaluations']} | {r['row']} | {data['plain']['se']:.5f} | {r['se']:.5f} "
                f"| {r['gain_empirical']:.1f}x | {r['gain_interval']:.1f}x | {r['inside']:.0%} of {r['replicates']} "
                f"| {r['population_se']:.5f} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    """Runs, writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=",".join(UPDATES), help="comma separated; what others were found stays")
    parser.add_argument("--replicates", type=int, default=60, help="seeds")
    parser.add_argument("--plain", type=int, default=24, help="evaluations an image")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    earlier = json.loads(RESULTS.read_text())["data"] if RESULTS.exists() else {}
    results: dict[str, Any] = {"date": dt.date.today().isoformat(), "version": __version__, "data": earlier}
    results["python"], results["torch"] = platform.python_version(), torch.__version__
    for name in arguments.data.split(","):
        results["data"][name] = measured(name, arguments.replicates, arguments.plain)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        TABLE.write_text(table(results))
        print(table(results))


if __name__ == "__main__":
    main()
