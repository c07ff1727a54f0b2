"""`lowvar estimate`: the mean of a statistic over a sampler, with an interval, at the least cost a planner finds."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowvar.cli.console import Console
from lowvar.cli.folders import make_way, partial_of, publish
from lowvar.cli.options import MaybeFloat, MaybeInt, MaybePath, MaybeText, Sampling, at_least, choose_device
from lowvar.cli.score import SCORES, check_score, scored
from lowvar.cli.stops import stop_word
from lowvar.cli.unfinished import Kept
from lowvar.errors import UserError

if TYPE_CHECKING:
    import torch

    from lowvar.cli.models import Model
    from lowvar.expect import ChainSampler, Comparison, Progress, Sampler
    from lowvar.expect import Estimate as Found
    from lowvar.metrics import Statistic

__all__ = ["Estimate"]

EACH = "each"


@dataclass(frozen=True, kw_only=True)
class Estimate(Sampling):
    """Estimate the mean of a statistic over a sampler, with a 95% interval.

    A pilot compares designs (mirrored noise, scrambled nets, the calibrated Gaussian twin as a control variate, fewer
    steps, levels of steps) by variance x cost for this statistic, takes the best and declines what does harm. The run
    stops when the interval's half width is --tol, or when --budget is spent. Statistics: brightness, mean, jpeg,
    thickness, class:K, fraction:K, or module:function of your own, called as f(samples (n, C, h, w) in [-1, 1]) -> (n,)
    or (n, ...); vectors and images go to estimate.npz. frechet, kernel and energy are distances to --data, no means:
    they take a --budget, which 32 independent blocks share. An unfinished run is kept in OUT.partial for --resume.
    """

    model: Path
    """folder of a diffusers pipeline"""
    statistic: str
    """name, or module:function"""
    out: Path
    """folder to write"""
    tol: MaybeFloat = None
    """half width of the interval to reach"""
    budget: MaybeInt = None
    """network evaluations not to pass"""
    design: str = "auto"
    """auto, or parts joined by +: independent, antithetic, sobol, twin, mixture, features, few-step, multilevel,
    single-term, stratified (with --label each)"""
    norm: Literal["max", "rms"] = "max"
    """of vectors and images, what --tol bounds: the largest half width, or the root of their mean square"""
    pilot: int = 64
    """samples of the pilot, even, at least 32"""
    against: MaybePath = None
    """folder of a second model: estimate the difference, the first less the second, on common noise"""
    data: MaybeText = None
    """labelled images of the samples' shape, to train the classifier of class:K and fraction:K on (default: digits);
    the reference of frechet, kernel and energy"""
    steps: int = 20
    """number of reverse steps; a power of two gives levels their most"""
    sampler: MaybeText = None
    """name of the sampler; default: the one in the folder's scheduler"""
    covariance: MaybeText = None
    """of ddpm-* and ddim-*: as in `lowvar sample`"""
    eta: MaybeFloat = None
    """stochasticity of ddpm-* and ddim-*: 0 (DDIM) to 1 (ancestral)"""
    tau: MaybeFloat = None
    """stochasticity of adams-* and twin-*: 0 (ODE) to 1 (SDE)"""
    grid: MaybeText = None
    """trailing, uniform, leading, quadratic, uniform-logsnr or karras, and path of a calibrated model; default: the
    sampler's own"""
    label: MaybeText = None
    """class to sample, by name or number, of a model trained with --conditional, or each: every class equally often,
    classes as strata; default: the model without a class"""
    guidance: float = 1.0
    """scale of classifier-free guidance with --label"""
    resume: bool = False
    """go on in OUT.partial; from the start if there is none"""

    def run(self, console: Console) -> dict[str, Any]:
        """See the base class."""
        begun = time.perf_counter()
        self._checked()
        place = partial_of(self.out)
        make_way(self.out, overwrite=self.overwrite, resume=self.resume)
        from functools import partial

        from lowvar.cli.models import open_model
        from lowvar.expect import estimates
        from lowvar.expect.compare import Pair

        device = choose_device(self.device)
        model = open_model(self.model, device, None if self.label == EACH else self.label, self._guidance)
        if self.statistic in SCORES:
            return scored(self, model, *self._sampler(model, device), begun, device, console)
        statistic = self._statistic(model)
        chain, settings = self._sampler(model, device)
        if self.against is None:
            found, records = self._estimated(partial(estimates, chain, statistic), place, console)
            more: dict[str, Any] = {}
        else:
            pair = Pair(chain, self._other(model, device), statistic)
            found, records = self._estimated(pair.records, place, console)
            more = _both(pair.result(found, largest=self.norm == "max"), self.against)
        summary = self._summary(found, begun, device, settings, model, **more)
        _write(place, summary, found, records, self.tol)
        publish(place, self.out)
        _say(console, found, self.out)
        if math.isfinite(more.get("factor", math.nan)):
            console.result(f"independent runs would need {more['factor']:.3g} times the samples for this interval")
        return summary

    # -------------------------------------------------------------------------------------------------------- before

    def _checked(self) -> None:
        """A look at all flags before anything heavy is imported."""
        at_least("--steps", self.steps)
        at_least("--batch-size", self.batch_size)
        if self.tol is None and self.budget is None and self.statistic not in SCORES:
            raise UserError("--tol and --budget are missing; give the half width to reach, or evaluations not to pass")
        if self.tol is not None and not (math.isfinite(self.tol) and self.tol > 0):
            raise UserError(f"--tol is {self.tol:g}; give a half width above 0, for example --tol 0.01, or a --budget")
        if self.budget is not None:
            at_least("--budget", self.budget)
        if self.pilot < 32 or self.pilot % 2:
            raise UserError(f"--pilot is {self.pilot}; give an even number of samples from 32")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise UserError(f"--guidance is {self.guidance:g}; give a number from 0, for example 2")
        if self.statistic in SCORES:
            check_score(self)
        if self.guidance != 1 and self.label is None:
            raise UserError(f"--guidance is {self.guidance:g}, and there is no class to guide to; give --label")

    def _statistic(self, model: Model) -> Statistic:
        from lowvar.data import load
        from lowvar.metrics import needs_data, statistic_named

        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # a module of one's own stands beside the run
        if model.scaling_factor is not None and ":" not in self.statistic and self.statistic != "mean":
            raise UserError(
                f"statistic {self.statistic!r} is of images in [-1, 1], and the model makes latents; give a "
                "module:function"
            )
        data = load(self.data or "digits") if needs_data(self.statistic) else None
        if data is not None and tuple(data.shape) != tuple(model.shape):
            raise UserError(
                f"--data {data.name} has images {data.shape}, and the model makes {model.shape}; give labelled images "
                f"of the model's shape for {self.statistic}"
            )
        return statistic_named(self.statistic, data=data)

    @property
    def _guidance(self) -> float:
        """Of a model opened without a class there is none."""
        return 1.0 if self.label == EACH else self.guidance

    def _sampler(self, model: Model, device: torch.device) -> tuple[Sampler, dict[str, Any]]:
        """The sampler as a function of noise, of all classes in turn where that is asked for, and its settings."""
        if self.label != EACH:
            return self._chain(model, device)
        from lowvar.cli.models import model_of
        from lowvar.expect import ClassSampler

        if not model.classes:
            raise UserError("--label is 'each', and the model has no classes; leave it out")
        found = [self._chain(model_of(model.pipeline, device, name, self.guidance), device) for name in model.classes]
        return ClassSampler(tuple((1.0, chain) for chain, _ in found)), found[0][1]

    def _chain(self, model: Model, device: torch.device) -> tuple[ChainSampler, dict[str, Any]]:
        """The sampler as a function of noise, and its settings."""
        from lowvar.cli.models import noise_ready, scheduler_of
        from lowvar.evaluation import chain_of, check_steps

        scheduler = scheduler_of(
            model, self.sampler, covariance=self.covariance, eta=self.eta, tau=self.tau, grid=self.grid
        )
        check_steps(self.steps, model.denoiser.schedule)
        scheduler, _ = noise_ready(model, scheduler, self.steps, batch_size=self.batch_size, device=device)
        names = ("sampler", "variance", "eta", "tau", "grid", "timestep_spacing")
        chain = chain_of(model.denoiser, scheduler, self.steps, model.shape, clip=model.bound, device=device)
        return chain, {name: scheduler.config[name] for name in names}

    # ------------------------------------------------------------------------------------------------------- one model

    def _estimated(
        self, run: Callable[..., Iterator[Progress]], partial: Path, console: Console
    ) -> tuple[Found, list[dict[str, Any]]]:
        """The estimate, with its state kept in `partial` while it runs, and the records of its way."""
        from lowvar.process.noise import Independent

        kept = Kept(partial, self._identity())
        state = kept.begin(resume=self.resume)
        last: Progress | None = None
        with console.progress(1.0, f"estimating {self.statistic}") as bar:
            done = 0.0
            try:
                for last in run(
                    tol=self.tol,
                    budget=self.budget,
                    design=self.design,
                    noise=Independent(self.seed),
                    batch_size=self.batch_size,
                    pilot=self.pilot,
                    norm=self.norm,
                    name=self.statistic,
                    state=state,
                ):
                    bar.update(max(0.0, last.fraction - done))
                    done = max(done, last.fraction)
                    if last.estimate is not None:
                        bar.set_postfix_str(f" +-{last.estimate.half_width:.3g}", refresh=False)
                    kept.record(last)
            except KeyboardInterrupt as stop:
                if not kept.save():
                    raise type(stop)(f"{stop_word(stop)} before the pilot was done; nothing is kept") from None
                assert last is not None
                raise type(stop)(
                    f"{stop_word(stop)} after {last.nfe} evaluations; {partial} is kept: give the same command with "
                    "--resume to go on"
                ) from None
            except BaseException:
                kept.save()
                raise
        assert last is not None
        assert last.estimate is not None
        return last.estimate, kept.records

    def _identity(self) -> dict[str, Any]:
        """What a resumed run has to have in common with the one before."""
        return {k: v for k, v in self.resolved().items() if k not in ("out", "device")}

    def _summary(
        self, found: Found, begun: float, device: torch.device, settings: dict[str, Any], model: Model, **more: Any
    ) -> dict[str, Any]:
        from lowvar.cli.results import summarise

        one = found.value.ndim == 0
        figures: dict[str, Any] = {k: float(getattr(found, k)) if one else None for k in ("value", "low", "high", "se")}
        names = ("half_width", "nfe", "samples", "design", "vrf", "vrf_low", "vrf_high", "nfe_independent", "reached")
        figures |= {name: getattr(found, name) for name in names}
        figures |= {"undercovers": found.undercovers, "shape": list(found.value.shape), "tol": self.tol}
        decision = dataclasses.asdict(found.decision)
        figures |= {"decision": decision, "scheduler": settings, "network": model.about}
        return summarise(self, self.seed, begun, device, statistic=self.statistic, **figures, **more)

    # ------------------------------------------------------------------------------------------------------ two models

    def _other(self, model: Model, device: torch.device) -> Sampler:
        """The sampler of the second model."""
        from lowvar.cli.models import open_model, require_shape

        assert self.against is not None
        other = open_model(self.against, device, None if self.label == EACH else self.label, self._guidance)
        require_shape(other, model.shape)
        return self._sampler(other, device)[0]


def _both(found: Comparison, against: Path) -> dict[str, Any]:
    one = found.value_a.ndim == 0
    return {
        "against": str(against),
        "value_a": float(found.value_a) if one else None,
        "value_b": float(found.value_b) if one else None,
        "samples_independent": found.samples_independent,
        "factor": found.factor,
    }


def _write(
    folder: Path, summary: dict[str, Any], found: Found, records: list[dict[str, Any]], tol: float | None
) -> None:
    """The run's files: estimate.npz for vectors and images, and the report."""
    import shutil

    import numpy as np

    from lowvar.cli.results import write_run

    if found.value.ndim:
        arrays = {k: getattr(found, k).numpy() for k in ("value", "low", "high", "se")}
        with (folder / "estimate.npz").open("wb") as file:
            np.savez_compressed(file, **arrays)
    write_run(folder, summary, records=records)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _say(console: Console, found: Found, out: Path) -> None:
    console.result(found.sentence())
    if found.decision.candidates:
        console.result(found.decision.table())
    if not found.reached:
        console.result("the budget ended the run before the tolerance was reached")
    console.result(str(out / "report.html"))
