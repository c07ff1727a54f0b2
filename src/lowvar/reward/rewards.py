r"""Rewards: what a run is worth.

    R = f(samples, prompts, **columns),      samples (n, *shape), R (n,),

any function of that form; counts and answers (whole numbers, booleans) are taken as numbers of the samples' kind. One
that has a derivative in the samples says so, `f.differentiable = True`, and only then is differentiated. Nothing is
lost when one fails: the error names the batch and the runs, and the rollout is still there.

A function may be asynchronous (`async def`): the rewards of several functions are then waited for together, where a
loop is running already (a notebook) by one in a thread of its own.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Reward", "RewardError", "WeightedSum", "evaluated", "is_differentiable", "reward_gradient", "waited"]

Reward = Callable[..., Tensor | Awaitable[Tensor]]


class RewardError(ValueError):
    """A reward that failed on a batch.

    Args:
        what: happened, in a sentence.
        batch: its number.
    """

    def __init__(self, what: str, batch: int = 0) -> None:
        super().__init__(f"batch {batch}: {what}")
        self.what, self.batch = what, batch


def is_differentiable(reward: Reward) -> bool:
    """What the reward says of itself; False unless it says so."""
    return bool(getattr(reward, "differentiable", False))


@dataclass(frozen=True)
class WeightedSum:
    """sum_i w_i f_i(samples, prompts, **columns).

    Args:
        reward_funcs: the rewards (TRL's name).
        reward_weights: one a reward; None: all 1.

    Raises:
        ValueError: if the numbers of both differ.

    Example:
        >>> total = WeightedSum([lambda x, p: x.sum(1), lambda x, p: x.amax(1)], [1.0, 10.0])
        >>> total(torch.tensor([[1.0, 2.0]]), None).tolist(), total.differentiable
        ([23.0], False)
    """

    reward_funcs: Sequence[Reward]
    reward_weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if not self.reward_funcs or len(self.weights) != len(self.reward_funcs):
            raise ValueError(f"{len(self.weights)} weights for {len(self.reward_funcs)} rewards; give one a reward")

    @property
    def weights(self) -> Sequence[float]:
        """One a reward."""
        return [1.0] * len(self.reward_funcs) if self.reward_weights is None else self.reward_weights

    @property
    def differentiable(self) -> bool:
        """Whether all are."""
        return all(is_differentiable(f) for f in self.reward_funcs)

    def __call__(self, samples: Tensor, prompts: Any = None, **columns: Any) -> Tensor:
        """The sum, (n,)."""
        values = waited([f(samples, prompts, **columns) for f in self.reward_funcs])
        return torch.stack([w * v.to(samples) for w, v in zip(self.weights, values, strict=True)]).sum(0)


def waited(given: Sequence[Tensor | Awaitable[Tensor]]) -> list[Tensor]:
    """Values, those of asynchronous functions waited for together."""

    async def one(value: Tensor | Awaitable[Tensor]) -> Tensor:
        return await value if inspect.isawaitable(value) else value  # pyright: ignore[reportReturnType]

    async def every() -> list[Tensor]:
        return list(await asyncio.gather(*(one(value) for value in given)))

    if not any(inspect.isawaitable(value) for value in given):
        return list(given)  # pyright: ignore[reportReturnType]
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(every())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, every()).result()


def evaluated(
    reward: Reward, samples: Tensor, prompts: Any = None, columns: Mapping[str, Any] | None = None, *, batch: int = 0
) -> Tensor:
    """The rewards of a batch, checked.

    Args:
        reward: the function.
        samples: (n, *shape).
        prompts: one a sample, or None.
        columns: further columns of the data, by name.
        batch: its number, for errors.

    Raises:
        RewardError: if the reward raises, returns another shape or a number that is not finite, or has no derivative
            though it says so; its cause is kept.

    Example:
        >>> evaluated(lambda x, prompts: 1 / x[:, 0], torch.tensor([[1.0], [0.0]]), batch=7)
        Traceback (most recent call last):
        lowvar.reward.rewards.RewardError: batch 7: the rewards of runs [1] are not finite (inf); ...
    """
    try:
        values = waited([reward(samples, prompts, **(columns or {}))])[0]
    except Exception as error:
        raise RewardError(f"the reward raised {type(error).__name__}: {error}", batch) from error
    if not isinstance(values, Tensor) or values.shape != (len(samples),):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise RewardError(f"the reward returned {got}; give a tensor of one number a run, ({len(samples)},)", batch)
    if not values.is_floating_point():
        values = values.to(samples.dtype)
    wanted = torch.is_grad_enabled() and samples.requires_grad and is_differentiable(reward)
    if wanted and not values.requires_grad:
        raise RewardError(
            "the reward says that it is differentiable, and its values do not depend on the samples by autograd; "
            "compute them with torch and without detach, or leave out differentiable",
            batch,
        )
    bad = (~torch.isfinite(values)).nonzero()[:, 0]
    if len(bad):
        raise RewardError(
            f"the rewards of runs {bad[:8].tolist()} are not finite ({float(values[bad[0]])}); mend the reward, or "
            "give such samples a low value",
            batch,
        )
    return values


def reward_gradient(reward: Reward, samples: Tensor, prompts: Any = None, **columns: Any) -> tuple[Tensor, Tensor]:
    """R (n,) and dR/dx_0 (n, *shape) at samples.

    Raises:
        ValueError: if the reward does not say that it is differentiable.

    Example:
        >>> def power(x, prompts):
        ...     return (x**2).sum(1)
        >>> power.differentiable = True
        >>> reward_gradient(power, torch.tensor([[1.0, 3.0]]))[1].tolist()
        [[2.0, 6.0]]
    """
    if not is_differentiable(reward):
        raise ValueError("the reward has no derivative; set reward.differentiable = True if it has, or use scores")
    with torch.enable_grad():
        x = samples.detach().requires_grad_()
        values = evaluated(reward, x, prompts, columns)
        return values.detach(), torch.autograd.grad(values.sum(), x)[0]
