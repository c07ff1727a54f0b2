r"""Small programs on which gradient estimators are certified.

Their costs are not sums over elements (those hide bugs), depend on theta directly as well, and have no symmetry. Each
is a function of one estimator, which it uses at every site of its family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal, OneHotCategorical, Poisson

from lowvar.gradients.estimator import Estimator
from lowvar.gradients.pathwise import Pathwise
from lowvar.gradients.program import Sites

__all__ = ["PROBLEMS", "Problem"]

Theta = Mapping[str, Tensor]


def _f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """A program of one estimator, and where it is certified.

    Attributes:
        name: its name.
        program: `program(estimator)` is the program.
        theta: float64 parameters.
        truth: the gradient, where summing over the sites does not give it.
    """

    name: str
    program: Callable[[Estimator], Callable[..., Any]]
    theta: Theta
    truth: Theta | None = None


def _bits(count: int) -> Problem:
    """Bits whose cost is a cosine of all pairs."""
    pairs = _f64(0.9, -1.3, 0.4, 1.7, -0.6, 0.8, 2.1, -0.2, 0.5, 1.1, -0.7, 0.3, -1.9, 0.6, 1.4, -0.8).reshape(4, 4)

    def of(estimator: Estimator) -> Callable[..., Any]:
        def program(theta: Theta, s: Sites) -> None:
            b = s.sample("b", Bernoulli(logits=theta["logits"]), estimator)
            inner = torch.cos(b @ pairs[:count, :count] @ b + 0.7 * b.sum() - 0.2)
            s.cost("cosine", inner * (2 + theta["direct"] * b[0]) + theta["direct"] ** 2)

        return program

    theta = {"logits": _f64(0.3, -1.0, 0.7, 2.0)[:count], "direct": torch.tensor(0.4, dtype=torch.float64)}
    return Problem(f"{count} bits", of, theta)


def _classes(kinds: int, one_hot: bool) -> Problem:
    """Two categorical elements whose cost is a table of both; the values between are multilinear."""
    table = torch.cos(torch.arange(kinds * kinds, dtype=torch.float64).square()).reshape(kinds, kinds) * 2 + 0.5

    def of(estimator: Estimator) -> Callable[..., Any]:
        def program(theta: Theta, s: Sites) -> None:
            kind = OneHotCategorical if one_hot else Categorical
            c = s.sample("c", kind(logits=theta["logits"]), estimator)
            value = c[0] @ table @ c[1] if one_hot else table[c[0], c[1]]
            s.cost("table", value * (1 + theta["direct"]))

        return program

    logits = torch.sin(1 + torch.arange(2 * kinds, dtype=torch.float64)).reshape(2, kinds)
    theta = {"logits": logits, "direct": torch.tensor(0.4, dtype=torch.float64)}
    return Problem(f"{kinds} {'one-hot ' if one_hot else ''}classes", of, theta)


def _class(kinds: int) -> Problem:
    """One categorical element whose cost is a cosine of all pairs of classes, far from linear between them."""
    number = torch.arange(kinds, dtype=torch.float64)
    pairs = torch.sin(1 + number[:, None] * kinds + number.square())

    def of(estimator: Estimator) -> Callable[..., Any]:
        def program(theta: Theta, s: Sites) -> None:
            c = s.sample("c", OneHotCategorical(logits=theta["logits"]), estimator)
            s.cost("cosine", torch.cos(2 * c @ pairs @ c + 0.4) * (1 + theta["direct"] * c[0]))

        return program

    theta = {"logits": torch.sin(1 + number), "direct": torch.tensor(0.4, dtype=torch.float64)}
    return Problem(f"one of {kinds} classes", of, theta)


def _dependent() -> Problem:
    """A bit on which another bit's logit depends."""

    def of(estimator: Estimator) -> Callable[..., Any]:
        def program(theta: Theta, s: Sites) -> None:
            a = s.sample("a", Bernoulli(logits=theta["a"]), estimator)
            b = s.sample("b", Bernoulli(logits=theta["b"] + theta["w"] * a), estimator)
            s.cost("first", torch.cos(2 * a + theta["w"]), parents=("a",))
            s.cost("both", torch.sin(1.3 * a * b - 0.4 * b + 0.9 * a * theta["b"]) * 2)

        return program

    theta = {k: torch.tensor(v, dtype=torch.float64) for k, v in {"a": 0.4, "b": -0.7, "w": 1.2}.items()}
    return Problem("two dependent bits", of, theta)


def _mixed() -> Problem:
    """A normal number before a bit and one after it, both pathwise."""

    def of(estimator: Estimator) -> Callable[..., Any]:
        def program(theta: Theta, s: Sites) -> None:
            z = s.sample("z", Normal(theta["m"], theta["s"].exp()), Pathwise())
            b = s.sample("b", Bernoulli(logits=theta["w"] * z + 0.3), estimator)
            y = s.sample("y", Normal(theta["m"] * b + z, 0.5), Pathwise())
            s.cost("own", z**2, parents=("z",))
            s.cost("all", (y - 1) ** 2 * (1 + b * theta["w"]) + z * b)

        return program

    theta = {k: torch.tensor(v, dtype=torch.float64) for k, v in {"m": 0.4, "s": -0.7, "w": 0.8}.items()}
    return Problem("normal, bit, normal", of, theta)


def _normal() -> Problem:
    """Two normal numbers and a polynomial of both."""

    def of(estimator: Estimator) -> Callable[..., Any]:
        def program(theta: Theta, s: Sites) -> None:
            x = s.sample("x", Normal(theta["mu"], theta["sigma"]), estimator)
            s.cost("polynomial", (x[0] - 1) ** 2 * x[1] + x[0] * x[1] ** 2 * theta["direct"])

        return program

    theta = {"mu": _f64(0.4, -0.7), "sigma": _f64(0.6, 1.1), "direct": torch.tensor(0.3, dtype=torch.float64)}
    return Problem("normal pair", of, theta)


def _normal_one() -> Problem:
    """One normal number and a square."""

    def of(estimator: Estimator) -> Callable[..., Any]:
        def program(theta: Theta, s: Sites) -> None:
            x = s.sample("x", Normal(theta["mu"], theta["sigma"]), estimator)
            s.cost("square", (x - theta["k"]) ** 2)

        return program

    theta = {k: torch.tensor(v, dtype=torch.float64) for k, v in {"mu": 1.3, "sigma": 0.7, "k": 3.0}.items()}
    return Problem("normal", of, theta)


def _poisson() -> Problem:
    """A Poisson number and a square; the truth is E (x - k)^2 = rate + (rate - k)^2."""

    def of(estimator: Estimator) -> Callable[..., Any]:
        def program(theta: Theta, s: Sites) -> None:
            x = s.sample("x", Poisson(theta["rate"]), estimator)
            s.cost("square", (x - theta["k"]) ** 2)

        return program

    theta = {"rate": _f64(1.7)[0], "k": _f64(2.5)[0]}
    return Problem("poisson", of, theta, {"rate": _f64(1 - 1.6)[0], "k": _f64(1.6)[0]})


PROBLEMS: tuple[Problem, ...] = (
    *(_bits(count) for count in (1, 2, 3, 4)),
    _classes(3, False),
    _classes(5, False),
    _classes(3, True),
    _class(3),
    _class(5),
    _dependent(),
    _mixed(),
    _normal_one(),
    _normal(),
    _poisson(),
)
