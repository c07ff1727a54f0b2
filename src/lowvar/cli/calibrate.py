"""`lowvar calibrate`: measures a model's reverse covariance and writes the model with a calibrated scheduler."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowvar.cli.console import Console, score_table
from lowvar.cli.folders import check_free, new_folder
from lowvar.cli.options import DataFlags, MaybeText, Sampling, at_least, choose_device, parse_names
from lowvar.errors import UserError

if TYPE_CHECKING:
    import torch

    from lowvar.calibrate import Calibration
    from lowvar.cli.models import Model
    from lowvar.data import Data

__all__ = ["Calibrate"]

CANDIDATES = ("ddpm-basis", "unipc-basis", "adams-ode", "twin-ode", "twin-flow")
_ROUNDS = 8
_LEAST = 6  # images a head needs


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

    def run(self, console: Console) -> dict[str, Any]:
        """See the base class."""
        begun = time.perf_counter()
        heads = self._checked()
        from lowvar.cli.measure import calibrate_on, mmse_figure
        from lowvar.cli.models import fitting, open_model, save_model
        from lowvar.cli.results import about_data, summarise, write_run
        from lowvar.evaluation import check_steps
        from lowvar.sample import SAMPLERS

        device = choose_device(self.device)
        model = open_model(self.model, device)
        check_steps(self.steps, model.denoiser.schedule)
        data = self.load(self.seed)
        data = fitting(model, data)
        self._heads_fit(heads, model, data)
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
        calibration, learned = self._learn(heads, model, calibration, data, device, console)
        residuals, bounds = self._measure(model, calibration, data, device, console)
        recommended, scores, grids = self._compare(model, calibration, data, device, console)
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
            **({"heads": learned} if heads else {}),
            **scores,
        )
        figures = {
            "mmse": mmse_figure(calibration, model.denoiser),
            "standardised": residuals,
            "budget": bounds,
            "about": {name: SAMPLERS[name].about for name in CANDIDATES},
        }
        with new_folder(self.out, overwrite=self.overwrite) as folder:
            save_model(model, folder, calibration, sampler=recommended["sampler"], grid=recommended["grid"])
            write_run(folder, summary, figures=figures, grids=None if model.bound is None else grids)  # latents
        console.result(f"default sampler {recommended['sampler']}; sample with: lowvar sample --model {self.out}")
        console.result(str(self.out / "report.html"))
        return summary

    def _checked(self) -> list[str]:
        """Names of the heads, after a look at all flags; nothing heavy is imported before."""
        for flag in ("n", "replicates", "batch_size", "steps", "head_draws"):
            at_least(f"--{flag.replace('_', '-')}", getattr(self, flag))
        at_least("--choose", self.choose, 0)
        check_free(self.out, overwrite=self.overwrite)
        if self.head is None:
            return []
        from lowvar.calibrate import HEADS

        names, known = parse_names("--head", self.head), (*HEADS, "convert")
        for name in names:
            if name not in known:
                raise UserError(f"--head is {name!r}; allowed: {', '.join(known)}")
        if "lowrank" in names and not 0 <= self.rank <= 16:
            raise UserError(f"--rank is {self.rank}; allowed: 0 to 16")
        return names

    def _heads_fit(self, heads: list[str], model: Model, data: Data) -> None:
        """Refuses heads that this model or data cannot have, before anything is computed."""
        if "convert" in heads and model.denoiser.head != "range":
            raise UserError("--head convert reads a network's learned-range head, and this network has none")
        found = min(self.n, len(data.calibration))
        if heads and found < _LEAST:
            from lowvar.report.nouns import nouns_of

            many = nouns_of(data.shape, data.scaling_factor).many
            raise UserError(f"a head needs at least {_LEAST} calibration {many} and there are {found}; raise --n")

    def _learn(
        self,
        heads: list[str],
        model: Model,
        calibration: Calibration,
        data: Data,
        device: torch.device,
        console: Console,
    ) -> tuple[Calibration, dict[str, Any]]:
        """The calibration with its heads, and what each gained."""
        if not heads:
            return calibration, {}
        import dataclasses

        import torch

        from lowvar.calibrate import FitConfig, add_head, convert
        from lowvar.process.noise import Independent

        images = data.calibration.images(torch.arange(min(self.n, len(data.calibration)))).to(device)
        basis = calibration.twin.basis.name if self.head_basis == "auto" else self.head_basis
        pool = max(1, self.head_draws // _ROUNDS)
        config = FitConfig(rounds=_ROUNDS, pool=pool, chunk=self.batch_size)
        found: dict[str, Any] = {}
        for k, name in enumerate(heads):
            noise = Independent(self.seed + 100 + k)
            if name == "convert":
                table = calibration.table("pixel")
                converted, report = convert(model.denoiser, table, images, noise, chunk=self.batch_size)
                calibration = dataclasses.replace(calibration, converted=converted)
                about = {"basis": "pixel"}
            else:
                with console.progress(_ROUNDS, f"training {name}") as bar:
                    calibration, report = add_head(
                        calibration,
                        model.denoiser,
                        images,
                        name,
                        noise,
                        basis=basis,
                        rank=self.rank,
                        config=config,
                        progress=lambda _, bar=bar: bar.update(),
                    )
                about = {"basis": basis, **({"rank": self.rank} if name == "lowrank" else {})}
            found[name] = about | {"note": str(report)} | vars(report)
            console.result(f"{name}: {report}")
        return calibration, found

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

    def _compare(
        self, model: Model, calibration: Calibration, data: Data, device: torch.device, console: Console
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The recommended sampler, the scores it rests on, and images to show."""
        import torch

        from lowvar.evaluation import Cell, evaluate
        from lowvar.metrics import Scorer
        from lowvar.process.noise import Independent

        recommended: dict[str, Any] = {"sampler": "twin-flow", "grid": "path", "steps": self.steps}
        grids = {"data": data.test.images(torch.arange(min(64, len(data.test))))}
        if not self.choose:
            return recommended, {}, grids
        scorer = Scorer(data, metrics=("frechet", "energy"))
        cells = [Cell(name, self.steps) for name in CANDIDATES]
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
