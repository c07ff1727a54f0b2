r"""The few-step benchmark's page: tables with the goals and a plot, from the results file alone.

So a target that was measured earlier, whose cells are no longer at hand, stays on the page with its own date.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep import CONVERGED, NFES
from fewstep_samplers import DEFAULT, OWN, PEERS

__all__ = ["Estimate", "markdown", "plot"]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval; infinite where the jackknife has none."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Key:
    """A cell of the results: sampler, column and, of a peer, its spacing."""

    sampler: str
    column: int
    spacing: str | None = None


class Shown:
    """One target of the results file.

    Args:
        name: of the target.
        fields: its entry in the file.
    """

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self.name, self.fields = name, fields
        self.metrics: list[str] = list(fields["floor"])
        self.scores: dict[Key, dict[str, Estimate]] = {}
        self.samples: dict[Key, int] = {}
        for row in fields["rows"]:
            key = Key(row["sampler"], row.get("column", row["nfe"]), row["grid"] if row["sampler"] in PEERS else None)
            found = self.scores.setdefault(key, {})
            self.samples[key] = row.get("n", 0)
            if "metric" in row:
                found[row["metric"]] = Estimate(row["value"], row["low"], row["high"])

    def score(self, key: Key, metric: str) -> Estimate | None:
        """A cell's score; None where it was not run or diverged."""
        return self.scores.get(key, {}).get(metric)

    def lines(self) -> list[tuple[str, dict[int, Key]]]:
        """The rows of a table: a title and a cell a column."""
        found: list[tuple[str, dict[int, Key]]] = [(own, {k: Key(own, k) for k in NFES}) for own in OWN]
        for peer, spacings in self.fields["spacings"].items():
            best = {k: Key(peer, k, s) for k in NFES if (s := spacings["5" if k < 8 else "10"])}
            default = PEERS[peer].default
            found.append((peer, best))
            if any(Key(peer, k, default) != best.get(k) for k in NFES):
                found.append((f"{peer}, as shipped", {k: Key(peer, k, default) for k in NFES}))
        return [(title, keys) for title, keys in found if any(k in self.scores for k in keys.values())]


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "none"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _show(e: Estimate) -> str:
    return f"{_number(e.value)} ± {_number(e.half)}"


_TITLES = {
    "frechet": "Frechet distance",
    "energy": "Energy distance",
    "spectrum": "Covariance-spectrum error",
    "sliced": "Sliced 2-Wasserstein distance",
}


def _score_table(target: Shown, metric: str) -> list[str]:
    least = {
        k: min((e.value for key in target.scores if key.column == k and (e := target.score(key, metric))), default=0.0)
        for k in NFES
    }
    lines = ["| sampler | " + " | ".join(f"{k} NFE" for k in NFES) + " |", "|---" * (len(NFES) + 1) + "|"]
    for title, keys in target.lines():
        texts = []
        for k in NFES:
            key = keys.get(k)
            if key is None or key not in target.scores:
                texts.append("")
                continue
            e = target.score(key, metric)
            if e is None:
                texts.append("diverges")
                continue
            text = f"**{_show(e)}**" if e.value == least[k] else _show(e)
            texts.append(text + (f" ({key.spacing})" if key.spacing and metric == "frechet" else ""))
        lines.append("| " + " | ".join([title, *texts]) + " |")
    return lines


def markdown(results: dict[str, Any]) -> str:
    """The page of a results file."""
    versions = results["versions"]
    dates = {name: found.get("date", results["date"]) for name, found in results["targets"].items()}
    when = "; ".join(f"{', '.join(n for n in dates if dates[n] == d)} {d}" for d in sorted(set(dates.values())))
    head = (
        f"{results['n']} samples a cell on common noise, means over training seeds with 95% intervals (block "
        "jackknife, 32 blocks); lower is better, the lowest of a column is bold. Peers are diffusers' schedulers at "
        "the spacing (in brackets) that a pilot with other seeds found best, and as shipped; x0 is clipped as ours is "
        f"wherever a peer offers it. Measured with torch {versions['torch']}, diffusers {versions['diffusers']} "
        f"({when}); script `benchmarks/fewstep.py`."
    )
    lines = [head, "", "### Goals", ""]
    for name, found in results["targets"].items():
        lines += _goal_lines(name, found["goals"])
    for name, found in results["targets"].items():
        target = Shown(name, found)
        seeds = ", ".join(map(str, found["training_seeds"]))
        lines += [f"## {name}", "", f"Training seeds {seeds}.", ""]
        references = []
        for title, values in (
            ("floor (data against data)", found["floor"]),
            ("Gaussian twin alone, 0 NFE", found["twin_alone"]),
            ("mixture twin alone, 0 NFE", found["mixture_alone"]),
        ):
            texts = [f"{_TITLES[m].lower()} {_show(Estimate(**e))}" for m, e in values.items()]
            references += [f"{title}: {', '.join(texts)}"] if texts else []
        for sampler, steps in CONVERGED:
            key = Key(sampler, steps, "linspace")
            shown = [f"{_TITLES[m].lower()} {_show(e)}" for m in target.metrics if (e := target.score(key, m))]
            if shown:
                count = target.samples[key]
                references.append(f"the network's own, {sampler} at {steps} NFE, {count} samples: {', '.join(shown)}")
        lines += [*(f"- {text}" for text in references), ""]
        for metric in target.metrics:
            lines += [f"### {name}: {_TITLES[metric].lower()}", "", *_score_table(target, metric), ""]
    return "\n".join(lines).rstrip() + "\n"


def _goal_lines(name: str, found: dict[str, Any]) -> list[str]:
    if not any(found[goal] for goal in ("excess", "half", "spectrum")):
        return []
    lines = [f"### {name} (ours: `{found['default']}`)", ""]
    if found["excess"]:
        lines += [
            "| NFE | best peer | excess Frechet, ours | peer | ratio | energy ratio | goal |",
            "|---|---|---|---|---|---|---|",
        ]
        for g in found["excess"]:
            f, e = g["frechet"], g["energy"]["ratio"]
            if g["nfe"] <= 5:
                verdict = g["verdict"]
            else:
                verdict = "at the floor" if g["at_floor"] else "above the floor"
            ratio, energy = Estimate(**f["ratio"]), Estimate(**e)
            lines.append(
                f"| {g['nfe']} | {g['peer']} ({g['spacing']}) | {_show(Estimate(**f['ours']))} | "
                f"{_show(Estimate(**f['peer']))} | {_show(ratio)} | {_show(energy)} | {verdict} |"
            )
        lines.append("")
    if found["half"]:
        columns = sorted({g["nfe"] for g in found["half"]})
        lines += [
            "NFE for the same energy distance, ours over the stochastic peer's (goal: at most 0.5):",
            "",
            "| peer | " + " | ".join(f"{k} NFE" for k in columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for peer in dict.fromkeys(g["peer"] for g in found["half"]):
            texts = []
            for k in columns:
                g = next((g for g in found["half"] if g["peer"] == peer and g["nfe"] == k), None)
                if g is None:
                    texts.append("")
                    continue
                r = Estimate(**g["ratio"])
                value = "never" if not math.isfinite(r.value) else f"{'≤ ' if g['bound'] else ''}{r.value:.2f}"
                texts.append(f"{value}{' ✓' if g['verdict'].startswith('met') else ''}")
            lines.append(f"| {peer} | " + " | ".join(texts) + " |")
        lines.append("")
    if found["spectrum"]:
        lines += [
            "Covariance-spectrum error against the best peer in it (goal: below):",
            "",
            "| NFE | ours | best peer | difference | goal |",
            "|---|---|---|---|---|",
        ]
        for g in found["spectrum"]:
            lines.append(
                f"| {g['nfe']} | {_number(g['ours'])} | {_number(g['theirs'])} {g['peer']} ({g['spacing']}) | "
                f"{_show(Estimate(**g['difference']))} | {g['verdict']} |"
            )
        lines.append("")
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Frechet distance against evaluations, a panel a target."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "lowvar"
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, 3, figsize=(12, 7))
    panels = list(grid.flat)
    shown = {DEFAULT: "C3", "twin-ode": "C1", "adams-ode": "C8", "adams-sde": "C6"}
    markers = dict(zip(PEERS, "osD^v<>ph*X+x", strict=False))
    for axes, (name, found) in zip(panels, results["targets"].items(), strict=False):
        target = Shown(name, found)
        for title, keys in target.lines():
            if title not in shown and title not in PEERS:
                continue
            scores = [(k, e) for k, key in keys.items() if (e := target.score(key, "frechet")) and e.value > 0]
            if not scores:
                continue
            x, y = [k for k, _ in scores], [e.value for _, e in scores]
            own = title in shown
            axes.plot(
                x,
                y,
                color=shown.get(title),
                linestyle="-" if own else ":",
                marker="." if own else markers.get(title, "."),
                markersize=8 if own else 4,
                linewidth=1.8 if own else 0.9,
                label=title,
                zorder=3 if own else 2,
            )
        floor = found["floor"]["frechet"]["value"]
        axes.axhline(floor, color="grey", linewidth=0.8)
        values = [e.value for key in target.scores if (e := target.score(key, "frechet"))]
        axes.set(xscale="log", yscale="log", title=name, xlabel="network evaluations (NFE)", ylabel="Frechet distance")
        axes.set_ylim(0.7 * max(floor, 1e-5), min(max(values), 3e3 * max(floor, 1e-5)))
        axes.set_xticks(NFES, [str(k) for k in NFES])
        axes.minorticks_off()
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    for axes in panels[len(results["targets"]) :]:
        axes.axis("off")
    panels[-1].legend(handles.values(), handles.keys(), fontsize=8, ncols=2, loc="center")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
