r"""What the preset costs a training step: the trainer with `variance_reduction` off and auto, and each of its parts.

Photos of 16 x 16 in colour, the default network with v prediction, batches of 64, one thread: whole updates (draws,
forward, backward, optimiser, average, learned times), interleaved so that a busy machine slows all alike; the median
over blocks of 4 updates (gradient norms are measured once in 4 when their density is in use, as it is here) of the
ratio to the plain updates beside them, with a 95% interval by order statistics.

    python benchmarks/training_overhead.py      # benchmarks/results/training_overhead.json, docs/results/
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from lowvar.data import load
from lowvar.train import PRESETS, GradientNormTimes, Trainer, config_from

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "training_overhead.json"
TABLE = ROOT / "docs" / "results" / "training_overhead.md"
PARTS: dict[str, dict[str, Any]] = {
    "off": {},
    "off, again": {},
    "auto": PRESETS["auto"],
    **{f"{key}: {str(value).lower()}": {key: value} for key, value in PRESETS["auto"].items()},
    "times: loss-second-moment": {"times": "loss-second-moment"},
    "pairing: sobol": {"pairing": "sobol"},
}


def measured(data_name: str, rounds: int, warm: int) -> list[dict[str, Any]]:
    """A row a setting."""
    data = load(data_name)
    common = {"updates": rounds + warm, "head": "none", "batch_size": 64, "validate_every": 10**6}
    trainers = {name: Trainer(data, config_from(common | part), device="cpu") for name, part in PARTS.items()}
    for trainer in trainers.values():
        if isinstance(trainer.times, GradientNormTimes):
            seen = torch.arange(trainer.times.bins).repeat(trainer.times.least)
            trainer.times = trainer.times.updated(seen, 1.0 + seen)
            assert trainer.times.warm
    runs = {name: trainer.run() for name, trainer in trainers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in PARTS}
    for _ in range(rounds + warm):
        for name, run in runs.items():
            begun = time.perf_counter()
            next(run)
            seconds[name].append(time.perf_counter() - begun)
    rows = []
    for name in PARTS:
        blocks = {k: torch.tensor(s[warm:], dtype=torch.float64).reshape(-1, 4).sum(1) for k, s in seconds.items()}
        ratios = (blocks[name] / blocks["off"]).sort().values.tolist()
        n = len(ratios)
        reach = round(0.98 * n**0.5)  # order statistics of a median: n / 2 -+ 1.96 sqrt(n) / 2
        row = {"setting": name, "ratio": ratios[n // 2], "low": ratios[n // 2 - reach], "high": ratios[n // 2 + reach]}
        rows.append(row | {"milliseconds": 1e3 * sorted(seconds[name][warm:])[n // 2]})
        print(row, flush=True)
    return rows


def main() -> None:
    """Runs and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="photos:16")
    parser.add_argument("--rounds", type=int, default=160, help="measured updates, a multiple of 4")
    parser.add_argument("--warm", type=int, default=4, help="updates before them, a multiple of 4")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    rows = measured(arguments.data, arguments.rounds, arguments.warm)
    found = {
        "date": dt.date.today().isoformat(),
        "data": arguments.data,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, CPU, 1 thread",
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    head = (
        f"One update of training over a plain one, {found['data']}, batches of 64, default network, one thread: median "
        f"of blocks of 4 of {found['rounds']} interleaved updates with 95% intervals. Measured {found['date']}, torch "
        f"{found['torch']}, {found['machine']}; load average {found['load'][0]} before, {found['load'][1]} after."
    )
    lines = [head, "", "| setting | ratio | ms |", "|---|---|---|"]
    for r in rows:
        ratio = f"{r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
        lines.append(f"| {r['setting']} | {ratio} | {r['milliseconds']:.0f} |")
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
