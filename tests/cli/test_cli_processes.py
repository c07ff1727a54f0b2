"""`lowvar train --process`: from a config file to a calibrated folder, samples and scores, for flow and EDM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml

if TYPE_CHECKING:
    from tests.cli.conftest import Lowvar

from lowvar.pipelines import open_pipeline

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array:DeprecationWarning")

CONFIG = "updates: 4\nbatch_size: 8\nwarmup: 1\nvalidate_every: 2\nnetwork: {width: 8}\n"
FEW = ("--n", 24, "--replicates", 1, "--steps", 2, "--choose", 0, "--batch-size", 64)
PEERS = {"flow": ("flow-euler,flow-heun,dpmsolver++", "ddim"), "edm": ("edm-euler,edm-dpmsolver++", "flow-euler")}


@pytest.mark.parametrize("process", ["flow", "edm"])
def test_from_a_config_to_scores(process: str, lowvar: Lowvar, tmp_path: Path) -> None:
    """The file says flow, the flag wins; the folder samples, is calibrated, and runs beside the peers it can run."""
    file, run, out = tmp_path / "c.yaml", tmp_path / "run", tmp_path / "calibrated"
    file.write_text(CONFIG + "process: flow\n")
    flag: tuple[Any, ...] = () if process == "flow" else ("--process", process)
    done = lowvar("train", "--data", "digits", "--config", file, *flag, "--out", run, "--json")
    assert done.status == 0, done.err
    assert done.json["low"] < done.json["validation_loss"] < done.json["high"]
    assert done.json["schedule"] == {"flow": "flow, shift 1", "edm": "edm, sigma_data 0.5"}[process]
    assert done.json["network"]["prediction"] == process
    assert yaml.safe_load((run / "config.yaml").read_text())["process"] == process
    assert process in (run / "report.html").read_text()
    done = lowvar("sample", "--model", run, "--n", 3, "--steps", 3, "--out", tmp_path / "a.npz")
    assert done.status == 0, done.err
    done = lowvar("calibrate", "--model", run, "--data", "digits", "--out", out, *FEW)
    assert done.status == 0, done.err
    scheduler = open_pipeline(out).scheduler
    assert scheduler.config["sampler"] == "twin-flow"
    assert scheduler.schedule == open_pipeline(run).scheduler.schedule
    done = lowvar(
        "sample", "--model", out, "--sampler", "ddpm-basis", "--n", 3, "--steps", 3, "--out", tmp_path / "b.npz"
    )
    assert done.status == 0, done.err
    with np.load(tmp_path / "b.npz") as samples:
        assert samples["samples"].shape == (3, 1, 8, 8)
        assert bool(np.isfinite(samples["samples"]).all())
    able, unable = PEERS[process]
    score = ("--data", "digits", "--steps", 2, "--n", 64, "--metrics", "mean", "--samplers", "ddpm-small,twin-flow")
    done = lowvar("evaluate", "--model", out, *score, "--against", able, "--out", tmp_path / "e", "--json")
    assert done.status == 0, done.err
    assert {f"diffusers:{name}" for name in able.split(",")} <= {row["sampler"] for row in done.json["rows"]}
    done = lowvar("evaluate", "--model", out, *score, "--against", unable, "--out", tmp_path / "f")
    assert done.status == 2
    assert "for this model there are" in done.sentence
    assert able.split(",", maxsplit=1)[0] in done.sentence


def test_a_process_that_is_none(lowvar: Lowvar, tmp_path: Path) -> None:
    done = lowvar("train", "--data", "digits", "--process", "ddpm", "--out", tmp_path / "run")
    assert done.status == 2
    assert "process is 'ddpm': input should be 'vp', 'edm' or 'flow'" in done.sentence
    done = lowvar("train", "--data", "digits", "--process", "flow", "--head", "range", "--out", tmp_path / "run")
    assert done.status == 2
    assert "head is range and process flow" in done.sentence
