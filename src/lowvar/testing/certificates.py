r"""Exact expectation and variance of a gradient estimator on a small program.

The noise of a program is an argument, so expectations over it are integrals that can be done:

    uniform noise   split where the estimator says that it jumps (`Estimator.breaks`), in every branch, and integrated
                    piece by piece: exact where it is a polynomial between the jumps, as all of the ARM family are
    normal noise    Gauss-Hermite

with sites in their order (where a later site jumps depends on earlier values), samples as a product. The truth is the
derivative of the same program with every discrete site enumerated and every other one pathwise, so it shares no code
with the estimator under test but the program. What comes out is not a statistical test: E grad S = grad E C to 1e-10,
or the estimator is biased.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from lowvar.gradients.distributions import is_discrete
from lowvar.gradients.enumeration import Enumerate
from lowvar.gradients.estimator import BaseNoise, Estimator
from lowvar.gradients.expectation import Expectation, Noises, ProgramState, without_validation
from lowvar.gradients.pathwise import Pathwise
from lowvar.gradients.program import Sites, swapped
from lowvar.testing.problems import PROBLEMS, Problem
from lowvar.testing.quadrature import hermite, legendre, tanh_sinh

__all__ = ["Certificate", "QuadratureRule", "certify", "exact_gradient", "exact_moments"]


@dataclass(frozen=True)
class QuadratureRule:
    """How noise is integrated.

    Args:
        smooth: nodes a piece of a uniform number of which the estimator is no polynomial (tanh-sinh, which allows
            singularities at the ends of a piece).
        normal: Gauss-Hermite nodes a normal number.
        chunk: nodes that are evaluated together.
    """

    smooth: int = 40
    normal: int = 16
    chunk: int = 4096


@dataclass(frozen=True)
class Certificate:
    """What an estimator does on a program, exactly.

    Attributes:
        truth: the gradient of the expectation, like theta.
        mean: the estimator's expectation.
        variance: its variance, entry by entry.
        value: expectation of the surrogate's value.
        nodes: how many noise values were summed over.
    """

    truth: Any
    mean: Any
    variance: Any
    value: float
    nodes: int

    @property
    def bias(self) -> float:
        """Largest absolute difference of an entry of `mean` and `truth`."""
        pairs = zip(pytree.tree_leaves(self.mean), pytree.tree_leaves(self.truth), strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)

    def holds(self, tolerance: float = 1e-10) -> bool:
        """Whether the estimator is unbiased, relative to 1 + the largest entry of the truth."""
        size = max(float(x.abs().max()) for x in pytree.tree_leaves(self.truth))
        return self.bias <= tolerance * (1 + size)


def _exact(name: str, d: Distribution, given: Estimator) -> Estimator:
    return Enumerate() if is_discrete(d) else Pathwise()


class _Jumps(Sites):
    """Sites that note where their estimators jump."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.jumps: dict[str, dict[str, Tensor]] = {}

    def sample(
        self,
        name: str,
        distribution: Distribution,
        estimator: Estimator | Literal["auto"],
        *,
        parents: Iterable[str] | None = None,
    ) -> Tensor:
        if not isinstance(estimator, Estimator):
            raise ValueError(f"site {name!r} has estimator {estimator!r}; give an Estimator")
        self.jumps[name] = {k: v.detach() for k, v in estimator.breaks(distribution).items()}
        return super().sample(name, distribution, estimator, parents=parents)


def _jumps(
    E: Expectation, theta: Any, state: ProgramState, noises: Noises, count: int, site: str, data: Sequence[Any]
) -> dict[str, Tensor]:
    """Jumps of a site's noise for each node (Q, ...) in all worlds, (Q, *shape, k)."""

    def one(_: Tensor, noise: Noises, choice: Tensor) -> dict[str, Tensor]:
        s = _Jumps(state.plan, noise, choice.unbind(0), state.sites)
        E.program(theta, s, *data)
        return s.jumps[site]

    choices = torch.tensor(state.worlds.choices)
    with without_validation():
        found = vmap(vmap(one, in_dims=(None, None, 0)), in_dims=(0, 0, None))(torch.zeros(count), noises, choices)
    return {name: x.movedim(1, -1).flatten(-2) for name, x in found.items()}


def _line(edges: Tensor, rule: QuadratureRule, between: str) -> tuple[Tensor, Tensor]:
    """Nodes and weights of uniform numbers with jumps (..., k): (..., pieces x nodes)."""
    edges = edges.clamp(0, 1).sort(-1).values
    zero = edges.new_zeros((*edges.shape[:-1], 1))
    low, high = torch.cat([zero, edges], -1), torch.cat([edges, zero + 1], -1)
    u, w = {"constant": legendre(1), "linear": legendre(2)}.get(between) or tanh_sinh(rule.smooth)
    nodes = low[..., None] + (high - low)[..., None] * u
    return nodes.flatten(-2), ((high - low)[..., None] * w).flatten(-2)


def _nodes(
    E: Expectation, theta: Any, state: ProgramState, rule: QuadratureRule, data: Sequence[Any]
) -> tuple[Noises, Tensor]:
    """BaseNoise of one sample at Q nodes, {site: {name: (Q, *shape)}}, and their weights (Q,)."""
    noises: dict[str, dict[str, Tensor]] = {
        site.name: {
            name: torch.full((1, *noise.shape), 0.5 if noise.kind == "uniform" else 0.0, dtype=torch.float64)
            for name, noise in site.noise.items()
        }
        for site in state.plan.sites
    }
    weight = torch.ones(1, dtype=torch.float64)
    for site in state.plan.sites:
        if not site.noise:
            continue
        jumps = _jumps(E, theta, state, noises, len(weight), site.name, data)
        for name, noise in site.noise.items():
            count, elements = len(weight), noise.shape.numel()
            if noise.kind == "normal":
                x, w = (v.expand(count, elements, -1) for v in hermite(rule.normal))
            else:
                none = torch.zeros((count, *noise.shape, 0), dtype=torch.float64)
                edges = jumps.get(name, none).double()
                x, w = _line(edges.flatten(1, -2) if noise.shape else edges[:, None], rule, noise.between)
            grid = torch.cartesian_prod(*[torch.arange(x.shape[-1])] * elements).reshape(-1, elements)
            pick = grid.T[None].expand(count, -1, -1)
            values, share = x.gather(2, pick), w.gather(2, pick).prod(1)  # (Q, elements, N), (Q, N)
            total = weight[:, None] * share
            row, column = torch.nonzero(total > 0, as_tuple=True)
            first = torch.zeros_like(row)
            noises = {
                where: {key: v[row if len(v) == count else first] for key, v in own.items()}
                for where, own in noises.items()
            }
            noises[site.name][name] = values[row, :, column].reshape(-1, *noise.shape)
            jumps = {k: v[row] for k, v in jumps.items()}
            weight = total[row, column]
    return noises, weight


def exact_moments(
    program: Callable[..., Any],
    theta: Any,
    *,
    n: int = 1,
    state: ProgramState | None = None,
    data: Sequence[Any] = (),
    rule: QuadratureRule | None = None,
    truth: Any = None,
) -> Certificate:
    """The exact expectation and variance of a program's gradient estimate.

    Args:
        program: `program(theta, s, *data)`.
        theta: float64 tensors (a tensor, or a dict or list of them).
        n: samples; estimators that look at each other's samples need n >= 2.
        state: of the estimators; None: before any batch.
        data: what the program is called with beyond theta and s (one datum, without a batch axis).
        rule: how noise is integrated.
        truth: the gradient, where it is known in closed form; None: `exact_gradient`.

    Returns:
        the certificate of the mean of the n samples.

    Example:
        >>> from torch.distributions import Bernoulli
        >>> from lowvar.gradients import Score
        >>> def program(theta, s):
        ...     b = s.sample("b", Bernoulli(logits=theta), Score())
        ...     s.cost("square", (b.sum() - 0.6) ** 2)
        >>> exact_moments(program, torch.tensor([0.3, -1.0], dtype=torch.float64)).holds()
        True
    """
    rule = QuadratureRule() if rule is None else rule
    E = Expectation(program, n=n)
    rows = pytree.tree_map(lambda x: x[None], tuple(data))
    before = E.init(theta, rows) if state is None else state
    single, weight = _nodes(E, theta, before, rule, data)
    count = len(weight)
    grid = torch.cartesian_prod(*[torch.arange(count)] * n).reshape(-1, n)
    weight = weight[grid].prod(1)

    def gradient(index: Tensor) -> tuple[Any, Tensor]:
        noises = {site: {k: v[index] for k, v in own.items()} for site, own in single.items()}
        if rows:
            noises = {site: {k: v[None] for k, v in own.items()} for site, own in noises.items()}

        def value(th: Any) -> tuple[Tensor, Tensor]:
            loss = E.evaluate(th, noises, before, data=rows).surrogates.mean()
            return loss, loss

        return grad(value, has_aux=True)(theta)

    first, second, value = [], [], 0.0
    for part in torch.arange(len(grid)).split(rule.chunk):
        g, v = vmap(gradient)(grid[part])
        w = weight[part]
        value += float((w * v).sum())
        first.append([torch.tensordot(w, x, 1) for x in pytree.tree_leaves(g)])
        second.append([torch.tensordot(w, x**2, 1) for x in pytree.tree_leaves(g)])
    like = pytree.tree_structure(theta)
    means = [torch.stack(x).sum(0) for x in zip(*first, strict=True)]
    squares = [torch.stack(x).sum(0) for x in zip(*second, strict=True)]
    mean = pytree.tree_unflatten(means, like)
    variance = pytree.tree_unflatten([b - a**2 for a, b in zip(means, squares, strict=True)], like)
    known = exact_gradient(program, theta, data=data, rule=rule) if truth is None else truth
    return Certificate(known, mean, variance, value, len(grid))


def exact_gradient(
    program: Callable[..., Any], theta: Any, *, data: Sequence[Any] = (), rule: QuadratureRule | None = None
) -> Any:
    """The derivative of a program's expectation: discrete sites enumerated, others pathwise and integrated.

    The program has to be differentiable in its continuous sites.
    """
    rule = QuadratureRule() if rule is None else rule

    E = Expectation(swapped(program, _exact))
    rows = pytree.tree_map(lambda x: x[None], tuple(data))
    state = E.init(theta, rows)
    nodes, weight = _nodes(E, theta, state, rule, data)

    def expected(th: Any) -> Tensor:
        def one(noise: Noises) -> Tensor:
            some = {site: {k: v[None] for k, v in own.items()} for site, own in noise.items()}
            some = {site: {k: v[None] for k, v in own.items()} for site, own in some.items()} if rows else some
            return E.evaluate(th, some, state, data=rows).surrogates.mean()

        if not any(own for own in nodes.values()):
            return one(nodes)
        return (weight * vmap(one, chunk_size=rule.chunk)(nodes)).sum()

    return grad(expected)(theta)


def certify(
    estimator: Estimator | Callable[[], Estimator],
    problems: Sequence[Problem] = PROBLEMS,
    *,
    n: int = 1,
    tolerance: float = 1e-10,
    max_nodes: int = 300_000,
) -> dict[str, Certificate]:
    """Proves an estimator on every problem whose sites it takes.

    Args:
        estimator: the estimator, a user's own as well.
        problems: programs of one estimator (`lowvar.testing.problems`).
        n: samples of the program; estimators fitted to other samples need 2 or more.
        tolerance: of the bias; where more than two numbers have to be integrated by quadrature it is 1e-6 at least.
        max_nodes: problems that need more noise values than this for 10 nodes a smooth number are left out.

    Returns:
        certificates by the problem's name.

    Raises:
        AssertionError: if the estimator says "unbiased" and is not, with the problem and the bias.
        ValueError: if it takes none of the problems.

    Example:
        >>> from lowvar.gradients import DisARM
        >>> sorted(certify(DisARM()))
        ['1 bits', '2 bits', '3 bits', '4 bits', 'normal, bit, normal', 'two dependent bits']
    """
    rule_of = estimator if callable(estimator) and not isinstance(estimator, Estimator) else (lambda: estimator)
    found: dict[str, Certificate] = {}
    refusals: list[str] = []
    for problem in problems:
        program = problem.program(rule_of())
        try:
            state = Expectation(program, n=n).init(problem.theta)
        except ValueError as refusal:
            refusals.append(str(refusal))
            continue
        noises = [noise for site in state.plan.sites for noise in site.noise.values()]
        smooth = n * sum(noise.shape.numel() for noise in noises if _is_smooth(noise))
        nodes = min(40, int(max_nodes ** (1 / max(smooth, 1))))
        if nodes < 10:
            continue
        certificate = exact_moments(
            program, problem.theta, n=n, rule=QuadratureRule(nodes, min(nodes, 12)), truth=problem.truth
        )
        found[problem.name] = certificate
        allowed = tolerance if smooth <= 2 else max(tolerance, 1e-6)
        if rule_of().label == "unbiased" and not certificate.holds(allowed):
            raise AssertionError(
                f"{type(rule_of()).__name__} is biased on {problem.name!r}: {certificate.bias:.3g} in an entry of the "
                f"gradient (mean {certificate.mean}, truth {certificate.truth})"
            )
    if not found:
        raise ValueError(f"the estimator takes none of the problems: {refusals[:1]}")
    return found


def _is_smooth(noise: BaseNoise) -> bool:
    return noise.kind == "normal" or noise.between == "smooth"
