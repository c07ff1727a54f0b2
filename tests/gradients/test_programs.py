"""The interpreter: values, gradients, transforms, data, modules, Rao-Blackwellisation, errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal
from torch.func import functional_call, grad, hessian, jacrev, vmap

from lowvar.gradients import (
    ARM,
    DiCE,
    DisARM,
    Enumerate,
    Expectation,
    LeaveOneOut,
    MovingAverage,
    MultiSample,
    Pathwise,
    Score,
    Sites,
)
from lowvar.gradients.expectation import without_validation
from lowvar.gradients.worlds import grow
from lowvar.process import Independent
from lowvar.testing import exact_moments


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def square(theta: Tensor, s: Sites) -> None:
    x = s.sample("x", Normal(theta, 0.7), Pathwise())
    s.cost("square", (x - 1).square().sum())


def mixed(theta: Mapping[str, Tensor], s: Sites) -> None:
    z = s.sample("z", Normal(theta["m"], theta["s"].exp()), Pathwise())
    b = s.sample("b", Bernoulli(logits=theta["a"] + z), DisARM())
    c = s.sample("c", Categorical(logits=theta["w"] * b.sum() + z.sum()), Enumerate())
    y = s.sample("y", Normal(b * theta["m"] + c, 1.0), Score())
    s.cost("all", (b.sum() - z.sum()) ** 2 + c * z.sum() + y[0] * b[1])
    s.cost("own", z.square().sum(), parents=("z",))


THETA = {"m": f64(0.2, -0.4), "s": f64(-0.3, 0.1), "a": f64(1.0, -0.5), "w": f64(0.5, -1.0, 0.3)}


def test_hand_written_gradient_is_the_same() -> None:
    E, theta = Expectation(square, n=16), f64(0.3, -1.0)
    state = E.init(theta)
    leaf = theta.clone().requires_grad_()
    loss, _, info = E.surrogate(leaf, Independent(3), state)
    loss.backward()
    z = Independent(3).normal(range(16), (2,), dtype=torch.float64)
    x = theta + 0.7 * z
    assert torch.allclose(info.values, (x - 1).square().sum(1))
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, (2 * (x - 1)).mean(0), atol=1e-14)


def test_value_is_the_cost_and_calls_are_pure() -> None:
    E = Expectation(mixed, n=8)
    state = E.init(THETA)
    loss, _, info = E.surrogate(THETA, Independent(0), state)
    again, _, _ = E.surrogate(THETA, Independent(0), state)
    other, _, _ = E.surrogate(THETA, Independent(0), state, step=1)
    assert torch.equal(loss, again)
    assert not torch.equal(loss, other)
    assert torch.allclose(loss, info.values.mean(), atol=1e-14)
    assert set(info.costs) == {"all", "own"}
    assert info.worlds == 6  # two antithetic bits, three classes
    assert torch.distributions.Distribution._validate_args  # left as it was


def test_mixed_program_is_certified() -> None:
    certificate = exact_moments(mixed, THETA, n=1)
    assert certificate.holds()
    assert certificate.nodes > 1000


def test_transforms_agree_with_backward() -> None:
    E = Expectation(mixed, n=4)
    state = E.init(THETA)

    def loss(theta: Mapping[str, Tensor]) -> Tensor:
        return E.surrogate(theta, Independent(1), state)[0]

    g = grad(loss)(THETA)
    j = jacrev(loss)(THETA)
    leaves = {k: v.clone().requires_grad_() for k, v in THETA.items()}
    loss(leaves).backward()
    many = vmap(grad(loss))({k: torch.stack([v, v + 0.1]) for k, v in THETA.items()})
    other = grad(loss)({k: v + 0.1 for k, v in THETA.items()})
    for k, leaf in leaves.items():
        assert leaf.grad is not None
        assert torch.allclose(g[k], leaf.grad, atol=1e-13)
        assert torch.allclose(j[k], leaf.grad, atol=1e-13)
        assert torch.allclose(many[k], torch.stack([g[k], other[k]]), atol=1e-13)


@pytest.mark.parametrize("rule", [Pathwise(), DiCE()])
def test_hessian_of_a_cube_is_exact_in_expectation(rule: Any) -> None:
    """E x^3, x ~ N(mu, s^2): 6 mu and 6 s; exact by Gauss-Hermite over the noise."""

    def program(theta: Tensor, s: Sites) -> None:
        s.cost("cube", s.sample("x", Normal(theta[0], theta[1]), rule) ** 3)

    from lowvar.testing.quadrature import hermite

    theta, E = f64(0.8, 0.6), Expectation(program)
    state = E.init(theta)
    z, w = hermite(12)

    def at(z: Tensor) -> Tensor:
        return hessian(lambda th: E.evaluate(th, {"x": {"z": z[None]}}, state).surrogates.mean())(theta)

    mean = torch.tensordot(w, torch.stack([at(node) for node in z]), 1)
    truth = torch.tensor([[6 * 0.8, 6 * 0.6], [6 * 0.6, 6 * 0.8]], dtype=torch.float64)
    assert torch.allclose(mean, truth, atol=1e-10)


def test_enumeration_is_exact_for_any_order() -> None:
    def program(theta: Tensor, s: Sites) -> None:
        b = s.sample("b", Bernoulli(logits=theta), Enumerate())
        s.cost("product", b.prod() + theta[0] * b[1])

    theta, E = f64(0.3, -0.8), Expectation(program)
    state = E.init(theta)
    closed = hessian(lambda th: torch.sigmoid(th).prod() + th[0] * torch.sigmoid(th[1]))(theta)
    mine = hessian(lambda th: E.surrogate(th, Independent(0), state)[0])(theta)
    assert torch.allclose(mine, closed, atol=1e-14)


def test_data_go_in_one_by_one_and_noise_belongs_to_the_datum() -> None:
    def program(theta: Tensor, s: Sites, x: Tensor) -> None:
        z = s.sample("z", Normal(theta * x, 1.0), Pathwise())
        s.cost("square", (z - x).square().sum())

    x = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    E, theta = Expectation(program, n=4), f64(0.3, -0.5)
    state = E.init(theta, (x,))
    loss, _, info = E.surrogate(theta, Independent(0), state, data=(x,))
    z = theta * x[:, None] + Independent(0).normal(range(12), (2,), dtype=torch.float64).reshape(3, 4, 2)
    by_hand = (z - x[:, None]).square().sum(-1).T
    assert info.values.shape == (4, 3)
    assert torch.allclose(info.values, by_hand)
    assert torch.allclose(loss, by_hand.mean())


def test_modules_and_their_parameters() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 2).double()

    def program(module: Any, s: Sites, x: Tensor) -> None:
        b = s.sample("b", Bernoulli(logits=module(x)), MultiSample(3))
        s.cost("cost", (b.sum() - 0.4) ** 2 + module(b).sum())

    x = torch.arange(4, dtype=torch.float64).reshape(2, 2)
    E = Expectation(program, n=2)
    state = E.init(net, (x,))
    loss, _, _ = E.surrogate(net, Independent(0), state, data=(x,))
    loss.backward()
    parameters = {k: v.detach() for k, v in net.named_parameters()}
    g = grad(lambda th: E.surrogate(lambda x: functional_call(net, th, (x,)), Independent(0), state, data=(x,))[0])(
        parameters
    )
    for k, p in net.named_parameters():
        assert p.grad is not None
        assert float(p.grad.abs().max()) > 0
        assert torch.allclose(p.grad, g[k], atol=1e-13)


def test_a_cost_without_the_site_does_not_reach_it() -> None:
    """Rao-Blackwell: same mean, less variance; a cost given before the site needs no parents to be left out."""

    def with_parents(parents: tuple[str, ...] | None) -> Any:
        def program(theta: Tensor, s: Sites) -> None:
            a = s.sample("a", Bernoulli(logits=theta[0]), Score())
            b = s.sample("b", Bernoulli(logits=theta[1]), Score(), parents=())
            s.cost("of a", 5 * a, parents=("a",) if parents is None else parents)
            s.cost("of both", a * b)

        return program

    theta = f64(0.3, -0.7)
    less, more = (exact_moments(with_parents(p), theta) for p in (None, ("a", "b")))
    assert less.holds()
    assert more.holds()
    assert float(less.variance[1]) < 0.2 * float(more.variance[1])

    def early(theta: Tensor, s: Sites) -> None:
        a = s.sample("a", Bernoulli(logits=theta[0]), Score())
        s.cost("of a", 5 * a)
        b = s.sample("b", Bernoulli(logits=theta[1]), Score(), parents=())
        s.cost("of both", a * b)

    assert torch.equal(exact_moments(early, theta).variance, less.variance)


def test_markov_chain_of_mixed_estimators() -> None:
    """x' = a x + s z, three steps, cost (x_3 - 1)^2: pathwise, score and both, all exact."""

    def of(estimators: Any) -> Any:
        def program(theta: Tensor, s: Sites) -> None:
            x = s.markov("x", lambda k, x: Normal(theta[0] * x + 0.1 * k, theta[1]), 3, f64(0.7)[0], estimators)
            s.cost("square", (x - 1) ** 2)

        return program

    theta = f64(0.6, 0.5)
    rules: list[Any] = [
        Pathwise(),
        Score(),
        [Score(), Pathwise(), Score()],
        lambda k: Pathwise() if k == 2 else Score(),
    ]
    certificates = [exact_moments(of(rule), theta) for rule in rules]
    assert all(c.holds() for c in certificates)
    assert float(certificates[0].variance[0]) < float(certificates[3].variance[0]) < float(certificates[1].variance[0])


def test_worlds_of_probes_do_not_multiply() -> None:
    worlds = grow([("main", "probe"), ("main", "live"), ("main", "probe")])
    assert worlds.choices[: worlds.full] == ((0, 0, 0), (0, 1, 0))
    assert set(worlds.choices[worlds.full :]) == {(0, 0, 1), (0, 1, 1), (1, 0, 0)}


def test_state_is_passed_and_saved() -> None:
    def program(theta: Tensor, s: Sites) -> None:
        x = s.sample("x", Normal(theta, 1.0), Score(MovingAverage(0.5)))
        s.cost("square", x**2)

    E, theta = Expectation(program, n=4), f64(1.0)[0]
    state = E.init(theta)
    _, after, info = E.surrogate(theta, Independent(0), state)
    assert float(state.sites["x"]["weight"]) == 0
    assert float(after.sites["x"]["mean"]) == pytest.approx(0.5 * float(info.values.mean()))
    restored = state.restored(after.state())
    one = E.surrogate(theta, Independent(0), after, step=1)[0]
    assert torch.equal(one, E.surrogate(theta, Independent(0), restored, step=1)[0])
    with pytest.raises(ValueError, match="checkpoint"):
        state.restored({})


def test_compiles_in_one_graph() -> None:
    E = Expectation(mixed, n=4)
    state, noise = E.init(THETA), Independent(0)
    noises = E.noises(noise, state)

    def loss(theta: Mapping[str, Tensor]) -> Tensor:
        return E.evaluate(theta, noises, state).surrogates.mean()

    leaves = {k: v.clone().requires_grad_() for k, v in THETA.items()}
    with without_validation():
        torch.compile(loss, backend="aot_eager", fullgraph=True)(leaves).backward()
    plain = grad(loss)(THETA)
    for k, leaf in leaves.items():
        assert leaf.grad is not None
        assert torch.allclose(leaf.grad, plain[k], atol=1e-13)


def test_baselines_made_inside_compiled_code() -> None:
    def program(theta: Tensor, s: Sites) -> None:
        b = s.sample("b", Bernoulli(logits=theta), Score(LeaveOneOut() + MovingAverage(0.5)))
        s.cost("cosine", torch.cos(b.sum() + 0.3))

    theta, E = f64(0.2, -0.7), Expectation(program, n=4)
    state = E.init(theta)
    noises = E.noises(Independent(0), state)
    leaf = theta.clone().requires_grad_()
    with without_validation():
        compiled = torch.compile(
            lambda th: E.evaluate(th, noises, state).surrogates.mean(), backend="aot_eager", fullgraph=True
        )
        compiled(leaf).backward()
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, grad(lambda th: E.evaluate(th, noises, state).surrogates.mean())(theta))


def test_autocast() -> None:
    net = torch.nn.Linear(3, 3)

    def program(theta: Any, s: Sites) -> None:
        b = s.sample("b", Bernoulli(logits=theta(torch.ones(3))), ARM())
        s.cost("cost", theta(b).square().sum())

    E = Expectation(program, n=4)
    state = E.init(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, _ = E.surrogate(net, Independent(0), state)
    loss.backward()
    assert net.weight.grad is not None
    assert bool(torch.isfinite(net.weight.grad).all())


# ------------------------------------------------------------------------------------------------------------ bad input


def broken(kind: str) -> Any:
    def program(theta: Tensor, s: Sites) -> None:
        x = s.sample("x", Normal(theta, 1.0), Pathwise())
        if kind == "twice":
            s.sample("x", Normal(theta, 1.0), Pathwise())
        if kind == "parent":
            s.cost("c", x, parents=("y",))
        if kind == "vector":
            s.cost("c", x * torch.ones(3))
        if kind == "cost twice":
            s.cost("c", x)
            s.cost("c", x)
        if kind == "estimator":
            s.sample("y", Normal(theta, 1.0), "pathwise")  # pyright: ignore[reportArgumentType]
        if kind == "discrete":
            s.sample("y", Bernoulli(logits=theta), Pathwise())
        if kind == "unknown":
            s.sample("y", torch.distributions.Geometric(0.5), Score())
        if kind == "steps":
            s.markov("y", lambda k, y: Normal(y, 1.0), 3, x, [Score()])

    return program


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("twice", "sampled twice"),
        ("parent", "names the parent 'y'"),
        ("vector", r"shape \(3,\)"),
        ("cost twice", "given twice"),
        ("estimator", "give an Estimator"),
        ("discrete", "no pathwise derivative"),
        ("unknown", "cannot be drawn from explicit noise"),
        ("steps", "3 steps and 1 estimators"),
        ("no cost", "has no cost"),
    ],
)
def test_bad_programs(kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Expectation(broken(kind)).init(f64(1.0)[0])


def test_other_bad_input() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Expectation(square, n=0)

    def lonely(theta: Tensor, s: Sites) -> None:
        s.cost("c", s.sample("x", Normal(theta, 1.0), Score(LeaveOneOut())) ** 2)

    E, theta = Expectation(lonely), f64(1.0)[0]
    with pytest.raises(ValueError, match="give n >= 2"):
        E.surrogate(theta, Independent(0), E.init(theta))
    calls = []

    def fickle(theta: Tensor, s: Sites) -> None:
        calls.append(1)
        x = s.sample("x" if len(calls) == 1 else "y", Normal(theta, 1.0), Score())
        s.cost("c", x)

    E = Expectation(fickle)
    with pytest.raises(ValueError, match="init saw"):
        E.surrogate(theta, Independent(0), E.init(theta))
