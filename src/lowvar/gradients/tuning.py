r"""Tuning what an estimator is unbiased for any value of: on the variance of the gradient itself.

Let g(eta) be an unbiased gradient estimate for every eta (REBAR's coefficient and temperature, RELAX's control variate,
a learned baseline). E g does not depend on eta, so

    d/d eta E |g|^2 = d/d eta (|E g|^2 + tr Cov g) = d/d eta tr Cov g,

and the gradient of one batch's |g|^2 is an unbiased slope of the variance. It takes a second backward pass through the
first. An eta that a step uses was tuned on batches before it, so the estimate stays unbiased.

Source: G. Tucker et al., "REBAR: low-variance, unbiased gradient estimates for discrete latent variable models", 2017.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["second_moment"]


def second_moment(loss: Tensor, parameters: Tensor | Iterable[Tensor]) -> Tensor:
    """|grad loss|^2 over all parameters, differentiable in what the estimator is tuned by.

    Args:
        loss: a surrogate, before its own backward pass.
        parameters: what it is differentiated in.

    Returns:
        a scalar; descend it in eta, not in the parameters.

    Raises:
        ValueError: if the loss has no gradient.

    Example:
        >>> from torch.distributions import Bernoulli
        >>> from lowvar.gradients import REBAR, Expectation
        >>> from lowvar.process import Independent
        >>> eta, log_lambda = (torch.zeros(2, requires_grad=True), torch.zeros((), requires_grad=True))
        >>> def program(theta, s):
        ...     b = s.sample("b", Bernoulli(logits=theta), REBAR(eta, log_lambda.exp()))
        ...     s.cost("f", (b.sum() - 0.4) ** 2)
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> E = Expectation(program, n=8)
        >>> loss, state, _ = E.surrogate(theta, Independent(0), E.init(theta))
        >>> second_moment(loss, theta).backward(inputs=[eta, log_lambda], retain_graph=True)  # for eta's optimiser
        >>> loss.backward()  # for theta's
        >>> bool((eta.grad < 0).all()), log_lambda.grad.shape  # more of the control variate
        (True, torch.Size([]))
    """
    if not loss.requires_grad:
        raise ValueError(
            "the loss has no gradient; give the surrogate before its backward pass, with parameters that do"
        )
    leaves = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    found = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    return torch.stack([g.square().sum() for g in found if g is not None]).sum()
