r"""Linear multistep solvers: the next state is linear in the state and in the posterior means seen so far.

With l = log(alpha / sigma), h = l_s - l_t and a step's noise chosen by rho in [0, 1], the reverse process t -> s is

    x_s = a x_t + kappa [weighted mean of x0_hat over the step] + lambda z,
    a = rho sigma_s / sigma_t,   lambda^2 = sigma_s^2 (1 - rho^2),   kappa = alpha_s - alpha_t a = alpha_s (1 - e^-H),
    H = h - log rho.

rho = sqrt(1 - eta^2 (1 - e^-2h)) is the family of `lowvar.process.kernel`, rho = e^(-tau^2 h) the one of the
reverse SDE with stochasticity tau; they agree at 0 and 1, and for small h with tau = eta. In units of the step,
theta = (l - l_t) / h, the weight of x0_hat(theta) is alpha_s H e^(-H (1 - theta)): whatever the noise, the step is that
of the ODE (rho = 1, H = h) with H in place of h. Its moments are

    p_n(H) = int_0^1 H e^(-H (1 - theta)) theta^n d theta,    p_0 = 1 - e^-H,    p_n = 1 - (n / H) p_{n-1}.

A method takes x0_hat at nodes theta_j (0 the newest posterior, below 0 the older ones, 1 the one at the step's end) and
weights alpha_s b_j with sum_j b_j theta_j^n = p_n for as many n as there are nodes. That is Lagrange interpolation,
integrated; published methods differ in the number of nodes and in what they put for p_1 when there are two:

    exact    p_1                               DPM-Solver++(2M) "heun", exponential Adams
    bh1      H / 2                             UniPC bh1, SA-Solver
    bh2      p_0 / 2                           UniPC bh2, DPM-Solver++(2M) "midpoint"

all equal to p_1 up to O(H^2), which leaves the order at 2. A corrector redoes the step just made, with the same noise,
when the posterior at its end is known (theta = 1): it costs no evaluation.

Which noise belongs to the mean. With one node the mean is that of the first-order kernel, and on Gaussian data exactly
kappa^2 C is missing from lambda^2 I. With more nodes the difference delta = sum_j b_j (x0_hat_j - x0_hat) carries
covariance itself: 2 Cov(first-order mean, delta) = 2 kappa alpha_s (sum_j b_j theta_j) C + O(h^3), so that

    missing = kappa (kappa - 2 alpha_s p_1) C + O(h^3)

with p_1 as the method has it. For the exact and the published p_1 that is not positive, and 0 to leading order: **a
step of two or more nodes takes no kappa^2 C, a step of one node takes all of it**. Adding kappa^2 C everywhere makes a
second-order solver first-order in its covariance. A corrector brings its differences one evaluation late, after the
network has been asked at the prediction: the first step, whose prediction has one node, takes kappa^2 C with a
corrector as well. That leaves the law at order 2 (one step, h^2). On digits at 3 evaluations, where the first step is
long, it is worth a third of the Frechet distance (benchmarks/calibrated_noise.py); on Gaussian data it overshoots.

The step to s = 0 returns x0_hat: the posterior mean, without noise.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.covariance import Covariance, Isotropic
from lowvar.process.kernel import Gaussian
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level
from lowvar.process.solver import Solver, State, StepInfo

__all__ = ["LinearMultistep", "LinearStep", "first_moment", "moments", "rho_of_eta", "rho_of_tau"]


def moments(H: float, count: int) -> list[float]:
    """p_0 .. p_{count - 1} at H in (0, inf].

    Example:
        >>> [round(p, 6) for p in moments(1e-3, 3)]
        [0.001, 0.0005, 0.000333]
        >>> moments(math.inf, 2)
        [1.0, 1.0]
    """
    if H < 1:  # the recurrence loses digits: H sum_k (-H)^k n! / (n + k + 1)!
        return [
            H * sum((-H) ** k * math.factorial(n) / math.factorial(n + k + 1) for k in range(20)) for n in range(count)
        ]
    found = [-math.expm1(-H)]
    for n in range(1, count):
        found.append(1 - n / H * found[-1])
    return found


def first_moment(kind: str, H: float, p: Sequence[float]) -> float:
    """What a method of two nodes has for p_1: `exact`, `bh1` or `bh2` (see the module)."""
    return {"exact": p[1], "bh1": H / 2, "bh2": p[0] / 2}[kind]


def rho_of_eta(eta: float, h: float) -> float:
    """sqrt(1 - eta^2 (1 - e^-2h)), h in (0, inf]."""
    return math.sqrt((1 - eta**2) * -math.expm1(-2 * h) + math.exp(-2 * h))


def rho_of_tau(tau: float, h: float) -> float:
    """e^(-tau^2 h), h in (0, inf]; 1 for tau = 0."""
    return math.exp(-(tau**2) * h) if tau else 1.0


@dataclass(frozen=True)
class LinearStep:
    """One step's numbers.

    Attributes:
        a: factor of x_t.
        weights: of the posterior means, newest first.
        lambda2: variance of the injected noise.
        kappa2: factor of C in the noise, where the solver is asked for it.
        correction: what is added to x_s when the posterior there is known: weights of that posterior's mean and of
            those before it; empty without a corrector.
    """

    a: float
    weights: tuple[float, ...]
    lambda2: float
    kappa2: float
    correction: tuple[float, ...] = ()


class LinearMultistep(Solver):
    """Base of the multistep methods; a subclass gives its numbers of nodes, its p_1 and its noise.

    Attributes:
        covariance: whether steps of one node, and the first, add kappa^2 C of the posterior (see the module).
    """

    covariance: bool

    @property
    @abstractmethod
    def nodes(self) -> tuple[int, int]:
        """Nodes of the prediction (fewer in the first steps), and of the correction with the new one; 0 for none."""

    @abstractmethod
    def rho(self, t: float, h: float) -> float:
        """Share of the noise's standard deviation that a step of length h from time t keeps."""

    @abstractmethod
    def two_nodes(self, H: float, p: Sequence[float]) -> float:
        """p_1 of a formula of two nodes."""

    @property
    @abstractmethod
    def stochasticity(self) -> float:
        """eta or tau: 0 the ODE, 1 the reverse SDE."""

    @property
    def order(self) -> int:
        """Order of the mean: q nodes give q, a corrector of q' nodes min(q', q + 1); with noise, of the law, at most 2.

        Orders above 2 (3 with a corrector) show for chains that start near pure noise: the first step has one node.
        """
        predictor, corrector = self.nodes
        order = min(corrector, predictor + 1) if corrector else predictor
        return min(order, 2) if self.stochastic else order

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise."""
        return self.stochasticity > 0 or self.covariance

    def prepare(self, levels: Level) -> list[LinearStep]:
        """Coefficients of all steps, floats from float64."""
        l, sigma = (levels.logsnr / 2).tolist(), levels.sigma.tolist()
        clean = LinearStep(0.0, (1.0,), 0.0, 0.0)
        return [self._coefficients(levels, l, sigma, k) if sigma[k + 1] > 0 else clean for k in range(len(l) - 1)]

    def _coefficients(self, levels: Level, l: list[float], sigma: list[float], k: int) -> LinearStep:
        h, t, alpha_s = l[k + 1] - l[k], float(levels.t[k]), float(levels.alpha[k + 1])
        rho = self.rho(t, h)
        H = h - math.log(rho) if rho > 0 else math.inf
        kappa = -alpha_s * math.expm1(-H)
        past = range(k - 1, max(k - max(self.nodes), -1), -1)
        known = [0.0, *((l[j] - l[k]) / h for j in past if math.isfinite(l[j]))]  # pure noise is no node
        predictor, corrector = self.nodes
        predicted = [alpha_s * b for b in self._weights(H, known[:predictor])]
        corrected: list[float] = []
        # too late where the next step goes to clean data: that returns the posterior mean of the prediction
        if corrector and math.isfinite(h) and k + 2 < len(l) and sigma[k + 2] > 0:
            corrected = [alpha_s * b for b in self._weights(H, [1.0, *known[: corrector - 1]])]
        correction = [0.0] * max(len(corrected), 1 + len(predicted)) if corrected else []
        for j, b in enumerate(corrected):
            correction[j] += b
        for j, b in enumerate(predicted if corrected else []):
            correction[j + 1] -= b
        alone = len(predicted) == 1 and (k == 0 or not corrected)
        kappa2 = kappa**2 if alone else 0.0
        lambda2 = sigma[k + 1] ** 2 * (1 - rho) * (1 + rho)
        return LinearStep(rho * sigma[k + 1] / sigma[k], tuple(predicted), lambda2, kappa2, tuple(correction))

    def _weights(self, H: float, nodes: list[float]) -> list[float]:
        """b with sum_j b_j theta_j^n = p_n."""
        p = moments(H, len(nodes))
        if len(nodes) == 2:
            p[1] = self.two_nodes(H, p)
        powers = torch.tensor([[theta**n for theta in nodes] for n in range(len(nodes))], dtype=torch.float64)
        return torch.linalg.solve(powers, torch.tensor(p, dtype=torch.float64)).tolist()

    def start(self, x: Tensor) -> State:
        """See the base class."""
        return State(x, ())

    def corrects(self, plan: list[LinearStep], k: int) -> bool:
        """See the base class."""
        return k > 0 and bool(plan[k - 1].correction)

    def corrected(self, plan: list[LinearStep], k: int, state: State, posterior: Posterior) -> Tensor:
        """See the base class."""
        if not self.corrects(plan, k):
            return state.x
        return _add(state.x, plan[k - 1].correction, (posterior.mean, *state.memory))

    def step(
        self, plan: list[LinearStep], k: int, state: State, posterior: Posterior, z: Tensor | None
    ) -> tuple[State, StepInfo]:
        """See the base class; `info.law` is the Gaussian of x_s given x_t and the posteriors so far."""
        step, x = plan[k], self.corrected(plan, k, state, posterior)
        values = (posterior.mean, *state.memory)[: max(self.nodes[0] + 1, self.nodes[1])]
        law = Gaussian(_add(step.a * x, step.weights, values), self._noise(x, step, posterior))
        return State(law.mean if z is None else law.sample(z), values), StepInfo(k, posterior, law)

    def _noise(self, x: Tensor, step: LinearStep, posterior: Posterior) -> Covariance:
        if not self.covariance or step.kappa2 == 0:
            return Isotropic(torch.full((1,), step.lambda2, dtype=x.dtype, device=x.device), x.shape[1:])
        if posterior.covariance is None:
            raise ValueError("covariance=True needs a posterior covariance: calibrate one, or choose covariance=False")
        return posterior.covariance.affine(step.lambda2, step.kappa2)


def _add(x: Tensor, weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    if len(values) < len(weights):
        raise ValueError(
            f"a step that uses {len(weights)} posteriors has {len(values)}: run a plan from its first step, or prepare "
            "one for the remaining levels"
        )
    for weight, value in zip(weights, values, strict=False):
        x = torch.add(x, value, alpha=weight)
    return x
