"""`lowvar profile`: what stands in its summary and on its page, budgets, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bs4 import BeautifulSoup

from lowvar.cli.profile import Profile
from lowvar.cli.profile_summary import trained_batch
from lowvar.report import build

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def profiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lowvar.cli import main

    out = tmp_path_factory.mktemp("profiles") / "p"
    words = ["profile", "--model", str(model), "--data", "digits", "--batch-size", "4", "--minutes", "0.01"]
    assert main([*words, "--parts", "training", "--out", str(out), "--quiet"]) == 0
    return out


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_summary(profiled: Path) -> None:
    """The contract's keys; shares and parts sum to 1; the least work is done however short the budget."""
    found = summary(profiled)
    assert list(found["shares"]) == ["x", "t", "eps", "x,t", "x,eps", "t,eps", "x,t,eps"]
    assert sum(part["value"] for part in found["shares"].values()) == pytest.approx(1)
    assert sum(group["variance"]["value"] for group in found["groups"]) == pytest.approx(1)
    assert len(found["levels"]) == 8
    assert found["levels"][0]["logsnr_high"] > found["levels"][0]["logsnr_low"] > found["levels"][1]["logsnr_low"]
    assert (found["blocks"], found["replicates"]) == (16, 16)
    assert {"name", "vrf", "low", "high", "cost"} <= found["techniques"][0].keys()
    assert {"do", "expect", "command"} <= found["verdict"][0].keys()
    assert found["noise_scale"].keys() == {"value", "low", "high"}
    assert [line["worth"] for line in found["verdict"]] == sorted(
        (line["worth"] for line in found["verdict"]), reverse=True
    )


def test_page(profiled: Path, tmp_path: Path) -> None:
    """Verdict first, then sources and techniques; rebuilding gives the same bytes; nothing is loaded."""
    page = (profiled / "report.html").read_text()
    places = [page.index(f'<section id="{name}"') for name in ("verdict", "sources", "techniques")]
    assert places == sorted(places)
    assert "Where the variance comes from, by noise level" in page
    assert "http" not in page.replace("http-equiv", "")
    build(profiled)
    assert (profiled / "report.html").read_text() == page


@pytest.mark.slow
def test_sketches(lowvar: Any, model: Path, tmp_path: Path) -> None:
    """Where gradients do not fit the memory, directions stand for them, and the page says so."""
    words = [
        "--data",
        "digits",
        "--batch-size",
        4,
        "--minutes",
        0.01,
        "--memory",
        1e-6,
        "--parts",
        "training",
        "--out",
        tmp_path / "p",
        "--json",
    ]
    done = lowvar("profile", "--model", model, *words)
    assert done.status == 0, done.err
    assert done.json["directions"] > 0
    assert "random directions" in (tmp_path / "p" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch-size", 6), "--batch-size is 6; give a multiple of 4, so that pairs and groups fit"),
        (("--batch-size", 2), "--batch-size is 2; give a whole number from 4"),
        (("--minutes", "never"), "--minutes is 'never'; give a number; see `lowvar profile --help`"),
        (("--minutes", 0), "--minutes is 0; give a number above 0"),
        (("--memory", -1), "--memory is -1; give a number above 0"),
        (("--parts", "training,tuning"), "--parts has 'tuning'; allowed: all, training, sampling, statistics, reward"),
        (
            ("--parts", "reward"),
            "--parts has 'reward', and there is no reward; give --reward, for example brightness",
        ),
        (
            ("--reward", "2 times jpeg"),
            (
                "reward '2 times jpeg' is no name or sum of names; give for example jpeg, 0.5*jpeg+20*brightness or "
                "module:function"
            ),
        ),
        (("--steps", 1), "--steps is 1; give a whole number from 2"),
        (
            ("--batch-size", 4000),
            "--batch-size is 4000 and the training split has 1197 images; give at most that, or more data",
        ),
    ],
    ids=["groups", "none", "no number", "minutes", "memory", "parts", "no reward", "no sum", "steps", "small data"],
)
def test_refusals(lowvar: Any, model: Path, tmp_path: Path, words: tuple[object, ...], said: str) -> None:
    done = lowvar("profile", "--model", model, "--data", "digits", "--out", tmp_path / "p", *words)
    assert (done.status, done.sentence) == (2, said)
    assert not list(tmp_path.iterdir())


def test_default_budget() -> None:
    assert Profile(model="m", data="digits", out=Path("p")).minutes == 5


def test_no_profile(lowvar: Any, model: Path, tmp_path: Path) -> None:
    """What is no profile is refused by all that read one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text('{"command": "train"}')
    data = ("--data", "digits", "--out", tmp_path / "o")
    said = f"is {tmp_path / 'run'}, which is no profile; give a folder that `lowvar profile` wrote"
    for flag, words in (
        ("--against", ("profile", "--model", model)),
        ("--from-profile", ("calibrate", "--model", model)),
        ("--from-profile", ("train",)),
    ):
        done = lowvar(*words, *data, flag, tmp_path / "run")
        assert (done.status, done.sentence) == (2, f"{flag} {said}")


def verdict(folder: Path, *lines: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"command": "profile", "verdict": list(lines)}))
    return folder


def test_train_applies_a_verdict(lowvar: Any, tmp_path: Path) -> None:
    """The best technique and the batch; what the config and flags say wins; lines not worth doing are left alone."""
    line = {"worth": True, "part": "training", "do": "", "settings": {}}
    profile = verdict(
        tmp_path / "profile",
        line | {"fault": True, "settings": {"times": "uniform"}},
        line | {"settings": {"pairing": "cross", "stratified": True}},
        line | {"settings": {"variance_reduction": "auto"}},
        line | {"settings": {"batch_size": 16}},
        line | {"worth": False, "settings": {"pairing": "sobol"}},
        line | {"part": "sampling", "settings": {"sampler": "ddim"}},
    )
    (tmp_path / "config.yaml").write_text("network: {width: 8, levels: 1}\nwarmup: 0\nbatch_size: 8\n")
    words = ("train", "--data", "digits", "--updates", 1, "--config", tmp_path / "config.yaml")
    done = lowvar(*words, "--from-profile", profile, "--profile-every", 1, "--out", tmp_path / "o", "--json")
    assert done.status == 0, done.err
    config = done.json["config"]
    found = {k: config[k] for k in ("times", "pairing", "stratified", "target", "batch_size")}
    assert found == {"times": "uniform", "pairing": "cross", "stratified": True, "target": "plain", "batch_size": 8}


def test_calibrate_needs_a_sampler(lowvar: Any, model: Path, tmp_path: Path) -> None:
    profile = verdict(tmp_path / "profile", {"worth": True, "part": "training", "settings": {"batch_size": 128}})
    done = lowvar("calibrate", "--model", model, "--data", "digits", "--from-profile", profile, "--out", tmp_path / "o")
    assert done.status == 2
    assert done.sentence == (
        f"--from-profile is {profile}, whose verdict names no sampler; profile with --parts sampling, or leave it out "
        "for a comparison here"
    )


@pytest.mark.slow
def test_calibrate_applies_a_verdict(lowvar: Any, model: Path, tmp_path: Path) -> None:
    """Sampler and grid of the verdict are the scheduler's, without a comparison."""
    settings = {"sampler": "unipc-basis", "grid": "trailing", "steps": 4}
    profile = verdict(tmp_path / "profile", {"worth": True, "part": "sampling", "settings": settings})
    words = ("calibrate", "--model", model, "--data", "digits", "--n", 32, "--replicates", 1, "--steps", 2)
    done = lowvar(*words, "--from-profile", profile, "--out", tmp_path / "o", "--json")
    assert done.status == 0, done.err
    assert done.json["recommended"] == settings
    assert "rows" not in done.json
    scheduler = json.loads((tmp_path / "o" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["sampler"], scheduler["grid"]) == ("unipc-basis", "trailing")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of one's own beside the run: a filter of 64 numbers."""
    text = "import torch\n\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    text += "        self.scale = torch.nn.Parameter(torch.full((64,), 0.5))\n\n"
    text += "    def forward(self, x, timestep):\n        return x * self.scale.reshape(1, 1, 8, 8)\n"
    (tmp_path / "my_profiled_net.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_profiled_net:Net"


def test_a_module_and_an_earlier_profile(lowvar: Any, module: str, profiled: Path, tmp_path: Path) -> None:
    """A plain module with a declared prediction is profiled, and stands beside the earlier profile."""
    words = ("profile", "--model", module, "--prediction", "v_prediction", "--data", "digits")
    more = ("--parts", "training", "--minutes", 0.002, "--batch-size", 4, "--against", profiled)
    done = lowvar(*words, *more, "--out", tmp_path / "o", "--json")
    assert done.status == 0, done.err
    assert done.json["network"]["prediction"] == "v_prediction"
    assert done.json["network"]["parameters"] == 64
    kept = [line["do"] for line in summary(profiled)["verdict"] if line["worth"] and line["part"] == "training"]
    techniques = {row["name"] for row in done.json["techniques"]} & set(kept)
    whats = {row["what"] for row in done.json["against"]["rows"]}
    assert {f"variance reduction of {name}" for name in techniques} <= whats
    if whats:
        assert "Was it as promised?" in (tmp_path / "o" / "report.html").read_text()


def test_sampling_statistics_and_reward(lowvar: Any, module: str, tmp_path: Path) -> None:
    """The other parts within their least sizes; what does not fit is noted, and every chart has its words."""
    words = ("profile", "--model", module, "--prediction", "v_prediction", "--data", "digits", "--steps", 4)
    more = ("--parts", "sampling,statistics", "--statistic", "brightness", "--minutes", 0.08)
    more += ("--reward", "2*brightness-0.001*jpeg")
    done = lowvar(*words, *more, "--out", tmp_path / "p", "--json")
    assert done.status == 0, done.err
    found = done.json["reverse"]
    assert found["own"] == "the scheduler's (small)"
    assert [v["name"] for v in found["variances"]] == ["one number a level", "basis", "the scheduler's (small)"]
    assert len(found["variances"][0]["ratio"]) == 3
    for name in ("one number a level", "basis"):
        ratio = next(v["ratio"] for v in found["variances"] if v["name"] == name)
        assert all(0.8 < r["value"] < 1.25 for r in ratio)
    assert {line["part"] for line in done.json["verdict"]} <= {"sampling", "statistics", "reward"}
    assert all(line["settings"]["sampler"] != "ddpm-small" for line in done.json["verdict"] if line["fault"])
    said = " ".join(done.json["notes"])
    assert done.json["statistics"] or "no designs for brightness" in said
    assert "reward" in done.json or "no estimators for reward 2*brightness-0.001*jpeg" in said
    assert {"steps", "mmse", "standardised"} <= json.loads((tmp_path / "p" / "figures.json").read_text()).keys()
    page = (tmp_path / "p" / "report.html").read_text()
    drawn = [svg for svg in BeautifulSoup(page, "html.parser").find_all("svg") if svg.get("role") == "img"]
    assert len(drawn) >= 5
    assert all(len(str(svg.get("aria-label") or svg.find("title"))) > 20 for svg in drawn)
    for title in ("What each step costs", "How many steps", "Is the variance right?"):
        assert title in page


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DiT of two classes, untrained, in the pipeline that the library writes for classes."""
    from diffusers import DiTTransformer2DModel

    from lowvar.own_pipelines import ClassConditionalPipeline
    from lowvar.schedulers import ReverseVarianceScheduler

    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 1}
    network: Any = DiTTransformer2DModel(**shape, sample_size=8, patch_size=2, num_embeds_ada_norm=10)  # type: ignore[arg-type]
    scheduler = ReverseVarianceScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    folder = tmp_path_factory.mktemp("models") / "dit"
    ClassConditionalPipeline(network, scheduler, [str(k) for k in range(10)]).save_pretrained(str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_folders_of_diffusers(lowvar: Any, model: Path, dit: Path, kind: str, tmp_path: Path) -> None:
    """All parts on a UNet2DModel with a learned-range head and on a DiT with classes."""
    folder = {"unet": model, "dit": dit}[kind]
    words = ("profile", "--model", folder, "--data", "digits", "--minutes", 0.3, "--steps", 4, "--batch-size", 8)
    done = lowvar(*words, "--reward", "brightness", "--out", tmp_path / "p", "--json")
    assert done.status == 0, done.err
    assert done.json["reverse"]["own"] == f"the scheduler's ({'learned' if kind == 'unet' else 'small'})"
    assert done.json["shares"]
    assert done.json["verdict"]


@pytest.mark.slow
def test_it_renders(chromium: Any, profiled: Path, tmp_path: Path) -> None:
    """In a browser, wide and on a phone: no error, no request, nothing wider than the window."""
    page = profiled / "report.html"
    assert not chromium.console(page)
    assert "Verdict" in chromium.dom(page)
    for width in (390, 1280):
        assert chromium.screenshot(page, tmp_path / f"{width}.png", width=width).stat().st_size > 10_000


def test_the_batch_is_the_one_that_the_model_was_trained_with(tmp_path: Path) -> None:
    """A run of `lowvar train` says its batch; other folders and damaged summaries stand for 64."""
    assert trained_batch(tmp_path) == 64
    for text, batch in (
        ('{"command": "train", "config": {"batch_size": 2}}', 2),
        ('{"command": "sample", "config": {"batch_size": 2}}', 64),
        ('{"command": "train", "config": {"batch_size": "x"}}', 64),
        ("no JSON", 64),
    ):
        (tmp_path / "summary.json").write_text(text)
        assert trained_batch(tmp_path) == batch
