"""The table and the results of benchmarks/reward.py, from the runs that were made."""

from __future__ import annotations

import datetime as dt
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
from reward_curves import SEEDS, chosen, name_of, reached
from reward_setting import BATCH, REWARDS
from reward_variance import DDPO, DDPO_MEAN, MOMENTS, RULES

from lowvar import __version__

__all__ = ["curve_rows", "mean_interval", "report"]

BIASED = {
    DDPO: "direction",
    DDPO_MEAN: "direction",
    "GRPO: group mean and std": "direction",
    "pathwise, last 1": "truncation",
    "pathwise, last 5": "truncation",
    "pathwise, last step averaged (4)": "truncation",
    "pathwise, random truncation": "truncation",
}
TITLES = {"brightness": "Brightness", "logit": 'Score of "8"', "jpeg": "JPEG size"}
GOALS = {"brightness": 0.1, "logit": 0.1, "jpeg": 0.2}


def mean_interval(values: list[float]) -> list[float]:
    """[mean, low, high], Student's t over seeds."""
    from scipy.stats import t

    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return [mean, -math.inf, math.inf]
    std = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5
    half = float(t.ppf(0.975, n - 1)) * std / n**0.5
    return [mean, mean - half, mean + half]


def _seconds(name: str, seconds: dict[str, float]) -> float:
    if name in RULES:
        return seconds[name]
    kind = "scores, class mean"
    if name.startswith("surrogate"):
        kind = "surrogate, residual ridge on x0_hat"
    elif name.startswith("ridge"):
        kind = "scores, ridge on x0_hat"
    elif name == "value network":
        kind = "scores, value network"
    return seconds[kind]


def variance_table(reward: str, cells: dict[str, dict[str, Any]]) -> list[str]:
    """Estimators of a reward, least variance at the first moment first."""
    lines = [f"## {TITLES[reward]}: variance of the gradient", ""]
    for moment, cell in cells.items():
        line = f"- *{moment}*: mean reward {cell['mean']:.4g}, standard deviation {cell['std']:.3g}, |gradient| "
        line += f"{cell['gradient']:.3g}, {cell.get('batches', 24)} batches"
        if reward == "jpeg":
            left = ", ".join(f"{name} {value:.2f}" for name, value in cell["left"].items())
            line += f"; share of the reward's variance that surrogates leave: {left}"
        lines.append(line + ".")
    head = ["estimator", "declared bias"]
    for moment in cells:
        head += [f"variance, {moment}", "/ DDPO's"] if moment != "far" else ["/ DDPO's, far"]
    head += ["bias (noise)", "cost", "variance x cost"]
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    first = next(iter(cells.values()))
    base = first["rows"][DDPO]["variance"] * _seconds(DDPO, first["seconds"])
    for name, row in sorted(first["rows"].items(), key=lambda item: item[1]["variance"]):
        texts = [name, BIASED.get(name, "none")]
        for moment, cell in cells.items():
            own, ratio = cell["rows"].get(name), cell["ratios"][DDPO].get(name)
            if own is None or ratio is None:
                texts += ["–"] if moment == "far" else ["–", "–"]
                continue
            if moment != "far":
                texts.append(f"{own['variance']:.3g} [{own['low']:.3g}, {own['high']:.3g}]")
            texts.append("1" if name == DDPO else f"{ratio[0]:.2g} [{ratio[1]:.2g}, {ratio[2]:.2g}]")
        seconds = _seconds(name, first["seconds"])
        texts.append(f"{row['bias']:.2f} ({row['noise']:.2f})")
        texts.append(f"{seconds / _seconds(DDPO, first['seconds']):.1f}")
        texts.append(f"{row['variance'] * seconds / base:.2g}")
        lines.append(f"| {' | '.join(texts)} |")
    return [*lines, ""]


def curve_rows(runs: dict[str, Any], reward: str) -> list[dict[str, Any]]:
    """What each chosen setting needs to the fixed reward, over the seeds that all of its column have."""
    rows = []
    for column, settings in chosen(runs, reward).items():
        curves: dict[str, dict[int, dict[str, float] | None]] = {}
        for method, setting in settings.items():
            made = {seed: runs.get(name_of(reward, setting, seed)) for seed in SEEDS}
            curves[method] = {seed: reached(run["curve"]) for seed, run in made.items() if run is not None}
        seeds = [seed for seed in SEEDS if all(seed in points for points in curves.values())]
        if len(seeds) < 2 or "ddpo" not in curves:
            continue
        for method, setting in settings.items():
            points = [curves[method][seed] for seed in seeds]
            found = [p for p in points if p is not None]
            row: dict[str, Any] = {
                "column": column,
                "setting": vars(setting),
                "seeds": seeds,
                "missed": len(points) - len(found),
            }
            if found:
                row |= {key: mean_interval([p[key] for p in found]) for key in ("calls", "kl", "energy", "right")}
            for key in ("calls", "kl", "energy", "right"):
                pairs = [(curves[method][seed], curves["ddpo"][seed]) for seed in seeds]
                both = [(a[key], b[key]) for a, b in pairs if a is not None and b is not None]
                if both and key in ("calls", "kl"):  # ratios by the mean of logarithms
                    logs = mean_interval([math.log(max(a, 1e-9) / max(b, 1e-9)) for a, b in both])
                    row[f"{key} ratio"] = [math.exp(v) for v in logs]
                elif both:
                    row[f"{key} less"] = mean_interval([a - b for a, b in both])
            rows.append(row)
    return rows


def _shown(value: list[float] | None, digits: int) -> str:
    if value is None:
        return "–"
    mean, low, high = value
    return f"{mean:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if math.isfinite(high) else "")


def _words(setting: dict[str, Any]) -> str:
    words = {"ddpo": "DDPO", "awm": "AWM", "ours": "least variance"}[setting["method"]]
    words += f", rate {setting['rate']:g}"
    words += f", clip {setting['clip']:g}" if setting["clip"] else ""
    words += f", batch {setting['batch']}" if setting["batch"] != BATCH else ""
    return words + (f", beta {setting['beta']:g}" if setting.get("beta") else "")


def tuning_table(runs: dict[str, Any], reward: str) -> list[str]:
    """Every setting on the tuning seed."""
    lines = ["| reward | setting | calls | KL | energy distance |", "|---|---|---|---|---|"]
    for name, run in sorted(runs.items()):
        if name.startswith(f"curves/{reward}-") and name.endswith("@100"):
            point = reached(run["curve"])
            setting = {"clip": 0.0, "batch": BATCH, "beta": 0.0} | run["setting"]
            texts = ["not reached", "–", "–"]
            if point is not None:
                texts = [f"{point['calls']:.0f}", f"{point['kl']:.1f}", f"{point['energy']:.3f}"]
            lines.append(f"| {reward} | {_words(setting)} | {' | '.join(texts)} |")
    return lines if reward == REWARDS[0] else lines[2:]


def plot(runs: dict[str, Any], path: Path) -> None:
    """Reward (in standard deviations before tuning) against KL along the runs of the table; dashed: fast."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "lowvar"
    from matplotlib import pyplot as plt

    colours = {"ddpo": "#b3541e", "awm": "#777777", "ours": "#1b6ca8"}
    names = {"ddpo": "DDPO", "awm": "AWM", "ours": "least variance, beta KL"}
    figure, axes = plt.subplots(1, len(REWARDS), figsize=(9, 3), sharey=True, layout="constrained")
    for axis, reward in zip(axes, REWARDS, strict=True):
        for column, settings in chosen(runs, reward).items():
            for method, setting in settings.items():
                for seed in SEEDS:
                    made = runs.get(name_of(reward, setting, seed))
                    if made is None:
                        continue
                    curve = made["curve"]
                    gain = [(point["reward"] - curve[0]["reward"]) / curve[0]["std"] for point in curve]
                    style = "-" if column == "careful" else "--"
                    kl = [point["kl"] for point in curve]
                    axis.plot(kl, gain, style, color=colours[method], linewidth=1, alpha=0.8)
        axis.set(title=TITLES[reward], xlabel="KL to the network before, nats", xscale="symlog", ylim=(0, 1.3))
        axis.axhline(1, color="black", linewidth=0.5)
    axes[0].set_ylabel("gain, standard deviations")
    for method, name in names.items():
        axes[0].plot([], [], color=colours[method], label=name)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def report(runs: dict[str, Any], results: Path, table: Path) -> None:
    """Writes both files."""
    made: dict[str, Any] = {
        "date": dt.date.today().isoformat(),
        "torch": torch.__version__,
        "version": __version__,
        "machine": platform.machine(),
        "goals": GOALS,
        "least": {},
        "curves": {},
    }
    lines = [
        "# Reward tuning on digits",
        "",
        f"Made by `python benchmarks/reward.py`, {made['date']}, torch {made['torch']}. A class-conditional residual",
        "MLP of 71,000 parameters on 8x8 digits, DDPM with 20 steps and a floor of 0.05, 120 runs a batch, 12 of each",
        "class. *Variance* is of one run, summed over the parameters, in the gradient's units, with 95% intervals; the",
        "ratio to DDPO's is of the same batches; *bias* is relative to a reference, with the noise of this estimate in",
        "brackets (a bias below it is not seen); *cost* is processor time of a batch against DDPO's. `edges` are 21",
        "sums of log(1 + (detail / s)^2) over 2x2 blocks, what an image coder pays for; nothing else knows of JPEG.",
        "",
    ]
    for reward in REWARDS:
        cells = {m: c for m in MOMENTS if (c := runs.get(f"variance/{reward}-{m}")) is not None}
        if not cells:
            continue
        lines += variance_table(reward, cells)
        for moment, cell in cells.items():
            unbiased = {k: v for k, v in cell["rows"].items() if k not in BIASED}
            best = min(unbiased, key=lambda k: unbiased[k]["variance"])
            ratios = {base: cell["ratios"][base][best] for base in (DDPO, DDPO_MEAN)}
            made["least"][f"{reward}-{moment}"] = {"estimator": best, "ratios": ratios}
    lines += [
        "## Reward calls to a fixed reward",
        "",
        "One standard deviation above the mean reward before tuning. Judged on 240 samples: exact KL to the network",
        "before tuning in nats, energy distance to held-out digits (smaller is better), share of samples of the class",
        "that was asked for. Means over seeds with 95% intervals; ratios to DDPO of the same column are geometric",
        "means over seeds.",
        "",
        "| reward | column | setting | seeds | calls | / DDPO's | KL | / DDPO's | energy | - DDPO's | right class |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for reward in REWARDS:
        made["curves"][reward] = rows = curve_rows(runs, reward)
        for row in rows:
            ddpo = row["setting"]["method"] == "ddpo"
            seeds = f"{len(row['seeds'])}" + (f", {row['missed']} never there" if row["missed"] else "")
            texts = [reward, row["column"], _words(row["setting"]), seeds, _shown(row.get("calls"), 0)]
            texts += ["1" if ddpo else _shown(row.get("calls ratio"), 2), _shown(row.get("kl"), 1)]
            texts += ["1" if ddpo else _shown(row.get("kl ratio"), 2), _shown(row.get("energy"), 3)]
            texts.append("0" if ddpo else _shown(row.get("energy less"), 3))
            lines.append(f"| {' | '.join([*texts, _shown(row.get('right'), 2)])} |")
    lines += [
        "",
        "Every setting that was tried, on the tuning seed:",
        "",
    ]
    for reward in REWARDS:
        lines += tuning_table(runs, reward)
    plot(runs, table.with_suffix(".svg"))
    made["runs"] = runs
    results.write_text(json.dumps(made, indent=1) + "\n")
    table.write_text("\n".join(lines) + "\n")
    print(table.read_text())
