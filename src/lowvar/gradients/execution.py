r"""The two ways to run a program on a batch: sample by sample under vmap, or all at once.

*Mapped*: the program is written for one sample and one datum, and `torch.func.vmap` runs it over data, samples and
worlds, innermost last. What does not depend on a branch runs once. A level of vmap costs a few microseconds for every
operation, so it is felt where operations are small.

*Broadcast*: the program has to broadcast over axes in front (see `batches`) and is called once. Whether it does is not
a matter of trust: `refuse_mixed_axes` runs a batch both ways and compares.

Both give costs and records with the axes (samples, data, worlds, ...); an axis of which a cost knows nothing may have
size 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.func import vmap
from torch.utils import _pytree as pytree

from lowvar.gradients.batches import Front
from lowvar.gradients.estimator import Estimator, SiteState
from lowvar.gradients.program import ProgramPlan, Sites
from lowvar.gradients.worlds import Worlds

__all__ = ["Batch", "BatchRun", "Noises", "broadcast", "mapped", "refuse_mixed_axes", "without_validation"]

Noises = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Batch:
    """What is to be run.

    Attributes:
        program, theta: what, and on what.
        noises: of all sites, (data, n, *shape), or (n, *shape) without data.
        plan, worlds, states: what init and the batches before have left.
        n: samples a datum.
        plate: number of data; None: the program has none.
        data: tensors with data along the first axis.
    """

    program: Callable[..., Any]
    theta: Any
    noises: Noises
    plan: ProgramPlan
    worlds: Worlds
    states: Mapping[str, SiteState]
    n: int
    plate: int | None
    data: Sequence[Any]

    @property
    def alone(self) -> bool:
        """One sample a datum: an axis less. Without data it stays, as only it makes integers fit to be an index."""
        return self.n == 1 and self.plate is not None


@dataclass(frozen=True)
class BatchRun:
    """What running a program leaves.

    Attributes:
        costs: of the program, in order, (n or 1, data or 1, worlds or 1).
        records: of each site, (n, data, worlds or 1, *own).
        estimators: of each site.
    """

    costs: list[Tensor]
    records: dict[str, dict[str, Tensor]]
    estimators: list[Estimator]


@contextmanager
def without_validation() -> Iterator[None]:
    """Distributions made here do not look at their arguments' values, which vmap forbids; init has looked at them."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _quiet() -> AbstractContextManager[None]:
    # torch.compile cannot follow the switch: call `without_validation()` around compiled code
    return nullcontext() if torch.compiler.is_compiling() else without_validation()


def _complete(s: Sites, plan: ProgramPlan) -> None:
    if len(s.sites) != len(plan.sites) or len(s.costs) != len(plan.costs):
        raise ValueError("the program left out a site or a cost that init saw: they may not depend on values")


def mapped(batch: Batch) -> BatchRun:
    """The program under vmap over data, samples and worlds."""
    plan, plate, alone = batch.plan, batch.plate, batch.alone
    worlds = batch.worlds
    seen: list[Sites] = []
    many = len(worlds.choices) > 1
    device = plan.sites[0].device if plan.sites else None
    choice = torch.tensor(worlds.choices, device=device) if many else None
    names = [(site.name, name) for site in plan.sites for name in site.noise]
    rows, spec = pytree.tree_flatten(tuple(batch.data))
    keys: list[tuple[str, str]] = []

    def one(choice: Tensor | None, rows: Sequence[Tensor], _: Tensor, *noise: Tensor) -> tuple[Tensor, ...]:
        given: dict[str, dict[str, Tensor]] = {site.name: {} for site in plan.sites}
        for (site, name), e in zip(names, noise, strict=True):
            given[site][name] = e
        s = Sites(plan, given, None if choice is None else choice.unbind(0), batch.states)
        batch.program(batch.theta, s, *pytree.tree_unflatten(rows, spec))
        _complete(s, plan)
        seen[:] = [s]
        keys[:] = [(site, key) for site, record in s.records.items() for key in record]
        costs = [value for _, value in s.costs]
        return (*costs, *(s.records[site][key] for site, key in keys))  # flat: vmap walks through what it is given

    run: Callable[..., Any] = one
    each_noise = [batch.noises[site][name] for site, name in names]
    lead = (*(() if plate is None else (plate,)), *(() if alone else (batch.n,)))
    samples = (0,) * (1 + len(names))
    if many:
        run = vmap(run, in_dims=(0, None, None, *[None] * len(names)))
    if alone:
        each_noise = [x.squeeze(1) for x in each_noise]
    else:
        run = vmap(run, in_dims=(None, None, *samples))
    if plate is not None:
        run = vmap(run, in_dims=(None, 0, *samples))
    with _quiet():
        found = run(choice, rows, torch.zeros(lead), *each_noise)  # zeros: programs without noise have samples too

    def shaped(x: Tensor) -> Tensor:  # (n, data, worlds, ...)
        x = x.unsqueeze(0) if plate is None else x
        x = x.unsqueeze(1) if alone else x
        x = x if many else x.unsqueeze(2)
        return x.transpose(0, 1)

    records: dict[str, dict[str, Tensor]] = {site.name: {} for site in plan.sites}
    for (site, key), x in zip(keys, found[len(plan.costs) :], strict=True):
        records[site][key] = shaped(x)
    return BatchRun([shaped(x) for x in found[: len(plan.costs)]], records, seen[0].estimators)


def broadcast(batch: Batch) -> BatchRun:
    """The program once, on axes in front.

    Raises:
        ValueError: if a cost has other axes.
    """
    plan, plate, alone = batch.plan, batch.plate, batch.alone
    lead = (*(() if alone else (batch.n,)), *(() if plate is None else (plate,)))
    worlds = len(batch.worlds.choices)

    def turned(x: Tensor) -> Tensor:
        return x if plate is None else x.squeeze(1) if alone else x.transpose(0, 1)

    given = {site.name: {name: turned(batch.noises[site.name][name]) for name in site.noise} for site in plan.sites}
    s = Sites(plan, given, None, batch.states, Front(lead, batch.worlds))
    with _quiet():
        batch.program(batch.theta, s, *batch.data)
    _complete(s, plan)
    whole = (worlds, *lead)

    def shaped(x: Tensor, own: int, *who: str) -> Tensor:
        """From (worlds, *lead, *own), axes missing in front, to (n or 1, data or 1, worlds or 1, *own)."""
        k = x.ndim - own
        front = x.shape[:k]
        if front == lead:
            x = x.unsqueeze(k)
        elif front == whole:
            x = x.movedim(0, -1 - own)
        elif 0 <= k <= len(whole) and _fits(front, whole):
            x = x.reshape((1,) * (len(whole) - k) + x.shape).movedim(0, -1 - own)
        else:
            raise ValueError(
                f"{who[0]} {who[-1]!r} has the axes {tuple(x.shape)} in a batch of {whole} (worlds, samples, data): "
                "the program does not broadcast; sum over the last axes only (sum(-1)), or say batched=False"
            )
        return x.unsqueeze(1) if plate is None else x.unsqueeze(0) if alone else x

    both = (batch.n, 1 if plate is None else plate)
    records: dict[str, dict[str, Tensor]] = {}
    for site in plan.sites:
        mine = {}
        for key, x in s.records[site.name].items():
            x = shaped(x, site.record[key], f"record {key!r} of site", site.name)
            mine[key] = x if x.shape[:2] == both else x.expand(*both, *x.shape[2:])
        records[site.name] = mine
    costs = [shaped(value, 0, "cost", cost.name) for cost, value in s.costs]
    return BatchRun(costs, records, s.estimators)


def _fits(shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether a shape broadcasts to the last axes of another."""
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(whole), strict=False))


def refuse_mixed_axes(batch: Batch) -> None:
    """Refuses a program that broadcasts wrongly: the same batch sample by sample, and all at once.

    Raises:
        ValueError: if a cost or a record is another one.
    """
    with torch.no_grad():
        alone = mapped(batch)
        try:
            together = broadcast(batch)
        except (RuntimeError, IndexError, TypeError) as reason:
            raise ValueError(
                f"the program does not broadcast over axes in front of a sample's ({reason}); say batched=False"
            ) from reason
    pairs = [
        (f"cost {cost.name!r}", a, b) for cost, a, b in zip(batch.plan.costs, alone.costs, together.costs, strict=True)
    ]
    for site, record in alone.records.items():
        pairs += [(f"record {k!r} of site {site!r}", a, together.records[site][k]) for k, a in record.items()]
    for who, a, b in pairs:
        tolerance = 1e-9 if a.dtype == torch.float64 else 1e-3
        a, b = torch.broadcast_tensors(a, b)
        size = float(a.abs().max()) if a.numel() else 0.0
        if not torch.allclose(a, b.to(a), rtol=tolerance, atol=tolerance * size, equal_nan=True):
            raise ValueError(
                f"{who} is another one when samples run together, by {float((a - b).abs().max()):.2g}: the program "
                "mixes samples; index and sum the last axes only (x[..., 0], sum(-1)), or say batched=False"
            )
