r"""Running the reverse process.

    x_{t_0} -> x_{t_1} -> ... -> x_{t_K},     x_{t_{k+1}} = solver step(x_{t_k}, posterior(x_{t_k}), z_k).

`trajectory` is a generator of (state, info), so a caller logs, stops or inspects without callbacks; `generate` runs
it in batches to the end. Noise is an argument: sample i at draw 0 gives the start, at draw k + 1 the noise of step k,
so sample i has the same noise whatever the batch size or the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lowvar.process.denoiser import Denoiser
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.solver import Solver, State, StepInfo

__all__ = ["generate", "trajectory"]


def trajectory(
    denoiser: Denoiser,
    solver: Solver,
    grid: Tensor,
    x: Tensor,
    noise: NoiseSource | None = None,
    index: Sequence[int] | Tensor | None = None,
) -> Iterator[tuple[State, StepInfo]]:
    """The states after each evaluation: of each reverse step, or of each stage where a solver has several (Heun).

    Args:
        denoiser: network and schedule; its covariance is used by kernels that ask for one.
        solver: any `Solver`.
        grid: decreasing times (K + 1,), see `lowvar.process.grid`.
        x: states at the first time, (B, *event_shape).
        noise: source of the steps' noise (default `Independent(0)`).
        index: sample numbers of the batch (default 0 .. B - 1).

    Yields:
        (state, info), one an evaluation: K of them, or `solver.nfe(K)`.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, PixelBasis, ReverseKernel
        >>> from lowvar.process.grid import trailing
        >>> schedule = CosineVP()
        >>> twin = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.ones(2))
        >>> steps = trajectory(twin.denoiser(schedule), ReverseKernel(), trailing(schedule, 4), torch.zeros(3, 2))
        >>> len(list(steps))
        4
    """
    noise = Independent(0) if noise is None else noise
    index = torch.arange(x.shape[0]) if index is None else torch.as_tensor(index)
    levels = denoiser.schedule.at(grid)
    plan, evaluations = solver.prepare(levels), solver.evaluations(levels)
    state = solver.start(x)
    for k in range(len(evaluations)):
        posterior = denoiser(state.x, evaluations[k])
        z = None
        if solver.stochastic and (k + 1 < len(evaluations) or float(levels.sigma[-1]) > 0):
            z = noise.normal(index, x.shape[1:], draw=k + 1, dtype=x.dtype, device=x.device)
        state, info = solver.step(plan, k, state, posterior, z)
        yield state, info


@torch.no_grad()
def generate(
    denoiser: Denoiser,
    solver: Solver,
    grid: Tensor,
    shape: Sequence[int],
    n: int,
    noise: NoiseSource | None = None,
    *,
    first: int = 0,
    batch_size: int = 256,
    clip: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """n samples, (n, *shape), numbers first .. first + n - 1.

    Args:
        denoiser, solver, grid: as in `trajectory`.
        shape: event shape.
        n: number of samples.
        noise: source (default `Independent(0)`).
        first: number of the first sample.
        batch_size: samples a batch; it does not change their noise.
        clip: final clip to [-clip, clip], or None.
        dtype, device: of the states.
        progress: called with the number of samples after each network evaluation.

    Returns:
        Samples on the CPU.
    """
    noise = Independent(0) if noise is None else noise
    prior, start = denoiser.schedule.at(1.0), denoiser.schedule.at(grid[0])
    parts = []
    for low in range(first, first + n, batch_size):
        index = torch.arange(low, min(low + batch_size, first + n))
        z = noise.normal(index, shape, draw=0, dtype=dtype, device=device)
        x = solver.initial(z, prior, start)
        for state, _ in trajectory(denoiser, solver, grid, x, noise, index):
            x = state.x
            if progress is not None:
                progress(len(index))
        parts.append((x if clip is None else x.clamp(-clip, clip)).cpu())
    return torch.cat(parts)
