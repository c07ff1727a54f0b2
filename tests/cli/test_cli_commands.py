"""What the commands write: files, keys, seeds, resuming."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from PIL import Image

if TYPE_CHECKING:
    from tests.cli.conftest import Lowvar


ALWAYS = {"command", "version", "seed", "seconds", "config"}
ROW = {"sampler", "grid", "steps", "nfe", "metric", "value", "low", "high"}
TINY = "network: {width: 8}\nwarmup: 0\nlr: 0.003\nbatch_size: 4\nvalidate_every: 3\ncheckpoint_every: 2\n"


def load_samples(file: Path) -> np.ndarray:
    with np.load(file) as found:
        assert sorted(found.files) == ["samples", "seeds"]
        assert found["samples"].dtype == np.float32
        assert found["seeds"].tolist() == list(range(len(found["samples"])))
        assert np.abs(found["samples"]).max() <= 1
        return found["samples"]


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ sampling


def test_sample(lowvar: Lowvar, model: Path, tmp_path: Path) -> None:
    out, png = tmp_path / "deep" / "s.npz", tmp_path / "g.png"
    done = lowvar("sample", "--model", model, "--out", out, "--png", png, "--n", 5, "--steps", 2)
    assert done.status == 0
    assert done.out.splitlines() == [str(out), str(png)]
    assert load_samples(out).shape == (5, 1, 8, 8)
    with Image.open(png) as picture:
        assert picture.mode == "L"
    assert lowvar("sample", "--model", model, "--out", out, "--n", 5).status == 2
    assert lowvar("sample", "--model", model, "--out", out, "--n", 3, "--steps", 2, "--overwrite").status == 0
    assert load_samples(out).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("sampler", [None, "ddpm-small", "twin-sde", "ddim-basis"])
def test_seeds_do_not_depend_on_the_batch(
    lowvar: Lowvar, calibrated: Path, tmp_path: Path, sampler: str | None
) -> None:
    found = []
    for size in (1, 4, 7):
        out = tmp_path / f"{size}.npz"
        words = ["sample", "--model", calibrated, "--out", out, "--n", 7, "--steps", 3, "--seed", 5]
        assert lowvar(*words, "--batch-size", size, *(["--sampler", sampler] if sampler else [])).status == 0
        found.append(load_samples(out))
    assert max(np.abs(x - found[0]).max() for x in found) < 1e-4


def test_settings_change_samples(lowvar: Lowvar, calibrated: Path, tmp_path: Path) -> None:
    settings = {
        "a": ("--sampler", "ddim"),
        "b": ("--sampler", "ddim", "--eta", "0.5"),
        "c": ("--sampler", "ddpm-small", "--covariance", "large"),
        "d": ("--sampler", "ddpm-small", "--covariance", "basis"),
        "e": ("--sampler", "twin-ode", "--tau", "0.5"),
        "f": ("--sampler", "twin-ode", "--grid", "variance-matched"),
        "g": ("--sampler", "twin-ode", "--seed", "1"),
    }
    found = []
    for name, words in settings.items():
        out = tmp_path / f"{name}.npz"
        assert lowvar("sample", "--model", calibrated, "--out", out, "--n", 2, "--steps", 4, *words).status == 0
        found.append(load_samples(out))
    different = [np.abs(x - y).max() > 1e-4 for i, x in enumerate(found) for y in found[:i]]
    assert all(different)


def test_json_is_all_there_is_on_stdout(lowvar: Lowvar, model: Path, tmp_path: Path) -> None:
    done = lowvar(
        "sample", "--model", model, "--out", tmp_path / "s.npz", "--n", 2, "--steps", 2, "--json", "--seed", 3
    )
    assert done.json.keys() >= ALWAYS | {"steps", "nfe", "n", "samples"}
    assert (done.json["command"], done.json["seed"], done.json["nfe"]) == ("sample", 3, 2)


def test_quiet_says_nothing(lowvar: Lowvar, model: Path, tmp_path: Path) -> None:
    done = lowvar("sample", "--model", model, "--out", tmp_path / "s.npz", "--n", 2, "--steps", 2, "--quiet")
    assert (done.status, done.out, done.err) == (0, "", "")


# ---------------------------------------------------------------------------------------------------------- calibrating


def test_calibrate(lowvar: Lowvar, calibrated: Path) -> None:
    summary = json.loads((calibrated / "summary.json").read_text())
    assert summary.keys() >= ALWAYS | {"logsnr", "mmse", "mmse_se", "variance", "basis", "recommended"}
    assert len(summary["logsnr"]) == len(summary["mmse"]) == len(summary["mmse_se"]) == len(summary["variance"])
    assert summary["basis"] == "pca"
    assert summary["recommended"].keys() == {"sampler", "grid", "steps"}
    figures = json.loads((calibrated / "figures.json").read_text())
    assert figures["standardised"].keys() == {"analytic", "isotropic", "pixel", "basis"}
    assert figures["budget"].keys() == {"small", "large", "learned", "isotropic", "basis"}
    assert (calibrated / "report.html").read_text().startswith("<!")
    assert yaml.safe_load((calibrated / "config.yaml").read_text())["data"] == "digits"


def test_calibrated_folder_opens_in_diffusers(calibrated: Path) -> None:
    import diffusers

    import lowvar.schedulers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(str(calibrated))
    assert isinstance(pipeline.scheduler, lowvar.schedulers.ReverseVarianceScheduler)
    assert pipeline.scheduler.config["sampler"] == "twin-flow"


@pytest.mark.slow
def test_calibrate_trains_heads(lowvar: Lowvar, model: Path, tmp_path: Path) -> None:
    """Two heads and the network's own: in the summary, on stdout, in the figures, and in the folder's tensors."""
    from safetensors.torch import load_file

    out = tmp_path / "run"
    words = [
        "--data",
        "digits",
        "--n",
        24,
        "--replicates",
        1,
        "--choose",
        0,
        "--steps",
        2,
        "--head",
        "npr,lowrank,convert",
    ]
    done = lowvar("calibrate", "--model", model, *words, "--rank", 2, "--head-draws", 128, "--out", out)
    assert done.status == 0, done.err
    heads = json.loads((out / "summary.json").read_text())["heads"]
    assert heads.keys() == {"npr", "lowrank", "convert"}
    assert heads["lowrank"]["rank"] == 2
    assert heads["npr"]["basis"] == "pca"
    assert heads["npr"]["images"] == [16, 4, 4]
    assert all(f"{name}: {head['note']}" in done.out for name, head in heads.items())
    figures = json.loads((out / "figures.json").read_text())
    assert {"npr", "lowrank", "convert"} <= figures["standardised"].keys() & figures["budget"].keys()
    tensors = load_file(out / "scheduler" / "calibration.safetensors")
    assert tensors["head.lowrank.offset"].shape == (3, 1, 8, 8)
    drawn = {}
    for flag in ("--sampler=ddpm-npr", "--sampler=ddim-lowrank", "--sampler=ddpm-convert", "--covariance=lowrank"):
        words = ["--sampler", "ddpm-small"] if flag.startswith("--cov") else []
        file = tmp_path / "s.npz"
        done = lowvar("sample", "--model", out, flag, *words, "--steps", 3, "--n", 2, "--out", file, "--overwrite")
        assert done.status == 0, done.err
        drawn[flag] = load_samples(file)
    assert all(not np.array_equal(a, b) for a, b in combinations(drawn.values(), 2))
    words = ["--data", "digits", "--steps", 2, "--n", 64, "--metrics", "energy", "--out", tmp_path / "scores", "--json"]
    rows = lowvar("evaluate", "--model", out, *words).json["rows"]
    named = {f"{family}-{name}" for family in ("ddpm", "ddim") for name in ("npr", "lowrank", "convert")}
    assert named < {row["sampler"] for row in rows}
    done = lowvar("sample", "--model", out, "--sampler", "ddpm-npr", "--adaptive", "--out", tmp_path / "a.npz")
    assert "with a table for its noise" in done.sentence


@pytest.mark.slow
def test_calibrate_chooses_a_sampler(lowvar: Lowvar, model: Path, tmp_path: Path) -> None:
    words = ["--data", "digits", "--n", 32, "--replicates", 1, "--steps", 2, "--choose", 64, "--out", tmp_path / "run"]
    done = lowvar("calibrate", "--model", model, *words, "--json")
    assert done.json["rows"][0].keys() >= ROW
    assert "twin" in {row["sampler"].split("-")[0] for row in done.json["rows"]}


# ----------------------------------------------------------------------------------------------------------- evaluating


def test_evaluate(lowvar: Lowvar, calibrated: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--data", "digits", "--steps", "2,3", "--against", "ddim,unipc", "--samplers", "ddim,twin-ode"]
    done = lowvar(
        "evaluate", "--model", calibrated, *words, "--n", 64, "--metrics", "energy,mean", "--out", out, "--json"
    )
    assert done.status == 0
    assert done.json == json.loads((out / "summary.json").read_text())
    assert done.json.keys() >= ALWAYS | {"rows", "floor", "recommended"}
    rows = done.json["rows"]
    assert all(row.keys() >= ROW and row["low"] <= row["value"] <= row["high"] for row in rows)
    alone = {row["sampler"] for row in rows if row["nfe"] == 0}
    assert alone == {"Gaussian twin alone", "Mixture twin alone"}
    assert len(rows) == 2 * (2 + 2 * 4)
    assert rows[0]["sampler"] == "Gaussian twin alone"
    assert rows[0]["nfe"] == 0
    assert done.json["floor"].keys() == {"energy", "mean"}
    assert done.json["recommended"]["sampler"] in ("ddim", "twin-ode")
    assert [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] == rows
    with np.load(out / "grids.npz") as grids:
        assert {"data", "ddim@2", "twin-ode@3", "diffusers:unipc@3"} <= set(grids.files)
    page = out / "report.html"
    page.unlink()
    assert lowvar("report", out).out.strip() == str(page)
    assert page.is_file()


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(TINY)
    return file


def test_train(lowvar: Lowvar, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = lowvar("train", "--data", "digits", "--config", config, "--updates", 4, "--out", out, "--json", "--seed", 2)
    assert done.status == 0
    assert done.json.keys() >= ALWAYS | {"updates", "loss", "validation_loss", "low", "high"}
    assert (done.json["updates"], done.json["seed"]) == (4, 2)
    assert done.json["low"] < done.json["validation_loss"] < done.json["high"]
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert (resolved["updates"], resolved["seed"], resolved["network"]["width"], resolved["lr"]) == (4, 2, 8, 3e-3)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert {"model_index.json", "unet", "scheduler", "report.html"} <= {path.name for path in out.iterdir()}
    assert not (out / "checkpoints").exists()
    assert not (tmp_path / "run.partial").exists()
    assert lowvar("sample", "--model", out, "--out", tmp_path / "s.npz", "--n", 2, "--steps", 2).status == 0
    # its config.yaml is a config
    again = lowvar("train", "--data", "digits", "--config", out / "config.yaml", "--out", tmp_path / "again")
    assert again.status == 0
    assert weights(tmp_path / "again") == weights(out)


def test_train_with_all_that_a_run_can_say(lowvar: Lowvar, config: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    from lowvar.train import reconstruct_average

    out = tmp_path / "run"
    more = "noise_scale_every: 1\nposthoc_ema: true\nweighting: uncertainty\ntrackers: [tensorboard]\nsample_every: 2\n"
    config.write_text(TINY + more)
    done = lowvar("train", "--data", "digits", "--config", config, "--updates", 4, "--out", out)
    assert done.status == 0
    assert [path.name for path in sorted((out / "samples").iterdir())] == ["update-0000002.png", "update-0000004.png"]
    assert len(list((out / "averages").iterdir())) == 4
    assert len(list((out / "tracking").iterdir())) == 1
    assert yaml.safe_load((out / "config.yaml").read_text())["trackers"] == ["tensorboard"]
    figure = json.loads((out / "figures.json").read_text())["weighting"]
    assert figure["chosen"] == "uncertainty"
    assert list(figure["relative"]) == ["simple", "min-snr", "p2", "edm", "uncertainty"]
    page = (out / "report.html").read_text()
    for words in ("What is left to learn", "What the objective weighs", "between updates 3 and 4", "Its squared error"):
        assert words in page
    unet = UNet2DModel.from_pretrained(out / "unet")
    unet.load_state_dict(reconstruct_average(out, sigma_rel=0.15))


def interrupting(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C after so many updates."""
    from lowvar.train.loop import Trainer

    whole = Trainer.run

    def run(self: Trainer) -> Iterator[Any]:
        for record in whole(self):
            yield record
            if self.update == after:
                raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run", run)


@pytest.mark.parametrize("after", [1, 3])
def test_interrupted_training_resumes_to_the_same_weights(
    lowvar: Lowvar, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    words = ["train", "--data", "digits", "--config", config, "--updates", 5]
    assert lowvar(*words, "--out", tmp_path / "whole").status == 0
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupting(patch, after)
        done = lowvar(*words, "--out", out)
    assert done.status == 130
    assert f"interrupted after {after} of 5 updates" in done.sentence
    assert not out.exists()
    assert "--resume" in lowvar(*words, "--out", out).sentence
    changed = lowvar(*words, "--out", out, "--resume", "--batch-size", 8)
    assert changed.status == (2 if after == 3 else 0)
    if after == 3:
        assert "batch_size" in changed.sentence
        assert lowvar(*words, "--out", out, "--resume").status == 0
        assert weights(out) == weights(tmp_path / "whole")
        lines = [json.loads(line)["update"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert lines == [3, 5]
    assert not (tmp_path / "run.partial").exists()


def test_overwrite_starts_anew(lowvar: Lowvar, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "--data", "digits", "--config", config, "--updates", 3, "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        interrupting(patch, 2)
        assert lowvar(*words).status == 130
    assert lowvar(*words, "--overwrite").status == 0
    assert lowvar(*words, "--resume").status == 2
    assert lowvar(*words, "--overwrite").status == 0


def test_disk_full_in_training_keeps_checkpoints(
    lowvar: Lowvar, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    words = ["train", "--data", "digits", "--config", config, "--updates", 3, "--out", tmp_path / "run"]

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("lowvar.cli.train.save_trained", full)
        done = lowvar(*words)
    assert done.status == 2
    assert "the disk is full" in done.sentence
    assert not (tmp_path / "run").exists()
    assert lowvar(*words, "--resume").status == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_ctrl_c_as_a_process(config: Path, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("lowvar"), "train", "--data", "digits", "--config", config]
    words = [str(w) for w in [*command, "--updates", 100_000, "--out", tmp_path / "run"]]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not list(tmp_path.glob("run.partial/checkpoints/update-*")) and time.monotonic() < end:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert "with --resume to go on" in err
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------- demo


def test_demo(lowvar: Lowvar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setattr("lowvar.metrics.Scorer", full_stop)
        assert lowvar("demo", "--quick", "--out", out).status == 130
    assert not out.exists()
    done = lowvar("demo", "--quick", "--out", out)  # goes on after the training
    assert done.status == 0
    lines = done.out.splitlines()
    assert lines[-1] == str(out / "report.html")
    assert "data against data" in lines[-2]
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= ALWAYS | {"rows", "floor", "recommended"}
    names = {row["sampler"] for row in summary["rows"]}
    assert names >= {"ddpm-small", "ddpm-large", "ddpm-learned", "ddpm-basis", "twin-ode", "twin-sde"}
    assert names >= {"Gaussian twin alone", "diffusers:ddpm", "diffusers:ddim", "diffusers:dpmsolver++"}
    assert {row["metric"] for row in summary["rows"]} >= {"frechet", "kernel", "energy"}
    assert not (tmp_path / "demo.partial").exists()
    assert lowvar("sample", "--model", out, "--out", tmp_path / "s.npz", "--n", 2, "--steps", 2).status == 0
    (out / "summary.json").rename(out / "other.json")  # no longer a run: not the demo's to replace
    assert lowvar("demo", "--quick", "--out", out).status == 2


def full_stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------- steps of `sample`


@pytest.mark.parametrize("sampler", ["ddpm-isotropic", "ddpm-small"])
def test_steps_auto(lowvar: Lowvar, calibrated: Path, tmp_path: Path, sampler: str) -> None:
    """As few steps as the tolerance allows: fewer for a larger one, and what it predicts stands in the summary."""
    words = [
        "sample",
        "--model",
        calibrated,
        "--sampler",
        sampler,
        "--steps",
        "auto",
        "--n",
        2,
        "--levels",
        17,
        "--json",
    ]
    done = [lowvar(*words, "--tol", tol, "--out", tmp_path / f"{tol}.npz").json for tol in (0.02, 1.0)]
    assert done[0]["steps"] > done[1]["steps"] >= 1
    for summary, tol in zip(done, (0.02, 1.0), strict=True):
        assert summary["path_kl"] <= tol
        assert summary["nfe"] == summary["steps"] == len(summary["times"]) - 1
        assert summary["scheduler"]["grid"] == "optimal"
        assert load_samples(tmp_path / f"{tol}.npz").shape == (2, 1, 8, 8)


@pytest.mark.parametrize("grid", ["entropic", "variance-matched:pixel", "optimal"])
def test_calibrated_grids(lowvar: Lowvar, calibrated: Path, tmp_path: Path, grid: str) -> None:
    words = [
        "sample",
        "--model",
        calibrated,
        "--sampler",
        "ddpm-pixel",
        "--grid",
        grid,
        "--n",
        2,
        "--steps",
        4,
        "--json",
    ]
    done = lowvar(*words, "--out", tmp_path / "s.npz")
    assert len(done.json["times"]) == 5
    assert done.json["scheduler"]["grid"] == grid
    coarse = lowvar(*words, "--levels", 3, "--out", tmp_path / "c.npz")
    assert coarse.json["times"][-2] > done.json["times"][-2]  # coarse data are decided sooner


def test_adaptive_steps(lowvar: Lowvar, calibrated: Path, tmp_path: Path) -> None:
    words = ["sample", "--model", calibrated, "--sampler", "ddpm-basis", "--steps", 6, "--n", 5, "--adaptive", "--json"]
    found = []
    for size in (2, 5):
        out = tmp_path / f"{size}.npz"
        done = lowvar(*words, "--batch-size", size, "--out", out)
        assert 2 * 6 / 1.5 - 2 < done.json["nfe"] < 2 * 6 * 1.5 + 2
        found.append(load_samples(out))
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)  # a difference quotient enlarges rounding


def test_strata_are_a_flag_of_training(lowvar, tmp_path: Path) -> None:
    words = ["train", "--data", "digits", "--updates", 1, "--batch-size", 4, "--strata", "cluster:5"]
    done = lowvar(*words, "--out", tmp_path / "RUN", "--json")
    assert done.status == 0, done.err
    assert done.json["config"]["strata"] == "cluster:5"
    done = lowvar(*words[:-1], "cluster:many", "--out", tmp_path / "B")
    assert done.status == 2
    assert done.sentence.startswith("strata is 'cluster:many'; give none, class, cluster or cluster:K")
