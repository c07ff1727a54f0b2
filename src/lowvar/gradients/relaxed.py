r"""Continuous relaxations of discrete sites, and their law given the discrete value.

    Bernoulli         z = phi + log u - log(1 - u),  b = 1[z > 0],                relaxed sigmoid(z / lambda)
    OneHotCategorical z = phi - log(-log u),         b = one-hot argmax z,        relaxed softmax(z / lambda)

Given b, z is drawn from fresh uniforms v and reparameterised in phi *through the condition* (Tucker et al. 2017):

    Bernoulli         z~ = b log(v / ((1 - v) q) + 1) - (1 - b) log(v / ((1 - v) p) + 1)
    OneHotCategorical z~_k = -log(-log v_k) where b_k = 1, else -log(-log v_k / p_k - log v_b)

(for the second phi is log p). Here b comes first, by the inverse CDF of one uniform number, and z is drawn given b: the
same joint law, and as z = phi + noise its own derivative in phi is 1 whichever way the noise was found.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from lowvar.gradients.distributions import base, breaks, noise_of, sample
from lowvar.gradients.estimator import BaseNoise, zero

__all__ = ["conditional", "free", "hard", "relax", "relaxed_breaks", "relaxed_noise"]

Relaxable = td.Bernoulli | td.OneHotCategorical


def relaxed_noise(d: Distribution, who: str) -> dict[str, BaseNoise]:
    """u for the discrete value, v for z and w for z~ given it.

    Raises:
        ValueError: if the site has no relaxation.
    """
    d = base(d)
    if not isinstance(d, Relaxable):
        raise ValueError(f"{who} relaxes Bernoulli and OneHotCategorical sites, not {type(d).__name__}")
    shape = d.batch_shape + d.event_shape
    return {**noise_of(d), "v": BaseNoise("uniform", shape), "w": BaseNoise("uniform", shape)}


def relaxed_breaks(d: Distribution) -> dict[str, Tensor]:
    """Those of the discrete value; the rest is smooth."""
    return breaks(d)


def conditional(d: Distribution, logits: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """z given b, differentiable in the logits (whose probabilities it computes itself)."""
    if isinstance(base(d), td.Bernoulli):
        odds = v / (1 - v)
        up = torch.log1p(odds * (1 + torch.exp(logits)))  # 1 / q = 1 + e^phi
        down = torch.log1p(odds * (1 + torch.exp(-logits)))
        return torch.where(b > 0.5, up, -down)
    log_p = torch.log_softmax(logits, -1)
    e = -torch.log(v)
    top = (e * b).sum(-1, keepdim=True)
    return -torch.log(torch.where(b > 0.5, e, e * torch.exp(-log_p) + top))


def free(d: Distribution, logits: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """z of the joint law of (z, b), differentiable in the logits as phi + noise is (log p + noise for classes)."""
    location = logits if isinstance(base(d), td.Bernoulli) else torch.log_softmax(logits, -1)
    return conditional(d, logits, b, v).detach() + zero(location)


def relax(d: Distribution, z: Tensor, temperature: float | Tensor) -> Tensor:
    """sigmoid(z / lambda) or softmax(z / lambda)."""
    return torch.sigmoid(z / temperature) if isinstance(base(d), td.Bernoulli) else torch.softmax(z / temperature, -1)


def hard(d: Distribution, noise: Mapping[str, Tensor]) -> Tensor:
    """The discrete value."""
    return sample(d, {"u": noise["u"]}).detach()
