r"""Polynomials of Gaussian numbers: exact moments by substitution, no sample and no quadrature.

If a state moves by polynomials of itself and standard normal z, s' = F(s, z), the expectation of a polynomial f of the
last state is a recursion of coefficients: f <- E_z f(F(s, z)), with E z^p = (p - 1)!! for even p, 0 for odd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Polynomial"]


@dataclass(frozen=True)
class Polynomial:
    """In `n` variables.

    Args:
        n: number of variables.
        terms: coefficient of each tuple of exponents.

    Example:
        >>> x, z = Polynomial.variables(2)
        >>> square = (2 * x + 3 * z) ** 2
        >>> square.normal(1)(5.0, 0.0)  # E (10 + 3 z)^2
        109.0
    """

    n: int
    terms: Mapping[tuple[int, ...], float]

    @classmethod
    def variables(cls, n: int) -> list[Polynomial]:
        """The n variables."""
        return [cls(n, {tuple(int(i == j) for j in range(n)): 1.0}) for i in range(n)]

    @classmethod
    def constant(cls, n: int, value: float) -> Polynomial:
        """A number."""
        return cls(n, {(0,) * n: value} if value else {})

    def _other(self, value: Polynomial | float) -> Polynomial:
        return value if isinstance(value, Polynomial) else Polynomial.constant(self.n, float(value))

    def __add__(self, other: Polynomial | float) -> Polynomial:
        terms = dict(self.terms)
        for powers, c in self._other(other).terms.items():
            terms[powers] = terms.get(powers, 0.0) + c
        return Polynomial(self.n, terms)

    __radd__ = __add__

    def __neg__(self) -> Polynomial:
        return Polynomial(self.n, {powers: -c for powers, c in self.terms.items()})

    def __sub__(self, other: Polynomial | float) -> Polynomial:
        return self + -self._other(other)

    def __rsub__(self, other: float) -> Polynomial:
        return -self + other

    def __mul__(self, other: Polynomial | float) -> Polynomial:
        terms: dict[tuple[int, ...], float] = {}
        for p, c in self.terms.items():
            for q, e in self._other(other).terms.items():
                key = tuple(i + j for i, j in zip(p, q, strict=True))
                terms[key] = terms.get(key, 0.0) + c * e
        return Polynomial(self.n, terms)

    __rmul__ = __mul__

    def __pow__(self, power: int) -> Polynomial:
        result = Polynomial.constant(self.n, 1.0)
        for _ in range(power):
            result = result * self
        return result

    def __call__(self, *values: float) -> float:
        """The value."""
        total = 0.0
        for powers, c in self.terms.items():
            for v, p in zip(values, powers, strict=True):
                c *= v**p
            total += c
        return total

    def of(self, values: Sequence[Polynomial]) -> Polynomial:
        """With polynomials (all in the same variables) in place of the variables."""
        n = values[0].n
        powers = [[Polynomial.constant(n, 1.0)] for _ in values]
        result = Polynomial(n, {})
        for exponents, c in self.terms.items():
            term = Polynomial.constant(n, c)
            for i, e in enumerate(exponents):
                while len(powers[i]) <= e:
                    powers[i].append(powers[i][-1] * values[i])
                if e:
                    term = term * powers[i][e]
            result = result + term
        return result

    def normal(self, i: int) -> Polynomial:
        """Its expectation over variable i, standard normal and independent of the others (whose numbers stay)."""
        terms: dict[tuple[int, ...], float] = {}
        for powers, c in self.terms.items():
            p = powers[i]
            if p % 2:
                continue
            for k in range(1, p, 2):
                c *= k
            key = (*powers[:i], 0, *powers[i + 1 :])
            terms[key] = terms.get(key, 0.0) + c
        return Polynomial(self.n, terms)

    def derivative(self, i: int) -> Polynomial:
        """In variable i."""
        terms = {
            (*powers[:i], powers[i] - 1, *powers[i + 1 :]): c * powers[i]
            for powers, c in self.terms.items()
            if powers[i]
        }
        return Polynomial(self.n, terms)
