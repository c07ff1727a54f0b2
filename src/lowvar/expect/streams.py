r"""Streams: sequences of independent units that an estimate is made of.

Every design is one or several streams: pairs of samples with the twin's values beside them, differences of coupled
chains, samples of one class, the twin alone. A stream has a range of sample numbers of its own, so streams are
independent of each other; unit u of a stream is the same whoever asks for it. That makes runs on several processes
(unit u belongs to process u mod world) and resumed runs give the same sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.expect.features import noise_features, shadow_features
from lowvar.expect.integrand import Integrand
from lowvar.expect.sampler import Sampler
from lowvar.expect.sobol import Bridge, SobolUnits
from lowvar.expect.sums import Sums
from lowvar.expect.units import Shifted, UnitNoise
from lowvar.process.basis import PixelBasis
from lowvar.process.noise import NoiseSource

__all__ = ["Evaluate", "Stream", "sample_stream", "shadow_stream", "surrogate_stream"]

SHARED = 64  # numbers a statistic may have for controls other than its own twin
REFERENCE_NET = 128

Evaluate = Callable[[Tensor, NoiseSource], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Stream:
    """Independent units of one kind.

    Attributes:
        key: its name.
        number: of its range of sample numbers; unique among the streams of an estimate.
        units: how the noise of a unit is chosen.
        nfe: network evaluations of a unit (their mean, where `cost` is given).
        columns: names of the controls.
        evaluate: (index, noise) -> f (n, D) and controls (n, Dc, q) of single samples.
        cost: (noise, numbers) -> evaluations of the units, where they differ.
    """

    key: str
    number: int
    units: UnitNoise
    nfe: float
    columns: tuple[str, ...]
    evaluate: Evaluate
    cost: Callable[[NoiseSource, Tensor], int] | None = None

    @property
    def size(self) -> int:
        """Samples a unit."""
        return self.units.size

    def values(self, base: NoiseSource, numbers: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor | None]:
        """f and controls of all samples of the units `numbers` (n,), unit by unit, `batch_size` samples at a time."""
        source = self.units.wrap(Shifted(base, self.number))
        index = (numbers[:, None] * self.size + torch.arange(self.size)).flatten()
        parts = [self.evaluate(i, source) for i in index.split(batch_size)]
        f = torch.cat([f for f, _ in parts])
        controls = [h for _, h in parts if h is not None]
        return f, torch.cat(controls) if controls else None

    def sums(self, base: NoiseSource, numbers: Tensor, batch_size: int = 256) -> Sums:
        """Sums over the units `numbers` (n,), n >= 1."""
        f, h = self.values(base, numbers, batch_size)
        return Sums.of(f, h, numbers, self.size)

    def spent(self, base: NoiseSource, numbers: Tensor) -> int:
        """Network evaluations of the units `numbers`."""
        if self.cost is None:
            return round(self.nfe * len(numbers))
        return self.cost(self.units.wrap(Shifted(base, self.number)), numbers)


def sample_stream(
    sampler: Sampler,
    statistic: Integrand,
    units: UnitNoise,
    number: int,
    *,
    key: str | None = None,
    controls: Sequence[str] = (),
) -> Stream:
    """Samples, with those of the wanted controls that there are: the twin's value, the mixture's, noise features.

    Args:
        sampler: the sampler.
        statistic: the statistic.
        units: noise of a unit.
        number: of the stream.
        key: its name; default the units' name.
        controls: of "twin", "mixture", "features".
    """
    shape, shadow = torch.Size(sampler.noise_shape or sampler.event_shape), sampler.shadow
    small = statistic.shape.numel() <= SHARED
    q = 0
    if small and "features" in controls:
        d = shape.numel() if shadow is None else int((shadow.std > 0).sum())
        q = 2 * min(4, d) + (d > 4)
    twin = shadow is not None and "twin" in controls
    mixture = sampler.surrogate if "mixture" in controls else None
    columns = (*(("twin",) if twin else ()), *(("mixture",) if mixture is not None else ()))
    columns += tuple(f"feature{j}" for j in range(q))

    def evaluate(index: Tensor, noise: NoiseSource) -> tuple[Tensor, Tensor | None]:
        x = _samples(sampler, index, noise)
        f = statistic(x)
        if not columns:
            return f, None
        parts = []
        c = shadow.coefficients(index, noise) if shadow is not None and (twin or q) else None
        if twin and shadow is not None:
            parts.append(statistic.control(shadow.at(c))[..., None])
        if mixture is not None:
            parts.append(statistic.control(mixture(index, noise))[..., None])
        if q and shadow is not None and c is not None:
            parts.append(shadow_features(shadow, c)[:, None].to(f.device))
        elif q:
            parts.append(noise_features(shape, index, noise).to(f.device)[:, None])
        wide = max(p.shape[1] for p in parts)
        return f, torch.cat([p.expand(-1, wide, -1) for p in parts], 2)

    return Stream(key or units.name, number, units, sampler.nfe * units.size, columns, evaluate)


def shadow_stream(sampler: Sampler, statistic: Integrand, number: int) -> Stream:
    """The twin alone, in scrambled nets over its own directions: E f(x~) for no network evaluation.

    Raises:
        ValueError: if the sampler has no shadow.
    """
    shadow = sampler.shadow
    if shadow is None:
        raise ValueError("the sampler has no shadow")
    shape = torch.Size(sampler.event_shape)
    order = torch.argsort(shadow.std.flatten(), descending=True, stable=True)[:256]
    bridge = Bridge(PixelBasis(shape), order.cpu(), torch.ones(len(order), 1, dtype=torch.float64))
    return Stream(
        "twin alone",
        number,
        SobolUnits(REFERENCE_NET, bridge),
        0,
        (),
        lambda index, noise: (statistic.control(shadow.alone(index, noise)), None),
    )


def surrogate_stream(sampler: Sampler, statistic: Integrand, number: int, bridge: Bridge) -> Stream:
    """The mixture's chain alone, in scrambled nets over the sampler's own noise.

    Raises:
        ValueError: if the sampler has no surrogate.
    """
    surrogate = sampler.surrogate
    if surrogate is None:
        raise ValueError("the sampler has no surrogate")
    return Stream(
        "mixture alone",
        number,
        SobolUnits(REFERENCE_NET, bridge),
        0,
        (),
        lambda index, noise: (statistic.control(surrogate(index, noise)), None),
    )


def _samples(sampler: Sampler, index: Tensor, noise: NoiseSource) -> Tensor:
    x = sampler(index, noise)
    if x.shape != (len(index), *sampler.event_shape):
        raise UserError(
            f"the sampler gave shape {tuple(x.shape)} for {len(index)} samples of shape {tuple(sampler.event_shape)}; "
            "its event_shape and what it returns must agree"
        )
    return x
