"""The loop's breadth: parts, averages, baselines that remember, KL at moved parameters, checks and their bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.metrics.intervals import Interval
from lowvar.process import Independent
from lowvar.reward import (
    Full,
    History,
    Monitor,
    Paths,
    Policy,
    RewardError,
    RewardProblem,
    Scores,
    TuneConfig,
    Tuner,
    ValueNetwork,
    kl_loss,
    rollout,
)
from lowvar.testing.affine import AffineDenoiser


def problem(make: Callable[..., Any], **how: Any) -> tuple[RewardProblem, Policy]:
    world = make(3, 2)
    denoiser = world.policy.denoiser
    theta = denoiser.theta.detach().clone()
    frozen = replace(world.policy, denoiser=AffineDenoiser(theta, denoiser.schedule, denoiser.grid))
    return RewardProblem(world.policy, world.reward, [world.theta], (1,), dtype=torch.float64, **how), frozen


@pytest.mark.parametrize("estimator", [Scores("x0"), Scores(), Paths(Full())], ids=lambda e: e.name)
def test_parts_add_up_to_the_whole(make: Callable[..., Any], estimator: Any) -> None:
    """The same parameters after three updates, whatever the parts; their spread is the gradient's noise."""
    ends, records = [], []
    for parts in (1, 2, 4):
        one, frozen = problem(make, num_generations=8)
        config = TuneConfig(3, 32, estimator, learning_rate=0.05, beta=0.01, gradient_accumulation_steps=parts)
        records.append(list(Tuner(one, config, Independent(0), reference=frozen).run()))
        ends.append(one.parameters[0].detach())
    assert torch.allclose(ends[0], ends[1], atol=1e-9)
    assert torch.allclose(ends[0], ends[2], atol=1e-9)
    assert records[0][0].variance != records[0][0].variance  # nan: one part says nothing
    assert records[2][0].variance > 0
    snr, norm = records[2][0].snr, records[2][0].gradient_norm
    noise = records[2][0].variance / 32
    assert snr == pytest.approx((norm**2 - noise) / noise)


def test_the_noise_of_parts_is_the_gradient_s(make: Callable[..., Any]) -> None:
    """Mean over batches of the parts' variance against the exact variance of one run."""
    one, _ = problem(make, num_generations=4)
    config = TuneConfig(100, 16, Scores("none"), learning_rate=1e-12, gradient_accumulation_steps=4)
    found = [r.variance for r in Tuner(one, config, Independent(3)).run()]
    truth = make(3, 2).exact.score().variance
    mean = sum(found) / len(found)
    se = torch.tensor(found).std() / len(found) ** 0.5
    assert abs(mean - truth) < 4 * float(se) < truth


def test_the_average_follows_and_is_what_checks_see(make: Callable[..., Any]) -> None:
    one, _ = problem(make)
    p = one.parameters[0]
    kept = p.detach().clone()
    tuner = Tuner(one, TuneConfig(4, 16, Scores(), learning_rate=0.05, average=0.5), Independent(0))
    for _ in tuner.run():
        kept.lerp_(p.detach(), 0.5)
    assert torch.allclose(tuner.averages[0], kept, atol=1e-14)
    own = p.detach().clone()
    with tuner.averaged():
        assert torch.equal(p.detach(), kept)
    assert torch.equal(p.detach(), own)


@pytest.mark.parametrize("baseline", ["running", "value"])
def test_baselines_that_remember_go_on_bit_for_bit(make: Callable[..., Any], tmp_path: Path, baseline: Any) -> None:
    """Four prompts; interrupted after five of eight updates."""
    ends = []
    for cut in (False, True):
        folder = tmp_path / str(cut)

        def made(resume: bool, folder: Path = folder) -> tuple[RewardProblem, Tuner]:
            one, _ = problem(make, numbers=lambda index: index // 8 % 2)
            value = ValueNetwork(1, 3).double() if baseline == "value" else None
            config = TuneConfig(8, 16, Scores(baseline), learning_rate=0.05, checkpoint_every=2)
            history = History(one.numbers, value=value)
            return one, Tuner(one, config, Independent(0), folder=folder, resume=resume, history=history)

        one, tuner = made(False)
        for record in tuner.run():
            if cut and record.update == 4:
                break
        if cut:
            one, tuner = made(True)
            assert tuner.update == 4
            list(tuner.run())
        statistics = tuner.history.statistics
        assert statistics is not None
        assert sorted(statistics.history) == [0, 1]
        assert statistics.count == 8 * 16
        ends.append(one.parameters[0].detach())
    assert torch.equal(ends[0], ends[1])
    with pytest.raises(ValueError, match="'value' is a network: give history"):
        next(Tuner(problem(make)[0], TuneConfig(1, 16, Scores("value")), Independent(0)).run())


def test_the_kl_holds_at_moved_parameters(make: Callable[..., Any]) -> None:
    """Runs of the old policy: value and gradient are those of the new policy's KL, integrated; "direct" is not."""
    world = make(2, 9)
    old = replace(world.policy, denoiser=_copy(world.policy.denoiser))
    frozen = replace(world.policy, denoiser=_copy(world.policy.denoiser))
    with torch.no_grad():
        world.theta.add_(torch.linspace(-0.04, 0.05, world.theta.numel()).reshape(world.theta.shape))
        frozen.denoiser.theta.sub_(0.1)
    found = {}
    for name, policy in (("own", world.policy), ("moved", old)):
        ran = rollout(policy, world.noise, world.n, (1,), dtype=torch.float64)
        each = kl_loss(world.policy, frozen, ran).each
        value = world.noise.weights @ each
        found[name] = (float(value.detach()), torch.autograd.grad(value, world.theta)[0])
    assert found["moved"][0] == pytest.approx(found["own"][0], rel=1e-4)
    assert torch.allclose(found["moved"][1], found["own"][1], rtol=1e-3, atol=1e-4)
    ran = rollout(old, world.noise, world.n, (1,), dtype=torch.float64)
    naive = world.noise.weights @ kl_loss(world.policy, frozen, ran, estimator="direct").each
    assert abs(float(naive.detach()) - found["own"][0]) > 1e-3 * found["own"][0]


def _copy(denoiser: Any) -> AffineDenoiser:
    return AffineDenoiser(denoiser.theta.detach().clone(), denoiser.schedule, denoiser.grid)


def test_checks_stop_at_a_bound_of_quality(make: Callable[..., Any], tmp_path: Path) -> None:
    one, frozen = problem(make)

    def quality(x: Tensor) -> Interval:
        value = float(x.mean())
        return Interval(value, value - 0.1, value + 0.1, 0.05)

    monitor = Monitor(one, Independent(0), 64, frozen, quality)
    start = monitor()
    assert start.kl.value == 0
    assert start.quality is not None
    bound = start.quality.value + 0.1
    how: dict[str, Any] = {"check_every": 5, "stop_quality": bound, "measure_kl": False}
    config = TuneConfig(60, 32, Scores("x0"), learning_rate=0.05, **how)
    records = list(Tuner(one, config, Independent(0), monitor=monitor, folder=tmp_path).run())
    assert len(records) < 60
    assert len(records) % 5 == 0
    last = records[-1].check
    assert last is not None
    assert last.reward.low > start.reward.value
    assert last.kl.low > 0
    assert records[0].plain()["kl"] is None
    assert records[-1].plain()["check"]["quality"]["value"] == last.quality.value  # pyright: ignore[reportOptionalMemberAccess]


def test_columns_reach_the_reward_and_a_failure_names_the_batch(make: Callable[..., Any]) -> None:
    seen = []

    def reward(x: Tensor, prompts: Any, *, weight: Tensor) -> Tensor:
        seen.append(weight)
        return x[:, 0] * weight if len(seen) < 3 else x[:, 0] / 0

    one, _ = problem(make)
    one = replace(one, reward=reward, columns=lambda index: {"weight": index.double()})
    run = Tuner(one, TuneConfig(5, 16, Scores()), Independent(0)).run()
    next(run)
    next(run)
    assert torch.equal(seen[1], torch.arange(16, 32).double())
    with pytest.raises(RewardError, match=r"batch 2: the rewards of runs \[0, 1, 2"):
        next(run)


def test_a_truncation_redrawn_in_the_loop_is_caught(make: Callable[..., Any]) -> None:
    """TRL's AlignProp drew the cut anew at every step. Put back in code: its mean is not that of one cut a batch."""
    world = make(3, 5)
    chain, noise = world.policy.chain(None), world.noise
    every = torch.arange(len(noise.weights))

    def gradient(cuts: tuple[int, int]) -> Tensor:
        """With the state before step k detached where k is not among the last `cuts[k - 1]` steps."""
        x = chain.start(noise, every, (1,), dtype=torch.float64)
        for k in range(3):
            x = x.detach() if k and 3 - k >= cuts[k - 1] else x
            x = chain.law(k, x).sample(noise.normal(every, (1,), draw=k + 1, dtype=torch.float64))
        return torch.autograd.grad(noise.weights @ world.reward(x), world.theta)[0].flatten()

    ks = (1, 2, 3)
    once = torch.stack([gradient((k, k)) for k in ks]).mean(0)
    redrawn = torch.stack([gradient((a, b)) for a in ks for b in ks]).mean(0)
    exact = torch.stack([torch.as_tensor(world.exact.last(k, "stop").mean) for k in ks]).mean(0)
    assert torch.allclose(once, exact, rtol=1e-9)
    assert float((redrawn - exact).norm() / exact.norm()) > 0.01
