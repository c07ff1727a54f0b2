r"""Policy gradients of the linear-Gaussian chain: bias and variance of every estimator that is a polynomial, exactly.

    x_0 ~ N(m, v),   x_{k+1} = a_k x_k + b_k + s_k z_k,   reward R(x_K) a polynomial,
    d mean_k / d theta_j = p_kj x_k + q_kj,               k = 0 .. K - 1.

(Here k counts steps, so x_K is the sample.) Along a run, with S_k = z_k (p_k x_k + q_k) / s_k the score of step k,

    A = sum of S_k over the scored steps,   Q = sum S_k b_k(x_k),   J: J' = gate a_k J + p_k x_k + q_k,

move by polynomials, and an estimate of one entry of grad E R is a polynomial of the last (x, A, Q, J):

    g = A c(x) - Q + h'(x) J

    score function, constant baseline    c = R - b                 value baseline      c = R, b_k(x) = V_k(x)
    pathwise                             h = R, no step scored     last steps          gates: 0 stops J, 1 passes it
    surrogate control variate            c = R - h, h the surrogate
    last steps pathwise, the rest score  c = R, h = R, gates 0 before the last steps

Expectations of g and g^2 then follow by the recursion of `polynomial`: no sampling error, any number of steps. A
roulette gate passes J / q with probability q. Means of several runs (leave-one-out, batch mean) are U-statistics:

    g = (1/G) sum S_i (R_i - mean of the others) = mean over pairs of (S_i - S_j)(R_i - R_j) / 2,
    Var g = 4 (G - 2) / (G (G - 1)) z_1 + 2 / (G (G - 1)) z_2,
    z_1 = Var(S (R - E R)) / 4,   z_2 = Var((S - S')(R - R') / 2).

Variances are those of one run: n times that of the mean of n, summed over the entries of theta.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lowvar.testing.polynomial import Polynomial

__all__ = ["ExactEstimate", "LinearPolicy"]

Gate = float | Literal["pass", "stop"]
StepPolynomial = Callable[[int], Polynomial]


@dataclass(frozen=True)
class ExactEstimate:
    """Expectation (P,) and trace of the covariance of an estimate, for one run."""

    mean: Tensor
    variance: float

    def bias(self, truth: Tensor) -> float:
        """|mean - truth| / |truth|."""
        return float((self.mean - truth).norm() / truth.norm())


@dataclass(frozen=True)
class LinearPolicy:
    """The chain, its parameters' derivatives and a reward.

    Args:
        a, b, s: factors, shifts and standard deviations of the steps, K each.
        p, q: d mean_k / d theta_j = p[k][j] x + q[k][j].
        reward: coefficients of R, lowest first.
        mean, std: of the start.

    Example:
        >>> chain = LinearPolicy([0.5], [0.1], [0.3], [[1.0, 0.0]], [[0.0, 1.0]], [0.0, 0.0, -1.0])
        >>> score, truth = chain.score(), chain.gradient()
        >>> score.bias(truth) < 1e-12, chain.pathwise().variance < score.variance
        (True, True)
    """

    a: Sequence[float]
    b: Sequence[float]
    s: Sequence[float]
    p: Sequence[Sequence[float]]
    q: Sequence[Sequence[float]]
    reward: Sequence[float]
    mean: float = 0.0
    std: float = 1.0
    _values: dict[int, Polynomial] = field(default_factory=dict, repr=False, compare=False)

    @property
    def steps(self) -> int:
        """K."""
        return len(self.a)

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return len(self.p[0])

    @property
    def R(self) -> Polynomial:
        """The reward, in x."""
        return Polynomial(1, {(i,): float(c) for i, c in enumerate(self.reward)})

    def value(self, k: int) -> Polynomial:
        """V_k(x) = E[R | x_k = x]."""
        if k == self.steps:
            return self.R
        if k not in self._values:
            x, z = Polynomial.variables(2)
            moved = self.value(k + 1).of([self.a[k] * x + self.b[k] + self.s[k] * z]).normal(1)
            self._values[k] = Polynomial(1, {powers[:1]: c for powers, c in moved.terms.items()})
        return self._values[k]

    def expected(
        self,
        f: Polynomial,
        j: int,
        *,
        scored: Sequence[bool] | None = None,
        baseline: StepPolynomial | None = None,
        difference: bool = False,
        gates: Sequence[Gate] | None = None,
        pair: bool = False,
    ) -> float:
        """E f(x, A, Q, J) at the end of a run, for parameter j; with `pair` f is of (x, A, Q, J) and its mirror image.

        Args:
            f: polynomial in 4 variables, or 8.
            j: number of the parameter.
            scored: steps that A and Q sum over; None: all.
            baseline: b_k, in x.
            difference: Q sums S_k (V_k(x_k) - V_{k+1}(x_{k+1})) in place of S_k b_k.
            gates: of J before each step; None: it passes.
            pair: whether noise comes as z and -z.
        """
        copies = 2 if pair else 1
        n = 4 * copies + 1
        v = Polynomial.variables(n)
        z = v[-1]
        f = Polynomial(n, {(*powers, 0): c for powers, c in f.terms.items()})
        for k in reversed(range(self.steps)):
            moved = []
            for i in range(copies):
                x, A, Q, J = v[4 * i : 4 * i + 4]
                e = z if i == 0 else -z
                slope = self.p[k][j] * x + self.q[k][j]
                ahead = self.a[k] * x + self.b[k] + self.s[k] * e
                S = e * slope * (1 / self.s[k]) if scored is None or scored[k] else Polynomial.constant(n, 0.0)
                b = Polynomial.constant(n, 0.0)
                if difference:
                    b = self.value(k).of([x]) - self.value(k + 1).of([ahead])
                elif baseline is not None:
                    b = baseline(k).of([x])
                moved += [ahead, A + S, Q + S * b, self.a[k] * J + slope]
            f = self._gated(f.of([*moved, z]).normal(n - 1), "pass" if gates is None else gates[k], v)
        start = [w for i in range(copies) for w in ((self.mean + self.std * (z if i == 0 else -z)), *[0.0 * z] * 3)]
        return f.of([*start, z]).normal(n - 1)(*[0.0] * n)

    @staticmethod
    def _gated(f: Polynomial, gate: Gate, v: list[Polynomial]) -> Polynomial:
        if gate == "pass":
            return f
        keep = 0.0 if gate == "stop" else float(gate)
        stopped = f.of([0.0 * w if i % 4 == 3 and i < len(v) - 1 else w for i, w in enumerate(v)])
        if not keep:
            return stopped
        passed = f.of([(1 / keep) * w if i % 4 == 3 and i < len(v) - 1 else w for i, w in enumerate(v)])
        return keep * passed + (1 - keep) * stopped

    def estimate(
        self,
        c: Polynomial | None = None,
        h: Polynomial | None = None,
        *,
        scored: Sequence[bool] | None = None,
        baseline: StepPolynomial | None = None,
        difference: bool = False,
        gates: Sequence[Gate] | None = None,
        pair: bool = False,
    ) -> ExactEstimate:
        """Mean and variance of g = A c(x) - Q + h'(x) J; of a pair, of the mean of both.

        Args:
            c: what the scores are multiplied by; None: 0.
            h: what is differentiated; None: nothing.
            scored, baseline, difference, gates, pair: as of `expected`.
        """

        def g(v: Sequence[Polynomial]) -> Polynomial:
            x, A, Q, J = v
            out = -1.0 * Q
            if c is not None:
                out = out + A * c.of([x])
            if h is not None:
                out = out + h.derivative(0).of([x]) * J
            return out

        v = Polynomial.variables(8 if pair else 4)
        f = 0.5 * (g(v[:4]) + g(v[4:])) if pair else g(v)
        how = {"scored": scored, "baseline": baseline, "difference": difference, "gates": gates, "pair": pair}
        means, variance = [], 0.0
        for j in range(self.size):
            means.append(self.expected(f, j, **how))
            variance += self.expected(f * f, j, **how) - means[-1] ** 2
        return ExactEstimate(torch.tensor(means, dtype=torch.float64), variance)

    def gradient(self) -> Tensor:
        """grad E R, (P,), by the derivative of the moments' recursion."""
        total = torch.zeros(self.size, dtype=torch.float64, requires_grad=True)
        degree = len(self.reward) - 1
        moments = [torch.ones((), dtype=torch.float64)]
        for i in range(1, 2 * degree + 1):  # of the start
            previous = moments[i - 2] if i > 1 else torch.zeros((), dtype=torch.float64)
            moments.append(self.mean * moments[i - 1] + (i - 1) * self.std**2 * previous)
        moments = moments[: degree + 1]
        binomial = [[1.0]]
        for i in range(degree):
            row = binomial[-1]
            binomial.append([1.0, *(row[k] + row[k + 1] for k in range(i)), 1.0])
        for k in range(self.steps):
            A = self.a[k] + (torch.tensor(self.p[k], dtype=torch.float64) * total).sum()
            B = self.b[k] + (torch.tensor(self.q[k], dtype=torch.float64) * total).sum()
            noisy = []  # E (B + s z)^i
            for i in range(degree + 1):
                before = noisy[i - 2] if i > 1 else torch.zeros((), dtype=torch.float64)
                noisy.append(torch.ones_like(B) if i == 0 else B * noisy[i - 1] + (i - 1) * self.s[k] ** 2 * before)
            moments = [
                torch.stack([binomial[i][m] * A**m * moments[m] * noisy[i - m] for m in range(i + 1)]).sum()
                for i in range(degree + 1)
            ]
        value = torch.stack([c * m for c, m in zip(self.reward, moments, strict=True)]).sum()
        return torch.autograd.grad(value, total)[0]

    def score(self, baseline: float = 0.0, *, pair: bool = False) -> ExactEstimate:
        """The score function with a constant baseline."""
        return self.estimate(self.R - baseline, pair=pair)

    def pathwise(self, *, gates: Sequence[Gate] | None = None, pair: bool = False) -> ExactEstimate:
        """The pathwise estimator."""
        return self.estimate(h=self.R, scored=[False] * self.steps, gates=gates, pair=pair)

    def last(self, k: int, rest: Literal["score", "stop"] = "score") -> ExactEstimate:
        """The last k steps pathwise and the rest by scores, or without gradient."""
        early = [i < self.steps - k for i in range(self.steps)]
        gates: list[Gate] = ["stop" if i <= self.steps - k else "pass" for i in range(self.steps)]
        if k == 0:
            return self.score()
        scored = early if rest == "score" else [False] * self.steps
        return self.estimate(self.R, self.R, scored=scored, gates=gates)

    def values(self) -> ExactEstimate:
        """The score function with the exact value of each state as its baseline."""
        return self.estimate(self.R, baseline=self.value)

    def differences(self) -> ExactEstimate:
        """Scores times V_{k+1}(x_{k+1}) - V_k(x_k)."""
        return self.estimate(difference=True)

    def mean_reward(self) -> float:
        """E R."""
        v = Polynomial.variables(4)
        return self.expected(self.R.of([v[0]]), 0)

    def optimal_baseline(self) -> float:
        """E[|S|^2 R] / E[|S|^2]."""
        x, A, _, _ = Polynomial.variables(4)
        square = sum(self.expected(A * A, j) for j in range(self.size))
        return sum(self.expected(A * A * self.R.of([x]), j) for j in range(self.size)) / square

    def leave_one_out(self, G: int, *, including: bool = False) -> ExactEstimate:
        """The score function less the mean of the other G - 1 runs, or of all G."""
        x, A, _, _ = Polynomial.variables(4)
        R, mu = self.R.of([x]), self.mean_reward()
        r2 = self.expected(R * R, 0)
        centred = self.score(mu)
        variance = 0.0
        for j in range(self.size):
            s2, s2r, s2r2, sr = (self.expected(f, j) for f in (A * A, A * A * R, A * A * R * R, A * R))
            # E (S - S')^2 (R - R')^2 / 4, S' and R' an independent copy, E S = 0
            fourth = (s2r2 + s2 * r2 - 2 * s2r * mu + 2 * sr**2) / 2
            one = self.expected((A * (R - mu)) ** 2, j) - sr**2
            z1, z2 = one / 4, fourth - sr**2
            variance += G * (4 * (G - 2) * z1 + 2 * z2) / (G * (G - 1))
        factor = 1 - 1 / G if including else 1.0
        return ExactEstimate(factor * centred.mean, factor**2 * variance)
