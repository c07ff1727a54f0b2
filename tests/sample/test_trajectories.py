"""Running the reverse process: noise by sample number, generators of steps, batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from lowvar.process.grid import trailing
from lowvar.process.kernel import ReverseKernel
from lowvar.process.multistep import MultistepSolver
from lowvar.process.noise import Antithetic, Independent, NoiseSource
from lowvar.process.schedule import VE, CosineVP, Flow
from lowvar.process.solver import Solver
from lowvar.sample import generate, trajectory
from lowvar.testing import anisotropic_gaussian, mixture8

TARGET, SCHEDULE = mixture8(), CosineVP()
GRID = trailing(SCHEDULE, 4)
SOLVERS: dict[str, Solver] = {
    "ancestral": ReverseKernel(1.0),
    "ddim with noise": ReverseKernel(0.0),
    "twin sde": MultistepSolver(TARGET.twin, 2, 2, 1.0),
    "twin ode": MultistepSolver(TARGET.twin, 2, 2, 0.0),
}


@dataclass(frozen=True)
class Recorder(NoiseSource):
    """Hands on another source's numbers and keeps them by (sample, draw)."""

    base: NoiseSource = field(default_factory=Independent)
    seen: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def normal(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        z = self.base.normal(index, shape, draw=draw, dtype=dtype, device=device)
        for i, row in zip(torch.as_tensor(index).tolist(), z, strict=True):
            self.seen[i, draw] = row
        return z

    def uniform(self, *args: object, **kwargs: object) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise AssertionError("a reverse step draws no uniform numbers")


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_sample_i_does_not_depend_on_the_batch(solver: Solver) -> None:
    results: list[tuple[Tensor, dict[tuple[int, int], Tensor]]] = []
    for size in (1, 7, 64):
        noise = Recorder()
        x = generate(TARGET.denoiser(SCHEDULE), solver, GRID, (8,), 64, noise, batch_size=size)
        results.append((x, noise.seen))
    x, seen = results[-1]
    for other, noise in results[:-1]:
        assert noise.keys() == seen.keys()
        assert all(torch.equal(noise[k], seen[k]) for k in seen)
        torch.testing.assert_close(other, x, rtol=0, atol=1e-4)
    draws = {draw for _, draw in seen}
    assert draws == ({0, 1, 2, 3} if solver.stochastic else {0})  # none for the step to clean data


def test_samples_have_numbers() -> None:
    denoiser, kernel = TARGET.denoiser(SCHEDULE), ReverseKernel(1.0)
    whole = generate(denoiser, kernel, GRID, (8,), 10, Independent(3))
    part = generate(denoiser, kernel, GRID, (8,), 4, Independent(3), first=6)
    torch.testing.assert_close(part, whole[6:], rtol=0, atol=1e-5)
    shuffled = torch.tensor([7, 2, 9])
    x = kernel.initial(Independent(3).normal(shuffled, (8,)), SCHEDULE.at(1.0), SCHEDULE.at(1.0))
    for state, _ in trajectory(denoiser, kernel, GRID, x, Independent(3), shuffled):
        x = state.x
    torch.testing.assert_close(x, whole[shuffled], rtol=0, atol=1e-5)


def test_antithetic_samples_of_a_centred_gaussian_are_mirrored() -> None:
    target = anisotropic_gaussian((3,))
    target = type(target)(torch.zeros(3), target.covariance)
    x = generate(target.denoiser(SCHEDULE), ReverseKernel(1.0), GRID, (3,), 6, Antithetic(Independent(0)))
    torch.testing.assert_close(x[0::2], -x[1::2], rtol=0, atol=1e-5)


def test_trajectory_yields_every_step() -> None:
    x = TARGET.noisy(range(3), SCHEDULE.at(1.0))
    steps = list(trajectory(TARGET.denoiser(SCHEDULE), ReverseKernel(1.0), GRID, x))
    assert [info.k for _, info in steps] == [0, 1, 2, 3]
    state, info = steps[-1]
    assert torch.equal(state.x, info.posterior.mean)  # the last step adds no noise
    for (state, _), (_, following) in itertools.pairwise(steps):
        assert following.law.mean.shape == state.x.shape


def test_initial_state_has_the_marginal_scale() -> None:
    for schedule, std in ((CosineVP(), 1.0), (VE(), (1 + 80**2) ** 0.5), (Flow(), 1.0)):
        z = Independent(0).normal(range(4000), (2,), dtype=torch.float64)
        x = ReverseKernel(1.0).initial(z, schedule.at(1.0), schedule.at(1.0))
        assert x.dtype == torch.float64
        assert abs(float(x.std()) / std - 1) < 0.03


def test_generate_options() -> None:
    counts: list[int] = []
    x = generate(
        TARGET.denoiser(SCHEDULE),
        ReverseKernel(0.0, "small"),
        GRID,
        (8,),
        5,
        batch_size=2,
        clip=0.5,
        dtype=torch.float64,
        progress=counts.append,
    )
    assert x.shape == (5, 8)
    assert x.dtype == torch.float64
    assert float(x.abs().max()) <= 0.5
    assert sum(counts) == 5 * 4
    assert not x.requires_grad
