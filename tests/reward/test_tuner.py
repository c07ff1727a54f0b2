"""The loop: it learns, steers its KL, and goes on after an interruption as if there had been none."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvar.errors import UserError
from lowvar.process import Independent
from lowvar.reward import Full, Paths, Policy, RewardProblem, Scores, SurrogateControl, TuneConfig, Tuner
from lowvar.testing.affine import AffineDenoiser


def problem(make: Callable[..., Any], reward: Any = None) -> tuple[RewardProblem, Policy]:
    world = make(3, 2)
    denoiser = world.policy.denoiser
    frozen = replace(
        world.policy, denoiser=AffineDenoiser(denoiser.theta.detach().clone(), denoiser.schedule, denoiser.grid)
    )
    chosen = world.reward if reward is None else reward
    return RewardProblem(world.policy, chosen, [world.theta], (1,), dtype=torch.float64), frozen


@pytest.mark.parametrize("estimator", [Scores("x0"), Paths(Full()), SurrogateControl()], ids=lambda e: e.name)
def test_it_learns(make: Callable[..., Any], estimator: Any) -> None:
    one, frozen = problem(make)
    config = TuneConfig(25, 32, estimator, learning_rate=0.05)
    records = list(Tuner(one, config, Independent(0), reference=frozen).run())
    assert [r.update for r in records] == list(range(25))
    assert records[-1].reward > records[0].reward + 0.3
    assert records[0].kl == 0 < records[-1].kl
    assert records[-1].reward_calls == 25 * 32


def test_the_kl_is_steered_and_stops(make: Callable[..., Any]) -> None:
    one, frozen = problem(make)
    config = TuneConfig(80, 32, Scores(), learning_rate=0.05, beta=0.2, target_kl=0.5)
    records = list(Tuner(one, config, Independent(0), reference=frozen).run())
    late = sum(r.kl for r in records[-20:]) / 20
    assert 0.3 < late < 0.8
    one, frozen = problem(make)
    free = replace(config, beta=0.0, target_kl=None, stop_kl=0.5)
    stopped = list(Tuner(one, free, Independent(0), reference=frozen).run())
    assert len(stopped) < 80
    assert stopped[-1].kl > 0.5 >= stopped[-2].kl


def test_several_iterations_bound_the_ratio(make: Callable[..., Any]) -> None:
    one, _ = problem(make)
    config = TuneConfig(3, 32, Scores(), learning_rate=0.05, num_iterations=4, trust_nats=0.05)
    records = list(Tuner(one, config, Independent(0)).run())
    assert min(r.log_ratio for r in records) > 0
    assert max(r.clipped for r in records) > 0
    with pytest.raises(ValueError, match="only a score function can use its runs again"):
        TuneConfig(num_iterations=2)


def test_resumed_bit_for_bit(make: Callable[..., Any], tmp_path: Path) -> None:
    ends = []
    for name, cut in (("whole", False), ("cut", True)):
        one, frozen = problem(make)
        config = TuneConfig(
            8, 16, "auto", learning_rate=0.05, beta=0.1, target_kl=0.5, checkpoint_every=3, pilot_batch=16,
            pilot_repeats=2,
        )  # fmt: skip
        tuner = Tuner(one, config, Independent(0), reference=frozen, folder=tmp_path / name)
        if name == "cut":
            tuner.estimator = ends[0][2]  # seconds are no function of the seed
        else:
            tuner.estimator = Scores()
        for record in tuner.run():
            if cut and record.update == 4:
                break
        if cut:
            again, frozen = problem(make)
            tuner = Tuner(again, config, Independent(0), reference=frozen, folder=tmp_path / name, resume=True)
            assert tuner.update == 3
            list(tuner.run())
            one = again
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line.pop("seconds")
        ends.append((one.parameters[0].detach().clone(), lines, tuner.estimator))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    one, _ = problem(make)
    other = TuneConfig(8, 16, Scores(), learning_rate=0.05)
    with pytest.raises(UserError, match="was made with beta"):
        Tuner(one, other, Independent(0), folder=tmp_path / "cut", resume=True)


def test_auto_says_why(make: Callable[..., Any]) -> None:
    one, _ = problem(make)
    config = TuneConfig(3, 16, pilot_every=2, pilot_batch=32, pilot_repeats=4)
    records = list(Tuner(one, config, Independent(0)).run())
    assert [bool(r.why) for r in records] == [True, False, True]
    assert records[0].why.startswith(records[0].estimator)
    assert records[0].reward_calls == 32 * 4 * 6 + 16


def test_a_failed_update_leaves_the_parameters(make: Callable[..., Any]) -> None:
    calls = 0

    def reward(x: Any, p: Any) -> Any:
        nonlocal calls
        calls += 1
        return x[:, 0] * (float("nan") if calls == 3 else 1.0)

    one, _ = problem(make, reward)
    tuner = Tuner(one, TuneConfig(5, 16, Scores()), Independent(0))
    run = tuner.run()
    assert next(run).update == 0
    assert next(run).update == 1
    before = copy.deepcopy(one.parameters[0].detach())
    with pytest.raises(ValueError, match=r"the rewards of runs \[0, 1, 2"):
        next(run)
    assert torch.equal(before, one.parameters[0])
    with pytest.raises(ValueError, match="batch is 12; give a multiple of 8"):
        Tuner(one, TuneConfig(5, 12, Scores()), Independent(0))
    for name, value in (("trust_nats", -0.2), ("stop_kl", 0.0), ("pilot_repeats", 1)):
        with pytest.raises(ValueError, match=f"{name} is {value}; give"):
            TuneConfig(5, 16, **{name: value})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="give reference"):
        Tuner(one, TuneConfig(5, 16, Scores(), beta=0.1), Independent(0))


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from lowvar.process import CosineVP, Independent, ReverseKernel
from lowvar.reward import *
from lowvar.testing.affine import AffineDenoiser, exact_affine

schedule, grid = CosineVP(), torch.linspace(0.95, 0, 4, dtype=torch.float64)
theta = exact_affine(schedule, grid, 0.5, 0.25)

def policy(theta):
    return Policy(AffineDenoiser(theta, schedule, grid), ReverseKernel(variance="small"), grid, Floor(0.2))

def reward(x, prompts):
    return -((x[:, 0] - 1.5) ** 2)

reward.differentiable = True
ends = []
for estimator in (Scores(), Paths(Last(1, "score"))):
    own = theta.clone().requires_grad_()
    problem = RewardProblem(policy(own), reward, [own], (1,), num_generations=4, dtype=torch.float64)
    config = TuneConfig(3, 16, estimator, learning_rate=0.05, beta=0.01)
    tuner = Tuner(problem, config, Independent(0), reference=policy(theta))
    records = list(tuner.run())
    ends += [own.detach(), torch.tensor([[r.reward, r.kl, r.gradient_norm] for r in records])]
if tuner.accelerator.is_main_process:
    torch.save(ends, sys.argv[1])
"""


@pytest.mark.slow  # three processes import torch
def test_two_processes_take_the_same_steps_as_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ends = []
    for n in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
        run = [sys.executable, *launch, str(script), str(tmp_path / f"{n}.pt")]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        ends.append(torch.load(tmp_path / f"{n}.pt", weights_only=True))
    for one, two in zip(*ends, strict=True):
        assert torch.allclose(one, two, atol=1e-9)
