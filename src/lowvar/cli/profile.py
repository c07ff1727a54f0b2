"""`lowvar profile`: where a model's variance comes from, what each treatment of it would gain, and what to do."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvar.cli.console import Console
from lowvar.cli.folders import check_free, new_folder
from lowvar.cli.options import DataFlags, Sampling, at_least, choose_device
from lowvar.errors import UserError

if TYPE_CHECKING:
    from lowvar.metrics.intervals import Interval
    from lowvar.profile import TrainingProfile

__all__ = ["Profile", "about_profile"]


def _interval(found: Interval) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def about_profile(found: TrainingProfile) -> dict[str, Any]:
    """What stands in a summary about a profile."""
    from lowvar.profile import SOURCES

    sources = found.sources
    return {
        "shares": {u: _interval(sources.shares[u]) for u in SOURCES},
        "variance": _interval(sources.variance),
        "noise_scale": _interval(sources.noise_scale),
        "blocks": sources.blocks,
        "directions": found.sketched,
        "levels": [
            {"logsnr_low": low, "logsnr_high": high, **{u: _interval(i) for u, i in parts.items()}}
            for high, low, parts in zip(found.edges, found.edges[1:], sources.levels, strict=False)
        ],
        "groups": [
            {"name": name, "variance": _interval(whole), "shares": {u: _interval(i) for u, i in parts.items()}}
            for name, whole, parts in zip(found.groups, sources.group_variance, sources.groups, strict=True)
        ],
        "replicates": found.replicates,
        "techniques": [
            {"name": r.name, "vrf": r.vrf, "low": r.low, "high": r.high, "cost": r.cost, "verdict": r.verdict}
            for r in found.reductions
        ],
        "verdict": [asdict(line) for line in found.verdict],
    }


@dataclass(frozen=True, kw_only=True)
class Profile(DataFlags, Sampling):
    """Say where the variance of a model's training gradient comes from, and what would lower it.

    Decomposes the variance of one sample's gradient, at the model's weights, into what images, times, noises and their
    interactions bring, by layer group and noise level; measures what each technique of `lowvar train` takes off it at
    equal network evaluations; estimates the batch that pays; and ranks what to do, with the words that do it.
    """

    model: Path
    """folder of a diffusers pipeline"""
    out: Path
    """folder to write"""
    batch_size: int = 64
    """batch that techniques are measured at: the one of your training, a multiple of 4"""
    minutes: float = 5.0
    """time to spend; intervals say what it allowed"""
    memory: float = 4.0
    """gigabytes that gradients may take; where 8 of them need more, random projections stand for them"""

    def run(self, console: Console) -> dict[str, Any]:
        """See the base class."""
        begun = time.perf_counter()
        at_least("--batch-size", self.batch_size, 4)
        if self.batch_size % 4:
            raise UserError(f"--batch-size is {self.batch_size}; give a multiple of 4, so that pairs and groups fit")
        for flag, value in (("--minutes", self.minutes), ("--memory", self.memory)):
            if not 0 < value < float("inf"):
                raise UserError(f"{flag} is {value:g}; give a number above 0")
        check_free(self.out, overwrite=self.overwrite)
        from lowvar.cli.classes import require_classes
        from lowvar.cli.models import fitting, open_model
        from lowvar.cli.results import about_data, summarise, write_run
        from lowvar.profile import profile_training

        device = choose_device(self.device)
        model = open_model(self.model, device)
        data = fitting(model, self.load(self.seed))
        if len(data.train) < self.batch_size:
            raise UserError(
                f"--batch-size is {self.batch_size} and the training split has {len(data.train)} images; give at most "
                "that, or more data"
            )
        if model.classes:
            require_classes(model, data, "profile of a model with classes")
        network: Any = model.denoiser.network
        network.requires_grad_(True)
        done = 0.0
        with console.progress(100, "profiling", unit="%") as bar:

            def told(part: float) -> None:
                nonlocal done
                if 100 * part >= done + 1:
                    bar.update(int(100 * part) - int(done))
                    done = int(100 * part)

            found = profile_training(
                model.denoiser,
                data.train,
                levels=data.levels,
                batch_size=self.batch_size,
                conditional=bool(model.classes),
                minutes=self.minutes,
                memory=1e9 * self.memory,
                seed=self.seed,
                device=device,
                progress=told,
            )
        summary = summarise(
            self, self.seed, begun, device, **about_profile(found), network=model.about, data=about_data(data)
        )
        with new_folder(self.out, overwrite=self.overwrite) as folder:
            write_run(folder, summary, records=summary["techniques"])
        for k, line in enumerate(found.verdict, start=1):
            mark = f"{k}. {line.do}" if line.worth else f"not worth doing: {line.do}"
            console.result(f"{mark}: {line.expect}" + (f"  [{line.command}]" if line.command else ""))
        console.result(str(self.out / "report.html"))
        return summary
