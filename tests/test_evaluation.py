"""Peers on common ground, cells, rows, and what is recommended."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.calibrate import Calibration, calibrate
from lowvar.data import Data, TensorImages
from lowvar.errors import UserError
from lowvar.evaluation import PEERS, TWIN_ALONE, Cell, draw, evaluate, make_peer, peer_named, recommend, run_peer
from lowvar.metrics import Scorer
from lowvar.process import (
    VE,
    CosineVP,
    Flow,
    GaussianTwin,
    Independent,
    NetworkDenoiser,
    PixelBasis,
    Schedule,
    schedule_from_diffusers,
)
from lowvar.process.denoiser import to_target
from lowvar.process.discrete import DiscreteVP

SHAPE = (1, 4, 4)
SPECTRUM = torch.linspace(0.02, 0.2, 16).reshape(SHAPE)
TWIN = GaussianTwin(torch.linspace(-0.3, 0.3, 16).reshape(SHAPE), PixelBasis(SHAPE), SPECTRUM)
LINEAR = schedule_from_diffusers({"num_train_timesteps": 1000, "beta_schedule": "linear"})
COSINE = schedule_from_diffusers({"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"})


class Exact:
    """The network that knows the Gaussian TWIN exactly, in any prediction, with or without a head."""

    def __init__(self, schedule: Schedule, prediction: str, head: bool = False) -> None:
        self.schedule, self.prediction, self.head, self.calls = schedule, prediction, head, 0

    def _time(self, timestep: Tensor) -> Tensor:
        t = timestep[0].double()
        if isinstance(self.schedule, Flow):
            return t / self.schedule.timesteps
        if isinstance(self.schedule, VE):
            return self.schedule.time(-8 * t)
        return (t + 1) / 1000 if isinstance(self.schedule, DiscreteVP) else t / 1000

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        level = self.schedule.at(self._time(timestep).clamp(0, 1))
        if self.prediction == "edm":  # the entry is c_in x
            x = x * ((level.sigma**2 + 0.25) ** 0.5).to(x)
        x0 = TWIN.posterior(x, level).mean
        eps = (x - level.alpha.to(x) * x0) / level.sigma.to(x)
        out = to_target(self.prediction, x0, eps, level)  # type: ignore[arg-type]
        return torch.cat([out, torch.zeros_like(out)], 1) if self.head else out


def denoiser(schedule: Schedule = LINEAR, prediction: str = "epsilon", head: bool = False, clip: float | None = None):
    network = Exact(schedule, prediction, head)
    return NetworkDenoiser(network, schedule, prediction, "range" if head else None, clip)  # type: ignore[arg-type]


def able(schedule: Schedule, prediction: str) -> list[str]:
    return [n for n, p in PEERS.items() if schedule.family in p.families and prediction in p.predictions and not p.head]


CASES = [
    (name, schedule, prediction)
    for schedule, prediction in (
        (LINEAR, "epsilon"),
        (LINEAR, "v_prediction"),
        (CosineVP(), "epsilon"),
        (Flow(), "flow"),
    )
    for name in able(schedule, prediction)
]
CASES += [
    ("flow-euler", Flow(1.0, 250), "flow"),  # the others round sigma to whole timesteps, of which there are few
    ("ddim", schedule_from_diffusers({"snr_shift_scale": 3.0}), "epsilon"),
    *((name, VE(), "edm") for name in able(VE(), "edm")),
]


@pytest.mark.parametrize(("name", "schedule", "prediction"), CASES)
def test_peer_reaches_the_target(name: str, schedule: Schedule, prediction: str) -> None:
    """On an exact network every peer ends near the Gaussian: schedule, timesteps and prediction are the right ones."""
    d = denoiser(schedule, prediction)
    x, nfe = run_peer(PEERS[name], d, 40, range(2000), SHAPE, Independent(1))
    assert nfe == PEERS[name].evaluations(40) == d.network.calls  # type: ignore[attr-defined]
    assert float((x.mean(0) - TWIN.mean).abs().max()) < 0.05
    ratio = x.var(0) / SPECTRUM
    assert 0.6 < float(ratio.mean()) < 1.6, ratio


@pytest.mark.parametrize("name", able(LINEAR, "epsilon"))
def test_peer_noise_is_a_samples_own(name: str) -> None:
    d = denoiser()
    whole, _ = run_peer(PEERS[name], d, 4, range(5), SHAPE, Independent(3))
    parts = [run_peer(PEERS[name], d, 4, [i], SHAPE, Independent(3))[0] for i in range(5)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-4)


@pytest.mark.parametrize("name", able(LINEAR, "epsilon"))
def test_head_is_split_off(name: str) -> None:
    with_head, _ = run_peer(PEERS[name], denoiser(head=True), 4, range(3), SHAPE, Independent(0))
    without, _ = run_peer(PEERS[name], denoiser(), 4, range(3), SHAPE, Independent(0))
    assert torch.equal(with_head, without)


def test_learned_variance_is_handed_on() -> None:
    peer = PEERS["ddpm-learned"]
    x, _ = run_peer(peer, denoiser(head=True), 4, range(3), SHAPE, Independent(0))
    small, _ = run_peer(PEERS["ddpm"], denoiser(), 4, range(3), SHAPE, Independent(0))
    assert not torch.allclose(x, small)
    with pytest.raises(UserError, match="needs a network with a learned-range variance head"):
        make_peer(peer, denoiser())


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("steps", [5, 10])
def test_ddim_is_the_peers_ddim(steps: int, clip: float | None) -> None:
    """Same network, start, grid and clipping: the only difference is the peer's float32 table."""
    d = denoiser(COSINE, clip=clip)
    ours = draw(d, Cell("ddim", steps), 6, SHAPE).samples
    theirs = draw(d, Cell("diffusers:ddim", steps), 6, SHAPE).samples
    assert torch.allclose(ours, theirs, atol=2e-3)


@pytest.mark.parametrize("name", [n for n in able(LINEAR, "epsilon") if PEERS[n].clip])
def test_clipping_reaches_the_peer(name: str) -> None:
    """A network that answers with x0 = 3 everywhere: clipped to 1 in every step, the chain ends at 1."""
    ends = []
    for clip in (1.0, None):
        d = NetworkDenoiser(lambda x, t: torch.full_like(x, 3.0), LINEAR, "sample", clip=clip)
        x, _ = run_peer(PEERS[name], d, 4, range(2), SHAPE, Independent(0))
        ends.append(float(x.mean()))
    assert ends[0] < 1.6 < 2.5 < ends[1]


def test_ddim_follows_the_clipped_x0() -> None:
    """x0 = 2 sin 3x, clipped to 1 in places: the noise a state keeps is that of the clipped x0, as ours is."""
    d = NetworkDenoiser(lambda x, t: 2 * torch.sin(3 * x), LINEAR, "sample", clip=1.0)
    theirs, _ = run_peer(PEERS["ddim"], d, 4, range(2), SHAPE, Independent(0))
    ours = draw(d, Cell("ddim", 4), 2, SHAPE, noise=Independent(0)).samples
    assert torch.allclose(theirs, ours, atol=2e-3)


def test_spacings_are_the_peers_own() -> None:
    """`default` is what the peer ships with, `karras` its own switch; both differ from `trailing`."""
    shipped = make_peer(PEERS["unipc"], denoiser(), "default")
    karras = make_peer(PEERS["unipc"], denoiser(), "karras")
    assert shipped.config["timestep_spacing"] == karras.config["timestep_spacing"] == "linspace"
    assert karras.config["use_karras_sigmas"]
    assert not shipped.config["use_karras_sigmas"]
    found = []
    for spacing in ("default", "karras", "trailing"):
        peer = make_peer(PEERS["unipc"], denoiser(), spacing)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            peer.set_timesteps(5)
        found.append([round(t) for t in peer.timesteps.tolist()])
    assert found[0] == [999, 799, 599, 400, 200]
    assert found[2] == [999, 799, 599, 399, 199]
    assert found[1] not in (found[0], found[2])


def test_peers_that_cannot_be_run() -> None:
    with pytest.raises(UserError, match="diffusers:ddim has no Karras spacing"):
        make_peer(PEERS["ddim"], denoiser(), "karras")
    with pytest.raises(UserError, match="peer is 'diffusers:euler'; allowed: ddpm"):
        peer_named("diffusers:euler")
    with pytest.raises(UserError, match=r"for this model there are .*flow-euler"):
        make_peer(PEERS["ddim"], denoiser(Flow(), "flow"))
    with pytest.raises(UserError, match="spacing is 'even'; allowed: trailing, linspace, leading"):
        make_peer(PEERS["ddim"], denoiser(), "even")  # type: ignore[arg-type]
    zero = schedule_from_diffusers({"beta_schedule": "linear", "rescale_betas_zero_snr": True})
    with pytest.raises(UserError, match="zero terminal SNR"):
        make_peer(PEERS["deis"], denoiser(zero, "v_prediction"))
    assert make_peer(PEERS["ddim"], denoiser(zero, "v_prediction")).config["rescale_betas_zero_snr"]
    shifted = schedule_from_diffusers({"rescale_betas_zero_snr": True, "snr_shift_scale": 3.0})
    with pytest.raises(UserError, match="zero terminal SNR"):
        make_peer(PEERS["ddim"], denoiser(shifted, "v_prediction"))


def toy() -> Data:
    x = TWIN.sample(Independent(7).normal(range(300), SHAPE)).clamp(-1, 1)
    return Data("toy", *(TensorImages(part) for part in x.split(100)), levels=256, fingerprint="toy")


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    data = toy()
    return calibrate(denoiser(), lambda: data.calibration.batches(100), replicates=1, bound=1.0)


def test_evaluate(calibration: Calibration) -> None:
    data, d = toy(), denoiser(clip=1.0)
    cells = [Cell("ddpm-basis", 3), Cell("twin-ode", 3), Cell("diffusers:heun", 3), Cell("ddpm-basis", 5, "karras")]
    scorer = Scorer(data, metrics=("energy", "mean"), blocks=16)
    found = evaluate(d, data, cells, calibration=calibration, n=64, scorer=scorer, keep=4)
    assert [(row["sampler"], row["grid"], row["steps"], row["nfe"]) for row in found.rows[::2]] == [
        (TWIN_ALONE, "none", 0, 0),
        ("ddpm-basis", "trailing", 3, 3),
        ("twin-ode", "trailing", 3, 3),
        ("diffusers:heun", "trailing", 3, 5),
        ("ddpm-basis", "karras", 5, 5),
    ]
    assert all(math.isfinite(row["value"]) and row["low"] <= row["value"] <= row["high"] for row in found.rows)
    assert found.floor.keys() == {"energy", "mean"}
    assert found.recommended is not None
    assert found.recommended["sampler"] in ("ddpm-basis", "twin-ode")
    assert found.shown["twin-ode@3"].shape == (4, *SHAPE)
    difference = found.paired(cells[0], cells[1], "energy")
    a, b = (
        next(r["value"] for r in found.rows if r["sampler"] == c.sampler and r["metric"] == "energy") for c in cells[:2]
    )
    assert difference.value == pytest.approx(a - b)


def test_a_cell_that_diverges_has_no_row_but_a_note() -> None:
    d = NetworkDenoiser(lambda x, t: x * math.nan, LINEAR, "epsilon")
    data = toy()
    scorer = Scorer(data, metrics=("energy",), blocks=16)
    found = evaluate(d, data, [Cell("ddim", 2)], n=32, scorer=scorer)
    assert (found.rows, found.recommended) == ([], None)
    assert found.notes == ["ddim@2 diverged: 32 of 32 samples are not finite, so it has no row"]


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (Cell("ddim", 0), "steps is 0; give a whole number from 1 to 1000"),
        (Cell("diffusers:ddim", 1001), "steps is 1001"),
        (Cell("nosuch", 3), "sampler is 'nosuch'; allowed: ddpm-small"),
        (Cell("ddim", 3, "nosuch"), "grid is 'nosuch'; allowed: uniform"),
        (Cell("ddim", 3, "variance-matched"), "needs a calibrated model"),
        (Cell("twin-ode", 3), "needs a Gaussian twin"),
        (Cell("ddpm-pixel", 3), "needs a calibrated model"),
        (Cell("ddpm-learned", 3), "needs a network with a variance head"),
    ],
)
def test_cells_that_cannot_be_run_are_found_first(cell: Cell, said: str) -> None:
    data, d = toy(), denoiser()
    with pytest.raises(UserError, match=said):
        evaluate(d, data, [Cell("ddim", 2), cell], n=32, scorer=Scorer(data, metrics=("energy",), blocks=16))
    assert d.network.calls == 0  # type: ignore[attr-defined]


def test_recommended_is_the_cheapest_that_is_not_worse() -> None:
    def row(sampler: str, nfe: int, value: float, reach: float = 0.5) -> dict[str, Any]:
        columns = {"sampler": sampler, "grid": "trailing", "steps": nfe, "nfe": nfe, "metric": "frechet"}
        return columns | {"value": value, "low": value - reach, "high": value + reach}

    rows = [row("ddim", 5, 3.0), row("ddim", 10, 1.4), row("twin-ode", 10, 1.2), row("ddim", 20, 1.0)]
    assert recommend(rows, "frechet") == {"sampler": "twin-ode", "grid": "trailing", "steps": 10}
    peers = [row("diffusers:ddim", 3, 0.1), row(TWIN_ALONE, 0, 0.1)]
    assert recommend(peers, "frechet") is None
    assert recommend(peers + rows, "frechet") == recommend(rows, "frechet")
