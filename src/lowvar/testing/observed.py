r"""Exact posteriors of the exact targets, given a linear measurement.

    x_0 ~ sum_k w_k N(m_k, S_k),   y = M x_0 + n,   n ~ N(0, N):     p(x_0 | y) is a mixture again, with

    T_k = M S_k M^T + N,   w_k(y) propto w_k N(y; M m_k, T_k),
    m_k(y) = m_k + S_k M^T T_k^-1 (y - M m_k),   S_k(y) = S_k - S_k M^T T_k^-1 M S_k.

A Gaussian target is the mixture of one component.
"""

from __future__ import annotations

from typing import overload

import torch

from lowvar.expect.conditioning import Measurement
from lowvar.testing.gaussian import GaussianTarget
from lowvar.testing.mixture import MixtureTarget

__all__ = ["observed"]


@overload
def observed(target: MixtureTarget, measurement: Measurement) -> MixtureTarget: ...
@overload
def observed(target: GaussianTarget, measurement: Measurement) -> GaussianTarget: ...
def observed(target: MixtureTarget | GaussianTarget, measurement: Measurement) -> MixtureTarget | GaussianTarget:
    """The law of x_0 given the measurement, a target like any other.

    Args:
        target: the prior.
        measurement: one measurement, `y` of shape (*measured_shape).

    Example:
        >>> from lowvar.expect.operators import Whole
        >>> prior = GaussianTarget(torch.zeros(1), torch.eye(1))
        >>> after = observed(prior, Measurement(Whole((1,)), torch.ones(1), 1.0))
        >>> after.mean.tolist(), after.covariance.tolist()
        ([0.5], [[0.5]])
    """
    if isinstance(target, GaussianTarget):
        one = MixtureTarget(torch.ones(1), target.mean[None], target.covariance[None])
        given = observed(one, measurement)
        return GaussianTarget(given.means[0], given.covariances[0])
    M = measurement.operator.matrix()
    y = measurement.y.double().flatten()
    N = torch.diag((torch.as_tensor(measurement.noise_std).double() ** 2 * torch.ones_like(measurement.y)).flatten())
    m, S = target.means.flatten(1), target.covariances
    T = M @ S @ M.mT + N
    r = y - m @ M.mT
    gain = torch.linalg.solve(T, M @ S).mT  # S M^T T^-1
    joint = torch.log(target.weights) + torch.distributions.MultivariateNormal(m @ M.mT, T).log_prob(y)
    means = m + (gain @ r[..., None])[..., 0]
    covariances = S - gain @ M @ S
    weights = torch.softmax(joint, 0).clamp_min(1e-300)
    return MixtureTarget(weights, means.reshape(target.means.shape), (covariances + covariances.mT) / 2)
