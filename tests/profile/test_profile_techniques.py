"""Techniques measured on a model: against variances that are known, and what a report says of them."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch import Tensor, nn

from lowvar.cli.app import parse
from lowvar.data import TensorImages
from lowvar.errors import UserError
from lowvar.process import CosineVP, NetworkDenoiser
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.profile import profile_training
from lowvar.profile.excess import level_errors
from lowvar.profile.techniques import TECHNIQUES, Measured, Reduction, measure, plain_times_of
from lowvar.train import Objective, Simple, config_from


class Bias(nn.Module):
    """b, whatever the state: predicting the noise its gradient is 2 (b - eps) / d, odd in the noise around b."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.full((d,), 0.5, dtype=torch.float64))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.b.expand(len(x), -1) + 0 * x


class Level(nn.Module):
    """a t, whatever the state: predicting the image x_0 = 1 its gradient, 2 t (a t - 1), is the time's alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return (self.a * timestep.double() / 1000)[:, None].expand(len(x), x.shape[1]) + 0 * x


def last(denoiser: NetworkDenoiser, names: list[str], images: Tensor, replicates: int = 48) -> dict[str, Reduction]:
    chosen = [t for t in TECHNIQUES if t.name in names]
    *_, record = measure(
        denoiser, Objective(Simple()), TensorImages(images), techniques=chosen, replicates=replicates, batch_size=16
    )
    assert isinstance(record, Measured)
    assert record.replicates == replicates
    return {r.name: r for r in record.reductions}


def test_pairs_take_all_of_an_odd_gradient() -> None:
    """Antithetic noises leave nothing of it; stratified times leave it as it is; an honest interval holds 1."""
    found = last(
        NetworkDenoiser(Bias(3), CosineVP(), "epsilon"), ["same-image pairs", "stratified times"], torch.zeros(40, 3)
    )
    assert found["same-image pairs"].vrf > 1e10
    assert found["same-image pairs"].verdict == "helps"
    assert found["stratified times"].low < 1 < found["stratified times"].high
    assert found["stratified times"].verdict == "does nothing that can be told"


def test_strata_take_what_times_bring() -> None:
    """A gradient of the time alone, g(u) = 2 u (.3 u - 1): plain has Var g / B, a lattice what its shift leaves.

    By quadrature over u and over the shift: a factor of about 16. The interval holds it, a factor of 2 wide at most.
    """
    u = (torch.arange(20_000).double() + 0.5) / 20_000
    mean = (2 * u * (0.3 * u - 1)).reshape(16, -1).mean(0)
    wanted = float((2 * u * (0.3 * u - 1)).var()) / 16 / float(mean.var())
    schedule = schedule_from_diffusers({"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"})
    found = last(NetworkDenoiser(Level(), schedule, "sample"), ["stratified times"], torch.ones(40, 1), 200)
    one = found["stratified times"]
    assert one.low < wanted < one.high
    assert one.high / one.low < 2


def test_every_technique_runs_and_is_a_setting() -> None:
    """All of them on digits-sized images, each with words that `lowvar train` knows."""
    from lowvar.data import load
    from lowvar.train import NetworkConfig, build_network

    network = build_network((1, 8, 8), NetworkConfig(width=8), None, seed=0)
    denoiser = NetworkDenoiser(network, CosineVP(), "v_prediction")
    *_, record = measure(
        denoiser, Objective(Simple()), load("digits").train, replicates=16, batch_size=4, techniques=TECHNIQUES
    )
    assert [r.name for r in record.reductions] == [t.name for t in TECHNIQUES]
    assert all(0 < r.low <= r.vrf <= r.high for r in record.reductions)
    for technique in TECHNIQUES:
        config_from(dict(technique.settings))
        if technique.command.startswith("lowvar train"):
            words = technique.command.split()[2:]
            parse(["train", "--data", "digits", "--out", "RUN", *words])
        else:
            lines = technique.command.partition(": ")[2].split(", ")
            assert yaml.safe_load("\n".join(lines)) == dict(technique.settings)


def test_times_of_a_table() -> None:
    schedule = schedule_from_diffusers({"num_train_timesteps": 50})
    assert plain_times_of(NetworkDenoiser(Bias(1), schedule, "epsilon")).steps == 50


def test_too_few_replicates() -> None:
    denoiser = NetworkDenoiser(Bias(1), CosineVP(), "epsilon")
    for words in ({"replicates": 8}, {"batch_size": 6}):
        with pytest.raises(ValueError, match="give at least 16 replicates, and batches that are a multiple of 4"):
            next(measure(denoiser, Objective(Simple()), TensorImages(torch.zeros(4, 1)), **words))  # type: ignore[arg-type]


@pytest.mark.parametrize("d", [1, 3])
def test_tables_of_few_columns_leave_out_what_they_have_no_room_for(d: int) -> None:
    """Four noises are orthogonal in four dimensions or more; the other techniques are measured all the same."""
    *_, record = measure(
        NetworkDenoiser(Bias(d), CosineVP(), "epsilon"),
        Objective(Simple()),
        TensorImages(torch.zeros(40, d)),
        techniques=[t for t in TECHNIQUES if "pairs" in t.name or "noise" in t.name],
        replicates=16,
        batch_size=4,
    )
    names = [r.name for r in record.reductions]
    assert "orthogonal noise" not in names
    assert len(names) == 4


def test_a_network_without_parameters_has_no_training_gradient() -> None:
    images = TensorImages(torch.zeros(8, 3))
    still = Bias(3).requires_grad_(False)
    with pytest.raises(UserError, match="no parameters that require gradients"):
        profile_training(NetworkDenoiser(still, CosineVP(), "epsilon"), images, minutes=0.01)


def test_images_that_are_all_alike_set_no_standard() -> None:
    """A linear denoiser makes no error of them, so no excess over it is told."""
    images = TensorImages(torch.full((40, 3), 0.3))
    denoiser = NetworkDenoiser(Bias(3), CosineVP(), "epsilon")
    assert level_errors(denoiser, Objective(Simple()), images, images, plain_times_of(denoiser), limit=32) == ()
