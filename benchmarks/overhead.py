r"""Cost of one scheduler step: ReverseVarianceScheduler against diffusers' DDPMScheduler.step, 64 x 3 x 32 x 32, CPU.

What it claims, and how it is made to hold:

- the same network output and the same kind of generator for all; a step is everything that `step` does, its noise, the
  lookup of tables and the transforms of a calibrated basis included;
- schedulers take turns block by block (a block is 5 steps of a chain of 20), in an order shuffled a round, so that a
  busy machine disturbs all alike; the ratio is taken within a round;
- reported: the median over rounds of the ratio, with a 95% interval from order statistics (binomial), and the median
  time. The load of the machine while it ran stands beside it.

    python benchmarks/overhead.py              # 1 and 2 threads, 60 rounds each; about a minute
    python benchmarks/overhead.py --report     # writes docs/results/overhead.md from benchmarks/results/overhead.json
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "overhead.json"
TABLE = ROOT / "docs" / "results" / "overhead.md"

SHAPE, BATCH, STEPS, BLOCK = (3, 32, 32), 64, 20, 5
PEER = "DDPMScheduler"
ABOUT = {
    PEER: "diffusers, fixed_small",
    "ddpm-small": "ancestral, beta_tilde",
    "ddpm-isotropic": "ancestral, calibrated, one variance",
    "ddpm-pixel": "ancestral, calibrated, a pixel",
    "ddpm-basis": "ancestral, calibrated, DCT x colour",
    "ddim": "deterministic, order 1",
    "adams-ode": "deterministic, predictor-corrector",
    "dpmpp-2m": "deterministic, DPM-Solver++(2M)",
    "twin-ode": "deterministic, predictor-corrector on the twin's remainder, DCT x colour",
    "twin-flow": "deterministic, flow of the mixture twin (one component) and its frozen remainder, DCT x colour",
    "noise alone": "the draw of a step's noise, for scale",
}


def calibration() -> Any:
    """Tables and twin of Gaussian data with a falling spectrum: what they hold does not matter to the time."""
    import torch

    from lowvar.calibrate import Calibration
    from lowvar.calibrate.table import CovarianceTable
    from lowvar.process.basis import DCTBasis
    from lowvar.process.discrete import schedule_from_diffusers
    from lowvar.process.twin import GaussianTwin

    schedule, basis = schedule_from_diffusers({}), DCTBasis(SHAPE)
    i = torch.arange(32, dtype=torch.float64)
    spectrum = (1 / (1 + i[:, None] ** 2 + i**2)).expand(SHAPE).clone()
    twin = GaussianTwin(torch.zeros(SHAPE, dtype=torch.float64), basis, spectrum)
    logsnr = torch.linspace(float(schedule.logsnr(1.0)), float(schedule.logsnr(1e-3)), 49, dtype=torch.float64)
    level = schedule.level(logsnr)
    rows = torch.cat([twin.posterior(torch.zeros(1, *SHAPE).double(), at).covariance.variance for at in _each(level)])  # type: ignore[union-attr]
    mean = rows.flatten(1).mean(1)
    tables: Any = {
        "isotropic": CovarianceTable("isotropic", logsnr, mean, SHAPE),
        "pixel": CovarianceTable("pixel", logsnr, rows, SHAPE),
        "basis": CovarianceTable("basis", logsnr, rows, SHAPE, basis),
    }
    return Calibration(schedule.fingerprint, logsnr, mean, mean * 0, mean, tables, twin, 1)


def _each(level: Any) -> list[Any]:
    return [level[k] for k in range(len(level))]


def measure(threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a step by scheduler and round."""
    import diffusers
    import torch

    from lowvar.schedulers import ReverseVarianceScheduler

    torch.set_num_threads(threads)
    peer: Any = diffusers.DDPMScheduler()
    held = calibration()
    schedulers: dict[str, Any] = {PEER: peer}
    for name in ABOUT:
        if name not in (PEER, "noise alone"):
            schedulers[name] = ReverseVarianceScheduler.from_scheduler(peer, held, sampler=name)
    x, out = (torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    generator = torch.Generator().manual_seed(2)
    for scheduler in schedulers.values():
        scheduler.set_timesteps(STEPS)

    def block(name: str, first: int) -> float:
        if name == "noise alone":
            begun = time.perf_counter()
            for _ in range(BLOCK):
                torch.randn(x.shape, generator=generator)
            return 1e3 * (time.perf_counter() - begun) / BLOCK
        scheduler, y = schedulers[name], x
        times = scheduler.timesteps[first : first + BLOCK]
        begun = time.perf_counter()
        for t in times:
            y = scheduler.step(out, t, y, generator=generator).prev_sample
        return 1e3 * (time.perf_counter() - begun) / BLOCK

    taken: dict[str, list[float]] = {name: [] for name in ABOUT}
    loads, order = [], list(ABOUT)
    for number in range(-2 * (STEPS // BLOCK), rounds):  # two chains of each before anything counts
        random.Random(number).shuffle(order)
        # a multistep chain goes on where it left; rounds cycle through the chain
        first = (number % (STEPS // BLOCK)) * BLOCK
        found = {name: block(name, first) for name in order}
        if number >= 0:
            loads.append(os.getloadavg()[0])
            for name, value in found.items():
                taken[name].append(value)
    return {"threads": threads, "rounds": rounds, "load": statistics.median(loads), "milliseconds": taken}


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median with the order statistics that enclose it with 95% probability."""
    ordered, n = sorted(values), len(values)
    half = 1.96 * n**0.5 / 2
    low, high = max(0, int(n / 2 - half)), min(n - 1, int(n / 2 + half))
    return statistics.median(ordered), ordered[low], ordered[high]


def run(threads: list[int], rounds: int) -> None:
    """Measures and writes the results, after each number of threads."""
    runs = []
    for count in threads:
        measured = measure(count, rounds)
        rows = []
        for name, taken in measured["milliseconds"].items():
            ratios = [a / b for a, b in zip(taken, measured["milliseconds"][PEER], strict=True)]
            value, low, high = interval(ratios)
            time_value, time_low, time_high = interval(taken)
            rows.append(
                {"sampler": name, "ratio": value, "low": low, "high": high, "milliseconds": time_value}
                | {"milliseconds_low": time_low, "milliseconds_high": time_high}
            )
        runs.append({**{k: v for k, v in measured.items() if k != "milliseconds"}, "rows": rows})
        _write(runs)


def _write(runs: list[dict[str, Any]]) -> None:
    import diffusers
    import torch

    import lowvar

    results = {
        "what": (__doc__ or "").splitlines()[0],
        "date": dt.date.today().isoformat(),
        "batch": [BATCH, *SHAPE],
        "versions": {
            "lowvar": lowvar.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        },
        "runs": runs,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def report() -> None:
    """Writes the table from the results."""
    results = json.loads(RESULTS.read_text())
    v = results["versions"]
    lines = [
        f"One step of {' x '.join(str(n) for n in results['batch'])} float32 on a CPU, relative to diffusers' "
        f"DDPMScheduler.step: median of {results['runs'][0]['rounds']} interleaved blocks with 95% intervals, and "
        f"milliseconds. Measured {results['date']}, torch {v['torch']}, diffusers {v['diffusers']}, {v['machine']}; "
        "load average meanwhile "
        + ", ".join(f"{r['load']:.1f} ({r['threads']} threads)" for r in results["runs"])
        + ".",
        "",
        "| sampler | | " + " | ".join(f"ratio, {r['threads']} threads | ms" for r in results["runs"]) + " |",
        "|---|---" + "|---|---" * len(results["runs"]) + "|",
    ]
    for i, row in enumerate(results["runs"][0]["rows"]):
        cells = []
        for r in results["runs"]:
            at = r["rows"][i]
            cells += [f"{at['ratio']:.2f} [{at['low']:.2f}, {at['high']:.2f}]", f"{at['milliseconds']:.2f}"]
        lines.append(f"| {row['sampler']} | {ABOUT[row['sampler']]} | " + " | ".join(cells) + " |")
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n")
    print(TABLE.read_text())


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="blocks a scheduler")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, comma separated")
    parser.add_argument("--report", action="store_true", help="only write the table from the committed results")
    arguments = parser.parse_args()
    if not arguments.report:
        run([int(n) for n in arguments.threads.split(",")], arguments.rounds)
    report()


if __name__ == "__main__":
    main()
