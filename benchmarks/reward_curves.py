r"""Tuning runs on digits: reward calls to a fixed reward, and the KL and quality there.

Fixed reward: the mean reward of the network before tuning plus one standard deviation of its samples' rewards, fixed
before any run. Every few updates a run is judged on 240 samples (the same noise for all methods of a seed; no reward
calls of the method): mean reward, exact KL to the network before tuning, energy distance of the samples to held-out
digits, share of samples that the classifier gives the class they were asked for. Calls, KL and quality at the fixed
reward are linear between judgements.

    DDPO, AWM     `reward_peers`, 120 runs a batch
    ours          the estimator of least variance that `reward_variance` found, on-policy, AdamW as the others:
                  pathwise (brightness, logit); for JPEG the surrogate control variate on `edges`, fitted to
                  past batches; 10 runs an update, JPEG 30 (DDPO makes 4 updates with 120); with and without beta KL
                  in the loss (`kl_loss`, which needs no reward calls), beta in standard deviations of the reward a nat

Learning rates are tuned for every method on seed 100 among those of `RATES` (DDPO also with two clips), by two rules:
"fast", fewest calls to the fixed reward, and "careful", least KL there. Ours has, for each, the fewest calls among
settings with no more KL and energy distance than DDPO's; and "least KL", where that is another one, the least KL among
those that also need at most half of its calls.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from reward_peers import AWM, DDPO, Optimiser
from reward_setting import (
    BATCH,
    CLASSES,
    SHAPE,
    classifier,
    policy_of,
    reward_named,
    scorer,
    trained,
)
from torch import Tensor

from lowvar.process import Independent
from lowvar.reward import Policy, Ridge, advantages, edges, kl_loss, pathwise_loss, rollout, surrogate_control

JUDGED, TUNING_SEED, SEEDS = 240, 100, range(5)
METHODS = ("ddpo", "awm", "ours")
CALLS, STOP = 2400, 1.0
RATES = (3e-4, 1e-3, 3e-3)
CLIPS = (1e-4, 2.56e-2)


@dataclass(frozen=True)
class Setting:
    """One way to tune."""

    method: str
    rate: float
    clip: float = 0.0
    batch: int = BATCH
    beta: float = 0.0

    @property
    def name(self) -> str:
        clip = f"-clip{self.clip:g}" if self.clip else ""
        batch = "" if self.batch == BATCH else f"-batch{self.batch}"
        beta = f"-beta{self.beta:g}" if self.beta else ""
        return f"{self.method}-{self.rate:g}{clip}{batch}{beta}"


def settings(method: str, reward: str) -> list[Setting]:
    if method == "ddpo":
        published, same_nats = CLIPS
        clips = [(rate, published) for rate in RATES[:2]] + [(rate, same_nats) for rate in RATES]
        return [Setting(method, rate, clip) for rate, clip in clips]
    if method == "awm":
        return [Setting(method, rate) for rate in RATES]
    batch = 30 if reward == "jpeg" else 10
    pairs = [(3e-4, 0.0), (3e-4, 0.03), (1e-3, 0.03), (3e-4, 0.1), (1e-4, 0.1)]
    return [Setting(method, rate, batch=batch, beta=beta) for rate, beta in pairs]


def labels_of(number: Tensor, batch: int) -> Tensor:
    """Classes in turn, each of a batch's runs in one block."""
    return number // (batch // CLASSES) % CLASSES


class Judge:
    """What stands beside every point of a curve."""

    def __init__(self, reward: str, seed: int) -> None:
        self.reward, self.noise, self.reference = reward_named(reward), Independent(5000 + seed), policy_of(trained())
        self.labels = torch.arange(JUDGED) % CLASSES

    @torch.no_grad()
    def __call__(self, policy: Policy) -> dict[str, float]:
        ran = rollout(policy, self.noise, JUDGED, SHAPE, prompts=self.labels, groups=self.labels, x0_hat=False)
        right = classifier()(ran.samples).argmax(1) == self.labels
        rewards = self.reward(ran.samples)
        return {
            "reward": float(rewards.mean()),
            "std": float(rewards.std()),
            "kl": float(kl_loss(policy, self.reference, ran).kl.sum(0).mean()),
            "energy": float(scorer().score(ran.samples)["energy"].value),
            "right": float(right.double().mean()),
        }


class Ours:
    """Updates by the estimator of least variance."""

    def __init__(self, reward: str, batch: int) -> None:
        self.reward, self.batch = reward_named(reward), batch
        self.samples: list[Tensor] = []
        self.rewards: list[Tensor] = []

    def loss(self, policy: Policy, noise: Independent, first: int) -> Tensor:
        index = first + torch.arange(self.batch)
        labels = labels_of(index, self.batch)
        run: dict[str, Any] = {"first": first, "prompts": labels, "groups": labels}
        if self.reward.differentiable:
            return pathwise_loss(policy, self.reward, noise, self.batch, SHAPE, **run).loss
        surrogate = None
        if self.samples:
            kept = -(-960 // self.batch)
            fit = Ridge.fit(edges(torch.cat(self.samples[-kept:])), torch.cat(self.rewards[-kept:]))

            def surrogate(x: Tensor) -> Tensor:
                return fit(edges(x))

        out = surrogate_control(
            policy,
            self.reward,
            noise,
            self.batch,
            SHAPE,
            surrogate=surrogate,
            advantage=lambda ran, R: advantages(R, ran.groups, baseline="batch"),
            **run,
        )
        self.samples.append(out.samples)
        self.rewards.append(out.rewards)
        return out.loss

    def kl(self, policy: Policy, reference: Policy, noise: Independent, first: int) -> Tensor:
        """The KL's direct part on the same runs (the noise is the same): no reward calls."""
        labels = labels_of(first + torch.arange(self.batch), self.batch)
        run: dict[str, Any] = {"first": first, "prompts": labels, "groups": labels, "x0_hat": False}
        return kl_loss(policy, reference, rollout(policy, noise, self.batch, SHAPE, **run), estimator="direct").loss


def run(reward: str, setting: Setting, seed: int) -> dict[str, Any]:
    """One tuning run, judged along the way; it ends at the fixed reward, or when its calls are used."""
    begun, network, judge, noise = time.process_time(), trained(), Judge(reward, seed), Independent(200 + seed)
    policy, parameters = policy_of(network), list(network.parameters())
    optimiser = Optimiser()
    optimizer = optimiser.over(parameters, setting.rate)
    ddpo, awm, ours = DDPO(clip_range=setting.clip), AWM(), Ours(reward, setting.batch)
    value = reward_named(reward)
    curve, calls, update, seconds = [{"calls": 0, **judge(policy)}], 0, 0, 0.0
    goal = curve[0]["reward"] + STOP * curve[0]["std"]
    while calls < CALLS and curve[-1]["reward"] < goal and math.isfinite(curve[-1]["reward"]):
        begin = time.process_time()
        if setting.method == "ours":
            loss = ours.loss(policy, noise, calls)
            if setting.beta:
                loss = loss + setting.beta * curve[0]["std"] * ours.kl(policy, judge.reference, noise, calls)
            optimiser.step(optimizer, loss, parameters)
        else:
            labels = labels_of(calls + torch.arange(BATCH), BATCH)
            ran = rollout(policy, noise, BATCH, SHAPE, first=calls, prompts=labels, groups=labels, x0_hat=False)
            R = value(ran.samples).detach()
            if setting.method == "ddpo":
                for loss in ddpo.losses(policy, ran, R, Independent(300 + seed), update):
                    optimiser.step(optimizer, loss, parameters)
            else:
                optimiser.step(optimizer, awm.loss(policy, ran, R, noise), parameters)
        seconds += time.process_time() - begin
        calls, update = calls + setting.batch, update + 1
        every = (
            setting.batch if calls <= 90 else max(setting.batch, 30) if calls <= 360 else 120 if calls <= 1200 else 360
        )
        if calls % every == 0:
            curve.append({"calls": calls, **judge(policy)})
    print(
        f"{reward} {setting.name} seed {seed}: {curve[0]['reward']:.4g} to {curve[-1]['reward']:.4g} in {calls} calls, "
        f"KL {curve[-1]['kl']:.2f}, energy {curve[0]['energy']:.3f} to {curve[-1]['energy']:.3f}, {seconds:.0f} of "
        f"{time.process_time() - begun:.0f} s",
        flush=True,
    )
    return {"reward": reward, "setting": vars(setting), "seed": seed, "curve": curve, "seconds": seconds}


def reached(curve: list[dict[str, float]], deviations: float = 1.0) -> dict[str, float] | None:
    """Calls, KL and quality where a curve first is `deviations` up, linear between its points; None if it never is."""
    goal = curve[0]["reward"] + deviations * curve[0]["std"]
    for before, after in itertools.pairwise(curve):
        if after["reward"] >= goal:
            w = (goal - before["reward"]) / (after["reward"] - before["reward"])
            return {key: before[key] + w * (after[key] - before[key]) for key in ("calls", "kl", "energy", "right")}
    return None


def name_of(reward: str, setting: Setting, seed: int) -> str:
    return f"curves/{reward}-{setting.name}@{seed}"


def chosen(runs: dict[str, Any], reward: str) -> dict[str, dict[str, Setting]]:
    """Settings by the tuning seed, of each method: "fast", of fewest calls to the fixed reward, and "careful", of least
    KL there; of ours the one of fewest calls among those of no more KL and energy than DDPO's of the same column."""
    found: dict[str, dict[str, Setting]] = {"fast": {}, "careful": {}}
    points: dict[str, dict[Setting, dict[str, float]]] = {method: {} for method in METHODS}
    for method in METHODS:
        for setting in settings(method, reward):
            made = runs.get(name_of(reward, setting, TUNING_SEED))
            point = None if made is None else reached(made["curve"])
            if point is not None:
                points[method][setting] = point
    for column, key in (("fast", "calls"), ("careful", "kl")):
        for method in ("ddpo", "awm"):
            if points[method]:
                found[column][method] = min(points[method], key=lambda s: points[method][s][key])
        if "ddpo" in found[column]:
            limit = points["ddpo"][found[column]["ddpo"]]
            allowed = [
                s for s, at in points["ours"].items() if at["kl"] <= limit["kl"] and at["energy"] <= limit["energy"]
            ]
            if allowed:
                found[column]["ours"] = min(allowed, key=lambda s: points["ours"][s]["calls"])
            half = [s for s in allowed if points["ours"][s]["calls"] <= limit["calls"] / 2]
            if column == "careful" and half:
                least = min(half, key=lambda s: points["ours"][s]["kl"])
                if least != found[column]["ours"]:
                    found["least KL"] = {"ddpo": found[column]["ddpo"], "ours": least}
    return found
