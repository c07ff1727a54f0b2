"""Implicit reparameterisation: quantiles, CDF derivatives, and exact gradients of moments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributions as td

from lowvar.gradients import Pathwise, Sites
from lowvar.gradients.distributions import noise_of, sample
from lowvar.gradients.implicit import gamma_cdf, gamma_quantile, von_mises_cdf
from lowvar.process import Independent
from lowvar.testing import QuadratureRule, exact_moments


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SHAPES = f64(0.05, 0.3, 0.9, 1.0, 2.5, 4.0, 17.0, 200.0)


def test_gamma_cdf_and_its_derivative() -> None:
    """Against torch's own CDF; its derivative in a against central differences of SciPy's."""
    from scipy.special import gammainc, gammaincinv

    for u in (1e-3, 0.2, 0.7, 0.999):
        x = torch.tensor(gammaincinv(SHAPES.numpy(), u))
        a = SHAPES.clone().requires_grad_()
        value = gamma_cdf(a, x)
        assert torch.allclose(value, torch.full_like(value, u), atol=1e-9)
        value.sum().backward()
        e = 1e-5 * SHAPES.numpy()
        slope = (gammainc(SHAPES.numpy() + e, x.numpy()) - gammainc(SHAPES.numpy() - e, x.numpy())) / (2 * e)
        assert a.grad is not None
        assert torch.allclose(a.grad, torch.tensor(slope), rtol=1e-5, atol=1e-8)


def test_gamma_quantile() -> None:
    from scipy.special import gammaincinv

    u = f64(1e-12, 1e-4, 0.3, 0.9, 1 - 1e-9)
    x = gamma_quantile(SHAPES[:, None], u)
    truth = torch.tensor(gammaincinv(SHAPES[:, None].numpy(), u.numpy()))
    assert torch.allclose(x, truth, rtol=1e-8, atol=0)  # 1 - 1e-9 has 7 digits


def test_von_mises_cdf() -> None:
    from scipy.stats import vonmises

    x = torch.linspace(-3.1, 3.1, 13, dtype=torch.float64)
    for kappa in (0.1, 2.0, 40.0):
        mine = von_mises_cdf(x, torch.tensor(kappa, dtype=torch.float64))
        assert torch.allclose(mine, torch.tensor(vonmises.cdf(x.numpy(), kappa)), atol=1e-9)


def moments(d: Any, f: Any, theta: Tensor, truth: Tensor, rule: QuadratureRule, tolerance: float) -> None:
    def program(theta: Tensor, s: Sites) -> None:
        s.cost("f", f(s.sample("x", d(theta), Pathwise())))

    certificate = exact_moments(program, theta, rule=rule, truth=truth)
    assert certificate.holds(tolerance), certificate


def test_gamma() -> None:
    """d E[x^2] / da = 2 a + 1, and E[x^2] = a (a + 1) / r^2."""
    a, r = 1.7, 1.3
    truth = f64((2 * a + 1) / r**2, -2 * a * (a + 1) / r**3)
    moments(lambda th: td.Gamma(th[0], th[1]), lambda x: x**2, f64(a, r), truth, QuadratureRule(80), 1e-8)
    a = 0.4
    truth = f64((2 * a + 1) / r**2, -2 * a * (a + 1) / r**3)
    moments(lambda th: td.Gamma(th[0], th[1]), lambda x: x**2, f64(a, r), truth, QuadratureRule(80), 1e-8)


def test_beta() -> None:
    """E x = a / (a + b), E x^2 = a (a + 1) / ((a + b)(a + b + 1))."""

    def second(th: Tensor) -> Tensor:
        a, b = th
        return a * (a + 1) / ((a + b) * (a + b + 1))

    theta = f64(1.7, 0.8)
    truth = torch.func.grad(second)(theta)
    moments(lambda th: td.Beta(th[0], th[1]), lambda x: x**2, theta, truth, QuadratureRule(50), 1e-8)


def test_dirichlet() -> None:
    """E[x_0 x_1] = a_0 a_1 / (A (A + 1)), A = a_0 + a_1 + a_2."""

    def product(a: Tensor) -> Tensor:
        return a[0] * a[1] / (a.sum() * (a.sum() + 1))

    theta = f64(1.7, 0.8, 1.2)
    moments(td.Dirichlet, lambda x: x[0] * x[1], theta, torch.func.grad(product)(theta), QuadratureRule(26), 1e-6)


def test_student_t() -> None:
    """E x^2 = loc^2 + s^2 nu / (nu - 2)."""

    def second(th: Tensor) -> Tensor:
        return th[1] ** 2 + th[2] ** 2 * th[0] / (th[0] - 2)

    theta = f64(6.5, 0.4, 1.2)
    truth = torch.func.grad(second)(theta)
    moments(lambda th: td.StudentT(*th), lambda x: x**2, theta, truth, QuadratureRule(80, 10), 1e-6)


def test_von_mises() -> None:
    """E cos x = cos(loc) I_1 / I_0."""

    def cosine(th: Tensor) -> Tensor:
        return torch.cos(th[0]) * torch.special.i1(th[1]) / torch.special.i0(th[1])

    theta = f64(0.6, 2.3)
    truth = torch.func.grad(cosine)(theta)
    moments(lambda th: td.VonMises(th[0], th[1]), torch.cos, theta, truth, QuadratureRule(100), 1e-9)


def test_mixture_of_normals() -> None:
    """E x^3 = sum pi_k (mu_k^3 + 3 mu_k s_k^2); weights, means and scales."""

    def cube(th: Tensor) -> Tensor:
        w, mu, s = torch.softmax(th[:2], 0), th[2:4], th[4:]
        return (w * (mu**3 + 3 * mu * s**2)).sum()

    def mixture(th: Tensor) -> Any:
        return td.MixtureSameFamily(td.Categorical(logits=th[:2]), td.Normal(th[2:4], th[4:]))

    theta = f64(0.3, -0.4, -0.8, 0.9, 0.7, 1.1)
    truth = torch.func.grad(cube)(theta)
    moments(mixture, lambda x: x**3, theta, truth, QuadratureRule(60, 160), 1e-8)


@pytest.mark.parametrize(
    ("d", "mean", "variance"),
    [
        (td.Laplace(f64(0.3), f64(0.8)), 0.3, 2 * 0.64),
        (td.Exponential(f64(2.0)), 0.5, 0.25),
        (td.Uniform(f64(-1.0), f64(2.0)), 0.5, 0.75),
        (td.LogNormal(f64(0.1), f64(0.4)), math.exp(0.18), (math.exp(0.16) - 1) * math.exp(0.36)),
        (td.Gumbel(f64(0.2), f64(0.7)), 0.2 + 0.7 * 0.5772156649, math.pi**2 / 6 * 0.49),
        (td.Gamma(f64(2.5), f64(1.5)), 2.5 / 1.5, 2.5 / 2.25),
        (td.Beta(f64(2.0), f64(3.0)), 0.4, 0.04),
        (td.StudentT(f64(9.0), f64(0.5), f64(1.0)), 0.5, 9 / 7),
        (td.VonMises(f64(0.0), f64(4.0)), 0.0, 0.2950),
        (td.Poisson(f64(3.2)), 3.2, 3.2),
        (td.Bernoulli(f64(0.3)), 0.3, 0.21),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, td.Distribution) else "",
)
def test_samples_have_their_moments(d: Any, mean: float, variance: float) -> None:
    """20,000 samples: the mean within 4 standard errors, the variance within 6%."""
    n = 20_000
    noise = {
        name: getattr(Independent(1), e.kind)(range(n), e.shape, draw=k, dtype=torch.float64)
        for k, (name, e) in enumerate(noise_of(d).items())
    }
    with_n = torch.func.vmap(lambda e: sample(d, e))(noise)
    assert float((with_n.mean() - mean).abs()) < 4 * math.sqrt(variance / n)
    assert float(with_n.var()) == pytest.approx(variance, rel=0.06)


def test_multivariate_normal_and_independent() -> None:
    L = f64(1.0, 0.0, 0.6, 0.5).reshape(2, 2)

    def program(theta: Tensor, s: Sites) -> None:
        x = s.sample("x", td.MultivariateNormal(theta, scale_tril=L), Pathwise())
        y = s.sample("y", td.Independent(td.Normal(theta, 1.0), 1), Pathwise())
        s.cost("f", x[0] * x[1] * y[0])

    def exact(theta: Tensor) -> Tensor:
        return (theta[0] * theta[1] + 0.6) * theta[0]

    theta = f64(0.4, -0.9)
    certificate = exact_moments(program, theta, rule=QuadratureRule(normal=4), truth=torch.func.grad(exact)(theta))
    assert certificate.holds()


def test_rounding_leaves_beta_samples_inside_of_their_range() -> None:
    """Beta(4, 1/2) is within float32's rounding of 1 once in some thousands: log p there would be infinite."""
    d = td.Beta(torch.tensor(4.0), torch.tensor(0.5))
    x = sample(d, {"u": torch.tensor(0.999999), "v": torch.tensor(1e-6)})
    assert float(x) < 1
    assert bool(d.log_prob(x).isfinite())
    shares = td.Dirichlet(torch.tensor([0.01, 3.0]))
    y = sample(shares, {"u": torch.tensor([1e-7, 0.5])})
    assert bool(shares.log_prob(y).isfinite())
