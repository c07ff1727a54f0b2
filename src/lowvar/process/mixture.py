r"""The mixture twin: several Gaussians in one orthonormal basis, whose denoiser is in closed form.

    x_0 ~ sum_k w_k N(m_k, B diag(c_k) B^T).

With v_k = alpha^2 c_k + sigma^2 and y = B^T x_t, mu_k = B^T m_k, everything along directions i,

    p_k   propto  w_k prod_i v_ki^-1/2 exp(-(y_i - alpha mu_ki)^2 / 2 v_ki)                 (responsibilities)
    D_mix = B sum_k p_k [mu_k + (alpha c_k / v_k) (y - alpha mu_k)].

It costs O(K d) a sample and no network evaluation. A single Gaussian is the best linear denoiser; a mixture is a
better control variate where the data have several modes or scales, because what it leaves over is smaller
(`lowvar.calibrate.fit_mixture` chooses K by held-out denoising error). It has no flow map in closed form, so
`lowvar.process.flow` integrates it in small steps, which cost no evaluation either.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowvar.process.basis import Basis
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level
from lowvar.process.twin import GaussianTwin

__all__ = ["MixtureTwin"]


@dataclass(frozen=True, eq=False)
class MixtureTwin:
    """A Gaussian mixture, diagonal in an orthonormal basis.

    Attributes:
        weight: w, (K,), positive; scaled to sum 1.
        mean: mu_k = B^T m_k, coefficients of the components' means, (K, *event_shape).
        spectrum: c_k, their variances along the directions, (K, *event_shape), >= 0.
        basis: B.

    Raises:
        ValueError: if shapes differ, a weight is not positive or a variance is negative.

    Example:
        >>> from lowvar.process.basis import PixelBasis
        >>> from lowvar.process.schedule import CosineVP
        >>> twin = MixtureTwin(torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.zeros(2, 1), PixelBasis((1,)))
        >>> level = CosineVP().at(0.5)
        >>> x = torch.tensor([[0.3]])
        >>> snr_x = level.alpha / level.sigma**2 * 0.3
        >>> bool(torch.isclose(twin.posterior(x, level).mean, torch.tanh(snr_x).float()))
        True
    """

    weight: Tensor
    mean: Tensor
    spectrum: Tensor
    basis: Basis

    def __post_init__(self) -> None:
        """Checks shapes and signs."""
        if self.mean.shape != self.spectrum.shape or self.mean.shape[1:] != self.basis.event_shape:
            raise ValueError(
                f"means {tuple(self.mean.shape)}, spectra {tuple(self.spectrum.shape)} and basis "
                f"{tuple(self.basis.event_shape)} do not fit; means and spectra are (K, *event_shape)"
            )
        if self.weight.shape != self.mean.shape[:1] or not bool((self.weight > 0).all()):
            raise ValueError(f"the {len(self.mean)} components need one positive weight each")
        if bool((self.spectrum < 0).any()):
            raise ValueError("the spectra hold negative variances")
        object.__setattr__(self, "weight", self.weight.double() / self.weight.double().sum())
        object.__setattr__(self, "_cache", {})

    @classmethod
    def of(cls, twin: GaussianTwin) -> MixtureTwin:
        """A Gaussian as the mixture of one component."""
        mean = twin.basis.forward(twin.mean.double()[None])
        return cls(torch.ones(1), mean, twin.spectrum.double()[None], twin.basis)

    @property
    def components(self) -> int:
        """K."""
        return len(self.weight)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of an event."""
        return self.mean.shape[1:]

    @cached_property
    def centre(self) -> Tensor:
        """B^T E x_0, (*event_shape) float64."""
        return torch.tensordot(self.weight, self.mean.double(), dims=1)

    @cached_property
    def within(self) -> Tensor:
        """Mean variance inside components along the directions, (*event_shape) float64."""
        return torch.tensordot(self.weight, self.spectrum.double(), dims=1)

    @cached_property
    def gaussian(self) -> GaussianTwin:
        """The Gaussian in this basis with the mixture's mean and variances along its directions."""
        between = torch.tensordot(self.weight, (self.mean.double() - self.centre) ** 2, dims=1)
        return GaussianTwin(self.basis.inverse(self.centre[None])[0], self.basis, self.within + between)

    def denoise(self, y: Tensor, level: Level) -> Tensor:
        """B^T D_mix for coefficients y = B^T x_t (B, *event_shape) at one level; dtype and device of y."""
        inverse, shift, constant, gain, offset = self._terms(y, level)
        flat = y.flatten(1)
        if self.components == 1:
            return (offset[0] + gain[0] * flat).reshape(y.shape)
        wide = flat.double()  # at high snr the terms of the exponent are large and cancel
        log_p = constant + wide @ shift.T - (wide**2) @ inverse.T
        p = torch.softmax(log_p, 1).to(y)
        return (p @ offset + flat * (p @ gain)).reshape(y.shape)

    def _terms(self, y: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Per level: 1 / 2v, alpha mu / v, the exponent's constant (float64); gain and offset of each component."""
        key = (float(level.logsnr), float(level.sigma), y.device, y.dtype)
        cache: dict[object, tuple[Tensor, ...]] = self._cache  # type: ignore[attr-defined]
        if key not in cache:
            if len(cache) >= 256:
                cache.clear()
            c, mu = self.spectrum.double().flatten(1).cpu(), self.mean.double().flatten(1).cpu()
            alpha, sigma = float(level.alpha), float(level.sigma)
            v = (alpha**2 * c + sigma**2).clamp_min(1e-300)
            shift = alpha * mu / v
            constant = torch.log(self.weight.cpu()) - 0.5 * (torch.log(v) + alpha * mu * shift).sum(1)
            gain = alpha * c / v
            offset = mu - alpha * gain * mu
            wide = [t.to(y.device) for t in (0.5 / v, shift, constant)]
            cache[key] = (*wide, gain.to(y), offset.to(y))
        return cache[key]  # type: ignore[return-value]

    def posterior(self, x: Tensor, level: Level) -> Posterior:
        """The posterior mean at states x (B, *event_shape) and one level."""
        return Posterior(self.basis.inverse(self.denoise(self.basis.forward(x), level)))

    def sample(self, u: Tensor, z: Tensor) -> Tensor:
        """Samples from uniforms u (B,) in [0, 1), which choose the component, and standard normals z."""
        k = torch.searchsorted(self.weight.cumsum(0).to(u), u.contiguous(), right=True).clamp(max=self.components - 1)
        k = k.to(self.mean.device)
        return self.basis.inverse(self.mean[k].to(z) + self.spectrum[k].sqrt().to(z) * self.basis.forward(z))
