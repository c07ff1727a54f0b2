"""Networks of every kind become posteriors; the Jacobian gives the exact covariance."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from lowvar.process.basis import DCTBasis, PixelBasis
from lowvar.process.covariance import BasisDiagonal, Diagonal, Isotropic, LowRankPlusDiagonal
from lowvar.process.denoiser import (
    Denoiser,
    Guided,
    NetworkDenoiser,
    Prediction,
    WithCovariance,
    from_prediction,
    to_target,
)
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.process.head import Spectrum, covariance_of, head_channels, rank_of
from lowvar.process.jacobian import JacobianCovariance
from lowvar.process.matrix import Dense
from lowvar.process.noise import Independent
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import VE, CosineVP, Flow, Schedule
from lowvar.testing import mixture2, mixture8

SCHEDULES: list[Schedule] = [CosineVP(), VE(), Flow(), Flow(3.0), schedule_from_diffusers({})]
KINDS: list[Prediction] = ["epsilon", "sample", "v_prediction", "flow", "edm"]


def draw(k: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return Independent(k).normal(range(shape[0]), shape[1:], dtype=dtype)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{type(s).__name__}")
@pytest.mark.parametrize("kind", KINDS)
def test_prediction_and_target_are_inverse(schedule: Schedule, kind: Prediction) -> None:
    if kind == "v_prediction" and schedule.family != "vp":
        with pytest.raises(ValueError, match="variance-preserving"):
            NetworkDenoiser(lambda x, t: x, schedule, kind)
        return
    x0, eps = draw(0, 4, 3), draw(1, 4, 3)
    for times in (torch.tensor([0.1, 0.4, 0.7, 0.95]), torch.tensor(0.5)):
        level = schedule.at(times)
        alpha, sigma = (v.reshape(-1, 1) if v.ndim else v for v in (level.alpha, level.sigma))
        x = alpha * x0 + sigma * eps
        out = to_target(kind, x0, eps, level, sigma_data=0.7)
        torch.testing.assert_close(from_prediction(kind, x, out, level, sigma_data=0.7), x0, rtol=1e-8, atol=1e-8)


def test_v_is_salimans_and_edm_is_karras() -> None:
    level = CosineVP().at(0.4)
    x0, eps = draw(0, 2, 3), draw(1, 2, 3)
    torch.testing.assert_close(to_target("v_prediction", x0, eps, level), level.alpha * eps - level.sigma * x0)
    torch.testing.assert_close(to_target("flow", x0, eps, level), eps - x0)
    sigma = VE().at(0.5)
    s, sd, F = float(sigma.sigma), 0.5, draw(2, 2, 3)
    y = x0 + s * eps
    c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / (s**2 + sd**2) ** 0.5  # Karras et al. 2022, Table 1
    torch.testing.assert_close(from_prediction("edm", y, F, sigma, sd), c_skip * y + c_out * F)


def test_edm_input_is_scaled() -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.extend([x, t])
        return torch.zeros_like(x)

    schedule = VE()
    level = schedule.at(0.5)
    x = draw(0, 2, 3)
    NetworkDenoiser(network, schedule, "edm", sigma_data=0.5)(x, level)
    torch.testing.assert_close(seen[0], x / (float(level.sigma) ** 2 + 0.25) ** 0.5)
    torch.testing.assert_close(seen[1], torch.full((2,), float(torch.log(level.sigma)) / 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", [CosineVP(), VE(), Flow()], ids=lambda s: s.family)
def test_exact_network_gives_the_exact_posterior(schedule: Schedule, kind: Prediction) -> None:
    """A network that predicts the exact conditional mean of its target: the posterior mean comes out."""
    if kind == "v_prediction" and schedule.family != "vp":
        return
    target = mixture2()

    def network(x: Tensor, t: Tensor) -> Tensor:
        level = schedule.at(schedule.time_of(t.double()))
        state = x
        if kind == "edm":
            ratio = (level.sigma / level.alpha).reshape(-1, 1)
            state = x * level.alpha.reshape(-1, 1) * (ratio**2 + 0.25) ** 0.5
        mean = target.posterior(state, level, None).mean
        eps = (state - level.alpha[:, None] * mean) / level.sigma[:, None]
        return to_target(kind, mean, eps, level)

    level = schedule.at(0.5)
    x = target.noisy(range(5), level)
    mean = NetworkDenoiser(network, schedule, kind)(x, level).mean
    torch.testing.assert_close(mean, target.posterior(x, level, None).mean, rtol=1e-4, atol=1e-4)  # float32 timesteps


# ---------------------------------------------------------------------------------------------------------------- heads


def headed(value: float):
    return lambda x, t: torch.cat([torch.zeros_like(x), torch.full_like(x, value)], 1)


def test_range_head() -> None:
    schedule = CosineVP()
    for v, f in ((-1.0, 0.0), (0.0, 0.5), (1.0, 1.0)):
        posterior = NetworkDenoiser(headed(v), schedule, head="range")(torch.ones(2, 3, 4, 4), schedule.at(0.5))
        assert posterior.fraction is not None
        assert posterior.covariance is None
        assert posterior.fraction.unique().tolist() == [f]


def test_logvar_head() -> None:
    schedule = Flow()
    level = schedule.at(0.4)
    posterior = NetworkDenoiser(headed(0.7), schedule, "flow", head="logvar")(torch.ones(2, 3, 4, 4), level)
    assert isinstance(posterior.covariance, Diagonal)
    prior = 0.16 / (0.36 + 0.16)  # posterior variance of unit-variance Gaussian data
    expected = torch.full((2, 3, 4, 4), prior * torch.e**0.7)
    torch.testing.assert_close(posterior.covariance.diagonal(), expected, rtol=1e-5, atol=0)


def test_head_errors() -> None:
    schedule, x = CosineVP(), torch.ones(1, 3, 4, 4)
    with pytest.raises(ValueError, match="variance head"):
        NetworkDenoiser(headed(0.0), schedule)(x, schedule.at(0.5))
    with pytest.raises(ValueError, match="6 output channels"):
        NetworkDenoiser(lambda x, t: x, schedule, head="range")(x, schedule.at(0.5))
    with pytest.raises(ValueError, match="range, logvar"):
        NetworkDenoiser(headed(0.0), schedule, head="nope")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="epsilon, sample"):
        NetworkDenoiser(headed(0.0), schedule, "nope")  # pyright: ignore[reportArgumentType]


def test_lowrank_and_basis_head_errors() -> None:
    schedule, x = CosineVP(), torch.ones(1, 2, 4, 4)
    spectrum = Spectrum(DCTBasis((2, 4, 4)), torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match="4 output channels and 2 more for every direction, the network has 5"):
        NetworkDenoiser(lambda x, t: x[:, [0, 1, 0, 1, 0]], schedule, head="lowrank")(x, schedule.at(0.5))
    with pytest.raises(ValueError, match="4 output channels, the network has 6"):
        NetworkDenoiser(lambda x, t: x.repeat(1, 3, 1, 1), schedule, head="basis", spectrum=spectrum)(
            x, schedule.at(0.5)
        )
    with pytest.raises(ValueError, match="head 'basis' needs the data's spectrum"):
        NetworkDenoiser(headed(0.0), schedule, head="basis")
    with pytest.raises(ValueError, match="a spectrum belongs to head 'basis', and the head is 'logvar'"):
        NetworkDenoiser(headed(0.0), schedule, head="logvar", spectrum=spectrum)
    with pytest.raises(ValueError, match="rank is 17; allowed: 0 to 16"):
        head_channels("lowrank", 3, 17)
    assert rank_of("lowrank", 3, 3 * 19) is None  # 17 directions
    with pytest.raises(ValueError, match="describes a reverse step"):
        covariance_of("range", x, schedule.at(0.5), 2)


def test_lowrank_head_of_several_directions() -> None:
    """Every C channels beyond the log variances are one direction, scaled by the prior's standard deviation."""
    schedule = Flow()
    level = schedule.at(torch.tensor([0.4, 0.8], dtype=torch.float64))
    raw = draw(3, 2, 8, 3)  # C = 2 and r = 2: x0_hat, h, u_1, u_2
    posterior = NetworkDenoiser(lambda x, t: raw, schedule, "flow", head="lowrank")(draw(4, 2, 2, 3), level)
    assert posterior.covariance is not None
    p = (level.sigma**2 / (level.alpha**2 + level.sigma**2)).reshape(2, 1)
    u = raw[:, 4:].reshape(2, 2, 6)
    expected = torch.diag_embed(p * raw[:, 2:4].exp().flatten(1)) + p[:, :, None] * (
        u[:, 0, :, None] * u[:, 0, None] + u[:, 1, :, None] * u[:, 1, None]
    )
    torch.testing.assert_close(posterior.covariance.dense(), expected, rtol=1e-12, atol=0)


def test_half_precision_networks_are_widened() -> None:
    schedule = CosineVP()
    denoiser = NetworkDenoiser(lambda x, t: x.to(torch.bfloat16), schedule, "sample")
    assert denoiser(torch.ones(1, 3), schedule.at(0.5)).mean.dtype == torch.float32


# ----------------------------------------------------------------------------------------------- clipping and guidance


@pytest.mark.parametrize("form", ["isotropic", "diagonal", "basis", "low rank", "dense"])
def test_clipping_keeps_mean_and_covariance_of_one_law(form: str) -> None:
    """|mean| <= b and total variance at most sum (b - m)(b + m) (Bhatia & Davis); entry by entry for a diagonal."""
    mean = torch.tensor([[0.2, 0.9, 1.7], [-3.0, -0.5, 0.0]], dtype=torch.float64)
    v = torch.full((2, 3), 0.8, dtype=torch.float64)
    covariance = {
        "isotropic": Isotropic(v[:, 0], (3,)),
        "diagonal": Diagonal(v),
        "basis": BasisDiagonal(PixelBasis((3,)), v),
        "low rank": LowRankPlusDiagonal(v / 2, v[:, None] ** 0.5),
        "dense": Dense(torch.diag_embed(v), (3,)),
    }[form]
    clipped = Posterior(mean, covariance).clip(1.0)
    limit = 1 - clipped.mean**2
    assert float(clipped.mean.abs().max()) <= 1
    assert clipped.covariance is not None
    assert bool((clipped.covariance.trace() <= limit.sum(1) + 1e-12).all())
    assert bool((clipped.covariance.trace() <= covariance.trace() + 1e-12).all())
    if form == "diagonal":
        assert bool((clipped.covariance.diagonal() <= limit + 1e-12).all())


def test_clipping_leaves_consistent_posteriors_alone() -> None:
    mean, v = torch.full((1, 3), 0.1), torch.full((1, 3), 0.5)
    clipped = Posterior(mean, Diagonal(v)).clip(1.0)
    assert torch.equal(clipped.mean, mean)
    assert clipped.covariance is not None
    assert torch.equal(clipped.covariance.diagonal(), v)


def test_guidance() -> None:
    schedule = CosineVP()
    one = NetworkDenoiser(lambda x, t: torch.full_like(x, 0.5), schedule, "sample")
    zero = NetworkDenoiser(lambda x, t: torch.full_like(x, 0.1), schedule, "sample")
    x, level = torch.zeros(2, 3), schedule.at(0.5)
    guided = Guided(one, zero, 3.0)(x, level)
    torch.testing.assert_close(guided.mean, torch.full((2, 3), 1.3))
    assert guided.covariance is None
    assert Guided(one, zero, 3.0).nfe == 2
    assert float(Guided(one, zero, 3.0, clip=1.0)(x, level).mean.max()) == 1
    torch.testing.assert_close(Guided(one, zero, 1.0)(x, level).mean, one(x, level).mean)


def test_attached_covariance_is_clipped_with_the_mean() -> None:
    schedule = CosineVP()
    denoiser = NetworkDenoiser(lambda x, t: torch.full_like(x, 0.9), schedule, "sample")
    attached = WithCovariance(denoiser, lambda x, level, p: Isotropic(1.0, x.shape[1:]), clip=1.0)
    posterior = attached(torch.zeros(1, 4), schedule.at(0.5))
    assert posterior.covariance is not None
    torch.testing.assert_close(posterior.covariance.trace(), torch.tensor([4 * 0.19]))


# ---------------------------------------------------------------------------------------------------- diffusers models


def unet(channels: int) -> Denoiser:
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=channels,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    return NetworkDenoiser(net, schedule_from_diffusers({}), head=None if channels == 1 else "range")


def conditional_unet() -> Denoiser:
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    embedding = draw(5, 2, 3, 8, dtype=torch.float32)
    return NetworkDenoiser(
        net, schedule_from_diffusers({}), "v_prediction", conditioning={"encoder_hidden_states": embedding}
    )


def dit() -> Denoiser:
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=1,
        out_channels=2,
        num_layers=1,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=10,
    )
    labels = torch.tensor([1, 2])
    return NetworkDenoiser(net.eval(), schedule_from_diffusers({}), head="range", conditioning={"class_labels": labels})


@pytest.mark.parametrize(
    "make", [lambda: unet(1), lambda: unet(2), conditional_unet, dit], ids=["unet", "unet range", "conditional", "dit"]
)
def test_diffusers_models(make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        denoiser = make()
    x = draw(4, 2, 1, 8, 8, dtype=torch.float32)
    level = denoiser.schedule.at(0.5)
    with torch.no_grad():
        posterior = denoiser(x, level)
        out, _ = denoiser.raw(x, level)
    assert posterior.mean.shape == x.shape
    assert torch.isfinite(posterior.mean).all()
    assert (posterior.fraction is not None) == (denoiser.head == "range")
    torch.testing.assert_close(posterior.mean, from_prediction(denoiser.prediction, x, out, level))
    # one level a sample
    with torch.no_grad():
        both = denoiser(x, denoiser.schedule.at(torch.tensor([0.5, 0.5])))
    torch.testing.assert_close(both.mean, posterior.mean, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- Jacobian


# torch's own: its forward mode scripts a decomposition when it is first used
jit = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@jit
@pytest.mark.parametrize("schedule", [CosineVP(), VE(), Flow(), Flow(3.0)], ids=["vp", "ve", "flow", "flow shift 3"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_jacobian_is_the_exact_covariance(schedule: Schedule, symmetric: bool) -> None:
    target = mixture8()
    denoiser = JacobianCovariance(target.denoiser(schedule, None), steps=8, symmetric=symmetric)
    for t in (0.9, 0.5, 0.2):
        level = schedule.at(t)
        x = target.noisy(range(4), level)
        found, exact = denoiser(x, level).covariance, target.posterior(x, level, "dense").covariance
        assert found is not None
        assert exact is not None
        scale = float(exact.trace().max())
        torch.testing.assert_close(found.dense(), exact.dense(), rtol=0, atol=1e-8 * scale)
        z = draw(7, 4, 8)
        torch.testing.assert_close(found.sqrt_matvec(z), exact.sqrt_matvec(z), rtol=0, atol=1e-7 * scale**0.5)
        torch.testing.assert_close(found.trace(), exact.trace(), rtol=1e-8, atol=0)


@jit
def test_jacobian_with_a_level_a_sample() -> None:
    schedule, target = CosineVP(), mixture8()
    level = schedule.at(torch.tensor([0.3, 0.6], dtype=torch.float64))
    x = draw(1, 2, 8)
    found = JacobianCovariance(target.denoiser(schedule, None))(x, level).covariance
    exact = target.posterior(x, level, "dense").covariance
    assert found is not None
    assert exact is not None
    torch.testing.assert_close(found.dense(), exact.dense(), rtol=0, atol=1e-9)
