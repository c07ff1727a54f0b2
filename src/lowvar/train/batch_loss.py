"""The losses of an update's draws, whoever asks for them: the update itself, or what is measured on the side.

Classes, some of them dropped, the target's references and the seed of dropout are functions of the update's number, so
an interrupted run goes on to the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowvar.process.denoiser import NetworkDenoiser
from lowvar.train.conditional import Classes, of_classes
from lowvar.train.draws import Draws
from lowvar.train.objectives import Losses, Objective
from lowvar.train.stable_target import ReferencePlan
from lowvar.train.targets import PlainTarget, Target

__all__ = ["BatchLoss", "weighted_mean"]


def weighted_mean(draws: Draws, losses: Losses) -> Tensor:
    """The loss of a batch, ()."""
    return (draws.weight.to(losses.loss) * losses.loss).mean()


@dataclass(frozen=True)
class BatchLoss:
    """Losses of draws.

    Attributes:
        objective: what is minimised.
        as_denoiser: how a network is read.
        classes: of a conditional run.
        references: of target `stable`.
        seed: of dropout.
        drops: whether the network has dropout, which draws from torch's generators.
        device: of the network.
    """

    objective: Objective
    as_denoiser: Callable[[nn.Module], NetworkDenoiser]
    classes: Classes | None
    references: ReferencePlan | None
    seed: int
    drops: bool
    device: torch.device

    def target(self, update: int, draws: Draws) -> Target:
        """The target of an update's draws."""
        if self.references is None:
            return PlainTarget()
        labels = None if self.classes is None else self.classes.known(draws.number, draws.image)
        return self.references.target(update, self.device, labels)

    def losses(self, network: nn.Module, update: int, draws: Draws, target: Target, number: int) -> Losses:
        """The losses; dropout is a function of the update and of `number`."""
        denoiser = self.as_denoiser(network)
        if self.classes is not None:
            denoiser = of_classes(denoiser, self.classes.labels(draws.number, draws.image).to(self.device))
        with self._seeded(update, number):
            return self.objective.losses(denoiser, draws.x0, draws.eps, draws.level, target)

    @contextmanager
    def _seeded(self, update: int, number: int) -> Iterator[None]:
        if not self.drops:
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(hash((self.seed, update, number)))
            yield
