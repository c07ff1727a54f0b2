r"""A learned value: V(x_t, t) ~ E[R | x_t], as a baseline a step.

A small network on (x0_hat(x_t), K - t, prompt's number) is regressed on the rewards of earlier batches. It predicts a
batch before it is fitted to it, so it knows nothing of that batch's noise: no bias. Rewards are taken in standard units
of what it has seen.

    b = value.predict(ran)                        # (m, n), before
    value.fit(ran, rewards, optimizer)            # after
    A = advantages(rewards, ran.groups, baseline=b)
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from lowvar.process.noise import Independent
from lowvar.reward.rollout import Rollout

__all__ = ["ValueNetwork"]


class ValueNetwork(nn.Module):
    """A multilayer perceptron with two hidden layers.

    Args:
        d: numbers in a sample.
        steps: K of the policy.
        prompts: number of prompts; groups are then their numbers, below it (`History` sees to it in `Scores` and
            `Tuner`). 0: it is not told the prompt.
        width: of the hidden layers.
        seed: of the initial weights.

    Raises:
        ValueError: if a size is below 1.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, PixelBasis, ReverseKernel
        >>> from lowvar.reward import Floor, Policy, rollout
        >>> schedule = CosineVP()
        >>> twin = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.ones(2))
        >>> policy = Policy(twin.denoiser(schedule), ReverseKernel(), torch.linspace(1, 0, 5), Floor(0.1))
        >>> value, left = ValueNetwork(2, 4), []
        >>> optimizer = torch.optim.Adam(value.parameters(), 1e-2)
        >>> for batch in range(30):
        ...     ran = rollout(policy, Independent(0), 64, (2,), first=64 * batch)
        ...     R = ran.samples.sum(1)
        ...     left.append(float((R - value.predict(ran))[-1].var() / R.var()))
        ...     _ = value.fit(ran, R, optimizer)
        >>> left[0] == 1.0, left[-1] < 0.2
        (True, True)
    """

    mean: Tensor
    square: Tensor
    count: Tensor

    def __init__(self, d: int, steps: int, prompts: int = 0, width: int = 64, seed: int = 0) -> None:
        if min(d, steps, width) < 1 or prompts < 0:
            raise ValueError(f"d {d}, steps {steps}, width {width}, prompts {prompts}: sizes are at least 1")
        super().__init__()
        self.steps, self.prompts = steps, prompts
        self.layers = nn.Sequential(
            nn.Linear(d + 4 + prompts, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )
        for name in ("mean", "square", "count"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        with torch.no_grad():
            for i, layer in enumerate(m for m in self.layers if isinstance(m, nn.Linear)):
                w = Independent(seed).normal([i], layer.weight.shape)[0]
                layer.weight.copy_(w / math.sqrt(layer.in_features))
                layer.bias.zero_()
            cast("nn.Linear", self.layers[-1]).weight.zero_()  # begins at the mean

    @property
    def std(self) -> Tensor:
        """Standard deviation of the rewards seen; 1 before there are two."""
        varies = (self.count > 1) & (self.square > 0)
        return torch.where(varies, self.square / self.count.clamp_min(1), 1.0).sqrt()

    def _inputs(self, ran: Rollout) -> Tensor:
        if ran.x0_hat is None:
            raise ValueError("the rollout kept no x0_hat; make it with x0_hat=True")
        x = ran.x0_hat.flatten(2).to(ran.samples.device)
        t = torch.tensor(ran.steps, dtype=x.dtype, device=x.device) / self.steps
        wave = torch.stack([t, 1 / (1.05 - t), torch.sin(math.pi * t), torch.cos(math.pi * t)], 1)
        parts = [x, wave[:, None].expand(-1, ran.n, -1)]
        if self.prompts:
            one_hot = nn.functional.one_hot(ran.groups, self.prompts).to(x)
            parts.append(one_hot.expand(len(ran.steps), -1, -1))
        return torch.cat(parts, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        """V in standard units, (m, n)."""
        return self.layers(inputs)[..., 0]

    @torch.no_grad()
    def predict(self, ran: Rollout) -> Tensor:
        """V(x_t, t) of a rollout's states, (m, n): a baseline of `advantages`."""
        dtype = next(self.parameters()).dtype
        return (self.mean + self.std * self(self._inputs(ran).to(dtype)).double()).to(ran.samples.dtype)

    def fit(self, ran: Rollout, rewards: Tensor, optimizer: torch.optim.Optimizer, *, updates: int = 8) -> float:
        """Fits to a batch, and returns the last mean squared error in standard units.

        Args:
            ran: the rollout.
            rewards: (n,).
            optimizer: of its parameters.
            updates: gradient steps, each on the whole batch.
        """
        R = rewards.detach().double()
        n, shift = len(R), R.mean() - self.mean
        count = self.count + n
        self.square += (R - R.mean()).square().sum() + shift**2 * self.count * n / count
        self.mean += shift * n / count
        self.count.copy_(count)
        target = ((R - self.mean) / self.std).to(next(self.parameters()).dtype)
        inputs, loss = self._inputs(ran).to(target.dtype), torch.zeros(())
        for _ in range(updates):
            loss = (self(inputs) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())
