"""The commands on precomputed latents: standardised inside, in their own units outside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lowvar.cli import main
from lowvar.pipelines import LatentPipeline, denoiser_of, open_pipeline
from lowvar.process import Independent

torch.set_num_threads(1)

CONFIG = "network: {width: 8, levels: 1}\nwarmup: 0\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """z.safetensors of standard deviation 5, and RUN and CAL made of it by the commands."""
    folder = tmp_path_factory.mktemp("latents")
    z = 5 * Independent(0).normal(range(80), (4, 4, 4)) + 1
    save_file({"latents": z.half(), "labels": torch.arange(80) % 2}, folder / "z.safetensors")
    (folder / "config.yaml").write_text(CONFIG)
    words = ["train", "--data", folder / "z.safetensors", "--out", folder / "RUN", "--updates", 2, "--batch-size", 4]
    assert main([*map(str, words), "--config", str(folder / "config.yaml"), "--quiet"]) == 0
    words = ["calibrate", "--model", folder / "RUN", "--data", folder / "z.safetensors", "--out", folder / "CAL"]
    assert main([*map(str, words), "--choose", "0", "--n", "8", "--replicates", "1", "--steps", "2", "--quiet"]) == 0
    return folder


@pytest.mark.parametrize("run", ["RUN", "CAL"])
def test_samples_come_in_the_latents_units(lowvar, folder: Path, tmp_path: Path, run: str) -> None:
    index = json.loads((folder / run / "model_index.json").read_text())
    assert index["_class_name"] == "LatentPipeline"
    assert index["scaling_factor"] == pytest.approx(0.2, rel=0.05)
    words = ["sample", "--model", folder / run, "--steps", 10, "--n", 64, "--out", tmp_path / "s.npz"]
    done = lowvar(*words, "--json")
    assert done.status == 0, done.err
    with np.load(tmp_path / "s.npz") as found:
        samples = found["samples"]
    assert samples.shape == (64, 4, 4, 4)
    assert samples.dtype == np.float32
    assert 2 < samples.std() < 12  # not cut to [-1, 1], nor of variance 1: an untrained network's are near 5
    assert np.abs(samples).max() > 8


def test_pipeline_and_denoiser_do_not_clip(folder: Path) -> None:
    pipeline = open_pipeline(folder / "RUN")
    assert isinstance(pipeline, LatentPipeline)
    assert denoiser_of(pipeline).clip is None
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(16, torch.Generator().manual_seed(0), num_inference_steps=4).latents
    assert float(made.abs().max()) > 8
    summary = json.loads((folder / "RUN" / "summary.json").read_text())
    assert summary["data"]["scaling_factor"] == pipeline.scaling_factor
    assert summary["data"]["levels"] is None
    assert not (folder / "CAL" / "grids.npz").exists()


def test_evaluation_scores_latents_as_they_are(lowvar, folder: Path, tmp_path: Path) -> None:
    """Seed 3 sorts the rows into other splits, whose factor is another one: the model's counts."""
    words = ["evaluate", "--model", folder / "CAL", "--data", folder / "z.safetensors", "--out", tmp_path / "E"]
    more = ["--samplers", "ddpm-basis,twin-flow", "--against", "ddim,unipc", "--steps", 2, "--n", 64, "--seed", 3]
    done = lowvar(*words, *more, "--json")
    assert done.status == 0, done.err
    index = json.loads((folder / "CAL" / "model_index.json").read_text())
    assert done.json["data"]["scaling_factor"] == index["scaling_factor"]
    twin = [r for r in done.json["rows"] if r["sampler"] == "Gaussian twin alone" and r["metric"] == "energy"]
    assert twin[0]["value"] < 0.2  # the data are normal; cut to [-1, 1] the twin would be far away


def test_conditional_latents(lowvar, folder: Path, tmp_path: Path) -> None:
    words = ["train", "--data", folder / "z.safetensors", "--updates", 2, "--batch-size", 4, "--conditional"]
    done = lowvar(*words, "--config", folder / "config.yaml", "--out", tmp_path / "RUN")
    assert done.status == 0, done.err
    words = ["sample", "--model", tmp_path / "RUN", "--n", 4, "--steps", 2, "--label", 1, "--guidance", 2]
    assert lowvar(*words, "--out", tmp_path / "s.npz").status == 0


def test_what_makes_no_sense_for_latents_is_refused(lowvar, folder: Path, tmp_path: Path) -> None:
    def refused(*words: object) -> str:
        done = lowvar(*words)
        assert done.status == 2, done.err
        return done.sentence

    data, out = ["--data", folder / "z.safetensors"], ["--out", tmp_path / "out"]
    sample = ["sample", "--model", folder / "RUN", "--out", tmp_path / "s.npz", "--n", 1]
    assert "decode the samples" in refused(*sample, "--png", tmp_path / "s.png")
    assert "the model has no classes" in refused(*sample, "--label", 1)
    three = tmp_path / "three.safetensors"
    save_file({"latents": Independent(2).normal(range(80), (3, 8, 8))}, three)
    (tmp_path / "c.yaml").write_text(CONFIG + "sample_every: 1\n")
    sentence = refused("train", "--data", three, *out, "--config", tmp_path / "c.yaml")
    assert sentence == "sample_every draws pictures, and the data are latents, which are none; leave it out"
    images = tmp_path / "images.npy"
    np.save(images, np.zeros((80, 3, 8, 8), dtype=np.uint8))
    words = ["train", "--data", three, "--updates", 1, "--batch-size", 2, "--config", folder / "config.yaml"]
    assert lowvar(*words, "--out", tmp_path / "R3").status == 0
    sentence = refused("calibrate", "--model", tmp_path / "R3", "--data", images, *out)
    assert sentence == "the network takes latents and the data are images; give data that fit"
    assert "give data that fit" in refused("calibrate", "--model", folder / "RUN", "--data", "digits", *out)
    assert "leave size out" in refused("train", *data, *out, "--size", 8)
