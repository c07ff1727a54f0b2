"""A trained head in a pipeline folder: what is opened is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowvar.calibrate import calibrate
from lowvar.cli.train import save_trained
from lowvar.data import Data, TensorImages, load
from lowvar.errors import UserError
from lowvar.evaluation import Cell
from lowvar.evaluation.cells import draw
from lowvar.pipelines import denoiser_of, open_pipeline
from lowvar.process import BasisDiagonal, LowRankPlusDiagonal, NetworkDenoiser, ReverseKernel
from lowvar.process.basis import DCTBasis
from lowvar.process.grid import trailing
from lowvar.process.head import Head, Spectrum
from lowvar.process.noise import Independent
from lowvar.sample import generate
from lowvar.schedulers import CALIBRATION_FILE, ReverseVarianceScheduler
from lowvar.train import Trainer, build_network, config_from
from lowvar.train.networks import NetworkConfig
from lowvar.train.spectrum import make_spectrum, restored, stored

HEADS: dict[str, dict[str, Any]] = {
    "dct": {"head": "basis"},
    "pca": {"head": "basis", "basis": "pca"},
    "rank 0": {"head": "lowrank", "rank": 0},
    "rank 3": {"head": "lowrank", "rank": 3},
    "logvar": {"head": "logvar"},
}


@pytest.fixture(scope="module")
def data() -> Data:
    digits = load("digits")
    few = [TensorImages(part.images(range(40))) for part in (digits.train, digits.calibration, digits.test)]
    return Data("few digits", *few, levels=17, fingerprint="few")


def trainer(data: Data, **settings: Any) -> Trainer:
    small = {"updates": 3, "batch_size": 6, "warmup": 0, "lr": 0.02, "network": {"width": 8}}
    made = Trainer(data, config_from(small | settings), device="cpu")
    for _ in made.run():
        pass
    return made


@pytest.mark.parametrize("name", HEADS)
def test_reopened_folder_is_what_was_trained(name: str, data: Data, tmp_path: Path) -> None:
    made = trainer(data, **HEADS[name])
    save_trained(made, tmp_path)
    pipeline = open_pipeline(tmp_path)
    denoiser = denoiser_of(pipeline)
    assert denoiser.head == HEADS[name]["head"]
    assert (tmp_path / "scheduler" / CALIBRATION_FILE).is_file() == (name == "pca")
    x = Independent(2).normal(range(3), (1, 8, 8))
    own = NetworkDenoiser(
        made.ema_network(), made.schedule, made.config.prediction, denoiser.head, clip=1.0, spectrum=made.spectrum
    )
    for t in (0.05, 0.5, 1.0):
        level = made.schedule.at(t)
        with torch.no_grad():
            a, b = denoiser(x, level), own(x, level)
        assert a.covariance is not None
        assert b.covariance is not None
        assert torch.equal(a.mean, b.mean)
        assert torch.equal(a.covariance.dense(), b.covariance.dense())
        assert float((a.covariance.trace() / a.covariance.trace().mean() - 1).abs().max()) > 1e-4  # it depends on x_t
        kind = {"basis": BasisDiagonal, "lowrank": LowRankPlusDiagonal}.get(HEADS[name]["head"])
        assert kind is None or isinstance(a.covariance, kind)


@pytest.mark.parametrize("name", ["pca", "rank 3"])
def test_scheduler_adds_the_heads_noise(name: str, data: Data, tmp_path: Path) -> None:
    """The pipeline's loop through the scheduler = the ancestral kernel with lambda^2 I + kappa^2 C of the head."""
    save_trained(trainer(data, **HEADS[name]), tmp_path)
    pipeline = open_pipeline(tmp_path)
    denoiser, scheduler = denoiser_of(pipeline), pipeline.scheduler
    scheduler.set_timesteps(4)
    noise, index = Independent(6), torch.arange(3)
    x = noise.normal(index, (1, 8, 8), draw=0)
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = pipeline.unet(x, t.expand(3)).sample
            x = scheduler.step(out, t, x, generator=noise, index=index).prev_sample
        grid = torch.linspace(1, 0, 5, dtype=torch.float64)
        own = generate(denoiser, ReverseKernel(variance="posterior"), grid, (1, 8, 8), 3, noise)
        small = generate(denoiser, ReverseKernel(variance="small"), grid, (1, 8, 8), 3, noise)
    torch.testing.assert_close(x, own, rtol=1e-5, atol=1e-5)
    assert float((x - small).abs().max()) > 1e-2


def test_evaluation_uses_the_head(data: Data) -> None:
    """`ddpm-learned` of a covariance head is the kernel with lambda^2 I + kappa^2 C, at any number of steps."""
    made = trainer(data, **HEADS["dct"])
    denoiser = NetworkDenoiser(
        made.ema_network(), made.schedule, made.config.prediction, "basis", clip=1.0, spectrum=made.spectrum
    )
    noise = Independent(6)
    drawn = draw(denoiser, Cell("ddpm-learned", 3), 4, (1, 8, 8), noise=noise).samples
    grid = trailing(made.schedule, 3)
    own = generate(denoiser, ReverseKernel(variance="posterior"), grid, (1, 8, 8), 4, noise, clip=1.0)
    torch.testing.assert_close(drawn, own, rtol=1e-6, atol=1e-6)


def test_scheduler_keeps_the_head_through_copies(data: Data, tmp_path: Path) -> None:
    made = trainer(data, **HEADS["pca"])
    save_trained(made, tmp_path)
    scheduler = open_pipeline(tmp_path).scheduler
    again = ReverseVarianceScheduler.from_scheduler(scheduler, sampler="ddpm-small")
    assert made.spectrum is not None
    for one in (scheduler, again):
        assert one.spectrum is not None
        assert torch.equal(one.spectrum.variance, made.spectrum.variance)
        assert one.spectrum.basis.same_as(made.spectrum.basis)
    assert "directions" not in repr(scheduler)
    again.save_pretrained(tmp_path / "again")
    assert ReverseVarianceScheduler.from_pretrained(tmp_path / "again").spectrum is not None
    (tmp_path / "scheduler" / CALIBRATION_FILE).unlink()
    with pytest.raises(UserError, match=CALIBRATION_FILE):
        open_pipeline(tmp_path)
    from_config: Any = ReverseVarianceScheduler.from_config(dict(scheduler.config))
    with pytest.raises(UserError, match="came without"):
        from_config.spectrum  # noqa: B018


def test_calibrated_folder_keeps_head_and_calibration(data: Data, tmp_path: Path) -> None:
    """Two PCA bases in one file: the head's, of the training images, and the calibration's."""
    made = trainer(data, **HEADS["pca"])
    save_trained(made, tmp_path)
    pipeline = open_pipeline(tmp_path)
    images = data.calibration.images(range(20))
    knots = torch.linspace(-4, 4, 3, dtype=torch.float64)
    measured = calibrate(denoiser_of(pipeline), lambda: [images], logsnr=knots, replicates=1)
    ReverseVarianceScheduler.from_scheduler(pipeline.scheduler, measured).save_pretrained(tmp_path / "both")
    both = ReverseVarianceScheduler.from_pretrained(tmp_path / "both")
    assert made.spectrum is not None
    assert both.spectrum.basis.same_as(made.spectrum.basis)
    assert not both.calibration.twin.basis.same_as(made.spectrum.basis)
    torch.testing.assert_close(both.calibration.twin.basis.matrix(), measured.twin.basis.matrix(), rtol=0, atol=1e-6)


def test_scheduler_refuses_what_does_not_fit() -> None:
    own = Spectrum(DCTBasis((1, 4, 4)), torch.ones(1, 4, 4))
    with pytest.raises(UserError, match="head 'basis', and only it, needs the data's spectrum"):
        ReverseVarianceScheduler(head="basis")
    with pytest.raises(UserError, match="head 'basis', and only it, needs the data's spectrum"):
        ReverseVarianceScheduler(head="logvar", spectrum=own)
    with pytest.raises(UserError, match="spectrum of the scheduler's head does not fit"):
        ReverseVarianceScheduler(head="basis", spectrum={"basis": "wavelet", "event_shape": [4], "variance": [1.0] * 4})
    scheduler = ReverseVarianceScheduler(variance="learned", head="basis", spectrum=own)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"spectrum is for events \(1, 4, 4\), the network has \(1, 8, 8\)"):
        scheduler.step(torch.zeros(1, 2, 8, 8), scheduler.timesteps[0], torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("head", "outputs", "rank"), [("range", 2, 0), ("basis", 2, 0), ("lowrank", 2, 0), ("lowrank", 7, 5)]
)
def test_rank_is_read_off_the_channels(head: Head, outputs: int, rank: int) -> None:
    from diffusers import DDPMPipeline

    network = build_network((1, 8, 8), NetworkConfig(width=8), head, rank=rank)
    assert network.config["out_channels"] == outputs
    own = Spectrum(DCTBasis((1, 8, 8)), torch.ones(1, 8, 8)) if head == "basis" else None
    pipeline: Any = DDPMPipeline(network, ReverseVarianceScheduler(head=head, spectrum=own))  # type: ignore[arg-type]
    assert denoiser_of(pipeline).head == head
    with torch.no_grad():
        out, raw = denoiser_of(pipeline).raw(torch.zeros(1, 1, 8, 8), pipeline.scheduler.schedule.at(0.5))
    assert raw is not None
    assert (out.shape[1], raw.shape[1]) == (1, 1 + rank)
    if head != "range":
        assert float(raw[:, 0].abs().max()) == 0  # log variances begin at 0 ..
        assert rank == 0 or float(raw[:, 1:].abs().min()) > 0  # .. and directions do not


def test_channels_that_fit_no_head() -> None:
    from diffusers import DDPMPipeline

    network = build_network((1, 8, 8), NetworkConfig(width=8), "lowrank", rank=1)
    pipeline: Any = DDPMPipeline(network, ReverseVarianceScheduler(head="logvar"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="takes 1 channels and returns 3; supported: as many"):
        denoiser_of(pipeline)
    assert denoiser_of(pipeline, head="lowrank").head == "lowrank"
    plain: Any = DDPMPipeline(build_network((1, 8, 8), NetworkConfig(width=8)), ReverseVarianceScheduler())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no channels for one"):
        denoiser_of(plain, head="lowrank")


# --------------------------------------------------------------------------------------------------------- the spectrum


def test_spectrum_is_the_datas(data: Data) -> None:
    x = data.train.images(torch.arange(40)).double()
    for name in ("dct", "pca"):
        own = make_spectrum(data, name)  # type: ignore[arg-type]
        coefficients = own.basis.forward(x - x.mean(0))
        torch.testing.assert_close(own.variance.double(), (coefficients**2).mean(0), rtol=1e-4, atol=1e-6)
        again = restored(stored(own), own)
        assert torch.equal(again.variance, own.variance)
        assert again.basis.same_as(own.basis)


def test_spectrum_refusals(data: Data) -> None:
    blank = TensorImages(torch.zeros(4, 1, 8, 8))
    with pytest.raises(UserError, match="needs data that differ"):
        make_spectrum(Data("blank", blank, blank, blank, levels=17, fingerprint="blank"), "dct")
    large = TensorImages(torch.zeros(2, 3, 40, 40))
    with pytest.raises(UserError, match="limit is 4096; give basis: dct"):
        make_spectrum(Data("large", large, large, large, levels=17, fingerprint="large"), "pca")
    with pytest.raises(ValueError, match="must agree"):
        Spectrum(DCTBasis((4,)), torch.ones(5))
    with pytest.raises(ValueError, match="must not be negative"):
        Spectrum(DCTBasis((2,)), torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"head": "nope"},
            "the setting head is 'nope': input should be 'range', 'logvar', 'basis', 'lowrank' or",
        ),
        ({"head": "lowrank", "rank": 17}, "the setting rank is 17: input should be less than or equal to 16"),
        ({"rank": 2}, "rank is 2 and head range; a rank belongs to head lowrank: leave it out"),
        (
            {"head": "lowrank", "basis": "pca"},
            "basis is pca and head lowrank; a basis belongs to head basis: leave",
        ),
        (
            {"head": "range", "head_loss": "nll"},
            "head_loss nll needs a head for the covariance of the data",
        ),
        (
            {"head": "none", "head_loss": "vlb"},
            "head_loss is a setting of a variance head, and head is none; leave",
        ),
        ({"head": "none", "detach_mean": False}, "detach_mean is a setting of a variance head"),
        ({"weighting": "none"}, "weighting none leaves the squared error out"),
        ({"weighting": "none", "head": "none"}, "weighting none leaves the squared error out"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from(settings)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
