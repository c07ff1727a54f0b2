"""The profile of a training gradient within a budget of time: sources, noise scale, techniques, verdict.

Two measurements take turns at the clock: crossed blocks until their part of the time is over, then replicate batches of
the techniques until the rest is. Both have a least size, below which there is no interval, whatever the budget; what
more time would have narrowed stands in the intervals. Inner products are exact where 8 gradients fit the memory given,
and sketched by random directions where they do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from lowvar.data import Images
from lowvar.errors import UserError
from lowvar.metrics.intervals import MIN_BLOCKS
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.noise import Independent
from lowvar.profile.crossed import CELLS, Crossed, Decomposition
from lowvar.profile.excess import LevelError, level_errors
from lowvar.profile.faults import error_fault
from lowvar.profile.gradient import CrossedDraws, crossed_blocks
from lowvar.profile.inner import Exact, InnerProducts, Sketched, parameter_groups
from lowvar.profile.techniques import TECHNIQUES, Measured, Reduction, Technique, measure, plain_times_of
from lowvar.profile.verdict import Advice, advise, ranked
from lowvar.train import LognormalTimes, Objective, config_from, make_objective
from lowvar.train.timesteps import FixedTimes
from lowvar.train.validation import logsnr_edges

__all__ = ["TrainingProfile", "inner_products", "own_times", "plain_objective", "profile_training", "recipe_times"]

_SHARE = 0.4  # of the time: crossed blocks
_ERRORS = 0.1  # likewise: errors by noise level
_MOST_BLOCKS, _MOST_REPLICATES = 4096, 256
_DIRECTIONS = 8
_LEAST, _HELD_OUT = 128, 256  # held-out images
_NOISE = 2**40  # the directions' own numbers


@dataclass(frozen=True)
class TrainingProfile:
    """What was found.

    Attributes:
        sources: the variance of one sample's gradient, by source, layer group and noise level.
        edges: of the noise-level bins in logsnr, decreasing.
        groups: names of the layer groups.
        sketched: random directions a block, 0 where gradients were exact.
        replicates: batches of each technique.
        reductions: what techniques do.
        batch_size: that they were measured at.
        verdict: what to do.
        seconds: that it took.
        errors: by noise level, beside a linear denoiser's; () without held-out images, or where these are all alike.
    """

    sources: Decomposition
    edges: tuple[float, ...]
    groups: tuple[str, ...]
    sketched: int
    replicates: int
    reductions: tuple[Reduction, ...]
    batch_size: int
    verdict: tuple[Advice, ...]
    seconds: float
    errors: tuple[LevelError, ...] = ()


def plain_objective(denoiser: NetworkDenoiser, levels: int | None) -> Objective:
    """The plain loss of a network: the squared error of its target, and its variance head's usual term.

    Args:
        denoiser: the network.
        levels: grey levels of the data.
    """
    head = {None: "none", "range": "range"}.get(denoiser.head, "logvar")
    return make_objective(config_from({"head": head}), levels)


def recipe_times(denoiser: NetworkDenoiser) -> FixedTimes:
    """The usual times of a network's kind: lognormal for EDM's, uniform for the others."""
    return LognormalTimes(denoiser.schedule) if denoiser.prediction == "edm" else plain_times_of(denoiser)


def own_times(denoiser: NetworkDenoiser) -> str:
    """What the setting `times` calls them.

    Example:
        >>> from lowvar.process import CosineVP
        >>> own_times(NetworkDenoiser(lambda x, t: x, CosineVP(), "epsilon"))
        'uniform'
    """
    return "lognormal" if denoiser.prediction == "edm" else "uniform"


@contextmanager
def _without_gradients(network: torch.nn.Module) -> Iterator[None]:
    parameters = [p for p in network.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def inner_products(network: torch.nn.Module, memory: float, seed: int) -> InnerProducts:
    """Exact ones where 8 gradients fit `memory` bytes beside their copy, sketched ones otherwise."""
    groups = parameter_groups(network)
    size = sum(w.numel() * 4 for group in groups.values() for w in group)
    if 2 * CELLS * size <= memory:
        return Exact(groups)
    return Sketched(groups, _DIRECTIONS, Independent(seed + _NOISE))


def profile_training(
    denoiser: NetworkDenoiser,
    images: Images,
    *,
    levels: int | None = None,
    batch_size: int = 64,
    trained: int | None = None,
    techniques: Sequence[Technique] = TECHNIQUES,
    conditional: bool = False,
    held_out: Images | None = None,
    minutes: float = 5.0,
    memory: float = 4e9,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[float], Any] | None = None,
) -> TrainingProfile:
    """Profiles the training gradient of a network at its weights.

    Args:
        denoiser: the network, its parameters with gradients.
        images: the training split.
        levels: grey levels of the data, for the term of a learned-range head.
        batch_size: B of the techniques, a multiple of 4.
        trained: batch that the network was trained with, which the verdict is about; None: `batch_size`.
        techniques: what to measure.
        conditional: whether the network is conditioned on the images' labels.
        held_out: other images, on which errors by noise level are measured; None: they are not.
        minutes: budget; at least 16 blocks and 16 replicates are made whatever it is.
        memory: bytes that gradients may take.
        seed: of all draws.
        device: of the network.
        progress: called with the part of the work done, in [0, 1], as it goes.

    Raises:
        UserError: for a budget that is not above 0, or a network without parameters that require gradients.
    """
    if not minutes > 0:
        raise UserError(f"minutes is {minutes:g}; give a number above 0, for example 5")
    if not any(p.requires_grad for p in cast("Any", denoiser.network).parameters()):
        raise UserError(
            "the network has no parameters that require gradients, so there is no training gradient to profile; call "
            "network.requires_grad_(True), or leave the training part out"
        )
    begun = time.perf_counter()

    def spent() -> float:
        return (time.perf_counter() - begun) / (60 * minutes)

    def told(part: float) -> None:
        if progress is not None:
            progress(min(part, 1.0))

    network: Any = denoiser.network
    objective, times = plain_objective(denoiser, levels), recipe_times(denoiser)
    inner = inner_products(network, memory, seed)
    edges = logsnr_edges(denoiser.schedule, max(denoiser.schedule.t_min, 1e-5))
    draws = CrossedDraws(images, times, Independent(seed + 1))
    labels = images.labels if conditional else None
    blocks = crossed_blocks(denoiser, objective, draws, inner, edges, labels=labels, device=device)
    found: list[Crossed] = []
    for block in blocks:
        found.append(block)
        told(min(spent(), _SHARE))
        if len(found) >= MIN_BLOCKS and (spent() >= _SHARE or len(found) >= _MOST_BLOCKS):
            break
    sources = Crossed.joined(found).decomposition(len(edges) - 1)
    errors: tuple[LevelError, ...] = ()
    if held_out is not None and len(held_out) > 1:
        plain = plain_times_of(denoiser)
        each = spent() * 60 * minutes / (3 * CELLS * len(found))  # an evaluation is about a third of a gradient
        limit = int(min(max(_ERRORS * 60 * minutes / (4 * each), _LEAST), _HELD_OUT))
        known = (images.labels, held_out.labels) if conditional else (None, None)
        with _without_gradients(network):
            errors = level_errors(
                denoiser,
                objective,
                images,
                held_out,
                plain,
                limit=limit,
                train_labels=known[0],
                labels=known[1],
                device=device,
            )
    last = Measured(0, ())
    numbers = int(memory / (4 * (len(techniques) + 1) * _MOST_REPLICATES))
    for record in measure(
        denoiser,
        objective,
        images,
        techniques=techniques,
        replicates=_MOST_REPLICATES,
        batch_size=batch_size,
        times=times,
        conditional=conditional,
        seed=seed + 2,
        device=device,
        numbers=max(numbers, 4096),
    ):
        last = record
        told(spent())
        if spent() >= 1:
            break
    told(1.0)
    trained = batch_size if trained is None else trained
    fault = error_fault(errors, sources.noise_scale, trained, own_times(denoiser)) if errors else None
    lines = advise(sources, last.reductions, trained)
    if fault is not None:
        batch = "batch_size" in fault.settings  # then the noise scale has had its say
        lines = (fault, *(x for x in lines if not (batch and "batch_size" in x.settings)))
    return TrainingProfile(
        sources=sources,
        edges=tuple(edges),
        groups=tuple(parameter_groups(network)),
        sketched=inner.directions if isinstance(inner, Sketched) else 0,
        replicates=last.replicates,
        reductions=last.reductions,
        batch_size=batch_size,
        verdict=ranked(lines),
        seconds=time.perf_counter() - begun,
        errors=errors,
    )
