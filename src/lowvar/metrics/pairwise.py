r"""Two-sample U-statistics of a kernel k, with leave-one-block-out replicates from block sums.

    theta = mean_{i != i'} k(x_i, x_i') + mean_{l != l'} k(y_l, y_l') - 2 mean_{i, l} k(x_i, y_l)

is the squared maximum mean discrepancy for a positive kernel, the energy distance for k = -|x - y|. Let A (b, b) hold
the sums of k(x_i, x_i') over pairs of blocks without the diagonal i = i', and c (b,) those of k(x_i, y_l). Leaving out
block j takes 2 A_j. - A_jj from the first sum and c_j from the last: no kernel is evaluated twice.

The sums run over chunks of rows, so memory is chunk x max(n, m) numbers; only blocks at or above the diagonal of A are
computed. Numbers are float64 throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.metrics.intervals import Replicates, block_bounds

__all__ = ["Kernel", "TwoSample", "flat"]

Kernel = Callable[[Tensor, Tensor], Tensor]  # (p, d), (q, d) -> (p, q)


def flat(x: Tensor) -> Tensor:
    """Samples (n, ...) as a float64 matrix (n, d).

    Raises:
        ValueError: for fewer than 2 samples, or values that are not finite.
    """
    if x.ndim < 1 or len(x) < 2:
        raise ValueError(f"the samples have shape {tuple(x.shape)}; a score needs at least 2, along the first axis")
    x = x.detach().to("cpu", torch.float64).reshape(len(x), -1)
    bad = int((~torch.isfinite(x)).any(1).sum())
    if bad:
        raise ValueError(f"{bad} of {len(x)} samples are not finite (NaN or infinite); the sampler diverged")
    return x


def _cross(kernel: Kernel, x: Tensor, y: Tensor, chunk: int) -> Tensor:
    """Sums (n,) of kernel(x_i, y_l) over l."""
    return torch.cat([kernel(part, y).sum(1) for part in x.split(chunk)])


def _within(kernel: Kernel, x: Tensor, bounds: Tensor, chunk: int) -> Tensor:
    """Symmetric sums (b, b) of kernel(x_i, x_i') over pairs of blocks, i != i'."""
    b = len(bounds) - 1
    edges = bounds.tolist()
    sums = torch.zeros(b, b, dtype=torch.float64)
    for j in range(b):
        rest = x[edges[j] :]
        cuts = bounds[j:] - bounds[j]
        for start in range(0, edges[j + 1] - edges[j], chunk):
            rows = rest[start : min(start + chunk, edges[j + 1] - edges[j])]
            k = kernel(rows, rest)
            k[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = 0  # i = i'
            running = torch.cat([torch.zeros(1, dtype=torch.float64), k.sum(0).cumsum(0)])
            sums[j, j:] += running[cuts[1:]] - running[cuts[:-1]]
    return sums.triu() + sums.triu(1).mT


@dataclass(frozen=True)
class TwoSample:
    """The U-statistic against a fixed set Y, whose own term is computed once.

    Args:
        kernel: (p, d), (q, d) -> (p, q).
        y: reference (m, d) in float64.
        within: mean of kernel(y_l, y_l') over l != l'.
        chunk: rows a kernel matrix has at most.
    """

    kernel: Kernel
    y: Tensor
    within: float
    chunk: int = 1024

    @classmethod
    def against(cls, kernel: Kernel, y: Tensor, *, chunk: int = 1024) -> TwoSample:
        """Holds the reference samples `y` (m, ...), m >= 2, and their own term."""
        y = flat(y)
        m = len(y)
        total = _within(kernel, y, torch.tensor([0, m]), chunk).sum().item()
        return cls(kernel, y, total / (m * (m - 1)), chunk)

    def value(self, x: Tensor) -> float:
        """The U-statistic of the samples `x` (n, ...), n >= 2."""
        x = flat(x)
        a = _within(self.kernel, x, torch.tensor([0, len(x)]), self.chunk)
        c = _cross(self.kernel, x, self.y, self.chunk).sum()
        return self._combine(a.sum(), c, torch.tensor(len(x))).item()

    def replicates(self, x: Tensor, blocks: int = 32) -> Replicates:
        """The U-statistic and its leave-one-block-out replicates; `x` (n, ...) with n >= 2 blocks."""
        x = flat(x)
        bounds = block_bounds(len(x), blocks)
        sizes = bounds.diff()
        a = _within(self.kernel, x, bounds, self.chunk)
        c = torch.stack([part.sum() for part in _cross(self.kernel, x, self.y, self.chunk).split(sizes.tolist())])
        value = self._combine(a.sum(), c.sum(), torch.tensor(len(x)))
        without = a.sum() - 2 * a.sum(1) + a.diagonal()
        return Replicates(value.item(), self._combine(without, c.sum() - c, len(x) - sizes), sizes)

    def _combine(self, a: Tensor, c: Tensor, n: Tensor) -> Tensor:
        return a / (n * (n - 1)) + self.within - 2 * c / (n * len(self.y))
