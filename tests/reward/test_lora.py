"""Low-rank adapters: where they go, what they leave alone, and what they leave behind."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from lowvar.errors import UserError
from lowvar.reward.lora import add_lora, lora_targets

HERE = importlib.util.find_spec("peft") is not None


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 1))


def test_small_and_grouped_layers_have_no_adapter() -> None:
    layers = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3), nn.Linear(8, 2))
    assert lora_targets(layers, 2) == ["1"]
    assert lora_targets(layers, 8) == []


@pytest.mark.skipif(HERE, reason="peft is installed")
def test_without_peft_a_sentence_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"need peft, which is not installed; `pip install 'lowvar\[lora\]'`"):
        add_lora(network(), 2)


@pytest.mark.skipif(not HERE, reason="peft is not installed")
def test_adapters_begin_at_nothing_and_end_in_the_weights() -> None:
    x, plain = torch.linspace(-1, 1, 12).reshape(2, 6), network()
    adapted = network()
    parameters, merge = add_lora(adapted, 2)
    assert torch.equal(adapted(x), plain(x))
    assert sum(p.numel() for p in parameters) == 2 * (6 + 8) * 2  # two layers of three are larger than the rank
    optimizer = torch.optim.SGD(parameters, 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(x).square().sum().backward()
        optimizer.step()
    tuned = adapted(x).detach()
    assert not torch.allclose(tuned, plain(x), atol=1e-3)
    merge()
    assert adapted.state_dict().keys() == plain.state_dict().keys()
    assert torch.allclose(adapted(x), tuned, atol=1e-6)
    for (name, w), w0 in zip(adapted.state_dict().items(), plain.state_dict().values(), strict=True):
        change = w - w0
        if name in ("0.weight", "2.weight"):
            assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-4) <= 2, name
        else:
            assert torch.equal(change, torch.zeros_like(change)), name


@pytest.mark.skipif(not HERE, reason="peft is not installed")
def test_ranks_that_fit_no_layer_are_refused() -> None:
    with pytest.raises(UserError, match="no layer of the network is larger than rank 8"):
        add_lora(network(), 8)
    with pytest.raises(UserError, match="the rank of LoRA is 0"):
        add_lora(network(), 0)
