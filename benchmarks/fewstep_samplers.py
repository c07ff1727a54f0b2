r"""The rows of the few-step benchmark: our samplers, diffusers' schedulers as peers, and DPM-Solver-v3.

`OWN` is the one list of our samplers. A row of ours is known by a hash of its declaration and of its version: where
either changes, its cells are run again and the peers' are not.

Every diffusers peer has its default spacing and its best one, chosen on a pilot with seeds of its own; DPM-Solver-v3
has, in place of spacings, knots in log-snr (its authors' choice for small images) or in time, each with x0 clipped as
ours where the data are bounded or left as it is. At K network evaluations Heun makes (K + 1) / 2 steps, which cost at
most K.
"""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from fewstep_targets import CACHE, TARGETS, Mixture
from fewstep_v3 import Integrals, ModelStatistics, measure
from fewstep_v3 import sample as sample_v3
from torch import Tensor

from lowvar.evaluation import PEERS as DIFFUSERS
from lowvar.evaluation import Cell, draw
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.schedule import Level
from lowvar.sample import SAMPLERS

__all__ = [
    "DEFAULT",
    "OWN",
    "PEERS",
    "PLAIN",
    "PeerRow",
    "drawn",
    "is_own",
    "key",
    "own_rows",
    "peer_rows",
    "with_memory",
]

DEFAULT = "twin-flow"  # what `lowvar calibrate` writes
VERSIONS = {DEFAULT: "3"}  # of our samplers, where their declaration does not show a change; "1" where none is given
OWN = (DEFAULT, "twin-ode", "adams-ode", "adams-sde", "unipc-basis", "ddpm-basis")
PLAIN = ("adams-ode", "adams-sde")  # our own predictor-corrector without the twin


@dataclass(frozen=True)
class PeerRow:
    """A peer: its spacings, the one it ships with, and whether it is stochastic."""

    name: str
    spacings: tuple[str, ...]
    default: str
    stochastic: bool = False
    mixtures_only: bool = False


_PLAIN_SPACINGS = ("trailing", "linspace", "leading")
_KARRAS = (*_PLAIN_SPACINGS, "karras")
PEERS = {
    row.name: row
    for row in (
        PeerRow("unipc", _KARRAS, "linspace"),
        PeerRow("sa-solver", _KARRAS, "linspace", stochastic=True),
        PeerRow("dpmsolver++", _KARRAS, "linspace"),
        PeerRow("dpm-solver-v3", ("logsnr", "time", "logsnr-clip", "time-clip"), "logsnr"),
        PeerRow("sde-dpmsolver++", _KARRAS, "linspace", stochastic=True),
        PeerRow("deis", _KARRAS, "linspace"),
        PeerRow("ddim", _PLAIN_SPACINGS, "leading"),
        PeerRow("heun", _KARRAS, "linspace"),
        PeerRow("euler-ancestral", _PLAIN_SPACINGS, "linspace", stochastic=True),
        PeerRow("ddpm", _PLAIN_SPACINGS, "leading", stochastic=True),
        PeerRow("ddpm-large", _PLAIN_SPACINGS, "leading", stochastic=True),
        PeerRow("edm-dpmsolver++", ("default",), "default", mixtures_only=True),
        PeerRow("edm-euler", ("default",), "default", mixtures_only=True),
    )
}


def is_own(name: str) -> bool:
    """Whether a row is ours."""
    return name not in PEERS


def own_rows() -> list[str]:
    """Our samplers that this version of the package has."""
    return [name for name in OWN if name in SAMPLERS]


def peer_rows(target: str) -> list[PeerRow]:
    """The peers of a target, each with the spacings it has there."""
    bounded = not isinstance(TARGETS[target], Mixture)
    found = []
    for row in PEERS.values():
        if row.mixtures_only and bounded:
            continue
        spacings = tuple(s for s in row.spacings if bounded or not s.endswith("-clip"))
        found.append(PeerRow(row.name, spacings, row.default, row.stochastic, row.mixtures_only))
    return found


def key(name: str, spacing: str | None) -> str:
    """What a cell's file is called by beside sampler and NFE: a peer's spacing, the hash of one of ours."""
    if not is_own(name):
        return spacing or "default"
    text = f"{SAMPLERS[name]!r}|{VERSIONS.get(name, '1')}" if name in SAMPLERS else name
    text = re.sub(r"0x[0-9a-f]+", "", text)  # addresses of objects without a representation of their own
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class _Memory:
    """A network that remembers its first evaluations: most samplers begin with the same one."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.config = getattr(network, "config", None)
        self.known: list[tuple[float, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        t = float(timestep.reshape(-1)[0])
        if t < 998.5 or torch.is_grad_enabled():
            return self._run(x, timestep)
        for at, entry, out in self.known:
            if at == t and entry.shape == x.shape and bool(entry[0].equal(x[0])) and entry.equal(x):
                return out
        out = self._run(x, timestep)
        if sum(e.numel() for _, e, _ in self.known) < 2**24:
            self.known.append((t, x.clone(), out))
        return out

    def _run(self, x: Tensor, timestep: Tensor) -> Tensor:
        out = self.network(x, timestep)
        return out if isinstance(out, Tensor) else out.sample


def with_memory(denoiser: NetworkDenoiser) -> NetworkDenoiser:
    """The denoiser with first evaluations remembered; they count as evaluations all the same."""
    assert denoiser.head is None
    assert not denoiser.conditioning
    return NetworkDenoiser(_Memory(denoiser.network), denoiser.schedule, denoiser.prediction, None, denoiser.clip)


@lru_cache(maxsize=2)
def _integrals(target: str, seed: int) -> Integrals:
    """The empirical model statistics of a network, measured on its calibration data once and kept."""
    path = CACHE / target / f"seed{seed}" / "v3.safetensors"
    if not path.exists():
        denoiser = TARGETS[target].denoiser(seed)
        data = TARGETS[target].calibration_data()
        data = data if isinstance(TARGETS[target], Mixture) else data[:256]
        measure(lambda x, level: denoiser.raw(x, level)[0], denoiser.schedule, data).save(path)
    return Integrals(ModelStatistics.load(path))


def _v3(
    target: str, seed: int, denoiser: NetworkDenoiser, nfe: int, spacing: str, n: int, noise: NoiseSource
) -> tuple[Tensor, float]:
    skip, _, clipped = spacing.partition("-")
    schedule, integrals = denoiser.schedule, _integrals(target, seed)
    begun = time.perf_counter()

    def epsilon(x: Tensor, level: Level) -> Tensor:
        eps = denoiser.raw(x, level)[0]
        if not clipped:
            return eps
        alpha, sigma, bound = float(level.alpha), float(level.sigma), denoiser.clip
        assert bound is not None
        return (x - alpha * ((x - sigma * eps) / alpha).clamp(-bound, bound)) / sigma

    parts = []
    for index in torch.arange(n).split(256):
        x = noise.normal(index, TARGETS[target].shape, draw=0)
        parts.append(sample_v3(epsilon, schedule, integrals, x, nfe, skip=skip))
    x = torch.cat(parts)
    return (x if denoiser.clip is None else x.clamp(-denoiser.clip, denoiser.clip)), time.perf_counter() - begun


def drawn(
    target: str,
    seed: int,
    denoiser: NetworkDenoiser,
    name: str,
    nfe: int,
    spacing: str | None,
    n: int,
    noise: NoiseSource | None = None,
) -> tuple[Tensor, int, str, float]:
    """Samples of a row: (samples, evaluations a sample, grid, seconds).

    Args:
        target: name.
        seed: training seed.
        denoiser: the target's, with or without memory.
        name: a key of `PEERS`, or one of our samplers.
        nfe: network evaluations a sample, at most.
        spacing: of a peer.
        n: samples.
        noise: default: the benchmark's own for this seed.
    """
    noise = Independent(10_000 + seed) if noise is None else noise
    if name == "dpm-solver-v3":
        samples, seconds = _v3(target, seed, denoiser, nfe, spacing or "logsnr", n, noise)
        return samples, nfe, spacing or "logsnr", seconds
    entry, calibration = TARGETS[target], None
    if is_own(name):
        cell, calibration = Cell(name, nfe), entry.calibration(seed)
    else:
        steps = (nfe + 1) // 2 if name == "heun" else nfe
        cell = Cell(f"diffusers:{name}", steps, spacing)
        assert name in DIFFUSERS
    if name.startswith("edm-"):
        assert isinstance(entry, Mixture)
        denoiser = entry.edm()
    found = draw(denoiser, cell, n, entry.shape, calibration=calibration, noise=noise, batch_size=256)
    return found.samples, found.nfe, found.grid, found.seconds
