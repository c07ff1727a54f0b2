"""Inpainting of held-out digits: which covariance, and whether the network's gradient is needed.

A small network trained here (300 updates, one seed) and calibrated; 60% of the pixels hidden, noise of standard
deviation .1 on the rest, 12 ancestral steps, 39 samples a digit. For every digit the root mean square error of the
posterior mean on hidden pixels, the standard deviation that the samples say there, and the coverage of the 95%
intervals over all pixels; means over digits with standard errors, and differences in error paired by digit (on the
same noise).

    python benchmarks/inverse.py          # some minutes; writes benchmarks/results/inverse.json
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lowvar import __version__
from lowvar.cli import main as lowvar
from lowvar.data import load
from lowvar.expect import Masking, Measurement, posterior
from lowvar.pipelines import denoiser_of, open_pipeline
from lowvar.process import Independent, ReverseKernel
from lowvar.process.grid import trailing

DIGITS, SAMPLES, STEPS, SHOWN, STD = 24, 39, 12, 0.4, 0.1
RESULT = Path(__file__).resolve().parent / "results" / "inverse.json"
ROWS = (
    ("Gaussian twin alone", "twin", "covariance"),
    ("calibrated in the twin's basis", "basis", "covariance"),
    ("calibrated in the twin's basis, gradient", "basis", "network"),
    ("calibrated isotropic", "isotropic", "covariance"),
    ("calibrated isotropic, gradient", "isotropic", "network"),
)


def trained(place: Path) -> Any:
    """A calibrated pipeline."""
    assert lowvar(["train", "--data", "digits", "--updates", "300", "--out", str(place / "net"), "--quiet"]) == 0
    words = ["calibrate", "--model", str(place / "net"), "--data", "digits", "--choose", "0", "--quiet"]
    assert lowvar([*words, "--out", str(place / "model")]) == 0
    return open_pipeline(place / "model")


def measured(pipeline: Any, covariance: str, through: Any) -> tuple[torch.Tensor, int]:
    """(error, said, coverage) of every digit, and evaluations a digit."""
    network = denoiser_of(pipeline)
    held, x = pipeline.scheduler.calibration, load("digits").test.images(torch.arange(DIGITS))
    denoiser = held.twin.denoiser(network.schedule) if covariance == "twin" else held.attach(network, covariance)
    rows, nfe = [], 0
    for i in range(DIGITS):
        mask = (Independent(1).uniform([i], (8, 8))[0] < SHOWN)[None]
        A = Masking(mask)
        y = A.forward(x[i : i + 1])[0] + STD * Independent(2).normal([i], A.measured_shape)[0]
        grid, noise = trailing(network.schedule, STEPS), Independent(50 + i)
        seen = Measurement(A, y, STD)
        found = posterior(denoiser, ReverseKernel(), grid, seen, SAMPLES, noise, through=through, clip=1.0)
        error = (found.mean - x[i])[~mask].square().mean().sqrt().item()
        rows.append([error, found.std[~mask].square().mean().sqrt().item(), found.coverage(x[i])])
        nfe = found.nfe
    return torch.tensor(rows, dtype=torch.float64), nfe


def summary(values: torch.Tensor) -> dict[str, float]:
    """Mean over digits with its standard error."""
    return {"value": round(float(values.mean()), 4), "se": round(float(values.std()) / math.sqrt(len(values)), 4)}


def main() -> None:
    """Runs all rows and writes the result."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        pipeline = trained(Path(folder))
        found = {name: measured(pipeline, covariance, through) for name, covariance, through in ROWS}
    base = found["calibrated in the twin's basis"][0]
    rows = [
        {
            "name": name,
            "nfe": nfe,
            "error": summary(values[:, 0]),
            "said": summary(values[:, 1]),
            "coverage": summary(values[:, 2]),
            "error_less_basis": summary(values[:, 0] - base[:, 0]),
        }
        for name, (values, nfe) in found.items()
    ]
    settings = {"digits": DIGITS, "samples": SAMPLES, "steps": STEPS, "shown": SHOWN, "noise_std": STD}
    record = {"version": __version__, "settings": settings, "seconds": round(time.perf_counter() - begun), "rows": rows}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
