r"""Fitting the Gaussian twin to data: mean and covariance in one pass over the data and constant memory.

Batches update (n, mean, M = sum of centred outer products) by Chan, Golub & LeVeque's pairwise formula in float64; a
principal-component basis keeps M (d x d), a DCT basis only its diagonal in that basis (d numbers). The spectrum is
M / n on the basis directions: the maximum-likelihood value, as the exact-mean identity of the linear denoiser needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from lowvar.process.basis import DCTBasis, MatrixBasis
from lowvar.process.twin import GaussianTwin

__all__ = ["PCA_LIMIT", "fit_twin"]

PCA_LIMIT = 1024


def fit_twin(batches: Iterable[Tensor], basis: Literal["auto", "pca", "dct"] = "auto") -> GaussianTwin:
    """The Gaussian twin of data.

    Args:
        batches: tensors (b, *event_shape).
        basis: principal components, the 2-D DCT x colour, or `auto`: principal components up to d = 1024.

    Returns:
        The twin, float64, on the CPU.

    Raises:
        ValueError: if there are fewer than two events or the basis is unknown.

    Example:
        >>> twin = fit_twin([torch.tensor([[0.0, 1.0], [2.0, 1.0]])])
        >>> twin.mean.tolist(), sorted(twin.spectrum.tolist())
        ([1.0, 1.0], [0.0, 1.0])
    """
    if basis not in ("auto", "pca", "dct"):
        raise ValueError(f"basis is {basis!r}; allowed: auto, pca, dct")
    n, mean, scatter, shape = 0, torch.zeros(0), torch.zeros(0), torch.Size()
    transform: DCTBasis | None = None
    dense = True
    for batch in batches:
        if n == 0:
            shape = batch.shape[1:]
            d = shape.numel()
            dense = basis == "pca" or (basis == "auto" and d <= PCA_LIMIT)
            transform = None if dense else DCTBasis(shape)
            mean = torch.zeros(d, dtype=torch.float64)
            scatter = torch.zeros((d, d) if dense else (d,), dtype=torch.float64)
        rows = batch.detach().double().cpu()
        rows = (rows if transform is None else transform.forward(rows)).flatten(1)
        b = rows.shape[0]
        if b == 0:
            continue
        here = rows.mean(0)
        delta, centred = here - mean, rows - here
        factor = n * b / (n + b)
        if dense:
            scatter = scatter + centred.T @ centred + factor * torch.outer(delta, delta)
        else:
            scatter = scatter + (centred**2).sum(0) + factor * delta**2
        mean = mean + delta * (b / (n + b))
        n += b
    if n < 2:
        raise ValueError(f"the twin needs at least two events, got {n}")
    if transform is not None:
        centre = transform.inverse(mean.reshape(1, *shape))[0]
        return GaussianTwin(centre, transform, (scatter / n).reshape(shape))
    values, vectors = torch.linalg.eigh(scatter / n)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)  # leading direction first
    values = torch.where(values < 1e-12 * values[0].clamp_min(1e-300), 0.0, values)
    return GaussianTwin(mean.reshape(shape), MatrixBasis(vectors, shape), values.reshape(shape))
