r"""The twin's flow: between evaluations the control variate is integrated, and only the remainder is frozen.

The probability-flow ODE with x0_hat = D + r, D the denoiser of a twin (a Gaussian, or a mixture of them), is

    dy / dl = u (D + r),      y = x / sigma,  l = log(alpha / sigma),  u = e^l,

and D is known everywhere without the network. So the network is asked at the grid's levels only, and in between

    x0_hat(l) = D(x, l) + kappa(l_k, l) r_k

along each direction of the twin's basis. Where path moments were measured (`lowvar.process.path`) it is the regression
of r(l) on r_k and the remainder before it, kappa_0 r_k + kappa_1 r_{k-1}; without them kappa is g(l) / g(l_k),
g = v^-1/2, v = 1 + c u^2: the remainder keeps its size in units of the posterior standard deviation inside a component
(c: mean variance inside components). Three things follow from having D everywhere:

- **no evaluation at pure noise**: the chain runs from t = 1 to the first level of the grid on the twin alone, where the
  network would say what the twin says;
- **the last step is a flow too**, to l = infinity, and not the posterior mean, which has too little variance by what
  is still unknown at the last level;
- where r is small, or known from before, the grid needs no levels: the path moments choose them.

Inside a step D is integrated by the exponential predictor-corrector (`lowvar.process.multistep`) on substeps of
logsnr at most `spacing`, two a step at least (one would not see kappa), linear part c in closed form; for one Gaussian
D is linear and a step is exact. To the end,

    x_0 = m + sqrt(c / v) (y - u m) + sqrt(v) atan(1 / (sqrt(c) u)) r      (closed form of the frozen remainder).

Exact on Gaussian data in one step from the marginal, on mixture data up to the substeps; else of order 1 in the grid,
and of order 2 with path moments, down to the spacing that these were measured with.
Source: this package's own (see `lowvar.process.twin` and `lowvar.process.multistep` for what it rests on).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowvar.process.basis import PixelBasis
from lowvar.process.mixture import MixtureTwin
from lowvar.process.multistep import MultistepPlan, MultistepSolver, Recall, recalled
from lowvar.process.path import PathMoments, spread_groups
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level
from lowvar.process.solver import Solver, State, StepInfo
from lowvar.process.twin import GaussianTwin

__all__ = ["FlowPlan", "TwinFlow"]

_FAR = -9.0  # logsnr below which twins of unit scale are linear: one substep
_END = 12.0  # logsnr at which the closed form of the end takes over from substeps


@dataclass(frozen=True)
class _End:
    """x_0 = centre + gain (y - alpha centre) + tail r, r = kappa r_k + (D - centre - linear (y - alpha centre))."""

    alpha: float
    centre: Tensor
    gain: Tensor
    tail: Tensor
    linear: Tensor

    def to(self, like: Tensor) -> _End:
        return _End(self.alpha, *(v.to(like) for v in (self.centre, self.gain, self.tail, self.linear)))


@dataclass(frozen=True)
class _Piece:
    """From one level to the next, in VP scale: substeps, kappa at each, their plan, the scales of both ends.

    A kappa is (R, *event_shape), the multiples of the newest R remainders. For one Gaussian all of it is an affine map
    of each direction, (2 + R, *event_shape): constant, gain of the state, weights of the remainders.
    """

    levels: Level
    trend: list[Tensor]
    plan: MultistepPlan | None
    end: _End | None
    scale_t: float
    scale_s: float
    affine: Tensor | None = None

    def to(self, like: Tensor) -> _Piece:
        plan = None if self.plan is None else self.plan.to(like)
        end = None if self.end is None else self.end.to(like)
        trend, affine = [v.to(like) for v in self.trend], None if self.affine is None else self.affine.to(like)
        return _Piece(self.levels, trend, plan, end, self.scale_t, self.scale_s, affine)


@dataclass(frozen=True)
class FlowPlan:
    """The pieces of a grid, one an evaluation."""

    pieces: list[_Piece]

    def to(self, like: Tensor) -> FlowPlan:
        """The plan in the dtype and on the device of `like`."""
        return FlowPlan([piece.to(like) for piece in self.pieces])


@dataclass(frozen=True)
class TwinFlow(Solver):
    """The probability flow with a twin as control variate and a frozen or extrapolated remainder.

    Args:
        twin: the control variate; a `GaussianTwin` is a mixture of one.
        paths: moments of the remainder along paths, measured with the same twin, or None.
        spacing: largest logsnr of a substep, where the twin is a mixture or paths are given.

    Raises:
        ValueError: if spacing is not positive.

    Example:
        >>> from lowvar.process import CosineVP
        >>> schedule = CosineVP()
        >>> twin = GaussianTwin(torch.ones(2), PixelBasis((2,)), torch.tensor([4.0, 0.25]))
        >>> solver, levels = TwinFlow(twin), schedule.at(torch.tensor([0.6, 0.0], dtype=torch.float64))
        >>> x = solver.initial(torch.ones(1, 2), schedule.at(1.0), levels[0])
        >>> state, _ = solver.step(solver.prepare(levels), 0, solver.start(x), twin.posterior(x, levels[0]), None)
        >>> torch.round(state.x, decimals=2).tolist()
        [[3.0, 1.5]]
    """

    twin: GaussianTwin | MixtureTwin
    paths: PathMoments | None = None
    spacing: float = 0.5

    def __post_init__(self) -> None:
        """Checks the spacing."""
        if not self.spacing > 0:
            raise ValueError(f"spacing is {self.spacing}; it must be positive")
        mixture = self.twin if isinstance(self.twin, MixtureTwin) else MixtureTwin.of(self.twin)
        object.__setattr__(self, "_mixture", mixture)

    @property
    def mixture(self) -> MixtureTwin:
        """The twin as a mixture."""
        return self._mixture  # type: ignore[attr-defined]

    @property
    def order(self) -> int:
        """1, the remainder is frozen over a step; 2 where paths say how it goes on from the last two."""
        return 1 if self.paths is None else 2

    @property
    def stochastic(self) -> bool:
        """No: it is the probability flow."""
        return False

    def _inner(self) -> MultistepSolver:
        """What integrates the twin: the Gaussian of the spread inside components, in coefficients."""
        shape = self.mixture.event_shape
        linear = GaussianTwin(self.mixture.centre, PixelBasis(shape), self.mixture.within)
        return MultistepSolver(linear, 2, 2, 0.0, 0.5, nodes=16)

    def _piece(self, t: Level, s: Level, before: Level | None = None) -> _Piece:
        final = float(s.sigma) == 0
        low = float(t.logsnr)
        high = max(_END, low) if final else float(s.logsnr)
        if self.mixture.components == 1 and self.paths is None:
            knots = [low] if final else [low, high]
        else:
            near = max(low, min(_FAR, high))
            count = max(math.ceil((high - near) / self.spacing), 2)
            knots = ([low] if low < near else []) + [near + (high - near) * j / count for j in range(count + 1)]
        levels = _vp(torch.tensor(knots, dtype=torch.float64))
        trend = self._kappa(levels, before)
        plan = self._inner().prepare(levels) if len(knots) > 1 else None
        scale_t, scale_s = (float(torch.sqrt(p.alpha**2 + p.sigma**2)) for p in (t, s))
        piece = _Piece(levels, trend, plan, self._end(levels[len(knots) - 1]) if final else None, scale_t, scale_s)
        return replace(piece, affine=self._affine(piece)) if self.mixture.components == 1 else piece

    def _affine(self, piece: _Piece) -> Tensor:
        """The map of a piece for one Gaussian, from what the piece makes of 0 and of a 1 in each of its arguments."""
        count = 1 + len(piece.trend[0])
        arguments = torch.eye(count + 1, dtype=torch.float64)[1:, :, *([None] * len(self.mixture.event_shape))]
        y, *remainders = arguments.expand(count, count + 1, *self.mixture.event_shape).unbind(0)
        constant, *moved = self._run(piece, y, tuple(remainders)).unbind(0)
        return torch.stack([constant, *(v - constant for v in moved)])

    def _end(self, end: Level) -> _End:
        c, alpha, sigma = self.mixture.within, float(end.alpha), float(end.sigma)
        u = alpha / sigma
        v = 1 + c * u**2
        tail = torch.sqrt(v) * torch.atan2(torch.ones_like(c), c.sqrt() * u)
        return _End(alpha, self.mixture.centre, torch.sqrt(c / v) / sigma, tail, alpha * c / (alpha**2 * c + sigma**2))

    def _kappa(self, levels: Level, before: Level | None) -> list[Tensor]:
        """kappa from the first level, and the one before it, to each."""
        c = self.mixture.within
        if self.paths is None:
            v = [1 + c * (levels.alpha[j] / levels.sigma[j]) ** 2 for j in range(len(levels))]
            return [torch.sqrt(v[0] / each)[None] for each in v]
        groups = spread_groups(c)
        rows = self.paths.trust(
            float(levels.logsnr[0]), levels.logsnr, None if before is None else float(before.logsnr)
        )
        return [row[:, groups].reshape(-1, *c.shape) for row in rows.unbind(1)]

    def prepare(self, levels: Level) -> FlowPlan:
        """Substeps, trends and weights of every step."""
        pieces = [self._piece(levels[k], levels[k + 1], levels[k - 1] if k else None) for k in range(len(levels) - 1)]
        return FlowPlan(pieces)

    def initial(self, z: Tensor, prior: Level, first: Level) -> Tensor:
        """The state at the grid's first level, from standard normal z: the twin's own flow, without an evaluation.

        Args:
            z: (B, *event_shape).
            prior: the schedule's level at t = 1.
            first: the grid's first level.
        """
        mixture = self.mixture
        x = mixture.gaussian.marginal(prior).sample(z).to(z)
        if float(first.logsnr) <= float(prior.logsnr):
            return x
        piece = self._piece(prior, first)
        y = mixture.basis.forward(x) / piece.scale_t
        return mixture.basis.inverse(self._run(piece.to(x), y, (torch.zeros_like(y[:1]),)) * piece.scale_s)

    def start(self, x: Tensor) -> State:
        """See the base class."""
        return State(x, Recall())

    def step(
        self, plan: FlowPlan, k: int, state: State, posterior: Posterior, z: Tensor | None
    ) -> tuple[State, StepInfo]:
        """See the base class."""
        piece, mixture = plan.pieces[k], self.mixture
        rotated = recalled(state)
        y = (mixture.basis.forward(state.x) if rotated is None else rotated) / piece.scale_t
        remainder = mixture.basis.forward(posterior.mean) - mixture.denoise(y, piece.levels[0])
        values = (remainder, *state.memory.values)[:2]
        rotated = self._run(piece, y, values) * piece.scale_s
        x_s = mixture.basis.inverse(rotated)
        return State(x_s, Recall.of(x_s, rotated, values)), StepInfo(k, posterior)

    def remainder(self, x: Tensor, posterior: Posterior, level: Level) -> Tensor:
        """r = x0_hat - D at states x of one level, in the twin's basis, (B, *event_shape)."""
        scale = float(torch.sqrt(level.alpha**2 + level.sigma**2))
        y = self.mixture.basis.forward(x) / scale
        return self.mixture.basis.forward(posterior.mean) - self.mixture.denoise(y, _vp(level.logsnr))

    def _run(self, piece: _Piece, y: Tensor, remainders: tuple[Tensor, ...]) -> Tensor:
        """Coefficients at the end of a piece from those at its begin, both in VP scale; remainders newest first."""
        mixture, end = self.mixture, piece.end
        if len(remainders) < len(piece.trend[0]):
            raise ValueError("a step that uses the remainder before has none: run a plan from its first step")
        if piece.affine is not None:
            constant, gain, *weights = piece.affine.to(y).unbind(0)
            made = constant + gain * y
            for weight, remainder in zip(weights, remainders, strict=False):
                made.addcmul_(weight, remainder)
            return made

        def frozen(j: int) -> Tensor:
            kappa = piece.trend[j].to(y)
            r = kappa[0] * remainders[0]
            return r if len(kappa) == 1 else r.addcmul_(kappa[1], remainders[1])

        if piece.plan is not None:
            solver = self._inner()
            inner = solver.start(y)
            for j in range(len(piece.trend) - 1):
                x0 = mixture.denoise(inner.x, piece.levels[j]) + frozen(j)
                inner, _ = solver.step(piece.plan, j, inner, Posterior(x0), None)
            y = inner.x
        if end is None:
            return y
        last = len(piece.trend) - 1
        end = end.to(y)
        centred, rest = y - end.alpha * end.centre, frozen(last)
        if mixture.components > 1:
            rest = rest + mixture.denoise(y, piece.levels[last]) - end.centre - end.linear * centred
        return end.centre + end.gain * centred + end.tail * rest


def _vp(logsnr: Tensor) -> Level:
    """Variance-preserving levels: a twin's denoiser depends on the schedule through snr and the state's scale only."""
    alpha, sigma = torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()
    return Level(torch.full_like(logsnr, math.nan), logsnr, alpha, sigma)
