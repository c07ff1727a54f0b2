r"""The few-step benchmark's results from its cells: a JSON file, a page of tables with the goals, a plot.

Means are over training seeds. Every interval is a stratified block jackknife: one stratum a training seed, and one for
the floor, whose draws are independent of the samplers'; leaving a block out of a seed leaves it out of every sampler of
that seed, so common noise is paired. With theta_(-sj) the statistic without block j of stratum s,

    se^2 = sum_s (b_s - 1) / b_s sum_j (theta_(-sj) - mean_j theta_(-sj))^2,      interval = theta -+ t_{31, .975} se.

Goals (the words of the issue, as figures):

    excess   (F_ours - F_floor) / (F_peer - F_floor), F the Frechet distance, against the peer with the lowest F at
             that NFE: at most 1/4 at 3 and 5 evaluations, or at the floor where the peer is there; energy beside it
    floor    F_ours - F_floor: its interval reaches 0 from 8 evaluations on
    half     evaluations at which our energy distance first reaches a stochastic peer's (linear in log NFE between
             cells; inside the floor's interval: its upper end) over the peer's: at most 1/2
    spectrum error of the variances, ours minus the lowest of any peer: below 0 at 3, 5 and 8 evaluations
"""

from __future__ import annotations

import datetime as dt
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from fewstep import CONVERGED, NFES, OWN_EXTRA, Place, converged, pick, read
from fewstep_samplers import DEFAULT, OWN, PEERS, own_rows, peer_rows
from fewstep_targets import CACHE, ROOT, TARGETS

from lowvar.metrics import Replicates

__all__ = ["report"]

RESULTS = ROOT / "benchmarks" / "results" / "fewstep.json"
TABLE, PLOT = ROOT / "docs" / "results" / "fewstep.md", ROOT / "docs" / "results" / "fewstep.svg"


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


Strata = Sequence[Mapping[str, Replicates]]  # one mapping a stratum: what it holds replicates of


def estimate(statistic: Callable[[dict[str, float]], float], strata: Strata) -> Estimate:
    """A statistic of means over strata, with its jackknife interval.

    Args:
        statistic: of {name: mean over the strata that hold it}.
        strata: replicates by name.
    """
    from scipy.stats import t

    counts: dict[str, int] = {}
    total: dict[str, float] = {}
    for stratum in strata:
        for name, r in stratum.items():
            counts[name] = counts.get(name, 0) + 1
            total[name] = total.get(name, 0.0) + r.value
    means = {name: total[name] / counts[name] for name in total}
    value, variance = statistic(means), 0.0
    for stratum in strata:
        blocks = min((len(r.leave_out) for r in stratum.values()), default=0)
        without = []
        for j in range(blocks):
            moved = dict(means)
            for name, r in stratum.items():
                moved[name] += (float(r.leave_out[j]) - r.value) / counts[name]
            without.append(statistic(moved))
        values = torch.tensor(without, dtype=torch.float64)
        variance += float((blocks - 1) / blocks * (values - values.mean()).square().sum())
    reach = float(t.ppf(0.975, 31)) * math.sqrt(variance) if math.isfinite(variance) else math.inf
    return Estimate(value, value - reach, value + reach)


def _replicates(fields: Mapping[str, Any]) -> Replicates:
    return Replicates(fields["value"], torch.tensor(fields["leave_out"]).double(), torch.tensor(fields["sizes"]))


class Table:
    """The cells of one target."""

    def __init__(self, name: str, n: int, seeds: Sequence[int]) -> None:
        self.name, self.n = name, n
        path = CACHE / name / "pilot.json"
        self.pilot = json.loads(path.read_text()) if path.exists() else {}
        self.seeds = [s for s in seeds if (CACHE / name / f"seed{s}" / f"n{n}" / "reference.json").exists()]
        self.references = {
            s: json.loads((CACHE / name / f"seed{s}" / f"n{n}" / "reference.json").read_text()) for s in self.seeds
        }
        self.cells: dict[Place, dict[int, dict[str, Any]]] = {}
        for place in self._places():
            found = {s: read(name, s, n, place) for s in self.seeds}
            if place.nfe > max(NFES):
                found = {s: read(name, s, converged(name, n), place) for s in self.seeds}
            kept = {s: c for s, c in found.items() if c is not None}
            if kept:
                self.cells[place] = kept

    def _places(self) -> list[Place]:
        found = [Place(own, nfe) for own in own_rows() for nfe in (*NFES, *OWN_EXTRA.get(own, ()))]
        for row in peer_rows(self.name):
            for nfe in NFES:
                spacings = {pick(self.pilot, row.name, nfe), row.default} - {None}
                found += [Place(row.name, nfe, spacing) for spacing in sorted(map(str, spacings))]
        return found + [Place(sampler, steps, "linspace") for sampler, steps in CONVERGED]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The scores this target has."""
        return TARGETS[self.name].metrics

    def floor(self, metric: str) -> Replicates:
        """Data against data."""
        return _replicates(next(iter(self.references.values()))["floor"][metric])

    def strata(self, places: Mapping[str, Place], metric: str, floor: bool = False) -> Strata:
        """Replicates of named cells, the training seeds that have all of them; and the floor's."""
        seeds = [s for s in self.seeds if all(s in self.cells.get(p, {}) for p in places.values())]
        found: list[dict[str, Replicates]] = []
        for s in seeds:
            records = {name: self.cells[p][s]["scores"] for name, p in places.items()}
            if any(r is None for r in records.values()):
                continue
            found.append({name: _replicates(r[metric]) for name, r in records.items()})
        return [*found, {"floor": self.floor(metric)}] if floor and found else found

    def score(self, place: Place, metric: str) -> Estimate | None:
        """A cell's score, or None where it was not run or diverged."""
        strata = self.strata({"x": place}, metric)
        return estimate(lambda v: v["x"], strata) if strata else None

    def alone(self, twin: str, metric: str) -> Estimate | None:
        """A twin alone, without the network: `twin alone` or `mixture twin alone`."""
        records = [r[twin]["scores"] for r in self.references.values() if twin in r]
        strata = [{"x": _replicates(r[metric])} for r in records if metric in r]
        return estimate(lambda v: v["x"], strata) if strata else None

    def best_peer(self, nfe: int, metric: str) -> Place | None:
        """The peer's cell with the lowest score at a number of evaluations, whatever its spacing."""
        found = {p: self.score(p, metric) for p in self.cells if p.sampler in PEERS and p.nfe == nfe}
        able = {p: e.value for p, e in found.items() if e is not None}
        return min(able, key=lambda p: able[p]) if able else None

    @property
    def default(self) -> str:
        """Our default."""
        return DEFAULT


# --------------------------------------------------------------------------------------------------------------- goals


def _verdict(e: Estimate, limit: float) -> str:
    if e.high <= limit:
        return "met"
    if e.value <= limit:
        return "met within its interval"
    return "missed" if e.low > limit else "missed within its interval"


def crossing(nfes: Sequence[int], energies: Sequence[float], target: float) -> float:
    """The number of evaluations at which a curve first reaches a value; inf if it does not.

    Linear in log NFE between cells; at the first cell already: that cell.
    """
    for k, (nfe, energy) in enumerate(zip(nfes, energies, strict=True)):
        if energy <= target:
            if k == 0:
                return float(nfe)
            before = energies[k - 1]
            w = (before - target) / (before - energy)
            return math.exp(math.log(nfes[k - 1]) + w * (math.log(nfe) - math.log(nfes[k - 1])))
    return math.inf


def _excess(table: Table, nfe: int) -> dict[str, Any] | None:
    mine, peer = Place(table.default, nfe), table.best_peer(nfe, "frechet")
    if peer is None or mine not in table.cells:
        return None
    found: dict[str, Any] = {"nfe": nfe, "ours": mine.sampler, "peer": peer.sampler, "spacing": peer.spacing}
    for metric in ("frechet", "energy"):
        strata = table.strata({"a": mine, "b": peer}, metric, floor=True)
        if not strata:
            return None
        ours = estimate(lambda v: v["a"] - v["floor"], strata)
        theirs = estimate(lambda v: v["b"] - v["floor"], strata)
        ratio = estimate(lambda v: (v["a"] - v["floor"]) / (v["b"] - v["floor"]), strata)
        found[metric] = {"ours": asdict(ours), "peer": asdict(theirs), "ratio": asdict(ratio)}
        if metric == "frechet":
            if theirs.low <= 0:
                found["verdict"] = "met (both at the floor)" if ours.low <= 0 else "missed (the peer is at the floor)"
            else:
                found["verdict"] = "met (at the floor)" if ours.low <= 0 else _verdict(ratio, 0.25)
            found["at_floor"] = ours.low <= 0
    return found


def _half(table: Table, peer: str) -> list[dict[str, Any]]:
    mine = sorted((p for p in table.cells if p.sampler == table.default and p.nfe <= max(NFES)), key=lambda p: p.nfe)
    found, floor = [], _as_estimate(table.floor("energy")).high
    for nfe in NFES:
        spacings = [p for p in table.cells if p.sampler == peer and p.nfe == nfe]
        scores = {p: e.value for p in spacings if (e := table.score(p, "energy")) is not None}
        if not scores or not mine:
            continue
        theirs = min(scores, key=lambda p: scores[p])
        places = {"peer": theirs} | {str(p.nfe): p for p in mine}
        strata = table.strata(places, "energy")
        if not strata:
            continue
        nfes = [p.nfe for p in mine]
        at = table.cells[theirs][next(iter(table.cells[theirs]))]["nfe"]

        def ratio(v: dict[str, float], nfes: list[int] = nfes, at: int = at) -> float:
            return math.log(crossing(nfes, [v[str(k)] for k in nfes], max(v["peer"], floor)) / at)

        e = estimate(ratio, strata)
        value, low, high = (math.exp(v) if v < 700 else math.inf for v in (e.value, e.low, e.high))
        reached = math.isfinite(value)
        first = reached and value * at <= nfes[0] * (1 + 1e-9)
        shown = Estimate(value, 0.0 if first else low, high) if reached else Estimate(math.inf, math.inf, math.inf)
        verdict = _verdict(shown, 0.5) if reached else "missed"
        if first and value > 0.5:
            verdict = "cannot be shown (our fewest evaluations are ahead already)"
        found.append(
            {"peer": peer, "nfe": nfe, "peer_nfe": at, "spacing": theirs.spacing, "ratio": asdict(shown)}
            | {"bound": first, "peer_at_floor": scores[theirs] <= floor, "verdict": verdict}
        )
    return found


def _spectrum(table: Table, nfe: int) -> dict[str, Any] | None:
    mine, peer = Place(table.default, nfe), table.best_peer(nfe, "spectrum")
    if peer is None or mine not in table.cells:
        return None
    strata = table.strata({"a": mine, "b": peer}, "spectrum")
    if not strata:
        return None
    e = estimate(lambda v: v["a"] - v["b"], strata)
    ours, theirs = table.score(mine, "spectrum"), table.score(peer, "spectrum")
    assert ours is not None
    assert theirs is not None
    return {"nfe": nfe, "peer": peer.sampler, "spacing": peer.spacing, "ours": ours.value, "theirs": theirs.value} | {
        "difference": asdict(e),
        "verdict": _verdict(e, 0.0),
    }


def goals(table: Table) -> dict[str, Any]:
    """The goals of one target as figures."""
    excess = [g for nfe in NFES if (g := _excess(table, nfe))]
    stochastic = [row.name for row in peer_rows(table.name) if row.stochastic]
    return {
        "default": table.default,
        "excess": excess,
        "half": [g for peer in stochastic for g in _half(table, peer)],
        "spectrum": [g for nfe in (3, 5, 8) if (g := _spectrum(table, nfe))],
    }


# -------------------------------------------------------------------------------------------------------------- report


def report(n: int, seeds: Sequence[int]) -> None:
    """Writes the results of the cells that were run."""
    import diffusers

    import lowvar

    results: dict[str, Any] = {
        "what": "Few-step sampling at equal NFE: lowvar, diffusers' schedulers, DPM-Solver-v3",
        "date": dt.date.today().isoformat(),
        "n": n,
        "versions": {
            "lowvar": lowvar.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, CPU",
        },
        "targets": {},
    }
    tables = {name: Table(name, n, seeds) for name in TARGETS}
    tables = {name: table for name, table in tables.items() if table.references and table.cells}
    for name, table in tables.items():
        rows = []
        for place, found in table.cells.items():
            for metric in table.metrics:
                e = table.score(place, metric)
                if e is None:
                    rows.append({"sampler": place.sampler, "nfe": place.nfe, "grid": place.spacing, "diverged": True})
                    break
                first = next(iter(found.values()))
                row = {"sampler": place.sampler, "nfe": first["nfe"], "column": place.nfe, "grid": first["grid"]}
                rows.append(row | {"n": first["n"], "seeds": sorted(found), "metric": metric} | asdict(e))
        reference = next(iter(table.references.values()))
        results["targets"][name] = {
            "training_seeds": table.seeds,
            "about": reference["about"],
            "milliseconds_an_evaluation": [1e3 * r["seconds_an_evaluation"] for r in table.references.values()],
            "floor": {m: asdict(_as_estimate(table.floor(m))) for m in table.metrics},
            "twin_alone": {m: asdict(e) for m in table.metrics if (e := table.alone("twin alone", m))},
            "mixture_alone": {m: asdict(e) for m in table.metrics if (e := table.alone("mixture twin alone", m))},
            "spacings": {
                row.name: {str(k): pick(table.pilot, row.name, k) for k in (5, 10)} for row in peer_rows(name)
            },
            "goals": goals(table),
            "rows": rows,
        }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(_markdown(results, tables))
    if tables:
        _plot(tables)
    print(f"{RESULTS}\n{TABLE}\n{PLOT}")


def _as_estimate(r: Replicates) -> Estimate:
    return estimate(lambda v: v["x"], [{"x": r}])


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


def _lines_of(table: Table) -> list[tuple[str, dict[int, Place]]]:
    """The rows of a table: a title and a cell a number of evaluations."""
    lines: list[tuple[str, dict[int, Place]]] = []
    for own in OWN:
        lines.append((own, {k: Place(own, k) for k in NFES}))
    for row in peer_rows(table.name):
        best = {k: Place(row.name, k, s) for k in NFES if (s := pick(table.pilot, row.name, k))}
        plain = {k: Place(row.name, k, row.default) for k in NFES}
        lines.append((row.name, best))
        if any(plain[k] != best.get(k) for k in NFES):
            lines.append((f"{row.name}, as shipped", plain))
    return [(title, places) for title, places in lines if any(p in table.cells for p in places.values())]


def _score_table(table: Table, metric: str) -> list[str]:
    scores = {p: table.score(p, metric) for p in table.cells}
    least = {k: min((e.value for p, e in scores.items() if e and p.nfe == k), default=math.nan) for k in NFES}
    lines = ["| sampler | " + " | ".join(f"{k} NFE" for k in NFES) + " |", "|---" * (len(NFES) + 1) + "|"]
    for title, places in _lines_of(table):
        texts = []
        for k in NFES:
            place = places.get(k)
            e = scores.get(place) if place else None
            if place is None or place not in table.cells:
                texts.append("")
            elif e is None:
                texts.append("diverges")
            else:
                text = f"**{_show(e)}**" if e.value == least[k] else _show(e)
                texts.append(text + (f" ({place.spacing})" if place.spacing and metric == "frechet" else ""))
        lines.append("| " + " | ".join([title, *texts]) + " |")
    return lines


def _markdown(results: dict[str, Any], tables: Mapping[str, Table]) -> str:
    versions = results["versions"]
    head = (
        f"{results['n']} samples a cell on common noise, means over training seeds with 95% intervals (block "
        "jackknife, 32 blocks); lower is better, the lowest of a column is bold. Peers are diffusers' schedulers at "
        "the spacing (in brackets) that a pilot with other seeds found best, and as shipped; x0 is clipped as ours is "
        f"wherever a peer offers it. Measured {results['date']} with torch {versions['torch']}, diffusers "
        f"{versions['diffusers']}; script `benchmarks/fewstep.py`."
    )
    lines = [head, "", "### Goals", ""]
    for name in tables:
        lines += _goal_lines(name, results["targets"][name]["goals"])
    for name, table in tables.items():
        found = results["targets"][name]
        lines += [f"## {name}", ""]
        references = []
        for title, values in (
            ("floor (data against data)", found["floor"]),
            ("Gaussian twin alone, 0 NFE", found["twin_alone"]),
            ("mixture twin alone, 0 NFE", found["mixture_alone"]),
        ):
            texts = [f"{_TITLES[m].lower()} {_show(Estimate(**e))}" for m, e in values.items()]
            references.append(f"{title}: {', '.join(texts)}")
        for sampler, steps in CONVERGED:
            place = Place(sampler, steps, "linspace")
            shown = [f"{_TITLES[m].lower()} {_show(e)}" for m in table.metrics if (e := table.score(place, m))]
            if shown:
                count = next(iter(table.cells[place].values()))["n"]
                references.append(f"the network's own, {sampler} at {steps} NFE, {count} samples: {', '.join(shown)}")
        lines += [*(f"- {text}" for text in references), ""]
        for metric in table.metrics:
            lines += [f"### {name}: {_TITLES[metric].lower()}", "", *_score_table(table, metric), ""]
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


def _plot(tables: Mapping[str, Table]) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "lowvar"
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, 3, figsize=(12, 7))
    panels = list(grid.flat)
    shown = {DEFAULT: "C3", "twin-ode": "C1", "adams-ode": "C8", "adams-sde": "C6"}
    markers = dict(zip(PEERS, "osD^v<>ph*X+x", strict=False))
    for axes, (name, table) in zip(panels, tables.items(), strict=False):
        for title, places in _lines_of(table):
            if title not in shown and title not in PEERS:
                continue
            scores = [(k, e) for k, p in places.items() if (e := table.score(p, "frechet")) and e.value > 0]
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
        floor = table.floor("frechet").value
        axes.axhline(floor, color="grey", linewidth=0.8)
        values = [e.value for p in table.cells if (e := table.score(p, "frechet"))]
        axes.set(xscale="log", yscale="log", title=name, xlabel="network evaluations (NFE)", ylabel="Frechet distance")
        axes.set_ylim(0.7 * max(floor, 1e-5), min(max(values), 3e3 * max(floor, 1e-5)))
        axes.set_xticks(NFES, [str(k) for k in NFES])
        axes.minorticks_off()
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    for axes in panels[len(tables) :]:
        axes.axis("off")
    panels[-1].legend(handles.values(), handles.keys(), fontsize=8, ncols=2, loc="center")
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})
