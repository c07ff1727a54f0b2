r"""Fitting the mixture twin: EM in the Gaussian twin's basis, and the number of components by held-out denoising error.

Coordinates are whitened, w = (B^T x - mean) / sqrt(c), so that a diagonal mixture is fitted to directions of one size
and its variances are relative to the data's own; scikit-learn's `GaussianMixture` does the EM. Each component's
variances are then shrunk towards their mean over components, as if `SHRINK` observations said the mean (a component of
30 images knows 30 squares a direction), which also keeps any component from collapsing on single images.

K is chosen by what the mixture is for: the smallest error E ||x_0 - D_mix(x_t)||^2 on images it was not fitted to,
each level relative to the Gaussian twin's, averaged over levels. For a network with the exact posterior mean that
error is its mmse plus E ||r||^2, so the best K leaves the smallest remainder. No network is asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lowvar.process.mixture import MixtureTwin
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.schedule import Level
from lowvar.process.twin import GaussianTwin

__all__ = ["COMPONENTS", "denoising_ratio", "fit_mixture"]

COMPONENTS = (4, 10, 30, 60)
SHRINK = 10.0
FLOOR = 1e-2  # of a direction's own variance
LIMIT = 8192  # images EM looks at
_LEVELS = torch.linspace(-6.0, 6.0, 9, dtype=torch.float64)


def _levels() -> Level:
    alpha, sigma = torch.sigmoid(_LEVELS).sqrt(), torch.sigmoid(-_LEVELS).sqrt()
    return Level(torch.full_like(_LEVELS, torch.nan), _LEVELS, alpha, sigma)


@torch.no_grad()
def denoising_ratio(twin: MixtureTwin, x0: Tensor, reference: GaussianTwin, noise: NoiseSource | None = None) -> float:
    """E ||x_0 - D_mix||^2 over E ||x_0 - D_lin||^2, averaged over nine levels of logsnr in [-6, 6].

    Args:
        twin: the mixture.
        x0: images it was not fitted to, (n, *event_shape).
        reference: the Gaussian twin.
        noise: source of the noise (default `Independent(0)`).
    """
    noise, levels = Independent(0) if noise is None else noise, _levels()
    ratios = []
    for k in range(len(levels)):
        level = levels[k]
        eps = noise.normal(range(len(x0)), x0.shape[1:], draw=k, dtype=torch.float64)
        x = float(level.alpha) * x0.double() + float(level.sigma) * eps
        errors = [((x0 - p.mean) ** 2).mean() for p in (twin.posterior(x, level), reference.posterior(x, level))]
        ratios.append(float(errors[0] / errors[1]))
    return sum(ratios) / len(ratios)


def _gather(batches: Iterable[Tensor], limit: int) -> Tensor:
    parts: list[Tensor] = []
    for batch in batches:
        parts.append(batch.detach().double().cpu()[: limit - sum(len(p) for p in parts)])
        if sum(len(p) for p in parts) >= limit:
            break
    return torch.cat(parts)


def fit_mixture(
    batches: Iterable[Tensor],
    held_out: Iterable[Tensor],
    twin: GaussianTwin,
    components: Sequence[int] = COMPONENTS,
    seed: int = 0,
) -> MixtureTwin:
    """The mixture twin of data; the Gaussian twin itself, as one component, where no mixture denoises better.

    Args:
        batches: images to fit to, tensors (b, *event_shape); the first 8,192 are used.
        held_out: images to choose K by, likewise.
        twin: the data's Gaussian twin, whose basis is taken.
        components: numbers of components to try; those above a twentieth of the images are left out.
        seed: of EM's start.

    Returns:
        The mixture, float64, on the CPU.

    Raises:
        ValueError: if there are no images.

    Example:
        >>> from lowvar.calibrate.twin import fit_twin
        >>> sides = torch.where(Independent(1).uniform(range(400), (1,)) < 0.5, -1.0, 1.0)
        >>> data = sides + 0.1 * Independent(2).normal(range(400), (1,))
        >>> fit_mixture([data[:300]], [data[300:]], fit_twin([data[:300]]), (2,)).components
        2
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    x0, test = _gather(batches, LIMIT), _gather(held_out, LIMIT // 4)
    best, least = MixtureTwin.of(twin), 1.0
    centre = best.mean[0]
    c = twin.spectrum.double().cpu()
    safe = torch.where(c > 0, c, torch.ones_like(c)).sqrt()
    rows = ((twin.basis.forward(x0) - centre) / safe).flatten(1).numpy()
    for K in components:
        if len(x0) // 20 < K:
            continue
        model = GaussianMixture(K, covariance_type="diag", reg_covar=FLOOR, random_state=seed, max_iter=200)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(rows)
        weight = torch.from_numpy(model.weights_)
        variance, count = torch.from_numpy(model.covariances_), (weight * len(x0))[:, None]
        pooled = torch.tensordot(weight, variance, dims=1)
        variance = (count * variance + SHRINK * pooled) / (count + SHRINK)
        mean = torch.from_numpy(model.means_).reshape(K, *c.shape) * safe + centre
        found = MixtureTwin(weight, mean, variance.reshape(K, *c.shape) * c, twin.basis)
        ratio = denoising_ratio(found, test, twin)
        if ratio < least:
            best, least = found, ratio
    return best
