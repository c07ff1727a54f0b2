r"""Training a head in minutes: rounds of draws from the frozen network, many updates a round.

A round evaluates the network at a pool of draws once and takes several epochs over it, so that a big network costs
pool x rounds evaluations however many updates the head needs. Levels are uniform in logsnr, stratified: each visit of
the n images uses n equal strata in random order. Images are split: most are learned from. On the second part (`stop`)
the likelihood of the averaged weights (EMA) picks the round and, by logsnr, whether the head is trusted and what factor
of C makes its residuals standard (a network's Jacobian knows nothing of the error of its mean). On the third
(`report`) the gain over the table is measured,

    gain = E[log N(x_0; x0_hat, C_head) - log N(x_0; x0_hat, C_table)] / d      nats a dimension,

averaged over logsnr, with its standard error over images that took no part in any choice. (The table may have seen
them, which only makes it better.)

Every number comes from the `NoiseSource`; a record of a round holds all that is needed to go on from it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lowvar.calibrate.estimator import Draw, HeadEstimator, Trust
from lowvar.process.covariance import Covariance
from lowvar.process.denoiser import Denoiser, expand
from lowvar.process.noise import NoiseSource
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level

__all__ = ["FitConfig", "HeadFit", "HeadReport", "Round", "fit_head", "rounds"]

NOWHERE = Trust((0.0,), (0.0,))
E = TypeVar("E", bound=HeadEstimator)

_PROBES, _ORDER, _HELD = 1 << 20, 1 << 21, 1 << 22  # draw numbers of probes, of shuffles, of held-out noise


@dataclass(frozen=True)
class FitConfig:
    """How a head is trained.

    Attributes:
        rounds: at most.
        pool: draws a round, rounded up to whole visits of the images.
        epochs: passes over a pool.
        batch: draws an update.
        rate: Adam's step size; it falls to zero along a cosine.
        average: decay of the averaged weights an update.
        patience: rounds without improvement before it stops.
        knots: levels that held-out likelihoods are measured at.
        replicates: noises an image and knot there.
        chunk: draws the frozen network sees at once.
    """

    rounds: int = 8
    pool: int = 4096
    epochs: int = 8
    batch: int = 256
    rate: float = 1e-3
    average: float = 0.99
    patience: int = 4
    knots: int = 13
    replicates: int = 4
    chunk: int = 256

    def __post_init__(self) -> None:
        """Checks that everything is positive.

        Raises:
            ValueError: naming the field.
        """
        for name in ("rounds", "pool", "epochs", "batch", "patience", "replicates", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a whole number from 1")
        if self.knots < 2 or self.rate <= 0 or not 0 <= self.average < 1:
            raise ValueError("a fit needs at least 2 knots, a positive rate and an average in [0, 1)")


@dataclass(frozen=True)
class Round:
    """After a round: number, mean training loss, held-out gain (nats a dimension), and the state to go on from."""

    number: int
    loss: float
    gain: float
    state: dict[str, Any]


@dataclass(frozen=True)
class HeadReport:
    """What a head is worth on images that took no part.

    Attributes:
        gain, gain_se: nats a dimension over the table, and its standard error over images.
        logsnr, by_level: the same gain by level.
        trust: factor of the head by level; all 0: the table is kept.
        images: learned from, stopped on, reported on.
        rounds: taken.
        nfe: network evaluations of the fit.
    """

    gain: float
    gain_se: float
    logsnr: Tensor
    by_level: Tensor
    trust: tuple[float, ...]
    images: tuple[int, int, int]
    rounds: int
    nfe: int

    @property
    def used(self) -> bool:
        """Whether the head is used at any level."""
        return any(self.trust)

    def __str__(self) -> str:
        """One sentence."""
        if not self.used:
            return "no better than its table on held-out images: the table is kept"
        kept = [v for v, w in zip(self.logsnr.tolist(), self.trust, strict=True) if not w]
        where = f"; the table is kept at logsnr {', '.join(f'{v:.1f}' for v in kept)}" if kept else ""
        return f"gains {self.gain:.4f} +- {self.gain_se:.4f} nats a dimension over its table{where}"


@dataclass(frozen=True)
class HeadFit(Generic[E]):
    """A fitted estimator and its report."""

    estimator: E
    report: HeadReport


def _draw(
    denoiser: Denoiser, images: Tensor, first: int, visit: int, level: Level, noise: NoiseSource, chunk: int
) -> Draw:
    """Draw number `visit` of images `first` .., at levels (n,); the network is evaluated in chunks."""
    index = range(first, first + len(images))
    like = {"dtype": images.dtype, "device": images.device}
    eps = noise.normal(index, images.shape[1:], draw=visit, **like)  # type: ignore[arg-type]
    sign = torch.where(noise.normal(index, images.shape[1:], draw=visit + _PROBES, **like) < 0, -1.0, 1.0)  # type: ignore[arg-type]
    x = expand(level.alpha, images) * images + expand(level.sigma, images) * eps
    with torch.no_grad():
        parts = [denoiser(x[a : a + chunk], level[slice(a, a + chunk)]).mean for a in range(0, len(x), chunk)]
    return Draw(images, eps, x, torch.cat(parts).to(images), level, sign.to(images))


def _some(draw: Draw, rows: Any) -> Draw:
    level = draw.level[rows.cpu() if isinstance(rows, Tensor) else rows]
    return Draw(draw.x0[rows], draw.eps[rows], draw.x[rows], draw.mean[rows], level, draw.sign[rows])


def _pool(
    estimator: HeadEstimator, denoiser: Denoiser, images: Tensor, number: int, config: FitConfig, noise: NoiseSource
) -> tuple[Draw, Tensor]:
    """Draws of a round and their targets."""
    n, visits = len(images), -(-config.pool // len(images))
    low, high = estimator.network.low, estimator.network.high
    draws, targets = [], []
    for visit in range(number * visits, (number + 1) * visits):
        u = noise.uniform(range(n), (2,), draw=visit + _ORDER, dtype=torch.float64)
        place = (torch.argsort(torch.argsort(u[:, 0])) + u[:, 1]) / n
        draw = _draw(
            denoiser, images, 0, visit, denoiser.schedule.level(low + (high - low) * place), noise, config.chunk
        )
        draws.append(draw)
        for a in range(0, n, config.chunk):
            part = _some(draw, slice(a, a + config.chunk))
            targets.append(estimator.target(denoiser, part, estimator.variance(part.level, part.x)).detach())
    join = {k: torch.cat([getattr(d, k) for d in draws]) for k in ("x0", "eps", "x", "mean", "sign")}
    level = Level(*(torch.cat([getattr(d.level, k) for d in draws]) for k in ("t", "logsnr", "alpha", "sigma")))
    return Draw(level=level, **join), torch.cat(targets)


class _Judge:
    """Gaussian log likelihood of held-out residuals under a head, against its table, by level and image."""

    def __init__(
        self,
        denoiser: Denoiser,
        images: Tensor,
        first: int,
        config: FitConfig,
        noise: NoiseSource,
        low: float,
        high: float,
    ) -> None:
        self.logsnr = torch.linspace(low, high, config.knots, dtype=torch.float64)
        self.draws: list[list[Draw]] = []
        for k, logsnr in enumerate(self.logsnr):
            at = denoiser.schedule.level(logsnr.expand(len(images)))
            number = _HELD + k * config.replicates
            self.draws.append(
                [_draw(denoiser, images, first, number + r, at, noise, config.chunk) for r in range(config.replicates)]
            )

    @torch.no_grad()
    def measure(self, model: Callable[[Tensor, Level, Posterior], Covariance]) -> _Fitness:
        """The model's log determinants and quadratic forms on the held-out draws."""
        rows = []
        for draws in self.draws:
            logdet, quadratic = torch.zeros(()), torch.zeros(())
            for draw in draws:
                C = model(draw.x, draw.level, Posterior(draw.mean))
                share = draw.x0[0].numel() * len(draws)
                logdet = logdet + C.logdet().double().cpu() / share
                quadratic = quadratic + C.inverse_quadratic(draw.x0 - draw.mean).double().cpu() / share
            rows.append((logdet.expand_as(quadratic), quadratic))
        return _Fitness(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


@dataclass(frozen=True)
class _Fitness:
    """log det C / d and r^T C^-1 r / d, (knots, images)."""

    logdet: Tensor
    quadratic: Tensor

    def likelihood(self, shift: Tensor | float = 0.0) -> Tensor:
        """Gaussian log likelihood of e^shift C, nats a dimension, up to a constant, (knots, images)."""
        shift = torch.as_tensor(shift).reshape(-1, 1)
        return -(self.logdet + shift + self.quadratic * torch.exp(-shift)) / 2

    @property
    def best_shift(self) -> Tensor:
        """The maximum-likelihood shift by level, (knots,): it makes the residuals standard; at most a factor of 5."""
        return self.quadratic.mean(1).log().clamp(-1.6, 1.6)


def _split(n: int) -> tuple[int, int]:
    """Where the images for stopping and for reporting begin."""
    held = max(n // 6, 1)
    return n - 2 * held, n - held


def rounds(
    estimator: HeadEstimator,
    denoiser: Denoiser,
    images: Tensor,
    noise: NoiseSource,
    config: FitConfig | None = None,
    resume: Round | None = None,
) -> Iterator[Round]:
    """Trains the estimator's head in place, one record a round; the state holds the best averaged weights so far.

    Args:
        estimator: its head begins where it is.
        denoiser: the frozen denoiser, on the images' device.
        images: (n, *event_shape), n >= 6, that the network was not trained on; the last third is held out.
        noise: of all draws.
        config: how.
        resume: an earlier record of the same fit, to go on from.

    Raises:
        ValueError: for fewer than 6 images.
    """
    config = FitConfig() if config is None else config
    if len(images) < 6:
        raise ValueError(f"{len(images)} images: a head needs at least 6, four to learn from and two to be judged on")
    stop, report = _split(len(images))
    head = estimator.network
    judge = _Judge(denoiser, images[stop:report], stop, config, noise, head.low, head.high)
    plain = judge.measure(estimator.trusted(NOWHERE)).likelihood()
    optimiser = torch.optim.Adam(head.parameters(), lr=config.rate)
    learned = images[:stop]
    visits = -(-config.pool // stop)
    each = -(-visits * stop // config.batch)
    state: dict[str, Any] = {
        "average": copy.deepcopy(head.state_dict()),
        "best": copy.deepcopy(head.state_dict()),
        "gain": 0.0,
        "since": 0,
        "number": 0,
    }
    if resume is not None:
        state = copy.deepcopy(resume.state)
        head.load_state_dict(state["weights"])
        optimiser.load_state_dict(state["optimiser"])
    for number in range(state["number"], config.rounds):
        if state["since"] >= config.patience:
            return
        draw, target = _pool(estimator, denoiser, learned, number, config, noise)
        losses = []
        for epoch in range(config.epochs):
            key = noise.uniform(range(len(target)), (), draw=_ORDER - 1 - number * config.epochs - epoch)
            for k, rows in enumerate(torch.argsort(key).split(config.batch)):
                done = ((number * config.epochs + epoch) * each + k) / (config.rounds * config.epochs * each)
                optimiser.param_groups[0]["lr"] = config.rate * (1 + torch.tensor(done * torch.pi).cos().item()) / 2
                rows = rows.to(target.device)
                part = _some(draw, rows)
                loss = estimator.loss(estimator.output(part.x, part.level, part.mean), target[rows])
                optimiser.zero_grad()
                loss.mean().backward()
                torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
                optimiser.step()
                losses.append(loss.detach().mean())
                moved = head.state_dict()
                torch._foreach_lerp_([state["average"][k] for k in moved], list(moved.values()), 1 - config.average)
        weights = copy.deepcopy(head.state_dict())
        head.load_state_dict(state["average"])
        now = judge.measure(estimator)
        gain = float((now.likelihood(now.best_shift) - plain).mean(1).clamp_min(0).mean())  # used where it gains
        head.load_state_dict(weights)
        better = gain > state["gain"]
        state |= {"since": 0 if better else state["since"] + 1, "gain": max(gain, state["gain"]), "number": number + 1}
        if better:
            state["best"] = copy.deepcopy(state["average"])
        state |= {"weights": weights, "optimiser": copy.deepcopy(optimiser.state_dict())}
        yield Round(number + 1, float(torch.stack(losses).mean()), gain, copy.deepcopy(state))


def fit_head(
    estimator: E,
    denoiser: Denoiser,
    images: Tensor,
    noise: NoiseSource,
    config: FitConfig | None = None,
    *,
    resume: Round | None = None,
    progress: Callable[[Round], object] | None = None,
) -> HeadFit[E]:
    """Trains a head, decides by held-out likelihood where it is used, and measures what it gains.

    Args:
        estimator, denoiser, images, noise, config, resume: as in `rounds`.
        progress: called after every round.
    """
    config = FitConfig() if config is None else config
    stop, report = _split(len(images))
    head, last = estimator.network, resume
    for record in rounds(estimator, denoiser, images, noise, config, resume):
        last = record
        if progress is not None:
            progress(record)
    assert last is not None, "a fit has at least one round"
    head.load_state_dict(last.state["best"])
    head.eval().requires_grad_(False)
    judge = _Judge(denoiser, images[stop:report], stop, config, noise, head.low, head.high)
    trust = _trust(estimator, judge)
    estimator = estimator.trusted(trust)
    final = _Judge(denoiser, images[report:], report, config, noise, head.low, head.high)
    gain = final.measure(estimator).likelihood() - final.measure(estimator.trusted(NOWHERE)).likelihood()
    an_image = gain.mean(0)
    n = len(an_image)
    visits = -(-config.pool // stop)
    nfe = denoiser.nfe * (
        last.number * visits * stop * estimator.declares.training_nfe
        + config.knots * config.replicates * (2 * (report - stop) + n)
    )
    measured = HeadReport(
        float(an_image.mean()),
        float(an_image.std() / n**0.5) if n > 1 else float("nan"),
        final.logsnr,
        gain.mean(1),
        trust.factor,
        (stop, report - stop, n),
        last.number,
        nfe,
    )
    return HeadFit(estimator, measured)


def _trust(estimator: HeadEstimator, judge: _Judge) -> Trust:
    """At each knot the factor of 0, 1/2 and 1, with the shift that standardises residuals, of the best likelihood.

    It is 0, the table as it was calibrated, unless the gain exceeds a standard error over images.
    """
    knots = tuple(judge.logsnr.tolist())
    none = judge.measure(estimator.trusted(NOWHERE)).likelihood()
    factors, shifts, best = (torch.zeros(len(knots), dtype=torch.float64) for _ in range(3))
    for factor in (0.5, 1.0):
        fitness = judge.measure(estimator.trusted(Trust(knots, (factor,) * len(knots))))
        gain = fitness.likelihood(fitness.best_shift) - none
        n = gain.shape[1]
        mean, se = gain.mean(1), gain.std(1) / n**0.5 if n > 1 else torch.zeros(len(knots))
        take = (mean > se) & (mean > best)
        factors, best = torch.where(take, factor, factors), torch.where(take, mean, best)
        shifts = torch.where(take, fitness.best_shift, shifts)
    return Trust(knots, tuple(factors.tolist()), tuple(shifts.tolist()))
