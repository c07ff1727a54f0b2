"""`lowvar evaluate`: samplers x steps on one model, scored with intervals against held-out data."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvar.cli.console import Console, score_table
from lowvar.cli.folders import check_free, new_folder
from lowvar.cli.options import (
    ClassFlags,
    DataFlags,
    MaybeText,
    Sampling,
    at_least,
    choose_device,
    parse_names,
    parse_steps,
)

__all__ = ["Evaluate"]


@dataclass(frozen=True, kw_only=True)
class Evaluate(DataFlags, ClassFlags, Sampling):
    """Score samplers on a model against held-out data.

    Runs samplers of lowvar, and with --against schedulers of diffusers on the same network from the same starting
    noise, and writes a table of scores with 95% intervals and a report. With --label one class is sampled, and scored
    against the held-out images of that class. Peers: ddpm, ddpm-large, ddpm-learned, ddim,
    dpmsolver++, dpmsolver++3, sde-dpmsolver++, unipc, deis, sa-solver, heun, and for flow and EDM models flow-euler,
    flow-heun, edm-euler, edm-dpmsolver++.
    """

    model: Path
    """folder of a diffusers pipeline"""
    out: Path
    """folder to write"""
    steps: str = "5,10,20"
    """numbers of reverse steps, separated by commas"""
    against: MaybeText = None
    """diffusers schedulers to run on the same network, separated by commas"""
    samplers: MaybeText = None
    """samplers of lowvar, separated by commas; default: the usual ones that the model has what it takes for"""
    grid: MaybeText = None
    """step grid of lowvar's samplers; default: each sampler's own"""
    spacing: str = "trailing"
    """timestep spacing of the diffusers schedulers: trailing, linspace or leading"""
    n: int = 1024
    """samples a row; small differences need 8192 and more"""
    metrics: str = "frechet,kernel,energy,sliced_wasserstein,mean,spectrum"
    """scores, separated by commas; the first decides what is recommended"""

    def run(self, console: Console) -> dict[str, Any]:
        """See the base class."""
        begun = time.perf_counter()
        at_least("--n", self.n)
        at_least("--batch-size", self.batch_size)
        steps = parse_steps(self.steps)
        check_free(self.out, overwrite=self.overwrite)
        self.check_guidance()
        from lowvar.cli.classes import other_guidance, require_classes
        from lowvar.cli.models import default_samplers, fitting, open_model
        from lowvar.cli.results import about_data, summarise, titled, write_run
        from lowvar.errors import UserError
        from lowvar.evaluation import Cell, check_cell, evaluate, peer_named, require_enough
        from lowvar.metrics import METRICS, Scorer, extractor_for
        from lowvar.own_pipelines import class_number
        from lowvar.process.noise import Independent
        from lowvar.sample import SAMPLERS

        metrics = parse_names("--metrics", self.metrics)
        unknown = [name for name in metrics if name not in METRICS]
        if unknown:
            raise UserError(f"--metrics has {unknown[0]!r}; allowed: {', '.join(METRICS)}")
        device = choose_device(self.device)
        model = open_model(self.model, device, self.label, self.guidance)
        if (note := other_guidance(model, self.label, self.guidance)) is not None:
            console.note(note)
        peers = [peer_named(name) for name in parse_names("--against", self.against)] if self.against else []
        own = parse_names("--samplers", self.samplers) if self.samplers else default_samplers(model)
        cells = [Cell(name, k, self.grid) for k in steps for name in own]
        cells += [Cell(f"diffusers:{peer.name}", k, self.spacing) for k in steps for peer in peers]
        for cell in cells:
            check_cell(cell, model.denoiser, model.calibration)
        data = self.load(self.seed)
        data = fitting(model, data)
        require_enough(self.n, data, name="--n")
        console.note(f"scoring features for {data.name}")
        extractor = extractor_for(data) if {"frechet", "kernel"} & set(metrics) else None
        if self.label is not None:
            require_classes(model, data, "--label")
            data = data.of_class(class_number(self.label, model.classes))
            console.note(f"scored against the {len(data.test)} held-out images of class {self.label}")
        scorer = Scorer(data, metrics=metrics, extractor=extractor)
        with console.progress(self.n * sum(cell.evaluations for cell in cells), "sampling") as bar:
            found = evaluate(
                model.denoiser,
                data,
                cells,
                calibration=model.calibration,
                n=self.n,
                noise=Independent(self.seed),
                scorer=scorer,
                batch_size=self.batch_size,
                device=device,
                progress=bar.update,
                done=lambda drawn, _: bar.set_postfix_str(f" {drawn.cell.label}", refresh=False),
            )
        for note in found.notes:
            console.note(note)
        about = {name: SAMPLERS[name].about for name in own} | {f"diffusers:{p.name}": p.about for p in peers}
        summary = summarise(
            self,
            self.seed,
            begun,
            device,
            rows=found.rows,
            floor=found.floor,
            recommended=found.recommended,
            floor_rows=found.floor_rows,
            notes=found.notes,
            network=model.about,
            data=about_data(data),
            classifier_accuracy=found.description["extractor_accuracy"],
            extractor_hash=found.description["extractor_hash"],
            scores=found.description,
        )
        with new_folder(self.out, overwrite=self.overwrite) as folder:
            shown = {"data": data.test.images(range(min(64, len(data.test)))), **titled(found, cells)}
            grids = {} if model.bound is None else shown  # latents are no pictures
            write_run(folder, summary, records=found.rows, figures={"about": about}, grids=grids)
        console.result(score_table(found.rows, found.floor, metrics[:3]))
        console.result(str(self.out / "report.html"))
        return summary
