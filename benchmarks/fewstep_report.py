r"""The few-step benchmark's results from its cells: a JSON file with the goals, from which its page is made.

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
from dataclasses import asdict
from typing import Any

import torch
from fewstep import CONVERGED, KEPT, NFES, OWN_EXTRA, Place, converged, pick
from fewstep_page import Estimate, markdown, plot
from fewstep_samplers import DEFAULT, PEERS, own_rows, peer_rows
from fewstep_targets import RESULTS, ROOT, TARGETS, Mixture
from kept import written

from lowvar.metrics import Replicates

__all__ = ["report"]

TABLE, PLOT = ROOT / "docs" / "results" / "fewstep.md", ROOT / "docs" / "results" / "fewstep.svg"


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
    """The cells of one target; `runs` is what they are made of, by name."""

    def __init__(self, name: str, n: int, seeds: Sequence[int]) -> None:
        self.name, self.n = name, n
        self.pilot = KEPT[f"{name}/pilot"] or {}
        known = {s: KEPT[f"{name}/seed{s}/n{n}/reference"] for s in seeds}
        self.references = {s: reference for s, reference in known.items() if reference is not None}
        self.seeds = list(self.references)
        self.cells: dict[Place, dict[int, dict[str, Any]]] = {}
        self.runs = {f"{name}/seed{s}/n{n}/reference": r for s, r in self.references.items()}
        self.runs |= {f"{name}/pilot": self.pilot} if self.pilot else {}
        for place in self._places():
            number = n if place.nfe <= max(NFES) else converged(name, n)
            names = {s: place.name(name, s, number) for s in self.seeds}
            kept = {s: cell for s in self.seeds if (cell := KEPT[names[s]]) is not None}
            self.runs |= {names[s]: cell for s, cell in kept.items()}
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
    """Writes the results of the cells that were run; a target without cells keeps what the results file has of it."""
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
        "runs": {},
    }
    earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"targets": {}}
    tables = {name: Table(name, n, seeds) for name in TARGETS}
    tables = {name: table for name, table in tables.items() if table.references and table.cells}
    for name in TARGETS:
        if name not in tables:
            if name in earlier["targets"]:
                results["targets"][name] = {"date": earlier["date"]} | earlier["targets"][name]
            continue
        table, rows = tables[name], []
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
            "date": results["date"],
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
        if not isinstance(TARGETS[name], Mixture):  # an exact score's cells are made again in minutes
            results["runs"] |= table.runs
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(written(results))
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(markdown(results))
    if results["targets"]:
        plot(results, PLOT)
    print(f"{RESULTS}\n{TABLE}\n{PLOT}")


def _as_estimate(r: Replicates) -> Estimate:
    return estimate(lambda v: v["x"], [{"x": r}])
