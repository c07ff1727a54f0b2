"""Bad input: exit status 2, one sentence, nothing written."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from tests.cli.conftest import Lowvar


def images(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    folder.mkdir()
    for i, size in enumerate(sizes):
        Image.new("L", size, i % 256).save(folder / f"{i}.png")
    return folder


def left(folder: Path) -> list[str]:
    """Names of everything in the folder, hidden ones included."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("nosuch", "there is no data set 'nosuch'; give one of digits, photos"),
        ("empty", "has no images"),
        ("broken", "cannot read the image"),
        ("mixed", "mixed sizes"),
        ("photos:12", "the network takes images of 1x8x8 (channels x height x width) and the data has 3x12x12"),
    ],
)
def test_data_that_cannot_be_used(lowvar: Lowvar, model: Path, tmp_path: Path, data: str, said: str) -> None:
    if data == "empty":
        images(tmp_path / data, [])
    if data == "broken":
        (images(tmp_path / data, [(8, 8)] * 30) / "7.png").write_bytes(b"no image")
    if data == "mixed":
        images(tmp_path / data, [(8, 8)] * 29 + [(9, 8)])
    place = tmp_path / data if (tmp_path / data).exists() else data
    before = left(tmp_path)
    done = lowvar("calibrate", "--model", model, "--data", place, "--out", tmp_path / "run")
    assert done.status == 2
    assert said in done.sentence
    assert left(tmp_path) == before


def test_size_that_the_network_cannot_take(lowvar: Lowvar, tmp_path: Path) -> None:
    folder = images(tmp_path / "odd", [(7, 7)] * 40)
    done = lowvar("train", "--data", folder, "--out", tmp_path / "run")
    assert done.status == 2
    assert "7x7 pixels do not fit a network of 2 levels" in done.sentence
    assert left(tmp_path) == ["odd"]


@pytest.mark.parametrize(
    ("steps", "said"), [(0, "steps is 0"), (1001, "steps is 1001; give a whole number from 1 to 1000")]
)
def test_steps_out_of_range(lowvar: Lowvar, model: Path, tmp_path: Path, steps: int, said: str) -> None:
    out = tmp_path / "s.npz"
    for words in (
        ("sample", "--model", model, "--out", out),
        ("evaluate", "--model", model, "--data", "digits", "--out", tmp_path / "run"),
        ("calibrate", "--model", model, "--data", "digits", "--out", tmp_path / "run"),
    ):
        done = lowvar(*words, "--steps", steps)
        assert done.status == 2
        assert said in done.sentence
    assert left(tmp_path) == []


def test_folder_without_index(lowvar: Lowvar, tmp_path: Path) -> None:
    done = lowvar("sample", "--model", tmp_path, "--out", tmp_path / "s.npz")
    assert done.status == 2
    assert "has no model_index.json" in done.sentence
    assert left(tmp_path) == []


def test_pickled_weights(lowvar: Lowvar, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    done = lowvar("sample", "--model", folder, "--out", tmp_path / "s.npz")
    assert done.status == 2
    assert "pickle" in done.sentence
    assert left(tmp_path) == ["model"]


def test_calibration_of_another_schedule(lowvar: Lowvar, calibrated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(calibrated, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_schedule": "linear"}))
    done = lowvar("sample", "--model", folder, "--out", tmp_path / "s.npz")
    assert done.status == 2
    assert "fingerprint" in done.sentence
    assert "calibrate again" in done.sentence


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sampler", "euler"), "sampler is 'euler'; allowed: ddpm-small"),
        (("--sampler", "twin-ode"), "calibrat"),
        (("--sampler", "ddpm-basis"), "calibrat"),
        (("--sampler", "ddim", "--tau", "0.5"), "--tau belongs to"),
        (("--sampler", "adams-ode", "--eta", "0.5"), "--eta and --covariance belong to"),
        (("--sampler", "ddim", "--eta", "2"), "eta is 2.0"),
        (("--grid", "random"), "grid is 'random'; allowed"),
        (("--grid", "variance-matched"), "calibrat"),
        (("--covariance", "full"), "variance is 'full'; allowed"),
        (("--n", "0"), "--n is 0"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--png", "grid.jpg"), "ends in .png"),
    ],
)
def test_settings_that_do_not_fit(
    lowvar: Lowvar, model: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    done = lowvar("sample", "--model", model, "--out", tmp_path / "s.npz", "--steps", "2", *words)
    assert done.status == 2
    assert said in done.sentence
    assert left(tmp_path) == []


def test_samples_go_to_an_npz_file(lowvar: Lowvar, model: Path, tmp_path: Path) -> None:
    assert "ends in .npz" in lowvar("sample", "--model", model, "--out", tmp_path / "samples").sentence


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--against", "euler-a"), "peer is 'euler-a'; allowed: ddpm"),
        (("--against", "flow-euler"), "cannot run a vp schedule"),
        (("--spacing", "even", "--against", "ddim"), "spacing is 'even'; allowed: trailing"),
        (("--metrics", "fid"), "--metrics has 'fid'; allowed: frechet"),
        (("--n", "20", "--metrics", "energy"), "n is 20"),
        (("--samplers", "twin-ode"), "calibrat"),
    ],
)
def test_evaluations_that_cannot_be_made(
    lowvar: Lowvar, model: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    done = lowvar("evaluate", "--model", model, "--data", "digits", "--out", tmp_path / "run", *words)
    assert done.status == 2
    assert said in done.sentence
    assert left(tmp_path) == []


def test_existing_out_is_refused(lowvar: Lowvar, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    for words in (
        ("train", "--data", "digits"),
        ("calibrate", "--model", model, "--data", "digits"),
        ("evaluate", "--model", model, "--data", "digits"),
        ("demo", "--quick"),
    ):
        done = lowvar(*words, "--out", out)
        assert done.status == 2
        assert "exists already; give another path, or --overwrite" in done.sentence
    assert left(out) == ["mine.txt"]


def test_a_repository_is_never_replaced(lowvar: Lowvar, model: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / ".git").mkdir(parents=True)
    done = lowvar("calibrate", "--model", model, "--data", "digits", "--out", tmp_path / "run", "--overwrite")
    assert done.status == 2
    assert "is not replaced" in done.sentence


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("updatez: 3", "there is no setting 'updatez' (did you mean updates?); allowed: updates, batch_size"),
        ("network: {widht: 8}", "'network.widht' (did you mean width?)"),
        ("updates: -1", "the setting updates is -1"),
        ("- 1", "holds a list"),
        ("a: [", "is no YAML"),
    ],
)
def test_config_that_is_wrong(lowvar: Lowvar, tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    done = lowvar("train", "--data", "digits", "--out", tmp_path / "run", "--config", file)
    assert done.status == 2
    assert said in done.sentence
    assert left(tmp_path) == ["c.yaml"]


def test_config_that_is_not_there(lowvar: Lowvar, tmp_path: Path) -> None:
    done = lowvar("train", "--data", "digits", "--out", tmp_path / "run", "--config", tmp_path / "c.yaml")
    assert done.status == 2
    assert "cannot read --config" in done.sentence


def test_no_gpu(lowvar: Lowvar, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = lowvar("sample", "--model", model, "--out", tmp_path / "s.npz", "--device", "cuda")
    assert done.status == 2
    assert "torch finds no CUDA device" in done.sentence


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_disk_full_while_sampling(lowvar: Lowvar, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numpy.savez", full_disk)
    done = lowvar("sample", "--model", model, "--out", tmp_path / "s.npz", "--steps", "1", "--n", "2")
    assert done.status == 2
    assert "the disk is full" in done.sentence
    assert left(tmp_path) == []


@pytest.mark.parametrize("where", ["lowvar.cli.results.write_json", "lowvar.report.build"])
def test_disk_full_while_evaluating(
    lowvar: Lowvar, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(where, full_disk)
    words = ("--steps", "1", "--n", "64", "--samplers", "ddim", "--metrics", "energy")
    done = lowvar("evaluate", "--model", model, "--data", "digits", "--out", tmp_path / "run", *words)
    assert done.status == 2
    assert "the disk is full" in done.sentence
    assert left(tmp_path) == []


def test_report_of_nothing(lowvar: Lowvar, tmp_path: Path) -> None:
    assert "there is no folder" in lowvar("report", tmp_path / "run").sentence
    assert "no summary.json" in lowvar("report", tmp_path).sentence


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--head", "npt"), "--head is 'npt'; allowed: npr, sn, ocm, lowrank, convert"),
        (("--head", ","), "--head is empty"),
        (("--head", "lowrank", "--rank", "17"), "--rank is 17; allowed: 0 to 16"),
        (("--head", "npr", "--head-draws", "0"), "--head-draws is 0"),
        (("--head", "npr", "--n", "5"), "at least 6 calibration images"),
    ],
)
def test_heads_that_cannot_be(lowvar: Lowvar, model: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = lowvar("calibrate", "--model", model, "--data", "digits", "--out", tmp_path / "run", *words)
    assert done.status == 2
    assert said in done.sentence
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", "auto"), "--steps auto needs --tol"),
        (("--steps", "auto", "--tol", "0"), "above 0"),
        (("--steps", "5", "--tol", "0.1"), "--tol belongs to --steps auto"),
        (("--steps", "auto", "--tol", "0.1", "--sampler", "ddim"), "ancestral kernel"),
        (("--steps", "auto", "--tol", "1e-9", "--sampler", "ddpm-basis"), "give a larger one"),
        (("--steps", "5", "--grid", "optimal:best"), "grid is 'optimal:best'; allowed"),
        (("--steps", "5", "--levels", "1"), "--levels is 1"),
        (("--steps", "5", "--adaptive", "--sampler", "twin-ode"), "ancestral kernel"),
        (("--steps", "1", "--adaptive", "--sampler", "ddpm-basis"), "at least 2 steps"),
        (("--steps", "some"), "--steps"),
        (("--steps", "5", "--sampler", "ddpm-npr"), "covariance is 'npr'; calibrated here: analytic, basis, isotropic"),
        (("--steps", "5", "--covariance", "ocm", "--sampler", "ddim"), "train it with `lowvar calibrate --head ocm`"),
    ],
)
def test_step_choices(lowvar: Lowvar, calibrated: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = lowvar("sample", "--model", calibrated, "--out", tmp_path / "s.npz", *words)
    assert done.status == 2
    assert said in done.sentence
    assert not (tmp_path / "s.npz").exists()


@pytest.mark.parametrize("words", [("--steps", "auto", "--tol", "0.1"), ("--adaptive",), ("--grid", "optimal")])
def test_step_choices_need_a_calibration(lowvar: Lowvar, model: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    done = lowvar("sample", "--model", model, "--out", tmp_path / "s.npz", *words)
    assert done.status == 2
    assert "lowvar calibrate" in done.sentence
