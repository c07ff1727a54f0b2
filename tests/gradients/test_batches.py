"""Programs that run on whole batches: the same costs, states and gradients as sample by sample, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Bernoulli, Categorical, Normal, OneHotCategorical
from torch.func import grad, hessian, jacrev, vmap

from lowvar.gradients import (
    ARM,
    REBAR,
    RELAX,
    Antithetic,
    DiCE,
    DisARM,
    Enumerate,
    Estimator,
    Expectation,
    GumbelSoftmax,
    LeaveOneOut,
    MeasureValued,
    MovingAverage,
    MultiSample,
    Optimal,
    Pathwise,
    Regression,
    Score,
    Sites,
    StraightThrough,
    Taylor,
)
from lowvar.gradients.batches import axes_of
from lowvar.gradients.expectation import without_validation
from lowvar.process import Independent

LOGITS = torch.linspace(-1, 1, 3, dtype=torch.float64)
THETA = {"a": LOGITS, "m": LOGITS * 0.7, "s": LOGITS * 0.2 - 0.5}
DATA = torch.sin(torch.arange(15, dtype=torch.float64)).reshape(5, 3)


def both(program: Any, n: int, data: tuple[Tensor, ...] = (), theta: Any = THETA) -> None:
    """A batch either way: values, costs, states, losses of control variates and gradients."""
    found = []
    for batched in (False, True):
        E = Expectation(program, n, batched)
        state = E.init(theta, data)
        noises = E.noises(Independent(1), state, data=data)

        def loss(th: Any, E: Any = E, state: Any = state, noises: Any = noises) -> tuple[Tensor, Any]:
            batch = E.evaluate(th, noises, state, data=data)
            weight = torch.sin(1 + torch.arange(batch.surrogates.numel())).reshape(batch.surrogates.shape)
            after = {"values": batch.values, "costs": dict(batch.costs), "state": batch.state.state()}
            return (weight * batch.surrogates).sum() + batch.auxiliary, after

        found.append(grad(loss, has_aux=True)(theta))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


BITS: dict[str, Estimator] = {
    "score": Score(),
    "leave one out": Score(LeaveOneOut()),
    "moving average": Score(MovingAverage(0.5)),
    "optimal": Score(Optimal()),
    "taylor": Score(Taylor(lambda x: torch.cos(x.sum()))),
    "regression": Score(LeaveOneOut() + Regression(lambda x: x.sum(), lambda d: d.mean.sum())),
    "arm": ARM(),
    "disarm": DisARM(),
    "antithetic": Antithetic(DisARM()),
    "antithetic probes": Antithetic(MeasureValued()),
    "measure": MeasureValued(),
    "enumerate": Enumerate(),
    "multisample": MultiSample(3),
    "rebar": REBAR(0.7, 0.5),
    "relax": RELAX(lambda z: torch.tanh(z @ (1 + LOGITS)).sum()),
    "dice": DiCE(0.3),
    "gumbel": GumbelSoftmax(0.5),
    "straight through": StraightThrough(),
}


@pytest.mark.parametrize("name", BITS)
def test_every_estimator_either_way(name: str) -> None:
    def program(theta: Mapping[str, Tensor], s: Sites, x: Tensor) -> None:
        b = s.sample("b", Bernoulli(logits=theta["a"] * x), BITS[name])
        s.cost("fit", torch.cos((b * (1 + LOGITS)).sum(-1) + x[..., 0]))
        s.cost("own", (theta["m"] * x).sum(-1), parents=())

    both(program, 2, (DATA,))
    if name not in ("leave one out", "optimal", "regression"):  # fitted to other samples
        both(program, 1, (DATA,))


def dependent(first: Estimator, second: Estimator) -> Any:
    def program(theta: Mapping[str, Tensor], s: Sites, x: Tensor | None = None) -> None:
        b = s.sample("b", Bernoulli(logits=theta["a"]), first)
        s.cost("early", b.sum(-1) * theta["m"][0])
        z = s.sample("z", Normal(theta["m"] * b, theta["s"].exp()), Pathwise())
        c = s.sample("c", Bernoulli(logits=z[..., :2] + theta["a"][:2]), second, parents=("z",))
        s.cost("late", (c.sum(-1) - z.sum(-1)) ** 2 + (0 if x is None else (x * b).sum(-1)))
        s.cost("of z", z.square().sum(-1), parents=("z",))

    return program


PAIRS = [
    (DisARM(), ARM()),
    (MeasureValued(), DisARM()),
    (DisARM(), MeasureValued()),
    (Enumerate(), Score(LeaveOneOut())),
    (Score(), Enumerate()),
    (REBAR(1.0, 0.5), DisARM()),
    (Antithetic(MeasureValued()), REBAR(0.5, 1.0)),
    (MultiSample(2), RELAX(lambda z: torch.sin(z).sum())),
]


@pytest.mark.parametrize("k", range(len(PAIRS)))
def test_dependent_sites_either_way(k: int) -> None:
    both(dependent(*PAIRS[k]), 3)
    both(dependent(*PAIRS[k]), 2, (DATA,))


LAWS: dict[str, Any] = {
    "normal": lambda t, x: Normal(t["m"] * x, t["s"].exp()),
    "independent": lambda t, x: td.Independent(Normal(t["m"] * x, t["s"].exp()), 1),
    "log-normal": lambda t, x: td.LogNormal(t["m"] * x, t["s"].exp()),
    "matrix": lambda t, x: td.MultivariateNormal(
        t["m"] * x, scale_tril=torch.diag(t["s"].exp()) + 0.1 * torch.tril(t["m"][:, None] * t["a"], -1)
    ),
    "gamma": lambda t, x: td.Gamma((t["m"] * x).exp(), t["s"].exp()),
    "beta": lambda t, x: td.Beta((t["m"] * x).exp(), t["s"].exp()),
    "dirichlet": lambda t, x: td.Dirichlet((t["m"] * x).exp()),
    "student": lambda t, x: td.StudentT(3 + t["a"] ** 2, t["m"] * x, t["s"].exp()),
    "mixture": lambda t, x: td.MixtureSameFamily(
        Categorical(logits=t["a"]), Normal(t["m"] * x, t["s"].exp())
    ),
    "affine": lambda t, x: td.TransformedDistribution(
        Normal(t["m"], 1.0), [td.transforms.AffineTransform(t["a"] * x, t["s"].exp())]
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", [Pathwise(), MultiSample(2)], ids=["broadcasts", "mapped"])
@pytest.mark.parametrize("name", LAWS)
def test_every_law_either_way(name: str, rule: Estimator) -> None:
    def program(theta: Mapping[str, Tensor], s: Sites, x: Tensor) -> None:
        d = LAWS[name](theta, x)
        v = s.sample("v", d, rule)
        own = len(d.event_shape) or (0 if name == "mixture" else 1)
        s.cost("sine", torch.sin(v).sum(-1) if own else torch.sin(v))

    both(program, 2, (DATA,))


def test_classes_either_way() -> None:
    def program(theta: Mapping[str, Tensor], s: Sites, x: Tensor) -> None:
        k = s.sample("k", Categorical(logits=theta["a"] * x), Enumerate())
        h = s.sample("h", OneHotCategorical(logits=theta["m"] + theta["a"] * k[..., None]), REBAR(1.0, 0.5))
        w = s.sample("w", Categorical(logits=theta["m"] + h), MultiSample(2))
        s.cost("table", (h * x).sum(-1) * theta["s"][k] + theta["a"][w])

    both(program, 2, (DATA,))


def test_transforms_and_compiled_code() -> None:
    program = dependent(DisARM(), Enumerate())
    E = Expectation(program, 2, batched=True)
    state = E.init(THETA, (DATA,))
    noises = E.noises(Independent(2), state, data=(DATA,))

    def loss(theta: Mapping[str, Tensor]) -> Tensor:
        return E.evaluate(theta, noises, state, data=(DATA,)).surrogates.mean()

    plain = grad(loss)(THETA)
    torch.testing.assert_close(jacrev(loss)(THETA), plain)
    many = vmap(grad(loss))({k: torch.stack([v, v - 0.3]) for k, v in THETA.items()})
    torch.testing.assert_close({k: v[0] for k, v in many.items()}, plain)
    torch.testing.assert_close({k: v[1] for k, v in many.items()}, grad(loss)({k: v - 0.3 for k, v in THETA.items()}))
    leaves = {k: v.clone().requires_grad_() for k, v in THETA.items()}
    with without_validation():
        torch.compile(loss, backend="aot_eager", fullgraph=True)(leaves).backward()
    torch.testing.assert_close({k: v.grad for k, v in leaves.items()}, plain)


def test_second_derivatives_and_autocast() -> None:
    def program(theta: Tensor, s: Sites, x: Tensor) -> None:
        z = s.sample("z", Normal(theta * x, 0.5), Pathwise())
        b = s.sample("b", Bernoulli(logits=z), Enumerate())
        s.cost("cube", ((z * b).sum(-1)) ** 3)

    def bent(batched: bool, th: Tensor) -> Tensor:
        E = Expectation(program, 3, batched)
        state = E.init(th, (DATA,))
        return hessian(lambda v: E.surrogate(v, Independent(0), state, data=(DATA,))[0])(th)

    torch.testing.assert_close(bent(True, LOGITS), bent(False, LOGITS))
    net = torch.nn.Linear(3, 3)

    def with_net(module: Any, s: Sites, x: Tensor) -> None:
        b = s.sample("b", Bernoulli(logits=module(x)), ARM())
        s.cost("cost", module(b).square().sum(-1))

    E = Expectation(with_net, batched=True)
    state = E.init(net, (DATA.float(),))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, _ = E.surrogate(net, Independent(0), state, data=(DATA.float(),))
    loss.backward()
    assert net.weight.grad is not None
    assert bool(torch.isfinite(net.weight.grad).all())


def test_the_axes_inside_a_distribution() -> None:
    d = td.TransformedDistribution(Normal(torch.zeros(2, 3), 1.0), [td.transforms.AffineTransform(torch.ones(3), 2.0)])
    axes = axes_of(d)
    assert (axes["base_dist.loc"], axes["transforms.0.loc"], axes[""]) == (2, 1, 2)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("sum", "cost 'c' is another one when samples run together"),
        ("index", "does not broadcast|another one"),
        ("vector", r"cost 'c' has the axes \(3, 2, 3\)"),
        ("reshape", "does not broadcast over axes in front"),
        ("mean over data", "another one when samples run together"),
    ],
)
def test_programs_that_mix_samples_are_refused(kind: str, words: str) -> None:
    def program(theta: Tensor, s: Sites, x: Tensor) -> None:
        z = s.sample("z", Normal(theta * x, 1.0), Pathwise())
        if kind == "sum":
            value = z.sum()
        elif kind == "index":
            value = z[0] * z[1]
        elif kind == "vector":
            value = z * torch.ones(3, dtype=z.dtype) if z.ndim > 1 else z.sum()
        elif kind == "reshape":
            value = z.reshape(3).sum(-1)
        else:
            value = z.sum(-1) - (x.mean(0).sum() if x.ndim > 1 else x.sum())
        s.cost("c", value)

    Expectation(program).init(LOGITS, (DATA,))
    with pytest.raises(ValueError, match=words):
        Expectation(program, batched=True).init(LOGITS, (DATA,))
