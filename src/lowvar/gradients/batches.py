r"""A site of a whole batch: axes in front of one sample's own.

A program that broadcasts can be run on a batch at once, without `torch.func.vmap`: its data have an axis in front, and
the values of its sites those of

    (worlds, samples, data, *shape),

worlds only once a site before has branches, samples only where there are several a datum, data only where there are
data. Broadcasting goes by the last axes, so what knows of fewer axes (a parameter, the encoding of a datum) meets what
knows of more as it should, and runs once.

An estimator that broadcasts draws such a batch itself. For the others the draw alone is mapped over the axes in front:
the tensors inside the distribution are told apart from those of one sample, which `init` has seen, by their number of
axes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.func import vmap

from lowvar.gradients.estimator import Estimator, SiteDraw, SiteState
from lowvar.gradients.worlds import Worlds

__all__ = ["Front", "axes_of", "drawn_one_by_one"]


def axes_of(d: Distribution) -> dict[str, int]:
    """Number of axes of each tensor inside a distribution, and of its batch shape, by path.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> axes = axes_of(Independent(Normal(torch.zeros(2, 3), 1.0), 1))
        >>> axes["base_dist.loc"], axes["base_dist."], axes[""]
        (2, 2, 1)
    """
    found: dict[str, int] = {}
    for path, part in _parts(d, ""):
        found[path] = part.ndim if isinstance(part, Tensor) else len(part.batch_shape)
    return found


def _inner(x: Any) -> Iterator[tuple[str, Any]]:
    """Attributes of a distribution or transform, or elements of a list of transforms, that may hold tensors."""
    items = enumerate(x) if isinstance(x, list | tuple) else vars(x).items()
    for name, value in items:
        several = isinstance(value, list | tuple) and any(isinstance(v, Transform) for v in value)
        if several or isinstance(value, Tensor | Distribution | Transform):
            yield str(name), value


def _parts(x: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(x, Distribution):
        yield path, x
    for name, value in _inner(x):
        if isinstance(value, Tensor):
            yield path + name, value
        else:
            yield from _parts(value, f"{path}{name}.")


def _one(x: Any, path: str, axes: Mapping[str, int], tensors: Mapping[str, Tensor]) -> Any:
    """One sample's distribution, with these tensors in it."""
    if isinstance(x, list | tuple):
        return [_one(v, f"{path}{i}.", axes, tensors) for i, v in enumerate(x)]
    own = copy.copy(x)
    if isinstance(x, Distribution):
        own._batch_shape = x.batch_shape[len(x.batch_shape) - axes[path] :]
    for name, value in list(_inner(x)):
        if not isinstance(value, Tensor):
            own.__dict__[name] = _one(value, f"{path}{name}.", axes, tensors)
        elif path + name in tensors:
            own.__dict__[name] = tensors[path + name]
        else:  # a quantity computed on the way, which is computed again
            del own.__dict__[name]
    return own


def drawn_one_by_one(
    estimator: Estimator,
    d: Distribution,
    axes: Mapping[str, int],
    noise: Mapping[str, Tensor],
    state: SiteState,
    lead: Sequence[int],
    worlds: int,
) -> SiteDraw:
    """The draws of a batch by an estimator that does not broadcast.

    Args:
        estimator: the estimator.
        d: the distribution of the batch.
        axes: of one sample's (`axes_of`).
        noise: (*lead, *own).
        state: of the site.
        lead: samples and data, as many as there are.
        worlds: how many, for distributions that have this axis as well.
    """
    tensors = {path: x for path, x in _parts(d, "") if isinstance(x, Tensor) and path in axes}
    front = {path: x.ndim - axes[path] for path, x in tensors.items()}
    counts = [0, *front.values()]
    most = max(counts)
    if min(counts) < 0 or most > len(lead) + 1:
        raise ValueError(f"{type(d).__name__} has other axes than {tuple(lead)} in front of one sample's")
    sizes = (worlds, *lead) if most > len(lead) else tuple(lead)
    inputs = []
    for path, x in tensors.items():
        k = front[path]
        own = x.shape[k:]
        inputs.append((x.expand(*sizes[len(sizes) - k :], *own) if k else x, k))
    inputs += [(x, len(lead)) for x in noise.values()]

    def draw(_: Tensor, *each: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        given = dict(zip(tensors, each, strict=False))
        mine = dict(zip(noise, each[len(tensors) :], strict=True))
        found = estimator.draw(_one(d, "", axes, given), mine, state)
        return found.values, dict(found.record)

    run: Callable[..., Any] = draw
    for i in reversed(range(len(sizes))):  # the innermost axis, which most inputs have, is the last
        there = [0 if k >= len(sizes) - i else None for _, k in inputs]
        run = vmap(run, in_dims=(0, *there))
    values, record = run(torch.zeros(sizes), *[x for x, _ in inputs])
    return SiteDraw(values.movedim(len(sizes), 0), record)


@dataclass(frozen=True)
class Front:
    """The axes in front of a sample's own.

    Attributes:
        lead: samples and data, as many of both as there are.
        worlds: what the axis before them counts, where there is one.
    """

    lead: tuple[int, ...]
    worlds: Worlds

    def chosen(self, k: int, values: Tensor, own: int) -> Tensor:
        """The value of site k in each world, (worlds, *lead, *own), or (*lead, *own) where it has one branch.

        Args:
            k: number of the site.
            values: of the branches, (total, *lead, *own) or, where they depend on the world, (total, worlds, *lead,
                *own).
            own: number of a sample's own axes.

        Example:
            >>> from lowvar.gradients.worlds import grow
            >>> front = Front((3,), grow([("main", "main"), ("main",), ("main", "main")]))
            >>> front.chosen(0, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), 0).tolist()
            [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [4.0, 5.0, 6.0]]
        """
        if values.shape[0] == 1:
            return values[0]
        which = [world[k] for world in self.worlds.choices]
        alike = which == list(range(values.shape[0]))
        if values.ndim == 1 + len(self.lead) + own:
            return values if alike else values.index_select(0, torch.tensor(which, device=values.device))
        index = torch.tensor(which, device=values.device)
        return values[index, torch.arange(len(which), device=values.device)]
