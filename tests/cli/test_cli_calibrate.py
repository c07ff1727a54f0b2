"""`lowvar calibrate` beyond its tables: heads among the candidates, noise that is kept, guided tables by class."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from lowvar.calibrate import calibrate_classes
from lowvar.cli.models import open_model, run_scheduler, scheduler_of
from lowvar.data import load
from lowvar.own_pipelines import ClassConditionalPipeline
from lowvar.pipelines import denoiser_of
from lowvar.process import Independent
from lowvar.sample import SAMPLERS

if TYPE_CHECKING:
    from tests.cli.conftest import Lowvar

CPU = torch.device("cpu")


def samples(lowvar: Lowvar, model: Path, out: Path, *flags: object) -> tuple[Any, str]:
    """What `lowvar sample` draws, and what it says on stderr."""
    done = lowvar("sample", "--model", model, *flags, "--n", 3, "--out", out, "--overwrite")
    assert done.status == 0, done.err
    return np.load(out)["samples"], done.err


# ---------------------------------------------------------------------------------------------------------------- noise


def test_noise_is_measured_once_and_kept(lowvar: Lowvar, model: Path, calibrated: Path, tmp_path: Path) -> None:
    """With --noise the folder holds it: `lowvar sample` says no word, and draws what it draws where it measures."""
    words = ["--data", "digits", "--n", 48, "--replicates", 1, "--steps", 2]
    out = tmp_path / "run"
    flags = ["--noise", "unipc-noise@3,ddim-noise", "--choose", 64]
    done = lowvar("calibrate", "--model", model, *words, *flags, "--out", out)
    assert done.status == 0, done.err
    summary = json.loads((out / "summary.json").read_text())
    assert [(r["sampler"], r["steps"], r["chains"]) for r in summary["noise"]] == [
        ("unipc-noise", 3, 2048),
        ("ddim-noise", 2, 2048),
    ]
    assert all(0 <= r["share"] < 1 for r in summary["noise"])
    rows = {row["sampler"] for row in summary["rows"]}
    assert "ddim-noise" in rows  # measured at --steps: a candidate
    assert "unipc-noise" not in rows
    kept, quiet = samples(lowvar, out, tmp_path / "a.npz", "--sampler", "unipc-noise", "--steps", 3)
    assert "is not kept" not in quiet
    measured, said = samples(lowvar, calibrated, tmp_path / "b.npz", "--sampler", "unipc-noise", "--steps", 3)
    assert "is not kept in the model: measured on 2048 chains of 3 evaluations" in said
    np.testing.assert_allclose(kept, measured, atol=1e-4)
    _, said = samples(lowvar, out, tmp_path / "c.npz", "--sampler", "unipc-noise", "--steps", 3, "--grid", "quadratic")
    assert "is not kept" in said


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--noise", "unipc", "allowed: ddim-noise, dpmpp-2m-noise, unipc-noise"),
        ("--noise", "ddim-noise@few", "give a number of steps, for example ddim-noise@5"),
        ("--noise", "ddim-noise@5000", "1 to 1000"),
        ("--guidance", "2", "give --by-class"),
        ("--guidance", "nan", "give a number from 0"),
        ("--by-class", None, "train one with --conditional"),
        ("--choose", "16", "--choose is 16; the 32 blocks of an interval need at least 64 samples; or --choose 0"),
    ],
)
def test_what_is_wrong_is_said(
    lowvar: Lowvar, model: Path, tmp_path: Path, flag: str, value: str | None, says: str
) -> None:
    words = [flag] if value is None else [flag, value]
    done = lowvar("calibrate", "--model", model, "--data", "digits", *words, "--out", tmp_path / "run")
    assert done.status == 2
    assert says in done.sentence
    assert not (tmp_path / "run").exists()


def test_few_images_cannot_choose_a_sampler(lowvar: Lowvar, model: Path, tmp_path: Path) -> None:
    """Said before anything is measured: scores need data to be compared with."""
    (tmp_path / "images").mkdir()
    for i in range(30):
        Image.fromarray(np.full((8, 8), 8 * i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    words = ["--model", model, "--data", tmp_path / "images", "--out", tmp_path / "run"]
    for command, more in (("calibrate", "or --choose 0"), ("evaluate", "give more data")):
        done = lowvar(command, *words)
        assert done.status == 2
        assert "scores with intervals need at least 64" in done.sentence
        assert more in done.sentence
        assert "calibrating" not in done.err


# ---------------------------------------------------------------------------------------------------------------- heads


def test_heads_are_candidates(lowvar: Lowvar, model: Path, tmp_path: Path) -> None:
    words = ["--data", "digits", "--n", 24, "--replicates", 1, "--steps", 2, "--choose", 64]
    heads = ["--head", "npr,convert", "--head-draws", 64]
    done = lowvar("calibrate", "--model", model, *words, *heads, "--out", tmp_path / "run", "--json")
    assert done.status == 0, done.err
    rows = {row["sampler"] for row in done.json["rows"]}
    assert {f"{kernel}-{head}" for kernel in ("ddpm", "ddim") for head in ("npr", "convert")} < rows
    assert done.json["recommended"]["sampler"] in rows & set(SAMPLERS)


# -------------------------------------------------------------------------------------------------------------- classes


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained class-conditional pipeline; its classes differ, because its embeddings are drawn."""
    from diffusers import DDPMScheduler, UNet2DModel

    folder = tmp_path_factory.mktemp("models") / "conditional"
    torch.manual_seed(0)
    unet: Any = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        num_class_embeds=11,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    with torch.no_grad():
        unet.class_embedding.weight.mul_(20)
    scheduler: Any = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    ClassConditionalPipeline(unet, scheduler, [str(k) for k in range(10)]).save_pretrained(str(folder))
    return folder


def test_tables_by_class_are_those_of_the_guided_model(lowvar: Lowvar, conditional: Path, tmp_path: Path) -> None:
    """The folder's tables are `calibrate_classes` of guided denoisers; sampling takes them with that guidance only."""
    words = ["--data", "digits", "--n", 60, "--replicates", 1, "--steps", 2, "--choose", 0]
    out = tmp_path / "run"
    done = lowvar("calibrate", "--model", conditional, *words, "--by-class", "--guidance", 3, "--out", out)
    assert done.status == 0, done.err
    summary = json.loads((out / "summary.json").read_text())
    images = load("digits").calibration
    assert images.labels is not None
    labels = images.labels[:60]
    assert summary["by_class"]["images"] == labels.bincount(minlength=10).tolist()
    assert summary["by_class"]["guidance"] == 3
    pooled = open_model(out, CPU)
    assert pooled.calibration is not None
    assert len(pooled.calibration.conditional["pixel"].tables) == 10
    wanted = calibrate_classes(
        lambda k: denoiser_of(pooled.pipeline, class_labels=k, guidance=3.0),
        lambda k: [images.images(torch.nonzero(labels == k)[:, 0])],
        10,
        pooled.calibration,
        Independent(1),
        1,
    )
    for label in ("3", "7"):
        one = open_model(out, CPU, label, 3.0).calibration
        assert one is not None
        for structure, table in wanted.items():
            found = one.table(structure).variance
            torch.testing.assert_close(found, table.tables[int(label)].variance, rtol=1e-4, atol=1e-6)
    plain = open_model(out, CPU, "3", 1.0).calibration
    assert plain is not None
    assert torch.equal(plain.table("pixel").variance, pooled.calibration.table("pixel").variance)
    flags = ["--sampler", "ddpm-pixel", "--steps", 3, "--label", 3, "--guidance"]
    guided, said = samples(lowvar, out, tmp_path / "s.npz", *flags, 3)
    assert "guidance" not in said
    _, said = samples(lowvar, out, tmp_path / "s.npz", *flags, 2)
    assert "tables by class were calibrated with guidance 3, not 2" in said
    one = open_model(out, CPU, "3", 3.0)
    for calibration, same in ((one.calibration, True), (pooled.calibration, False)):
        unaware = replace(one, calibration=calibration)
        drawn = run_scheduler(
            unaware, scheduler_of(unaware, "ddpm-pixel"), 3, 3, Independent(0), batch_size=3, device=CPU
        )
        assert (np.abs(guided - drawn.numpy()).max() < 1e-4) == same


def test_one_class_is_evaluated(lowvar: Lowvar, conditional: Path, tmp_path: Path) -> None:
    """Scored against that class alone; guidance doubles the evaluations of our samplers and of peers."""
    words = ["evaluate", "--model", conditional, "--data", "digits", "--steps", "2", "--n", 64, "--metrics", "mean"]
    words += ["--samplers", "ddpm-small", "--against", "ddim", "--json"]
    done = lowvar(*words, "--label", 3, "--guidance", 2, "--out", tmp_path / "one")
    assert done.status == 0, done.err
    data = load("digits")
    assert data.test.labels is not None
    assert done.json["scores"]["reference"] == int((data.test.labels == 3).sum())
    assert {row["nfe"] for row in done.json["rows"]} == {4}
    assert {row["nfe"] for row in lowvar(*words, "--out", tmp_path / "all").json["rows"]} == {2}
    done = lowvar(*words, "--label", 12, "--out", tmp_path / "none")
    assert done.status == 2
    assert done.sentence == "the class is '12'; allowed: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, or a number from 0 to 9"
    done = lowvar(*words, "--guidance", 2, "--out", tmp_path / "none")
    assert done.sentence == "--guidance is 2, and there is no class to guide to; give --label"


def test_classes_of_the_data_and_of_the_model(lowvar: Lowvar, conditional: Path, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    for k in range(12):
        (folder / f"class{k:02d}").mkdir(parents=True)
        for i in range(8):
            values = np.full((8, 8), (16 * k + i) % 255, dtype=np.uint8)
            Image.fromarray(values).save(folder / f"class{k:02d}" / f"{i}.png")
    words = ["--data", folder, "--channels", 1, "--by-class", "--out", tmp_path / "run"]
    done = lowvar("calibrate", "--model", conditional, *words)
    assert done.status == 2
    assert "the model's are 0, 1, 2, 3, .. (10)" in done.sentence
