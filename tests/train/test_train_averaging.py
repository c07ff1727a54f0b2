"""Post-hoc averages against the same averages computed directly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowvar.process import Independent
from lowvar.train.averaging import PowerAverages, Snapshot, combine, gamma_of, profile, reconstruct, sigma_rel_of

T = 400


def trajectory() -> Tensor:
    """A weight that settles, with noise, float64 (T, 3)."""
    steps = torch.arange(1, T + 1, dtype=torch.float64)[:, None]
    noise = Independent(2).normal(range(T), (3,), dtype=torch.float64)
    return torch.exp(-steps / 120) * torch.tensor([1.0, -2.0, 3.0]) + 0.1 * noise + 1


def tracked(every: int, sigma_rels: tuple[float, ...] = (0.05, 0.10)) -> list[Snapshot]:
    state, kept = PowerAverages.of(sigma_rels), []
    for t, w in enumerate(trajectory(), 1):
        state = state.updated({"w": w})
        if t % every == 0:
            kept += state.snapshots()
    return kept


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25, 12**-0.5])
def test_lengths_and_exponents(sigma_rel: float) -> None:
    gamma = gamma_of(sigma_rel)
    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-9)
    n = 20_000
    p = profile(gamma, n, n)
    tau = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert float(p.sum()) == pytest.approx(1, rel=1e-12)
    std = float((p @ tau**2 - (p @ tau) ** 2).sqrt())  # what sigma_rel is: the profile's standard deviation
    assert std == pytest.approx(sigma_rel, rel=0.01)


def test_tracked_averages_are_the_profiles() -> None:
    for snapshot in tracked(133):
        direct = profile(snapshot.gamma, snapshot.updates, T) @ trajectory()
        torch.testing.assert_close(snapshot.weights["w"], direct, rtol=1e-12, atol=1e-12)


def test_uniform_average_is_the_mean() -> None:
    (snapshot,) = tracked(T, (12**-0.5,))
    torch.testing.assert_close(snapshot.weights["w"], trajectory().mean(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10])
def test_tracked_length_is_given_back_exactly(sigma_rel: float) -> None:
    kept = tracked(50)
    x, error = reconstruct(kept, sigma_rel)
    found = combine(kept, x)["w"]
    torch.testing.assert_close(found, profile(gamma_of(sigma_rel), T, T) @ trajectory(), rtol=1e-8, atol=1e-8)
    assert error < 1e-8


@pytest.mark.parametrize(("sigma_rel", "limit"), [(0.03, 3e-2), (0.075, 3e-3), (0.15, 1e-2), (0.22, 3e-2)])
def test_error_is_small_and_falls_with_snapshots(sigma_rel: float, limit: float) -> None:
    direct = profile(gamma_of(sigma_rel), T, T) @ trajectory()
    profile_error, weight_error = [], []
    for every in (100, 50, 20):
        kept = tracked(every)
        x, error = reconstruct(kept, sigma_rel)
        assert float(x.sum()) == pytest.approx(1, abs=1e-9)
        profile_error.append(error)
        weight_error.append(float((combine(kept, x)["w"] - direct).abs().max()))
    assert profile_error[0] > profile_error[1] > profile_error[2]
    assert profile_error[2] < limit
    assert weight_error[2] < limit / 4


def test_earlier_moment() -> None:
    kept = tracked(40)
    x, _ = reconstruct(kept, 0.08, updates=200)
    assert all(x[i] == 0 for i, s in enumerate(kept) if s.updates > 200)
    direct = profile(gamma_of(0.08), 200, T) @ trajectory()
    torch.testing.assert_close(combine(kept, x)["w"], direct, rtol=0, atol=1e-3)


def test_state_round_trip_and_no_aliasing() -> None:
    w = torch.ones(2)
    state = PowerAverages.of().updated({"a.b": w})
    w += 5
    assert state.averages[0]["a.b"].tolist() == [1, 1]
    back = PowerAverages.of().restored(state.state())
    assert back.updates == 1
    one, two = (s.updated({"a.b": w}).averages[1]["a.b"] for s in (state, back))
    assert torch.equal(one, two)
    empty = PowerAverages.of()
    assert empty.restored(empty.state()).updated({"w": w}).updates == 1
    half = PowerAverages.of().updated({"w": torch.ones(2, dtype=torch.bfloat16)})
    assert half.averages[0]["w"].dtype == torch.float32


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"at most 12\^-1/2"):
        gamma_of(0.4)
    with pytest.raises(ValueError, match="all different"):
        PowerAverages((1.0, 1.0))
    with pytest.raises(ValueError, match="no snapshot"):
        reconstruct([], 0.1)
    with pytest.raises(ValueError, match="give one each"):
        combine(tracked(200), torch.ones(1))
    with pytest.raises(ValueError, match="other names"):
        PowerAverages.of().updated({"w": torch.ones(1)}).updated({"v": torch.ones(1)})
    with pytest.raises(ValueError, match="1 <= updates"):
        profile(1.0, 3, 2)


def test_coefficients_stay_small_where_averages_are_equal() -> None:
    """After one update both averages are the first weights: neither gets a huge coefficient that the other undoes."""
    kept = [Snapshot(gamma_of(s), t, {}) for t in range(1, 13) for s in (0.05, 0.10)]
    x, error = reconstruct(kept, 0.15)
    assert float(x.abs().sum()) < 10
    assert error < 1e-8
