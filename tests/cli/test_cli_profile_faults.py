"""Verdicts on models that were trained or sampled wrongly: the fault is named first; a sound model has none."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowvar.cli import main
from lowvar.data import Data, load
from lowvar.process import Independent
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.testing import rotation
from lowvar.train import NetworkConfig, build_network

torch.set_num_threads(1)

D, T = 8, 100
SCHEDULE = schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": T})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rows.csv: 1,000 rows of a Gaussian with standard deviations 2 to .2 in turned axes."""
    folder = tmp_path_factory.mktemp("faults")
    z = Independent(0).normal(range(1000), (D,), dtype=torch.float64)
    rows = z * torch.linspace(2, 0.2, D) @ rotation(D, 3).T
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f"x{k}" for k in range(D)])
        writer.writerows(rows.tolist())
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> Data:
    return load(str(folder / "rows.csv"))


def trained(data: Data, *, batch: int, updates: int, lr: float, first: int = 0, decay: bool = True) -> nn.Module:
    """A small MLP that predicts v, trained at the timesteps from `first` on."""
    network = build_network((D,), NetworkConfig(width=32, levels=1), None, seed=0)
    optimizer = torch.optim.Adam(network.parameters(), lr)
    images = data.train.images(torch.arange(len(data.train)))
    noise = Independent(1)
    for u in range(updates):
        optimizer.param_groups[0]["lr"] = lr * (1 - u / updates if decay else 1.0)
        index = torch.arange(u * batch, (u + 1) * batch)
        x0 = images[(noise.uniform(index, (), draw=0) * len(images)).long()]
        step = first + (noise.uniform(index, (), draw=1) * (T - first)).long()
        level = SCHEDULE.at((step + 1).double() / T)
        a, s = level.alpha.float()[:, None], level.sigma.float()[:, None]
        eps = noise.normal(index, (D,), draw=2)
        out: Any = network(a * x0 + s * eps, step.float() * 1000 / T)
        loss = (out.sample - (a * eps - s * x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def saved(network: nn.Module, data: Data, out: Path, variance: str) -> Path:
    from lowvar.pipelines import TablePipeline
    from lowvar.schedulers import ReverseVarianceScheduler

    fields: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": T}
    scheduler = ReverseVarianceScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", variance=variance, eta=1.0, **fields
    )
    assert data.columns is not None
    TablePipeline(network, scheduler, data.columns.config()).save_pretrained(str(out), safe_serialization=True)
    return out


@pytest.fixture(scope="module")
def sound(data: Data) -> nn.Module:
    return trained(data, batch=64, updates=500, lr=1e-2)


def profiled(model: Path, folder: Path, out: str, *words: object) -> dict[str, Any]:
    given = ["profile", "--model", model, "--data", folder / "rows.csv", "--out", folder / out, "--minutes", 0.01]
    assert main([*map(str, given), *map(str, words), "--quiet"]) == 0
    return json.loads((folder / out / "summary.json").read_text())


def test_a_sound_model_has_no_fault(sound: nn.Module, data: Data, folder: Path) -> None:
    found = profiled(saved(sound, data, folder / "sound", "small"), folder, "of-sound", "--parts", "training")
    assert not [line for line in found["verdict"] if line["fault"]]
    assert max(row["excess"]["value"] for row in found["errors"]) < 1.25


def test_times_near_one_end(data: Data, folder: Path) -> None:
    """Trained at the last fifth of the timesteps alone: little noise was left out, and the line says so."""
    network = trained(data, batch=64, updates=500, lr=1e-2, first=80)
    found = profiled(saved(network, data, folder / "times", "small"), folder, "of-times", "--parts", "training")
    first = found["verdict"][0]
    assert first["fault"]
    assert first["do"].startswith("train at the noise levels that were left out")
    assert first["settings"] == {"times": "uniform"}
    errors = found["errors"]
    assert errors[0]["excess"]["low"] > 2
    assert errors[-1]["excess"]["value"] < 1.25


def test_a_batch_of_two(data: Data, folder: Path) -> None:
    """A large constant learning rate and batches of 2: errors everywhere, and a noise scale of many batches."""
    network = trained(data, batch=2, updates=500, lr=2e-2, decay=False)
    words = ("--parts", "training", "--batch-size", 4)
    found = profiled(saved(network, data, folder / "batch", "small"), folder, "of-batch", *words)
    first = found["verdict"][0]
    assert first["fault"], first
    assert first["do"].startswith("a batch of"), first
    assert first["settings"]["batch_size"] >= 16
    assert found["noise_scale"]["low"] > 16


def test_a_variance_that_is_too_large(sound: nn.Module, data: Data, folder: Path) -> None:
    """The upper of the fixed variances in few steps; a second profile of the calibrated model has it right."""
    wrong = saved(sound, data, folder / "large", "large")
    found = profiled(wrong, folder, "of-large", "--parts", "training,sampling", "--steps", 6)
    first = found["verdict"][0]
    assert (first["fault"], first["part"]) == (True, "sampling")
    assert first["do"] == "another reverse variance: the scheduler's (large) is too large"
    assert first["low"] > 1.25
    assert found["reverse"]["paid"]["low"] > 0.01
    words = ["calibrate", "--model", wrong, "--data", folder / "rows.csv", "--out", folder / "CAL"]
    words += ["--n", 64, "--replicates", 1, "--from-profile", folder / "of-large"]
    assert main([*map(str, words), "--quiet"]) == 0
    settings = json.loads((folder / "CAL" / "summary.json").read_text())["recommended"]
    assert settings == first["settings"]


