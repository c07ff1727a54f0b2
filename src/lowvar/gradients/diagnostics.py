r"""What a gradient estimate is worth: variance with an interval, cost, signal to noise, and the variance by site.

Over R batches with noise of their own, g_r the gradient of batch r (all parameters flattened),

    variance = 1/(R - 1) sum_r |g_r - mean g|^2,     its interval from the spread of |g_r - mean g|^2 over r,
    work     = variance x cost,                      what ranks estimators: n times the cost gives 1/n of the variance
    snr      = |mean g|^2 / variance

cost being the worlds that a batch runs (evaluations of the program, an upper bound: what does not depend on a branch
runs once), or the seconds that it takes. The share of a site is E |g - g'|^2 / 2 over the variance, g' the gradient
with this site's noise drawn anew and all other noise kept: Sobol's total index, so shares add up to 1 or more.

Source: I. Sobol, "Global sensitivity indices for nonlinear mathematical models", 2001.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from lowvar.gradients.baselines import LeaveOneOut
from lowvar.gradients.disarm import DisARM
from lowvar.gradients.distributions import base, is_discrete, support
from lowvar.gradients.enumeration import Enumerate
from lowvar.gradients.estimator import Estimator, GradientLabel
from lowvar.gradients.expectation import Expectation, ProgramState
from lowvar.gradients.modules import by_tensors
from lowvar.gradients.multisample import MultiSample
from lowvar.gradients.pathwise import Pathwise
from lowvar.gradients.program import swapped
from lowvar.gradients.score import Score
from lowvar.process.noise import NoiseSource

__all__ = ["Automatic", "Diagnosis", "EstimatorComparison", "automatic", "compare", "diagnose"]


@dataclass(frozen=True)
class Diagnosis:
    """Of one program with its estimators.

    Attributes:
        mean: of the gradient, like theta.
        parameters: variance of each entry, like theta.
        variance, low, high: summed over all entries, with a 95% interval.
        snr: signal to noise of a batch.
        cost: worlds a batch, or seconds.
        label: "biased" if a site is.
        sites: share of each site in the variance.
    """

    mean: Any
    parameters: Any
    variance: float
    low: float
    high: float
    snr: float
    cost: float
    label: GradientLabel
    sites: Mapping[str, float]

    @property
    def work(self) -> float:
        """Variance x cost."""
        return self.variance * self.cost


def diagnose(
    E: Expectation,
    theta: Any,
    source: NoiseSource,
    state: ProgramState,
    *,
    data: Sequence[Any] = (),
    repeats: int = 200,
    cost: Literal["worlds", "seconds"] = "worlds",
) -> Diagnosis:
    """Measures a gradient estimate.

    Args:
        E: the program and its number of samples.
        theta: a pytree of tensors, or an `nn.Module`, whose parameters are then reported by name.
        source: the noise.
        state: of `init`, or of a batch.
        data: as of `Expectation`.
        repeats: batches, >= 2.
        cost: what is measured as cost.

    Raises:
        ValueError: if repeats is below 2.

    Example:
        >>> from torch.distributions import Normal
        >>> from lowvar.process import Independent
        >>> def program(theta, s):
        ...     s.cost("square", s.sample("x", Normal(theta, 1.0), Pathwise()) ** 2)
        >>> E, theta = Expectation(program), torch.tensor(2.0)
        >>> report = diagnose(E, theta, Independent(0), E.init(theta))
        >>> report.low < 4 < report.high, report.sites  # the variance of 2 x
        (True, {'x': 1.0})
    """
    if repeats < 2:
        raise ValueError(f"repeats is {repeats}; a variance needs at least 2")
    program, theta = by_tensors(E.program, theta)
    E = replace(E, program=program)

    def stacked(first: int) -> Any:
        each = [E.noises(source, state, step=first + r, data=data) for r in range(repeats)]
        return pytree.tree_map(lambda *x: torch.stack(x), *each)

    def gradient(noises: Any) -> Any:
        return grad(lambda th: E.evaluate(th, noises, state, data=data).surrogates.mean())(theta)

    def gradients(noises: Any) -> Any:
        if not pytree.tree_leaves(noises):
            return pytree.tree_map(lambda x: x.expand(repeats, *x.shape), gradient(noises))
        return vmap(gradient, chunk_size=64)(noises)

    def flat(g: Any) -> Tensor:
        return torch.cat([x.reshape(repeats, -1).double() for x in pytree.tree_leaves(g)], 1)

    noises = stacked(0)
    g = gradients(noises)
    rows = flat(g)
    square = (rows - rows.mean(0)).square().sum(1) * repeats / (repeats - 1)
    variance = float(square.mean())
    half = 1.96 * float(square.std()) / repeats**0.5
    sites = {}
    fresh = stacked(repeats)
    for site in state.plan.sites:
        other = flat(gradients({**noises, site.name: fresh[site.name]}))
        sites[site.name] = float((rows - other).square().sum(1).mean() / 2) / variance if variance > 0 else 0.0
    if len(sites) == 1 and variance > 0:
        sites = dict.fromkeys(sites, 1.0)
    spent = float(len(state.worlds.choices) * E.n)
    if cost == "seconds":
        one = pytree.tree_map(lambda x: x[0], noises)
        gradient(one)
        begin = time.perf_counter()
        for _ in range(5):
            gradient(one)
        spent = (time.perf_counter() - begin) / 5
    label: GradientLabel = "biased" if any(s.label == "biased" for s in state.plan.sites) else "unbiased"
    return Diagnosis(
        pytree.tree_map(lambda x: x.mean(0), g),
        pytree.tree_map(lambda x: x.var(0), g),
        variance,
        max(variance - half, 0.0),
        variance + half,
        float(rows.mean(0).square().sum()) / variance if variance > 0 else float("inf"),
        spent,
        label,
        sites,
    )


@dataclass(frozen=True)
class EstimatorComparison:
    """Diagnoses by name, the least work first, biased ones last; `left_out` says why others could not run."""

    rows: Mapping[str, Diagnosis]
    left_out: Mapping[str, str]

    def table(self) -> str:
        """Markdown: estimator, label, variance with its interval, cost, work, signal to noise."""
        lines = ["| estimator | | variance | 95% | cost | variance x cost | snr |", "|---|---|---|---|---|---|---|"]
        for name, d in self.rows.items():
            lines.append(
                f"| {name} | {d.label} | {d.variance:.3g} | {d.low:.3g} to {d.high:.3g} | {d.cost:.3g} | "
                f"{d.work:.3g} | {d.snr:.3g} |"
            )
        return "\n".join(lines)


def compare(
    program: Callable[..., Any],
    estimators: Sequence[Estimator] | Mapping[str, Estimator],
    theta: Any,
    source: NoiseSource,
    *,
    site: str | None = None,
    n: int = 1,
    data: Sequence[Any] = (),
    repeats: int = 200,
    cost: Literal["worlds", "seconds"] = "worlds",
    batched: bool = False,
) -> EstimatorComparison:
    """The same program with one estimator after the other, on the same noise, ranked by variance x cost.

    Args:
        program: the program; estimators that cannot run in it are left out, with the reason.
        estimators: what to compare.
        theta: parameters, a pytree of tensors or an `nn.Module`.
        source: the noise.
        site: name of the site that they replace; None: every site that has none of its own ("auto"), or all if
            no site is so.
        n, data, repeats, cost, batched: as of `Expectation` and `diagnose`.

    Example:
        >>> from torch.distributions import Bernoulli
        >>> from lowvar.process import Independent
        >>> def program(theta, s):
        ...     s.cost("f", (s.sample("b", Bernoulli(logits=theta), "auto") - 0.4).square().sum())
        >>> result = compare(program, [Score(), DisARM()], torch.zeros(3), Independent(0))
        >>> list(result.rows)
        ['DisARM()', 'Score(baseline=Nothing())']
    """
    program, theta = by_tensors(program, theta)
    named = estimators if isinstance(estimators, Mapping) else {str(e): e for e in estimators}
    autos = _autos(program, theta, data)
    rows: dict[str, Diagnosis] = {}
    left_out: dict[str, str] = {}
    for name, estimator in named.items():

        def choose(where: str, d: Distribution, given: Any, estimator: Estimator = estimator) -> Estimator:
            mine = where == site if site is not None else (where in autos or not autos)
            return estimator if mine else _default(d, given)

        E = Expectation(swapped(program, choose), n, batched=batched)
        try:
            state = E.init(theta, data)
            rows[name] = diagnose(E, theta, source, state, data=data, repeats=repeats, cost=cost)
        except ValueError as reason:
            left_out[name] = str(reason)
    ranked = sorted(rows.items(), key=lambda row: (row[1].label == "biased", row[1].work))
    return EstimatorComparison(dict(ranked), left_out)


def _default(d: Distribution, given: Any) -> Estimator:
    if isinstance(given, Estimator):
        return given
    return Score() if is_discrete(d) else Pathwise()


def _autos(program: Callable[..., Any], theta: Any, data: Sequence[Any]) -> dict[str, Distribution]:
    """Sites whose estimator is to be chosen."""
    found: dict[str, Distribution] = {}

    def choose(name: str, d: Distribution, given: Any) -> Estimator:
        if given == "auto":
            found[name] = d
        return Score() if given == "auto" else given

    Expectation(swapped(program, choose)).init(theta, data)
    return found


def _candidates(d: Distribution, n: int) -> list[Estimator]:
    several: list[Estimator] = [MultiSample(2), Score(LeaveOneOut()) if n > 1 else Score()]
    if not is_discrete(d):
        return [Pathwise(), *several]
    if isinstance(base(d), td.Bernoulli):
        several.insert(0, DisARM())
    try:
        few = len(support(d)) <= 16
    except ValueError:
        few = False
    return [Enumerate(), *several] if few else several


@dataclass(frozen=True)
class Automatic:
    """A program with its choices, to be used as a program.

    Attributes:
        program: the given one.
        choices: the estimator of each "auto" site.
        why: a sentence for each.
    """

    program: Callable[..., Any]
    choices: Mapping[str, Estimator]
    why: Mapping[str, str]

    def __call__(self, theta: Any, s: Any, *data: Any) -> Any:
        """The program with the choices."""
        return swapped(self.program, lambda name, d, given: self.choices.get(name, given))(theta, s, *data)


def automatic(
    program: Callable[..., Any],
    theta: Any,
    source: NoiseSource,
    *,
    n: int = 1,
    data: Sequence[Any] = (),
    repeats: int = 100,
    batched: bool = False,
) -> Automatic:
    """Chooses an unbiased estimator for every site that says "auto", by the least variance x cost of a pilot.

    Sites are chosen one after the other, each with what the ones before it were given. The pilot is at these
    parameters: ask again when they have moved far. Arguments are those of `compare`.

    Raises:
        ValueError: if no candidate runs at a site.

    Example:
        >>> from torch.distributions import Bernoulli
        >>> from lowvar.process import Independent
        >>> def program(theta, s):
        ...     s.cost("f", (s.sample("b", Bernoulli(logits=theta), "auto") - 0.4).square().sum())
        >>> chosen = automatic(program, torch.zeros(2), Independent(0))
        >>> chosen.choices
        {'b': Enumerate()}
    """
    choices: dict[str, Estimator] = {}
    why: dict[str, str] = {}
    for name, d in _autos(program, theta, data).items():
        partial = Automatic(program, dict(choices), {})
        result = compare(
            partial, _candidates(d, n), theta, source, site=name, n=n, data=data, repeats=repeats, batched=batched
        )
        if not result.rows:
            raise ValueError(f"no estimator runs at site {name!r}: {dict(result.left_out)}")
        best = next(iter(result.rows))
        choices[name] = next(e for e in _candidates(d, n) if str(e) == best)
        others = ", ".join(f"{other} {row.work:.3g}" for other, row in result.rows.items() if other != best)
        why[name] = f"{best}: variance x cost {result.rows[best].work:.3g}, against {others or 'nothing else'}"
    return Automatic(program, choices, why)
