r"""Distributions as functions of base noise: x = g(e, theta), for `torch.distributions` objects.

    Normal, LogNormal, MultivariateNormal      g = mu + sigma z, exp of it, mu + L z,                 z ~ N(0, I)
    Laplace, Exponential, Uniform, Logistic,   the inverse CDF of a uniform number
      Gumbel, Cauchy, Kumaraswamy, Pareto, Weibull (the last six are `TransformedDistribution`s or have icdf)
    Bernoulli, Categorical, Poisson, ...       x = number of CDF values below u: a step function, no gradient
    Gamma, Chi2, Beta, Dirichlet, StudentT     through Gamma quantiles, see `implicit`
    VonMises, MixtureSameFamily                see `implicit`
    Independent                                its base distribution

torch samples from its own generator; here noise is an argument, so a sample can be replayed, mirrored and integrated
over. All of it runs under `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from lowvar.gradients.estimator import BaseNoise

__all__ = [
    "base",
    "breaks",
    "element_log_prob",
    "is_discrete",
    "log_prob",
    "natural",
    "noise_of",
    "sample",
    "support",
    "with_natural",
]

_ICDF = (td.Laplace, td.Exponential, td.Uniform, td.Cauchy)
POISSON_MAX = 512


def base(d: Distribution) -> Distribution:
    """The distribution inside `Independent`.

    Example:
        >>> type(base(td.Independent(td.Normal(torch.zeros(3), 1.0), 1))).__name__
        'Normal'
    """
    while isinstance(d, td.Independent):
        d = d.base_dist
    return d


def is_discrete(d: Distribution) -> bool:
    """Whether values are numbers of a list: Bernoulli, Categorical, OneHotCategorical, Poisson."""
    return isinstance(base(d), td.Bernoulli | td.Categorical | td.OneHotCategorical | td.Poisson)


def log_prob(d: Distribution, x: Tensor) -> Tensor:
    """log p(x) of all elements together, a scalar."""
    return element_log_prob(d, x).sum()


def element_log_prob(d: Distribution, x: Tensor) -> Tensor:
    """log p(x) of each element, with the axes of the distribution inside `Independent`."""
    return base(d).log_prob(x)


def _cdf_steps(d: Distribution) -> Tensor:
    """Values of the CDF below 1, (*batch, k)."""
    if isinstance(d, td.Poisson):
        k = torch.arange(1, POISSON_MAX + 1, dtype=d.rate.dtype, device=d.rate.device)
        k, rate = torch.broadcast_tensors(k, d.rate.detach()[..., None])
        return torch.special.gammaincc(k, rate)
    probs: Tensor = d.probs  # pyright: ignore[reportAttributeAccessIssue]
    return (1 - probs)[..., None] if isinstance(d, td.Bernoulli) else probs.cumsum(-1)[..., :-1]


def noise_of(d: Distribution) -> dict[str, BaseNoise]:
    """The base noise that `sample` takes, by name.

    Raises:
        ValueError: if the distribution is not one of the list.
    """
    d = base(d)
    if isinstance(d, td.TransformedDistribution):
        return noise_of(d.base_dist)
    if isinstance(d, td.Normal | td.MultivariateNormal):
        return {"z": BaseNoise("normal", d.batch_shape + d.event_shape)}
    if isinstance(d, _ICDF) or is_discrete(d):
        return {"u": BaseNoise("uniform", d.batch_shape, "constant" if is_discrete(d) else "smooth")}
    from lowvar.gradients.implicit import implicit_noise

    return implicit_noise(d)


def sample(d: Distribution, noise: Mapping[str, Tensor]) -> Tensor:
    """g(noise, theta), differentiable in theta where the distribution has an explicit transform.

    Example:
        >>> sample(td.Normal(torch.tensor(1.0), 2.0), {"z": torch.tensor(0.5)})
        tensor(2.)
        >>> sample(td.Categorical(torch.tensor([0.2, 0.3, 0.5])), {"u": torch.tensor(0.4)})
        tensor(1)
    """
    d = base(d)
    if isinstance(d, td.TransformedDistribution):
        x = sample(d.base_dist, noise)
        for transform in d.transforms:
            x: Tensor = transform(x)  # pyright: ignore[reportAssignmentType]
        return x
    if isinstance(d, td.Normal):
        return d.loc + d.scale * noise["z"]
    if isinstance(d, td.MultivariateNormal):
        return d.loc + (d.scale_tril @ noise["z"][..., None])[..., 0]
    if isinstance(d, _ICDF):
        return d.icdf(noise["u"])
    if is_discrete(d):
        below = noise["u"][..., None] > _cdf_steps(d).detach()
        number = below.sum(-1)
        if isinstance(d, td.OneHotCategorical):
            k = torch.arange(d.probs.shape[-1], device=number.device)
            return (number[..., None] == k).to(d.probs.dtype)
        return number if isinstance(d, td.Categorical) else number.to(noise["u"].dtype)
    from lowvar.gradients.implicit import quantile

    return quantile(d, noise)


def breaks(d: Distribution) -> dict[str, Tensor]:
    """Where `sample` jumps as a function of its uniform noise, by name: (*batch, k), sorted."""
    d = base(d)
    if is_discrete(d):
        return {"u": _cdf_steps(d).detach()}
    if isinstance(d, td.MixtureSameFamily):
        return {"u": _cdf_steps(d.mixture_distribution).detach().expand(*d.batch_shape, -1)}
    return {}


def support(d: Distribution) -> Tensor:
    """All values of a discrete distribution of all its elements jointly, (values, *shape), the first element slowest.

    Raises:
        ValueError: if there are none, or more than 4096.

    Example:
        >>> support(td.Bernoulli(torch.tensor([0.5, 0.5]))).tolist()
        [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    d = base(d)
    if not is_discrete(d) or isinstance(d, td.Poisson):
        raise ValueError(f"{type(d).__name__} has no finite list of values; enumerate Bernoulli or Categorical sites")
    kinds = 2 if isinstance(d, td.Bernoulli) else d.probs.shape[-1]  # pyright: ignore[reportAttributeAccessIssue]
    count = d.batch_shape.numel()
    if kinds**count > 4096:
        raise ValueError(f"a site of {count} elements with {kinds} values has {kinds}^{count} > 4096 joint values")
    reference = natural(d)["logits"]
    number = torch.arange(kinds**count, device=reference.device)
    place = kinds ** torch.arange(count - 1, -1, -1, device=reference.device)
    number = (number[:, None] // place % kinds).reshape(-1, *d.batch_shape)
    if isinstance(d, td.OneHotCategorical):
        return (number[..., None] == torch.arange(kinds, device=number.device)).to(reference.dtype)
    return number if isinstance(d, td.Categorical) else number.to(reference.dtype)


def natural(d: Distribution) -> dict[str, Tensor]:
    """The parameters that score functions are taken in: logits, or location and scale, or the distribution's own.

    Raises:
        ValueError: if it has none of its own, as mixtures and transformed distributions.

    Example:
        >>> sorted(natural(td.Normal(torch.zeros(2), torch.ones(2))))
        ['loc', 'scale']
    """
    d = base(d)
    if isinstance(d, td.Bernoulli | td.Categorical | td.OneHotCategorical):
        return {"logits": d.logits}
    found = {name: getattr(d, name) for name in d.arg_constraints if name in d.__dict__}
    if not found:
        raise ValueError(
            f"{type(d).__name__} has no parameters of its own whose score can be taken; allowed there: baselines that "
            "need none (LeaveOneOut, MovingAverage, Regression), not Optimal or PerParameter"
        )
    return found


def with_natural(d: Distribution, values: Mapping[str, Tensor]) -> Distribution:
    """The distribution of the same kind with other parameters."""
    d = base(d)
    kind: Any = type(d)
    return kind(**values, validate_args=False)
