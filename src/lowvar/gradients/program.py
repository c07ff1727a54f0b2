r"""Programs: plain functions with sample sites and costs, for one sample.

    def program(theta, s, *data):
        z = s.sample("z", Normal(m(theta), sd(theta)), Pathwise())
        b = s.sample("b", Bernoulli(logits=net(theta, z)), Score(LeaveOneOut()))
        s.cost("nll", f(z, b))
        s.cost("kl", kl, parents=("z",))

Write it for one sample and one datum: batches of samples, data and branches are `torch.func.vmap`'s business, so what
does not depend on a branch runs once. A program that uses its last axes only (`sum(-1)`, linear layers) broadcasts as
well, and `Expectation(program, batched=True)` does without vmap (see `batches`). `theta` is anything the program
understands (a tensor, a dict of them, a module, nothing).

A cost depends on the sites sampled before it, or on the `parents` it names and what these depend on; a site likewise. A
site's estimator only hears of costs that depend on it, which is the Rao-Blackwell theorem at no price.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from lowvar.gradients.batches import Front, axes_of, drawn_one_by_one
from lowvar.gradients.estimator import BaseNoise, Branch, Estimator, GradientLabel, SiteDraw, SiteRecord, SiteState
from lowvar.process.noise import Independent

__all__ = ["CostPlan", "ProgramPlan", "SitePlan", "Sites"]

Choose = Callable[[str, Distribution, Any], Estimator]
StepEstimator = Estimator | Sequence[Estimator] | Callable[[int], Estimator]


@dataclass(frozen=True)
class SitePlan:
    """What is known of a site before any batch runs.

    Attributes:
        name: its name.
        noise: base noise by name.
        branches: the kinds of values it takes.
        ancestors: names of sites it depends on.
        label: of its estimator.
        estimator: its estimator's name.
        dtype, device: of its noise.
        shape: of its value.
        axes: of the tensors of its distribution (`batches.axes_of`).
        record: number of axes of each entry of its record.
    """

    name: str
    noise: Mapping[str, BaseNoise]
    branches: tuple[Branch, ...]
    ancestors: frozenset[str]
    label: GradientLabel
    estimator: str
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    axes: Mapping[str, int]
    record: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CostPlan:
    """A cost's name and the sites it depends on."""

    name: str
    ancestors: frozenset[str]


@dataclass(frozen=True)
class ProgramPlan:
    """Sites and costs of a program, in order.

    Attributes:
        sites, costs: as they came.
        groups: numbers of the costs that depend on the same sites, a group each.
        heard: for each site the numbers of the groups that depend on it.
        mains: for each site the numbers of its main branches.
    """

    sites: tuple[SitePlan, ...]
    costs: tuple[CostPlan, ...]
    groups: tuple[tuple[int, ...], ...] = field(init=False)
    heard: tuple[tuple[int, ...], ...] = field(init=False)
    mains: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        """Groups the costs."""
        parts: dict[frozenset[str], list[int]] = {}
        for c, cost in enumerate(self.costs):
            parts.setdefault(cost.ancestors, []).append(c)
        heard = [tuple(g for g, names in enumerate(parts) if site.name in names) for site in self.sites]
        object.__setattr__(self, "groups", tuple(tuple(part) for part in parts.values()))
        object.__setattr__(self, "heard", tuple(heard))
        mains = [tuple(v for v, kind in enumerate(site.branches) if kind == "main") for site in self.sites]
        object.__setattr__(self, "mains", tuple(mains))


class Sites:
    """The `s` of a program: one run of one sample in one world.

    Args:
        plan: what init found; None while it is being found.
        noise: of every site, by site and name.
        choice: branch number of every site, or None where every site has one.
        states: states of the sites' estimators.
        front: axes of a batch, where the program runs on all of it at once.
    """

    def __init__(
        self,
        plan: ProgramPlan | None,
        noise: Mapping[str, Mapping[str, Tensor]],
        choice: Sequence[Tensor] | None,
        states: Mapping[str, SiteState],
        front: Front | None = None,
    ) -> None:
        self._plan, self._noise, self._choice, self._states = plan, noise, choice, states
        self._front = front
        self.sites: list[SitePlan] = []
        self.estimators: list[Estimator] = []
        self.starts: dict[str, SiteState] = {}
        self.records: dict[str, SiteRecord] = {}
        self.costs: list[tuple[CostPlan, Tensor]] = []
        self.values: dict[str, Tensor] = {}
        self.distributions: dict[str, Distribution] = {}

    def sample(
        self,
        name: str,
        distribution: Distribution,
        estimator: Estimator | Literal["auto"],
        *,
        parents: Iterable[str] | None = None,
    ) -> Tensor:
        """A sample site.

        Args:
            name: the site's name, used once in a program.
            distribution: what it draws from, with the shape of one sample.
            estimator: how its gradient is estimated; "auto" is for `automatic`, which puts one in its place.
            parents: names of the sites that the distribution depends on; None: all before it.

        Returns:
            its value, of the distribution's shape.

        Raises:
            ValueError: if the name is taken, a parent unknown, or the program is not the one that init saw.
        """
        k = len(self.sites)
        if not isinstance(estimator, Estimator):
            hint = "choose with automatic(program, theta)" if estimator == "auto" else "such as Pathwise()"
            raise ValueError(f"site {name!r} has estimator {estimator!r}; give an Estimator, {hint}")
        if self._plan is None:
            site = self._found(name, distribution, estimator, parents)
            noise: Mapping[str, Tensor] = self._noise.get(name) or first_noise(site, k)
            try:
                self.starts[name] = estimator.start(distribution)
            except ValueError as reason:
                raise ValueError(f"site {name!r}: {reason}") from reason
            draw = estimator.draw(distribution, noise, self.starts[name])
            if draw.values.shape[0] != len(site.branches) or site.branches[0] != "main":
                raise ValueError(
                    f"{type(estimator).__name__} drew {draw.values.shape[0]} values at site {name!r} and announced "
                    f"{site.branches}: branches() and draw() must agree, and the first be a main one"
                )
            site = replace(site, record={key: x.ndim for key, x in draw.record.items()})
        else:
            if k >= len(self._plan.sites) or self._plan.sites[k].name != name:
                known = [s.name for s in self._plan.sites]
                raise ValueError(
                    f"site {name!r} is number {k + 1} here and init saw {known}: sites may not depend on values"
                )
            site = self._plan.sites[k]
            draw = self._drawn(site, distribution, estimator)
        self.sites.append(site)
        self.estimators.append(estimator)
        self.records[name] = draw.record
        self.distributions[name] = distribution
        self.values[name] = value = self._pick(k, draw)
        return value

    def _drawn(self, site: SitePlan, d: Distribution, estimator: Estimator) -> SiteDraw:
        noise, state, front = self._noise[site.name], self._states[site.name], self._front
        if front is None or estimator.broadcasts:
            return estimator.draw(d, noise, state)
        return drawn_one_by_one(estimator, d, site.axes, noise, state, front.lead, len(front.worlds.choices))

    def _pick(self, k: int, draw: SiteDraw) -> Tensor:
        if self._front is not None:
            return self._front.chosen(k, draw.values, len(self.sites[k].shape))
        if draw.values.shape[0] == 1 or self._choice is None:
            return draw.values[0]
        if draw.values.shape[0] == 2:  # cheaper than a gather under vmap
            return torch.where(self._choice[k] == 0, draw.values[0], draw.values[1])
        return draw.values.index_select(0, self._choice[k].reshape(1))[0]

    def _found(self, name: str, d: Distribution, estimator: Estimator, parents: Iterable[str] | None) -> SitePlan:
        if name in self.records:
            raise ValueError(f"site {name!r} is sampled twice; every site needs a name of its own")
        if not isinstance(d, Distribution):
            raise ValueError(f"site {name!r} draws from a {type(d).__name__}; give a torch.distributions.Distribution")
        noise = estimator.noise(d)
        reference = _reference(d)
        dtype = torch.float64 if reference.dtype == torch.float64 else torch.float32
        return SitePlan(
            name,
            noise,
            estimator.branches(d),
            self._ancestors(parents, f"site {name!r}"),
            estimator.label,
            type(estimator).__name__,
            dtype,
            reference.device,
            d.batch_shape + d.event_shape,
            axes_of(d),
        )

    def _ancestors(self, parents: Iterable[str] | None, who: str) -> frozenset[str]:
        before = {s.name: s for s in self.sites}
        names = list(before) if parents is None else ([parents] if isinstance(parents, str) else list(parents))
        for name in names:
            if name not in before:
                raise ValueError(f"{who} names the parent {name!r}; sites before it are {list(before)}")
        return frozenset(names).union(*(before[name].ancestors for name in names))

    def cost(self, name: str, value: Tensor | float, *, parents: Iterable[str] | None = None) -> None:
        """A cost; the program's value is the sum of them.

        Args:
            name: the cost's name, used once in a program.
            value: a scalar.
            parents: names of the sites it depends on; None: all before it.

        Raises:
            ValueError: if the name is taken, a parent unknown or the value not a scalar.
        """
        value = torch.as_tensor(value)
        if self._plan is not None:
            self.costs.append((self._plan.costs[len(self.costs)], value))
            return
        if any(c.name == name for c, _ in self.costs):
            raise ValueError(f"cost {name!r} is given twice; every cost needs a name of its own")
        if value.shape != ():
            raise ValueError(f"cost {name!r} has shape {tuple(value.shape)}; a program is for one sample: sum it")
        self.costs.append((CostPlan(name, self._ancestors(parents, f"cost {name!r}")), value))

    def markov(
        self,
        name: str,
        step: Callable[[int, Tensor], Distribution],
        steps: int,
        start: Tensor,
        estimator: StepEstimator,
    ) -> Tensor:
        """A chain x_{k+1} ~ step(k, x_k), k = 0 .. steps - 1: sites "name.0" and so on.

        Args:
            name: prefix of the sites' names.
            step: gives the law of the next state.
            steps: how many.
            start: x_0.
            estimator: of every step, one a step, or a function of the step's number.

        Returns:
            the last state.

        Raises:
            ValueError: if the number of estimators is not the number of steps.
        """
        if isinstance(estimator, Sequence) and len(estimator) != steps:
            raise ValueError(f"chain {name!r} has {steps} steps and {len(estimator)} estimators; give one a step")
        x = start
        for k in range(steps):
            if isinstance(estimator, Estimator):
                rule = estimator
            else:
                rule = estimator[k] if isinstance(estimator, Sequence) else estimator(k)
            x = self.sample(f"{name}.{k}", step(k, x), rule)
        return x


class _Swapped:
    """The `s` of a program with other estimators."""

    def __init__(self, inner: Sites, choose: Choose) -> None:
        self._inner, self._choose = inner, choose

    def sample(
        self, name: str, distribution: Distribution, estimator: Any, *, parents: Iterable[str] | None = None
    ) -> Tensor:
        return self._inner.sample(name, distribution, self._choose(name, distribution, estimator), parents=parents)

    def cost(self, name: str, value: Tensor | float, *, parents: Iterable[str] | None = None) -> None:
        self._inner.cost(name, value, parents=parents)

    markov = Sites.markov


def swapped(program: Callable[..., Any], choose: Choose) -> Callable[..., Any]:
    """The program with the estimators that `choose(site, distribution, given)` names.

    Example:
        >>> from torch.distributions import Bernoulli
        >>> from lowvar.gradients import Enumerate, Expectation, Score
        >>> def program(theta, s):
        ...     s.cost("sum", s.sample("b", Bernoulli(logits=theta), Score()).sum())
        >>> exact = swapped(program, lambda name, d, given: Enumerate())
        >>> len(Expectation(exact).init(torch.zeros(2)).worlds.choices)
        4
    """

    def other(theta: Any, s: Sites, *data: Any) -> Any:
        return program(theta, _Swapped(s, choose), *data)

    return other


def _reference(d: Distribution) -> Tensor:
    """A tensor with the distribution's dtype and device."""
    inner = getattr(d, "base_dist", None)
    if inner is not None:
        return _reference(inner)
    for name in d.arg_constraints:
        value = d.__dict__.get(name)
        if isinstance(value, Tensor):
            return value
    return d.mean


def first_noise(site: SitePlan, k: int, seed: int = 0) -> dict[str, Tensor]:
    """One sample of the noise of site number k, which init and the checks look at."""
    where = {"dtype": site.dtype, "device": site.device}
    return {
        name: getattr(Independent(seed), noise.kind)([0], noise.shape, draw=draw_number(k, j), **where)[0]
        for j, (name, noise) in enumerate(site.noise.items())
    }


def draw_number(site: int, noise: int) -> int:
    """Draw number of a site's noise."""
    return 8 * site + noise
