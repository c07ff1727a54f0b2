r"""Variance of the policy gradient on digits: every estimator of `lowvar.reward` on the same runs.

A cell is a reward and a moment: "start", the trained network; "middle" and "far", that network tuned by scores with
the x0 baseline (rate 1e-3) until its reward is one standard deviation up, and for 30 updates, far beyond. `PAST`
batches come first, as tuning would have paid for them: buffers, the value network and the network surrogate have seen
them and nothing else. Then R batches of 120 runs are measured; each is seen by buffers and value network after it was
used.

    variance    n x the variance of a batch's gradient, summed over parameters: of one run; interval by batches
    bias        |mean of (g - reference)| / |reference| over the batches, its own noise taken off the square
    seconds     processor time of rollout, rewards, baseline and gradient of one batch, on its own

The reference is the mean of a pathwise gradient on 16 or more further batches where the reward has a derivative, else
of the surrogate control variate. DDPO's advantages are divided by standard deviations, so its variance (and that of
every scaled estimator) is put into the gradient's units: divided by a^2, a the mean of 1 / std that its rewards met.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from reward_setting import (
    BATCH,
    BUILD,
    CLASSES,
    REWARDS,
    SHAPE,
    STEPS,
    FlatMLP,
    policy_of,
    problem_of,
    prompts_of,
    reward_named,
    trained,
    weighted_gradients,
    with_edges,
)
from torch import Tensor, nn

from lowvar.process import Independent
from lowvar.reward import (
    Full,
    Last,
    LastAveraged,
    RandomTruncation,
    RidgeSurrogate,
    Rollout,
    Roulette,
    RunningStatistics,
    Scores,
    ValueNetwork,
    advantages,
    edges,
    optimal_constant,
    pathwise_loss,
    rollout,
    x0_baseline,
)
from lowvar.reward.pathwise import PathwiseRule

PAST, REPLICATES, REFERENCE = 16, 12, 16
MOMENTS = ("start", "middle", "far")
DDPO, DDPO_MEAN = "DDPO: class mean and std, buffer 16", "DDPO's mean, no std"


def network_at(reward: str, moment: str) -> FlatMLP:
    """The network of a moment, made once."""
    from safetensors.torch import load_file, save_file

    network = trained()
    if moment == "start":
        return network
    path = BUILD / f"{moment}-{reward}.safetensors"
    if not path.exists():
        problem, optimizer = problem_of(network, reward), torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0)
        goal = None
        for update in range(30):
            out = Scores("x0")(problem, Independent(90), BATCH, update * BATCH)
            mean = float(out.rewards.mean())
            goal = mean + float(out.rewards.std()) if goal is None else goal
            if moment == "middle" and mean >= goal:
                break
            optimizer.zero_grad()
            out.loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        save_file(network.state_dict(), path)
        network = trained()
    network.load_state_dict(load_file(path))
    return network


class SmallCNN(nn.Module):
    """A reward model: convolutions of 3x3 (16, 32), mean over places, in standard units of its rewards."""

    def __init__(self, samples: Tensor, rewards: Tensor, updates: int = 400) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(16, 32, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(32, 1, 1),
            )
        self.shift, self.scale = rewards.mean(), rewards.std()
        optimizer, target = torch.optim.Adam(self.parameters(), 5e-3), (rewards - self.shift) / self.scale
        order = Independent(3).uniform(range(updates), (BATCH,)).mul(len(samples)).long()
        for rows in order:
            loss = (self.standard(samples[rows]) - target[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.requires_grad_(False)

    def standard(self, x: Tensor) -> Tensor:
        return self.layers(x.clamp(-1, 1)).mean((1, 2, 3)) * 8

    def forward(self, x: Tensor) -> Tensor:
        return self.shift + self.scale * self.standard(x)


class Past:
    """What earlier batches have taught."""

    def __init__(self, ran: list[Rollout], rewards: list[Tensor], network: bool) -> None:
        self.buffers = RunningStatistics(buffer=16, minimum=16)
        self.value = ValueNetwork(math.prod(SHAPE), STEPS, CLASSES)
        self.optimizer = torch.optim.Adam(self.value.parameters(), 3e-3)
        for r, R in zip(ran, rewards, strict=True):
            self.learn(r, R)
        self.surrogate = SmallCNN(torch.cat([r.samples for r in ran]), torch.cat(rewards)) if network else None

    def learn(self, ran: Rollout, R: Tensor) -> None:
        self.buffers = self.buffers.updated(ran.groups, R)
        self.value.fit(ran, R, self.optimizer)


def score_weights(ran: Rollout, R: Tensor, past: Past, jpeg: bool) -> dict[str, tuple[Tensor, float]]:
    """Advantages of every score-function estimator, and the factor a of its expectation."""
    g, state = ran.groups, past.buffers
    now = state.updated(g, R)
    _, std, _ = now.before(g)
    own = advantages(R, g, baseline="running-including", scale_rewards="prompt", clip=10.0, state=state).values
    grpo = advantages(R, g, baseline="group-including", scale_rewards="group").values
    spread = torch.stack([R[g == k].std() for k in g.unique()])
    plain = {
        "none": advantages(R, g, baseline="none").values,
        "batch mean": advantages(R, g, baseline="batch").values,
        "leave-one-out": advantages(R, g).values,
        "running class mean, past only": advantages(R, g, baseline="running", state=state).values,
        DDPO_MEAN: advantages(R, g, baseline="running-including", state=state).values,
        "optimal constant a class": advantages(R, g, baseline=optimal_constant(R, ran.score2, groups=g)).values,
        "value network": R - past.value.predict(ran),
        "ridge on x0_hat": R - x0_baseline(ran, R),
    }
    if jpeg:
        plain["ridge on edges of x0_hat"] = R - x0_baseline(ran, R, features=edges)
        plain["ridge on edges and pixels of x0_hat"] = R - x0_baseline(ran, R, features=with_edges)
    found = {name: (A, 1.0) for name, A in plain.items()}
    found[DDPO] = (own, float((1 / std).mean()))
    found["GRPO: group mean and std"] = (grpo, float((1 / spread).mean()) * (1 - 1 / 12))
    return found


def surrogates(ran: Rollout, R: Tensor, past: Past, jpeg: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    made: dict[str, Callable[[Tensor], Tensor]] = {"quadratic": RidgeSurrogate.fit(ran.samples, R)}
    if past.surrogate is not None:
        made["CNN on past batches"] = past.surrogate
    if jpeg:
        made["edges"] = RidgeSurrogate.fit(ran.samples, R, features=edges)
    return made


RULES: dict[str, PathwiseRule] = {
    "pathwise, full": Full(),
    "pathwise, last 1": Last(1),
    "pathwise, last 5": Last(5),
    "pathwise, last 5, rest by scores": Last(5, "score"),
    "pathwise, last step averaged (4)": LastAveraged(4),
    "pathwise, random truncation": RandomTruncation(),
    "pathwise, roulette 0.8": Roulette(0.8),
}


RESIDUALS: dict[str, Callable[[Rollout, Tensor], Tensor]] = {
    "leave-one-out": lambda ran, residual: advantages(residual, ran.groups).values,
    "ridge on x0_hat": lambda ran, residual: residual - x0_baseline(ran, residual),
}


def _flat(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return -torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, grads, strict=True)]
    )


class Bench:
    """One network and reward: gradients of a batch by every estimator."""

    def __init__(self, network: nn.Module, reward: str, seed: int) -> None:
        self.policy, self.reward, self.noise = policy_of(network), reward_named(reward), Independent(seed)
        self.parameters, self.jpeg = list(network.parameters()), reward == "jpeg"
        self.black_box = not self.reward.differentiable

    def ran(self, batch: int) -> tuple[Rollout, Tensor]:
        first = batch * BATCH
        labels = prompts_of(first + torch.arange(BATCH))
        ran = rollout(self.policy, self.noise, BATCH, SHAPE, first=first, prompts=labels, groups=labels)
        return ran, self.reward(ran.samples).detach()

    def path(self, rule: PathwiseRule, batch: int, reward: Any = None) -> Tensor:
        first = batch * BATCH
        labels = prompts_of(first + torch.arange(BATCH))
        out = pathwise_loss(
            self.policy,
            self.reward if reward is None else reward,
            self.noise,
            BATCH,
            SHAPE,
            rule=rule,
            advantage=lambda ran, R: advantages(R, ran.groups, baseline=x0_baseline(ran, R)),
            first=first,
            prompts=labels,
            groups=labels,
        )
        return _flat(out.loss, self.parameters)

    def surrogate_path(self, h: Callable[[Tensor], Tensor], batch: int) -> Tensor:
        first = batch * BATCH
        index = first + torch.arange(BATCH)
        out = self.policy.chain(prompts_of(index)).surrogate(lambda x: -h(x), self.noise, index, SHAPE, checkpoint=1)
        return _flat(out.loss, self.parameters)

    def all(self, batch: int, past: Past) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Every estimate of a batch, in the gradient's units, and the share of variance that surrogates leave."""
        ran, R = self.ran(batch)
        weights = score_weights(ran, R, past, self.jpeg)
        left, paths = {}, {}
        for name, h in surrogates(ran, R, past, self.jpeg).items():
            with torch.no_grad():
                residual = R - h(ran.samples).to(R)
            left[name] = float(residual.var() / R.var())
            paths[name] = self.surrogate_path(h, batch)
            for rest, rule in RESIDUALS.items():
                A = h.judged(rule, ran, R) if isinstance(h, RidgeSurrogate) else rule(ran, residual)
                weights[f"surrogate {name}, residual {rest}"] = A, 1.0
        rows = weighted_gradients(self.policy, ran, [A for A, _ in weights.values()], self.parameters)
        found = {name: g / a for (name, (_, a)), g in zip(weights.items(), rows, strict=True)}
        for name, g in paths.items():
            for rest in RESIDUALS:
                found[f"surrogate {name}, residual {rest}"] += g
        if not self.black_box:
            found |= {name: self.path(rule, batch) for name, rule in RULES.items()}
        past.learn(ran, R)
        return found, left


def cell(reward: str, moment: str) -> dict[str, Any]:
    """All estimators for a reward at a moment."""
    begun = time.perf_counter()
    network = network_at(reward, moment)
    bench = Bench(network, reward, seed=7)
    warm = [bench.ran(b) for b in range(PAST)]
    past = Past([r for r, _ in warm], [R for _, R in warm], network=bench.black_box)
    each: dict[str, list[Tensor]] = {}
    left: dict[str, list[float]] = {}
    for b in range(PAST, PAST + REPLICATES):
        found, unexplained = bench.all(b, past)
        for name, g in found.items():
            each.setdefault(name, []).append(g)
        for name, value in unexplained.items():
            left.setdefault(name, []).append(value)
    reference, noise = _reference(bench, past, {k: torch.stack(v) for k, v in each.items()})
    rows = {name: _row(torch.stack(g), reference, noise) for name, g in each.items()}
    rewards = torch.cat([R for _, R in warm])
    made = {
        "reward": reward,
        "moment": moment,
        "mean": float(rewards.mean()),
        "std": float(rewards.std()),
        "batches": REPLICATES,
        "gradient": float(reference.norm()),
        "rows": rows,
        "left": {k: sum(v) / len(v) for k, v in left.items()},
        "ratios": {base: _ratios(each, base) for base in (DDPO, DDPO_MEAN)},
        "seconds": _seconds(bench, past),
    }
    print(f"{reward} {moment}: {time.perf_counter() - begun:.0f} s", flush=True)
    return made


def _reference(bench: Bench, past: Past, each: dict[str, Tensor]) -> tuple[Tensor, float]:
    """The mean of the estimator of least variance on its own batches, and the variance of that mean."""
    begin = PAST + REPLICATES
    if not bench.black_box:
        g = torch.stack([bench.path(Full(), b) for b in range(begin, begin + REFERENCE)])
    else:
        g = each["surrogate edges, residual ridge on x0_hat"]
    return g.mean(0), float(g.var(0).sum()) / len(g)


def _quantile(batches: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, batches - 1))


def _row(g: Tensor, reference: Tensor, noise: float) -> dict[str, float]:
    R = len(g)
    spread = (g - g.mean(0)).square().sum(1) * R / (R - 1) * BATCH
    variance, half = float(spread.mean()), _quantile(R) * float(spread.std()) / R**0.5
    own = variance / BATCH / R
    square = float((g.mean(0) - reference).square().sum()) - own - noise
    return {
        "variance": variance,
        "low": variance - half,
        "high": variance + half,
        "bias": max(square, 0.0) ** 0.5 / float(reference.norm()),
        "noise": (own + noise) ** 0.5 / float(reference.norm()),
    }


def _ratios(each: dict[str, list[Tensor]], base: str) -> dict[str, list[float]]:
    """Variance over that of a base, on the same batches, with a jackknife interval."""
    spread = {k: (torch.stack(v) - torch.stack(v).mean(0)).square().sum(1).double() for k, v in each.items()}
    found = {}
    for name, s in spread.items():
        d, R = spread[base], len(s)
        without = (s.sum() - s) / (d.sum() - d)
        half = _quantile(R) * float(((R - 1) / R * (without - without.mean()).square().sum()).sqrt())
        value = float(s.sum() / d.sum())
        found[name] = [value, value - half, value + half]
    return found


def _seconds(bench: Bench, past: Past) -> dict[str, float]:
    """Processor seconds of a batch by each kind of estimator, least of 3."""

    def scored(weight: Callable[[Rollout, Tensor], Tensor], h: Any = None) -> Callable[[], Any]:
        def run() -> None:
            ran, R = bench.ran(0)
            if h is not None:
                model = h(ran, R)
                with torch.no_grad():
                    R = R - model(ran.samples).to(R)
                bench.surrogate_path(model, 0)
            weighted_gradients(bench.policy, ran, [weight(ran, R)], bench.parameters)

        return run

    kinds = {
        "scores, class mean": scored(lambda ran, R: advantages(R, ran.groups).values),
        "scores, ridge on x0_hat": scored(lambda ran, R: R - x0_baseline(ran, R)),
        "scores, value network": scored(lambda ran, R: R - past.value.predict(ran)),
        "surrogate, residual ridge on x0_hat": scored(
            lambda ran, R: R - x0_baseline(ran, R), lambda ran, R: RidgeSurrogate.fit(ran.samples, R, features=edges)
        ),
    }
    if not bench.black_box:
        kinds |= {name: (lambda rule=rule: bench.path(rule, 0)) for name, rule in RULES.items()}
    found = {}
    for name, run in kinds.items():
        times = []
        for _ in range(3):
            begin = time.process_time()
            run()
            times.append(time.process_time() - begin)
        found[name] = min(times)
    return found


def cells() -> list[tuple[str, str]]:
    return [(reward, moment) for moment in MOMENTS for reward in reversed(REWARDS)]
