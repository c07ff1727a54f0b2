"""`lowvar calibrate`: measures a model's reverse covariance and writes the model with a calibrated scheduler."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowvar.cli.console import Console, score_table
from lowvar.cli.folders import check_free, new_folder
from lowvar.cli.options import DataFlags, MaybePath, MaybeText, Sampling, at_least, choose_device
from lowvar.errors import UserError

if TYPE_CHECKING:
    import torch

    from lowvar.calibrate import Calibration
    from lowvar.cli.models import Model
    from lowvar.data import Data
    from lowvar.evaluation import Cell

__all__ = ["Calibrate"]

CANDIDATES = ("ddpm-basis", "unipc-basis", "adams-ode", "twin-ode", "twin-flow")


@dataclass(frozen=True, kw_only=True)
class Calibrate(DataFlags, Sampling):
    """Calibrate the reverse covariance and the Gaussian twin of a model.

    Measures, on data the network was not trained on, the error of its denoiser by noise level, and writes the model
    again with a scheduler that uses it. Samplers that need the calibration are compared in a few steps, and the best
    becomes the scheduler's default. With --head, small networks learn the covariance of every single state.
    """

    model: Path
    """folder of a diffusers pipeline"""
    out: Path
    """folder to write: a diffusers pipeline with a calibrated scheduler"""
    n: int = 1024
    """images or rows of the calibration split to measure on, at most"""
    replicates: int = 4
    """noises of each at every noise level"""
    steps: int = 10
    """steps for which samplers are compared"""
    choose: int = 512
    """samples a sampler in that comparison; 0: no comparison, twin-flow becomes the default"""
    head: MaybeText = None
    """covariances that depend on the state: npr, sn, ocm, lowrank (trained), convert (from a network's own
    learned-range head); several separated by commas; default none"""
    head_basis: Literal["auto", "pixel", "dct", "pca"] = "auto"
    """coordinates of trained heads; auto: those of the Gaussian twin, pca up to 1024 numbers an image and dct above"""
    rank: int = 4
    """directions of --head lowrank, 0 to 16"""
    head_draws: int = 32768
    """noisy images that a head learns from"""
    noise: MaybeText = None
    """samplers whose missing noise is measured on their grid and kept: ddim-noise, dpmpp-2m-noise, unipc-noise, each
    with its number of steps, as in unipc-noise@5,unipc-noise@10 (without a number: --steps)"""
    from_profile: MaybePath = None
    """folder of a `lowvar profile`: the sampler, grid and steps of its verdict become the default, without another
    comparison"""
    by_class: bool = False
    """also measure a table for each class, of a model trained with --conditional and labelled data; `lowvar sample
    --label` uses it"""
    guidance: float = 1.0
    """scale of classifier-free guidance that --by-class measures under, the same as in `lowvar sample --guidance`"""

    def run(self, console: Console) -> dict[str, Any]:
        """See the base class."""
        begun = time.perf_counter()
        heads, noisy = self._checked()
        advised = None if self.from_profile is None else _advised(self.from_profile)
        from lowvar.cli.classes import calibrate_by_class, require_classes
        from lowvar.cli.heads import learn_heads, require_heads
        from lowvar.cli.measure import calibrate_on, mmse_figure
        from lowvar.cli.models import fitting, open_model, save_model
        from lowvar.cli.noise import measure_noise
        from lowvar.cli.results import about_data, summarise, write_run
        from lowvar.evaluation import check_steps, require_enough
        from lowvar.sample import SAMPLERS

        device = choose_device(self.device)
        model = open_model(self.model, device)
        at = self.steps if advised is None else advised["steps"]
        for steps in (at, *(cell.steps for cell in noisy)):
            check_steps(steps, model.denoiser.schedule)
        data = self.load(self.seed)
        data = fitting(model, data)
        if self.choose and advised is None:
            try:
                require_enough(self.choose, data, name="--choose")
            except UserError as error:
                raise UserError(f"{error}; or --choose 0, for no comparison of samplers") from error
        require_heads(heads, model, data, min(self.n, len(data.calibration)))
        if self.by_class:
            require_classes(model, data)
        calibration = calibrate_on(
            model.denoiser,
            data,
            console.progress,
            most=self.n,
            replicates=self.replicates,
            seed=self.seed,
            batch_size=self.batch_size,
            device=device,
        )
        found: dict[str, Any] = {}
        if heads:
            images = data.calibration.images(range(min(self.n, len(data.calibration)))).to(device)
            calibration, found["heads"] = learn_heads(
                heads,
                model,
                calibration,
                images,
                basis=self.head_basis,
                rank=self.rank,
                draws=self.head_draws,
                seed=self.seed,
                batch_size=self.batch_size,
                console=console,
            )
        if noisy:
            calibration, found["noise"] = measure_noise(noisy, model, calibration, self.batch_size, device, console)
        if self.by_class:
            calibration, found["by_class"] = calibrate_by_class(
                model,
                calibration,
                data,
                guidance=self.guidance,
                most=self.n,
                replicates=self.replicates,
                seed=self.seed,
                batch_size=self.batch_size,
                device=device,
                console=console,
            )
        residuals, bounds = self._measure(model, calibration, data, device, console)
        candidates = self._candidates(model, calibration, noisy)
        recommended, scores, grids = self._compare(candidates, model, calibration, data, device, console, advised)
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
            **found,
            **scores,
        )
        figures = {
            "mmse": mmse_figure(calibration, model.denoiser),
            "standardised": residuals,
            "budget": bounds,
            "about": {name: SAMPLERS[name].about for name in candidates},
        }
        with new_folder(self.out, overwrite=self.overwrite) as folder:
            save_model(model, folder, calibration, sampler=recommended["sampler"], grid=recommended["grid"])
            write_run(folder, summary, figures=figures, grids=None if model.bound is None else grids)  # latents
        console.result(f"default sampler {recommended['sampler']}; sample with: lowvar sample --model {self.out}")
        console.result(str(self.out / "report.html"))
        return summary

    def _checked(self) -> tuple[list[str], list[Cell]]:
        """Names of the heads and noisy samplers, after a look at all flags; nothing heavy is imported before."""
        for flag in ("n", "replicates", "batch_size", "steps", "head_draws"):
            at_least(f"--{flag.replace('_', '-')}", getattr(self, flag))
        at_least("--choose", self.choose, 0)
        check_free(self.out, overwrite=self.overwrite)
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise UserError(f"--guidance is {self.guidance:g}; give a number from 0, for example 2")
        if self.guidance != 1 and not self.by_class:
            raise UserError(f"--guidance is {self.guidance:g}, and there is no class to guide to; give --by-class")
        heads: list[str] = []
        noisy: list[Cell] = []
        if self.head is not None:
            from lowvar.cli.heads import parse_heads

            heads = parse_heads(self.head, self.rank)
        if self.noise is not None:
            from lowvar.cli.noise import parse_noise

            noisy = parse_noise(self.noise, self.steps)
        return heads, noisy

    def _measure(
        self, model: Model, calibration: Calibration, data: Data, device: torch.device, console: Console
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Standardised residuals and the bound by step on the held-out split."""
        from lowvar.cli.measure import budget, standardised

        settings: dict[str, Any] = {"seed": self.seed, "batch_size": self.batch_size, "device": device}
        state = [*calibration.heads, *(["convert"] if calibration.converted is not None else [])]
        structures = ["analytic", *calibration.tables, *state]
        range_head = ["learned"] if model.denoiser.head == "range" else []
        variances = ["small", "large", *range_head, "isotropic", "basis", *state]
        knots, steps = len(calibration.logsnr[::2]), max(2, self.steps)
        work = min(512, len(data.test)) * (knots * len(structures) + steps * len(variances))
        with console.progress(work, "checking") as bar:
            residuals = standardised(model.denoiser, calibration, data, structures, bar=bar, **settings)
            bounds = budget(model.denoiser, calibration, data, variances, steps=steps, bar=bar, **settings)
        return residuals, bounds

    def _candidates(self, model: Model, calibration: Calibration, noisy: Sequence[Cell]) -> list[str]:
        """Samplers that are compared: the usual ones, both kernels with each head, and noise that was measured here."""
        from lowvar.sample import SAMPLERS

        held = [name for name in calibration.state_covariances if name != "convert" or model.denoiser.head == "range"]
        heads = [name for name, sampler in SAMPLERS.items() if sampler.covariance in held]
        return [*CANDIDATES, *heads, *(cell.sampler for cell in noisy if cell.steps == self.steps)]

    def _compare(
        self,
        candidates: Sequence[str],
        model: Model,
        calibration: Calibration,
        data: Data,
        device: torch.device,
        console: Console,
        advised: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The recommended sampler, the scores it rests on, and images to show; an advised one is not compared."""
        import torch

        from lowvar.evaluation import Cell, evaluate
        from lowvar.metrics import Scorer
        from lowvar.process.noise import Independent

        recommended: dict[str, Any] = {"sampler": "twin-flow", "grid": "path", "steps": self.steps}
        grids = {"data": data.test.images(torch.arange(min(64, len(data.test))))}
        if advised is not None:
            return advised, {}, grids
        if not self.choose:
            return recommended, {}, grids
        scorer = Scorer(data, metrics=("frechet", "energy"))
        cells = [Cell(name, self.steps) for name in candidates]
        with console.progress(self.choose * self.steps * len(cells), "comparing") as bar:
            found = evaluate(
                model.denoiser,
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
        console.result(score_table(found.rows, found.floor, scorer.metrics))
        scores = {"rows": found.rows, "floor": found.floor, "notes": found.notes, "scores": found.description}
        return found.recommended or recommended, scores, grids | found.shown


def _advised(folder: Path) -> dict[str, Any]:
    """Sampler, grid and steps of a profile's verdict.

    Raises:
        UserError: if it has none.
    """
    from lowvar.cli.profile_summary import read_profile
    from lowvar.profile import applied

    summary = read_profile(folder, "--from-profile")
    found = applied(summary.get("verdict") or [], "sampling") or summary.get("recommended") or {}
    wanted = ("sampler", "grid", "steps")
    if not all(k in found for k in wanted):
        raise UserError(
            f"--from-profile is {folder}, whose verdict names no sampler; profile with --parts sampling, or leave it "
            "out for a comparison here"
        )
    return {k: found[k] for k in wanted}
