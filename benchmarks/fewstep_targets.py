r"""The five targets of the few-step benchmark: three mixtures with exact scores, digits and photos.

A target gives a denoiser a training seed, what is calibrated for it, and its scores:

    mixture2, mixture8, mixture64    the exact noise prediction E[eps | x_t] under DDPM's default schedule stands in for
                                     a network, so every sampler, ours or a peer's, calls it as it would call a network;
                                     a "training seed" is then a seed of the samplers' noise only
    digits, photos                   the networks of fewstep_networks.py

Scores against held-out data (10,000 draws of a mixture; the held-out split of digits and photos):

    frechet      mixtures: of the coordinates; images: in features (digits' classifier, photos' random convolutions)
    energy       energy distance of the arrays
    spectrum     error of the variances along the data's principal directions over the total variance
    sliced       sliced 2-Wasserstein distance (mixtures only)

Mixtures are neither clipped nor bounded. The floor is data against data: 8,192 further draws of a mixture, 8,192
training patches of photos; the digits' training split has 1,197 images, and the upward bias 1/n of a Frechet distance
is brought to the samplers' n by the jackknife's estimate of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lowvar.calibrate import Calibration, calibrate
from lowvar.metrics import Replicates, Scorer
from lowvar.metrics.energy import energy_statistic
from lowvar.metrics.frechet import FrechetStatistic
from lowvar.metrics.moments import MomentStatistic
from lowvar.metrics.wasserstein import SlicedStatistic
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.process.noise import Independent
from lowvar.process.schedule import VE, Level
from lowvar.testing import MixtureTarget, mixture2, mixture8, mixture64

__all__ = ["CACHE", "RESULTS", "TARGETS", "ImageTarget", "Mixture", "Target", "replicates_at"]

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("LOWVAR_BENCHMARKS", ROOT / "build" / "benchmarks")) / "fewstep"
RESULTS = ROOT / "benchmarks" / "results" / "fewstep.json"
TWIN_EVENTS, CALIBRATION_EVENTS, REFERENCE_EVENTS = 20_000, 1024, 10_000
CALIBRATED = "2"  # of what `calibrate` measures: another word makes the images' calibrations anew
_DATA_SEED = 77_000  # of a mixture's draws: reference, floor, calibration, twin are its next four numbers


class Target(Protocol):
    """What the benchmark needs of a target."""

    name: str
    metrics: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]: ...
    def denoiser(self, seed: int) -> NetworkDenoiser: ...
    def calibration_data(self) -> Tensor: ...
    def calibration(self, seed: int) -> Calibration: ...
    def replicates(self, samples: Tensor, metrics: tuple[str, ...] | None = None) -> dict[str, Replicates]: ...
    def floor(self, n: int) -> dict[str, Replicates]: ...
    def about(self) -> dict[str, Any]: ...


def replicates_at(found: Replicates, n: int) -> Replicates:
    """Replicates whose value is brought from their own number of samples to n by the jackknife's 1/n bias."""
    have = int(found.sizes.sum())
    move = found.bias * (have / n - 1)
    return Replicates(found.value + move, found.leave_out + move, found.sizes)


def _calibrate(denoiser: NetworkDenoiser, data: Tensor, twin: Callable[[], Iterator[Tensor]]) -> Calibration:
    return calibrate(
        denoiser,
        lambda: data.split(256),
        twin_batches=twin,
        replicates=4,
        noise=Independent(1),
        bound=denoiser.clip,
    )


class _ExactNoise:
    """E[eps | x_t] of a mixture as a network is called: (x, timestep) with one timestep for all samples."""

    def __init__(self, target: MixtureTarget, schedule: Any) -> None:
        self.target, self.schedule = target, schedule

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        level = self.schedule.at(self.schedule.time_of(timestep.reshape(-1)[0].double()).clamp(0, 1))
        mean = self.target.posterior(x.double(), level, None).mean
        return ((x.double() - level.alpha * mean) / level.sigma).to(x.dtype)


class _ExactEDM:
    """The network F of Karras et al. 2022 whose preconditioned output is the exact posterior mean of a mixture."""

    def __init__(self, target: MixtureTarget, sigma_data: float) -> None:
        self.target, self.sigma_data = target, sigma_data

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        sigma = torch.exp(4 * timestep.reshape(-1)[0].double())
        total = sigma**2 + self.sigma_data**2
        y = x.double() * total.sqrt()
        one = torch.ones((), dtype=torch.float64)
        mean = self.target.posterior(y, Level(one, -2 * sigma.log(), one, sigma), None).mean
        return ((mean - self.sigma_data**2 / total * y) * total.sqrt() / (sigma * self.sigma_data)).to(x.dtype)


@dataclass(eq=False)
class Mixture:
    """A mixture with exact scores."""

    name: str
    law: Callable[[], MixtureTarget]
    metrics: tuple[str, ...] = ("frechet", "energy", "spectrum", "sliced")

    @cached_property
    def target(self) -> MixtureTarget:
        """The mixture."""
        return self.law()

    @property
    def shape(self) -> tuple[int, ...]:
        """(d,)."""
        return tuple(self.target.event_shape)

    def _draws(self, number: int, n: int) -> Tensor:
        return self.target.sample(range(n), Independent(_DATA_SEED + number), dtype=torch.float32)

    def denoiser(self, seed: int) -> NetworkDenoiser:
        """The exact noise prediction."""
        schedule = schedule_from_diffusers({})
        return NetworkDenoiser(_ExactNoise(self.target, schedule), schedule, "epsilon")

    def edm(self) -> NetworkDenoiser:
        """The exact posterior for EDM's schedulers."""
        return NetworkDenoiser(_ExactEDM(self.target, 1.0), VE(), "edm", sigma_data=1.0)

    def calibration_data(self) -> Tensor:
        """Draws that no score sees."""
        return self._draws(3, CALIBRATION_EVENTS)

    @lru_cache(maxsize=2)  # noqa: B019  (targets live as long as the process)
    def calibration(self, seed: int) -> Calibration:
        """Of the exact denoiser on draws; the same for every seed."""
        twin = self._draws(4, TWIN_EVENTS)
        return _calibrate(self.denoiser(seed), self.calibration_data(), lambda: iter(twin.split(1024)))

    @cached_property
    def _statistics(self) -> tuple[Any, ...]:
        y = self._draws(1, REFERENCE_EVENTS)
        return (
            FrechetStatistic.against(y),
            energy_statistic(y),
            MomentStatistic.against(y),
            SlicedStatistic.against(y),
        )

    def replicates(self, samples: Tensor, metrics: tuple[str, ...] | None = None) -> dict[str, Replicates]:
        """Every score of samples with its replicates."""
        frechet, energy, moments, sliced = self._statistics
        wanted, found = metrics or self.metrics, {}
        for name in wanted:
            if name == "frechet":
                found[name] = frechet.replicates(samples)
            elif name == "energy":
                found[name] = energy.replicates(samples)
            elif name == "spectrum":
                found[name] = moments.replicates(samples)[1]
            else:
                found[name] = sliced.replicates(samples)
        return found

    @lru_cache(maxsize=2)  # noqa: B019
    def floor(self, n: int) -> dict[str, Replicates]:
        """Further draws scored as samples."""
        return self.replicates(self._draws(2, n))

    def about(self) -> dict[str, Any]:
        """What stands beside the scores."""
        target = self.target
        return {"dimensions": target.d, "components": len(target.weights), "reference": REFERENCE_EVENTS, "blocks": 32}


@dataclass(eq=False)
class ImageTarget:
    """A data set of images and the networks trained on it."""

    name: str
    source: str
    metrics: tuple[str, ...] = ("frechet", "energy", "spectrum")

    @cached_property
    def data(self) -> Any:
        """The data set."""
        from lowvar.data import load

        return load(self.source)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.data.shape

    def network(self, seed: int) -> Path:
        """The folder of a network; it must have been trained."""
        return CACHE / "networks" / f"{self.name}-seed{seed}"

    @lru_cache(maxsize=4)  # noqa: B019
    def denoiser(self, seed: int) -> NetworkDenoiser:
        """The network of a training seed, its x0 clipped to [-1, 1]."""
        from lowvar.cli.models import open_model

        folder = self.network(seed)
        if not folder.exists():
            raise SystemExit(
                f"there is no {folder}; run benchmarks/fewstep_networks.py --networks {self.name}-seed{seed}"
            )
        return open_model(folder, torch.device("cpu")).denoiser

    def calibration_data(self) -> Tensor:
        """Images of the calibration split."""
        images = self.data.calibration
        return images.images(range(min(len(images), CALIBRATION_EVENTS)))

    @lru_cache(maxsize=4)  # noqa: B019
    def calibration(self, seed: int) -> Calibration:
        """Of a network, measured once and kept."""
        from safetensors.torch import load_file, save_file

        folder = CACHE / self.name / f"seed{seed}"
        fields, tensors = (folder / f"calibration-{CALIBRATED}.{kind}" for kind in ("json", "safetensors"))
        if not fields.exists():
            made = _calibrate(
                self.denoiser(seed), self.calibration_data(), lambda: self.data.train.batches(1024)
            ).to_json()
            folder.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in made[1].items()}, tensors)
            fields.write_text(json.dumps(made[0]))
        return Calibration.from_json(json.loads(fields.read_text()), load_file(tensors))

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.data, metrics=self.metrics, cache=CACHE)

    def replicates(self, samples: Tensor, metrics: tuple[str, ...] | None = None) -> dict[str, Replicates]:
        """Every score of samples with its replicates."""
        return self._scorer.replicates(samples, metrics)

    @lru_cache(maxsize=2)  # noqa: B019
    def floor(self, n: int) -> dict[str, Replicates]:
        """Training images scored as samples; where there are fewer, the Frechet distance is brought to n."""
        train = self.data.train
        found = self.replicates(train.images(range(min(n, len(train)))))
        if len(train) < n:
            found["frechet"] = replicates_at(found["frechet"], n)
        return found

    def about(self) -> dict[str, Any]:
        """What stands beside the scores."""
        return self._scorer.description


TARGETS: dict[str, Mixture | ImageTarget] = {
    "mixture2": Mixture("mixture2", mixture2),
    "mixture8": Mixture("mixture8", mixture8),
    "mixture64": Mixture("mixture64", mixture64),
    "digits": ImageTarget("digits", "digits"),
    "photos": ImageTarget("photos", "photos:16"),
}
