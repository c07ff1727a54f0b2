"""The linear-Gaussian policy: everything about it is known, and noise can be integrated exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.process import CosineVP, NoiseSource, ReverseKernel, Schedule
from lowvar.reward import Floor, Policy
from lowvar.testing.affine import AffineDenoiser, HermiteNoise, exact_affine, linear_policy
from lowvar.testing.tuning import LinearPolicy

REWARD = [-2.25, 3.0, -1.0]  # -(x - 1.5)^2
FLOOR = 0.2


def reward(x: Tensor, prompts: object = None) -> Tensor:
    return sum(c * x[:, 0] ** i for i, c in enumerate(REWARD))  # pyright: ignore[reportReturnType]


reward.differentiable = True  # pyright: ignore[reportFunctionMemberAccess]


@dataclass(frozen=True)
class World:
    """A policy of `steps` steps, its exact twin, and noise that is integrated."""

    theta: Tensor
    policy: Policy
    exact: LinearPolicy
    noise: HermiteNoise
    reward: Callable[..., Tensor] = reward
    floor: float = FLOOR

    @property
    def n(self) -> int:
        return len(self.noise.weights)

    def per_run(self, each: Tensor) -> Tensor:
        """Gradients of runs' terms, (n, P), of minus the loss."""
        eye = torch.eye(len(each), dtype=each.dtype)
        return -torch.autograd.grad(each, self.theta, eye, is_grads_batched=True, retain_graph=True)[0].flatten(1)

    def moments(self, each: Tensor) -> tuple[Tensor, float]:
        """Mean and trace of the covariance of -grad each, integrated."""
        g, w = self.per_run(each), self.noise.weights
        mean = w @ g
        return mean, float((w @ g.square() - mean.square()).sum())


def made(
    steps: int = 2, nodes: int = 6, *, schedule: Schedule | None = None, eta: float = 1.0, tied: bool = False
) -> World:
    schedule = CosineVP() if schedule is None else schedule
    grid = torch.linspace(0.95, 0, steps + 1, dtype=torch.float64)
    theta = exact_affine(schedule, grid, 0.5, 0.25) + 0.1
    theta = (theta[0] if tied else theta).clone().requires_grad_()
    denoiser = AffineDenoiser(theta, schedule, grid)
    policy = Policy(denoiser, ReverseKernel(eta=eta, variance="small"), grid, Floor(FLOOR))
    exact = linear_policy(denoiser, REWARD, eta=eta, floor=FLOOR)
    return World(theta, policy, exact, HermiteNoise(steps + 1, nodes))


class Tuples(NoiseSource):
    """Groups of `size` independent runs, integrated: sample i is run i % size of point i // size of a product rule."""

    def __init__(self, size: int, draws: int, nodes: int) -> None:
        self.rule, self.size, self.draws = HermiteNoise(size * draws, nodes), size, draws
        self.weights = self.rule.weights
        self.n = size * len(self.weights)

    def normal(self, index: Any, shape: Any, *, draw: int = 0, dtype: Any = None, device: Any = "cpu") -> Tensor:
        index = torch.as_tensor(index)
        return self.rule.points[index // self.size, index % self.size * self.draws + draw].reshape(-1, *shape)

    def uniform(self, index: Any, shape: Any, *, draw: int = 0, dtype: Any = None, device: Any = "cpu") -> Tensor:
        raise AssertionError("nothing here is uniform")


@pytest.fixture
def tuples() -> Callable[..., Tuples]:
    return Tuples


@pytest.fixture
def world() -> World:
    return made()


@pytest.fixture
def make() -> Callable[..., World]:
    return made
