r"""The loss of the best linear denoiser: what is known of it exactly, for any set of images.

Let m and C = B diag(c) B^T (with 1/N) be the mean and covariance of the N images of a set, D_lin their linear
denoiser, and along direction k, for image i and noise eps,

    y_k = B_k^T (x_i - m),   z_k = B_k^T eps,   v_k = alpha^2 c_k + sigma^2,
    (D_lin - x_i)_k = b_k y_k + g_k z_k,   b_k = -sigma^2 / v_k,   g_k = sigma alpha c_k / v_k.

The squared error, weighted as the objective weights it (factor w / d, see `objectives`), falls into parts whose
expectations over the noise are known *for every single image*,

    image    sum_k (b_k y_k)^2             itself: a function of the image and of the time
    cross    sum_k 2 b_k g_k y_k z_k       0
    noise    sum_k g_k^2 z_k^2             sum_k g_k^2

and so is the image's energy, sum_k y_k^2. Over the set the first three parts have the
mean tr(C s^2 (C + s^2 I)^-1), s = sigma / alpha, *exactly, for any data*: m and C are the set's own. This holds in any
basis that is used with the set's own variances along its directions, diagonal or not. The expectation over the times
of a bin is a sum over its timesteps, or a Gauss-Legendre rule where times are continuous.

These are control variates for the loss of any network (`meter`, `linear_control`); they cost matrix products and no
evaluation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowvar.calibrate import fit_twin
from lowvar.process.denoiser import Prediction
from lowvar.process.schedule import Level, Schedule
from lowvar.process.twin import GaussianTwin
from lowvar.train.objectives import LikelihoodOnly, Simple, Weighting
from lowvar.train.timesteps import UniformTimes

__all__ = ["FEATURES", "LinearLoss", "bin_nodes"]

FEATURES = ("image", "cross", "noise", "energy")
_RULE = 48


@functools.lru_cache(maxsize=16)
def bin_nodes(times: UniformTimes, bins: int) -> tuple[Tensor, Tensor]:
    """Nodes u (bins, q) in [0, 1) and weights that average a function of the time over u in each bin.

    Exact on a table (every timestep that a bin meets, with its share); Gauss-Legendre with 48 nodes for continuous
    times.

    Example:
        >>> u, weight = bin_nodes(UniformTimes(steps=6), 4)
        >>> (6 * u[0]).long().tolist(), [round(w, 4) for w in weight[0].tolist()]
        ([0, 1], [0.6667, 0.3333])
    """
    if times.steps is None:
        import numpy as np

        node, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(_RULE))
        u = (torch.arange(bins)[:, None] + (node + 1) / 2) / bins
        return u, (weight / 2).expand(bins, -1)
    T = times.steps
    edge = torch.arange(bins + 1, dtype=torch.float64) / bins
    first = torch.floor(edge[:-1] * T + 1e-9)
    count = int((torch.ceil(edge[1:] * T - 1e-9) - first).max())
    step = first[:, None] + torch.arange(count)
    low = torch.maximum(step / T, edge[:-1, None])
    high = torch.minimum((step + 1) / T, edge[1:, None])
    weight = (high - low).clamp_min(0) * bins
    middle = torch.where(weight > 0, (low + high) / 2, ((edge[:-1] + edge[1:]) / 2)[:, None])
    return middle, weight


@dataclass(frozen=True, eq=False)
class LinearLoss:
    """The linear denoiser's loss on a set of images, in parts.

    Attributes:
        twin: Gaussian with the set's own mean and variances (1/N).
        prediction, weighting, sigma_data: of the loss; `LikelihoodOnly`, which is 0, is read as `Simple`.

    Example:
        >>> from lowvar.process import CosineVP
        >>> linear = LinearLoss.of([torch.tensor([[0.0, 1.0], [2.0, 1.0]])], "sample")
        >>> round(linear.mean(CosineVP().at(1.0)).item(), 6)  # nothing is known of the image: half of tr C = 1
        0.5
    """

    twin: GaussianTwin
    prediction: Prediction = "epsilon"
    weighting: Weighting = field(default_factory=Simple)
    sigma_data: float = 0.5

    @classmethod
    def of(
        cls,
        batches: Iterable[Tensor],
        prediction: Prediction = "epsilon",
        weighting: Weighting | None = None,
        sigma_data: float = 0.5,
    ) -> LinearLoss:
        """For the images in `batches` of (b, *event_shape)."""
        weighting = Simple() if weighting is None or isinstance(weighting, LikelihoodOnly) else weighting
        return cls(fit_twin(batches), prediction, weighting, sigma_data)

    def coefficients(self, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """(w / d, b, g) at levels (n,): (n, 1), (n, d), (n, d), float64."""
        c = self.twin.spectrum.double().flatten()
        alpha, sigma = level.alpha.cpu()[:, None], level.sigma.cpu()[:, None]
        v = (alpha**2 * c + sigma**2).clamp_min(1e-300)
        log_w = self.weighting.log_weight(level.logsnr.cpu().clamp(-60, 60), self.prediction, self.sigma_data)
        return log_w.exp()[:, None] / len(c), -(sigma**2) / v, sigma * alpha * c / v

    def _centred(self, x0: Tensor) -> Tensor:
        x = x0.double().cpu() - self.twin.mean.double()
        return self.twin.basis.forward(x).flatten(1)

    def features(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """The parts (n, 4), float64 on the CPU, for images and noise (n, *event_shape) at levels (n,)."""
        w, b, g = self.coefficients(level)
        y, z = self._centred(x0), self.twin.basis.forward(eps.double().cpu()).flatten(1)
        bias, noise = b * y, g * z
        parts = [(bias**2).sum(1), 2 * (bias * noise).sum(1), (noise**2).sum(1), (y**2).sum(1)]
        return w * torch.stack(parts, 1)

    def given_image(self, x0: Tensor, schedule: Schedule, times: UniformTimes, bins: int) -> Tensor:
        """Expectations of `features` over noise and the times of each bin, for every image: (n, bins, 4), float64."""
        u, weight = bin_nodes(times, bins)
        w, b, g = self.coefficients(schedule.at(times.at(u.flatten()).t))
        scale = weight.flatten()[:, None] * w
        energy = self._centred(x0) ** 2

        def binned(values: Tensor) -> Tensor:
            return values.reshape(bins, -1, values.shape[1]).sum(1)

        w_bin = binned(scale)[:, 0]
        image = energy @ binned(scale * b**2).T
        noise = binned((scale * g**2).sum(1, keepdim=True))[:, 0].expand_as(image)
        y2 = energy.sum(1)[:, None] * w_bin
        return torch.stack([image, torch.zeros_like(image), noise, y2], 2)

    def loss(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """w ||D_lin(x_t) - x_0||^2 / d, (n,) float64 on the CPU: the sum of the first three parts."""
        return self.features(x0, eps, level)[:, :3].sum(1)

    def mean(self, level: Level) -> Tensor:
        """E of the loss over noise and the set, (n,) or scalar, float64: w / d tr(C s^2 (C + s^2 I)^-1), exact."""
        level = level.to("cpu")
        log_w = self.weighting.log_weight(level.logsnr.clamp(-60, 60), self.prediction, self.sigma_data)
        return log_w.exp() * self.twin.mmse(level)

    def over_noise(self, x0: Tensor, level: Level) -> Tensor:
        """E of the loss over the noise for every image at one level, (n,), float64."""
        w, b, g = self.coefficients(Level(*(v.reshape(1) for v in (level.t, level.logsnr, level.alpha, level.sigma))))
        return w[0, 0] * (self._centred(x0) ** 2 @ (b[0] ** 2) + (g[0] ** 2).sum())

    def spread(self, x0: Tensor, schedule: Schedule, times: UniformTimes, bins: int, nodes: int = 4) -> Tensor:
        """Standard deviation of the linear loss over images and noise at a time, root mean square by bin: (bins,)."""
        u = (torch.arange(bins)[:, None] + (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes) / bins
        w, b, g = self.coefficients(schedule.at(times.at(u.flatten()).t))
        energy = self._centred(x0) ** 2
        among_images = (energy @ (w * b**2).T).var(0, unbiased=False)
        within = (w[:, 0] ** 2) * (4 * (b * g) ** 2 @ energy.mean(0) + 2 * (g**4).sum(1))
        return (among_images + within).reshape(bins, nodes).mean(1).sqrt()
