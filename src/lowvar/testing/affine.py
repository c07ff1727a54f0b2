r"""A denoiser that is affine in the state, with parameters: the policy whose gradients are known exactly.

    x0_hat(x_k) = g_k x_k + h_k,     theta = (g_0, h_0, g_1, h_1, ..), one pair a level of the grid (or one for all),

so that a reverse step is N((a_k + kappa_k g_k) x_k + kappa_k h_k, s_k^2): a `LinearPolicy`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowvar.process.denoiser import Denoiser
from lowvar.process.kernel import step_coefficients
from lowvar.process.noise import NoiseSource
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level, Schedule
from lowvar.testing.quadrature import hermite
from lowvar.testing.tuning import LinearPolicy

__all__ = ["AffineDenoiser", "HermiteNoise", "exact_affine", "linear_policy"]


class AffineDenoiser(Denoiser):
    """x0_hat = g x + h with a pair (g, h) for each level of a grid, or one for all.

    Args:
        theta: (K, 2), or (2,) for all levels.
        schedule: the schedule.
        grid: the grid (K + 1,) whose levels it knows.

    Raises:
        ValueError: if shapes do not fit, or it is asked at another level.
    """

    def __init__(self, theta: Tensor, schedule: Schedule, grid: Tensor) -> None:
        if theta.shape not in ((2,), (len(grid) - 1, 2)):
            raise ValueError(f"theta has shape {tuple(theta.shape)}; give (2,) or ({len(grid) - 1}, 2)")
        self.theta, self.schedule, self.grid = theta, schedule, grid

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        """See the base class."""
        k = (self.grid[:-1] - level.t).abs().argmin()
        if float((self.grid[k] - level.t).abs()) > 1e-9:
            raise ValueError(f"level t = {float(level.t)} is none of the grid's")
        g, h = self.theta if self.theta.ndim == 1 else self.theta[k]
        return Posterior(g * x + h)


def exact_affine(schedule: Schedule, grid: Tensor, mean: float, var: float) -> Tensor:
    """The pairs (g, h) of the exact posterior mean of data N(mean, var), (K, 2) float64."""
    level = schedule.at(grid[:-1])
    g = level.alpha * var / (level.alpha**2 * var + level.sigma**2)
    return torch.stack([g, mean - g * level.alpha * mean], 1)


def linear_policy(
    denoiser: AffineDenoiser, reward: Sequence[float], *, eta: float = 1.0, floor: float = 0.0
) -> LinearPolicy:
    """What `ReverseKernel(eta, variance="small")` does with an affine denoiser, as numbers.

    Args:
        denoiser: in one dimension.
        reward: coefficients of the reward, lowest first.
        eta: stochasticity.
        floor: standard deviation of the last step where it goes to clean data.

    Example:
        >>> from lowvar.process import CosineVP
        >>> schedule, grid = CosineVP(), torch.linspace(1, 0, 4, dtype=torch.float64)
        >>> denoiser = AffineDenoiser(exact_affine(schedule, grid, 0.5, 0.25), schedule, grid)
        >>> chain = linear_policy(denoiser, [0.0, 1.0], floor=0.05)
        >>> chain.steps, chain.size, round(chain.mean_reward(), 3)
        (3, 6, 0.5)
    """
    levels, theta = denoiser.schedule.at(denoiser.grid), denoiser.theta.detach()
    K, tied = len(denoiser.grid) - 1, theta.ndim == 1
    P = 2 if tied else 2 * K
    rows = [step_coefficients(levels[k], levels[k + 1], eta) for k in range(K)]
    a, b, s, p, q = [], [], [], [], []
    for k, c in enumerate(rows):
        g, h = (float(v) for v in (theta if tied else theta[k]))
        kappa = float(c.kappa)
        a.append(float(c.a) + kappa * g)
        b.append(kappa * h)
        clean = float(levels.sigma[k + 1]) == 0
        s.append((float(c.lambda2) + (floor**2 if clean else 0.0)) ** 0.5)
        own = 0 if tied else 2 * k
        p.append([kappa if j == own else 0.0 for j in range(P)])
        q.append([kappa if j == own + 1 else 0.0 for j in range(P)])
    start = levels[0]
    std = float(torch.sqrt(start.alpha**2 + start.sigma**2)) if float(start.alpha) > 0 else float(start.sigma)
    return LinearPolicy(a, b, s, p, q, reward, 0.0, std)


class HermiteNoise(NoiseSource):
    """Quadrature nodes as noise: sample i is the i-th point of a product rule, so weighted sums are expectations.

    Args:
        draws: numbers a sample: draw k of shape (1,) is the k-th.
        nodes: of each; polynomials of degree 2 nodes - 1 in each number are integrated exactly.
        coins: uniform numbers by draw, the same for all samples.

    Attributes:
        weights: (nodes^draws,) float64.

    Example:
        >>> noise = HermiteNoise(2, 3)
        >>> z = noise.normal(range(9), (1,), draw=1, dtype=torch.float64)
        >>> round(float((noise.weights * z[:, 0] ** 4).sum()), 9)
        3.0
    """

    def __init__(self, draws: int, nodes: int, coins: Sequence[float] = ()) -> None:
        z, w = hermite(nodes)
        self.points = torch.cartesian_prod(*[z] * draws).reshape(-1, draws)
        self.weights = torch.cartesian_prod(*[w] * draws).reshape(-1, draws).prod(1)
        self.coins = coins

    def normal(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Coordinate `draw` of the points `index`."""
        return self.points[torch.as_tensor(index), draw].to(device, dtype).reshape(-1, *shape)

    def uniform(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The coin of this draw."""
        return torch.full((len(index), *shape), self.coins[draw], dtype=dtype, device=device)
