"""`lowvar demo`: the whole chain on the bundled digits, from training to the report."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvar.cli.console import Console, score_table
from lowvar.cli.folders import check_free, clear_partial, partial_of, publish
from lowvar.cli.options import MaybeInt, Sampling, at_least, choose_device
from lowvar.cli.stops import stop_word
from lowvar.cli.train import about_schedule, run_training, save_trained, weighting_figure

if TYPE_CHECKING:
    from lowvar.evaluation import Cell, Evaluation
    from lowvar.train.config import TrainConfig

__all__ = ["Demo"]

OWN = ("ddpm-small", "ddpm-large", "ddpm-learned", "ddpm-basis", "twin-ode", "twin-sde", "twin-flow")
PEERS = ("diffusers:ddpm", "diffusers:ddim", "diffusers:dpmsolver++")
STEPS = (3, 5, 10, 20)
LAST = (50, ("ddpm-basis", "twin-sde", "diffusers:ddpm"))  # many steps are dear: few rows


@dataclass(frozen=True, kw_only=True)
class Demo(Sampling):
    """Train, calibrate, sample and score on the bundled digits, with a report at the end.

    Takes about 7 minutes on two cores. An interrupted demo goes on where it was when the same command is given again;
    a finished one is replaced.
    """

    out: Path = Path("runs/demo")
    """folder to write"""
    updates: MaybeInt = None
    """training updates; default: those of `lowvar train`"""
    n: int = 1024
    """samples a row of the table"""
    quick: bool = False
    """a tiny network and few samples, in seconds: shows that everything runs, not what it is worth"""

    def run(self, console: Console) -> dict[str, Any]:
        """See the base class."""
        begun = time.perf_counter()
        for flag, value in (
            ("--updates", 1 if self.updates is None else self.updates),
            ("--batch-size", self.batch_size),
        ):
            at_least(flag, value)
        at_least("--n", self.n, 64)
        check_free(self.out, overwrite=self.overwrite, replaces_runs=True)
        from lowvar.data import load

        device = choose_device(self.device)
        partial = partial_of(self.out)
        resume = self._prepare(partial)
        try:
            summary = self._chain(console, partial, resume, begun, load("digits"), device)
        except KeyboardInterrupt as stop:
            raise type(stop)(f"{stop_word(stop)}; give the same command again to go on where it was") from None
        publish(partial, self.out)
        console.result(score_table(summary["rows"], summary["floor"], ("frechet", "kernel", "energy")))
        console.result(str(self.out / "report.html"))
        return summary

    def _prepare(self, partial: Path) -> bool:
        """Makes the unfinished run's folder; whether one of the same flags was there."""
        mark = json.dumps(self.resolved() | {"out": None}, sort_keys=True)
        file = partial / "demo.json"
        if partial.exists():
            if file.is_file() and file.read_text(encoding="utf-8") == mark and not self.overwrite:
                return True
            clear_partial(partial)
        partial.mkdir(parents=True)
        (partial / "config.yaml").touch()
        file.write_text(mark, encoding="utf-8")
        return False

    def _config(self) -> TrainConfig:
        from lowvar.train.config import config_from

        if not self.quick:
            given = {} if self.updates is None else {"updates": self.updates}
            return config_from({**given, "seed": self.seed})
        tiny = {"width": 8, "levels": 2}
        return config_from({"updates": 30, "batch_size": 16, "warmup": 5, "seed": self.seed, "network": tiny})

    def _cells(self) -> list[Cell]:
        from lowvar.evaluation import Cell

        if self.quick:
            return [Cell(name, steps) for steps in (2, 3) for name in (*OWN, *PEERS)]
        cells = [Cell(name, steps) for steps in STEPS for name in (*OWN, *PEERS)]
        return cells + [Cell(name, LAST[0]) for name in LAST[1]]

    def _chain(
        self, console: Console, partial: Path, resume: bool, begun: float, data: Any, device: Any
    ) -> dict[str, Any]:
        import torch

        from lowvar.cli.measure import budget, calibrate_on, mmse_figure, standardised
        from lowvar.cli.models import model_of, save_model
        from lowvar.cli.results import about_data, summarise, write_run
        from lowvar.evaluation import PEERS as ABOUT_PEERS
        from lowvar.evaluation import evaluate
        from lowvar.metrics import Scorer, digit_classifier
        from lowvar.process.noise import Independent
        from lowvar.sample import SAMPLERS
        from lowvar.train.loop import Trainer

        config = self._config()
        trainer = Trainer(data, config, partial, resume=resume, device=self.device)
        last = run_training(trainer, partial, console)
        model = model_of(save_trained(trainer, partial), device)
        denoiser, n = model.denoiser, 64 if self.quick else self.n
        settings: dict[str, Any] = {"seed": self.seed, "batch_size": self.batch_size, "device": device}
        most = 32 if self.quick else 512
        calibration = calibrate_on(
            denoiser, data, console.progress, most=most, replicates=1 if self.quick else 4, **settings
        )
        structures, variances = ("isotropic", "basis", "analytic"), ("small", "large", "learned", "isotropic", "basis")
        steps, images = 4 if self.quick else 20, min(most, len(data.test))
        work = images * (len(structures) * len(calibration.logsnr[::2]) + len(variances) * steps)
        with console.progress(work, "checking the calibration") as bar:
            residuals = standardised(denoiser, calibration, data, structures, most=most, bar=bar, **settings)
            bounds = budget(denoiser, calibration, data, variances, steps=steps, most=most, bar=bar, **settings)
        console.note("training the classifier whose features the scores use")
        extractor = digit_classifier(data, updates=20) if self.quick else None
        scorer = Scorer(data, extractor=extractor)
        cells = self._cells()
        with console.progress(n * sum(cell.evaluations for cell in cells), "sampling") as bar:
            found = evaluate(
                denoiser,
                data,
                cells,
                calibration=calibration,
                n=n,
                noise=Independent(self.seed),
                scorer=scorer,
                batch_size=self.batch_size,
                device=device,
                progress=bar.update,
                done=lambda drawn, _: bar.set_postfix_str(f" {drawn.cell.label}", refresh=False),
            )
        for note in found.notes:
            console.note(note)
        chosen = found.recommended or {"sampler": "twin-flow", "grid": "path", "steps": 10}
        save_model(model, partial, calibration, sampler=chosen["sampler"], grid=chosen["grid"])
        summary = summarise(
            self,
            self.seed,
            begun,
            device,
            rows=found.rows,
            floor=found.floor,
            recommended=chosen,
            floor_rows=found.floor_rows,
            notes=found.notes,
            updates=trainer.update,
            loss=last["loss"],
            validation_loss=last["validation_loss"],
            training_seconds=round(trainer.seconds, 3),
            schedule=about_schedule(trainer),
            network=model.about,
            data=about_data(data),
            training=dataclasses.asdict(config),
            classifier_accuracy=found.description["extractor_accuracy"],
            extractor_hash=found.description["extractor_hash"],
            scores=found.description,
        )
        about = {name: SAMPLERS[name].about for name in OWN}
        about |= {name: ABOUT_PEERS[name.removeprefix("diffusers:")].about for name in PEERS}
        figures = {
            "mmse": mmse_figure(calibration, denoiser),
            "standardised": residuals,
            "budget": bounds,
            "about": about,
            "paired": _paired(found, cells),
            "weighting": weighting_figure(trainer),
        }
        with (partial / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in found.rows)
        grids = {"data": data.test.images(torch.arange(64)), **found.shown}
        write_run(partial, summary, figures=figures, grids=grids)
        shutil.rmtree(partial / "checkpoints", ignore_errors=True)
        (partial / "demo.json").unlink()
        return summary


def _paired(found: Evaluation, cells: list[Cell]) -> list[dict[str, Any]]:
    """Differences on common noise: lowvar's samplers against the peers, the calibrated variance against the others."""
    scored = [cell for cell in cells if (cell.label, "frechet") in found.replicates]
    rows = []
    for a in scored:
        rivals = ("ddpm-small", "ddpm-large", "ddpm-learned") if a.sampler == "ddpm-basis" else ()
        for b in scored:
            if a.is_peer or a.steps != b.steps or not (b.is_peer or b.sampler in rivals):
                continue
            for metric in ("frechet", "kernel"):
                i = found.paired(a, b, metric)
                row = {"steps": a.steps, "metric": metric, "sampler": a.sampler, "against": b.sampler}
                rows.append(row | {"value": i.value, "low": i.low, "high": i.high})
    return rows
