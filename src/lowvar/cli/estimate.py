"""`lowvar estimate`: the mean of a statistic over a sampler, with an interval, at the least cost a planner finds."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowvar.cli.console import Console
from lowvar.cli.folders import check_free, new_folder, publish
from lowvar.cli.options import MaybeFloat, MaybeInt, MaybePath, MaybeText, Sampling, at_least, choose_device
from lowvar.cli.stops import stop_word
from lowvar.cli.train import clear_partial, partial_of
from lowvar.cli.unfinished import Kept
from lowvar.errors import UserError

if TYPE_CHECKING:
    import torch

    from lowvar.cli.models import Model
    from lowvar.expect import ChainSampler, Comparison, Progress
    from lowvar.expect import Estimate as Found
    from lowvar.metrics import Statistic

__all__ = ["Estimate"]


@dataclass(frozen=True, kw_only=True)
class Estimate(Sampling):
    """Estimate the mean of a statistic over a sampler, with a 95% interval.

    A pilot compares designs (mirrored noise, scrambled nets, the calibrated Gaussian twin as a control variate, fewer
    steps, levels of steps) by variance x cost for this statistic, takes the best and declines what does harm. The run
    stops when the interval's half width is --tol, or when --budget is spent. Statistics: brightness, mean, jpeg,
    thickness, class:K, fraction:K, or module:function of your own, called as f(samples (n, C, h, w) in [-1, 1]) -> (n,)
    or (n, ...); vectors and images go to estimate.npz. An unfinished run is kept in OUT.partial for --resume.
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
    single-term"""
    norm: Literal["max", "rms"] = "max"
    """of vectors and images, what --tol bounds: the largest half width, or the root of their mean square"""
    pilot: int = 64
    """samples of the pilot, even, at least 32"""
    against: MaybePath = None
    """folder of a second model: estimate the difference, the first less the second, on common noise"""
    data: MaybeText = None
    """labelled images of the samples' shape, to train the classifier of class:K and fraction:K on; default: digits"""
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
    """class to sample, by name or number, of a model trained with --conditional; default: all classes"""
    guidance: float = 1.0
    """scale of classifier-free guidance with --label"""
    resume: bool = False
    """go on in OUT.partial; from the start if there is none"""

    def run(self, console: Console) -> dict[str, Any]:
        """See the base class."""
        begun = time.perf_counter()
        self._checked()
        partial = partial_of(self.out)
        check_free(self.out, overwrite=self.overwrite)
        self._make_way(partial)
        from lowvar.cli.models import open_model

        device = choose_device(self.device)
        model = open_model(self.model, device, self.label, self.guidance)
        statistic = _Watched(self._statistic(model))
        chain, settings = self._chain(model, device)
        if self.against is not None:
            return self._compare(chain, settings, statistic, model, begun, device, console)
        found, records = self._estimated(chain, statistic, partial, console)
        summary = self._summary(found, begun, device, settings, model)
        _write(partial, summary, found, records, self.tol)
        publish(partial, self.out)
        _say(console, found, self.out)
        return summary

    # -------------------------------------------------------------------------------------------------------- before

    def _checked(self) -> None:
        """A look at all flags before anything heavy is imported."""
        at_least("--steps", self.steps)
        at_least("--batch-size", self.batch_size)
        if self.tol is None and self.budget is None:
            raise UserError("--tol and --budget are missing; give the half width to reach, or evaluations not to pass")
        if self.tol is not None and not (math.isfinite(self.tol) and self.tol > 0):
            raise UserError(f"--tol is {self.tol:g}; give a half width above 0, for example --tol 0.01, or a --budget")
        if self.budget is not None:
            at_least("--budget", self.budget)
        if self.pilot < 32 or self.pilot % 2:
            raise UserError(f"--pilot is {self.pilot}; give an even number of samples from 32")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise UserError(f"--guidance is {self.guidance:g}; give a number from 0, for example 2")
        if self.guidance != 1 and self.label is None:
            raise UserError(f"--guidance is {self.guidance:g}, and there is no class to guide to; give --label")
        if self.against is not None and self.resume:
            raise UserError("--resume goes on with one model's estimate; a difference (--against) starts anew")

    def _make_way(self, partial: Path) -> None:
        """Refuses an unfinished run in the way, or removes it where that was asked for."""
        if partial.exists() and not self.resume and self.against is None:
            if not self.overwrite:
                raise UserError(
                    f"{partial} holds an unfinished run; go on with --resume, or start anew with --overwrite"
                )
            clear_partial(partial)

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
        self, chain: ChainSampler, statistic: _Watched, partial: Path, console: Console
    ) -> tuple[Found, list[dict[str, Any]]]:
        """The estimate, with its state kept in `partial` while it runs, and the records of its way."""
        from lowvar.expect import estimates
        from lowvar.process.noise import Independent

        kept = Kept(partial, self._identity())
        state = kept.begin(resume=self.resume)
        last: Progress | None = None
        with console.progress(1.0, f"estimating {self.statistic}") as bar:
            done = 0.0
            try:
                for last in estimates(
                    chain,
                    statistic,
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

    def _compare(
        self,
        chain: ChainSampler,
        settings: dict[str, Any],
        statistic: _Watched,
        model: Model,
        begun: float,
        device: torch.device,
        console: Console,
    ) -> dict[str, Any]:
        from lowvar.cli.models import open_model, require_shape
        from lowvar.expect import compare
        from lowvar.process.noise import Independent

        assert self.against is not None
        other = open_model(self.against, device, self.label, self.guidance)
        require_shape(other, model.shape)
        second, _ = self._chain(other, device)
        total = self.budget or 0
        with console.progress(total or 1, f"comparing {self.statistic}") as bar:
            statistic.seen = lambda n: bar.update(n * chain.nfe if total else 0)
            found = compare(
                chain,
                second,
                statistic,
                tol=self.tol,
                budget=self.budget,
                design=self.design,
                noise=Independent(self.seed),
                batch_size=self.batch_size,
                pilot=self.pilot,
                norm=self.norm,
                name=self.statistic,
            )
        summary = self._summary(found.difference, begun, device, settings, model, **_both(found, self.against))
        with new_folder(self.out, overwrite=self.overwrite) as folder:
            _write(folder, summary, found.difference, [], self.tol)
        _say(console, found.difference, self.out)
        if math.isfinite(found.factor):
            console.result(f"independent runs would need {found.factor:.3g} times the samples for this interval")
        return summary


class _Watched:
    """The statistic, which tells how far a run is.

    Attributes:
        seen: called with the number of samples after each call.
    """

    def __init__(self, statistic: Statistic) -> None:
        self.statistic = statistic
        self.seen: Any = lambda n: None

    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        values = self.statistic(samples)
        self.seen(len(samples))
        return values


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
