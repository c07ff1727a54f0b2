r"""The control variate of the reverse process: integrate the Gaussian twin exactly, discretise only the remainder.

With y = (x - alpha m) / sigma in the twin's basis, l = log(alpha / sigma), u = e^l, v = 1 + c u^2 and the remainder
r = x0_hat - D_lin, the reverse process of stochasticity tau (0: probability-flow ODE, 1: reverse SDE) is, for each
direction,

    dy = [-tau^2 + (1 + tau^2) (v - 1) / v] y dl + (1 + tau^2) u r dl + sqrt(2) tau dW,

whose linear part has the transition factor and, for the twin's own marginal, the noise

    Phi(l -> s) = exp(-tau^2 (l_s - l)) (v_s / v(l))^((1 + tau^2) / 2),      Var = v_s - Phi(t -> s)^2 v_t,

so that a step reads

    y_s = Phi(t -> s) y_t + (1 + tau^2) int_t^s Phi(l -> s) e^l r(l) dl + sqrt(Var) z.

Only r has to be approximated. Its trend is modelled as v^-p ("decay" p: 0 keeps r itself, 1/2 keeps its size in units
of the twin's posterior standard deviation), times the Lagrange polynomial through the values known so far: the
predictor of order q uses the last q of them; the corrector redoes the step just made, with the same noise, once the
network has been evaluated at its end, so it costs no evaluation. The weights of the values are one-dimensional
integrals a direction, by Gauss-Legendre quadrature once per grid.

For Gaussian data r = 0 and every step is exact. Without a twin (c = 0) the formula is the exponential Adams method:
order 1 is DPM-Solver++(1) (DDIM), order 2 is DPM-Solver++(2M) with exact weights ("heun" in diffusers), and with a
corrector it is of the kind of UniPC (tau = 0) and SA-Solver (tau > 0).

The step to s = 0 returns x0_hat: the posterior mean, without noise.

A step that begins where the last one ended takes the coefficients of x from it, and saves one of three transforms.

Sources: Lu et al. 2022 (DPM-Solver++), Xue et al. 2023 (SA-Solver), Zhao et al. 2023 (UniPC), Wang & Vastola 2024
(Gaussian score); the exact integration of the Gaussian part with general tau is this package's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level
from lowvar.process.solver import Solver, State, StepInfo
from lowvar.process.twin import GaussianTwin

__all__ = ["MultistepPlan", "MultistepSolver", "Recall", "recalled"]


@lru_cache(maxsize=4)
def _gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1], from the eigenvalues of the Jacobi matrix (Golub & Welsch 1969)."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / torch.sqrt(4 * k**2 - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, 2 * vectors[0] ** 2


@dataclass(frozen=True)
class _Step:
    """One step's numbers per direction: factor of y_t, noise std, weights of the remainders (newest first)."""

    phi: Tensor
    std: Tensor
    predictor: Tensor  # of r_k, r_{k-1}, ...
    correction: Tensor | None  # corrector minus predictor, of r_{k+1}, r_k, ...: what is added to y_{k+1} afterwards

    def to(self, like: Tensor) -> _Step:
        correction = None if self.correction is None else self.correction.to(like)
        return _Step(self.phi.to(like), self.std.to(like), self.predictor.to(like), correction)


@dataclass(frozen=True)
class MultistepPlan:
    """Everything about a grid: m, per evaluated level (alpha m, sigma, Wiener gain), per step its weights."""

    mean: Tensor
    shift: list[Tensor]
    sigma: list[float]
    gain: list[Tensor]
    steps: list[_Step | None]

    def due(self, k: int) -> Tensor | None:
        """Weights of the correction that step k begins with, or None: the first step, or the step to clean data."""
        if not 0 < k < len(self.steps) or self.steps[k] is None:
            return None
        previous = self.steps[k - 1]
        return None if previous is None else previous.correction

    def to(self, like: Tensor) -> MultistepPlan:
        """The plan in the dtype and on the device of `like`: steps then copy nothing from one device to another."""
        return MultistepPlan(
            self.mean.to(like),
            [v.to(like) for v in self.shift],
            self.sigma,
            [v.to(like) for v in self.gain],
            [None if step is None else step.to(like) for step in self.steps],
        )


@dataclass(frozen=True)
class MultistepSolver(Solver):
    """Exponential Adams predictor-corrector on what the Gaussian twin leaves over.

    Args:
        twin: the control variate; None is the plain method.
        predictor: q, remainders the prediction uses, 1 to 3 (fewer in the first steps).
        corrector: q', remainders the correction uses, the new one included; 0 for none, else 1 to 4.
        tau: stochasticity in [0, 1].
        decay: p, exponent of the remainder's trend v^-p.
        nodes: Gauss-Legendre nodes of the weights.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> from lowvar.process.schedule import CosineVP
        >>> from lowvar.process.grid import uniform_logsnr
        >>> schedule = CosineVP()
        >>> solver = MultistepSolver(predictor=2, corrector=2)
        >>> plan = solver.prepare(schedule.at(uniform_logsnr(schedule, 5)))
        >>> solver.order, solver.stochastic, len(plan.steps)
        (2, False, 5)
    """

    twin: GaussianTwin | None = None
    predictor: int = 2
    corrector: int = 0
    tau: float = 0.0
    decay: float = 0.0
    nodes: int = 64

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.predictor not in (1, 2, 3):
            raise ValueError(f"predictor is {self.predictor}; allowed: 1, 2, 3")
        if self.corrector not in (0, 1, 2, 3, 4):
            raise ValueError(f"corrector is {self.corrector}; allowed: 0 (none) to 4")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau is {self.tau}; allowed: 0 (ODE) to 1 (SDE)")

    @property
    def order(self) -> int:
        """min(q', q + 1) with a corrector of q' values, q without.

        For chains that start near pure noise, where the remainder vanishes. Started in mid-process, the first step has
        no history, and its error caps the order at 2 without a corrector and 3 with one.
        """
        return min(self.corrector, self.predictor + 1) if self.corrector else self.predictor

    @property
    def stochastic(self) -> bool:
        """Whether tau > 0."""
        return self.tau > 0

    def _spectrum(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64) if self.twin is None else self.twin.spectrum.double().cpu()

    def prepare(self, levels: Level) -> MultistepPlan:
        """Weights of all steps of a grid, by quadrature in float64."""
        c = self._spectrum()
        alpha, sigma = levels.alpha, levels.sigma
        evaluated = range(len(levels) - 1)
        mean = torch.zeros_like(c) if self.twin is None else self.twin.mean.double().cpu()
        shift = [alpha[k] * mean for k in evaluated] + [alpha[-1] * mean]
        gain = [alpha[k] * c / (alpha[k] ** 2 * c + sigma[k] ** 2) for k in evaluated]
        steps = [self._weights(levels, k, c) for k in evaluated]
        return MultistepPlan(mean, shift, sigma.tolist(), gain, steps)

    def _weights(self, levels: Level, k: int, c: Tensor) -> _Step | None:
        t, s = levels[k], levels[k + 1]
        if float(s.sigma) == 0:
            return None
        tau2 = self.tau**2
        u_t, u_s = t.alpha / t.sigma, s.alpha / s.sigma
        v_t, v_s = 1 + c * u_t**2, 1 + c * u_s**2
        two_h_tau = tau2 * (s.logsnr - t.logsnr) if self.tau else torch.zeros((), dtype=torch.float64)
        ratio = torch.log(v_s / v_t)
        phi = torch.exp(-two_h_tau / 2 + (1 + tau2) / 2 * ratio)
        # v_s - Phi^2 v_t = -v_s expm1(-tau^2 (2h - log(v_s / v_t)))
        exponent = two_h_tau - tau2 * ratio if self.tau else torch.zeros_like(v_s)
        std = torch.sqrt(-v_s * torch.expm1(-exponent))
        # quadrature nodes: in l, or in u where the chain starts from pure noise (l = -inf)
        x, w = _gauss_legendre(self.nodes)
        l_s = s.logsnr / 2
        if torch.isinf(t.logsnr):
            u = u_s * (1 + x) / 2
            l, measure = torch.log(u), u_s / 2 * w
        else:
            l_t = t.logsnr / 2
            l = l_t + (l_s - l_t) * (1 + x) / 2
            measure = (l_s - l_t) / 2 * w * torch.exp(l)
        column = (-1, *([1] * c.ndim))
        v = 1 + c * torch.exp(2 * l).reshape(column)
        weight = (1 + tau2) * torch.exp(-tau2 * (l_s - l)).reshape(column) * (v_s / v) ** ((1 + tau2) / 2)
        weight = weight * v**-self.decay * measure.reshape(column)  # (nodes, *event)
        history = [j for j in range(k, max(k - 3, -1), -1) if torch.isfinite(levels.logsnr[j]) or j == k]
        old = [float(levels.logsnr[j]) / 2 for j in history]
        old_v = [1 + c * (levels.alpha[j] / levels.sigma[j]) ** 2 for j in history]
        predictor = self._project(l, weight, old[: self.predictor], old_v)
        correction = None
        if self.corrector and k + 2 < len(levels):
            usable = [j for j, knot in enumerate(old) if math.isfinite(knot)][: self.corrector - 1]
            nodes = [float(l_s), *(old[j] for j in usable)]
            better = self._project(l, weight, nodes, [v_s, *(old_v[j] for j in usable)])
            correction = torch.zeros(max(len(better), 1 + len(predictor)), *c.shape, dtype=torch.float64)
            correction[: len(better)] += better
            correction[1 : 1 + len(predictor)] -= predictor
        return _Step(phi, std, predictor, correction)

    def _project(self, l: Tensor, weight: Tensor, nodes: list[float], v: list[Tensor]) -> Tensor:
        """Integrals of weight x Lagrange polynomials, times the trend at the nodes: (len(nodes), *event)."""
        rows = []
        for i, node in enumerate(nodes):
            L = torch.ones_like(l)
            for j, other in enumerate(nodes):
                if j != i:
                    L = L * (l - other) / (node - other)
            rows.append(torch.tensordot(L, weight, dims=1) * v[i] ** self.decay)
        return torch.stack(rows)

    def start(self, x: Tensor) -> State:
        """See the base class."""
        return State(x, Recall())

    def _rotate(self, x: Tensor) -> Tensor:
        return x if self.twin is None else self.twin.basis.forward(x)

    def _unrotate(self, c: Tensor) -> Tensor:
        return c if self.twin is None else self.twin.basis.inverse(c)

    def corrects(self, plan: MultistepPlan, k: int) -> bool:
        """See the base class."""
        return plan.due(k) is not None

    def corrected(self, plan: MultistepPlan, k: int, state: State, posterior: Posterior) -> Tensor:
        """See the base class."""
        if not self.corrects(plan, k):
            return state.x
        y, _ = self._at(plan, k, state, posterior)
        return self._unrotate(y.mul_(plan.sigma[k])).add_(plan.shift[k].to(y))

    def _at(self, plan: MultistepPlan, k: int, state: State, posterior: Posterior) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y_k, corrected where a correction is due, in a memory of its own; and the remainders r_k, r_{k-1}, ..."""
        x, x0 = state.x, posterior.mean
        centred = recalled(state)
        if centred is None:
            centred = self._rotate(x - plan.shift[k].to(x))
        remainder = x0 if self.twin is None else self._rotate(x0 - plan.mean.to(x0))
        if self.twin is not None:
            remainder = remainder.addcmul_(plan.gain[k].to(x), centred, value=-1)
        values = (remainder, *state.memory.values)[:4]
        y = centred / plan.sigma[k]
        due = plan.due(k)
        return y if due is None else _add(y, due, values), values

    def step(
        self, plan: MultistepPlan, k: int, state: State, posterior: Posterior, z: Tensor | None
    ) -> tuple[State, StepInfo]:
        """See the base class; `info.law` is None (the state's law is Gaussian given the history, not x alone)."""
        step, info = plan.steps[k], StepInfo(k, posterior)
        if step is None:
            return State(posterior.mean, Recall()), info
        y, values = self._at(plan, k, state, posterior)
        y = _add(y.mul_(step.phi.to(y)), step.predictor, values)
        if self.tau and z is not None:
            y = y.addcmul_(step.std.to(y), self._rotate(z))
        centred = y.mul_(plan.sigma[k + 1])
        x_s = self._unrotate(centred)
        if x_s is centred:
            return State(x_s.add_(plan.shift[k + 1].to(y)), Recall(values=values)), info
        x_s = x_s.add_(plan.shift[k + 1].to(y))
        return State(x_s, Recall.of(x_s, centred, values)), info


@dataclass(frozen=True)
class Recall:
    """A state with its coefficients in a basis, so that the next step need not compute them.

    Attributes:
        x: the state, (B, *event_shape), and its number of changes in place when it was made.
        version: that number.
        coefficients: what the solver says they are.
        values: the remainders so far, newest first.
    """

    x: Tensor | None = None
    version: int = 0
    coefficients: Tensor | None = None
    values: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, x: Tensor, coefficients: Tensor, values: tuple[Tensor, ...] = ()) -> Recall:
        """Without the state where both are one tensor (no transform is saved), or nobody counts its changes."""
        if x is coefficients or x.is_inference():
            return cls(values=values)
        return cls(x, x._version, coefficients, values)


def recalled(state: State) -> Tensor | None:
    """The coefficients, unless the state was exchanged or changed since (guidance, inpainting)."""
    memory = state.memory
    same = isinstance(memory, Recall) and memory.x is state.x and memory.version == state.x._version
    return memory.coefficients if same else None


def _add(y: Tensor, weights: Tensor, remainders: tuple[Tensor, ...]) -> Tensor:
    """y + sum_j w_j r_j, written over y."""
    if len(remainders) < len(weights):
        raise ValueError(
            f"a step that uses {len(weights)} remainders has {len(remainders)}: run a plan from its first step, or "
            "prepare one for the remaining levels"
        )
    for w, r in zip(weights, remainders, strict=False):
        y = y.addcmul_(w.to(y), r)
    return y
