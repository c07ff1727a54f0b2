r"""Runs a program on a noise source: value, surrogate, states.

    E = Expectation(program, n=64)
    state = E.init(theta)
    loss, state, info = E.surrogate(theta, noise, state, step=k)

The loss's value is the mean of n samples' costs (and of the data's), its gradient the estimators'. Nothing is kept
between calls but what `state` holds; the noise is a function of the source and the step. So it is a function that
`torch.func` transforms: `grad(lambda th: E.surrogate(th, noise, state)[0])(theta)`, `vmap(grad(...))`, `jacrev`,
and `hessian` where every site's estimator holds for any order (`orders == 0`). Under `torch.compile` give distributions
`validate_args=False`, or call the compiled function within `without_validation()`.

How it works. `init` runs the program once and finds its sites; their branches give a table of worlds (`worlds`). A
batch runs the program under vmap over data, samples and worlds, innermost last. Then, from the last site to the first,
each estimator turns its branches' surrogates and costs into one surrogate. Costs that depend on the same sites are one
group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.func import vmap
from torch.utils import _pytree as pytree

from lowvar.gradients.estimator import Estimator, SiteRecord, SiteState
from lowvar.gradients.program import ProgramPlan, Sites, _number, refuse_steps, traced
from lowvar.gradients.worlds import Worlds, grow
from lowvar.process.noise import NoiseSource

__all__ = ["BatchEvaluation", "Expectation", "Info", "Noises", "ProgramState", "without_validation"]

Noises = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class ProgramState:
    """What a batch leaves to the next: the plan of the program (fixed) and each site's own state.

    Attributes:
        plan: sites and costs.
        worlds: the table of branches.
        sites: tensors by site.
    """

    plan: ProgramPlan
    worlds: Worlds
    sites: Mapping[str, SiteState]

    def state(self) -> dict[str, Tensor]:
        """All tensors under flat names, for a checkpoint."""
        return {f"{site}/{name}": value for site, own in self.sites.items() for name, value in own.items()}

    def restored(self, tensors: Mapping[str, Tensor]) -> ProgramState:
        """This state with the tensors of a checkpoint.

        Raises:
            ValueError: if the names are not those of `state()`.
        """
        if set(tensors) != set(self.state()):
            raise ValueError(f"the checkpoint has {sorted(tensors)}, this program {sorted(self.state())}")
        sites = {site: {name: tensors[f"{site}/{name}"] for name in own} for site, own in self.sites.items()}
        return replace(self, sites=sites)


@dataclass(frozen=True)
class Info:
    """What a batch says.

    Attributes:
        values: costs of each sample, summed, (n,) or (n, data), without gradient.
        costs: each cost by name in the first world, likewise.
        auxiliary: loss of the estimators' own parameters (learned control variates); 0 where there are none. Add it to
            the loss: it has no gradient with respect to what the surrogate differentiates.
        biased: names of sites whose estimator is biased.
        worlds: branches that ran for each sample.
    """

    values: Tensor
    costs: Mapping[str, Tensor]
    auxiliary: Tensor
    biased: tuple[str, ...]
    worlds: int


@dataclass(frozen=True)
class BatchEvaluation:
    """A batch before it is averaged: surrogates and values (n,) or (n, data), costs by name, the state after it."""

    surrogates: Tensor
    values: Tensor
    costs: Mapping[str, Tensor]
    auxiliary: Tensor
    state: ProgramState


@dataclass(frozen=True)
class Expectation:
    """E[sum of a program's costs], with a gradient.

    Args:
        program: `program(theta, s, *data)`, see `lowvar.gradients.program`.
        n: samples a datum, >= 1.

    Raises:
        ValueError: if n < 1.

    Example:
        >>> from torch.distributions import Normal
        >>> from lowvar.gradients import Pathwise
        >>> from lowvar.process import Independent
        >>> def program(theta, s):
        ...     x = s.sample("x", Normal(theta, 1.0), Pathwise())
        ...     s.cost("square", x**2)
        >>> E, theta = Expectation(program, n=1000), torch.tensor(2.0)
        >>> state = E.init(theta)
        >>> g = torch.func.grad(lambda th: E.surrogate(th, Independent(0), state)[0])(theta)
        >>> abs(float(g) - 4) < 0.2
        True
    """

    program: Callable[..., Any]
    n: int = 1

    def __post_init__(self) -> None:
        """Checks n."""
        if self.n < 1:
            raise ValueError(f"n is {self.n}; give at least 1 sample")

    def init(self, theta: Any, data: Sequence[Any] = ()) -> ProgramState:
        """The state before any batch; runs the program once, on the first datum.

        Args:
            theta: parameters as the program takes them.
            data: tensors (or pytrees of them) with data along the first axis.

        Raises:
            ValueError: if the program is not one (see `Sites`), or a cost is a step function of a pathwise site.
        """
        row = pytree.tree_map(lambda x: x[0], tuple(data))
        found = traced(self.program, theta, row)
        refuse_steps(self.program, theta, row, found)
        return ProgramState(found.plan, grow([site.branches for site in found.plan.sites]), found.starts)

    def noises(self, source: NoiseSource, state: ProgramState, *, step: int = 0, data: Sequence[Any] = ()) -> Noises:
        """Noise of all sites, (data, n, *shape); without data (n, *shape). Sample j of datum b is number b n + j."""
        count = _count(data)
        rows = self.n * (1 if count is None else count)
        index = torch.arange(step * rows, (step + 1) * rows)
        lead = (self.n,) if count is None else (count, self.n)
        return {
            site.name: {
                name: getattr(source, noise.kind)(
                    index.to(site.device), noise.shape, draw=_number(k, j), dtype=site.dtype, device=site.device
                ).reshape(*lead, *noise.shape)
                for j, (name, noise) in enumerate(site.noise.items())
            }
            for k, site in enumerate(state.plan.sites)
        }

    def evaluate(self, theta: Any, noises: Noises, state: ProgramState, *, data: Sequence[Any] = ()) -> BatchEvaluation:
        """A batch on explicit noise (as `noises` gives it)."""
        plan, worlds = state.plan, state.worlds
        groups = list(dict.fromkeys(cost.ancestors for cost in plan.costs))
        seen: list[Sites] = []
        many, plate = len(worlds.choices) > 1, _count(data)
        # one sample a datum: a level of vmap less; without data it stays, as only it makes integers fit to be an index
        alone = self.n == 1 and plate is not None
        device = plan.sites[0].device if plan.sites else None
        choice = torch.tensor(worlds.choices, device=device) if many else None
        names = [(site.name, name) for site in plan.sites for name in site.noise]
        rows, spec = pytree.tree_flatten(tuple(data))
        keys: list[tuple[str, str]] = []

        def one(choice: Tensor | None, rows: Sequence[Tensor], _: Tensor, *noise: Tensor) -> tuple[Tensor, ...]:
            given: dict[str, dict[str, Tensor]] = {site.name: {} for site in plan.sites}
            for (site, name), e in zip(names, noise, strict=True):
                given[site][name] = e
            s = Sites(plan, given, None if choice is None else choice.unbind(0), state.sites)
            self.program(theta, s, *pytree.tree_unflatten(rows, spec))
            if len(s.sites) != len(plan.sites) or len(s.costs) != len(plan.costs):
                raise ValueError("the program left out a site or a cost that init saw: they may not depend on values")
            seen[:] = [s]
            keys[:] = [(site, key) for site, record in s.records.items() for key in record]
            parts = [value for _, value in s.costs]
            dtype = reduce(torch.promote_types, [value.dtype for value in parts])
            each = torch.stack([value.to(dtype) for value in parts])
            return (each, *(s.records[site][key] for site, key in keys))  # flat: vmap walks through what it is given

        run: Callable[..., Any] = one
        each_noise = [noises[site][name] for site, name in names]
        lead = (*(() if plate is None else (plate,)), *(() if alone else (self.n,)))
        samples = (0,) * (1 + len(names))
        if many:
            run = vmap(run, in_dims=(0, None, None, *[None] * len(names)))
        if alone:
            each_noise = [x.squeeze(1) for x in each_noise]
        else:
            run = vmap(run, in_dims=(None, None, *samples))
        if plate is not None:
            run = vmap(run, in_dims=(None, 0, *samples))
        # torch.compile cannot follow the switch: call `without_validation()` around compiled code
        with nullcontext() if torch.compiler.is_compiling() else without_validation():
            found = run(choice, rows, torch.zeros(lead), *each_noise)  # zeros: programs without noise have samples too

        def shaped(x: Tensor) -> Tensor:  # (n, data, worlds, ...)
            x = x.unsqueeze(0) if plate is None else x
            x = x.unsqueeze(1) if alone else x
            x = x if many else x.unsqueeze(2)
            return x.transpose(0, 1)

        each = shaped(found[0])
        values = each.detach()
        records: dict[str, dict[str, Tensor]] = {site.name: {} for site in plan.sites}
        for (site, key), x in zip(keys, found[1:], strict=True):
            records[site][key] = shaped(x)
        which = [[c for c, cost in enumerate(plan.costs) if cost.ancestors == group] for group in groups]
        surrogate = torch.stack([each[..., w].sum(-1) for w in which], -1) if len(groups) < len(plan.costs) else each
        value = surrogate.detach()
        surrogate, value, sites, auxiliary = _assembled(
            surrogate, value, records, groups, plan, worlds, seen[0].estimators, state.sites
        )
        flat = (lambda x: x[:, 0]) if plate is None else (lambda x: x)
        costs = {cost.name: flat(values[:, :, 0, c]) for c, cost in enumerate(plan.costs)}
        return BatchEvaluation(
            flat(surrogate[:, :, 0].sum(-1)),
            flat(value[:, :, 0].sum(-1)),
            costs,
            auxiliary,
            replace(state, sites=sites),
        )

    def surrogate(
        self, theta: Any, source: NoiseSource, state: ProgramState, *, step: int = 0, data: Sequence[Any] = ()
    ) -> tuple[Tensor, ProgramState, Info]:
        """Loss, state after the batch, info.

        Args:
            theta: parameters as the program takes them.
            source: the noise.
            state: of `init` or of the batch before.
            step: number of the batch: each has noise of its own.
            data: tensors with data along the first axis, handed to the program one by one.
        """
        batch = self.evaluate(theta, self.noises(source, state, step=step, data=data), state, data=data)
        biased = tuple(site.name for site in state.plan.sites if site.label == "biased")
        info = Info(batch.values, batch.costs, batch.auxiliary, biased, len(state.worlds.choices))
        return batch.surrogates.mean(), batch.state, info


def _count(data: Sequence[Any]) -> int | None:
    leaves = pytree.tree_leaves(tuple(data))
    return len(leaves[0]) if leaves else None


@contextmanager
def without_validation() -> Iterator[None]:
    """Distributions made here do not look at their arguments' values, which vmap forbids; init has looked at them."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _take(x: Tensor, index: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    """x[:, :, index], a view where it can be one."""
    if len(index) == 1:
        only = index[0]
        if isinstance(only, int):
            return x[:, :, only : only + 1]
        if list(only) == list(range(only[0], only[0] + len(only))):
            return x[:, :, only[0] : only[0] + len(only)].unsqueeze(2)
    return x[:, :, torch.tensor(index, device=x.device)]


def _assembled(
    surrogate: Tensor,
    value: Tensor,
    records: Mapping[str, SiteRecord],
    groups: Sequence[frozenset[str]],
    plan: ProgramPlan,
    worlds: Worlds,
    estimators: Sequence[Estimator],
    states: Mapping[str, SiteState],
) -> tuple[Tensor, Tensor, dict[str, SiteState], Tensor]:
    """From the worlds' costs (n, data, W, G) to surrogate and value (n, data, 1, G), last site first."""
    after: dict[str, SiteState] = {}
    auxiliary = value.new_zeros(())
    surrogate = surrogate[:, :, : worlds.full]
    for k in reversed(range(len(plan.sites))):
        name, level, rule = plan.sites[k].name, worlds.levels[k], estimators[k]
        own = {key: _take(x, level.full) for key, x in records[name].items()}
        live, total = _take(surrogate, level.live), _take(value, level.total)
        heard = [g for g, group in enumerate(groups) if name in group]
        if not heard:
            after[name] = states[name]
            surrogate, value = live[..., 0, :], _joined(total[..., 0, :], value, level.main)
            continue
        everything = len(heard) == len(groups)
        mains = [v for v, kind in enumerate(plan.sites[k].branches) if kind == "main"]
        main = total[..., : len(mains), :] if mains[-1] == len(mains) - 1 else total[..., mains, :]
        some_live, some_total, some_main = (
            (live, total, main) if everything else (live[..., heard], total[..., heard], main[..., heard])
        )
        s = rule.surrogate(own, some_live, some_total, states[name])
        v = rule.value(own, some_main).detach()
        extra = rule.auxiliary(own, some_total, states[name])
        auxiliary = auxiliary if extra is None else auxiliary + extra
        after[name] = rule.updated(states[name], own, some_total)
        if not everything:
            s, v = _spread(s, live[..., 0, :], heard), _spread(v, total[..., 0, :], heard)
        if level.valued:
            theirs = {key: _take(x, level.valued) for key, x in records[name].items()}
            others = _take(value, level.main)
            o = rule.value(theirs, others if everything else others[..., heard]).detach()
            v = torch.cat([v, o if everything else _spread(o, others[..., 0, :], heard)], 2)
        surrogate, value = s, v
    return surrogate, value, {site.name: after[site.name] for site in plan.sites}, auxiliary


def _joined(full: Tensor, value: Tensor, main: Sequence[Sequence[int]]) -> Tensor:
    return torch.cat([full, _take(value, main)[..., 0, :]], 2) if main else full


def _spread(part: Tensor, rest: Tensor, heard: Sequence[int]) -> Tensor:
    """`part` in the groups heard, `rest` in the others."""
    columns = {g: part[..., i] for i, g in enumerate(heard)}
    return torch.stack([columns.get(g, rest[..., g]) for g in range(rest.shape[-1])], -1)
