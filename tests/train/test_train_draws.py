"""Draw plans: samples by number, whatever the split; validation sets; networks; settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowvar.data import TensorImages
from lowvar.errors import UserError
from lowvar.process import Antithetic, Independent, schedule_from_diffusers
from lowvar.train import (
    DrawPlan,
    NetworkConfig,
    TrainConfig,
    UniformTimes,
    build_network,
    config_from,
)
from lowvar.train.networks import count_parameters

SCHEDULE = schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2"})


def images(n: int) -> TensorImages:
    return TensorImages(torch.linspace(-1, 1, n)[:, None, None, None].expand(n, 1, 2, 2).clone())


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_make_the_batch(parts: int) -> None:
    plan = DrawPlan(images(10), SCHEDULE, batch_size=6, seed=5)
    for update in (0, 3, 1_000_000):
        whole = plan.draws(update, UniformTimes())
        split = [plan.draws(update, UniformTimes(), k, parts) for k in range(parts)]
        for name in ("number", "image", "x0", "eps", "weight", "bin"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in split])), name
        assert torch.equal(whole.level.t, torch.cat([part.level.t for part in split]))


def test_batch_size_does_not_change_a_sample() -> None:
    one, seven = (DrawPlan(images(10), SCHEDULE, batch_size=b, seed=5) for b in (1, 7))
    batch = seven.draws(4, UniformTimes())
    for j, number in enumerate(range(28, 35)):
        single = one.draws(number, UniformTimes())
        assert int(single.number) == number
        assert int(single.image) == int(batch.image[j])
        assert torch.equal(single.eps[0], batch.eps[j])
        assert torch.equal(single.level.t[0], batch.level.t[j])


def test_every_epoch_is_another_permutation() -> None:
    plan = DrawPlan(images(10), SCHEDULE, batch_size=4, seed=1)
    order = torch.cat([plan.draws(u, UniformTimes()).image for u in range(10)])  # 40 samples: batches cross epochs
    epochs = order.reshape(4, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    assert torch.equal(plan.draws(0, UniformTimes()).image, order[:4])  # going back is no different
    assert torch.equal(DrawPlan(images(10), SCHEDULE, 4, seed=1).draws(9, UniformTimes()).image, order[36:])
    other = torch.cat([DrawPlan(images(10), SCHEDULE, 4, seed=2).draws(u, UniformTimes()).image for u in range(10)])
    assert not torch.equal(other, order)


def test_noise_is_an_argument() -> None:
    plan = DrawPlan(images(10), SCHEDULE, batch_size=4, noise=Antithetic(Independent(3)))
    draws = plan.draws(2, UniformTimes())
    assert torch.equal(draws.eps[0], -draws.eps[1])


def test_plan_refuses() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        DrawPlan(images(3), SCHEDULE, 0)
    with pytest.raises(ValueError, match="must divide"):
        DrawPlan(images(3), SCHEDULE, 4).draws(0, UniformTimes(), 0, 3)


# ------------------------------------------------------------------------------------------------------------ networks


def test_head_doubles_the_channels_and_the_seed_decides() -> None:
    state = torch.random.get_rng_state()
    a, b, c = (build_network((3, 8, 8), NetworkConfig(width=8), "range", seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert a(torch.zeros(2, 3, 8, 8), torch.zeros(2)).sample.shape == (2, 6, 8, 8)
    weights = [torch.cat([p.flatten() for p in network.parameters()]) for network in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_default_network_is_small() -> None:
    assert 0.3e6 < count_parameters(build_network((1, 8, 8), head="range")) < 1e6


@pytest.mark.parametrize(
    ("shape", "levels", "message"),
    [
        ((1, 9, 8), 2, r"images of 8x9 pixels do not fit a network of 2 levels.*divisible by 2; give levels 1.*8x10"),
        ((3, 12, 12), 4, r"divisible by 8; give levels 3 or less, or scale the images to 16x16"),
    ],
)
def test_size_that_the_network_cannot_take(shape: tuple[int, int, int], levels: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_network(shape, NetworkConfig(width=8, levels=levels))


def test_size_that_fits_goes_through() -> None:
    network = build_network((1, 12, 8), NetworkConfig(width=8, levels=3, attention=True, layers=2))
    assert network(torch.zeros(1, 1, 12, 8), torch.zeros(1)).sample.shape == (1, 1, 12, 8)


# ------------------------------------------------------------------------------------------------------------ settings


def test_config_round_trip() -> None:
    import dataclasses
    import json

    config = config_from({"updates": 7, "head": "logvar", "network": {"levels": 3}})
    assert config_from(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert config.network == NetworkConfig(levels=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"update": 3}, r"no setting 'update' \(did you mean updates\?\); allowed: updates, batch_size"),
        ({"network": {"widht": 8}}, r"no setting 'network.widht' \(did you mean width\?\); allowed: width, levels"),
        ({"batch_size": 0}, r"the setting batch_size is 0: input should be greater than or equal to 1"),
        ({"prediction": "noise"}, r"the setting prediction is 'noise': input should be 'epsilon'"),
        ({"ema": 1.0}, r"the setting ema is 1.0"),
        ({"network": 3}, r"the setting network is 3"),
    ],
)
def test_bad_settings_are_one_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config_from(values)
    assert "\n" not in str(caught.value)


def test_config_is_frozen() -> None:
    with pytest.raises(AttributeError, match="cannot assign"):
        TrainConfig().updates = 3  # type: ignore[misc]
