"""Densities of training times: unbiased by exact enumeration, importance sampling below uniform's variance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowvar.process import CosineVP, Independent, schedule_from_diffusers
from lowvar.process.noise import NoiseSource
from lowvar.train import LognormalTimes, LossSecondMomentTimes, TimeDraw, Times, UniformTimes

T = 12


class Given(NoiseSource):
    """Uniform numbers that the test chooses."""

    def __init__(self, u: Tensor) -> None:
        self.u = u

    def normal(self, index, shape, *, draw=0, dtype=torch.float32, device="cpu"):  # type: ignore[no-untyped-def]
        raise AssertionError("no normal numbers are needed")

    def uniform(self, index, shape, *, draw=0, dtype=torch.float32, device="cpu"):  # type: ignore[no-untyped-def]
        return self.u.to(dtype)


def losses_at(n: Tensor) -> Tensor:
    """A loss that differs by orders of magnitude over the timesteps, as the VLB's terms do."""
    return torch.exp(-0.7 * n.double()) * 5 + 0.01 * (1 + torch.sin(n.double()))


def warm(history: int = 10, uniform: float = 0.001) -> LossSecondMomentTimes:
    times = LossSecondMomentTimes(T, history, uniform)
    for k in range(history):
        n = torch.arange(T)
        times = times.updated(n, losses_at(n) * (1 + 0.3 * ((k * 7 + n) % 3 - 1)))
    return times


def enumerated(times: Times, probabilities: Tensor) -> tuple[Tensor, TimeDraw]:
    """The exact law of a draw: the lengths of the inverse cdf's pieces, and the draw in the middle of each."""
    ends = torch.cat([torch.zeros(1).double(), probabilities.cumsum(0)])
    middle = (ends[1:] + ends[:-1]) / 2
    return ends.diff(), times.draw(Given(middle), range(len(middle)))


def test_importance_sampling_is_unbiased() -> None:
    times = warm()
    q = times.probabilities()
    assert float(q.sum()) == pytest.approx(1, abs=1e-12)
    length, drawn = enumerated(times, q)
    assert torch.equal(drawn.bin, torch.arange(T))
    assert torch.equal(drawn.t, (torch.arange(T).double() + 1) / T)
    for loss in (losses_at(drawn.bin), drawn.bin.double() ** 2, torch.ones(T).double()):
        assert float((length * drawn.weight * loss).sum()) == pytest.approx(float(loss.mean()), abs=1e-10)


def test_importance_sampling_has_less_variance_than_uniform() -> None:
    times = warm()
    loss, q = losses_at(torch.arange(T)), times.probabilities()
    weighted = loss / (T * q)
    var_importance = float((q * weighted**2).sum() - loss.mean() ** 2)
    var_uniform = float((loss**2).mean() - loss.mean() ** 2)
    assert 0 < var_importance < var_uniform / 50


def test_pieces_of_the_inverse_cdf_have_their_probabilities() -> None:
    """Just below and just above every edge the draw changes by one timestep."""
    times = warm()
    edges = times.probabilities().cumsum(0)[:-1]
    below = times.draw(Given(edges - 1e-12), range(T - 1)).bin
    above = times.draw(Given(edges + 1e-12), range(T - 1)).bin
    assert torch.equal(below, torch.arange(T - 1))
    assert torch.equal(above, torch.arange(1, T))


def test_uniform_until_every_timestep_is_warm() -> None:
    times = LossSecondMomentTimes(T, history=2)
    n = torch.arange(T)
    for _ in range(3):
        times = times.updated(n[:-1], losses_at(n[:-1]))
    times = times.updated(n[-1:], losses_at(n[-1:]))
    assert not times.warm
    assert torch.equal(times.probabilities(), torch.full((T,), 1 / T, dtype=torch.float64))
    assert times.updated(n[-1:], losses_at(n[-1:])).warm


def test_history_is_that_of_the_published_loop() -> None:
    """Against a plain list a timestep, losses in order, the oldest dropped; repeated timesteps within a batch."""
    source = Independent(3)
    times = LossSecondMomentTimes(T, history=4)
    lists: list[list[float]] = [[] for _ in range(T)]
    for k in range(30):
        n = (source.uniform(range(40), (), draw=2 * k) ** 3 * T).long()
        loss = source.uniform(range(40), (), draw=2 * k + 1, dtype=torch.float64)
        times = times.updated(n, loss)
        for i, value in zip(n.tolist(), loss.tolist(), strict=True):
            lists[i] = [*lists[i], value][-4:]
    assert times.warm
    for i, row in enumerate(lists):
        assert sorted(times.losses[i].tolist()) == sorted(row)
    root = torch.tensor([sum(v * v for v in row) / 4 for row in lists]).double().sqrt()
    q = 0.999 * root / root.sum() + 0.001 / T
    assert torch.allclose(times.probabilities(), q, atol=1e-12)


def test_values_are_not_changed_and_state_restores() -> None:
    times = warm()
    before = times.losses.clone()
    later = times.updated(torch.tensor([0, 0, 3]), torch.tensor([9.0, 8.0, 7.0]))
    assert torch.equal(times.losses, before)
    again = LossSecondMomentTimes(T).restored(later.state())
    assert torch.equal(again.probabilities(), later.probabilities())
    n = torch.arange(T)
    assert torch.equal(again.updated(n, losses_at(n)).losses, later.updated(n, losses_at(n)).losses)


@pytest.mark.parametrize("times", [UniformTimes(T), LossSecondMomentTimes(T), warm(), LognormalTimes(CosineVP())])
def test_a_time_depends_on_its_sample_alone(times: Times) -> None:
    source = Independent(8)
    whole = times.draw(source, range(20), draw=1)
    for part in (range(7), range(7, 20)):
        mine = times.draw(source, part, draw=1)
        # an ulp: vector and scalar paths of transcendental functions round differently
        assert torch.allclose(mine.t, whole.t[list(part)], rtol=1e-14, atol=0)
        assert torch.equal(mine.bin, whole.bin[list(part)])
        assert torch.equal(mine.weight, whole.weight[list(part)])


def test_uniform_covers_the_table_evenly() -> None:
    drawn = UniformTimes(T).at((torch.arange(10 * T).double() + 0.5) / (10 * T))
    assert torch.equal(drawn.bin.bincount(), torch.full((T,), 10))
    assert float(drawn.t.min()) == 1 / T
    assert float(drawn.t.max()) == 1
    continuous = UniformTimes(None, t_min=0.2).at(torch.tensor([0.0, 0.5]).double())
    assert continuous.t.tolist() == pytest.approx([0.2, 0.6])


def test_lognormal_quantiles() -> None:
    """sigma / alpha has the quantiles of exp(N(-1.2, 1.2^2)), limited to the schedule's range."""
    schedule = schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2"})
    u = torch.tensor([1e-12, 0.1, 0.5, 0.9, 1 - 1e-12], dtype=torch.float64)
    drawn = LognormalTimes(schedule).draw(Given(u), range(5))
    log_sigma = -schedule.logsnr(drawn.t) / 2
    assert torch.allclose(log_sigma[1:4], -1.2 + 1.2 * torch.special.ndtri(u[1:4]), atol=1e-9)
    assert float(drawn.t[0]) == schedule.t_min
    assert bool((drawn.t <= 1).all())
    assert LognormalTimes(schedule).label == "changes the objective"


def test_parameters_out_of_range() -> None:
    for make, message in [
        (lambda: UniformTimes(0), "steps is 0"),
        (lambda: LossSecondMomentTimes(T, uniform=0.0), "uniform share"),
        (lambda: LognormalTimes(CosineVP(), std=0.0), "std is 0"),
        (lambda: LossSecondMomentTimes(T).restored(LossSecondMomentTimes(T + 1).state()), "the state is of"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
