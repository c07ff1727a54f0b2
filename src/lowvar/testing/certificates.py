r"""Exact expectation and variance of a gradient estimator on a small program.

The noise of a program is an argument, so expectations over it are integrals that can be done (`nodes`):

    uniform noise   split where the estimator says that it jumps (`Estimator.breaks`), in every branch, and integrated
                    piece by piece: exact where it is a polynomial between the jumps, as all of the ARM family are
    normal noise    Gauss-Hermite

with sites in their order (where a later site jumps depends on earlier values), samples as a product. Noise in which the
estimator is a sum, such as that of relaxed samples given the discrete one, can be integrated part by part. The truth is
the derivative of the same program with every discrete site enumerated and every other one pathwise, so it shares no
code with the estimator under test but the program. What comes out is not a statistical test: E grad S = grad E C to
1e-10, or the estimator is biased. Where smooth noise is integrated by a rule that is exact for no finite number of
nodes, a second rule with fewer nodes says how much it misses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from lowvar.gradients.distributions import is_discrete
from lowvar.gradients.enumeration import Enumerate
from lowvar.gradients.estimator import Estimator
from lowvar.gradients.expectation import Expectation, Noises, ProgramState
from lowvar.gradients.pathwise import Pathwise
from lowvar.gradients.program import swapped
from lowvar.process.noise import Independent
from lowvar.testing.nodes import Nodes, QuadratureRule, is_smooth, is_wide, noise_nodes
from lowvar.testing.parts import Sums, sample_nodes
from lowvar.testing.problems import PROBLEMS, Problem

__all__ = ["Certificate", "certify", "exact_gradient", "exact_moments"]

_PRIMES = (131071, 65521, 32749, 16381, 8191, 4093, 2039)  # points of lattices


@dataclass(frozen=True)
class Certificate:
    """What an estimator does on a program, exactly.

    Attributes:
        truth: the gradient of the expectation, like theta.
        mean: the estimator's expectation.
        variance: its variance, entry by entry; nan where noise was integrated part by part at several sites, or at a
            site whose values move the jumps of later noise.
        value: expectation of the surrogate's value.
        nodes: how many noise values were summed over.
        error: how much the mean moved when `certify` integrated with fewer nodes; 0 where the sums are exact, or only
            one rule was used.
    """

    truth: Any
    mean: Any
    variance: Any
    value: float
    nodes: int
    error: float = 0.0

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
    single = noise_nodes(E, theta, before, rule, data)
    nodes = sample_nodes(single, n)

    def at(noises: Noises) -> tuple[Tensor, Tensor]:
        def value(th: Any) -> tuple[Tensor, Tensor]:
            some = {site: {k: v[None] for k, v in own.items()} for site, own in noises.items()} if rows else noises
            loss = E.evaluate(th, some, before, data=rows).surrogates.mean()
            return loss, loss

        g, loss = grad(value, has_aux=True)(theta)
        return torch.cat([x.reshape(-1) for x in pytree.tree_leaves(g)]), loss

    def gradient(index: Tensor) -> tuple[Tensor, Tensor]:
        return at({site: {k: v[index] for k, v in own.items()} for site, own in single.noises.items()})

    _hold_apart(at, single, n)
    moments = Sums(nodes)
    for part in torch.arange(len(nodes.index)).split(rule.chunk):
        moments.add(part, *vmap(gradient)(nodes.index[part]))
    leaves, like = pytree.tree_flatten(theta)

    def shaped(flat: Tensor) -> Any:
        pieces = flat.split([x.numel() for x in leaves])
        return pytree.tree_unflatten([p.reshape(x.shape) for p, x in zip(pieces, leaves, strict=True)], like)

    known = exact_gradient(program, theta, data=data, rule=rule) if truth is None else truth
    mean, variance, value = moments.result()
    return Certificate(known, shaped(mean), shaped(variance), value, len(nodes.index))


def _hold_apart(at: Callable[[Noises], tuple[Tensor, Tensor]], nodes: Nodes, n: int) -> None:
    """Looks at mixed differences g(v, w) - g(v', w) - g(v, w') + g(v', w') at nodes from end to end."""
    source = Independent(0)
    rows = torch.linspace(0, len(nodes.weight) - 1, 24).long()
    for site, names in nodes.apart.items():
        noises = {
            where: {k: v[rows][:, None].expand(-1, n, *v.shape[1:]) for k, v in own.items()}
            for where, own in nodes.noises.items()
        }
        every = [(name, i) for i in range(n if nodes.cell is not None else 1) for name in names]  # by sample
        for one, other in itertools.combinations(every, 2):
            corners = []
            for moved in ((), (one,), (other,), (one, other)):
                own = dict(noises[site])
                for draw, (name, i) in enumerate(every):
                    if (name, i) in moved:
                        shape = own[name].shape[2:]
                        fresh = source.uniform(range(len(rows)), shape, draw=draw, dtype=torch.float64)
                        own[name] = torch.cat([own[name][:, :i], fresh[:, None], own[name][:, i + 1 :]], 1)
                corners.append(vmap(at)({**noises, site: own})[0])
            mixed = corners[0] - corners[1] - corners[2] + corners[3]
            off = float(mixed.abs().max())
            if off > 1e-9 * (1 + float(torch.stack(corners).abs().max())):
                where = "" if one[1] == other[1] else " of another sample"
                raise ValueError(
                    f"the estimator of site {site!r} declares apart = {names} and its gradient is not a sum of a "
                    f"function of {one[0]!r} and one of {other[0]!r}{where} (off by {off:.2g}); declare fewer names, "
                    "or integrate with QuadratureRule(apart=False)"
                )


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
    found = noise_nodes(E, theta, state, replace(rule, apart=False), data)
    nodes, weight = found.noises, found.weight

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
        tolerance: of the bias. With three or more numbers to be integrated by quadrature, twice what the mean moves
            between two rules is allowed on top of it, and 1e-6 at least.
        max_nodes: noise values a problem may need. With three or more numbers to be integrated by quadrature, noise in
            which the estimator is a sum is integrated part by part. A problem that needs more than this for 7 nodes a
            smooth number, or on which two rules differ by more than 1e-3, is left out.

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
        rule, rough = _rules(program, problem, state, n, max_nodes)
        if rule is None:
            continue
        certificate = exact_moments(program, problem.theta, n=n, rule=rule, truth=problem.truth)
        allowed = tolerance
        if rough is not None:
            second = exact_moments(program, problem.theta, n=n, rule=rough, truth=certificate.truth)
            error = Certificate(certificate.mean, second.mean, None, 0.0, 0).bias
            if error > 1e-3:
                continue
            certificate = replace(certificate, error=error)
            allowed = max(tolerance + 2 * error, 1e-6)
        found[problem.name] = certificate
        if rule_of().label == "unbiased" and not certificate.holds(allowed):
            raise AssertionError(
                f"{type(rule_of()).__name__} is biased on {problem.name!r}: {certificate.bias:.3g} in an entry of the "
                f"gradient (mean {certificate.mean}, truth {certificate.truth})"
            )
    if not found:
        raise ValueError(f"the estimator takes none of the problems: {refusals[:1]}")
    return found


def _rules(
    program: Callable[..., Any], problem: Problem, state: ProgramState, n: int, max_nodes: int
) -> tuple[QuadratureRule | None, QuadratureRule | None]:
    """The rule for a problem, and a rougher one where the first is not exact to many digits."""
    noises = [noise for site in state.plan.sites for noise in site.noise.values()]
    smooth = n * sum(noise.shape.numel() for noise in noises if is_smooth(noise))
    if smooth == 0:
        return QuadratureRule(), None
    fewest = noise_nodes(Expectation(program), problem.theta, state, QuadratureRule(1, 1, apart=smooth > 2), ())
    apart, least = fewest.apart, len(fewest.weight)

    def needed(count: int, lattice: int) -> float:
        size = float(least)
        for site in state.plan.sites:
            names = apart.get(site.name, ())
            many = {
                name: float(lattice) if lattice and is_wide(noise) else float(count) ** noise.shape.numel()
                for name, noise in site.noise.items()
                if is_smooth(noise)
            }
            size *= (sum(many[name] for name in names) + 1) / (len(names) + 1) if names else math.prod(many.values())
        return size**n

    if any(is_wide(noise) for noise in noises):
        fine = next((prime for prime in _PRIMES[:-1] if needed(12, prime) <= max_nodes), 0)
        if fine == 0:
            return None, None
        rule = QuadratureRule(12, 12, ends="mild", apart=True, lattice=fine)
        return rule, replace(rule, lattice=_PRIMES[_PRIMES.index(fine) + 1])
    count = next((count for count in range(24 if smooth > 2 else 40, 6, -1) if needed(count, 0) <= max_nodes), 0)
    if not count:
        return None, None
    rule = QuadratureRule(count, min(count, 12), ends="singular" if count >= 20 else "mild", apart=bool(apart))
    fewer = count - max(1, count // 6)
    return rule, replace(rule, smooth=fewer, normal=min(fewer, 11)) if smooth > 2 else None
