"""The planner: never worse than independent sampling, and far better where something helps."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowvar.expect import Sampler, estimate
from lowvar.process import Independent, ReverseKernel
from lowvar.testing import mixture2, mixture8
from lowvar.testing.expectations import chain_on, smooth_map

STATISTICS = {
    "coordinate": lambda x: x[:, 0],
    "other": lambda x: x[:, -1],
    "norm": lambda x: x.square().sum(1),
    "length": lambda x: x.square().sum(1).sqrt(),
    "sigmoid": lambda x: torch.sigmoid(x[:, 0] + x[:, 1]),
    "indicator": lambda x: (x[:, 0] > 0.5).double(),
}
SMOOTH = [name for name in STATISTICS if name != "indicator"]
SAMPLES = 1920  # 30 pilots


def ratios(sampler, f, replicates: int) -> tuple[Tensor, float]:
    """Evaluations of planned runs over those of independent sampling, to the same tolerance."""
    x = sampler(torch.arange(4096), Independent(77))
    tol = 1.96 * float(f(x).std()) / math.sqrt(SAMPLES)
    planned = [estimate(sampler, f, tol=tol, noise=Independent(s), batch_size=512).nfe for s in range(replicates)]
    alone = [
        estimate(sampler, f, tol=tol, noise=Independent(s), batch_size=512, design="independent").nfe
        for s in range(min(replicates, 5))
    ]
    r = torch.tensor(planned, dtype=torch.float64) / statistics.mean(alone)
    return r, float(r.std()) / math.sqrt(len(r))


ODE, SDE = ReverseKernel(0.0, "small"), ReverseKernel(1.0, "small")
TARGETS = {"map": None, "mixture2 ODE": (mixture2, ODE), "mixture2 SDE": (mixture2, SDE)}
TARGETS |= {"mixture8 ODE": (mixture8, ODE), "mixture8 SDE": (mixture8, SDE)}


def equipped(target: str, twins: bool) -> Sampler:
    """A target with all that a calibrated model has, or with no twin at all."""
    made = TARGETS[target]
    if made is None:
        return smooth_map() if twins else replace(smooth_map(), shadow=None, surrogate=None)
    sampler = chain_on(made[0](), 8, made[1], mixture=twins)
    return sampler if twins else replace(sampler, twin=None)


@pytest.mark.slow
@pytest.mark.parametrize("target", list(TARGETS))
def test_calibrated_runs_are_never_worse_and_five_times_better_on_the_median_smooth_statistic(target: str) -> None:
    """30 pairs in all, 50 runs each; means over runs. The 256 samples of four pilots are .133 of independent's."""
    sampler, found = equipped(target, True), {}
    for name, f in STATISTICS.items():
        r, se = ratios(sampler, f, 50)
        found[name] = (float(r.mean()), se)
    assert all(mean <= 1.05 + 2 * se for mean, se in found.values()), found
    assert statistics.median(found[name][0] for name in SMOOTH) <= 0.2, found


@pytest.mark.slow
@pytest.mark.parametrize("target", list(TARGETS))
def test_runs_without_a_twin_are_never_worse(target: str) -> None:
    """The other 30 pairs, where little helps: mirrored noise harms norms, nets help an SDE by nothing."""
    sampler = equipped(target, False)
    found = {name: ratios(sampler, f, 50) for name, f in STATISTICS.items()}
    assert all(float(r.mean()) <= 1.05 + 2 * se for r, se in found.values()), found


def test_planned_runs_of_a_map_are_cheaper() -> None:
    for name in ("coordinate", "norm"):
        r, _ = ratios(smooth_map(), STATISTICS[name], 3)
        assert float(r.mean()) < 0.5


def test_one_lucky_pilot_is_not_enough() -> None:
    """Without twins nothing helps a norm under ancestral noise: gains above 1 by less than their error are declined."""
    sampler, f = equipped("mixture2 SDE", False), STATISTICS["norm"]
    found = estimate(sampler, f, budget=8 * 1300, noise=Independent(1), batch_size=512)
    ahead = [c for c in found.decision.candidates if c.gain > 1]
    assert ahead
    assert found.decision.chosen == "independent"
    assert all(c.note == "not ahead by more than the pilot's error" for c in ahead)


def test_nets_grow_only_into_what_is_left() -> None:
    """A net larger than what is left to draw would end the run at three times its cost."""
    run = [estimate(equipped("mixture2 ODE", False), STATISTICS["norm"], tol=t, batch_size=512) for t in (0.08, 0.04)]
    assert run[0].design == run[1].design == "sobol"
    assert all(e.half_width > 0.6 * t for e, t in zip(run, (0.08, 0.04), strict=True))


def test_the_decision_is_in_the_result() -> None:
    found = estimate(smooth_map(), STATISTICS["norm"], tol=0.2)
    names = [c.design for c in found.decision.candidates]
    assert {"independent", "antithetic", "twin", "mixture"} <= set(names)
    assert sum(c.note == "chosen" for c in found.decision.candidates) == 1
    assert "chosen" in found.decision.table()
    assert found.vrf_low <= found.vrf <= found.vrf_high
    assert found.summary()["design"] == found.design
