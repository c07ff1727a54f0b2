r"""Path statistics: how a control variate's remainder changes along the reverse process, and the grid that suits it.

Along direction i the remainder r_i enters a sample of the twin's flow (`lowvar.process.flow`) as

    x_0,i  =  (what the twin gives)  +  integral of w_i(l) r_i(l) dl,      w = sqrt(c) u v^-1/2,  v = 1 + c u^2,

and a step that froze it at level a, with the trend g = v^-1/2, makes over the levels b in [a, s) the error

    sum_b w_b (r_b - (g_b / g_a) r_a) dl.

Its mean square needs the second moments E r_i(a) r_i(b) along paths, which are measured on a few fine reverse
trajectories of the network itself: on n = 192 paths at L = 40 levels, n L evaluations, once. Then the expected error of
any step is a number, errors of different steps are treated as uncorrelated, and the best K levels follow by dynamic
programming (as Watson et al. 2021 do for the likelihood): an exact minimum over all grids on the L levels.

Directions are pooled in groups of similar variance, so the table has a fixed size whatever the dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lowvar.process.denoiser import Denoiser
from lowvar.process.flow import TwinFlow
from lowvar.process.mixture import MixtureTwin
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.planning import chains
from lowvar.process.schedule import Schedule
from lowvar.process.twin import GaussianTwin

__all__ = ["LEVELS", "PATHS", "PathTable", "path_table"]

LEVELS, PATHS = 40, 192

_GROUPS = 64


@dataclass(frozen=True, eq=False)
class PathTable:
    """Mean square errors of frozen steps.

    Attributes:
        logsnr: increasing levels, (L,) float64.
        cost: (L + 1, L + 1) float64, a dimension: cost[i, j] is the error of asking the network at level i - 1 and next
            at level j - 1; row 0 asks nothing before (the twin alone), column L + 1 is not kept: `last` is.
        last: (L + 1,), the error of asking nothing after level i - 1.

    Example:
        >>> inf = torch.inf
        >>> cost = torch.tensor([[inf, 0.1, 0.5], [inf, inf, 0.2], [inf, inf, inf]])
        >>> table = PathTable(torch.tensor([-1.0, 1.0]), cost, torch.tensor([2.0, 0.9, 0.1]))
        >>> [(round(error, 3), chosen) for error, chosen in table.chosen()]
        [(0.6, [1]), (0.4, [0, 1])]
    """

    logsnr: Tensor
    cost: Tensor
    last: Tensor

    def chosen(self) -> Iterator[tuple[float, list[int]]]:
        """For K = 1, 2, .. evaluations: the predicted mean square error a dimension and the levels to ask at."""
        for error, path in islice(chains(self.cost, self.last), 1, None):
            yield error, [i - 1 for i in path[1:]]

    def grid(self, schedule: Schedule, steps: int) -> Tensor:
        """Times of the best `steps` evaluations, then 0; (steps + 1,) float64.

        Raises:
            ValueError: if there are more steps than levels were measured.
        """
        if not 1 <= steps <= len(self.logsnr):
            raise ValueError(f"steps is {steps}; this table was measured for 1 to {len(self.logsnr)} evaluations")
        _, levels = next(islice(self.chosen(), steps - 1, None))
        times = schedule.time(self.logsnr[levels])
        return torch.cat([times, torch.zeros(1, dtype=torch.float64)])

    def to_json(self) -> dict[str, Any]:
        """Numbers as lists; what cannot follow (j <= i) as None."""
        cost = [[None if v == torch.inf else float(f"{v:.6g}") for v in row] for row in self.cost.tolist()]
        return {"logsnr": self.logsnr.tolist(), "cost": cost, "last": [float(f"{v:.6g}") for v in self.last.tolist()]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> PathTable:
        """The table that `to_json` wrote."""
        rows = [[torch.inf if v is None else v for v in row] for row in fields["cost"]]
        return cls(*(torch.tensor(v, dtype=torch.float64) for v in (fields["logsnr"], rows, fields["last"])))


def _knots(schedule: Schedule, twin: MixtureTwin, levels: int) -> Tensor:
    """Equally spaced logsnr, from where the largest direction is still 99% noise to the schedule's t_min."""
    largest = float(twin.gaussian.spectrum.max())
    low = max(float(torch.log(torch.tensor(0.01 / max(largest, 1e-6)))), float(schedule.logsnr(1.0)))
    return torch.linspace(low, float(schedule.logsnr(schedule.t_min)), levels, dtype=torch.float64)


@torch.no_grad()
def path_table(
    denoiser: Denoiser,
    twin: GaussianTwin | MixtureTwin,
    n: int = PATHS,
    levels: int = LEVELS,
    noise: NoiseSource | None = None,
    *,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> PathTable:
    """Measures a denoiser's remainder along n reverse paths; n x levels evaluations.

    Args:
        denoiser: the network, with the clipping it will be used with.
        twin: the control variate.
        n: paths.
        levels: L, from almost pure noise to the schedule's t_min.
        noise: source of the starts (default `Independent(1)`).
        batch_size, dtype, device: of the states.
        progress: called with the number of evaluations made.

    Raises:
        ValueError: if there are fewer than two levels or no paths.

    Example:
        >>> from lowvar.testing import mixture2
        >>> from lowvar.process import CosineVP
        >>> target, schedule = mixture2(), CosineVP()
        >>> table = path_table(target.denoiser(schedule, None), target.twin, n=16, levels=12, dtype=torch.float64)
        >>> table.grid(schedule, 3).shape
        torch.Size([4])
    """
    if levels < 2 or n < 1:
        raise ValueError(f"{n} paths at {levels} levels: at least 1 and 2")
    schedule, solver = denoiser.schedule, TwinFlow(twin)
    mixture = solver.mixture
    logsnr = _knots(schedule, mixture, levels)
    points = schedule.at(schedule.time(logsnr))
    prior, plan = schedule.at(1.0), solver.prepare(points)
    noise = Independent(1) if noise is None else noise
    order = mixture.within.flatten().argsort()
    groups = torch.empty_like(order)
    groups[order] = torch.arange(len(order)) * min(_GROUPS, len(order)) // len(order)
    G = int(groups.max()) + 1
    moments = torch.zeros(G, levels, levels, dtype=torch.float64)
    for index in torch.arange(n).split(batch_size):
        z = noise.normal(index, mixture.event_shape, dtype=dtype, device=device)
        state = solver.start(solver.initial(z, prior, points[0]))
        rows = []
        for k in range(levels):
            posterior = denoiser(state.x, points[k])
            if progress is not None:
                progress(len(index))
            if k + 1 < levels:
                state, _ = solver.step(plan, k, state, posterior, None)
                rows.append(state.memory)
            else:
                rows.append(solver.remainder(state.x, posterior, points[k]))
        r = torch.stack(rows).flatten(2).double().cpu()  # (L, b, d)
        for g in range(G):
            part = r[:, :, groups == g].flatten(1)
            moments[g] += part @ part.T / n
    size = torch.bincount(groups, minlength=G).double()
    c = torch.zeros(G, dtype=torch.float64).index_add_(0, groups, mixture.within.flatten().double().cpu()) / size
    return _costs(logsnr, moments, c, len(order))


def _costs(logsnr: Tensor, moments: Tensor, c: Tensor, d: int) -> PathTable:
    """The table from E r(a) r(b) summed over each group's directions, (G, L, L), and the groups' variances c, (G,)."""
    L = len(logsnr)
    snr = torch.exp(logsnr)
    v = 1 + c[:, None] * snr  # (G, L)
    width = torch.gradient(logsnr)[0] / 2
    w = torch.sqrt((v - 1) / v) * width
    g = v**-0.5
    cost = torch.full((L + 1, L + 1), torch.inf, dtype=torch.float64)
    last = torch.zeros(L + 1, dtype=torch.float64)
    weighted = moments * w[:, :, None] * w[:, None, :]
    for a in range(-1, L):
        known = max(a, 0)
        for s in range(a + 1, L + 1):
            span = slice(known, s)
            error = weighted[:, span, span].sum((1, 2))
            if a >= 0:
                gain = (w[:, span] * g[:, span]).sum(1) / g[:, a]
                error = error - 2 * gain * (w[:, span] * moments[:, span, a]).sum(1) + gain**2 * moments[:, a, a]
            total = error.sum().clamp_min(0) / d
            if s == L:
                last[a + 1] = total
            else:
                cost[a + 1, s + 1] = total
    return PathTable(logsnr, cost, last)
