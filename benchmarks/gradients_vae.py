"""A small binary VAE on the digits of scikit-learn, for `gradients.py`: training with each estimator, and overhead.

200 latent bits, one linear layer each way (or a hidden layer), images of 8 x 8 binarised at 7.5, 1497 to train on and
300 held out (a fixed permutation).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli

from lowvar.gradients import (
    ARM,
    REBAR,
    RELAX,
    DisARM,
    Estimator,
    Expectation,
    LeaveOneOut,
    Score,
    Sites,
)
from lowvar.process import Independent

__all__ = ["ESTIMATORS", "Autoencoder", "control", "digits", "overhead", "program_of", "train"]

Row = dict[str, Any]


def control(inputs: int = 200) -> torch.nn.Module:
    """The control variate that RELAX learns."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(inputs, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))


ESTIMATORS: dict[str, Callable[[torch.nn.Module], tuple[Estimator, int]]] = {
    "Score": lambda c: (Score(), 1),
    "Score(LeaveOneOut), n = 2": lambda c: (Score(LeaveOneOut()), 2),
    "ARM": lambda c: (ARM(), 1),
    "DisARM": lambda c: (DisARM(), 1),
    "REBAR": lambda c: (REBAR(1.0, 0.5), 1),
    "RELAX": lambda c: (RELAX(c), 1),
}


def layers(inputs: int, hidden: int, outputs: int) -> torch.nn.Module:
    """A linear layer, or two with a ReLU between."""
    if not hidden:
        return torch.nn.Linear(inputs, outputs)
    return torch.nn.Sequential(torch.nn.Linear(inputs, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, outputs))


class Autoencoder(torch.nn.Module):
    """Encoder, decoder and the prior's logits."""

    def __init__(self, hidden: int = 0, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.decoder = layers(64, hidden, 200), layers(200, hidden, 64)
        self.prior = torch.nn.Parameter(torch.zeros(200))

    def nll(self, b: Tensor, x: Tensor) -> Tensor:
        """-log p(x | b)."""
        fit = torch.nn.functional.binary_cross_entropy_with_logits
        out = self.decoder(b)
        return fit(out, x.expand_as(out), reduction="none").sum(-1)

    def kl(self, logits: Tensor) -> Tensor:
        """Divergence from the prior, closed."""
        p, log = torch.sigmoid(logits), torch.nn.functional.logsigmoid
        own = p * log(logits) + (1 - p) * log(-logits)
        return (own - p * log(self.prior) - (1 - p) * log(-self.prior)).sum(-1)


def program_of(rule: Estimator) -> Callable[..., None]:
    """The negative bound as a program, which broadcasts."""

    def program(net: Autoencoder, s: Sites, x: Tensor) -> None:
        logits = net.encoder(x)
        b = s.sample("b", Bernoulli(logits=logits), rule)
        s.cost("nll", net.nll(b, x))
        s.cost("kl", net.kl(logits), parents=())

    return program


@lru_cache
def digits() -> tuple[Tensor, Tensor]:
    """Images to train on and images held out."""
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits(return_X_y=True)[0] > 7.5, dtype=torch.float32)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[:1497], x[1497:]


def encoder_variance(net: Autoencoder, E: Expectation, state: Any, x: Tensor, draws: int = 50) -> float:
    """Of the encoder's gradient, summed over its parameters."""
    rows = []
    for step in range(draws):
        loss, _, _ = E.surrogate(net, Independent(99), state, step=step, data=(x,))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.encoder.parameters()))]))
    return float(torch.stack(rows).double().var(0).sum())


@torch.no_grad()
def negative_bound(net: Autoencoder, x: Tensor, draws: int = 20) -> float:
    """In nats an image, on fixed noise."""
    logits = net.encoder(x)
    u = Independent(7).uniform(range(len(x) * draws), (200,)).reshape(draws, len(x), 200)
    return float((net.nll((u > 1 - torch.sigmoid(logits)).float(), x) + net.kl(logits)).mean())


def train(name: str, seed: int, updates: int) -> Row:
    """Trains with one estimator: variance along the way, bounds at the end."""
    learned = control()
    rule, n = ESTIMATORS[name](learned)
    net, (x, held_out) = Autoencoder(seed=seed), digits()
    E = Expectation(program_of(rule), n, batched=True)
    state = E.init(net, (x[:100],))
    optimiser = torch.optim.Adam([{"params": net.parameters(), "lr": 3e-3}, {"params": learned.parameters()}])
    order = torch.Generator().manual_seed(seed)
    variance, seconds = [], 0.0
    for step in range(updates + 1):
        if step % (updates // 4) == 0:
            variance.append(encoder_variance(net, E, state, x[:100]))
        if step == updates:
            break
        begin = time.process_time()
        some = x[torch.randint(len(x), (100,), generator=order)]
        loss, state, info = E.surrogate(net, Independent(seed), state, step=step, data=(some,))
        optimiser.zero_grad()
        (loss + info.auxiliary).backward()
        optimiser.step()
        seconds += time.process_time() - begin
    return {
        "estimator": name,
        "seed": seed,
        "updates": updates,
        "variance": variance,
        "cost": n * len(state.worlds.choices),
        "train": negative_bound(net, x),
        "held_out": negative_bound(net, held_out),
        "ms": 1e3 * seconds / updates,
    }


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
    """A step of each way, interleaved: CPU time of the process, as other work shares the machine."""
    return [row for hidden, batch in ((0, 100), (512, 256)) for row in _overhead(rounds, hidden, batch)]


def _overhead(rounds: int, hidden: int, batch: int) -> list[Row]:
    net, x = Autoencoder(hidden), digits()[0][:batch]
    ways = {label: Expectation(program_of(DisARM()), batched=label == "batched") for label in ("mapped", "batched")}
    states = {label: E.init(net, (x,)) for label, E in ways.items()}
    noises, source = ways["mapped"].noises(Independent(0), states["mapped"], data=(x,)), Independent(0)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-5)

    def loss(way: str, given: bool) -> Tensor:
        if way == "hand":
            u = noises["b"]["u"][:, 0] if given else source.uniform(range(batch), (200,))
            return by_hand(net, x, u)
        E, state = ways[way], states[way]
        if given:
            return E.evaluate(net, noises, state, data=(x,)).surrogates.mean()
        return E.surrogate(net, source, state, data=(x,))[0]

    rows = []
    for label in ("gradient, noise given", "gradient, noise drawn", "training step (noise, gradient, Adam)"):
        times: dict[str, list[float]] = {way: [] for way in ("hand", "mapped", "batched")}
        grads: dict[str, Tensor] = {}
        for k in range(rounds + 5):
            order = list(times)[k % 3 :] + list(times)[: k % 3]
            for way in order:
                net.zero_grad()
                begin = time.process_time()
                loss(way, "given" in label).backward()
                if "Adam" in label:
                    optimiser.step()
                if k >= 5:
                    times[way].append(time.process_time() - begin)
                grads[way] = next(net.encoder.parameters()).grad.clone()  # pyright: ignore[reportOptionalMemberAccess]
        shape = f"hidden layers of {hidden}" if hidden else "no hidden layer"
        for way in ("mapped", "batched"):
            ratios = sorted(a / b for a, b in zip(times[way], times["hand"], strict=True))
            half = round(0.98 * len(ratios) ** 0.5)  # 95% of a median, by order statistics
            rows.append(
                {
                    "row": f"{label}, {shape}, batch {batch}",
                    "way": way,
                    "ratio": statistics.median(ratios),
                    "low": ratios[len(ratios) // 2 - half],
                    "high": ratios[len(ratios) // 2 + half],
                    "ms_hand": 1e3 * statistics.median(times["hand"]),
                    "same": "Adam" in label or bool(torch.allclose(grads[way], grads["hand"], atol=1e-5)),
                }
            )
    return rows
