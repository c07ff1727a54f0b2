r"""Stratified times: one uniform number an update, spread over its n times.

    u_i = (u + s_i / n) mod 1,    u ~ U(0, 1) once an update,    (s_1, .., s_n) a random permutation of 0, .., n - 1

so every u_i alone is uniform, each interval [k / n, (k + 1) / n) holds exactly one of them, and `Times.at` turns them
into times of any density with its weights: stratification and importance sampling combine through the inverse cdf.

Of a gradient g = f(u) + noise only the part f is touched. With S_t = Var f / Var g the variance of the mean of n
samples falls by the factor 1 - S_t (1 - r), r = n Var(mean of the f(u_i)) / Var f: for linear f the lattice has
mean f = 1/2 + (v - 1/2) / n with v = n u mod 1, so r = 1 / n; for a cosine of fewer than n periods r = 0.

u and s are functions of the update's number. s_i is the rank of the sample's own uniform number among those of the
*global* batch, so nothing depends on how the batch is split, and no stratum is tied to a process or to an image.

Sources: Kingma et al. 2021 ("Variational Diffusion Models", App. I.1: the low-discrepancy sampler, there with s the
identity); Crowson's k-diffusion (strata by process).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvar.process.noise import NoiseSource

__all__ = ["SHARED_DRAW", "stratified_uniforms"]

SHARED_DRAW = -1  # the draw number of what an update's samples have in common; its index is the update's number


def stratified_uniforms(source: NoiseSource, update: int, n: int, draw: int = 1) -> Tensor:
    """The uniform numbers of an update's n times, in [0, 1), (n,) float64, in the order of the samples.

    Args:
        source: of u, and of the numbers whose ranks are the strata (those of indices update n, .., update n + n - 1).
        update: number of the update.
        n: times of the global batch.
        draw: draw number of the samples' own uniform numbers.

    Raises:
        ValueError: if n is below 1.

    Example:
        >>> from lowvar.process import Independent
        >>> u = stratified_uniforms(Independent(0), update=3, n=5)
        >>> (5 * u).long().sort().values.tolist()
        [0, 1, 2, 3, 4]
    """
    if n < 1:
        raise ValueError(f"n is {n}; a batch has at least 1 time")
    own = source.uniform(update * n + torch.arange(n), (), draw=draw, dtype=torch.float64)
    stratum = own.argsort(stable=True).argsort()
    shift = source.uniform([update], (), draw=SHARED_DRAW, dtype=torch.float64)
    return torch.remainder(shift + stratum.to(shift) / n, 1.0)
