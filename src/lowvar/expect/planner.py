r"""The planner: a pilot ranks designs by variance x cost for the statistic at hand, and declines what does not help.

**Pilot.** `pilot` samples in antithetic pairs, with the twins' values beside them, say at once
what independent and antithetic sampling cost with and without each control: the variance of a sample and of a pair
mean, and what cross-fitted regression leaves of both. None of it is wasted, since pairs are samples: whatever is
chosen, they stay in the estimate, weighted by precision (`lowvar.expect.design.Pooled`).

**Exploring.** Where much is left to be drawn, a few small scrambled nets (samples too) and the coarser chains of some
pilot samples (a cost, at most a quarter of the pilot's) say what nets, a few-step control variate and multilevel would
bring, and samples of each class what stratification would.

**Choice.** The smallest predicted cost wins if it is ahead by more than the pilot's own error could feign: a tenth for
pairs and controls, a quarter for nets, a half for several levels; else the simpler design stays. A design whose
variance x cost is above independent sampling's is declined, and the table says by how much. Designs that declare that
their interval may not cover are never chosen. While drawing, the choice is looked at again at every doubling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.expect.catalogue import RARE, Catalogue
from lowvar.expect.design import Design, OneStream, Pooled
from lowvar.expect.estimate import Candidate, Decision, Norm
from lowvar.expect.fewstep import expected_factor, few_step
from lowvar.expect.independent import IndependentUnits
from lowvar.expect.multilevel import multilevel
from lowvar.expect.run import Run, quantile
from lowvar.expect.sums import Sums
from lowvar.expect.units import Shifted

__all__ = ["Choice", "is_discrete", "plan", "reconsidered"]

_SETS = ((), ("twin",), ("mixture",))
_FREE = ("twin", "mixture")
_NETS, _POINTS = 8, 8  # of exploring
_COMPANIONS = 16
_SIMPLE, _NET, _LEVELS = 1.1, 1.2, 1.5  # how far ahead a design has to be
_MOST_NETS = 48


def is_discrete(values: Tensor) -> bool:
    """Whether a number of the statistic takes at most 8 values over the samples: values (n, D), n >= 32.

    Example:
        >>> is_discrete(torch.arange(64.0)[:, None]), is_discrete((torch.arange(64) % 2)[:, None])
        (False, True)
    """
    return any(len(torch.unique(values[:, d])) <= 8 < len(values) // 4 for d in range(min(values.shape[1], 64)))


@dataclass(frozen=True, eq=False)
class Choice:
    """A design to draw, and the decision behind it."""

    design: Design
    decision: Decision


@dataclass(frozen=True, eq=False)
class _Row:
    design: Design
    name: str
    gain: float
    margin: float
    declared: str | None = None


def _controls(catalogue: Catalogue, noise: str, units: int, points: int = 0) -> list[OneStream]:
    """The control sets that a stream of samples has, and that so many units can bear."""
    columns = catalogue.samples(noise, points).columns
    found = []
    for controls in ((),) if noise == "sobol" else _SETS:
        if any(("feature0" if c == "features" else c) not in columns for c in controls):
            continue
        design = catalogue.one(noise, controls, points)
        if units >= design.least:
            found.append(design)
    return found


def _ratio(single: Tensor, own: Tensor, norm: Norm) -> float:
    a, b = (float(v.max()) if norm == "max" else float(v.mean()) for v in (single, own))
    return 1.0 if a == 0 else math.inf if b <= 1e-12 * a else a / b


def plan(run: Run, *, pilot: int, norm: Norm, confidence: float, tol: float | None, budget: float | None) -> Choice:
    """Draws the pilot and chooses.

    Args:
        run: a run without samples.
        pilot: samples of the pilot, even.
        norm, confidence, tol, budget: of the estimate.
    """
    catalogue = run.catalogue
    sampler = catalogue.sampler
    pairs = catalogue.samples("antithetic")
    numbers = torch.arange(pilot // 2)
    f, h = pairs.values(run.noise, numbers, run.batch_size)
    run.add(pairs, numbers, (f, h))
    free = [c for c in _FREE if c in pairs.columns]
    for stream in [catalogue.twin() if c == "twin" else catalogue.mixture() for c in free]:
        if stream.key not in run.sums:
            run.draw(stream, 32)
    single = Sums.of(f, h, torch.arange(pilot))
    variance = run.sums[pairs.key].variance
    discrete = is_discrete(f)
    rows = [_Row(catalogue.one("independent", ()), "independent", 1.0, 1.0)]
    for noise in ("antithetic", "independent"):  # of equals the one whose units the pilot has
        for design in _controls(catalogue, noise, pilot // 2):
            if design.name == "independent":
                continue
            stand_in = {**run.sums, design.streams[0].key: single} if noise == "independent" else run.sums
            found = design.combined(stand_in)
            assert found is not None
            own = found.parts[0].variance * (1 if noise == "independent" else 2)
            rows.append(_Row(design, design.name, _ratio(variance, own, norm), _SIMPLE))
    best = _best(rows)
    z = quantile(confidence, math.inf)
    one = float(variance.max() if norm == "max" else variance.mean())
    alone = math.inf if tol is None else sampler.nfe * one * (z / tol) ** 2  # independent sampling's cost
    if budget is not None:
        alone = min(alone, budget)

    def left(gain: float) -> float:
        return (alone / gain if tol is not None and budget is None else alone) / sampler.nfe

    if left(best.gain) >= 8 * _NETS * _POINTS:
        net = catalogue.samples("sobol", _POINTS)
        run.draw(net, _NETS)
        for controls in ((),):  # a coefficient from few nets covers too little
            design = catalogue.one("sobol", controls, _POINTS)
            found = design.combined(run.sums)
            assert found is not None
            rows.append(_Row(design, design.name, _ratio(variance, _POINTS * found.parts[0].variance, norm), _NET))
        best = _best(rows)
    levels = catalogue.levels()
    if len(levels) > 1 and left(best.gain) >= 8 * pilot and not discrete:
        rows += _level_rows(run, f, variance, norm)
    elif len(levels) > 1 and discrete:
        rows.append(_Row(rows[0].design, "multilevel", math.nan, _LEVELS, RARE))
    if sampler.parts and left(best.gain) >= 8 * 8 * len(sampler.parts):
        design = catalogue.design("stratified")
        for stream in design.streams:
            run.draw(stream, 8)
        found = design.combined(run.sums)
        assert found is not None
        root = torch.stack([p.variance.sqrt() for p in found.parts]).sum(0)
        rows.append(_Row(design, "stratified", _ratio(variance, root**2, norm), _NET))
    best = _best(rows)
    return Choice(_pooled(run, best.design), _decision(run, rows, best, alone, tol))


def _best(rows: list[_Row]) -> _Row:
    """The row of largest gain among those ahead of every simpler one by their margin."""
    best = rows[0]
    for row in sorted(rows[1:], key=lambda r: (r.margin, -r.gain if not math.isnan(r.gain) else 0.0)):
        if row.declared is None and row.gain > (row.margin if row.margin > best.margin else 1.0) * best.gain:
            best = row
    return best


def _level_rows(run: Run, f: Tensor, variance: Tensor, norm: Norm) -> list[_Row]:
    """Few-step and multilevel, from the coarser chains of some pilot samples."""
    catalogue = run.catalogue
    levels, statistic, sampler = catalogue.levels(), catalogue.statistic, catalogue.sampler
    pairs = catalogue.samples("antithetic")
    index = torch.arange(_COMPANIONS)
    source = pairs.units.wrap(Shifted(run.noise, pairs.number))
    values = [statistic(s(index, source)) for s in levels[:-1]] + [f[:_COMPANIONS]]
    run.nfe += _COMPANIONS * sum(s.nfe for s in levels[:-1])
    focus = run.focus(variance, norm)
    scale = float((values[-1].var(0) * focus).sum())
    one = float((variance * focus).sum())
    if scale == 0:
        return []
    rows = []
    for place, coarse in enumerate(levels[:-1]):
        a, b = values[-1] - values[-1].mean(0), values[place] - values[place].mean(0)
        d = int(focus.argmax())
        rho = float((a[:, d] @ b[:, d]) / (a[:, d].norm() * b[:, d].norm()).clamp_min(1e-280))
        design = few_step(sampler, coarse, statistic, IndependentUnits(), 64 + 2 * place)
        gain = expected_factor(min(abs(rho), 1 - 1e-9), coarse.nfe / sampler.nfe)
        rows.append(_Row(design, f"few-step ({coarse.nfe})", gain, _LEVELS))
    rows = [max(rows, key=lambda r: r.gain)]
    best, gain = 0, -math.inf
    for low in range(len(levels) - 1):
        total = math.sqrt(float((values[low].var(0) * focus).sum()) * levels[low].nfe)
        for l in range(low + 1, len(levels)):
            v = float(((values[l] - values[l - 1]).var(0) * focus).sum())
            total += math.sqrt(v * (levels[l].nfe + levels[l - 1].nfe))
        found = sampler.nfe * scale / total**2
        best, gain = (low, found) if found > gain else (best, gain)
    design = multilevel(levels[best:], statistic, IndependentUnits(), 128)
    rows.append(_Row(design, "multilevel", gain * scale / one if one > 0 else gain, _LEVELS))
    return rows


def _decision(run: Run, rows: list[_Row], best: _Row, alone: float, tol: float | None) -> Decision:
    candidates = []
    for row in sorted(rows, key=lambda r: -r.gain if not math.isnan(r.gain) else math.inf):
        note = "not ahead by more than the pilot's error" if row.gain > 1 else "harmful: declined"
        if row.gain == 1:
            note = "no gain"
        if row.declared is not None:
            note = f"declined: {row.declared}"
        if row is rows[0]:
            note = "baseline"
        if row is best:
            note = "chosen"
        elif row.gain > 1 and row.gain < best.gain:
            note = "smaller gain"
        nfe = alone / row.gain if tol is not None and row.gain > 0 else math.nan
        candidates.append(Candidate(row.name, row.gain, nfe, note))
    harmful = [c.design for c in candidates if c.note.startswith("harmful")]
    tail = f"; declined as harmful: {', '.join(harmful)}" if harmful else ""
    reused = isinstance(best.design, OneStream) and best.design.name != "few-step"
    if best.name == "independent":
        sentence = f"no design was ahead of independent sampling by more than the pilot's error{tail}"
    else:
        sentence = f"{best.name} has {best.gain:.3g} times less variance x cost than independent sampling{tail}"
    return Decision(best.name, sentence, tuple(candidates), run.nfe, reused)


def _pooled(run: Run, design: Design) -> Design:
    """The design with what was drawn before it."""
    if not isinstance(design, OneStream) or design.name == "few-step":
        return design
    catalogue = run.catalogue
    controls = tuple(c for c in _FREE if c in design.columns)
    others = []
    for key in run.sums:
        noise = next((n for n in ("independent", "antithetic", "sobol") if key.startswith(n)), None)
        if noise is None or key == design.streams[0].key or run.sums[key].units < _NETS:
            continue
        own = () if noise == "sobol" else controls
        others.append(catalogue.one(noise, own, int(key[len(noise) :] or 0)))
    return Pooled(design, tuple(others))


def reconsidered(run: Run, design: Design, *, norm: Norm, wanted: float) -> Design:
    """The design after another look at it: other controls, larger nets, or independent sampling where it does harm.

    Args:
        run: the run.
        design: what is drawn now.
        norm: of the estimate.
        wanted: units of the main stream that are wanted in all.
    """
    if not isinstance(design, Pooled):
        return design
    main = design.main.streams[0]
    sums = run.sums.get(main.key)
    if sums is None or sums.units < 32:
        return design
    noise = next(n for n in ("independent", "antithetic", "sobol") if main.key.startswith(n))
    points = main.size if noise == "sobol" else 0
    single, _ = design.spread(run.sums)
    chosen, own = design.main, _own(run, design.main, norm)
    for other in _controls(run.catalogue, noise, sums.units, points):
        if (found := _own(run, other, norm)) < 0.97 * own:
            chosen, own = other, found
    alone = float(single.max() if norm == "max" else single.mean())
    if noise != "independent" and own > 1.05 * alone:
        chosen = run.catalogue.one("independent", tuple(c for c in _FREE if c in chosen.columns))
    elif noise == "sobol" and wanted > _MOST_NETS and points < 4096:
        grown = 2 ** math.floor(math.log2(max(wanted * points / 20, 2 * points)))
        controls = tuple(dict.fromkeys(c if c in _FREE else "features" for c in chosen.columns))
        chosen = run.catalogue.one("sobol", controls, min(grown, 4096))
    return design if chosen is design.main else _pooled(run, chosen)


def _own(run: Run, design: OneStream, norm: Norm) -> float:
    """Variance a sample of a design's main stream, under the norm."""
    found = design.fit(run.sums)
    if found is None:
        return math.inf
    v = found[0].variance * design.streams[0].size
    return float(v.max() if norm == "max" else v.mean())
