r"""Antithetic draws of one site: any estimator on its noise and on the mirrored noise (-z, 1 - u), averaged.

Var = Var_1 (1 + rho) / 2, rho the correlation of both: below 1/2 where the estimator is monotone in the noise, above it
where it is even. Both halves are branches of one site, so it goes with every other site's estimator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from lowvar.gradients.estimator import BaseNoise, Branch, Estimator, GradientLabel, SiteDraw, SiteRecord, SiteState

__all__ = ["Antithetic"]


@dataclass(frozen=True)
class Antithetic(Estimator):
    """An estimator and its mirror image.

    Args:
        inner: the estimator.

    Example:
        >>> from torch.distributions import Normal
        >>> from lowvar.gradients import Pathwise
        >>> draw = Antithetic(Pathwise()).draw(Normal(torch.tensor(1.0), 2.0), {"z": torch.tensor(0.5)}, {})
        >>> draw.values.tolist()
        [2.0, 0.0]
    """

    source: ClassVar[str] = "Hammersley & Morton 1956"

    inner: Estimator

    @property
    def label(self) -> GradientLabel:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The inner one's."""
        return self.inner.label

    @property
    def orders(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The inner one's."""
        return self.inner.orders

    @property
    def smooth(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The inner one's."""
        return self.inner.smooth

    @property
    def apart(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The inner one's: its mirror image is a sum of the same kind."""
        return self.inner.apart

    @property
    def broadcasts(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the inner one does."""
        return self.inner.broadcasts

    def noise(self, d: Distribution) -> dict[str, BaseNoise]:
        """The inner one's."""
        return self.inner.noise(d)

    def breaks(self, d: Distribution) -> dict[str, Tensor]:
        """The inner one's and their mirror images."""
        return {name: torch.cat([x, 1 - x], -1) for name, x in self.inner.breaks(d).items()}

    def branches(self, d: Distribution) -> tuple[Branch, ...]:
        """Twice the inner one's."""
        return self.inner.branches(d) * 2

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        """Both draws, one after the other."""
        kinds = self.inner.noise(d)
        mirror = {name: kinds[name].mirrored(x) for name, x in noise.items()}
        halves = [self.inner.draw(d, e, state) for e in (noise, mirror)]
        record = {f"{i}.{k}": v for i, half in enumerate(halves) for k, v in half.record.items()}
        return SiteDraw(torch.cat([half.values for half in halves]), record)

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        """The mean of both."""
        halves = [self.inner.surrogate(_record(record, i), _half(live, i), _half(costs, i), state) for i in (0, 1)]
        return (halves[0] + halves[1]) / 2

    def value(self, record: SiteRecord, costs: Tensor) -> Tensor:
        """The mean of both."""
        return (
            self.inner.value(_record(record, 0), _half(costs, 0))
            + self.inner.value(_record(record, 1), _half(costs, 1))
        ) / 2

    def start(self, d: Distribution) -> SiteState:
        """The inner one's."""
        return self.inner.start(d)

    def updated(self, state: SiteState, record: SiteRecord, costs: Tensor) -> SiteState:
        """The inner one's, on the first draw, then on the second."""
        for i in (0, 1):
            state = self.inner.updated(state, _record(record, i), _half(costs, i))
        return state

    def auxiliary(self, record: SiteRecord, costs: Tensor, state: SiteState) -> Tensor | None:
        """The inner one's, on the first draw."""
        return self.inner.auxiliary(_record(record, 0), _half(costs, 0), state)


def _record(record: SiteRecord, i: int) -> dict[str, Tensor]:
    mark = f"{i}."
    return {k[len(mark) :]: v for k, v in record.items() if k.startswith(mark)}


def _half(x: Tensor, i: int) -> Tensor:
    """The branches of one draw, (..., branches, G)."""
    return x[..., i * x.shape[-2] // 2 : (i + 1) * x.shape[-2] // 2, :]
