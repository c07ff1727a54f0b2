"""`lowvar sample`: samples of a model, with per-sample seeds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowvar.cli.console import Console
from lowvar.cli.folders import check_free, new_file
from lowvar.cli.options import (
    ClassFlags,
    MaybeFloat,
    MaybeInt,
    MaybePath,
    MaybeText,
    Sampling,
    at_least,
    choose_device,
)
from lowvar.cli.pictures import write_png
from lowvar.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowvar.cli.models import Model
    from lowvar.process.planning import Plan
    from lowvar.schedulers import ReverseVarianceScheduler

__all__ = ["Sample"]


@dataclass(frozen=True, kw_only=True)
class Sample(ClassFlags, Sampling):
    """Draw samples from a model.

    Writes `samples` (float32 in [-1, 1], latents in their own units; of a table float64 in its own units, with
    `columns`, their names) and `seeds` to one .npz file. The sampler is the one in the model folder's
    scheduler, unless one is named: ddpm-small, ddpm-large, ddpm-learned, ddim, adams-ode, adams-sde, unipc, dpmpp-2m;
    of a calibrated model twin-flow, twin-ode, twin-sde, and ddpm-NAME and ddim-NAME with NAME a covariance that it
    holds: analytic, isotropic, channel, pixel, basis, or one made by `lowvar calibrate --head`: npr, sn, ocm, lowrank,
    convert; and ddim-noise, dpmpp-2m-noise, unipc-noise, whose noise on a grid is kept by `lowvar calibrate --noise` or
    else measured first. An unknown name lists all samplers.
    """

    model: Path
    """folder of a diffusers pipeline"""
    out: Path
    """file to write, ending in .npz"""
    steps: int | Literal["auto"] = 20
    """number of reverse steps; auto: as few as --tol allows (ddpm-* samplers of a calibrated model)"""
    tol: MaybeFloat = None
    """for --steps auto: largest predicted path KL in nats a dimension (0.1 is coarse, 0.01 fine)"""
    n: int = 64
    """number of samples"""
    sampler: MaybeText = None
    """name of the sampler; default: the one in the folder's scheduler"""
    covariance: MaybeText = None
    """of ddpm-* and ddim-*: small, large, learned, analytic, isotropic, channel, pixel, basis, npr, sn, ocm, lowrank or
    convert"""
    eta: MaybeFloat = None
    """stochasticity of ddpm-* and ddim-*: 0 (DDIM) to 1 (ancestral)"""
    tau: MaybeFloat = None
    """stochasticity of adams-* and twin-*: 0 (ODE) to 1 (SDE)"""
    grid: MaybeText = None
    """trailing, uniform, leading, quadratic, uniform-logsnr or karras; of a calibrated model also path, entropic,
    variance-matched or optimal, made for the sampler's own noise or, for example, optimal:basis for that of ddpm-basis;
    default: the sampler's own, and optimal for --steps auto"""
    levels: MaybeInt = None
    """grey levels of the data, on which it depends where entropic, variance-matched and optimal grids end; default: the
    calibration's"""
    adaptive: bool = False
    """steps of their own for every sample, around the grid; 2 evaluations a step (ddpm-* of a calibrated model)"""
    png: MaybePath = None
    """also write a picture of the first samples"""
    csv: MaybePath = None
    """also write the samples of a table as a CSV file, texts as texts"""

    def run(self, console: Console) -> dict[str, Any]:
        """See the base class."""
        begun = time.perf_counter()
        self._checked()
        from lowvar.calibrate.grids import is_calibrated
        from lowvar.cli.classes import other_guidance
        from lowvar.cli.models import noise_ready, open_model, scheduler_of
        from lowvar.cli.results import summarise
        from lowvar.evaluation import check_steps

        device = choose_device(self.device)
        model = open_model(self.model, device, self.label, self.guidance)
        self._files_fit(model)
        if (note := other_guidance(model, self.label, self.guidance)) is not None:
            console.note(note)
        planned = self.steps == "auto" or self.adaptive or is_calibrated(self.grid or "")
        scheduler = scheduler_of(
            model,
            self.sampler,
            covariance=self.covariance,
            eta=self.eta,
            tau=self.tau,
            grid=None if planned else self.grid,
        )
        plan = self._plan(model, scheduler) if planned else None
        steps = self.steps if plan is None else plan.steps
        assert isinstance(steps, int)
        check_steps(steps, model.denoiser.schedule)
        if plan is not None:
            scheduler = _on_grid(scheduler, plan.grid)
        scheduler, chains = noise_ready(model, scheduler, steps, batch_size=self.batch_size, device=device)
        if chains:
            console.note(
                f"the noise of {scheduler.config['sampler']} at {steps} steps is not kept in the model: measured on "
                f"{chains} chains of {steps} evaluations; `lowvar calibrate --noise` keeps it"
            )
        samples, nfe = self._draw(model, scheduler, steps, plan, device, console)
        shape = self._write(model, samples, console)
        names = ("sampler", "variance", "eta", "tau", "grid", "timestep_spacing")
        settings = {name: scheduler.config[name] for name in names}
        figures: dict[str, Any] = {"scheduler": settings, "steps": steps, "nfe": nfe, "n": self.n}
        if plan is not None:
            settings["grid"] = self._grid_name(scheduler)
            figures |= {"times": plan.grid.tolist(), "path_kl": plan.path_kl, "adaptive": self.adaptive}
        return summarise(self, self.seed, begun, device, **figures, shape=shape, samples=str(self.out))

    def _checked(self) -> None:
        """A look at all flags, before anything heavy is imported but what knows the names of grids."""
        at_least("--n", self.n)
        at_least("--batch-size", self.batch_size)
        at_least("--levels", 2 if self.levels is None else self.levels, 2)
        if self.steps != "auto":
            at_least("--steps", self.steps)
            if self.tol is not None:
                raise UserError("--tol belongs to --steps auto: give one of both")
        elif self.tol is None or not self.tol > 0:
            raise UserError(
                f"--steps auto needs --tol, and it is {self.tol}; give nats a dimension above 0, for example --tol 0.05"
            )
        if self.out.suffix != ".npz":
            raise UserError(f"--out is {self.out}; samples go to one file, give a name that ends in .npz")
        if self.png is not None and self.png.suffix.lower() != ".png":
            raise UserError(f"--png is {self.png}; give a name that ends in .png")
        if self.csv is not None and self.csv.suffix.lower() != ".csv":
            raise UserError(f"--csv is {self.csv}; give a name that ends in .csv")
        for path in (self.out, self.png, self.csv):
            if path is not None:
                check_free(path, overwrite=self.overwrite)
        if self.grid is not None:
            from lowvar.calibrate.grids import check_grid

            check_grid(self.grid)
        self.check_guidance()

    def _files_fit(self, model: Model) -> None:
        """Refuses files that the model's samples cannot be written to."""
        if self.png is not None and model.columns is not None:
            raise UserError("--png draws images, and the model makes rows of a table; give --csv instead")
        if self.png is not None and model.scaling_factor is not None:
            raise UserError(
                "--png draws images, and the model makes latents; decode the samples with their autoencoder"
            )
        if self.csv is not None and model.columns is None:
            raise UserError("--csv writes rows of a table, and the model makes images; give --png instead")

    def _draw(
        self,
        model: Model,
        scheduler: ReverseVarianceScheduler,
        steps: int,
        plan: Plan | None,
        device: torch.device,
        console: Console,
    ) -> tuple[Tensor, float]:
        """The samples, and evaluations a sample.

        Raises:
            UserError: if some are not finite.
        """
        from lowvar.cli.models import run_scheduler
        from lowvar.process.noise import Independent

        if self.adaptive:
            assert plan is not None
            samples, nfe = self._adaptive(model, scheduler, plan, device, console)
        else:
            nfe = steps * model.denoiser.nfe
            with console.progress(self.n * steps, "sampling") as bar:
                samples = run_scheduler(
                    model,
                    scheduler,
                    steps,
                    self.n,
                    Independent(self.seed),
                    batch_size=self.batch_size,
                    device=device,
                    progress=bar.update,
                )
        bad = int((~samples.isfinite()).flatten(1).any(1).sum())
        if bad:
            raise UserError(
                f"{bad} of {self.n} samples are not finite: the sampler diverged in {steps} steps; "
                "give more --steps or another --sampler"
            )
        return samples, nfe

    def _write(self, model: Model, samples: Tensor, console: Console) -> list[int]:
        """Writes what was asked for; the shape of a sample as it is written."""
        import numpy as np

        array = samples.numpy()
        more: dict[str, Any] = {}
        if model.columns is not None:
            array, more = model.columns.numbers(samples).numpy(), {"columns": np.array(model.columns.names)}
        if model.scaling_factor is not None:
            array = array / np.float32(model.scaling_factor)
        with new_file(self.out, overwrite=self.overwrite) as file:
            np.savez(file, samples=array, seeds=np.arange(self.n, dtype=np.int64), **more)
        console.result(str(self.out))
        if self.csv is not None and model.columns is not None:
            import pyarrow as pa
            import pyarrow.csv as pc

            with new_file(self.csv, overwrite=self.overwrite) as file:
                pc.write_csv(pa.table(model.columns.decode(samples)), file)
            console.result(str(self.csv))
        if self.png is not None:
            with new_file(self.png, overwrite=self.overwrite) as file:
                write_png(file, samples)
            console.result(str(self.png))
        return list(array.shape[1:])

    def _grid_name(self, scheduler: ReverseVarianceScheduler) -> str:
        if self.grid is not None:
            return self.grid
        own = scheduler.config["grid"]
        return "optimal" if self.steps == "auto" else (own if isinstance(own, str) else "trailing")

    def _plan(self, model: Model, scheduler: ReverseVarianceScheduler) -> Plan:
        """The grid that a calibration gives, and its predicted path KL.

        Raises:
            UserError: if the model is not calibrated, or the sampler is not one whose costs are known.
        """
        from lowvar.calibrate import calibrated_grid, fewest_steps_for
        from lowvar.calibrate.grids import STRUCTURES

        what = "--adaptive" if self.adaptive else ("--steps auto" if self.steps == "auto" else f"--grid {self.grid}")
        calibration = scheduler.calibration
        if calibration is None:
            raise UserError(
                f"{what} needs a calibrated model: run `lowvar calibrate --model MODEL --data DATA --out RUN` first"
            )
        c, schedule = scheduler.config, model.denoiser.schedule
        structure = str({"analytic": "isotropic", "twin": "basis"}.get(c["variance"], c["variance"]))
        known = c["sampler"] == "kernel" and structure in STRUCTURES  # of a head the costs are not known
        structure, known = structure if known else "isotropic", known and c["eta"] == 1
        if not known and (self.adaptive or self.steps == "auto"):
            raise UserError(
                f"{what} rests on the path KL of the ancestral kernel with a table for its noise, which this sampler "
                "is not: give --sampler ddpm-small, ddpm-analytic, ddpm-isotropic, ddpm-pixel or ddpm-basis"
            )
        name, levels = self._grid_name(scheduler), self.levels or calibration.levels or 256
        if self.steps == "auto":
            assert self.tol is not None
            most = getattr(schedule, "steps", 1000)
            return fewest_steps_for(self.tol, name, calibration, schedule, structure, levels, most)
        from lowvar.evaluation import check_steps

        return calibrated_grid(name, calibration, schedule, check_steps(self.steps, schedule), structure, levels)

    def _adaptive(
        self, model: Model, scheduler: ReverseVarianceScheduler, plan: Plan, device: torch.device, console: Console
    ) -> tuple[Tensor, float]:
        """Samples with steps of their own, and the mean number of evaluations."""
        from lowvar.calibrate import cost_curve
        from lowvar.process.kernel import ReverseKernel
        from lowvar.process.noise import Independent
        from lowvar.sample import StepControl, adaptive_generate

        variance, denoiser = scheduler.config["variance"], model.denoiser
        calibration = scheduler.calibration
        assert calibration is not None
        if plan.steps < 2:
            raise UserError("--adaptive needs at least 2 steps")
        table = str({"analytic": "isotropic", "twin": "basis"}.get(variance, variance))
        control = StepControl.of(cost_curve(calibration, denoiser.schedule, table), denoiser.schedule, plan.grid)
        small = variance == "small"
        with console.progress(self.n, "sampling") as bar:
            made = adaptive_generate(
                denoiser if small else calibration.attach(denoiser, variance),
                ReverseKernel(1.0, "small" if small else "posterior"),
                control,
                model.shape,
                self.n,
                Independent(self.seed),
                batch_size=self.batch_size,
                clip=model.bound,
                device=device,
                progress=bar.update,
            )
        return made.samples, float(made.nfe.double().mean()) * denoiser.nfe


def _on_grid(scheduler: ReverseVarianceScheduler, grid: Tensor) -> ReverseVarianceScheduler:
    """The scheduler on given times."""
    from lowvar.schedulers import ReverseVarianceScheduler

    return ReverseVarianceScheduler.from_scheduler(scheduler, grid=grid.tolist())
