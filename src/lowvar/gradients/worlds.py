r"""The tree of branches of a program, as a table of worlds that run side by side.

A world is a choice of one branch at every site. Sites with main and live branches and probes (see `estimator`) give
a tree: a node before site k is *full* (its surrogate is asked) or *valued* (its cost alone). Of a full node's children
the main and live ones are full and the probes valued; a valued node has its main children only. So probes of different
sites do not multiply: m sites with a probe each need 1 + m worlds, m enumerated sites K^m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowvar.gradients.estimator import Branch

__all__ = ["Fork", "Worlds", "grow"]


@dataclass(frozen=True)
class Fork:
    """The nodes before one site; full ones come first in the numbering of all.

    Attributes:
        full: for each full node a world that passes through it.
        valued: likewise for valued nodes.
        live: for each full node its live children, numbers of the next level's nodes.
        total: for each full node all its children.
        main: for each valued node its main children.
    """

    full: tuple[int, ...]
    valued: tuple[int, ...]
    live: tuple[tuple[int, ...], ...]
    total: tuple[tuple[int, ...], ...]
    main: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Worlds:
    """All worlds: the branch of every site in each, and the tree that they form.

    Attributes:
        choices: a world each, a branch number a site.
        full: the first `full` worlds are leaves whose surrogate is asked.
        levels: a site each.
    """

    choices: tuple[tuple[int, ...], ...]
    full: int
    levels: tuple[Fork, ...]


def grow(branches: Sequence[Sequence[Branch]]) -> Worlds:
    """The worlds of a program whose sites have these branches, in order.

    Example:
        >>> grow([("main", "probe"), ("main", "probe")]).choices
        ((0, 0), (0, 1), (1, 0))
        >>> len(grow([("main",) * 3] * 2).choices)
        9
    """
    full: list[tuple[int, ...]] = [()]
    valued: list[tuple[int, ...]] = []
    links = []
    for kinds in branches:
        every = range(len(kinds))
        mains = [v for v in every if kinds[v] == "main"]
        lives = [v for v in every if kinds[v] != "probe"]
        probes = [v for v in every if kinds[v] == "probe"]
        next_full = [(*node, v) for node in full for v in lives]
        next_valued = [(*node, v) for node in full for v in probes] + [(*node, v) for node in valued for v in mains]
        where = {node: i for i, node in enumerate(next_full + next_valued)}
        live = tuple(tuple(where[(*node, v)] for v in lives) for node in full)
        total = tuple(tuple(where[(*node, v)] for v in every) for node in full)
        main = tuple(tuple(where[(*node, v)] for v in mains) for node in valued)
        links.append((len(full), len(valued), live, total, main))
        full, valued = next_full, next_valued
    first = list(range(len(full) + len(valued)))
    levels: list[Fork] = []
    for n_full, n_valued, live, total, main in reversed(links):
        first = [first[children[0]] for children in (*total, *main)]
        levels.append(Fork(tuple(first[:n_full]), tuple(first[n_full : n_full + n_valued]), live, total, main))
    return Worlds(tuple(full + valued), len(full), tuple(reversed(levels)))
