"""Gradient estimators: variance x cost, and what the interpreter costs.

- gaussian: E f(x), x ~ N(1, 0.7^2), f = (x - 3)^2, cos 2x, exp(-x / 2); the exact variance (quadrature over the noise)
  of d/dmu and d/dsigma summed, times the evaluations of f that one estimate takes;
- toy: 200 bits, f = sum_i (b_i - 0.499)^2 / 200 + cos(projection + 0.7) (not separable); variance of the gradient
  from `--repeats` batches with its 95% interval, times evaluations;
- vae: 200 latent bits, one linear layer each way, the binarised digits of scikit-learn; variance of the encoder's
  gradient (one batch of 100 images, 100 draws of the noise) at the start and after `--updates` of Adam, and the
  negative bound over the last 50 updates (training images, one seed);
- overhead: the interpreter against the same estimator (DisARM) written by hand for this VAE, interleaved, median ratio
  of the time of a step (forward and backward; noise given to both, and noise drawn by each from the same source).

    python benchmarks/gradients.py             # writes benchmarks/results/gradients.json, docs/results/gradients.md
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from lowvar import __version__
from lowvar.gradients import (
    ARM,
    REBAR,
    RELAX,
    Antithetic,
    DisARM,
    Estimator,
    Expectation,
    LeaveOneOut,
    MeasureValued,
    MultiSample,
    Pathwise,
    Score,
    Sites,
    diagnose,
)
from lowvar.process import Independent
from lowvar.testing import QuadratureRule, exact_moments

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gradients.json"
TABLE = ROOT / "docs" / "results" / "gradients.md"
Row = dict[str, Any]


# --------------------------------------------------------------------------------------------------------- gaussian

FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "(x - 3)^2": lambda x: (x - 3) ** 2,
    "cos 2x": lambda x: torch.cos(2 * x),
    "exp(-x/2)": lambda x: torch.exp(-x / 2),
}


def gaussian() -> list[Row]:
    rows = []
    for label, f in FUNCTIONS.items():
        for name, rule, n in (
            ("Pathwise", Pathwise(), 1),
            ("Antithetic(Pathwise)", Antithetic(Pathwise()), 1),
            ("MeasureValued", MeasureValued(), 1),
            ("Score", Score(), 1),
            ("Score(LeaveOneOut), n = 2", Score(LeaveOneOut()), 2),
        ):

            def program(theta: Tensor, s: Sites, rule: Estimator = rule, f: Any = f) -> None:
                s.cost("f", f(s.sample("x", Normal(theta[0], theta[1]), rule)))

            theta = torch.tensor([1.0, 0.7], dtype=torch.float64)
            found = exact_moments(program, theta, n=n, rule=QuadratureRule(60, 40))
            cost = n * len(Expectation(program, n).init(theta).worlds.choices)
            variance = float(found.variance.sum())
            rows.append({"f": label, "estimator": name, "variance": variance, "cost": cost, "bias": found.bias})
    return rows


# -------------------------------------------------------------------------------------------------------------- toy


def control() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(200, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))


def binary(learned: torch.nn.Module) -> dict[str, tuple[Estimator, int]]:
    return {
        "Score": (Score(), 1),
        "Score(LeaveOneOut), n = 2": (Score(LeaveOneOut()), 2),
        "MultiSample(2)": (MultiSample(2), 1),
        "ARM": (ARM(), 1),
        "DisARM": (DisARM(), 1),
        "REBAR": (REBAR(1.0, 0.5), 1),
        "RELAX": (RELAX(learned), 1),
    }


def toy(repeats: int) -> list[Row]:
    direction = torch.sin(torch.arange(200.0) * 1.7)
    logits, rows = torch.linspace(-1.5, 1.5, 200), []
    for name, (rule, n) in binary(control()).items():

        def program(theta: Tensor, s: Sites, rule: Estimator = rule) -> None:
            b = s.sample("b", Bernoulli(logits=theta), rule)
            s.cost("f", (b - 0.499).square().mean() + torch.cos(b @ direction / 5 + 0.7))

        E = Expectation(program, n)
        found = diagnose(E, logits, Independent(0), E.init(logits), repeats=repeats)
        rows.append(
            {"estimator": name, "variance": found.variance, "low": found.low, "high": found.high, "cost": found.cost}
        )
    return rows


# -------------------------------------------------------------------------------------------------------------- vae


def layers(inputs: int, hidden: int, outputs: int) -> torch.nn.Module:
    if not hidden:
        return torch.nn.Linear(inputs, outputs)
    return torch.nn.Sequential(torch.nn.Linear(inputs, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, outputs))


class Autoencoder(torch.nn.Module):
    def __init__(self, hidden: int = 0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.decoder = layers(64, hidden, 200), layers(200, hidden, 64)
        self.prior = torch.nn.Parameter(torch.zeros(200))

    def nll(self, b: Tensor, x: Tensor) -> Tensor:
        fit = torch.nn.functional.binary_cross_entropy_with_logits
        out = self.decoder(b)
        return fit(out, x.expand_as(out), reduction="none").sum(-1)

    def kl(self, logits: Tensor) -> Tensor:
        p, log = torch.sigmoid(logits), torch.nn.functional.logsigmoid
        own = p * log(logits) + (1 - p) * log(-logits)
        return (own - p * log(self.prior) - (1 - p) * log(-self.prior)).sum(-1)


def program_of(rule: Estimator) -> Callable[..., None]:
    def program(net: Autoencoder, s: Sites, x: Tensor) -> None:
        logits = net.encoder(x)
        b = s.sample("b", Bernoulli(logits=logits), rule)
        s.cost("nll", net.nll(b, x))
        s.cost("kl", net.kl(logits), parents=())

    return program


def digits() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits(return_X_y=True)[0] > 7.5, dtype=torch.float32)


def encoder_variance(net: Autoencoder, E: Expectation, state: Any, x: Tensor, draws: int = 100) -> float:
    rows = []
    for step in range(draws):
        loss, _, _ = E.surrogate(net, Independent(99), state, step=step, data=(x,))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.encoder.parameters()))]))
    return float(torch.stack(rows).double().var(0).sum())


def vae(updates: int) -> list[Row]:
    x, rows = digits(), []
    for name in binary(control()):
        net, learned = Autoencoder(), control()
        rule, n = binary(learned)[name]
        E = Expectation(program_of(rule), n)
        batch = x[:100]
        state = E.init(net, (batch,))
        start = encoder_variance(net, E, state, batch)
        optimiser = torch.optim.Adam([{"params": net.parameters(), "lr": 3e-3}, {"params": learned.parameters()}])
        losses, begin = [], time.perf_counter()
        for step in range(updates):
            some = x[(torch.arange(100) + 100 * step) % len(x)]
            loss, state, info = E.surrogate(net, Independent(0), state, step=step, data=(some,))
            optimiser.zero_grad()
            (loss + info.auxiliary).backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        seconds = (time.perf_counter() - begin) / updates
        end = encoder_variance(net, E, state, batch)
        last = losses[-50:]
        rows.append(
            {
                "estimator": name,
                "variance_start": start,
                "variance_end": end,
                "cost": n * len(state.worlds.choices),
                "bound": statistics.mean(last),
                "bound_se": statistics.stdev(last) / math.sqrt(len(last)),
                "seconds": seconds,
            }
        )
    return rows


# --------------------------------------------------------------------------------------------------------- overhead


def by_hand(net: Autoencoder, x: Tensor, u: Tensor) -> Tensor:
    """DisARM for the VAE, (B, 200) uniform numbers."""
    logits = net.encoder(x)
    p = torch.sigmoid(logits).detach()
    b = torch.stack([(u > 1 - p).float(), (u < p).float()])
    f = net.nll(b, x)
    weight = 0.5 * (b[0] - b[1]) * torch.sigmoid(logits.detach().abs())
    term = (weight * (logits - logits.detach())).sum(-1)
    return (f.mean(0) + (f[0] - f[1]).detach() * term + net.kl(logits)).mean()


def overhead(rounds: int) -> list[Row]:
    return [row for hidden, batch in ((0, 100), (512, 256)) for row in _overhead(rounds, hidden, batch)]


def _overhead(rounds: int, hidden: int, batch: int) -> list[Row]:
    net, x = Autoencoder(hidden), digits()[:batch]
    E = Expectation(program_of(DisARM()))
    state = E.init(net, (x,))
    source = Independent(0)

    def mine(given: Any) -> Tensor:
        noises = E.noises(source, state, data=(x,)) if given is None else given
        return E.evaluate(net, noises, state, data=(x,)).surrogates.mean()

    def hand(given: Any) -> Tensor:
        u = source.uniform(range(batch), (200,)) if given is None else given["b"]["u"][:, 0]
        return by_hand(net, x, u)

    rows = []
    for label, given in (("noise given", E.noises(source, state, data=(x,))), ("noise drawn", None)):
        times: dict[str, list[float]] = {"mine": [], "hand": []}
        grads = {}
        for k in range(rounds + 5):
            for name, run in (("mine", mine), ("hand", hand)) if k % 2 else (("hand", hand), ("mine", mine)):
                net.zero_grad()
                begin = time.perf_counter()
                run(given).backward()
                if k >= 5:
                    times[name].append(time.perf_counter() - begin)
                grads[name] = next(net.encoder.parameters()).grad
        ratios = sorted(a / b for a, b in zip(times["mine"], times["hand"], strict=True))
        rows.append(
            {
                "row": f"{label}, {f'hidden layers of {hidden}' if hidden else 'no hidden layer'}, batch {batch}",
                "ratio": statistics.median(ratios),
                "low": ratios[len(ratios) // 4],
                "high": ratios[3 * len(ratios) // 4],
                "ms_hand": 1e3 * statistics.median(times["hand"]),
                "same": bool(torch.allclose(grads["mine"], grads["hand"], atol=1e-5)),
            }
        )
    return rows


# ------------------------------------------------------------------------------------------------------------ report


def tables(found: Mapping[str, Any]) -> str:
    lines = ["| f | estimator | variance | evaluations | variance x evaluations |", "|---|---|---|---|---|"]
    for r in found["gaussian"]:
        lines.append(
            f"| {r['f']} | {r['estimator']} | {r['variance']:.3g} | {r['cost']} | {r['variance'] * r['cost']:.3g} |"
        )
    lines += ["", "| 200 bits | variance | 95% | evaluations | variance x evaluations |", "|---|---|---|---|---|"]
    for r in found["toy"]:
        lines.append(
            f"| {r['estimator']} | {r['variance']:.3g} | {r['low']:.3g} to {r['high']:.3g} | {r['cost']:.0f} | "
            f"{r['variance'] * r['cost']:.3g} |"
        )
    lines += [
        "",
        "| VAE, 200 bits | variance, start | variance, end | evaluations | negative bound, nats | ms a step |",
        "|---|---|---|---|---|---|",
    ]
    for r in found["vae"]:
        lines.append(
            f"| {r['estimator']} | {r['variance_start']:.3g} | {r['variance_end']:.3g} | {r['cost']} | "
            f"{r['bound']:.2f} ± {1.96 * r['bound_se']:.2f} | {1e3 * r['seconds']:.1f} |"
        )
    lines += ["", "| interpreter / by hand | median | quartiles | by hand, ms |", "|---|---|---|---|"]
    for r in found["overhead"]:
        lines.append(f"| {r['row']} | {r['ratio']:.2f} | {r['low']:.2f} to {r['high']:.2f} | {r['ms_hand']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "version": __version__,
        "date": dt.date.today().isoformat(),
        "machine": f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "gaussian": gaussian(),
        "toy": toy(options.repeats),
        "overhead": overhead(options.rounds),
        "vae": vae(options.updates),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    text = tables(found)
    if options.out == RESULTS:
        TABLE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
