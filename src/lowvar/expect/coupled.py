r"""A coarse chain on the noise of a fine one: same law as alone, and as close to the fine chain as noise can make it.

Step j of the coarse chain spans the fine steps of a block. Its noise is their weighted sum along each direction,

    z_j = sum_i w_i z_i,      w_i = F_i / sqrt(sum F_i^2)      over the block,

with F_i the gain of fine noise i in the sample (`lowvar.expect.shadow`). Because sum w_i^2 = 1 and blocks do not
overlap, the z_j are independent standard normal: the coarse chain has exactly the law it has alone, whatever the
weights, so that differences of coupled chains telescope without bias. The weights only decide how close both stay.

For ancestral noise (eta = 1) without calibrated covariance, F_i / F_k in a block is the ratio of lambda_i prod a, and

    w_i = sqrt(dsnr_i) / sqrt(sum dsnr),

the weights in the clock of the reverse SDE. Calibrated noise kappa^2 C does not follow that clock: there, and for any
other eta, the gains of the twin's chain give the coupling along each direction of its basis.

Source: Giles 2008 (multilevel Monte Carlo) for the requirement; the weights by gains are this package's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.basis import Basis
from lowvar.process.noise import NoiseSource

__all__ = ["Coarse", "block_weights"]


def block_weights(gains: Tensor, block: int) -> Tensor:
    """Weights w of every fine noise within its block, (K, *event_shape); squares sum to 1 over a block.

    A block none of whose noise reaches the sample (the step to clean data) has equal weights.

    Args:
        gains: F of the fine chain's step noises, (K, *event_shape).
        block: fine steps a coarse one spans; divides K.

    Raises:
        ValueError: if the block does not divide K.

    Example:
        >>> [round(w, 3) for w in block_weights(torch.tensor([3.0, 4.0, 0.0, 0.0]), 2).tolist()]
        [0.6, 0.8, 0.707, 0.707]
    """
    K = len(gains)
    if block < 1 or K % block:
        raise ValueError(f"blocks of {block} steps do not divide the {K} fine steps")
    g = gains.reshape(K // block, block, *gains.shape[1:])
    size = (g**2).sum(1, keepdim=True).sqrt()
    lost = size <= 1e-12 * size.amax()
    w = torch.where(lost, torch.full_like(g, block**-0.5), g / torch.where(lost, torch.ones_like(size), size))
    return w.reshape(gains.shape)


@dataclass(frozen=True, eq=False)
class Coarse(NoiseSource):
    """The coarse chain's noise from the fine chain's: draw 0 as it is, draw j + 1 summed over block j.

    Args:
        base: the fine chain's noise.
        weights: (K, *event_shape) of `block_weights`, along the directions of `basis`.
        basis: their basis.
        block: fine steps a coarse one spans.
    """

    base: NoiseSource
    weights: Tensor
    basis: Basis
    block: int = 2

    def normal(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal numbers, (n, *shape)."""
        if draw == 0:
            return self.base.normal(index, shape, draw=0, dtype=dtype, device=device)
        total: Tensor | None = None
        for i in range((draw - 1) * self.block, draw * self.block):
            z = self.base.normal(index, shape, draw=i + 1, dtype=dtype, device=device)
            part = self.weights[i].to(z) * self.basis.forward(z)
            total = part if total is None else total + part
        assert total is not None
        return self.basis.inverse(total)

    def uniform(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The fine chain's own uniform numbers."""
        return self.base.uniform(index, shape, draw=draw, dtype=dtype, device=device)
