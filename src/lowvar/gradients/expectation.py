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
batch runs the program over data, samples and worlds, under vmap or by broadcasting (`execution`). Then, from the last
site to the first, each estimator turns its branches' surrogates and costs into one surrogate. Costs that depend on the
same sites are one group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lowvar.gradients.estimator import SiteRecord, SiteState
from lowvar.gradients.execution import (
    Batch,
    BatchRun,
    Noises,
    broadcast,
    mapped,
    refuse_mixed_axes,
    without_validation,
)
from lowvar.gradients.program import ProgramPlan, draw_number
from lowvar.gradients.tracing import refuse_steps, traced
from lowvar.gradients.worlds import Worlds, grow
from lowvar.process.noise import Independent, NoiseSource

__all__ = ["BatchEvaluation", "Expectation", "Info", "Noises", "ProgramState", "without_validation"]


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
        batched: whether the program runs on whole batches at once, for which it has to broadcast over axes in front of
            a sample's (`init` compares with single samples and refuses a program that does not). Without vmap, so
            faster where operations are small.

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
    batched: bool = False

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
            ValueError: if the program is not one (see `Sites`), a cost is a step function of a pathwise site, or the
                program is to run on batches and does not broadcast.
        """
        row = pytree.tree_map(lambda x: x[0], tuple(data))
        found = traced(self.program, theta, row)
        refuse_steps(self.program, theta, row, found)
        state = ProgramState(found.plan, grow([site.branches for site in found.plan.sites]), found.starts)
        if self.batched:
            self._refuse_mixed_axes(theta, data, state)
        return state

    def _refuse_mixed_axes(self, theta: Any, data: Sequence[Any], state: ProgramState) -> None:
        """Three samples of two data: sizes that differ, so that an axis taken for another shows."""
        several, two = replace(self, n=3), pytree.tree_map(lambda x: x[[0, -1]], tuple(data))
        noises = several.noises(Independent(0), state, data=two)
        refuse_mixed_axes(
            Batch(self.program, theta, noises, state.plan, state.worlds, state.sites, 3, _count(two), two)
        )

    def noises(self, source: NoiseSource, state: ProgramState, *, step: int = 0, data: Sequence[Any] = ()) -> Noises:
        """Noise of all sites, (data, n, *shape); without data (n, *shape). Sample j of datum b is number b n + j."""
        count = _count(data)
        rows = self.n * (1 if count is None else count)
        index = torch.arange(step * rows, (step + 1) * rows)
        lead = (self.n,) if count is None else (count, self.n)
        return {
            site.name: {
                name: getattr(source, noise.kind)(
                    index.to(site.device), noise.shape, draw=draw_number(k, j), dtype=site.dtype, device=site.device
                ).reshape(*lead, *noise.shape)
                for j, (name, noise) in enumerate(site.noise.items())
            }
            for k, site in enumerate(state.plan.sites)
        }

    def evaluate(self, theta: Any, noises: Noises, state: ProgramState, *, data: Sequence[Any] = ()) -> BatchEvaluation:
        """A batch on explicit noise (as `noises` gives it)."""
        plan, plate = state.plan, _count(data)
        batch = Batch(self.program, theta, noises, plan, state.worlds, state.sites, self.n, plate, data)
        found = broadcast(batch) if self.batched else mapped(batch)
        each = [reduce(torch.add, [found.costs[c] for c in group]) for group in plan.groups]
        lead = (self.n, 1 if plate is None else plate)
        surrogates, values, sites, auxiliary = _assembled(each, found, state, lead)

        def flat(x: Tensor) -> Tensor:  # in the first world
            x = x[:, 0, 0] if plate is None else x.select(2, 0)
            return x if x.shape == shape else x.expand(shape)

        shape = lead[:1] if plate is None else lead
        return BatchEvaluation(
            flat(reduce(torch.add, surrogates)),
            flat(reduce(torch.add, values)),
            {cost.name: flat(x.detach()) for cost, x in zip(plan.costs, found.costs, strict=True)},
            auxiliary,
            ProgramState(plan, state.worlds, sites),
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
    if data and isinstance(data[0], Tensor):
        return len(data[0])
    leaves = pytree.tree_leaves(tuple(data))
    return len(leaves[0]) if leaves else None


def _take(x: Tensor, index: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    """x[:, :, index], a view where it can be one."""
    if len(index) == 1:
        only = index[0]
        if isinstance(only, int):
            return x if x.shape[2] == 1 else x[:, :, only : only + 1]
        if tuple(only) == tuple(range(only[0], only[0] + len(only))):
            return (x if len(only) == x.shape[2] else x.narrow(2, only[0], len(only))).unsqueeze(2)
    return x[:, :, torch.tensor(index, device=x.device)]


def _whole(x: Tensor, lead: tuple[int, int], worlds: int) -> Tensor:
    """(n, data, worlds) from sizes of 1."""
    return x if x.shape == (*lead, worlds) else x.expand(*lead, worlds)


def _of(record: SiteRecord, nodes: Sequence[int]) -> dict[str, Tensor]:
    """A site's record at these worlds, (n, data, nodes, *own)."""
    own = {}
    for key, x in record.items():
        if x.shape[2] > 1:
            own[key] = _take(x, nodes)
        else:
            own[key] = x if len(nodes) == 1 else x.expand(*x.shape[:2], len(nodes), *x.shape[3:])
    return own


def _assembled(
    surrogates: list[Tensor], found: BatchRun, state: ProgramState, lead: tuple[int, int]
) -> tuple[list[Tensor], list[Tensor], dict[str, SiteState], Tensor]:
    """From the worlds' costs (n, data, W), a group each, to surrogates and values (n, data, 1), last site first.

    A group that does not hear of a site and is the same in all worlds (size 1) passes it as it is.
    """
    plan, worlds = state.plan, state.worlds
    after = dict(state.sites)
    values = [x.detach() for x in surrogates]
    if worlds.full < len(worlds.choices):
        surrogates = [x if x.shape[2] == 1 else x.narrow(2, 0, worlds.full) for x in surrogates]
    auxiliary = values[0].new_zeros(())
    full, every = worlds.full, len(worlds.choices)
    for k in reversed(range(len(plan.sites))):
        site, level, rule, heard = plan.sites[k], worlds.levels[k], found.estimators[k], plan.heard[k]
        if len(heard) < len(values):
            for g in set(range(len(values))).difference(heard):
                if surrogates[g].shape[2] > 1:
                    surrogates[g] = _take(surrogates[g], level.live).select(-1, 0)
                if values[g].shape[2] > 1:
                    first = _take(values[g], level.total).select(-1, 0)
                    others = [_take(values[g], level.main).select(-1, 0)] if level.main else []
                    values[g] = torch.cat([first, *others], 2) if others else first
        if heard:
            before, record = state.sites[site.name], found.records[site.name]
            costs = [_whole(values[g], lead, every) for g in heard]
            live = _stacked([_take(_whole(surrogates[g], lead, full), level.live) for g in heard])
            total = _stacked([_take(x, level.total) for x in costs])
            own, mains = _of(record, level.full), plan.mains[k]
            surrogate = rule.surrogate(own, live, total, before)
            value = rule.value(own, _narrowed(total, mains)).detach()
            extra = rule.auxiliary(own, total, before)
            auxiliary = auxiliary if extra is None else auxiliary + extra
            after[site.name] = rule.updated(before, own, total)
            if level.valued:
                theirs = _stacked([_take(x, level.main) for x in costs])
                value = torch.cat([value, rule.value(_of(record, level.valued), theirs).detach()], 2)
            for i, g in enumerate(heard):
                surrogates[g], values[g] = surrogate.select(-1, i), value.select(-1, i)
        full, every = len(level.full), len(level.full) + len(level.valued)
    return surrogates, values, after, auxiliary


def _narrowed(costs: Tensor, mains: Sequence[int]) -> Tensor:
    """The main branches' costs."""
    if len(mains) == costs.shape[-2]:
        return costs
    return costs[..., : len(mains), :] if mains[-1] == len(mains) - 1 else costs[..., list(mains), :]


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].unsqueeze(-1) if len(parts) == 1 else torch.stack(list(parts), -1)
