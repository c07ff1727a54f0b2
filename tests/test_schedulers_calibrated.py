"""ReverseVarianceScheduler with a calibration: the same chains as `lowvar.sample`, and the files beside the config."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowvar.calibrate import Calibration, calibrate, marginal_deficit
from lowvar.calibrate.grids import calibrated_grid
from lowvar.errors import UserError
from lowvar.process.basis import DCTBasis, PixelBasis
from lowvar.process.covariance import Diagonal
from lowvar.process.denoiser import Denoiser, NetworkDenoiser, WithCovariance
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.process.grid import make_grid
from lowvar.process.kernel import ReverseKernel
from lowvar.process.multistep import MultistepSolver
from lowvar.process.noise import Independent
from lowvar.process.solver import Solver
from lowvar.process.twin import GaussianTwin
from lowvar.sample.named import SAMPLERS
from lowvar.sample.trajectory import trajectory
from lowvar.schedulers import CALIBRATION_FILE, ReverseVarianceScheduler, sampler_fields

torch.set_num_threads(1)
SHAPE = (2, 4, 4)
CLIP = 3.0
FIELDS: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": CLIP, "grid": "trailing"}
SCHEDULE = schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2"})


def network(x: Tensor, t: Any) -> Tensor:
    """A noise prediction that is near the right one for data of variance 1/4, and not linear."""
    return 0.7 * x + 0.1 * torch.sin(3 * x)


def data() -> Tensor:
    spectrum = torch.linspace(1.0, 0.02, 32).reshape(SHAPE)
    return GaussianTwin(torch.full(SHAPE, 0.1), DCTBasis(SHAPE), spectrum).sample(
        Independent(1).normal(range(64), SHAPE)
    )


def denoiser() -> NetworkDenoiser:
    return NetworkDenoiser(network, SCHEDULE, clip=CLIP)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    logsnr = torch.linspace(-8, 8, 9, dtype=torch.float64)
    return calibrate(denoiser(), lambda: [data()], logsnr=logsnr, replicates=1)


def chain(scheduler: ReverseVarianceScheduler, steps: int, x: Tensor, source: Any) -> Tensor:
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, generator=source).prev_sample
    return x


KERNELS = ["analytic", "isotropic", "channel", "pixel", "basis", "twin"]


def parts(kind: str, calibration: Calibration) -> tuple[dict[str, Any], Denoiser, Solver]:
    """The scheduler's fields, and the same sampler made of the package's own pieces."""
    twin = calibration.twin
    if kind in KERNELS:

        def of_twin(x: Tensor, level: Any, posterior: Any) -> Any:
            return twin.posterior(x, level).covariance

        model = of_twin if kind == "twin" else calibration.table(kind)
        return {"variance": kind, "eta": 0.5}, WithCovariance(denoiser(), model), ReverseKernel(0.5)
    if kind == "twin-sde":
        return {"sampler": "twin", "tau": 1.0}, denoiser(), MultistepSolver(twin, 2, 0, 1.0)
    if kind == "twin-ode":
        return {"sampler": "twin", "predictor": 2, "corrector": 2}, denoiser(), MultistepSolver(twin, 2, 2)
    fields = {"sampler": "multistep", "predictor": 3, "corrector": 3, "tau": 0.5}
    return fields, denoiser(), MultistepSolver(None, 3, 3, 0.5)


@pytest.mark.parametrize("kind", [*KERNELS, "twin-sde", "twin-ode", "adams"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_trajectory(kind: str, dtype: torch.dtype, calibration: Calibration) -> None:
    """Through the scheduler, twice, as through `trajectory`: same noise, same state after every chain."""
    fields, model, solver = parts(kind, calibration)
    scheduler = ReverseVarianceScheduler(**FIELDS, **fields, calibration=calibration)
    source, x = Independent(7), Independent(8).normal(range(3), SHAPE, dtype=dtype)
    wanted = [state.x for state, _ in trajectory(model, solver, make_grid("trailing", SCHEDULE, 6), x, source)][-1]
    for _ in range(2):
        here = chain(scheduler, 6, x, source)
        assert here.dtype == dtype
        assert torch.allclose(here, wanted, atol=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("any_root", [True, False])
def test_noise_has_the_kernels_covariance(kind: str, any_root: bool, calibration: Calibration) -> None:
    """Both roots of it: R R^T = lambda^2 I + kappa^2 C, read off all unit vectors."""
    fields, model, solver = parts(kind, calibration)
    scheduler = ReverseVarianceScheduler(**FIELDS, **fields, calibration=calibration)
    scheduler.set_timesteps(6)
    recipe, k = scheduler._made_recipe(), 2
    units = torch.eye(32, dtype=torch.float64).reshape(32, *SHAPE)
    recipe.at(units)
    noise = recipe.noise(k, units)
    assert noise is not None
    R = noise.add(torch.zeros_like(units), units.clone(), any_root).flatten(1)  # rows are R e_i
    levels, x = SCHEDULE.at(make_grid("trailing", SCHEDULE, 6)), units[:1]
    assert isinstance(solver, ReverseKernel)
    wanted = solver(x, model(x, levels[k]), levels[k], levels[k + 1]).covariance.dense()[0]
    assert torch.allclose(R.T @ R, wanted, atol=1e-12)


def test_a_covariance_that_depends_on_the_state(calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a trained head's: asked anew at every step, with the posterior, under the calibration's own name for it."""

    def head(x: Tensor, level: Any, posterior: Any) -> Any:
        return Diagonal(0.1 * (x**2 + posterior.mean**2) / (1 + level.sigma**2))

    monkeypatch.setattr(Calibration, "model", lambda self, name, labels: {"pixel": head}[name])
    scheduler = ReverseVarianceScheduler(**FIELDS, variance="pixel", eta=0.5, calibration=calibration)
    source, x = Independent(7), Independent(8).normal(range(3), SHAPE, dtype=torch.float64)
    steps = trajectory(
        WithCovariance(denoiser(), head), ReverseKernel(0.5), make_grid("trailing", SCHEDULE, 6), x, source
    )
    wanted = [state.x for state, _ in steps][-1]
    for _ in range(2):
        assert torch.allclose(chain(scheduler, 6, x, source), wanted, atol=1e-12)


def test_variance_matched_grid(calibration: Calibration) -> None:
    scheduler = ReverseVarianceScheduler(**{**FIELDS, "grid": "variance-matched"}, calibration=calibration)
    scheduler.set_timesteps(6)
    wanted = SCHEDULE.timestep(calibrated_grid("variance-matched", calibration, SCHEDULE, 6).grid)[:-1]
    assert torch.allclose(scheduler.timesteps.double(), wanted, atol=1e-3)
    assert scheduler.timesteps.tolist() != make_grid("trailing", SCHEDULE, 6).tolist()


@pytest.mark.parametrize("kind", ["twin-ode", "twin-sde", "adams"])
def test_a_chain_that_starts_late(kind: str, calibration: Calibration) -> None:
    """As image-to-image pipelines start: from timesteps[2:], with weights that count from there."""
    fields, model, solver = parts(kind, calibration)
    scheduler = ReverseVarianceScheduler(**FIELDS, **fields, calibration=calibration)
    scheduler.set_timesteps(6)
    x = Independent(8).normal(range(3), SHAPE, dtype=torch.float64)
    whole = make_grid("trailing", SCHEDULE, 6)

    class Shifted(Independent):
        def normal(self, index: Any, shape: Any, *, draw: int = 0, **kwargs: Any) -> Tensor:
            return super().normal(index, shape, draw=draw + 2, **kwargs)

    wanted = [state.x for state, _ in trajectory(model, solver, whole[2:], x, Shifted(7))][-1]
    for attempt in range(2):  # the second time after a chain that was left in the middle
        y = x
        for t in scheduler.timesteps[2:]:
            y = scheduler.step(network(y, t), t, y, generator=Independent(7)).prev_sample
        assert torch.allclose(y, wanted, atol=1e-12), attempt
        t = scheduler.timesteps[0]
        scheduler.step(network(x, t), t, x, generator=Independent(7))


def test_another_batch_is_another_chain(calibration: Calibration) -> None:
    fields, _, _ = parts("twin-ode", calibration)
    scheduler = ReverseVarianceScheduler(**FIELDS, **fields, calibration=calibration)
    scheduler.set_timesteps(4)
    x, (t, s) = Independent(8).normal(range(3), SHAPE), scheduler.timesteps[:2]
    y = scheduler.step(network(x, t), t, x).prev_sample
    fresh = scheduler.step(network(y[:1], s), s, y[:1]).prev_sample
    scheduler.set_timesteps(4)
    assert torch.equal(fresh, scheduler.step(network(y[:1], s), s, y[:1]).prev_sample)


NOISY = [name for name, sampler in SAMPLERS.items() if sampler.noise]


@pytest.fixture(scope="module")
def with_noise(calibration: Calibration) -> Calibration:
    """With noise of every solver that takes it, on 4 and on 6 steps: more than is missing, and another for each."""
    for name in NOISY:
        for steps in (4, 6):
            grid = make_grid("trailing", SCHEDULE, steps)
            solver = SAMPLERS[name].solver
            found = marginal_deficit(denoiser(), solver, grid, calibration.twin, n=128, dtype=torch.float64)
            more = torch.linspace(0.1, 0.4, 32, dtype=torch.float64).reshape(SHAPE) * (1 + len(calibration.deficits))
            variance = torch.cat([found.variance[:-1] + more, found.variance[-1:]])
            calibration = calibration.with_deficit(replace(found, variance=variance))
    return calibration


@pytest.mark.parametrize("name", NOISY)
def test_calibrated_noise_is_that_of_the_trajectory(name: str, with_noise: Calibration) -> None:
    """Solver and grid find their own of all that are kept; on float32 states it is on their side."""
    scheduler = ReverseVarianceScheduler(**FIELDS, **sampler_fields(name), calibration=with_noise)
    solver, source = SAMPLERS[name].solver, Independent(7)
    for steps in (6, 4):
        grid = make_grid("trailing", SCHEDULE, steps)
        kept = with_noise.deficit(solver, SCHEDULE.at(grid).logsnr)
        assert kept is not None
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
            x = Independent(8).normal(range(3), SHAPE, dtype=dtype)
            wanted = [s.x for s, _ in trajectory(denoiser(), kept.attach(solver), grid, x, source)][-1]
            plain = [s.x for s, _ in trajectory(denoiser(), solver, grid, x, source)][-1]
            here = chain(scheduler, steps, x, source)
            torch.testing.assert_close(here, wanted, rtol=0, atol=tolerance)
            assert not torch.allclose(here, plain, atol=1e-2)
    assert torch.equal(scheduler.times, grid)


def test_calibrated_noise_is_kept_in_the_file(with_noise: Calibration, tmp_path: Path) -> None:
    scheduler = ReverseVarianceScheduler(**FIELDS, **sampler_fields("unipc-noise"), calibration=with_noise)
    scheduler.save_pretrained(tmp_path)
    kept = load_file(tmp_path / CALIBRATION_FILE)
    assert kept["deficit.0.variance"].shape == (4, *SHAPE)
    assert sum(name.startswith("deficit.") for name in kept) == 3 * 2 * len(NOISY)
    loaded: Any = ReverseVarianceScheduler.from_pretrained(tmp_path)
    assert [(d.solver, d.n) for d in loaded.calibration.deficits] == [(d.solver, d.n) for d in with_noise.deficits]
    x = Independent(8).normal(range(2), SHAPE)
    there, here = (chain(s, 4, x, Independent(7)) for s in (scheduler, loaded))
    assert torch.allclose(there, here, atol=1e-5)
    save_file({name: value for name, value in kept.items() if name != "deficit.1.shift"}, tmp_path / CALIBRATION_FILE)
    with pytest.raises(UserError, match="incomplete"):
        ReverseVarianceScheduler.from_pretrained(tmp_path)


def test_calibrated_noise_of_another_grid_or_solver_is_refused(with_noise: Calibration) -> None:
    x = torch.zeros(1, *SHAPE)
    scheduler = ReverseVarianceScheduler(**FIELDS, **sampler_fields("ddim-noise"), calibration=with_noise)
    scheduler.set_timesteps(5)
    with pytest.raises(UserError, match="calibrate --noise ddim-noise@5"):
        scheduler.step(x, scheduler.timesteps[0], x)
    other = replace(with_noise, deficits=with_noise.deficits[:2])  # those of DDIM
    scheduler = ReverseVarianceScheduler(**FIELDS, **sampler_fields("unipc-noise"), calibration=other)
    scheduler.set_timesteps(4)
    with pytest.raises(UserError, match="no noise for this grid of 4 steps"):
        scheduler.start(x)
    scheduler = ReverseVarianceScheduler(**FIELDS, **sampler_fields("unipc-noise"), calibration=with_noise)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    with pytest.raises(UserError, match="from the first timestep"):
        scheduler.step(x, scheduler.timesteps[2], x)


def test_a_deficit_takes_the_place_of_an_older_one(calibration: Calibration) -> None:
    solver, grid = SAMPLERS["ddim-noise"].solver, make_grid("trailing", SCHEDULE, 4)
    first, second = (marginal_deficit(denoiser(), solver, grid, calibration.twin, n=n) for n in (32, 64))
    longer = marginal_deficit(denoiser(), solver, make_grid("trailing", SCHEDULE, 5), calibration.twin, n=32)
    held = calibration.with_deficit(first).with_deficit(longer).with_deficit(second)
    assert [d.n for d in held.deficits] == [32, 64]
    assert held.deficit(solver, SCHEDULE.at(grid).logsnr) is second
    assert calibration.deficits == ()
    pixels = GaussianTwin(calibration.twin.mean, PixelBasis(SHAPE), calibration.twin.spectrum)
    with pytest.raises(UserError, match="another basis"):
        calibration.with_deficit(marginal_deficit(denoiser(), solver, grid, pixels, n=32))


# ---------------------------------------------------------------------------------------------------------------- files


def test_files(calibration: Calibration, tmp_path: Path) -> None:
    scheduler = ReverseVarianceScheduler(**FIELDS, variance="basis", calibration=calibration)
    scheduler.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CALIBRATION_FILE, "scheduler_config.json"]
    stored = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert stored["calibration"]["fingerprint"] == SCHEDULE.fingerprint
    assert load_file(tmp_path / CALIBRATION_FILE)["basis"].shape == (32, 32)
    x = Independent(8).normal(range(2), SHAPE)
    for loaded in (
        ReverseVarianceScheduler.from_pretrained(tmp_path),
        ReverseVarianceScheduler.from_pretrained(str(tmp_path.parent), subfolder=tmp_path.name),
        ReverseVarianceScheduler.from_scheduler(scheduler, grid="trailing"),
    ):
        there, here = (chain(s, 4, x, Independent(7)) for s in (scheduler, loaded))
        assert torch.allclose(there, here, atol=1e-5)
    assert len(repr(scheduler)) < 1000
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CALIBRATION_FILE).exists()


def test_a_dct_basis_needs_no_second_file(tmp_path: Path) -> None:
    logsnr = torch.linspace(-8, 8, 5, dtype=torch.float64)
    made = calibrate(denoiser(), lambda: [data()], logsnr=logsnr, replicates=1, basis="dct")
    scheduler = ReverseVarianceScheduler(**FIELDS, variance="basis", calibration=made)
    scheduler.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["scheduler_config.json"]
    x = Independent(8).normal(range(2), SHAPE)
    # here even the config alone says everything
    for loaded in (
        ReverseVarianceScheduler.from_pretrained(tmp_path),
        ReverseVarianceScheduler.from_config(scheduler.config),
    ):
        assert isinstance(loaded, ReverseVarianceScheduler)
        assert torch.allclose(chain(scheduler, 4, x, Independent(7)), chain(loaded, 4, x, Independent(7)), atol=1e-6)


def test_a_calibration_of_another_schedule(calibration: Calibration, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was made for a noise schedule with fingerprint"):
        ReverseVarianceScheduler(variance="basis", calibration=calibration)
    with pytest.raises(UserError, match="calibrate again"):
        ReverseVarianceScheduler.from_scheduler(diffusers.DDPMScheduler(), calibration)
    ReverseVarianceScheduler(**FIELDS, variance="basis", calibration=calibration).save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "beta_schedule": "linear"}))
    with pytest.raises(UserError, match="calibrate again"):
        ReverseVarianceScheduler.from_pretrained(tmp_path)


def test_files_that_do_not_fit(calibration: Calibration, tmp_path: Path) -> None:
    scheduler = ReverseVarianceScheduler(**FIELDS, variance="basis", calibration=calibration)
    scheduler.save_pretrained(tmp_path)
    file = tmp_path / CALIBRATION_FILE
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        ReverseVarianceScheduler.from_pretrained(tmp_path)
    save_file({"other": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="incomplete"):
        ReverseVarianceScheduler.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=f"holds no {CALIBRATION_FILE}"):
        ReverseVarianceScheduler.from_pretrained(tmp_path)
    alone: Any = ReverseVarianceScheduler.from_config(scheduler.config)
    alone.set_timesteps(3)
    x = torch.zeros(1, *SHAPE)
    with pytest.raises(UserError, match=f"came without {CALIBRATION_FILE}"):
        alone.step(x, alone.timesteps[0], x)


def test_samples_of_another_shape(calibration: Calibration) -> None:
    x = torch.zeros(1, 2, 8, 8)
    for variance in ("basis", "isotropic"):
        scheduler = ReverseVarianceScheduler(**FIELDS, variance=variance, calibration=calibration)
        with pytest.raises(UserError, match=r"is for samples \(2, 4, 4\), got \(2, 8, 8\)"):
            scheduler.step(x, 500, x)


def test_calibrating_a_stock_scheduler(calibration: Calibration) -> None:
    stock = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    made = ReverseVarianceScheduler.from_scheduler(stock, calibration)
    assert (made.config["variance"], made.config["eta"]) == ("basis", 0.0)
    named = ReverseVarianceScheduler.from_scheduler(stock, calibration, sampler="ddpm-pixel")
    assert (named.config["variance"], named.config["eta"]) == ("pixel", 1.0)


def test_wrong_variance_would_be_seen(calibration: Calibration) -> None:
    """The comparison with `trajectory` tells tables apart."""
    x, source = Independent(8).normal(range(3), SHAPE), Independent(7)
    results = [
        chain(ReverseVarianceScheduler(**FIELDS, variance=v, calibration=calibration), 6, x, source)
        for v in ("isotropic", "pixel", "basis")
    ]
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in pairwise(results))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["basis", "twin-ode", "twin-sde"])
def test_no_transfers_in_the_loop(kind: str, calibration: Calibration) -> None:
    """After the first chain, steps neither wait for the device nor copy to it."""
    fields, _, _ = parts(kind, calibration)
    scheduler = ReverseVarianceScheduler(**FIELDS, **fields, calibration=calibration)
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.zeros(2, *SHAPE, device="cuda")
    scheduler.set_timesteps(6, device="cuda")
    for attempt in range(2):
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            y = x
            for t in scheduler.timesteps:
                y = scheduler.step(network(y, t), t, y, generator=generator).prev_sample
        finally:
            torch.cuda.set_sync_debug_mode("default")
