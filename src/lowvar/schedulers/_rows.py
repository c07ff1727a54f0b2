"""Steps of a batch whose samples stand at different timesteps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.process.noise import NoiseSource, TorchGenerators
from lowvar.schedulers._chain import Chain, Recipe
from lowvar.schedulers._reader import Reader
from lowvar.schedulers._steps import Steps

__all__ = ["Rows"]


class Rows:
    """Chains by group of samples: samples at one timestep step together, and remember together.

    A group that changes begins a new chain. Timesteps are read on the host: one transfer a step where they lie on an
    accelerator.

    Args:
        steps: the grid's timesteps.
        recipe: the solver on the grid.
        reader: of the network's outputs.
    """

    def __init__(self, steps: Steps, recipe: Recipe, reader: Reader) -> None:
        self._steps, self._recipe, self._reader = steps, recipe, reader
        self._chains: dict[tuple[int, ...], Chain] = {}

    def step(
        self,
        output: Tensor,
        timesteps: Tensor,
        x: Tensor,
        source: NoiseSource,
        index: Sequence[int] | Tensor | None,
        kept: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The states after the step, and x0_hat (the state itself where a sample is finished).

        Raises:
            UserError: if there is not one timestep a sample, or one is not of the grid.
        """
        if timesteps.shape != x.shape[:1]:
            raise UserError(f"there are {timesteps.numel()} timesteps for {x.shape[0]} samples: give one, or one each")
        numbers = list(range(x.shape[0])) if index is None else torch.as_tensor(index).tolist()
        groups = self._groups(timesteps.tolist())
        z_all: Tensor | None = None
        if isinstance(source, TorchGenerators) and any(self._recipe.draws(k) for k, _ in groups):
            z_all = source.normal(range(x.shape[0]), x.shape[1:], dtype=output.dtype, device=x.device).to(x.dtype)
        previous, original = x.clone(), x.clone()
        chains: dict[tuple[int, ...], Chain] = {}
        for k, rows in groups:
            chain = chains[rows] = self._chains.get(rows) or Chain(self._recipe)
            at = torch.tensor(rows, device=x.device)
            own, part = x[at], None if kept is None or kept.shape[0] != x.shape[0] else kept[at]
            posterior = self._reader.read(own, k, output[at], part)
            z = None
            if z_all is not None and self._recipe.draws(k):
                z = z_all[at]
            elif self._recipe.draws(k):
                which = [numbers[i] for i in rows]
                z = source.normal(which, x.shape[1:], draw=k + 1, dtype=output.dtype, device=x.device).to(x.dtype)
            previous[at] = chain.step(k, own, posterior, z, any_root=z_all is not None)
            original[at] = posterior.mean
        self._chains = chains
        return previous, original

    def _groups(self, timesteps: list[float]) -> list[tuple[int, tuple[int, ...]]]:
        """(number of the evaluation, its samples), the noisiest first; finished samples are in none."""
        expected = {i: chain.next for rows, chain in self._chains.items() for i in rows}
        found: dict[int, list[int]] = {}
        for i, timestep in enumerate(timesteps):
            if timestep == -1:
                continue
            found.setdefault(self._steps.index(timestep, expected.get(i, 0)), []).append(i)
        return [(k, tuple(found[k])) for k in sorted(found)]
