"""The share of a network's remainder that the twin's flow keeps: measured, kept with the path moments, and used."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowvar.calibrate import Calibration, calibrate, path_moments, remainder_share
from lowvar.process.basis import MatrixBasis
from lowvar.process.corrected import CorrectedDenoiser
from lowvar.process.denoiser import Denoiser
from lowvar.process.flow import TwinFlow
from lowvar.process.mixture import MixtureTwin
from lowvar.process.noise import Independent
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import CosineVP, Level
from lowvar.process.twin import GaussianTwin
from lowvar.sample import trajectory
from lowvar.testing import mixture2, rotation

D = 4
SCHEDULE = CosineVP()
BASIS = MatrixBasis(rotation(D, 2), (D,))
TWIN = GaussianTwin(torch.zeros(D), BASIS, torch.tensor([3.0, 1.0, 0.3, 0.05], dtype=torch.float64))
DATA = TWIN.sample(Independent(1).normal(range(600), (D,), dtype=torch.float64))


class _Noisy(Denoiser):
    """The twin's denoiser with an error of its own at high noise, as a network that predicts noise has it."""

    schedule, nfe = SCHEDULE, 1

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        mean = TWIN.posterior(x, level).mean
        if float(level.logsnr) < 0:
            wild = torch.sin(40 * x.roll(1, -1) + torch.arange(D, dtype=x.dtype))
            mean = mean + float(level.sigma / level.alpha).__pow__(0.5) * wild
        return Posterior(mean)


def test_an_exact_denoiser_keeps_all_but_what_is_not_told_apart() -> None:
    """A mixture's posterior against its Gaussian twin: at most a tenth of the entries are not 1."""
    target = mixture2()
    data = target.sample(range(1000), Independent(3))
    share = remainder_share(target.denoiser(SCHEDULE, None), target.twin, data.split(300))
    assert share is None or float((share.coefficient != 1).double().mean()) < 0.1


def test_a_networks_own_error_is_not_carried_on() -> None:
    """Where it is noisy the share is near 0; the flow with it gives the twin's samples, without it far from them."""
    share = remainder_share(_Noisy(), TWIN, DATA.split(200))
    assert share is not None
    noisy = share.logsnr < -1
    assert float(share.coefficient[noisy].max()) < 0.2
    starts = Independent(4).normal(range(64), (D,), dtype=torch.float64)
    grid = SCHEDULE.time(torch.tensor([-4.0, -2.0], dtype=torch.float64))
    grid = torch.cat([grid, torch.zeros(1, dtype=torch.float64)])

    def samples(solver: TwinFlow, denoiser: Denoiser) -> Tensor:
        x = solver.initial(starts, SCHEDULE.at(1.0), SCHEDULE.at(grid[0]))
        for state, _ in trajectory(denoiser, solver, grid, x):
            x = state.x
        return x

    plain, kept = (path_moments(_Noisy(), TWIN, n=32, levels=16, share=s, dtype=torch.float64) for s in (None, share))
    assert kept.share is not None
    exact = samples(TwinFlow(TWIN), TWIN.denoiser(SCHEDULE))
    with_share = samples(TwinFlow(TWIN, kept), _Noisy())
    without = samples(TwinFlow(TWIN, replace(plain, moments=torch.ones_like(plain.moments))), _Noisy())
    errors = [float((x - exact).square().mean()) for x in (with_share, without)]
    assert errors[0] < 0.02 * errors[1]


def test_the_flow_multiplies_by_share_and_kappa() -> None:
    """Share 1/2 of a network's remainder is the flow of the network with half of it; shares are linear in logsnr."""
    target = mixture2()
    network = target.denoiser(SCHEDULE, None)
    moments = path_moments(network, target.twin, n=16, levels=10, dtype=torch.float64)
    G, L = moments.moments.shape[:2]
    half = replace(moments, share=torch.full((G, L), 0.5, dtype=torch.float64))
    levels = SCHEDULE.at(torch.tensor([0.7, 0.4], dtype=torch.float64))
    x = target.noisy(range(20), levels[0]).double()
    mean, control = network(x, levels[0]).mean, target.twin.posterior(x, levels[0]).mean
    one, other = TwinFlow(target.twin, half), TwinFlow(target.twin, moments)
    a, _ = one.step(one.prepare(levels), 0, one.start(x), Posterior(mean), None)
    b, _ = other.step(other.prepare(levels), 0, other.start(x), Posterior(control + 0.5 * (mean - control)), None)
    torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-12)
    ramp = replace(moments, share=torch.linspace(0, 1, L, dtype=torch.float64).expand(G, L))
    step = moments.logsnr[1] - moments.logsnr[0]
    for place, expected in ((0.0, 0.0), (2.25, 2.25 / (L - 1)), (L - 1.0, 1.0), (-3.0, 0.0), (L + 2.0, 1.0)):
        at = float(moments.logsnr[0] + place * step)
        to = moments.logsnr[-1:]
        torch.testing.assert_close(ramp.trust(at, to), expected * moments.trust(at, to), rtol=0, atol=1e-9)


def test_moments_are_those_of_the_share() -> None:
    """Paths of the corrected denoiser, measured as such."""
    share = remainder_share(_Noisy(), TWIN, DATA.split(200))
    assert share is not None
    one = path_moments(_Noisy(), TWIN, n=16, levels=8, share=share, dtype=torch.float64)
    other = path_moments(CorrectedDenoiser(_Noisy(), share), TWIN, n=16, levels=8, dtype=torch.float64)
    torch.testing.assert_close(one.moments, other.moments)
    assert other.share is None


def test_a_calibration_measures_and_keeps_it() -> None:
    calibration = calibrate(_Noisy(), lambda: DATA.split(150), logsnr=torch.linspace(-6, 6, 5), components=(), paths=16)
    assert calibration.paths is not None
    assert calibration.paths.share is not None
    fields, tensors = calibration.to_json()
    back = Calibration.from_json(json.loads(json.dumps(fields)), tensors)
    assert back.paths is not None
    assert back.paths.share is not None
    torch.testing.assert_close(back.paths.share, calibration.paths.share, rtol=1e-6, atol=1e-9)


def test_few_images_say_nothing_and_shapes_are_checked() -> None:
    assert remainder_share(_Noisy(), MixtureTwin.of(TWIN), [DATA[:3]]) is None
    moments = path_moments(_Noisy(), TWIN, n=4, levels=6, dtype=torch.float64)
    with pytest.raises(ValueError, match="shares are"):
        replace(moments, share=torch.ones(2, 3))
