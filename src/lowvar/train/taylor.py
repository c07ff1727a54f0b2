r"""Taylor expansion of the loss in the noise as a control variate (Jeha et al. 2024).

A sample's loss is a function l(eps) of its noise, given x_0 and t. Around eps = 0

    T_1(eps) = l(0) + grad l(0) . eps                          E T_1 = l(0)
    T_2(eps) = T_1(eps) + eps^T H eps / 2,   H = Hessian l(0)  E T_2 = l(0) + tr H / 2

for eps ~ N(0, I), so that T_k is a variate with a known mean. Both depend on the parameters, and the gradient of T_k is
the expansion of l's gradient (the paper's Prop.: the two are one), so l - beta (T_k - E T_k) lowers the variance of the
*gradient* too; it is unbiased for any detached beta that does not know the sample (`lowvar.gradients`).

Directional derivatives come from gradients in the noise at x_t = alpha x_0 (a sample's loss is a number, so one
backward pass has them all): order 1 takes one, and a backward pass through it; order 2 nests two and needs the trace,
one nested pair for each of the d directions, so that it is for few dimensions. Where x_t = alpha x_0 + sigma eps leaves
the region in which the network is smooth, an expansion around 0 says little: the share of the variance that it explains
falls with the noise, and for images little is left of the gain (the paper's finding on MNIST). So use bins of logsnr
for the coefficient.

For noise of another law (of fixed norm, say) E T_k is another: this one is for standard normal eps.

Source: P. Jeha, W. Grathwohl, M. R. Andersen, C. H. Ek, J. Frellsen, "Variance reduction of diffusion model's gradients
with Taylor approximation-based control variate", 2024 (arXiv 2408.12270).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["taylor_variate"]

NoiseLoss = Callable[[Tensor], Tensor]


def _slope(loss: NoiseLoss, eps: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """(l(eps), grad l(eps) . tangent), (B,) each."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention are differentiable once only
        value, pull = torch.func.vjp(loss, eps)[:2]
        gradient = pull(torch.ones_like(value))[0]
    return value, (gradient * tangent).flatten(1).sum(1)


def _curvature(loss: NoiseLoss, eps: Tensor, tangent: Tensor) -> Tensor:
    """tangent^T H tangent, (B,)."""
    return _slope(lambda e: _slope(loss, e, tangent)[1], eps, tangent)[1]


def taylor_variate(loss: NoiseLoss, eps: Tensor, order: Literal[1, 2] = 1) -> tuple[Tensor, Tensor]:
    """T_k(eps) and its mean over eps ~ N(0, I), a sample each, both with their gradients.

    Args:
        loss: noise (B, *event_shape) -> losses (B,), sample by sample (no batch normalisation); the parameters it
            depends on are caught by it. The same noise must give the same loss: no dropout.
        eps: the noise that was drawn, (B, *event_shape).
        order: k.

    Returns:
        Variate and expectation, (B,) each: arguments of `lowvar.gradients.controlled` and `lagged`.

    Raises:
        ValueError: if the order is neither 1 nor 2, or the loss is not one a sample.

    Example:
        >>> from lowvar.gradients import controlled
        >>> from lowvar.process import CosineVP, Independent, NetworkDenoiser
        >>> from lowvar.train.objectives import Objective, Simple
        >>> w = torch.tensor(0.9, requires_grad=True)
        >>> schedule = CosineVP()
        >>> denoiser = NetworkDenoiser(lambda x, t: w * x, schedule, "sample")
        >>> x0, eps = (Independent(k).normal(range(64), (2,)) for k in range(2))
        >>> level = schedule.at(torch.full((64,), 0.1))
        >>> def loss(eps):
        ...     return Objective(Simple()).losses(denoiser, x0, eps, level).loss
        >>> variate, expectation = taylor_variate(loss, eps, order=2)
        >>> bool(torch.allclose(variate, loss(eps), atol=1e-6))  # the loss of a linear network is quadratic
        True
        >>> controlled(loss(eps), variate, expectation).mean().backward()
    """
    if order not in (1, 2):
        raise ValueError(f"order is {order}; allowed: 1, 2")
    zero = torch.zeros_like(eps)
    value, slope = _slope(loss, zero, eps)
    if value.shape != eps.shape[:1]:
        raise ValueError(f"the loss has shape {tuple(value.shape)} for {len(eps)} samples; give one number a sample")
    if order == 1:
        return value + slope, value
    trace = torch.zeros_like(value)
    flat = zero.flatten(1)
    for k in range(flat.shape[1]):
        direction = torch.zeros_like(flat)
        direction[:, k] = 1
        trace = trace + _curvature(loss, zero, direction.reshape(eps.shape))
    return value + slope + _curvature(loss, zero, eps) / 2, value + trace / 2
