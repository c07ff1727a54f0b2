"""`lowvar estimate`: files, interval, resume, comparison, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

KEYS = {"command", "version", "seed", "seconds", "config"}
KEYS |= {"statistic", "value", "low", "high", "nfe", "design", "vrf", "nfe_independent"}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of one's own beside the run; a file `stop_at` says which call of `corner` is stopped."""
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "count = 0\n"
        "def corner(samples, **columns):\n"
        "    global count\n"
        "    count += 1\n"
        "    stop = Path('stop_at')\n"
        "    if stop.exists() and count >= int(stop.read_text()):\n"
        "        raise KeyboardInterrupt\n"
        "    return samples[:, 0, :2, :2].flatten(1).sum(1) ** 2\n"
        "def broken(samples, **columns):\n"
        "    return samples[:, 0, 0, 0] / 0\n"
        "def restless(samples, **columns):\n"
        "    global count\n"
        "    count += 1\n"
        "    return samples[:, 0, 0, 0] + count\n"
        "def explodes(samples, **columns):\n"
        "    return columns['prompts']\n"
        "def centred(samples, **columns):\n"
        "    return samples[:, 0, 4, 4] - samples[:, 0, 4, 4].mean()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "mine"
    sys.modules.pop("mine", None)


def words(model: Path, statistic: str, out: Path, *more: object) -> list[object]:
    start: list[object] = ["estimate", "--model", model, "--statistic", statistic, "--out", out, "--steps", 4]
    return [*start, "--device", "cpu", *more]


def test_a_number_with_its_interval(lowvar, calibrated: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = lowvar(*words(calibrated, "brightness", out, "--tol", 0.02, "--json"))
    assert done.status == 0, done.err
    summary = done.json
    assert summary.keys() >= KEYS
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["low"] < summary["value"] < summary["high"]
    assert (summary["high"] - summary["low"]) / 2 == pytest.approx(summary["half_width"])
    assert summary["half_width"] <= 0.02
    assert summary["reached"] is True
    assert summary["nfe"] >= 4 * summary["samples"]
    assert summary["design"] in [c["design"] for c in summary["decision"]["candidates"]]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["nfe"] == summary["nfe"]
    assert records[-1]["value"] == summary["value"]
    assert (out / "config.yaml").is_file()
    assert not (tmp_path / "run.partial").exists()
    assert not (out / "checkpoints").exists()
    page = (out / "report.html").read_bytes()
    assert lowvar("report", out).status == 0
    assert (out / "report.html").read_bytes() == page
    for said in ("The mean of brightness is", "What was compared, and why", "baseline", "How the interval narrowed"):
        assert said.encode() in page, said


def test_an_image_goes_to_estimate_npz(lowvar, calibrated: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ("--budget", 600, "--norm", "rms", "--sampler", "ddim", "--design", "antithetic+twin")
    done = lowvar(*words(calibrated, "mean", out, *settings))
    assert done.status == 0, done.err
    assert "antithetic+twin" in done.out
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["value"], summary["low"], summary["shape"]) == (None, None, [1, 8, 8])
    assert summary["nfe"] <= 600
    with np.load(out / "estimate.npz") as file:
        arrays = dict(file)
    assert arrays.keys() == {"value", "low", "high", "se"}
    assert all(a.shape == (1, 8, 8) for a in arrays.values())
    assert (arrays["low"] <= arrays["value"]).all()
    assert (arrays["value"] <= arrays["high"]).all()
    page = (out / "report.html").read_text()
    assert "standard error, from 0 (dark)" in page
    assert "1 × 8 × 8 numbers" in page


@pytest.mark.parametrize("sampler", [None, "ddpm-basis", "ddim", "twin-ode", "dpmpp-2m-sde", "heun"])
def test_the_chain_is_what_sample_draws(lowvar, calibrated: Path, tmp_path: Path, sampler: str | None) -> None:
    from lowvar.evaluation import sampler_of
    from lowvar.pipelines import open_pipeline
    from lowvar.process.noise import Independent

    more = [] if sampler is None else ["--sampler", sampler]
    drawn = tmp_path / "samples.npz"
    done = lowvar("sample", "--model", calibrated, "--steps", 4, "--n", 6, "--seed", 3, "--out", drawn, *more)
    assert done.status == 0, done.err
    settings: dict[str, Any] = {} if sampler is None else {"sampler": sampler}
    chain = sampler_of(open_pipeline(calibrated), 4, **settings)
    x = chain(torch.arange(6), Independent(3))
    with np.load(drawn) as file:
        assert np.abs(file["samples"] - x.numpy()).max() < 1e-4


@pytest.mark.parametrize("both", [False, True], ids=["one", "difference"])
def test_an_interrupted_run_goes_on_to_the_same_value(
    lowvar, model: Path, calibrated: Path, tmp_path: Path, module: str, both: bool
) -> None:
    against = ("--against", model, "--sampler", "ddim") if both else ()
    settings = ("--budget", 3200 if both else 1600, "--batch-size", 32, "--quiet", *against)
    whole, out, partial = tmp_path / "whole", tmp_path / "run", tmp_path / "run.partial"
    model = calibrated if both else model
    assert lowvar(*words(model, f"{module}:corner", whole, *settings)).status == 0
    sys.modules.pop(module)
    (tmp_path / "stop_at").write_text("28" if both else "9")
    done = lowvar(*words(model, f"{module}:corner", out, *settings))
    assert done.status == 130
    assert "interrupted after" in done.sentence
    assert "give the same command with --resume" in done.sentence
    assert not out.exists()
    assert (partial / "checkpoints").is_dir()
    (tmp_path / "stop_at").unlink()
    again = lowvar(*words(model, f"{module}:corner", out, *settings))
    assert again.status == 2
    assert "holds an unfinished run; go on with --resume, or start anew with --overwrite" in again.sentence
    other = lowvar(*words(model, f"{module}:corner", out, *settings, "--seed", 5, "--resume"))
    assert other.status == 2
    assert "has seed 0, now it is 5; resume with the same arguments" in other.sentence
    assert lowvar(*words(model, f"{module}:corner", out, *settings, "--resume")).status == 0
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (whole, out))
    assert all(a[k] == b[k] for k in ("value", "low", "high", "nfe", "samples", "design", "vrf"))
    assert (whole / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()
    assert a.get("value_a") == b.get("value_a")
    assert not partial.exists()


def test_a_run_stopped_in_its_pilot_leaves_nothing(lowvar, model: Path, tmp_path: Path, module: str) -> None:
    (tmp_path / "stop_at").write_text("3")
    done = lowvar(*words(model, f"{module}:corner", tmp_path / "run", "--tol", 0.1))
    assert done.status == 130
    assert "before the pilot was done; nothing is kept" in done.sentence
    assert not (tmp_path / "run.partial").exists()


def test_a_difference_on_common_noise(lowvar, calibrated: Path, model: Path, tmp_path: Path) -> None:
    same = lowvar(
        *words(
            calibrated,
            "brightness",
            tmp_path / "a",
            "--tol",
            0.01,
            "--sampler",
            "ddim",
            "--against",
            calibrated,
            "--json",
        )
    )
    assert same.status == 0, same.err
    assert (same.json["value"], same.json["low"], same.json["high"]) == (0, 0, 0)
    done = lowvar(*words(calibrated, "brightness", tmp_path / "b", "--budget", 1200, "--against", model))
    assert done.status == 0, done.err
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert summary["value"] == pytest.approx(summary["value_a"] - summary["value_b"], abs=0.02)
    assert summary["against"] == str(model)
    assert summary["factor"] > 0
    assert "The difference in brightness to" in (tmp_path / "b" / "report.html").read_text()


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained conditional pipeline of three classes that differ, because their embeddings are drawn large."""
    from diffusers import DDPMScheduler, UNet2DModel

    from lowvar.own_pipelines import ClassConditionalPipeline

    folder = tmp_path_factory.mktemp("models") / "classes"
    torch.manual_seed(0)
    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    blocks |= {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    unet: Any = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, num_class_embeds=4, **blocks)
    with torch.no_grad():
        unet.class_embedding.weight.mul_(20)
    scheduler: Any = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    ClassConditionalPipeline(unet, scheduler, ["a", "b", "c"]).save_pretrained(str(folder))
    return folder


def test_a_class_and_its_guidance(lowvar, classes: Path, tmp_path: Path) -> None:
    def value(name: str, *more: object) -> dict[str, Any]:
        done = lowvar(*words(classes, "brightness", tmp_path / name, "--budget", 600, "--sampler", "ddim", *more))
        assert done.status == 0, done.err
        return json.loads((tmp_path / name / "summary.json").read_text())

    named, numbered = value("a", "--label", "b"), value("b", "--label", 1)
    assert named["value"] == numbered["value"]
    none, guided = value("c"), value("d", "--label", "b", "--guidance", 2)
    assert len({named["value"], none["value"], guided["value"]}) == 3
    assert guided["samples"] <= 600 // 8  # two evaluations a step


def test_each_class_is_a_stratum(lowvar, classes: Path, tmp_path: Path) -> None:
    """The mean over all classes is the mean of the classes' means, and the planner looks at strata."""
    settings = ("--budget", 12000, "--sampler", "ddim", "--json")
    each = lowvar(*words(classes, "brightness", tmp_path / "each", *settings, "--label", "each")).json
    assert "stratified" in [c["design"] for c in each["decision"]["candidates"]]
    one = [lowvar(*words(classes, "brightness", tmp_path / c, *settings, "--label", c)).json for c in "abc"]
    mean, se = sum(r["value"] for r in one) / 3, sum(r["se"] for r in one) / 3
    assert abs(each["value"] - mean) < 4 * (each["se"] + se)
    named = lowvar(
        *words(classes, "brightness", tmp_path / "n", *settings, "--label", "each", "--design", "stratified")
    )
    assert named.status == 0, named.err
    assert abs(named.json["value"] - mean) < 4 * (named.json["se"] + se)


@pytest.mark.parametrize("score", ["energy", pytest.param("frechet", marks=pytest.mark.slow)])
def test_a_score_that_is_no_mean(lowvar, model: Path, tmp_path: Path, score: str) -> None:
    out = tmp_path / "run"
    done = lowvar(*words(model, score, out, "--budget", 800, "--data", "digits", "--json"))
    assert done.status == 0, done.err
    summary = done.json
    assert summary.keys() >= KEYS
    assert summary["low"] < summary["value"] < summary["high"]
    assert (summary["samples"], summary["nfe"]) == (192, 768)
    assert summary["at_n"]["value"] - summary["bias"] == pytest.approx(summary["value"])
    page = (out / "report.html").read_text()
    for said in ("independent blocks", f"The {score} distance to digits, its bias taken off, is"):
        assert said in page, said


REFUSED = [
    (("brightness",), "--tol and --budget are missing"),
    (("brightness", "--tol", 0), "--tol is 0; give a half width above 0"),
    (("brightness", "--tol", "nan"), "--tol is nan"),
    (("brightness", "--budget", 0), "--budget is 0; give a whole number from 1"),
    (("brightness", "--budget", 100), "budget is 100 evaluations and the pilot of 64 samples costs"),
    (("brightness", "--tol", 0.1, "--pilot", 31), "--pilot is 31; give an even number of samples from 32"),
    (("sharpness", "--tol", 0.1), "there is no statistic 'sharpness'; allowed: brightness, mean, jpeg"),
    (("nowhere:f", "--tol", 0.1), "there is no module 'nowhere'"),
    (("mine:nothing", "--tol", 0.1), "module 'mine' has no function 'nothing'; it has"),
    (("mine:broken", "--tol", 0.1), "statistic 'mine:broken' is"),
    (
        ("mine:explodes", "--tol", 0.1),
        "statistic 'mine:explodes' raised KeyError: 'prompts'; it is called as f(samples",
    ),
    (("mine:restless", "--tol", 0.1), "is random itself: sample 0"),
    (("mine:centred", "--tol", 0.1), "must not depend on the other samples"),
    (("brightness", "--tol", 0.1, "--design", "magic"), "give 'auto' or parts of it joined by '+'"),
    (("brightness", "--tol", 0.1, "--design", "stratified"), "stratified"),
    (("brightness", "--tol", 0.1, "--steps", 5000), "steps is 5000; give a whole number from 1 to 1000"),
    (("brightness", "--tol", 0.1, "--sampler", "magic"), "sampler is 'magic'; allowed"),
    (("brightness", "--tol", 0.1, "--guidance", 2), "there is no class to guide to"),
    (("class:3", "--tol", 0.1, "--data", "photos:8"), "--data photos:8 has images (3, 8, 8), and the model makes"),
    (("brightness", "--tol", 0.1, "--label", "each"), "--label is 'each', and the model has no classes"),
    (("energy", "--tol", 0.1, "--data", "digits"), "energy is no mean and has no tolerance to stop at; give --budget"),
    (("frechet", "--budget", 4000), "frechet is a distance to data; give --data"),
    (("kernel", "--budget", 100, "--data", "digits"), "kernel takes 32 blocks of at least 2 samples, 256 evaluations"),
    (("energy", "--budget", 900, "--data", "digits", "--design", "sobol"), "takes independent samples only"),
    (("energy", "--budget", 900, "--data", "digits", "--against", "."), "takes neither --against nor --resume"),
    (("energy", "--budget", 900, "--data", "photos:8"), "give reference images of the model's shape"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_one_sentence(lowvar, calibrated: Path, tmp_path: Path, module: str, given, said: str) -> None:
    out = tmp_path / "run"
    done = lowvar(*words(calibrated, given[0], out, *given[1:]))
    assert done.status == 2, done.err
    assert said in done.sentence
    assert not out.exists()
    assert not (tmp_path / "run.partial").exists()


def test_an_existing_folder_is_kept(lowvar, calibrated: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    done = lowvar(*words(calibrated, "brightness", tmp_path / "run", "--tol", 0.5))
    assert done.status == 2
    assert "exists already; give another path, or --overwrite" in done.sentence
