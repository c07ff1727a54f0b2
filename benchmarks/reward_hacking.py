"""Reward against KL and held-out quality: the figures of docs/reward-hacking.md, from two runs of `lowvar tune`.

    lowvar demo --out runs/demo
    lowvar tune --model runs/demo --reward jpeg --lr 3e-4 --out runs/free
    lowvar tune --model runs/demo --reward jpeg --estimator x0 --beta 4 --check-every 10 --out runs/held
    python benchmarks/reward_hacking.py runs/free runs/held

Writes docs/results/reward_hacking.md and reward_hacking.svg. A run takes about 200 (free) and 260 seconds (held) of one
core's time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
NAMES = ("free: lr 3e-4, no KL term", "held: lr 1e-4, beta 4")


def checks(run: Path) -> tuple[dict[str, Any], list[tuple[int, dict[str, Any]]]]:
    """The summary, and updates and intervals of every check, the model as it was first."""
    summary = json.loads((run / "summary.json").read_text())
    zero = {"value": 0.0, "low": 0.0, "high": 0.0}
    found = [(0, {"reward": summary["reward_before"], "kl": zero, "quality": summary["quality_before"]})]
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record.get("check"):
            found.append((record["update"] + 1, record["check"]))
    return summary, found


def shown(i: dict[str, float]) -> str:
    return f"{i['value']:.1f} ({i['low']:.1f} to {i['high']:.1f})"


def table(runs: list[Path]) -> str:
    lines = ["| run | updates | KL, nats | minus bytes | kernel distance |", "|---|---|---|---|---|"]
    for name, run in zip(NAMES, runs, strict=True):
        for at, c in checks(run)[1]:
            lines.append(f"| {name} | {at} | {shown(c['kl'])} | {shown(c['reward'])} | {shown(c['quality'])} |")
    about = checks(runs[0])[0]
    note = (
        f"{about['config']['n']} samples a check, the same noise in all, in brackets 95% intervals; seed "
        f"{about['seed']}, lowvar {about['version']}, torch {about['environment']['torch']}. The distance of training "
        f"images to held-out ones at this n is {shown(about['quality_floor'])}."
    )
    return "\n".join([*lines, "", note]) + "\n"


def picture(runs: list[Path]) -> None:
    mpl.rcParams["svg.hashsalt"] = "lowvar"
    figure = Figure((8, 3.4), layout="constrained")
    labels = {"reward": "reward: minus bytes", "quality": "kernel distance to held-out data"}
    for axes, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for name, run, colour, marker in zip(NAMES, runs, ("#cf5600", "#0069ad"), "so", strict=True):
            found = [c for _, c in checks(run)[1]]
            y = [c[key]["value"] for c in found]
            half = [(c[key]["high"] - c[key]["low"]) / 2 for c in found]
            axes.errorbar([c["kl"]["value"] for c in found], y, half, color=colour, marker=marker, label=name)
        axes.set(xlabel="KL to the model before, nats a run", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "reward_hacking.svg", metadata={"Date": None})


if __name__ == "__main__":
    given = [Path(word) for word in sys.argv[1:3]]
    (RESULTS / "reward_hacking.md").write_text(table(given))
    picture(given)
