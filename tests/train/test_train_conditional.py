"""Classes in training: who has which, dropout, validation, guidance, and the pipeline that comes out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowvar.cli import main
from lowvar.data import Data, TensorImages
from lowvar.errors import UserError
from lowvar.own_pipelines import ClassGuided, class_number
from lowvar.pipelines import ClassConditionalPipeline, denoiser_of, open_pipeline
from lowvar.process.noise import Independent
from lowvar.train.conditional import Classes, classes_of
from lowvar.train.config import TrainConfig
from lowvar.train.loop import Trainer
from lowvar.train.networks import NetworkConfig

torch.set_num_threads(1)


class ByClass(nn.Module):
    """Says (its class + 1) x its parameter, and remembers the classes it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.asked: list[Tensor] = []
        self.config: dict[str, Any] = {"num_class_embeds": 4}

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        self.asked.append(class_labels)
        value = self.scale * (class_labels + 1).float()
        return SimpleNamespace(sample=value[:, None].expand(sample.shape))


def rows(n: int = 40) -> Data:
    x = Independent(1).uniform(range(n), (2,)) * 2 - 1
    parts = [TensorImages(x[k::4] if k else x, torch.arange(len(x[k::4] if k else x)) % 3) for k in range(3)]
    return Data("rows", parts[0], parts[1], parts[2], None, "f" * 16)


def test_a_share_of_samples_loses_its_class_and_the_rest_keeps_its_images() -> None:
    classes = Classes(3, torch.arange(40) % 3, torch.zeros(1), dropout=0.25, seed=5)
    number = torch.arange(40_000)
    image = number * 7 % 40
    labels = classes.labels(number, image)
    dropped = labels == 3
    assert abs(float(dropped.float().mean()) - 0.25) < 4 * (0.25 * 0.75 / 40_000) ** 0.5
    assert torch.equal(labels[~dropped], (image % 3)[~dropped])
    assert torch.equal(classes.labels(number[100:103], image[100:103]), labels[100:103])  # whatever the batch
    whole = Classes(3, torch.arange(40) % 3, torch.zeros(1), dropout=0.0)
    assert torch.equal(whole.labels(number, image), image % 3)


def test_training_asks_for_the_images_classes_and_validation_for_the_conditional_loss() -> None:
    network, data = ByClass(), rows()
    config = TrainConfig(
        updates=3, batch_size=8, conditional=True, condition_dropout=0.5, head="none", prediction="sample", warmup=0
    )
    trainer = Trainer(data, config, network=network, device="cpu")
    assert trainer.classes is not None
    assert trainer.classes.count == 3
    records = list(trainer.run())
    assert len(records) == 4
    for update in range(3):
        draws = trainer.plan.draws(update, trainer.times)
        wanted = trainer.classes.labels(draws.number, draws.image)
        assert torch.equal(network.asked[update], wanted)
        assert set(wanted.tolist()) <= {0, 1, 2, 3}
    assert any(3 in asked for asked in network.asked)
    average: Any = trainer._average
    asked = torch.cat(average.asked)
    assert len(asked) == len(trainer.watch.validation)
    assert torch.equal(asked, (torch.arange(len(asked)) % trainer.watch.validation.n) % 3)  # nothing is dropped


def test_data_without_classes_are_refused() -> None:
    plain = TensorImages(torch.zeros(4, 2))
    with pytest.raises(UserError, match="the data have no classes"):
        classes_of(SimpleNamespace(train=plain, calibration=plain), 0.1)
    one = TensorImages(torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(UserError, match="the data have no classes"):
        classes_of(SimpleNamespace(train=one, calibration=one), 0.1)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_is_affine_between_null_and_class(scale: float) -> None:
    network = ByClass()
    out = ClassGuided(network, scale)(torch.zeros(2, 1), torch.tensor(3.0), torch.tensor([0, 2]))
    assert out[:, 0].tolist() == pytest.approx([4 + scale * (1 - 4), 4 + scale * (3 - 4)])
    assert len(network.asked) == 1  # one batch


def test_classes_are_given_by_name_or_number() -> None:
    assert class_number("7", ("7", "9")) == 0  # a name first
    assert class_number("1", ("7", "9")) == 1
    with pytest.raises(UserError, match="the class is '8'; allowed: 7, 9, or a number from 0 to 1"):
        class_number("8", ("7", "9"))


def test_digits_become_a_class_conditional_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # at width 8 every channel is a norm's group of its own, and the norm removes what time and class add to it
    (tmp_path / "c.yaml").write_text("network: {width: 16, levels: 1}\nwarmup: 0\n")
    words = ["train", "--data", "digits", "--conditional", "--config", tmp_path / "c.yaml", "--out", tmp_path / "RUN"]
    assert main([*map(str, words), "--updates", "2", "--batch-size", "8", "--quiet"]) == 0
    pipeline = open_pipeline(tmp_path / "RUN")
    assert isinstance(pipeline, ClassConditionalPipeline)
    assert pipeline.classes == tuple("0123456789")
    assert pipeline.unet.config["num_class_embeds"] == 11
    again: Any = ClassConditionalPipeline.from_pretrained(tmp_path / "RUN")
    images = []
    for each in (pipeline, again):
        each.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(2)
        made = each(2, noise, num_inference_steps=2, class_labels=[3, 7], guidance_scale=2.0, output_type="pt")
        images.append(torch.as_tensor(made.images))
    assert images[0].shape == (2, 1, 8, 8)
    assert torch.equal(*images)

    pipeline.unet.double()
    x, all_classes = torch.zeros(2, 1, 8, 8, dtype=torch.float64), denoiser_of(pipeline)
    level = all_classes.schedule.at(0.5)
    guided, plain = denoiser_of(pipeline, class_labels=3, guidance=2.5), denoiser_of(pipeline, class_labels=3)
    assert (guided.nfe, plain.nfe) == (2, 1)
    with torch.no_grad():
        wanted = all_classes.raw(x, level)[0] + 2.5 * (plain.raw(x, level)[0] - all_classes.raw(x, level)[0])
        assert torch.allclose(guided.raw(x, level)[0], wanted, atol=1e-10)
        assert not torch.allclose(plain.raw(x, level)[0], all_classes.raw(x, level)[0], atol=1e-4)

    sample = ["sample", "--model", str(tmp_path / "RUN"), "--out", str(tmp_path / "s.npz"), "--n", "2", "--steps", "2"]
    assert main([*sample, "--label", "3", "--guidance", "2", "--quiet"]) == 0
    for wrong, sentence in (
        (["--label", "ten"], "the class is 'ten'; allowed: 0, 1,"),
        (["--guidance", "2"], "there is no class to guide to; give --label"),
        (["--label", "1", "--guidance", "-1"], "give a number from 0"),
    ):
        capsys.readouterr()
        assert main([*sample, "--overwrite", *wrong]) == 2
        assert sentence in capsys.readouterr().err


def test_a_network_for_classes_has_a_null_class() -> None:
    trainer = Trainer(
        rows(), TrainConfig(updates=1, batch_size=4, conditional=True, network=NetworkConfig(width=8)), device="cpu"
    )
    assert trainer.ema_network().config["num_class_embeds"] == 4  # type: ignore[index]
