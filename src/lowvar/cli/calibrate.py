"""`lowvar calibrate`: measures a model's reverse covariance and writes the model with a calibrated scheduler."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvar.cli.console import Console, score_table
from lowvar.cli.folders import check_free, new_folder
from lowvar.cli.options import DataFlags, Sampling, at_least, choose_device

__all__ = ["Calibrate"]

CANDIDATES = ("ddpm-basis", "ddim-basis", "adams-ode", "twin-ode", "twin-sde")


@dataclass(frozen=True, kw_only=True)
class Calibrate(DataFlags, Sampling):
    """Calibrate the reverse covariance and the Gaussian twin of a model.

    Measures, on images the network was not trained on, the error of its denoiser by noise level, and writes the model
    again with a scheduler that uses it. Samplers that need the calibration are compared in a few steps, and the best
    becomes the scheduler's default.
    """

    model: Path
    """folder of a diffusers pipeline"""
    out: Path
    """folder to write: a diffusers pipeline with a calibrated scheduler"""
    n: int = 1024
    """images of the calibration split to measure on, at most"""
    replicates: int = 4
    """noises an image and noise level"""
    steps: int = 10
    """steps for which samplers are compared"""
    choose: int = 512
    """samples a sampler in that comparison; 0: no comparison, twin-ode becomes the default"""

    def run(self, console: Console) -> dict[str, Any]:
        """See the base class."""
        begun = time.perf_counter()
        for flag, value in (("--n", self.n), ("--replicates", self.replicates), ("--batch-size", self.batch_size)):
            at_least(flag, value)
        at_least("--steps", self.steps)
        at_least("--choose", self.choose, 0)
        check_free(self.out, overwrite=self.overwrite)
        import torch

        from lowvar.cli.measure import budget, calibrate_on, mmse_figure, standardised
        from lowvar.cli.models import open_model, require_shape, save_model
        from lowvar.cli.results import about_data, summarise, write_run
        from lowvar.evaluation import Cell, check_steps, evaluate
        from lowvar.metrics import Scorer
        from lowvar.process.noise import Independent
        from lowvar.sample import SAMPLERS

        device = choose_device(self.device)
        model = open_model(self.model, device)
        check_steps(self.steps, model.denoiser.schedule)
        data = self.load(self.seed)
        require_shape(model, data.shape)
        denoiser = model.denoiser
        calibration = calibrate_on(
            denoiser,
            data,
            console.progress,
            most=self.n,
            replicates=self.replicates,
            seed=self.seed,
            batch_size=self.batch_size,
            device=device,
        )
        settings: dict[str, Any] = {"seed": self.seed, "batch_size": self.batch_size, "device": device}
        structures = ["analytic", *calibration.tables]
        variances = ["small", "large", *(["learned"] if denoiser.head == "range" else []), "isotropic", "basis"]
        images = min(512, len(data.test))
        knots = len(calibration.logsnr[::2])
        bound_steps = max(2, self.steps)
        with console.progress(images * (knots * len(structures) + bound_steps * len(variances)), "checking") as bar:
            residuals = standardised(denoiser, calibration, data, structures, bar=bar, **settings)
            bounds = budget(denoiser, calibration, data, variances, steps=bound_steps, bar=bar, **settings)
        recommended: dict[str, Any] = {"sampler": "twin-ode", "grid": SAMPLERS["twin-ode"].grid, "steps": self.steps}
        extra: dict[str, Any] = {}
        grids = {"data": data.test.images(torch.arange(min(64, len(data.test))))}
        if self.choose:
            scorer = Scorer(data, metrics=("frechet", "energy"))
            cells = [Cell(name, self.steps) for name in CANDIDATES]
            with console.progress(self.choose * self.steps * len(cells), "comparing") as bar:
                found = evaluate(
                    denoiser,
                    data,
                    cells,
                    calibration=calibration,
                    n=self.choose,
                    noise=Independent(self.seed),
                    scorer=scorer,
                    batch_size=self.batch_size,
                    device=device,
                    progress=bar.update,
                )
            recommended = found.recommended or recommended
            extra = {"rows": found.rows, "floor": found.floor, "notes": found.notes, "scores": found.description}
            grids |= found.shown
            console.result(score_table(found.rows, found.floor, scorer.metrics))
        summary = summarise(
            self,
            self.seed,
            begun,
            device,
            logsnr=calibration.logsnr,
            mmse=calibration.mmse,
            mmse_se=calibration.mmse_se,
            variance=calibration.table("isotropic").variance,
            basis=calibration.twin.basis.name,
            recommended=recommended,
            images=calibration.n,
            fingerprint=calibration.fingerprint,
            network=model.about,
            data=about_data(data),
            **extra,
        )
        figures = {
            "mmse": mmse_figure(calibration, denoiser),
            "standardised": residuals,
            "budget": bounds,
            "about": {name: SAMPLERS[name].about for name in CANDIDATES},
        }
        with new_folder(self.out, overwrite=self.overwrite) as folder:
            save_model(model, folder, calibration, sampler=recommended["sampler"], grid=recommended["grid"])
            write_run(folder, summary, figures=figures, grids=grids)
        console.result(f"default sampler {recommended['sampler']}; sample with: lowvar sample --model {self.out}")
        console.result(str(self.out / "report.html"))
        return summary
