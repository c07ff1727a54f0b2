r"""What benchmarks/reward.py tunes: a class-conditional network of digits, its chain, three rewards.

- Network: a residual MLP of 71,000 parameters on the 64 pixels, trained by `lowvar.train.fit` on 8x8 digits with
  classes, 2,000 updates (a U-Net of that size costs 30 times as much an evaluation on a processor, which would leave
  single seeds);
- chain: DDPM, 20 steps, eta 1, cosine schedule, the posterior variance of a step, a floor of 0.05 at the last step so
  that it has a density, the same for every method; x0_hat is not clipped;
- a batch is 120 runs, 12 of each class: a class is a prompt and a group;
- rewards: brightness and minus the JPEG size as `lowvar.metrics` has them, and the score of "8" by the metrics'
  classifier before its softmax.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowvar.data import load
from lowvar.metrics import Scorer, statistic_named
from lowvar.metrics.features import trained_classifier
from lowvar.models import ResidualMLP
from lowvar.process import NetworkDenoiser, ReverseKernel
from lowvar.process.grid import trailing
from lowvar.reward import Floor, Policy, RewardProblem, Rollout, edges
from lowvar.train import TrainConfig, fit
from lowvar.train.parts import make_schedule

ROOT = Path(__file__).resolve().parents[1]
BUILD = Path(os.environ.get("LOWVAR_BENCHMARKS", ROOT / "build" / "benchmarks")) / "reward"
SHAPE, CLASSES, GROUP, STEPS, FLOOR, TARGET_CLASS = (1, 8, 8), 10, 12, 20, 0.05, 8
BATCH = CLASSES * GROUP
CONFIG = TrainConfig(updates=2000, head="none", conditional=True, condition_dropout=0.0, lr=2e-3, validate_every=2000)
SCHEDULE = make_schedule(CONFIG)
REWARDS = ("brightness", "logit", "jpeg")


class FlatMLP(nn.Module):
    """`ResidualMLP` on the pixels of an image."""

    def __init__(self, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.mlp = ResidualMLP(64, 64, width, blocks, num_class_embeds=CLASSES + 1)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return self.mlp(x.flatten(1), timestep, class_labels=class_labels).sample.reshape(x.shape)


@cache
def digits() -> Any:
    return load("digits")


@cache
def scorer() -> Scorer:
    return Scorer(digits(), metrics=("energy",), blocks=16)


@cache
def classifier() -> nn.Module:
    return trained_classifier(digits(), cache=BUILD)


def trained() -> FlatMLP:
    """The network before tuning, trained once and kept as safetensors."""
    from safetensors.torch import load_file, save_file

    path, network = BUILD / "network.safetensors", FlatMLP()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fitted = fit(digits(), CONFIG, network=network, device="cpu", progress=False)
        save_file(fitted.network.state_dict(), path)
        print(f"network trained, validation loss {fitted.last.validation.loss:.4f}", flush=True)
        network = FlatMLP()
    network.load_state_dict(load_file(path))
    return network.eval()


def policy_of(network: nn.Module, steps: int = STEPS) -> Policy:
    def denoiser(labels: Tensor) -> NetworkDenoiser:
        return NetworkDenoiser(network, SCHEDULE, "v_prediction", conditioning={"class_labels": labels})

    return Policy(denoiser, ReverseKernel(variance="small"), trailing(SCHEDULE, steps), Floor(FLOOR))


def prompts_of(number: Tensor) -> Tensor:
    """The class of a sample number: 12 neighbours have one."""
    return number // GROUP % CLASSES


class Logit:
    """The classifier's score of one class."""

    differentiable = True

    def __call__(self, samples: Tensor, prompts: Any = None, **columns: Any) -> Tensor:
        return classifier()(samples.float())[:, TARGET_CLASS]


class Named:
    """A statistic of `lowvar.metrics` as a reward."""

    def __init__(self, name: str) -> None:
        self.statistic = statistic_named(name)
        self.differentiable = bool(self.statistic.differentiable)

    def __call__(self, samples: Tensor, prompts: Any = None, **columns: Any) -> Tensor:
        return self.statistic(samples)


@cache
def reward_named(name: str) -> Logit | Named:
    return Logit() if name == "logit" else Named(name)


def problem_of(network: nn.Module, reward: str) -> RewardProblem:
    parameters = [p for p in network.parameters() if p.requires_grad]
    return RewardProblem(policy_of(network), reward_named(reward), parameters, SHAPE, prompts_of, GROUP)


def with_edges(x: Tensor) -> Tensor:
    """`edges`, and every pixel: features of a denoised state."""
    return torch.cat([edges(x), x.flatten(1)], 1)


def weighted_gradients(policy: Policy, ran: Rollout, weights: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """sum_t S_t A_t averaged over runs, for several A (m, n) on one evaluation of all steps: (len(weights), P).

    The same as the gradient of minus `surrogate_loss`, which evaluates the steps again for each A.
    """
    chain, m, n = policy.chain(ran.prompts), len(ran.steps), ran.n
    level = chain.levels[torch.tensor(ran.steps).repeat_interleave(n)]
    labels = ran.prompts.repeat(m)
    x0 = policy.bound(labels)(ran.states.flatten(0, 1), level).mean.reshape(ran.states.shape)
    pull = []
    for row, k in enumerate(ran.steps):
        c = chain.plan[k]
        mean = c.a * ran.states[row] + c.kappa * x0[row].detach()
        variance = c.small + (FLOOR**2 if chain.clean(k) else 0.0)
        pull.append(c.kappa * (ran.actions[row] - mean) / variance)
    score = (torch.stack(pull) * x0).flatten(2).sum(2)  # its gradient is that of log p
    found = []
    for A in weights:
        value = (score * A.to(score).expand(m, n)).sum() / n
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        found.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for p, g in zip(parameters, grads, strict=True)
                ]
            )
        )
    return torch.stack(found)
