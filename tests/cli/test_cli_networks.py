"""`lowvar train --network`: folders of diffusers models, functions, and what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

torch.set_num_threads(1)

FEW = ["--data", "digits", "--updates", 2, "--batch-size", 4]
MINE = """
from torch import nn


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, timestep):
        return self.layer(x) * (timestep / 1000)[:, None, None, None]
"""


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import DiTTransformer2DModel

    folder = tmp_path_factory.mktemp("models") / "dit"
    torch.manual_seed(0)
    network: Any = DiTTransformer2DModel(
        2, 8, 1, 2, num_layers=1, norm_num_groups=4, sample_size=8, num_embeds_ada_norm=10
    )
    network.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("more", [[], ["--conditional"]])
def test_dit_from_training_to_samples(lowvar, dit: Path, tmp_path: Path, more: list[str]) -> None:
    done = lowvar("train", *FEW, *more, "--network", dit, "--out", tmp_path / "RUN", "--json")
    assert done.status == 0, done.err
    assert done.json["network"]["name"] == "DiTTransformer2DModel"
    kept = yaml.safe_load((tmp_path / "RUN" / "config.yaml").read_text())
    assert kept["network"]["source"] == str(dit)
    sample = ["sample", "--model", tmp_path / "RUN", "--steps", 2, "--n", 3]
    words = ["--label", "3", "--guidance", 2] if more else []
    done = lowvar(*sample, *words, "--out", tmp_path / "s.npz", "--json")
    assert done.status == 0, done.err
    with np.load(tmp_path / "s.npz") as found:
        assert found["samples"].shape == (3, 1, 8, 8)
    if not more:
        done = lowvar(*sample, "--label", "3", "--out", tmp_path / "t.npz")
        assert done.sentence == "--label is '3', and the model was trained without classes; leave it out"


def test_a_run_can_be_the_next_ones_start(lowvar, model: Path, tmp_path: Path) -> None:
    words = [*FEW, "--network", model, "--network-weights", "kept"]
    done = lowvar("train", *words, "--out", tmp_path / "A", "--json")
    assert done.status == 0, done.err
    again = ["--data", "digits", "--updates", 1, "--config", tmp_path / "A" / "config.yaml", "--batch-size", 4]
    done = lowvar("train", *again, "--network", tmp_path / "A", "--out", tmp_path / "B", "--json")
    assert done.status == 0, done.err
    config = done.json["config"]["network"]
    assert (config["source"], config["weights"]) == (str(tmp_path / "A"), "kept")
    index = json.loads((tmp_path / "B" / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"


def test_a_plain_module_is_saved_as_weights(lowvar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvar.pipelines import open_weights
    from lowvar.process import Independent

    (tmp_path / "mine_of_the_cli_test.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    words = [*FEW, "--network", "mine_of_the_cli_test:Mine", "--head", "none", "--out", tmp_path / "RUN"]
    done = lowvar("train", *words)
    assert done.status == 0, done.err
    assert "RUN is no pipeline folder: its averaged weights are in network.safetensors" in done.err
    assert f"lowvar.pipelines.open_weights('{tmp_path / 'RUN'}', Mine())" in done.err
    assert not (tmp_path / "RUN" / "model_index.json").exists()
    assert (tmp_path / "RUN" / "report.html").is_file()
    import mine_of_the_cli_test  # pyright: ignore[reportMissingImports]

    denoiser = open_weights(tmp_path / "RUN", mine_of_the_cli_test.Mine())
    x = Independent(0).normal(range(2), (1, 8, 8))
    assert denoiser(x, denoiser.schedule.at(0.5)).mean.shape == x.shape
    done = lowvar("sample", "--model", tmp_path / "RUN", "--out", tmp_path / "s.npz")
    assert done.status == 2
    assert "has no model_index.json" in done.sentence
    assert "open_weights" in done.sentence


def test_what_does_not_fit_exits_with_a_sentence(lowvar, model: Path, dit: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "RUN"]

    def refused(*words: object, data: str = "digits") -> str:
        done = lowvar("train", "--data", data, *FEW[2:], *out, *words)
        assert done.status == 2, done.err
        assert not (tmp_path / "RUN").exists()
        assert not (tmp_path / "RUN.partial").exists()
        return done.sentence

    assert "it must return 1; give head range or logvar or basis, or a network" in refused(
        "--network", model, "--head", "none"
    )
    assert "set num_class_embeds to 11" in refused("--network", model, "--conditional")
    assert "for 8x8 and the data are 16x16" in refused("--network", dit, "--channels", 1, data="photos:16")
    assert "or module:function" in refused("--network", tmp_path / "nothing")
    assert "network.weights is 'old'" in refused("--network", model, "--network-weights", "old")
    assert "no network.source" in refused("--network-weights", "kept")
