r"""DDPO and AWM as published, on a `Policy` of this package: the comparators of benchmarks/reward.py.

**DDPO** (Black et al. 2024, the importance-sampling form, and its published code at its settings for full fine-tuning).
An epoch samples a batch, puts its rewards into buffers of the last 16 of each prompt, and takes

    A = (R - mean) / (std + 1e-6)     of the prompt's buffer, of the batch where the buffer has fewer than 16; |A| <= 10
    loss = mean over runs and steps of max(-A rho, -A clip(rho, 1 - c, 1 + c)),   log rho a mean over pixels,

over 4 minibatches of shuffled runs, an AdamW step each (weight decay 1e-4, gradient norm at most 1), one inner epoch.
c = 1e-4 is of latents with 16,384 numbers: 1.64 nats of the whole log ratio; the same in nats is 0.0256 for 64 pixels.
Both are tried. The published code shuffles time steps too, which changes no sum.

**AWM** (Xue et al. 2025). Advantages are (R - mean of the group) / std of the batch, |A| <= 5, and weight the loss that
the network was pretrained with, at noisings of the samples:

    loss = mean over runs, times and pixels of A |v_theta(x_t) - v|^2,

on-policy, one AdamW step a batch. Its times are the sampler's levels, each once a sample (the paper draws 6 of them);
its KL term, of weight 1e-4 to 3e-3, is left out, since KL is measured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowvar.process.noise import NoiseSource
from lowvar.reward import Policy, Rollout
from lowvar.reward.surrogate import replayed

__all__ = ["AWM", "DDPO", "Optimiser", "PromptStatistics"]


@dataclass(frozen=True)
class Optimiser:
    """AdamW as both papers set it."""

    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 1e-4
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0

    def over(self, parameters: list[Tensor], learning_rate: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            parameters, learning_rate, (self.beta1, self.beta2), self.epsilon, weight_decay=self.weight_decay
        )

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[Tensor]) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        optimizer.step()


@dataclass
class PromptStatistics:
    """Rewards of each prompt, the last `size`; a prompt with fewer than `minimum` takes the batch's mean and std."""

    size: int = 16
    minimum: int = 16
    seen: dict[int, deque[float]] = field(default_factory=dict)

    def advantages(self, prompts: Tensor, rewards: Tensor) -> Tensor:
        found = torch.empty_like(rewards)
        for prompt in sorted(set(prompts.tolist())):
            mine = prompts == prompt
            kept = self.seen.setdefault(prompt, deque(maxlen=self.size))
            kept.extend(rewards[mine].tolist())
            own = torch.tensor(list(kept)) if len(kept) >= self.minimum else rewards
            found[mine] = (rewards[mine] - own.mean()) / (own.std(correction=0) + 1e-6)
        return found


@dataclass
class DDPO:
    """Published settings; `learning_rate` and `clip_range` are tuned by the benchmark beside the published ones."""

    learning_rate: float = 3e-5
    clip_range: float = 1e-4
    adv_clip_max: float = 10.0
    minibatches: int = 4
    inner_epochs: int = 1
    optimiser: Optimiser = field(default_factory=Optimiser)
    statistics: PromptStatistics = field(default_factory=PromptStatistics)

    def losses(self, policy: Policy, ran: Rollout, rewards: Tensor, noise: NoiseSource, epoch: int) -> Iterator[Tensor]:
        """The loss of each minibatch in turn: a step of the optimiser belongs between them."""
        A = self.statistics.advantages(ran.prompts, rewards).clamp(-self.adv_clip_max, self.adv_clip_max)
        d = ran.samples[0].numel()
        for inner in range(self.inner_epochs):
            order = noise.uniform([epoch * self.inner_epochs + inner], (ran.n,), dtype=torch.float64)[0].argsort()
            for which in order.chunk(self.minibatches):
                part, weight, total = ran.part(which), A[which], torch.zeros(())
                for row, _, law in replayed(policy, part):
                    rho = ((law.log_prob(part.actions[row]) - part.log_prob[row]) / d).exp()
                    bounded = rho.clamp(1 - self.clip_range, 1 + self.clip_range)
                    total = total + torch.maximum(-weight * rho, -weight * bounded).mean()
                yield total / len(part.steps)


@dataclass
class AWM:
    """Published settings but for what the module says."""

    learning_rate: float = 3e-4
    adv_clip_max: float = 5.0
    optimiser: Optimiser = field(default_factory=Optimiser)

    def advantages(self, groups: Tensor, rewards: Tensor) -> Tensor:
        A = torch.empty_like(rewards)
        for g in groups.unique():
            A[groups == g] = rewards[groups == g] - rewards[groups == g].mean()
        return (A / (rewards.std(correction=0) + 1e-4)).clamp(-self.adv_clip_max, self.adv_clip_max)

    def loss(self, policy: Policy, ran: Rollout, rewards: Tensor, noise: NoiseSource) -> Tensor:
        A = self.advantages(ran.groups, rewards)
        levels, m, n = policy.chain(ran.prompts).levels, policy.steps, ran.n
        level = levels[torch.arange(m).repeat_interleave(n)]
        eps = torch.cat([noise.normal(ran.index, ran.samples.shape[1:], draw=1000 + k) for k in range(m)])
        x0 = ran.samples.repeat(m, 1, 1, 1)
        alpha, sigma = (v.to(x0)[:, None, None, None] for v in (level.alpha, level.sigma))
        x = alpha * x0 + sigma * eps
        guess = policy.bound(ran.prompts.repeat(m))(x, level).mean
        velocity = (alpha * (x - alpha * guess) / sigma - sigma * guess) - (alpha * eps - sigma * x0)
        return (A.repeat(m) * velocity.square().flatten(1).mean(1)).mean()
