r"""What an estimator remembers between batches: running statistics by prompt, and a learned value.

    "running", "running-including", "prompt"    rewards of earlier batches by the prompt's number (`RunningStatistics`)
    "value"                                     a network fitted to earlier batches (`ValueNetwork`)

A batch is judged by what was there before it, then `seen`; so neither costs a bias, but where the name says so. With
several processes the statistics are of all their runs (`gather`), and so the same as of one process with the whole
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowvar.reward.rollout import Rollout
from lowvar.reward.running import RunningStatistics
from lowvar.reward.value import ValueNetwork

__all__ = ["History"]


@dataclass
class History:
    """State of baselines; the one thing of an estimator that changes.

    Args:
        numbers: from sample numbers (n,) to the number of the prompt, the same in every batch; None: one prompt.
        statistics: running statistics.
        value: a value network, or None.
        learning_rate: of its Adam.
        gather: from this process's values (n, ...) to those of all, in the processes' order; None: there is one.
        place: number of this process.

    Example:
        >>> history = History(numbers=lambda index: index % 2, statistics=RunningStatistics(minimum=1, buffer=4))
        >>> history.numbers_of(torch.arange(3)).tolist()
        [0, 1, 0]
    """

    numbers: Callable[[Tensor], Tensor] | None = None
    statistics: RunningStatistics | None = None
    value: ValueNetwork | None = None
    learning_rate: float = 1e-2
    gather: Callable[[Tensor], Tensor] | None = None
    place: int = 0

    def __post_init__(self) -> None:
        """Makes the value's optimiser."""
        self.statistics = RunningStatistics() if self.statistics is None else self.statistics
        self.optimizer = (
            None if self.value is None else torch.optim.Adam(self.value.parameters(), lr=self.learning_rate)
        )

    def numbers_of(self, index: Tensor) -> Tensor:
        """Prompt numbers of samples (n,), (n,)."""
        return torch.zeros_like(index) if self.numbers is None else self.numbers(index)

    def whole(self, values: Tensor) -> Tensor:
        """Of all processes."""
        return values if self.gather is None else self.gather(values)

    def mine(self, values: Tensor, n: int) -> Tensor:
        """This process's n of all processes' values, along the last axis."""
        return values if self.gather is None else values[..., self.place * n : (self.place + 1) * n]

    def told(self, ran: Rollout) -> Rollout:
        """The runs with their prompts' numbers as groups, which a value network of prompts is told."""
        return ran if self.numbers is None else replace(ran, groups=self.numbers(ran.index).to(ran.groups))

    def seen(self, ran: Rollout, rewards: Tensor) -> None:
        """Takes note of a batch."""
        assert self.statistics is not None
        numbers = self.numbers_of(ran.index).to(rewards.device)
        self.statistics = self.statistics.updated(self.whole(numbers), self.whole(rewards.detach()))
        if self.value is not None and self.optimizer is not None:
            with torch.enable_grad():
                self.value.fit(self.told(ran), rewards, self.optimizer)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint keeps: JSON-ready values and tensors."""
        s = self.statistics
        assert s is not None
        kept = {"history": {str(k): list(v) for k, v in s.history.items()}, "count": s.count}
        tensors: dict[str, Tensor] = {}
        if self.value is not None and self.optimizer is not None:
            tensors |= {f"value.{name}": v for name, v in self.value.state_dict().items()}
            for i, values in self.optimizer.state_dict()["state"].items():
                tensors |= {f"moment.{i}.{name}": torch.as_tensor(v) for name, v in values.items()}
        return {**kept, "mean": s.mean, "square": s.square}, tensors

    def restore(self, kept: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Goes on from a checkpoint."""
        assert self.statistics is not None
        history = {int(k): tuple(v) for k, v in kept["history"].items()}
        self.statistics = replace(
            self.statistics, history=history, count=kept["count"], mean=kept["mean"], square=kept["square"]
        )
        if self.value is not None and self.optimizer is not None:
            self.value.load_state_dict(
                {k.removeprefix("value."): v for k, v in tensors.items() if k.startswith("value.")}
            )
            whole = self.optimizer.state_dict()
            for key, v in tensors.items():
                if key.startswith("moment."):
                    _, i, name = key.split(".", 2)
                    whole["state"].setdefault(int(i), {})[name] = v
            self.optimizer.load_state_dict(whole)
