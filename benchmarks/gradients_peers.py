"""Gradient estimators of storchastic 0.3.7 and pyro 1.9.2 on the problems of `gradients_problems.py`.

Run by an interpreter that has them (they are no dependencies of lowvar; storchastic is AGPL), on one thread:

    python -m venv --system-site-packages PEERS && PEERS/bin/pip install pyro-ppl==1.9.2 entmax pyaml
    PEERS/bin/pip install --no-deps storchastic==0.3.7
    PEERS/bin/python benchmarks/gradients_peers.py      # cells under build/benchmarks/gradients; read by gradients.py

pyro knows evidence bounds only: f is a factor of its model, whose other part is the guide with its parameters held
fixed (ratio 1), or, for the logistic regression, the prior. What an estimator evaluates is counted: rows given to f.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gradients_problems import Problem, problems
from torch import Tensor
from torch.distributions import Bernoulli, Normal

CACHE = Path(os.environ.get("LOWVAR_BENCHMARKS", Path(__file__).resolve().parents[1] / "build" / "benchmarks")) / (
    "gradients"
)
Gradient = Callable[[], Tensor]


class Counted:
    """f, counting the rows it was given."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        self.f, self.rows = f, 0

    def __call__(self, x: Tensor) -> Tensor:
        """f(x)."""
        value = self.f(x)
        self.rows += value.numel()
        return value


# ------------------------------------------------------------------------------------------------------- storchastic


def storchastic(problem: Problem, f: Counted) -> dict[str, Gradient]:
    import storch  # pyright: ignore[reportMissingImports]
    from storch import method as m  # pyright: ignore[reportMissingImports]

    d = len(problem.law(problem.theta).mean)  # elements of the site

    def of(make: Callable[[], Any]) -> Gradient:
        method = make()
        cost = storch.deterministic(lambda x: f(x.float()))

        def gradient() -> Tensor:
            theta = problem.theta.clone().requires_grad_()
            storch.reset()
            storch.add_cost(cost(method(problem.law(theta))), "f")
            storch.backward()
            problem.known(theta).backward()
            assert theta.grad is not None
            return theta.grad

        return gradient

    makers: dict[str, Callable[[], Any]] = {
        "ScoreFunction": lambda: m.ScoreFunction("z"),
        "ScoreFunction, moving average": lambda: m.ScoreFunction("z", baseline_factory="moving_average"),
        "ScoreFunction, batch average, n = 2": lambda: m.ScoreFunction(
            "z", n_samples=2, baseline_factory="batch_average"
        ),
    }
    if isinstance(problem.law(problem.theta), Bernoulli):
        makers |= {
            "ARM": lambda: m.ARM("z"),
            "DisARM": lambda: m.DisARM("z"),
            "REBAR": lambda: m.REBAR("z"),
            "RELAX": lambda: m.RELAX("z", in_dim=d),
            "RELAX, n = 2": lambda: m.RELAX("z", in_dim=d, n_samples=2),
        }
        if d <= 4:
            makers["Expect"] = lambda: m.Expect("z")
    else:
        makers["Reparameterization"] = lambda: m.Reparameterization("z")
    return {name: of(make) for name, make in makers.items()}


# -------------------------------------------------------------------------------------------------------------- pyro


def pyro_bounds(problem: Problem, f: Counted) -> dict[str, Gradient]:
    import pyro  # pyright: ignore[reportMissingImports]
    import pyro.distributions as dist  # pyright: ignore[reportMissingImports]
    from pyro.distributions.testing.fakes import NonreparameterizedNormal  # pyright: ignore[reportMissingImports]
    from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO  # pyright: ignore[reportMissingImports]

    discrete = isinstance(problem.law(problem.theta), Bernoulli)
    bayesian = problem.name.startswith("logistic")
    averaged = {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}}

    def site(theta: Tensor, pathwise: bool) -> Any:
        law = problem.law(theta)
        if isinstance(law, Bernoulli):
            return dist.Bernoulli(logits=law.logits).to_event(1)
        assert isinstance(law, Normal)
        return (dist.Normal if pathwise else NonreparameterizedNormal)(law.loc, law.scale).to_event(1)

    def of(bound: Any, pathwise: bool = True, infer: dict[str, Any] | None = None) -> Gradient:
        def model() -> None:
            prior = dist.Normal(torch.zeros(31), 1.0).to_event(1) if bayesian else site(problem.theta, pathwise)
            pyro.factor("f", -f(pyro.sample("z", prior)))

        def guide() -> None:
            pyro.sample("z", site(pyro.param("theta", problem.theta.clone()), pathwise), infer=infer or {})

        return stepped(bound, model, guide)

    def stepped(bound: Any, model: Any, guide: Any) -> Gradient:
        pyro.clear_param_store()

        def gradient() -> Tensor:
            bound.loss_and_grads(model, guide)
            theta = pyro.param("theta")
            found = theta.grad.clone()
            theta.grad = None
            return found

        return gradient

    def enumerated() -> Gradient:
        def draws(logits: Tensor, infer: dict[str, Any]) -> Tensor:
            each = [pyro.sample(f"b{i}", dist.Bernoulli(logits=v), infer=infer) for i, v in enumerate(logits)]
            return torch.stack(torch.broadcast_tensors(*each), -1)

        def model() -> None:
            pyro.factor("f", -f(draws(problem.theta, {})))

        def guide() -> None:
            draws(pyro.param("theta", problem.theta.clone()), {"enumerate": "parallel"})

        return stepped(TraceEnum_ELBO(max_plate_nesting=0, strict_enumeration_warning=False), model, guide)

    found = {
        "TraceGraph_ELBO": lambda: of(TraceGraph_ELBO(), False),
        "TraceGraph_ELBO, decaying average": lambda: of(TraceGraph_ELBO(), False, averaged),
    }
    if discrete and len(problem.theta) <= 4:
        found["TraceEnum_ELBO"] = enumerated
    if not discrete:
        found["Trace_ELBO, pathwise"] = lambda: of(Trace_ELBO())
    if bayesian:
        found["TraceMeanField_ELBO, pathwise"] = lambda: of(TraceMeanField_ELBO())
    return found  # pyright: ignore[reportReturnType]


# -------------------------------------------------------------------------------------------------------------- cells


def measured(gradient: Gradient, f: Counted, repeats: int, warm: int = 20) -> dict[str, Any]:
    """Mean and variance of each entry over `repeats` gradients, after some that fill moving averages."""
    torch.manual_seed(0)
    for _ in range(warm):
        gradient()
    f.rows = 0
    begin = time.process_time()
    rows = torch.stack([gradient().detach().double() for _ in range(repeats)])
    seconds = (time.process_time() - begin) / repeats
    square = (rows - rows.mean(0)).square().sum(1) * repeats / (repeats - 1)
    return {
        "mean": rows.mean(0).tolist(),
        "parameters": rows.var(0).tolist(),
        "variance": float(square.mean()),
        "half": 1.96 * float(square.std()) / repeats**0.5,
        "evaluations": f.rows / repeats,
        "ms": 1e3 * seconds,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    CACHE.mkdir(parents=True, exist_ok=True)
    for problem in problems().values():
        for library, listing in (("storchastic", storchastic), ("pyro", pyro_bounds)):
            f = Counted(problem.f)
            for name, made in listing(problem, f).items():
                file = CACHE / f"{library}, {problem.name}, {name}.json".replace("/", ":")
                if file.exists():
                    continue
                about: dict[str, Any] = {"problem": problem.name, "library": library, "estimator": name}
                try:
                    gradient = made() if library == "pyro" else made  # a store of parameters of its own
                    about |= measured(gradient, f, options.repeats)  # pyright: ignore[reportArgumentType]
                except Exception as reason:  # noqa: BLE001  a peer that does not run is a row of the table
                    about["refusal"] = f"{type(reason).__name__}: {reason}"[:200]
                file.write_text(json.dumps(about) + "\n")
                print(file.name, about.get("refusal", about.get("variance")), flush=True)


if __name__ == "__main__":
    main()
