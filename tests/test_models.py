"""The network for vectors: what it computes, and its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowvar.models import ResidualMLP
from lowvar.process.noise import Independent
from lowvar.train.networks import NetworkConfig, build_network


def network(**extra: int) -> ResidualMLP:
    torch.manual_seed(0)
    made = ResidualMLP(3, 6, width=16, blocks=2, **extra)
    with torch.no_grad():  # blocks begin as the identity
        for number, parameter in enumerate(made.parameters()):
            parameter += 0.1 * Independent(number).normal([0], parameter.shape)[0]
    return made.eval()


def test_rows_do_not_see_each_other_and_see_time_and_class() -> None:
    made = network(num_class_embeds=4)
    x = Independent(7).normal(range(5), (3,))
    t, y = torch.tensor([1.0, 500.0, 999.0, 3.0, 3.0]), torch.tensor([0, 1, 2, 3, 3])
    out = made(x, t, y).sample
    assert tuple(out.shape) == (5, 6)
    for i in range(5):
        assert torch.allclose(made(x[i : i + 1], float(t[i]), class_labels=y[i : i + 1]).sample[0], out[i], atol=1e-6)
    assert not torch.allclose(made(x, t + 1, y).sample, out, atol=1e-4)
    assert not torch.allclose(made(x, t, 3 - y).sample, out, atol=1e-4)
    assert torch.equal(made(x, t, y, return_dict=False)[0], out)


def test_classes_are_given_to_networks_with_classes_only() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="conditioned on a class"):
        network(num_class_embeds=4)(x, 0)
    with pytest.raises(ValueError, match="has no classes"):
        network()(x, 0, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="whole numbers from 1"):
        ResidualMLP(0)


def test_blocks_begin_as_the_identity() -> None:
    torch.manual_seed(1)
    made = ResidualMLP(3, width=8, blocks=3)
    x = Independent(0).normal(range(4), (3,))
    assert torch.equal(made(x, 3).sample, made.out(torch.nn.functional.silu(made.norm(made.into(x)))))


def test_a_saved_network_is_the_same(tmp_path: Path) -> None:
    made = network(num_class_embeds=4)
    made.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = ResidualMLP.from_pretrained(tmp_path)
    x, y = Independent(2).normal(range(4), (3,)), torch.tensor([0, 1, 2, 3])
    assert torch.equal(again(x, 77.0, y).sample, made(x, 77.0, y).sample)


def test_networks_for_rows_are_built_from_the_same_numbers() -> None:
    config = NetworkConfig(width=8, levels=2, layers=1)
    made = build_network((5,), config, "lowrank", seed=3, rank=2, classes=7)
    assert isinstance(made, ResidualMLP)
    assert made.config["out_channels"] == 20
    assert made.config["width"] == 64
    assert made.config["blocks"] == 4
    assert made.config["num_class_embeds"] == 8
    assert bool((made.out.weight[5:10] == 0).all())
    assert not bool((made.out.weight[10:] == 0).any())
    state = torch.get_rng_state()
    again = build_network((5,), config, "lowrank", seed=3, rank=2, classes=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(made.into.weight, again.into.weight)
