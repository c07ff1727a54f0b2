r"""DPM-Solver-v3 (Zheng et al. 2023), written from its paper: a peer of the benchmark, not part of the package.

With l = log(alpha / sigma) (lambda in the paper) and the probability-flow ODE dx/dl = sigma^2 x - sigma eps (VP), let

    f = (sigma eps - l_l x) / alpha,      y = x / alpha,      dy/dl = -l_l y - f                              (Eq. 5, 8)

with a coefficient l_l a dimension. Two more, s_l and b_l, take the affine part out of f along the trajectory, and what
is left, g, is replaced by its Taylor polynomial at the start l_s of a step:

    g(l) = e^{-S(l)} f(l) - B(l),         S(l) = int_{l_s}^l s,      B(l) = int_{l_s}^l e^{-S} b,             (Eq. 9)
    y_t = e^{-L(l_t)} (y_s - int E B dl - sum_k g^(k)(l_s) int E (l - l_s)^k / k! dl),    E = e^{L + S},  L = int l_l.

The empirical model statistics are least squares over data x_l = alpha x_0 + sigma eps (Eq. 6, 11), entry by entry:

    l_l = E diag(d (sigma eps_hat) / dx),        f^(1) ~ s_l f + b_l,   f^(1) the derivative of f along the ODE.

The Jacobian's diagonal is E v * (J^T v), v = +-1; the derivative of eps_hat along the ODE is a central difference.
Data, noise and signs are the same at every l, so that the statistics are smooth in l.

Derivatives g^(k) come from earlier evaluations: by the polynomial through all of them, or ("pseudo") each by the
divided difference of least order. The corrector redoes the step with the new evaluation among them and keeps f as it
was evaluated. Orders and switches by number of steps are those of the paper's unconditional experiments (Table 8).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowvar.process.noise import Independent
from lowvar.process.schedule import Level, Schedule

__all__ = ["SKIPS", "Integrals", "ModelStatistics", "Settings", "measure", "sample", "settings"]

Epsilon = Callable[[Tensor, Level], Tensor]
SKIPS = ("logsnr", "time")


@dataclass(frozen=True)
class ModelStatistics:
    """The tables l, s, b at equally spaced half log-snr, float64: knots (N + 1,), tables (N + 1, *event)."""

    knots: Tensor
    l: Tensor
    s: Tensor
    b: Tensor

    def save(self, path: Path) -> None:
        """Writes a safetensors file."""
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"knots": self.knots, "l": self.l, "s": self.s, "b": self.b}, path)

    @classmethod
    def load(cls, path: Path) -> ModelStatistics:
        """What `save` wrote."""
        from safetensors.torch import load_file

        return cls(**load_file(path))

    def fine(self, points: int) -> ModelStatistics:
        """The tables on `points` + 1 equally spaced knots, linear between the old ones."""
        knots = torch.linspace(float(self.knots[0]), float(self.knots[-1]), points + 1, dtype=torch.float64)
        i = torch.searchsorted(self.knots, knots).clamp(1, len(self.knots) - 1)
        w = ((knots - self.knots[i - 1]) / (self.knots[i] - self.knots[i - 1])).clamp(0, 1)
        w = w.reshape(-1, *([1] * (self.l.ndim - 1)))
        return ModelStatistics(knots, *(torch.lerp(v[i - 1], v[i], w) for v in (self.l, self.s, self.b)))


def measure(
    epsilon: Epsilon, schedule: Schedule, x0: Tensor, *, knots: int = 96, step: float = 0.02, batch: int = 256
) -> ModelStatistics:
    """The empirical model statistics of a network on data x0 (n, *event); VP schedules."""
    low, high = float(schedule.logsnr(1.0)) / 2, float(schedule.logsnr(schedule.t_min)) / 2
    at = torch.linspace(low, high, knots + 1, dtype=torch.float64)
    index, source = range(len(x0)), Independent(3)
    eps0 = source.normal(index, x0.shape[1:], draw=0).to(x0)
    signs = (source.normal(index, x0.shape[1:], draw=1).to(x0) > 0).to(x0) * 2 - 1

    def parts(number: int) -> list[tuple[Tensor, Level]]:
        level = schedule.level(2 * at[number])
        alpha, sigma = float(level.alpha), float(level.sigma)
        return [(alpha * x + sigma * e, level) for x, e in zip(x0.split(batch), eps0.split(batch), strict=True)]

    rows = []
    for number in range(knots + 1):
        total = torch.zeros(x0.shape[1:], dtype=torch.float64)
        for (x, level), v in zip(parts(number), signs.split(batch), strict=True):
            with torch.enable_grad():
                x = x.requires_grad_(True)
                (product,) = torch.autograd.grad(epsilon(x, level), x, v)
            total += (v * product).double().sum(0)
        rows.append(float(schedule.level(2 * at[number]).sigma) * total / len(x0))
    l = torch.stack(rows)
    slope = torch.gradient(l, spacing=(at,), dim=0)[0]

    s, b = torch.zeros_like(l), torch.zeros_like(l)
    for number in range(knots + 1):
        f, f1 = [], []
        here = at[number]
        before, after = max(here - step, at[0]), min(here + step, at[-1])
        for x, level in parts(number):
            alpha, sigma = float(level.alpha), float(level.sigma)
            with torch.no_grad():
                eps = epsilon(x, level)
                dx = sigma**2 * x - sigma * eps
                ends = [
                    epsilon(x + float(end - here) * dx, schedule.level(2 * torch.as_tensor(end)))
                    for end in (before, after)
                ]
            eps1 = (ends[1] - ends[0]).double() / float(after - before)
            eps, x = eps.double(), x.double()
            f.append((sigma * eps - l[number] * x) / alpha)
            f1.append(sigma / alpha * (eps1 - eps + l[number] * eps) - slope[number] * x / alpha)
        a, c = torch.cat(f), torch.cat(f1)
        spread = (a - a.mean(0)).square().mean(0)
        slope_f = ((a - a.mean(0)) * (c - c.mean(0))).mean(0) / spread.clamp_min(1e-12 * a.square().mean())
        s[number], b[number] = slope_f, c.mean(0) - slope_f * a.mean(0)
    return ModelStatistics(at, l, s, b)


# ------------------------------------------------------------------------------------------------------------ sampling


@dataclass(frozen=True)
class Settings:
    """Switches of a run (see the module)."""

    order: int = 3
    corrector: bool = True
    pseudo_predictor: bool = False
    pseudo_corrector: bool = False
    lower_order_final: bool = True


def settings(steps: int) -> Settings:
    """What the paper used for unconditional samples, by the number of steps."""
    if steps <= 5:
        return Settings(pseudo_predictor=True, lower_order_final=False)
    return Settings(corrector=not 8 < steps <= 10)


def _cumulative(values: Tensor, gap: float) -> Tensor:
    """Integrals from the first knot by the trapezoidal rule, same shape."""
    return torch.cat([torch.zeros_like(values[:1]), torch.cumulative_trapezoid(values, dx=gap, dim=0)])


class Integrals:
    """The step integrals of a table on fine knots, per entry."""

    def __init__(self, statistics: ModelStatistics, points: int = 1536) -> None:
        self.table = statistics.fine(points)
        self.gap = float(self.table.knots[1] - self.table.knots[0])
        self.L, self.S = _cumulative(self.table.l, self.gap), _cumulative(self.table.s, self.gap)
        self._steps: dict[tuple[int, int, int], tuple[Tensor, Tensor, list[Tensor]]] = {}
        self._relative: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def number(self, l: Tensor) -> list[int]:
        """The nearest knots of half log-snrs."""
        return ((l - self.table.knots[0]) / self.gap).round().long().clamp(0, len(self.table.knots) - 1).tolist()

    def relative(self, s: int, i: int) -> tuple[Tensor, Tensor]:
        """(e^{-S}, B) at knot i from knot s, of either sign; remembered."""
        if (s, i) in self._relative:
            return self._relative[s, i]
        low, high = min(s, i), max(s, i)
        integrand = torch.exp(self.S[s] - self.S[low : high + 1]) * self.table.b[low : high + 1]
        total = torch.trapezoid(integrand, dx=self.gap, dim=0) if high > low else torch.zeros_like(self.S[s])
        self._relative[s, i] = torch.exp(self.S[s] - self.S[i]), total if i > s else -total
        return self._relative[s, i]

    def step(self, s: int, t: int, terms: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(e^{-L}, int E B, [int E (l - l_s)^k / k!]); remembered."""
        if (s, t, terms) in self._steps:
            return self._steps[s, t, terms]
        L, S = self.L[s : t + 1] - self.L[s], self.S[s : t + 1] - self.S[s]
        E = torch.exp(L + S)
        B = _cumulative(torch.exp(-S) * self.table.b[s : t + 1], self.gap)
        reach = (self.table.knots[s : t + 1] - self.table.knots[s]).reshape(-1, *([1] * (L.ndim - 1)))
        moments = [torch.trapezoid(E * reach**k / math.factorial(k), dx=self.gap, dim=0) for k in range(terms)]
        self._steps[s, t, terms] = torch.exp(-L[-1]), torch.trapezoid(E * B, dx=self.gap, dim=0), moments
        return self._steps[s, t, terms]


def _derivatives(knots: list[float], count: int, pseudo: bool) -> Tensor:
    """Weights (count + 1, len) of g at knots (the first is the anchor) in g, g^(1), ..., g^(count)."""
    at = torch.tensor(knots, dtype=torch.float64) - knots[0]
    n = len(knots)
    if not pseudo:
        powers = at[None, :] ** torch.arange(n, dtype=torch.float64)[:, None]
        factorials = torch.tensor([float(math.factorial(k)) for k in range(n)], dtype=torch.float64)
        return (torch.linalg.inv(powers).mT * factorials[:, None])[: count + 1]
    rows = []
    for k in range(count + 1):  # k! times the divided difference of the first k + 1 values
        row = torch.zeros(n, dtype=torch.float64)
        for i in range(k + 1):
            others = [at[i] - at[j] for j in range(k + 1) if j != i]
            row[i] = math.factorial(k) / math.prod(map(float, others))
        rows.append(row)
    return torch.stack(rows)


@torch.no_grad()
def sample(
    epsilon: Epsilon,
    schedule: Schedule,
    statistics: ModelStatistics | Integrals,
    x: Tensor,
    steps: int,
    *,
    skip: str = "logsnr",
    how: Settings | None = None,
) -> Tensor:
    """States at the schedule's t_min from states x (n, *event) at t = 1; `steps` evaluations.

    Args:
        epsilon: (x, level) -> eps_hat.
        schedule: VP.
        statistics: of the network.
        x: start.
        steps: K.
        skip: knots equally spaced in `logsnr` or `time`.
        how: switches; default `settings(steps)`.
    """
    how = settings(steps) if how is None else how
    integrals = statistics if isinstance(statistics, Integrals) else Integrals(statistics)
    knots = integrals.table.knots
    if skip == "logsnr":
        at = torch.linspace(float(knots[0]), float(knots[-1]), steps + 1, dtype=torch.float64)
    elif skip == "time":
        at = schedule.logsnr(torch.linspace(1.0, schedule.t_min, steps + 1, dtype=torch.float64)) / 2
    else:
        raise ValueError(f"skip is {skip!r}; allowed: {', '.join(SKIPS)}")
    numbers = integrals.number(at)
    at = knots[numbers]
    level = schedule.level(2 * at)
    alpha, sigma = level.alpha.tolist(), level.sigma.tolist()
    f: list[Tensor] = []
    states: list[Tensor] = [x]
    order = 0

    def move(anchor: int, target: int, nodes: list[int], pseudo: bool) -> Tensor:
        """From state `anchor` to `target` with g at `nodes`, the anchor first."""
        s = numbers[anchor]
        decay, offset, moments = integrals.step(s, numbers[target], len(nodes))
        weights = _derivatives([float(at[j]) for j in nodes], len(nodes) - 1, pseudo)
        total = offset.to(x)
        for place, j in enumerate(nodes):
            factor, B = integrals.relative(s, numbers[j])
            weight = sum(weights[k, place] * moments[k] for k in range(len(nodes)))
            total = total + (weight * factor).to(x) * f[j] - (weight * B).to(x)
        return alpha[target] * decay.to(x) * (states[anchor] / alpha[anchor] - total)

    for k in range(steps):
        eps = epsilon(states[k], level[k])
        f.append((sigma[k] * eps - integrals.table.l[numbers[k]].to(x) * states[k]) / alpha[k])
        corrected = order + how.pseudo_corrector
        if how.corrector and corrected > 1:
            nodes = [k - 1, k, *(k - 1 - j for j in range(1, corrected - 1))]
            states[k] = move(k - 1, k, nodes, how.pseudo_corrector)
        order = min(how.order, k + 1)
        if how.lower_order_final:
            order = min(order, steps - k)
        states.append(move(k, k + 1, [k - j for j in range(order)], how.pseudo_predictor))
    return states[-1]
