"""`lowvar tune`: its files, resume, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

Lowvar = Callable[..., Any]

KEYS = {"command", "version", "seed", "seconds", "config", "reward_before", "reward_after", "kl", "reward_calls"}
KEYS |= {"estimator", "quality_before", "quality_after"}


def words(model: Path, out: Path, *more: object, reward: str = "jpeg") -> list[object]:
    small = ("--steps", 2, "--batch-size", 16, "--num-generations", 4, "--n", 64, "--updates", 4, "--device", "cpu")
    return ["tune", "--model", model, "--reward", reward, "--out", out, *small, *more]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of one's own; files say when its reward is stopped or broken."""
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "calls = 0\n"
        "def corner(samples, **columns):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    for name in ('stop_at', 'break_at'):\n"
        "        if Path(name).exists() and calls >= int(Path(name).read_text()):\n"
        "            if name == 'stop_at':\n"
        "                raise KeyboardInterrupt\n"
        "            return samples[:, 0, 0, 0] / 0\n"
        "    return samples[:, 0, :2, :2].flatten(1).sum(1)\n"
        "corner.differentiable = True\n"
        "async def later(samples, **columns):\n"
        "    return samples.flatten(1).mean(1)\n"
        "def of_label(samples, label):\n"
        "    return samples[:, 0, 0, 0] * label\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "mine"
    sys.modules.pop("mine", None)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_files_and_summary(lowvar: Lowvar, model: Path, tmp_path: Path) -> None:
    """The contract's keys; stock diffusers opens the folder; the page says what was found, the same when rebuilt."""
    from diffusers import DiffusionPipeline

    out = tmp_path / "run"
    done = lowvar(*words(model, out, "--json", reward="0.1*jpeg+brightness"))
    assert done.status == 0, done.err
    summary = done.json
    assert summary.keys() >= KEYS
    assert json.loads((out / "summary.json").read_text()) == summary
    for key in ("reward_before", "reward_after", "quality_before", "quality_after", "gain"):
        assert summary[key]["low"] < summary[key]["value"] < summary[key]["high"]
    rise = summary["reward_after"]["value"] - summary["reward_before"]["value"]
    assert summary["gain"]["value"] == pytest.approx(rise, rel=1e-4, abs=1e-4)
    assert summary["kl_low"] <= summary["kl"] <= summary["kl_high"]
    chosen = [row["estimator"] for row in summary["choice"]["rows"]]
    assert summary["estimator"] in chosen
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["update"] for r in records] == [0, 1, 2, 3]
    assert records[-1]["check"]["reward"] == summary["reward_after"]
    pilots, checks = len(chosen) * 4 * 16, 5 * 64
    assert summary["reward_calls"] == 4 * 16 + pilots + checks
    opened: Any = DiffusionPipeline.from_pretrained(out)
    opened.set_progress_bar_config(disable=True)
    assert opened(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
    before, after = weights(model), weights(out)
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["scheduler", "unet"]
    page = (out / "report.html").read_bytes()
    for said in ("Reward against KL", "Held-out quality", "Gradient-to-noise ratio", "(chosen)", "before tuning"):
        assert said.encode() in page, said
    assert lowvar("report", out).status == 0
    assert (out / "report.html").read_bytes() == page


@pytest.mark.parametrize(
    "stop",
    [pytest.param(1, marks=pytest.mark.slow), 26, pytest.param(27, marks=pytest.mark.slow)],
    ids=["first check", "an update", "the next"],
)
def test_an_interrupted_run_goes_on_to_the_same_weights(
    lowvar: Lowvar, model: Path, tmp_path: Path, module: str, stop: int
) -> None:
    """The same weights and records as undisturbed, with "auto", whose pilot asks the reward 24 times."""
    settings = ("--estimator", "auto", "--checkpoint-every", 1, "--quiet", "--average", 0.5, "--beta", 0.01)
    settings = (*settings, "--check-every", 4)
    whole, out, partial = tmp_path / "whole", tmp_path / "run", tmp_path / "run.partial"
    reward = f"{module}:corner"
    assert lowvar(*words(model, whole, *settings, reward=reward)).status == 0
    sys.modules.pop(module)
    (tmp_path / "stop_at").write_text(str(stop))
    done = lowvar(*words(model, out, *settings, reward=reward))
    assert done.status == 130
    assert not out.exists()
    (tmp_path / "stop_at").unlink()
    again = lowvar(*words(model, out, *settings, reward=reward))
    assert again.status == 2
    assert "holds an unfinished run; go on with --resume, or start anew with --overwrite" in again.sentence
    other = lowvar(*words(model, out, *settings, "--resume", "--lr", 1e-3, reward=reward))
    assert other.status == 2
    assert "has lr 0.0001, now it is 0.001; resume with the same arguments" in other.sentence
    sys.modules.pop(module)
    assert lowvar(*words(model, out, *settings, "--resume", reward=reward)).status == 0
    assert not partial.exists()
    a, b = weights(whole), weights(out)
    assert all(torch.equal(a[k], b[k]) for k in a)
    lines = [
        [json.loads(line) | {"seconds": 0} for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (whole, out)
    ]
    assert lines[0] == lines[1]


def test_a_broken_reward_is_named_and_nothing_is_lost(lowvar: Lowvar, model: Path, tmp_path: Path, module: str) -> None:
    settings = ("--estimator", "leave-one-out", "--check-every", 4, "--checkpoint-every", 100, "--quiet")
    reward, out = f"{module}:corner", tmp_path / "run"
    (tmp_path / "break_at").write_text("4")  # one check before, then an update a call
    done = lowvar(*words(model, out, *settings, reward=reward))
    assert done.status == 2
    assert "batch 2: the reward raised UserError: statistic 'mine:corner' is" in done.sentence
    assert "give the same command with --resume" in done.sentence
    assert [p.name for p in (tmp_path / "run.partial" / "checkpoints").iterdir()] == ["update-0000002"]
    (tmp_path / "break_at").unlink()
    assert lowvar(*words(model, out, *settings, "--resume", reward=reward)).status == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    (tmp_path / "break_at").write_text("0")
    first = lowvar(*words(model, tmp_path / "other", *settings, reward=reward))
    assert first.status == 2
    assert "nothing was tuned" in first.sentence


def test_asynchronous_rewards(lowvar: Lowvar, model: Path, tmp_path: Path, module: str) -> None:
    settings = ("--estimator", "leave-one-out", "--updates", 1, "--json")
    done = lowvar(*words(model, tmp_path / "run", *settings, reward=f"2*{module}:later"))
    assert done.status == 0, done.err
    same = lowvar(*words(model, tmp_path / "same", *settings, reward="2*brightness"))
    assert done.json["reward_before"] == same.json["reward_before"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--estimator", "best"), "estimator is 'best'; allowed: auto, none, leave-one-out"),
        (("--estimator", "pathwise-3"), "the sampler has 2 steps; give K from 1 to 2"),
        (("--estimator", "pathwise"), "--estimator pathwise cannot run here: the reward has no derivative"),
        (("--batch-size", 12), "--batch-size is 12; give a multiple of 8"),
        (("--floor", 0), "does not say that it has a derivative; give --floor 0.05"),
        (("--eta", 0), "--eta is 0; give a number above 0"),
        (("--eta", 2), "--eta is 2; give a number above 0, at most 1"),
        (("--target-kl", 5), "and --beta 0; a target steers beta"),
        (("--num-iterations", 2), "only an estimator by scores can use its runs again"),
        (("--estimator", "grpo", "--scale-rewards", "group"), "and estimator 'grpo' takes none"),
        (("--n", 10), "--n is 10; give a whole number from 64"),
        (("--label", "3"), "the model has no classes"),
        (("--average", 1), "--average is 1; give a decay from 0"),
        (("--data", "nowhere"), "nowhere"),
        (("--lr", "nan"), "--lr is nan; give a number above 0"),
    ],
    ids=lambda v: "-".join(map(str, v)).strip("-") if isinstance(v, tuple) else "",
)
def test_bad_input(lowvar: Lowvar, model: Path, tmp_path: Path, more: tuple[object, ...], said: str) -> None:
    done = lowvar(*words(model, tmp_path / "run", *more))
    assert done.status == 2
    assert said in done.sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("sharpness", "there is no statistic 'sharpness'; allowed: brightness"),
        ("jpeg+", "is no name or sum of names"),
        ("2*", "is no name or sum of names"),
        ("mean", "is the sample itself, and a reward is one number"),
        ("class:12", "names no class of the data"),
        ("nomodule:f", "there is no module 'nomodule'"),
        ("math:nothing", "has no function 'nothing'"),
    ],
)
def test_bad_rewards(lowvar: Lowvar, model: Path, tmp_path: Path, reward: str, said: str) -> None:
    done = lowvar(*words(model, tmp_path / "run", reward=reward))
    assert done.status == 2
    assert said in done.sentence
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused(lowvar: Lowvar, model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    done = lowvar(*words(model, tmp_path / "run"))
    assert done.status == 2
    assert "exists already; give another path, or --overwrite" in done.sentence
