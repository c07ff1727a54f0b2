r"""A small network on the frozen network's output, and what it multiplies.

An estimator with a head has C in coordinates of an orthonormal basis B (pixels, DCT, principal components), relative
to a calibrated table v(logsnr):

    features   (B^T(x - alpha m)) / sqrt(alpha^2 c + sigma^2),   B^T(x0_hat - m) / sqrt(c),   eps_hat,   logsnr
    head       h(features), zero at initialisation
    C          a function of the table and h that is the table's own covariance at h = 0

with m, c the data's mean and variances along B. All of it is known to a diffusers scheduler within `step`: no
activation of the network is read, so a head costs no network evaluation and any network can have one.

`trust` multiplies h, as a function of logsnr: 0 where the head was not better than its table on images it has not
seen, so that a head is never used where it loses.

Everything is float32 or wider, autocast switched off: heads of differences of large numbers (SN) have no digits to
lose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowvar.process.basis import Basis, PixelBasis
from lowvar.process.denoiser import expand
from lowvar.process.noise import NoiseSource
from lowvar.process.schedule import Level
from lowvar.process.twin import GaussianTwin

__all__ = ["VarianceHead", "spectrum_along"]

_FREQUENCIES = 8
_FACTOR_START = 0.1
_RELATIVE_FLOOR = 1e-3


def spectrum_along(twin: GaussianTwin, basis: Basis) -> Tensor:
    """Variances of the twin along the directions of another basis, (*event_shape) float64; O(d^2)."""
    if twin.basis.same_as(basis):
        return twin.spectrum.double()
    if isinstance(basis, PixelBasis):
        return twin.basis.squared_mix(twin.spectrum.double()[None])[0]
    d = twin.spectrum.numel()
    scaled = torch.diag(twin.spectrum.double().flatten().sqrt()).reshape(d, *twin.spectrum.shape)
    return (basis.forward(twin.basis.inverse(scaled)) ** 2).sum(0)


def _layer(
    kind: type[nn.Linear] | type[nn.Conv2d], *sizes: int, noise: NoiseSource, number: int, gain: float
) -> nn.Module:
    """A layer with weights N(0, gain / fan_in) and biases 0; all numbers are from the noise source."""
    options = {"padding": 1} if kind is nn.Conv2d else {}
    made = nn.utils.skip_init(kind, *sizes, **options)  # type: ignore[arg-type]
    weight: Tensor = made.weight  # type: ignore[assignment]
    with torch.no_grad():
        z = noise.normal([number], tuple(weight.shape))[0]
        weight.copy_(z * math.sqrt(gain / weight[0].numel()))
        made.bias.zero_()  # type: ignore[union-attr]
    return made


class VarianceHead(nn.Module):
    """(B, outputs, *event_shape) from a state, the denoiser's mean and the level.

    Convolutions where the coordinates are pixels, dense layers on the coefficients otherwise; an offset an entry.

    Args:
        basis: coordinates of inputs and outputs.
        mean: of the data, (*event_shape).
        spectrum: variances of the data along the basis, (*event_shape).
        outputs: numbers an entry; the first is h, the others (factors of a low rank) begin as small random numbers.
        width: of the hidden layers.
        noise: of the initial weights.
        low, high: range of logsnr that the head is trained on; it is held at the ends outside.

    Example:
        >>> from lowvar.process import CosineVP, Independent
        >>> head = VarianceHead(PixelBasis((3,)), torch.zeros(3), torch.ones(3), 1, 16, Independent(0), -5.0, 5.0)
        >>> head(torch.ones(2, 3), CosineVP().at(0.5), torch.zeros(2, 3)).tolist()
        [[[0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]]
    """

    def __init__(
        self,
        basis: Basis,
        mean: Tensor,
        spectrum: Tensor,
        outputs: int,
        width: int,
        noise: NoiseSource,
        low: float,
        high: float,
    ) -> None:
        super().__init__()
        self.basis, self.outputs, self.width, self.low, self.high = basis, outputs, width, low, high
        shape = tuple(basis.event_shape)
        spectrum = torch.maximum(spectrum, _RELATIVE_FLOOR * spectrum.mean()).clamp_min(1e-12)
        self.register_buffer("mean", mean.float())
        self.register_buffer("spectrum", spectrum.float())
        self.convolves = isinstance(basis, PixelBasis) and len(shape) == 3
        numbers = shape[0] if self.convolves else math.prod(shape)

        def layer(*sizes: int, number: int, gain: float = 2.0) -> nn.Module:
            kind = nn.Conv2d if self.convolves else nn.Linear
            return _layer(kind, *sizes, *([3] if self.convolves else []), noise=noise, number=number, gain=gain)

        self.first = layer(3 * numbers, width, number=0)
        self.middle = layer(width, width, number=1)
        self.last = layer(width, outputs * numbers, number=2, gain=0.0)
        self.time = _layer(nn.Linear, 2 * _FREQUENCIES + 1, 4 * width, noise=noise, number=3, gain=0.2)
        offset = _FACTOR_START * noise.normal([4], (outputs, *shape))[0]
        offset[0] = 0
        self.offset = nn.Parameter(offset)

    def _features(self, x: Tensor, level: Level, mean: Tensor) -> Tensor:
        alpha, sigma = expand(level.alpha, x), expand(level.sigma, x).clamp_min(1e-12)
        spectrum, centre = self.spectrum, self.mean
        assert isinstance(spectrum, Tensor)
        assert isinstance(centre, Tensor)
        state = self.basis.forward(x - alpha * centre) / (alpha**2 * spectrum + sigma**2).sqrt()
        clean = self.basis.forward(mean - centre) / spectrum.sqrt()
        eps = self.basis.forward(x - alpha * mean) / sigma
        return torch.cat([p if self.convolves else p.flatten(1) for p in (state, clean, eps)], 1).clamp(-10, 10)

    def _times(self, level: Level, x: Tensor) -> Sequence[Tensor]:
        """Two scales and two shifts of the hidden layers, shaped to multiply them."""
        logsnr = level.logsnr.clamp(self.low, self.high).to(x).reshape(-1, 1)
        place = 2 * (logsnr - self.low) / max(self.high - self.low, 1e-6) - 1  # -1 .. 1
        angle = place * torch.pi / 2 * torch.arange(1, _FREQUENCIES + 1, device=x.device)
        shifts: Tensor = self.time(torch.cat([place, angle.sin(), angle.cos()], 1))
        shifts = shifts.reshape(*shifts.shape, *([1, 1] if self.convolves else []))
        return shifts.chunk(4, 1)

    def forward(self, x: Tensor, level: Level, mean: Tensor) -> Tensor:
        """See the class.

        Args:
            x: states x_t, (B, *event_shape).
            level: scalar or (B,).
            mean: x0_hat, (B, *event_shape).
        """
        with torch.autocast(x.device.type, enabled=False):
            state, mean = x.float(), mean.float()
            a, b, c, d = self._times(level, state)
            hidden = F.silu(self.first(self._features(state, level, mean)) * (1 + a) + b)
            if self.convolves:
                hidden = hidden + hidden.mean((2, 3), keepdim=True)  # what the whole image says
            hidden = hidden + F.silu(self.middle(hidden) * (1 + c) + d)
            out: Tensor = self.last(hidden)
            return out.reshape(x.shape[0], self.outputs, *x.shape[1:]) + self.offset
