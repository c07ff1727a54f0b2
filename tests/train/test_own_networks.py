"""A user's own network: folders, functions, any nn.Module; what does not fit is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowvar.cli.train import save_trained
from lowvar.data import Data, TensorImages, load
from lowvar.errors import UserError
from lowvar.models import ResidualMLP, null_class
from lowvar.pipelines import ClassConditionalPipeline, denoiser_of, open_pipeline, open_weights
from lowvar.process import Independent
from lowvar.train import Trainer, check_network, config_from, own_network

torch.set_num_threads(1)

BLOCKS = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
BASE = {"updates": 4, "batch_size": 4, "warmup": 0, "head": "none", "checkpoint_every": 2, "validate_every": 4}


def unet(outputs: int = 1, **more: Any) -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(16, 1, outputs, block_out_channels=(8,), layers_per_block=1, **BLOCKS, **more)


def dit(outputs: int = 2, classes: int = 10, size: int = 8) -> Any:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        2, 8, 1, outputs, num_layers=1, norm_num_groups=4, sample_size=size, num_embeds_ada_norm=classes
    )


class Tied(nn.Module):
    """A plain network: batch norm has buffers, weights are tied, and noise is drawn in training."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.first, self.again = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
        self.again.weight = self.first.weight
        self.norm, self.drop, self.last = nn.BatchNorm2d(4), nn.Dropout2d(0.5), nn.Conv2d(4, outputs, 1)
        self.time = nn.Linear(1, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor]:
        h = self.norm(self.first(x) + self.again(x) + self.time(timestep[:, None] / 1000)[:, :, None, None])
        return (self.last(self.drop(h)),)


@pytest.fixture(scope="module")
def data() -> Data:
    digits = load("digits")
    few = [
        TensorImages(part.images(range(40)), None if part.labels is None else part.labels[:40])
        for part in (digits.train, digits.calibration, digits.test)
    ]
    return Data("few digits", *few, levels=17, fingerprint="few", classes=digits.classes)


def states(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def run(trainer: Trainer, until: int | None = None) -> Trainer:
    for _ in trainer.run():
        if until is not None and trainer.update >= until:
            break
    return trainer


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("component", [None, "unet", "transformer"])
def test_folder_gives_config_or_weights(component: str | None, tmp_path: Path) -> None:
    made = dit() if component == "transformer" else unet()
    folder = tmp_path if component is None else tmp_path / component
    made.save_pretrained(str(folder))
    if component is not None:
        (tmp_path / "model_index.json").write_text("{}")
    kept = own_network(tmp_path, "kept")
    assert type(kept) is type(made)
    assert kept.training
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in kept.state_dict().items())
    torch.manual_seed(1)
    a = own_network(tmp_path, seed=3)
    torch.rand(5)
    b, c = own_network(tmp_path, seed=3), own_network(tmp_path, seed=4)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert any(not torch.equal(v, c.state_dict()[k]) for k, v in a.state_dict().items())
    assert any(not torch.equal(v, made.state_dict()[k]) for k, v in a.state_dict().items())


def test_folders_that_are_no_such_model_are_refused(tmp_path: Path) -> None:
    def refused(source: Any, weights: Any = "fresh") -> str:
        with pytest.raises(UserError) as caught:
            own_network(source, weights)
        return str(caught.value)

    assert "neither a config.json nor" in refused(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "does not describe a model" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    assert "allowed: UNet2DModel, DiTTransformer2DModel, ResidualMLP" in refused(tmp_path)
    unet().save_pretrained(str(tmp_path))
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "diffusion_pytorch_model.bin")
    assert "as a pickle" in refused(tmp_path, "kept")
    own_network(tmp_path)  # fresh weights do not look at it
    (tmp_path / "diffusion_pytorch_model.bin").unlink()
    assert "nowhere" in refused(tmp_path, "kept")
    weights.write_bytes(b"nothing")
    assert "cannot be made" in refused(tmp_path, "kept")
    from safetensors.torch import save_file

    state = {k: v for k, v in unet().state_dict().items() if k != "conv_in.bias"}
    save_file(state, weights, metadata={"format": "pt"})
    assert "conv_in.bias" in refused(tmp_path, "kept")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"block_out_channels": [7]}))
    assert "cannot be made" in refused(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert "has no unet, transformer, network folder" in refused(tmp_path)


def test_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_a_test.py").write_text(
        "import torch\ndef good(): return torch.nn.Linear(2, 2)\ndef other(): return 3\ndef needs(x): return x\n"
        "def fails(): return 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    a, b = own_network("mine_for_a_test:good", seed=2), own_network("mine_for_a_test:good", seed=2)
    assert torch.equal(a.get_parameter("weight"), b.get_parameter("weight"))
    for word, sentence in (
        ("mine_for_a_test:other", "returned a int"),
        ("mine_for_a_test:needs", "without arguments"),
        ("mine_for_a_test:fails", r"cannot be made \(ZeroDivisionError: division by zero\)"),
        ("mine_for_a_test:none", "cannot be made"),
        ("no_such_module:f", "cannot be made"),
        ("no such folder", "or module:function"),
    ):
        with pytest.raises(UserError, match=sentence):
            own_network(word)
    with pytest.raises(UserError, match="leave weights out"):
        own_network("mine_for_a_test:good", "kept")
    with pytest.raises(UserError, match=r"network.width is 64 and network.source f:g, which has sizes of its own"):
        config_from({"network": {"source": "f:g", "width": 64}})
    with pytest.raises(UserError, match=r"there is no network.source"):
        config_from({"network": {"weights": "kept"}})


# -------------------------------------------------------------------------------------------------------------- checks


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    def refused(network: nn.Module, *words: Any) -> str:
        with pytest.raises(UserError) as caught:
            check_network(network, *words)
        return str(caught.value)

    image = (1, 8, 8)
    assert refused(unet(), image, "range").endswith("give head none, or a network with 2 output channels")
    sentence = refused(unet(2), image)
    assert "it must return 1" in sentence
    assert "give head range or logvar or basis, or" in sentence
    assert "give head lowrank and rank 3, or" in refused(unet(5), image, "logvar")
    assert "head lowrank of rank 4 needs 6" in refused(unet(5), image, "lowrank", 4)
    assert "give a network with 2 output" in refused(Tied(40), image, "range")
    assert "takes 1 channels and the data have 3" in refused(unet(), (3, 8, 8))
    assert "for 16x16 and the data are 8x8" in refused(dit(size=16), image, "range")
    assert "for images, and the data are rows" in refused(unet(), (5,))
    assert "for rows of a table, and the data are images" in refused(ResidualMLP(1), image)
    assert "10 classes and the network UNet2DModel has none; set num_class_embeds to 11" in refused(
        unet(), image, None, 0, 10
    )
    assert "7 and a null class; set num_embeds_ada_norm to 10" in refused(dit(2, 7), image, "range", 0, 10)
    assert "fails on data of 3x8x8 (RuntimeError" in refused(Tied(), (3, 8, 8))
    assert "called as network(x, timestep)" in refused(nn.Linear(8, 8), image)
    assert "returns 2x8x4 for data of 1x8x8; it must return 1x8x8" in refused(Cut(), image)


class Cut(nn.Module):
    """Halves the width."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.cat([x, x], 1)[..., :4] + timestep[:, None, None, None]


def test_checking_leaves_network_and_generator_alone() -> None:
    network, rng = Tied(), torch.get_rng_state()
    before = states(network)
    check_network(network, (1, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert network.training
    assert torch.equal(rng, torch.get_rng_state())


def test_a_unet_is_told_the_size() -> None:
    network = unet()
    check_network(network, (1, 8, 16))
    assert tuple(network.config.sample_size) == (8, 16)
    check_network(network, (1, 8, 8))
    assert network.config.sample_size == 8


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("conditional", [False, True])
def test_dit_trains_resumes_and_opens(conditional: bool, data: Data, tmp_path: Path) -> None:
    source = tmp_path / "model"
    dit().save_pretrained(str(source))
    settings = BASE | {"head": "range", "conditional": conditional, "network": {"source": str(source)}}
    whole = run(Trainer(data, config_from(settings), tmp_path / "whole", device="cpu"))
    run(Trainer(data, config_from(settings), tmp_path / "cut", device="cpu"), until=3)
    torch.manual_seed(99)
    cut = run(Trainer(data, config_from(settings), tmp_path / "cut", resume=True, device="cpu"))
    end = states(whole.ema_network())
    assert all(torch.equal(v, end[k]) for k, v in cut.ema_network().state_dict().items())
    fresh = own_network(source, seed=whole.config.seed).state_dict()
    row = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    moved = [k for k in range(11) if not torch.equal(end[row][k], fresh[row][k])]
    assert moved == [10] if not conditional else len(moved) > 2  # the null class alone
    save_trained(whole, tmp_path / "out")
    pipeline = open_pipeline(tmp_path / "out")
    assert isinstance(pipeline, ClassConditionalPipeline)
    assert null_class(pipeline.components["unet"]) == 10
    assert len(pipeline.classes) == (10 if conditional else 0)
    pipeline.set_progress_bar_config(disable=True)
    made: Any = pipeline(3, torch.Generator().manual_seed(1), num_inference_steps=2, output_type="np").images
    assert made.shape == (3, 8, 8, 1)
    x, level = Independent(0).normal(range(2), (1, 8, 8)), whole.schedule.at(0.4)
    with torch.no_grad():
        own = whole.denoiser
        own.network = own.network if not conditional else pipeline.components["unet"]
        own.conditioning = {} if not conditional else {"class_labels": torch.tensor([10, 10])}
        reopened = denoiser_of(pipeline)(x, level).mean
        assert reopened.shape == x.shape
        if conditional:
            assert torch.allclose(own(x, level).mean.clamp(-1, 1), reopened, atol=1e-6)


@pytest.mark.parametrize("handed_over", [False, True])
def test_dit_drops_no_class_of_its_own(handed_over: bool, data: Data, tmp_path: Path) -> None:
    dit().save_pretrained(str(tmp_path))
    own = own_network(tmp_path)
    more = {"head": "range", "conditional": True, "condition_dropout": 0.0, "updates": 12}
    config = config_from(BASE | more | ({} if handed_over else {"network": {"source": str(tmp_path)}}))
    row = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    before = own.state_dict()[row].clone()
    trainer = run(Trainer(data, config, network=own if handed_over else None, device="cpu"))
    after = trainer.ema_network().state_dict()[row]
    assert torch.equal(before[10], after[10])
    assert not torch.equal(before, after)


def test_kept_weights_are_where_training_begins(data: Data, tmp_path: Path) -> None:
    made = unet()
    made.save_pretrained(str(tmp_path))
    network = {"source": str(tmp_path), "weights": "kept"}
    trainer = Trainer(data, config_from(BASE | {"network": network}), device="cpu")
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in trainer.ema_network().state_dict().items())


def test_any_module_trains_resumes_and_opens(data: Data, tmp_path: Path) -> None:
    def trainer(folder: str, **more: Any) -> Trainer:
        torch.manual_seed(5)
        network = Tied()
        torch.manual_seed(0 if more else 1)  # whatever torch's generator says
        return Trainer(data, config_from(BASE), tmp_path / folder, network=network, device="cpu", **more)

    whole = run(trainer("whole"))
    run(trainer("cut"), until=3)
    cut = run(trainer("cut", resume=True))
    end = whole.ema_network().state_dict()
    assert all(torch.equal(v, end[k]) for k, v in cut.ema_network().state_dict().items())
    moved = float((end["norm.running_mean"] - Tied().norm.running_mean).abs().max())
    assert moved > 1e-3  # what is no weight goes along
    with pytest.raises(UserError, match="the network's structure"):
        Trainer(data, config_from(BASE), tmp_path / "cut", network=unet(), resume=True, device="cpu")

    (tmp_path / "out").mkdir()
    assert save_trained(whole, tmp_path / "out") is None
    denoiser = open_weights(tmp_path / "out", Tied())
    x, level = Independent(0).normal(range(2), (1, 8, 8)), whole.schedule.at(0.4)
    own = whole._as_denoiser(whole.ema_network())  # pyright: ignore[reportPrivateUsage]
    with torch.no_grad():
        assert torch.equal(denoiser(x, level).mean, own(x, level).mean.clamp(-1, 1))
    with pytest.raises(UserError, match="do not fit"):
        open_weights(tmp_path / "out", nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"has no network\.safetensors"):
        open_weights(tmp_path / "whole", Tied())
