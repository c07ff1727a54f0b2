"""Checkpoints of guided-diffusion: against the original programs' own numbers, and what is refused.

The expected numbers in guided_golden.json are outputs of openai/guided-diffusion (commit 22e0df8) with weights and
inputs that `uniform` makes anew here: SplitMix64 (Steele et al. 2014) keyed by the tensor's name, the same everywhere.
Written by

    PYTHONPATH=src:FOLDER python tests/adapters/test_guided_diffusion.py     # FOLDER: a checkout of the original
"""

from __future__ import annotations

import json
import math
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowvar.adapters import (
    GuidedFlags,
    guided_diffusion_denoiser,
    guided_diffusion_pipeline,
    guided_unet,
    unet_from_guided,
)
from lowvar.errors import UserError
from lowvar.pipelines import denoiser_of, open_pipeline
from lowvar.process.kernel import ReverseKernel

torch.set_num_threads(1)

# --------------------------------------------------------------------------------------------------------------- recipe

GOLDEN = Path(__file__).with_name("guided_golden.json")
STRIDE = 37  # of the entries that are kept; prime to the sizes
TIMESTEPS = (7, 41)
LABELS = (3, 998)
_SMALL = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "diffusion_steps": 100}
CASES: dict[str, dict[str, Any]] = {
    "heads, old order": {**_SMALL, "attention_resolutions": "8", "num_heads": 4},
    "heads, new order": {
        **_SMALL,
        "attention_resolutions": "8",
        "num_heads": 4,
        "use_new_attention_order": True,
        "noise_schedule": "cosine",
    },
    "resnet updown, variance head": {
        **_SMALL,
        "channel_mult": "1,2,3",
        "attention_resolutions": "16,4",
        "num_head_channels": 16,
        "resblock_updown": True,
        "learn_sigma": True,
    },
    "resnet updown, new order": {
        **_SMALL,
        "num_res_blocks": 2,
        "attention_resolutions": "16,8",
        "num_head_channels": 8,
        "resblock_updown": True,
        "use_new_attention_order": True,
        "use_scale_shift_norm": False,
    },
    "classes, rescaled timesteps, variance head": {
        **_SMALL,
        "attention_resolutions": "8",
        "num_heads": 2,
        "class_cond": True,
        "learn_sigma": True,
        "rescale_timesteps": True,
        "noise_schedule": "cosine",
    },
    "one head, predicts x_0": {
        **_SMALL,
        "num_res_blocks": 2,
        "attention_resolutions": "16,8",
        "num_heads": 1,
        "use_scale_shift_norm": False,
        "predict_xstart": True,
    },
}


def uniform(name: str, shape: Sequence[int]) -> Tensor:
    """Numbers in [-1, 1) of a shape, float64, a function of the name."""
    with np.errstate(over="ignore"):
        n = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
        z = np.uint64(zlib.crc32(name.encode())) + n * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    u = (z >> np.uint64(11)).astype(np.float64) / 2.0**52 - 1
    return torch.from_numpy(u).reshape(tuple(shape))


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A state dict: matrices of gain 1 (4 in q, k and v, so that attention is far from even), vectors within 0.5."""
    state = {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:])
        gain = (4.0 if "qkv" in name else 1.0) * math.sqrt(3 / fan_in) if len(shape) > 1 else 0.5
        state[name] = (gain * uniform(name, shape)).float()
    return state


def images() -> Tensor:
    """The states, (2, 3, 16, 16)."""
    return (1.5 * uniform("x", (2, 3, 16, 16))).float()


def kept(values: Tensor) -> Tensor:
    """The entries of a tensor that stand in the file."""
    return values.flatten()[::STRIDE]


def _numbers(values: Tensor) -> list[float]:
    return [float(f"{v:.7g}") for v in kept(values).tolist()]


# --------------------------------------------------------------------------------------------------------------- parity


def golden(case: str) -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())[case]


def checkpoint(case: str, folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file(weights(golden(case)["shapes"]), file)
    return file


def given(case: str) -> dict[str, Any]:
    return {"class_labels": torch.tensor(LABELS)} if CASES[case].get("class_cond") else {}


def close(values: Tensor, expected: list[float], tolerance: float) -> None:
    torch.testing.assert_close(kept(values).double(), torch.tensor(expected).double(), rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_original_numbers(case: str, tmp_path: Path) -> None:
    """Network, x0_hat, mean and variance of a step; 1e-5: float32 through 20 layers differs by 3e-6, measured."""
    flags, expected = CASES[case], golden(case)
    denoiser = guided_diffusion_denoiser(checkpoint(case, tmp_path), flags, clip=None, **given(case))
    x, n = images(), torch.tensor(TIMESTEPS)
    t, s = (denoiser.schedule.at(denoiser.schedule.time_of(v)) for v in (n, n - 1))
    out, head = denoiser.raw(x, t)
    assert (head is not None) == bool(flags.get("learn_sigma")) == (denoiser.head == "range")
    close(out if head is None else torch.cat([out, head], 1), expected["output"], 1e-5)
    posterior = denoiser(x, t)
    # eps is divided by alpha_t: sigma / alpha is below 3 here
    close(posterior.mean, expected["x0"], 3e-5)
    law = ReverseKernel(eta=1.0, variance="large" if head is None else "learned")(x, posterior, t, s)
    close(law.mean, expected["mean"], 1e-5)
    close(law.covariance.diagonal().expand_as(x), expected["variance"], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", ["heads, old order", "resnet updown, new order"])
def test_orders_of_attention_are_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other order of heads, and q, k, v permuted, each give other numbers: the test above would fail."""
    flags = GuidedFlags.read(CASES[case])
    state = weights(golden(case)["shapes"])
    x, n = images(), torch.tensor(TIMESTEPS)

    def output(flags: GuidedFlags) -> Tensor:
        return unet_from_guided(state, flags)(x, n).sample

    right = output(flags)
    other = GuidedFlags.read({**CASES[case], "use_new_attention_order": not flags.use_new_attention_order})
    assert float((output(other) - right).abs().max()) > 0.01
    split = guided_unet._split
    for order in ((1, 0, 2), (0, 2, 1), (2, 1, 0)):
        monkeypatch.setattr(
            guided_unet, "_split", lambda *args, order=order: tuple(split(*args)[part] for part in order)
        )
        assert float((output(flags) - right).abs().max()) > (1e-4 if order == (1, 0, 2) else 0.01)


def test_schedules() -> None:
    """The tables by the original's definition, for other T than 1000; 1e-12: a product of T float64 numbers."""
    for T in (50, 4000):
        betas = np.linspace(1000 / T * 1e-4, 1000 / T * 0.02, T)
        linear: Any = GuidedFlags(diffusion_steps=T).schedule
        np.testing.assert_allclose(linear.alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=1e-12)
        bar = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
        cosine: Any = GuidedFlags(diffusion_steps=T, noise_schedule="cosine").schedule
        np.testing.assert_allclose(cosine.alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=1e-12)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of libraries below diffusers
@pytest.mark.parametrize("case", ["resnet updown, variance head", "one head, predicts x_0"])
def test_pipeline_folder(case: str, tmp_path: Path) -> None:
    """Saved and opened again, the pipeline's denoiser is the checkpoint's, bit for bit, clipped alike."""
    file = checkpoint(case, tmp_path)
    direct = guided_diffusion_denoiser(file, CASES[case])
    guided_diffusion_pipeline(file, CASES[case]).save_pretrained(tmp_path / "model")
    opened = denoiser_of(open_pipeline(tmp_path / "model"))
    assert (opened.head, opened.prediction, opened.clip) == (direct.head, direct.prediction, 1.0)
    assert opened.schedule.fingerprint == direct.schedule.fingerprint
    level = direct.schedule.at(0.4)
    assert torch.equal(opened(images(), level).mean, direct(images(), level).mean)
    free = guided_diffusion_denoiser(file, CASES[case], clip=None)
    assert torch.equal(free(images(), level).mean.clamp(-1, 1), direct(images(), level).mean)
    assert isinstance(diffusers.DDPMPipeline.from_pretrained(tmp_path / "model"), diffusers.DDPMPipeline)


@torch.no_grad()
def test_class_labels(tmp_path: Path) -> None:
    """One label for all is that label for each, and labels matter."""
    case = "classes, rescaled timesteps, variance head"
    file = checkpoint(case, tmp_path)
    one, each, other = (
        guided_diffusion_denoiser(file, CASES[case], class_labels=v) for v in (3, torch.tensor([3, 3]), 4)
    )
    level = one.schedule.at(0.6)
    assert torch.equal(one(images(), level).mean, each(images(), level).mean)
    assert not torch.equal(one(images(), level).mean, other(images(), level).mean)
    with pytest.raises(UserError, match=r"rescale_timesteps with diffusion_steps=100 .* 10 n"):
        guided_diffusion_pipeline(file, CASES[case])
    for labels, words in ((None, "conditioned on a class"), (1000, "from 0 to 999"), (torch.tensor([0.5]), "whole")):
        with pytest.raises(UserError, match=words):
            guided_diffusion_denoiser(file, CASES[case], class_labels=labels)


def test_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Python of docs/other-models.md as it stands, on the small network whose flags it names."""
    checkpoint("resnet updown, variance head", tmp_path)
    monkeypatch.chdir(tmp_path)
    page = (root / "docs/other-models.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 2
    found: dict[str, Any] = {}
    exec(compile("\n".join(blocks), "other-models.md", "exec"), found)
    promised = re.findall(r"print\(.*\)  # (.*)", page)
    assert capsys.readouterr().out.splitlines() == promised
    assert GuidedFlags.read(found["flags"]) == GuidedFlags.read(CASES["resnet updown, variance head"])
    assert (tmp_path / "model" / "model_index.json").is_file()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_channel": 32}, "'num_channel' is none .* num_channels"),
        ({"learn_sigma": "True"}, "learn_sigma is 'True'; allowed: True, False"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_res_blocks": True}, "num_res_blocks is True; give a whole number"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"noise_schedule": "sigmoid"}, "'sigmoid'; allowed: linear, cosine"),
        ({"diffusion_steps": 20}, "diffusion_steps is 20"),
        ({"channel_mult": "1;2"}, "channel_mult is '1;2'; give numbers"),
        ({"channel_mult": "1,0"}, "give positive multipliers"),
        ({"attention_resolutions": "0"}, "give sizes from 1"),
        ({"image_size": 48}, "image_size 48 has no usual one"),
    ],
)
def test_flags_are_checked(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        GuidedFlags.read(flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"image_size": 512, "num_head_channels": 64}, "only a first multiplier of 1"),
        ({"image_size": 64}, "levels of 384 and 512 channels"),
        ({"image_size": 32, "num_heads_upsample": 2}, "num_heads_upsample 2"),
        ({"image_size": 32, "num_heads": 3}, "does not divide 256"),
        ({"image_size": 32, "num_head_channels": 48}, "does not divide 256"),
        ({"image_size": 32, "num_channels": 48}, "has 48 channels; .* multiples of 32"),
    ],
)
def test_what_does_not_fit_is_refused(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        unet_from_guided({}, GuidedFlags.read(flags))


def test_checkpoint_that_does_not_fit() -> None:
    case = "heads, old order"
    flags, state = GuidedFlags.read(CASES[case]), weights(golden(case)["shapes"])
    lacking = {name: value for name, value in state.items() if name != "out.2.bias"}
    with pytest.raises(UserError, match=r"1 tensors are missing \(such as out.2.bias\)"):
        unet_from_guided(lacking, flags)
    with pytest.raises(UserError, match=r"1 have no place \(such as label_emb.weight\)"):
        unet_from_guided({**state, "label_emb.weight": torch.zeros(10, 128)}, flags)
    with pytest.raises(UserError, match=r"2 have another shape \(such as out.2.weight, \(3, .* make \(6, "):
        unet_from_guided(state, GuidedFlags.read({**CASES[case], "learn_sigma": True}))


def test_only_safetensors(tmp_path: Path) -> None:
    pickled = tmp_path / "model.pt"
    torch.save({}, pickled)
    with pytest.raises(UserError, match=r"model.pt is no safetensors file: pickled checkpoints may run code"):
        guided_diffusion_denoiser(pickled, {})
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        guided_diffusion_denoiser(pickled.rename(tmp_path / "renamed.safetensors"), {})
    with pytest.raises(UserError, match="is not there"):
        guided_diffusion_denoiser(tmp_path / "none.safetensors", {})
    case = "heads, old order"
    with pytest.raises(UserError, match="is not conditioned on a class"):
        guided_diffusion_denoiser(checkpoint(case, tmp_path), CASES[case], class_labels=0)


# ------------------------------------------------------------------------------------------------ the original program


@torch.no_grad()
def main() -> None:
    """Runs the original programs."""
    import importlib

    original = importlib.import_module("guided_diffusion.script_util")
    golden = {}
    for name, flags in CASES.items():
        model, diffusion = original.create_model_and_diffusion(**{**original.model_and_diffusion_defaults(), **flags})
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict(weights(shapes))
        model.eval()
        labels = {"y": torch.tensor(LABELS)} if flags.get("class_cond") else {}
        timesteps = torch.tensor(TIMESTEPS)
        out = diffusion._wrap_model(model)(images(), timesteps, **labels)
        law = diffusion.p_mean_variance(model, images(), timesteps, clip_denoised=False, model_kwargs=labels)
        golden[name] = {
            "shapes": shapes,
            "output": _numbers(out),
            "x0": _numbers(law["pred_xstart"]),
            "mean": _numbers(law["mean"]),
            "variance": _numbers(law["variance"]),
        }
        sys.stdout.write(f"{name}: {len(shapes)} tensors, rms of the output {out.square().mean().sqrt():.3f}\n")
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
