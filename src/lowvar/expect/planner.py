r"""The planner: a pilot ranks designs by variance x cost for the statistic at hand, and declines what does not help.

**Pilot.** `pilot` samples in antithetic pairs, with the twins' values beside them, say at once
what independent and antithetic sampling cost with and without each control: the variance of a sample and of a pair
mean, and what cross-fitted regression leaves of both. None of it is wasted, since pairs are samples: whatever is
chosen, they stay in the estimate, weighted by precision (`lowvar.expect.design.Pooled`).

**Exploring.** Where much is left to be drawn, a few small scrambled nets (samples too) and the coarser chains of some
pilot samples (a cost, at most a quarter of the pilot's) say what nets, a few-step control variate and multilevel would
bring, and samples of each class what stratification would.

**Choice.** Every gain has an error, the jackknife's over folds of the pilot (pairs, nets), and the design with the
largest gain at the lower end of one standard error is taken (of two for levels, which are known from 16 samples), if
that is above independent sampling's: a design that is ahead by luck is not. Nets are charged for the t quantile of few
nets. A design whose variance x cost is
above independent sampling's is declined, and the table says by how much. Designs that declare that their interval may
not cover are never chosen. While drawing, the choice is looked at again at every doubling, and nets grow only as far as
what is left to be drawn holds the nets that an interval needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowvar.expect.catalogue import RARE, Catalogue
from lowvar.expect.design import Design, OneStream, Pooled
from lowvar.expect.estimate import Candidate, Decision, Norm
from lowvar.expect.fewstep import expected_factor, few_step
from lowvar.expect.independent import IndependentUnits
from lowvar.expect.multilevel import multilevel
from lowvar.expect.run import Run, quantile
from lowvar.expect.sums import Sums, log_error
from lowvar.expect.units import Shifted

__all__ = ["BESIDE", "Choice", "is_discrete", "plan", "reconsidered"]

BESIDE = 16  # units of a stream, beside the pilot's, before its variance is believed

_SETS = ((), ("twin",), ("mixture",))
_FREE = ("twin", "mixture")
_NETS, _POINTS = 16, 8  # of exploring
_COMPANIONS = 16  # samples, in pairs
_SIMPLE, _NET, _LEVELS = 1.05, 1.15, 1.15  # what a gain is divided by before it is compared
_ENOUGH_NETS = 24
SPENT = "the budget ends before independent samples would have an interval"


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
    margin: float = 1.0
    error: float = 0.0
    errors: float = 1.0
    declared: str | None = None

    @property
    def sure(self) -> float:
        """The gain at the lower end of `errors` standard errors, over the margin."""
        return 0.0 if math.isnan(self.gain) else self.gain * math.exp(-self.errors * self.error) / self.margin


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


def _under(v: Tensor, norm: Norm) -> Tensor:
    """What the norm looks at, of variances (..., D)."""
    return v.amax(-1) if norm == "max" else v.mean(-1)


def _ratio(single: Tensor, own: Tensor, norm: Norm) -> float:
    a, b = float(_under(single, norm)), float(_under(own, norm))
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
    without = {"independent": single.leaving_out(), "antithetic": run.sums[pairs.key].leaving_out()}
    error = float(log_error(_under(without["antithetic"], norm)))
    rows = [_Row(catalogue.one("independent", ()), "independent", 1.0)]
    for noise in ("antithetic", "independent"):  # of equals the one whose units the pilot has
        for design in _controls(catalogue, noise, pilot // 2):
            if design.name == "independent":
                continue
            stand_in = {**run.sums, design.streams[0].key: single} if noise == "independent" else run.sums
            found = design.combined(stand_in)
            assert found is not None
            own = found.parts[0].variance * (1 if noise == "independent" else 2)
            off = float(log_error(_under(without[noise], norm) / _under(found.parts[0].leave_out, norm)))
            rows.append(_Row(design, design.name, _ratio(variance, own, norm), _SIMPLE, off))
    if budget is not None and budget - run.nfe < BESIDE * sampler.nfe:  # the pilot's pairs are all that there will be
        rows = [replace(row, declared=SPENT) if "antithetic" not in row.name else row for row in rows]
    best = _best(rows)
    z = quantile(confidence, math.inf)
    one = float(_under(variance, norm))
    alone = math.inf if tol is None else sampler.nfe * one * (z / tol) ** 2  # independent sampling's cost
    if budget is not None:
        alone = min(alone, budget)

    def left(gain: float) -> float:
        return (alone / gain if tol is not None and budget is None else alone) / sampler.nfe

    if left(best.gain) >= 8 * _NETS * _POINTS:
        rows.append(_net_row(run, norm))
        best = _best(rows)
    levels = catalogue.levels()
    if len(levels) > 1 and left(best.gain) >= 8 * pilot and not discrete:
        rows += _level_rows(run, f, variance, norm)
    elif len(levels) > 1 and discrete:
        rows.append(_Row(rows[0].design, "multilevel", math.nan, declared=RARE))
    if sampler.parts and left(best.gain) >= 8 * 8 * len(sampler.parts):
        design = catalogue.design("stratified")
        for stream in design.streams:
            run.draw(stream, 8)
        found = design.combined(run.sums)
        assert found is not None
        root = torch.stack([p.variance.sqrt() for p in found.parts]).sum(0)
        less = torch.stack([p.leave_out[:8].sqrt() for p in found.parts]).sum(0)
        off = math.hypot(error, float(log_error(_under(less**2, norm))))
        rows.append(_Row(design, "stratified", _ratio(variance, root**2, norm), _SIMPLE, off))
    best = _best(rows)
    plain = _best([row for row in rows if isinstance(row.design, OneStream) and row.design.name != "few-step"])
    run.memory["second"] = [plain.design.name, plain.design.streams[0].size]
    return Choice(_pooled(run, best.design), _decision(run, rows, best, alone, tol))


def _best(rows: list[_Row]) -> _Row:
    """The row whose gain is largest at its lower end; the first, independent sampling, where none is above it."""
    return max((row for row in rows if row.declared is None), key=lambda row: row.sure)


def _net_row(run: Run, norm: Norm) -> _Row:
    """Small nets; more of them as long as their gain is above 1 by less than its error, since nets are samples too."""
    catalogue = run.catalogue
    net, pairs = catalogue.samples("sobol", _POINTS), catalogue.samples("antithetic")
    design = catalogue.one("sobol", (), _POINTS)  # no controls: a coefficient from few nets covers too little
    while True:
        run.draw(net, _NETS)
        both = run.sums[pairs.key].only([]) + run.sums[net.key].only([])
        found = design.combined(run.sums)
        assert found is not None
        gain = _ratio(both.variance, _POINTS * found.parts[0].variance, norm)
        error = float(log_error(_under(both.leaving_out(), norm) / _under(found.parts[0].leave_out, norm)))
        row = _Row(design, design.name, gain, _NET, error)
        if gain <= 1 or row.sure > 1 or run.sums[net.key].units >= 3 * _NETS:
            return row


def _level_rows(run: Run, f: Tensor, variance: Tensor, norm: Norm) -> list[_Row]:
    """Few-step and multilevel, from the coarser chains of some pilot samples."""
    catalogue = run.catalogue
    levels, statistic, sampler = catalogue.levels(), catalogue.statistic, catalogue.sampler
    pairs = catalogue.samples("antithetic")
    index = torch.arange(_COMPANIONS)
    source = pairs.units.wrap(Shifted(run.noise, pairs.number))
    values = torch.stack([statistic(s(index, source)) for s in levels[:-1]] + [f[:_COMPANIONS]])  # (L, n, D)
    run.nfe += _COMPANIONS * sum(s.nfe for s in levels[:-1])
    focus, costs = run.focus(variance, norm), [s.nfe / sampler.nfe for s in levels]
    if float((values[-1].var(0) * focus).sum()) == 0:
        return []
    few, many = _level_gains(values, costs, focus)
    place, low = max(few, key=few.__getitem__), max(many, key=many.__getitem__)
    kept = torch.arange(_COMPANIONS)[None] // 2 != torch.arange(_COMPANIONS // 2)[:, None]
    less = [_level_gains(values[:, k], costs, focus) for k in kept]
    off = [float(log_error(torch.tensor([x[k][at] for x in less]))) for k, at in enumerate((place, low))]
    coarse = levels[place]
    first = few_step(sampler, coarse, statistic, IndependentUnits(), 64 + 2 * place)
    second = multilevel(levels[low:], statistic, IndependentUnits(), 128)
    return [
        _Row(first, f"few-step ({coarse.nfe})", few[place], _LEVELS, off[0], 2),
        _Row(second, "multilevel", many[low], _LEVELS, off[1], 2),
    ]


def _level_gains(values: Tensor, costs: list[float], focus: Tensor) -> tuple[dict[int, float], dict[int, float]]:
    """Gains of few-step by the place of its coarse sampler, and of multilevel by that of its coarsest.

    Args:
        values: of coupled levels, coarsest first, (L, n, D).
        costs: of the levels, the finest's being 1.
        focus: weights over numbers, (D,).
    """
    L, d = len(values), int(focus.argmax())
    scale = float((values[-1].var(0) * focus).sum())
    few, many = {}, {}
    for low in range(L - 1):
        rho = float(torch.corrcoef(values[[low, L - 1], :, d])[0, 1].nan_to_num())
        few[low] = expected_factor(min(abs(rho), 1 - 1e-9), costs[low])
        total = math.sqrt(float((values[low].var(0) * focus).sum()) * costs[low])
        for l in range(low + 1, L):
            v = float(((values[l] - values[l - 1]).var(0) * focus).sum())
            total += math.sqrt(v * (costs[l] + costs[l - 1]))
        many[low] = scale / total**2 if total > 0 else math.inf
    return few, many


def _decision(run: Run, rows: list[_Row], best: _Row, alone: float, tol: float | None) -> Decision:
    candidates = []
    for row in sorted(rows, key=lambda r: -r.gain if not math.isnan(r.gain) else math.inf):
        note = "not ahead by more than the pilot's error" if row.gain > 1 else "harmful: declined"
        if row.gain == 1:
            note = "no gain"
        if row.declared is not None:
            note = f"declined: {row.declared}"
        if row is rows[0]:
            note = "baseline" if row.declared is None else f"baseline; {row.declared}"
        if row is best:
            note = "chosen"
        elif row.gain > 1 and row.gain < best.gain:
            note = "smaller gain"
        nfe = alone / row.gain if tol is not None and row.gain > 0 else math.nan
        candidates.append(Candidate(row.name, row.gain, nfe, note))
    harmful = [c.design for c in candidates if c.note.startswith("harmful")]
    tail = f"; declined as harmful: {', '.join(harmful)}" if harmful else ""
    if best.name == "independent":
        sentence = f"no design was ahead of independent sampling by more than the pilot's error{tail}"
    elif rows[0].declared is not None:
        sentence = f"{best.name} is what the pilot has, and {rows[0].declared}"
    else:
        sentence = f"{best.name} has {best.gain:.3g} times less variance x cost than independent sampling{tail}"
    return Decision(best.name, sentence, tuple(candidates), run.nfe)


def _pooled(run: Run, design: Design) -> Design:
    """The design with what was drawn before it."""
    catalogue = run.catalogue
    controls = tuple(c for c in _FREE if isinstance(design, OneStream) and c in design.columns)
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
    single, _ = design.spread(run.sums)
    alone = float(_under(single, norm))
    if not isinstance(design.main, OneStream) or design.main.name == "few-step":
        found = design.main.combined(run.sums)
        if found is None:
            return design
        focus = run.focus(found.var, norm)
        root = sum(math.sqrt(float((p.variance * focus).sum()) * p.stream.nfe) for p in found.parts)
        harm = root**2 > alone * run.catalogue.sampler.nfe
        name, size = run.memory["second"]
        return _pooled(run, run.catalogue.design(name, points=size)) if harm else design
    main = design.main.streams[0]
    sums = run.sums.get(main.key)
    if sums is None or sums.units < 32:
        return design
    noise = next(n for n in ("independent", "antithetic", "sobol") if main.key.startswith(n))
    points = main.size if noise == "sobol" else 0
    chosen, own = design.main, _own(run, design.main, norm)
    for other in _controls(run.catalogue, noise, sums.units, points):
        if (found := _own(run, other, norm)) < 0.97 * own:
            chosen, own = other, found
    left = (wanted - sums.units) * points
    if noise != "independent" and own > 1.05 * alone:
        chosen = run.catalogue.one("independent", tuple(c for c in _FREE if c in chosen.columns))
    elif noise == "sobol" and left >= 2 * points * _ENOUGH_NETS and points < 4096:
        grown = 2 ** math.floor(math.log2(left / _ENOUGH_NETS))
        controls = tuple(dict.fromkeys(c if c in _FREE else "features" for c in chosen.columns))
        chosen = run.catalogue.one("sobol", controls, min(grown, 4096))
    return design if chosen is design.main else _pooled(run, chosen)


def _own(run: Run, design: OneStream, norm: Norm) -> float:
    """Variance a sample of a design's main stream, under the norm."""
    found = design.fit(run.sums)
    if found is None:
        return math.inf
    v = found[0].variance * design.streams[0].size
    return float(_under(v, norm))
