r"""What each technique of training takes off the gradient's variance, measured on a model and its data.

With G the mean gradient of a batch of B draws, the variance-reduction factor of a technique is

    vrf = tr Cov G_plain / (c tr Cov G_technique),

c its network evaluations a batch over plain's (1 for all of these): how much smaller a batch would do. Both variances
are those of R replicate batches at the model's weights, from the inner products of their gradients,

    tr Cov G  =  (sum_r ||G_r||^2 - ||sum_r G_r||^2 / R) / (R - 1),

with the jackknife's interval over replicates on the log of the ratio (replicates of plain and of the technique have
other noise, so their errors add). Replicates are interleaved, so seconds compare too. Of a large network the gradient
at some of its numbers, evenly spread, stands for all.

Times that learn are learned first, on draws of which no replicate knows; what that costs a run in place is in the
benchmark of the trainer. Techniques that the data have too few dimensions for (four orthogonal noises in a table of
three columns) are left out. Expected gradients of all of these are plain's: they are labelled unbiased, and tests of
`train` enumerate it.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowvar.data import Images
from lowvar.metrics.intervals import MIN_BLOCKS, Replicates
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.discrete import DiscreteVP
from lowvar.process.noise import Independent
from lowvar.train import DrawPlan, GradientNormTimes, LossSecondMomentTimes, Objective, config_from
from lowvar.train.config import make_pairing
from lowvar.train.draws import rows_of
from lowvar.train.noise_probe import flat_gradient
from lowvar.train.noise_scale import moments_of_sums
from lowvar.train.pairs import OrthogonalNoise
from lowvar.train.stable_target import ReferencePlan, reference_noise
from lowvar.train.targets import PlainTarget
from lowvar.train.timesteps import FixedTimes, Times, UniformTimes

__all__ = ["TECHNIQUES", "Measured", "Reduction", "Technique", "measure", "plain_times_of"]

_PILOT = 1000  # number of the first replicate's update: those before it are the pilot's
_LOSSES, _NORMS, _ROUNDS = 256, 16, 6  # draws a round of learning from losses, from gradient norms; rounds
_REFERENCES = 1024
_LEAST = 1e-300  # of a variance: a technique may leave none


@dataclass(frozen=True)
class Technique:
    """A way to draw a batch.

    Attributes:
        name: what a report calls it.
        settings: of `lowvar train`, by name.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The words for `lowvar train`, or the lines of its config.

        Example:
            >>> Technique("cross pairs", {"pairing": "cross", "stratified": True}).command
            'in the config of lowvar train: pairing: cross, stratified: true'
            >>> Technique("auto", {"variance_reduction": "auto"}).command
            'lowvar train --variance-reduction auto'
        """
        if set(self.settings) <= {"variance_reduction"}:
            return " ".join(["lowvar train", *(f"--variance-reduction {v}" for v in self.settings.values())])
        lines = [f"{k}: {str(v).lower()}" for k, v in self.settings.items()]
        return f"in the config of lowvar train: {', '.join(lines)}"


CROSS: Mapping[str, Any] = {"pairing": "cross", "stratified": True}
TECHNIQUES: tuple[Technique, ...] = (
    Technique("stratified times", {"stratified": True}),
    Technique("same-image pairs", {"pairing": "same"}),
    Technique("cross pairs", {"pairing": "cross"}),
    Technique("orthogonal noise", {"pairing": "orthogonal"}),
    Technique("sobol points", {"pairing": "sobol"}),
    Technique("times by losses", {"times": "loss-second-moment"}),
    Technique("times by gradient norms", {"times": "gradient-norm"}),
    Technique("stable target", {"target": "stable"}),
    Technique("cross pairs, stratified times", CROSS),
    Technique("stable target, cross pairs, stratified times", {"target": "stable", **CROSS}),
    Technique("auto", {"variance_reduction": "auto"}),
)


@dataclass(frozen=True)
class Reduction:
    """What a technique does to the variance.

    Attributes:
        name: the technique's.
        vrf, low, high: factor at equal evaluations, with its 95% interval.
        cost: median time of a batch over plain's.
        command: words that apply it.
        settings: of `lowvar train` that apply it.
    """

    name: str
    vrf: float
    low: float
    high: float
    cost: float
    command: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """`helps`, `harms` or `does nothing that can be told`.

        Example:
            >>> Reduction("sobol points", 1.9, 1.7, 2.1, 1.02, "").verdict
            'helps'
        """
        return "helps" if self.low > 1 else "harms" if self.high < 1 else "does nothing that can be told"


@dataclass(frozen=True)
class Measured:
    """A record of `measure`: what the replicates so far say; the last has all of them."""

    replicates: int
    reductions: tuple[Reduction, ...]


def plain_times_of(denoiser: NetworkDenoiser) -> UniformTimes:
    """Uniform times of a network: on its table of timesteps, or continuous ones.

    Example:
        >>> from lowvar.process import CosineVP
        >>> plain_times_of(NetworkDenoiser(lambda x, t: x, CosineVP(), "epsilon")).steps is None
        True
    """
    schedule = denoiser.schedule
    return UniformTimes(schedule.steps if isinstance(schedule, DiscreteVP) else None, max(schedule.t_min, 1e-5))


class _Method:
    """A technique on a network and its data: losses of replicate batches."""

    def __init__(
        self,
        technique: Technique,
        denoiser: NetworkDenoiser,
        objective: Objective,
        images: Images,
        batch_size: int,
        plain: FixedTimes,
        seed: int,
        device: torch.device,
        conditional: bool,
    ) -> None:
        config = config_from({"batch_size": batch_size, **technique.settings})
        self.denoiser, self.objective, self.device, self.technique = denoiser, objective, device, technique
        self.labels = images.labels if conditional else None
        noise = Independent(seed)
        self.plan = DrawPlan(
            images,
            denoiser.schedule,
            batch_size,
            seed,
            noise,
            pairing=make_pairing(config),
            stratified=config.stratified,
        )
        self.references = None
        if config.target == "stable":
            count = min(_REFERENCES, len(images))
            self.references = ReferencePlan(images, count, reference_noise(seed), labels=self.labels)
        self.times: Times = plain
        if config.times == "gradient-norm":
            self.times = self._learned(GradientNormTimes(plain=plain), _NORMS, seed)
        elif config.times == "loss-second-moment":
            self.times = self._learned(LossSecondMomentTimes(64, plain=plain), _LOSSES, seed)

    def losses(self, draws: Any, update: int) -> Tensor:
        """Losses of draws, unweighted."""
        denoiser, known = self.denoiser, None
        if self.labels is not None:
            known = self.labels[draws.image]
            denoiser = copy.copy(denoiser)
            denoiser.conditioning = {**self.denoiser.conditioning, "class_labels": known.to(self.device)}
        target = PlainTarget() if self.references is None else self.references.target(update, self.device, known)
        return self.objective.losses(denoiser, draws.x0, draws.eps, draws.level, target).loss

    def batch(self, replicate: int) -> Tensor:
        """The weighted mean loss of a replicate batch, with its graph."""
        update = _PILOT + replicate
        draws = self.plan.draws(update, self.times, device=self.device)
        losses = self.losses(draws, update)
        return (draws.weight.to(losses) * losses).mean()

    def _learned(self, times: Times, size: int, seed: int) -> Times:
        """From stratified draws of a pilot, round by round at the density so far."""
        norms = times.learns_from == "squared gradient norms"
        plan = DrawPlan(self.plan.images, self.denoiser.schedule, size, seed, Independent(seed), stratified=True)
        weights = _weights(self.denoiser.network)
        for update in range(_ROUNDS if not norms else 2 * _ROUNDS):
            draws = plan.draws(update, times, device=self.device)
            if norms:
                one = [rows_of(draws, slice(k, k + 1)) for k in range(size)]
                seen = torch.stack([flat_gradient(self.losses(d, update).sum(), weights).square().sum() for d in one])
            else:
                with torch.no_grad():
                    seen = self.losses(draws, update)
            times = times.updated(draws.bin, seen.detach().cpu())
        return times


def _fits(technique: Technique, batch_size: int, d: int) -> bool:
    """Whether data of d dimensions allow a technique."""
    pairing = make_pairing(config_from({"batch_size": batch_size, **technique.settings}))
    return not isinstance(pairing, OrthogonalNoise) or pairing.size <= d


def _weights(network: Any) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def measure(
    denoiser: NetworkDenoiser,
    objective: Objective,
    images: Images,
    *,
    techniques: Sequence[Technique] = TECHNIQUES,
    replicates: int = 32,
    batch_size: int = 64,
    times: FixedTimes | None = None,
    conditional: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    numbers: int = 2**19,
) -> Iterator[Measured]:
    """Measures techniques beside plain draws.

    Args:
        denoiser: the network.
        objective: what is minimised.
        images: the training split.
        techniques: what to measure.
        replicates: R batches of each, at least 16.
        batch_size: B, a multiple of 4.
        times: the recipe's own density of times (default: uniform).
        conditional: whether the network is conditioned on the images' labels.
        seed: of all draws.
        device: of the network.
        numbers: of a gradient that are kept, R times and for every technique.

    Yields:
        A record after the 16th replicate and every 8 more; the last has all.

    Raises:
        ValueError: for fewer than 16 replicates or a batch that does not divide into groups of 4.

    Example:
        >>> from lowvar.data import TensorImages
        >>> from lowvar.process import CosineVP
        >>> from lowvar.train import Simple
        >>> class Line(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(2, 2)
        ...     def forward(self, x, timestep):
        ...         return self.layer(x)
        >>> images = TensorImages(Independent(0).uniform(range(50), (2,)))
        >>> line = NetworkDenoiser(Line(), CosineVP(), "v_prediction")
        >>> pairs = Technique("cross pairs", {"pairing": "cross"})
        >>> *_, last = measure(line, Objective(Simple()), images, techniques=[pairs], replicates=16, batch_size=8)
        >>> last.replicates, [r.name for r in last.reductions]
        (16, ['cross pairs'])
    """
    if replicates < MIN_BLOCKS or batch_size < 4 or batch_size % 4:
        raise ValueError(
            f"{replicates} replicates of batches of {batch_size}; give at least {MIN_BLOCKS} replicates, and batches "
            "that are a multiple of 4, so that pairs and groups fit"
        )
    plain = plain_times_of(denoiser) if times is None else times
    where = torch.device(device)
    d = images.images(torch.zeros(1, dtype=torch.int64))[0].numel()
    made = (Technique("plain"), *(t for t in techniques if _fits(t, batch_size, d)))
    methods = [
        _Method(t, denoiser, objective, images, batch_size, plain, seed + 1 + k, where, conditional)
        for k, t in enumerate(made)
    ]
    weights = _weights(denoiser.network)
    total = sum(w.numel() for w in weights)
    kept = torch.arange(0, total, max(math.ceil(total / numbers), 1), device=where)
    gradients: list[list[Tensor]] = [[] for _ in methods]
    seconds: list[list[float]] = [[] for _ in methods]
    for r in range(replicates):
        for k, method in enumerate(methods):
            begun = time.perf_counter()
            g = flat_gradient(method.batch(r), weights)
            seconds[k].append(time.perf_counter() - begun)
            gradients[k].append(g[kept].cpu())
        n = r + 1
        if n == replicates or (n >= MIN_BLOCKS and n % 8 == 0):
            yield Measured(n, _reductions(made, gradients, seconds))


def _reductions(
    made: Sequence[Technique], gradients: Sequence[Sequence[Tensor]], seconds: Sequence[Sequence[float]]
) -> tuple[Reduction, ...]:
    shift = torch.stack(list(gradients[0])).mean(0)  # what differs, without cancellation in float32
    traces = [_traces(torch.stack(list(g)) - shift) for g in gradients]
    (plain, plain_without), rest = traces[0], traces[1:]
    sizes = torch.ones(len(plain_without), dtype=torch.int64)
    found = []
    for k, (own, without) in enumerate(rest, start=1):
        # two independent sets of replicates: the errors of the two logs add
        parts = [
            Replicates(math.log(max(v, _LEAST)), w.clamp_min(_LEAST).log(), sizes).interval()
            for v, w in ((plain, plain_without), (own, without))
        ]
        value = parts[0].value - parts[1].value
        reach = math.hypot(*(p.high - p.value for p in parts))
        ratio = sorted(a / b for a, b in zip(seconds[k], seconds[0], strict=True))[len(seconds[0]) // 2]
        vrf, low, high = (math.exp(v) for v in (value, value - reach, value + reach))
        found.append(Reduction(made[k].name, vrf, low, high, ratio, made[k].command, dict(made[k].settings)))
    return tuple(found)


def _traces(g: Tensor) -> tuple[float, Tensor]:
    """tr Cov of rows (R, P), and without each row, (R,)."""
    gram = (g @ g.T).double()
    n = len(g)
    diagonal, rows, whole = gram.diagonal(), gram.sum(1), gram.sum()
    out = moments_of_sums(diagonal.sum() - diagonal, whole - 2 * rows + diagonal, n - 1, 1)[1]
    return float(moments_of_sums(diagonal.sum(), whole, n, 1)[1]), out
