r"""Post-hoc averages of the weights, of any length.

The power-function average with exponent gamma over updates 1 .. t weighs the weights theta(tau) as tau^gamma:

    theta_gamma(t) = beta theta_gamma(t - 1) + (1 - beta) theta(t),    beta = (1 - 1/t)^(gamma + 1).

Its length follows training; the profile's standard deviation relative to t is

    sigma_rel = ((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))^1/2.

Two averages (sigma_rel = 0.05 and 0.10) are tracked, and snapshots of them kept. As profiles they span a space in
which any other average can be fitted afterwards: with p_i(tau) the profile of snapshot i and p_r the wanted one,

    min_x || sum_i x_i p_i - p_r ||^2,    <p_a, p_b> = sum_tau p_a(tau) p_b(tau),    theta_r = sum_i x_i theta_i.

Here the profiles are those of the discrete recursion, p(tau) = (1 - beta_tau) prod_{k > tau} beta_k, so that a tracked
average is given back exactly; Karras et al. integrate the continuous ones. The coefficients sum to 1: a weight that
stands still stays. Label of use: the average changes what comes out of a run, never its gradient.

diffusers' EMAModel keeps the plain exponential average; this is for those whose length is chosen after training.

Source: Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", Sec. 3 and App. C.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PowerAverages", "Snapshot", "combine", "gamma_of", "profile", "reconstruct", "sigma_rel_of"]

_LARGEST = 1 / math.sqrt(12)  # gamma = 0, the uniform average


def sigma_rel_of(gamma: float) -> float:
    """The relative length of the average with an exponent gamma >= 0 (Karras et al. 2024, Eq. 123).

    Example:
        >>> round(sigma_rel_of(6.94), 4), round(sigma_rel_of(16.97), 4)
        (0.1, 0.05)
    """
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(sigma_rel: float) -> float:
    """The inverse of `sigma_rel_of`: the root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2 (Alg. 2).

    Raises:
        ValueError: if sigma_rel is not in (0, 12^-1/2].

    Example:
        >>> round(gamma_of(0.10), 2), round(gamma_of(0.05), 2)
        (6.94, 16.97)
    """
    if not 0 < sigma_rel <= _LARGEST + 1e-12:
        raise ValueError(f"sigma_rel is {sigma_rel}; give a length above 0 and at most 12^-1/2 = {_LARGEST:.4f}")
    low, high = 0.0, 1.0 / sigma_rel + 1.0
    for _ in range(200):  # sigma_rel falls with gamma; below 1 / (gamma + 2)
        middle = (low + high) / 2
        low, high = (middle, high) if sigma_rel_of(middle) > sigma_rel else (low, middle)
    return (low + high) / 2


def profile(gamma: float, updates: int, length: int) -> Tensor:
    """What the average after `updates` updates weighs updates 1 .. length with: (length,) float64, sum 1.

    Raises:
        ValueError: unless 1 <= updates <= length.

    Example:
        >>> [round(p, 12) for p in profile(0.0, 4, 5).tolist()]
        [0.25, 0.25, 0.25, 0.25, 0.0]
    """
    if not 1 <= updates <= length:
        raise ValueError(f"the average is of {updates} updates, the profile of {length}; need 1 <= updates <= length")
    tau = torch.arange(1, updates + 1, dtype=torch.float64)
    log_beta = (gamma + 1) * torch.log1p(-1 / tau)  # -inf at 1: the first update is all there is
    after = torch.cat([log_beta[1:].flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    found = torch.zeros(length, dtype=torch.float64)
    found[:updates] = -torch.expm1(log_beta) * torch.exp(after)
    return found


@dataclass(frozen=True)
class Snapshot:
    """A tracked average at one moment.

    Attributes:
        gamma: exponent.
        updates: t.
        weights: theta_gamma(t), by name.
    """

    gamma: float
    updates: int
    weights: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class PowerAverages:
    """Averages of several exponents, as a value.

    Attributes:
        gammas: exponents.
        updates: t so far.
        averages: an average an exponent, by name; empty before the first update.

    Example:
        >>> state = PowerAverages.of(sigma_rels=(0.05, 0.10))
        >>> for value in (1.0, 2.0):
        ...     state = state.updated({"w": torch.tensor(value)})
        >>> [round(float(a["w"]), 4) for a in state.averages]
        [2.0, 1.9959]
    """

    gammas: tuple[float, ...]
    updates: int = 0
    averages: tuple[Mapping[str, Tensor], ...] = ()

    def __post_init__(self) -> None:
        """Refuses exponents that are missing, negative or equal."""
        if not self.gammas or min(self.gammas) < 0 or len(set(self.gammas)) < len(self.gammas):
            raise ValueError(f"gammas are {self.gammas}; give at least one, all different and at least 0")

    @classmethod
    def of(cls, sigma_rels: Sequence[float] = (0.05, 0.10)) -> PowerAverages:
        """Averages of these relative lengths."""
        return cls(tuple(gamma_of(s) for s in sigma_rels))

    def updated(self, weights: Mapping[str, Tensor]) -> PowerAverages:
        """With the weights after another update; they are copied, in float32 or wider."""
        t = self.updates + 1
        wide = {k: v.detach().to(torch.promote_types(v.dtype, torch.float32)) for k, v in weights.items()}
        if t == 1:
            first = tuple({k: v.clone() for k, v in wide.items()} for _ in self.gammas)
            return PowerAverages(self.gammas, t, first)
        if any(wide.keys() != average.keys() for average in self.averages):
            raise ValueError("the weights have other names than before; a run's averages are of one network")
        new = []
        for gamma, average in zip(self.gammas, self.averages, strict=True):
            share = -math.expm1((gamma + 1) * math.log1p(-1 / t))
            new.append({k: torch.lerp(average[k], wide[k], share) for k in wide})
        return PowerAverages(self.gammas, t, tuple(new))

    def snapshots(self) -> list[Snapshot]:
        """The averages as they are now, to be kept; one an exponent."""
        return [Snapshot(g, self.updates, a) for g, a in zip(self.gammas, self.averages, strict=False)]

    def state(self) -> dict[str, Tensor]:
        """The state as tensors."""
        found = {f"{i}.{k}": v for i, average in enumerate(self.averages) for k, v in average.items()}
        return found | {"updates": torch.tensor(self.updates)}

    def restored(self, state: Mapping[str, Tensor]) -> PowerAverages:
        """The value whose `state` was given; exponents are this value's."""
        averages: list[dict[str, Tensor]] = [{} for _ in self.gammas]
        for key, value in state.items():
            number, _, name = key.partition(".")
            if key != "updates":
                averages[int(number)][name] = value
        updates = int(state["updates"])
        return PowerAverages(self.gammas, updates, tuple(averages) if updates else ())


def reconstruct(snapshots: Iterable[Snapshot], sigma_rel: float, updates: int | None = None) -> tuple[Tensor, float]:
    """Coefficients that make an average of any length, and how well its profile is met.

    Args:
        snapshots: kept averages; only those of at most `updates` updates are used.
        sigma_rel: relative length wanted.
        updates: t of the average wanted; default: of the newest snapshot.

    Returns:
        Coefficients (snapshots,) float64, 0 for those left out, and ||sum x p - p_r|| / ||p_r||.

    Raises:
        ValueError: if there is no snapshot to use, or sigma_rel is out of range.

    Example:
        >>> kept = [Snapshot(gamma_of(s), t, {}) for t in (10, 20) for s in (0.05, 0.10)]
        >>> x, error = reconstruct(kept, 0.10)
        >>> [abs(round(v, 6)) for v in x.tolist()], error < 1e-8
        ([0.0, 0.0, 0.0, 1.0], True)
    """
    kept = list(snapshots)
    t = max((s.updates for s in kept), default=0) if updates is None else updates
    used = [i for i, s in enumerate(kept) if s.updates <= t]
    if not used:
        raise ValueError(f"there is no snapshot of at most {t} updates; keep snapshots during training")
    wanted = profile(gamma_of(sigma_rel), t, t)
    P = torch.stack([profile(kept[i].gamma, kept[i].updates, t) for i in used], 1)
    basis = P[:, 1:] - P[:, :1]  # sum x = 1 is built in: x_0 = 1 - the others
    norm = basis.norm(dim=0)
    scale = torch.where(norm > 1e-12, norm, 1.0)  # after one update all averages are one: its column is 0
    solution = torch.linalg.lstsq(basis / scale, (wanted - P[:, 0])[:, None], rcond=1e-12, driver="gelsd").solution
    rest = solution[:, 0] / scale if len(used) > 1 else torch.zeros(0, dtype=torch.float64)
    own = torch.cat([1 - rest.sum()[None], rest])
    x = torch.zeros(len(kept), dtype=torch.float64)
    x[torch.tensor(used)] = own
    return x, float((P @ own - wanted).norm() / wanted.norm())


def combine(snapshots: Sequence[Snapshot], coefficients: Tensor) -> dict[str, Tensor]:
    """sum_i x_i theta_i by name, summed in float64, in the snapshots' dtype.

    Raises:
        ValueError: if the numbers of snapshots and coefficients differ.
    """
    if len(snapshots) != len(coefficients) or not snapshots:
        raise ValueError(f"{len(coefficients)} coefficients for {len(snapshots)} snapshots; give one each")
    found = {}
    for name, like in snapshots[0].weights.items():
        total = torch.zeros_like(like, dtype=torch.float64)
        for x, snapshot in zip(coefficients.tolist(), snapshots, strict=True):
            total += x * snapshot.weights[name].double()
        found[name] = total.to(like)
    return found
