"""A made-up run of `lowvar demo` with everything that a report can show: 13 samplers at 5 step counts in 4 metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STEPS = (3, 5, 10, 20, 50)
METRICS = {"frechet": (0.9, 0.06), "kernel": (0.05, 0.0006), "energy": (0.3, 0.0006), "sliced_wasserstein": (0.9, 0.06)}
# name: quality at 3 steps relative to DDIM, order of convergence
SAMPLERS = {
    "ddpm-small": (5.0, 0.9),
    "ddpm-large": (9.0, 1.1),
    "ddpm-learned": (4.0, 0.95),
    "ddpm-isotropic": (3.4, 1.0),
    "ddpm-basis": (1.9, 0.9),
    "ddim": (1.0, 0.8),
    "adams-ode": (0.6, 1.2),
    "twin-ode": (0.22, 0.8),
    "twin-sde": (0.3, 1.0),
    "diffusers:ddpm": (5.1, 0.9),
    "diffusers:ddim": (1.05, 0.8),
    "diffusers:dpmsolver++": (0.62, 1.15),
    "diffusers:unipc": (0.58, 1.2),
}


def demo_summary() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows = []
    for metric, (scale, floor) in METRICS.items():
        for sampler, (start, order) in SAMPLERS.items():
            for steps in STEPS:
                value = floor + scale * start * (3 / steps) ** (1.6 * order) * float(
                    np.exp(0.06 * rng.standard_normal())
                )
                half = 0.05 * value + 0.25 * floor
                value -= 0.5 * floor * float(rng.random()) if metric in ("kernel", "energy") else 0.0
                value -= 0.0008 if metric == "kernel" and steps == 50 and sampler == "twin-ode" else 0.0
                ends = {"value": value, "low": value - half, "high": value + half}
                rows.append(
                    {"sampler": sampler, "grid": "trailing", "steps": steps, "nfe": steps, "metric": metric, **ends}
                )
        value = floor + 0.9 * scale
        ends = {"value": value, "low": 0.94 * value, "high": 1.06 * value}
        rows.append({"sampler": "Gaussian twin alone", "grid": "", "steps": 0, "nfe": 0, "metric": metric, **ends})
    return {
        "command": "demo",
        "version": "0.1.0",
        "seed": 0,
        "seconds": 462.3,
        "config": {
            "data": "digits",
            "schedule": "cosine",
            "train": {"updates": 4000, "batch_size": 64, "learning_rate": 0.001, "ema": 0.999},
            "steps": [3, 5, 10, 20, 50],
            "device": "cpu",
        },
        "rows": rows,
        "floor": {
            "frechet": {"value": 0.06, "low": 0.05, "high": 0.07},
            "kernel": {"value": 0.0006, "low": 0.0001, "high": 0.0011},
            "energy": 0.0006,
            "sliced_wasserstein": 0.06,
        },
        "recommended": {"sampler": "twin-ode", "grid": "trailing", "steps": 10},
        "environment": {
            "python": "3.11.9",
            "torch": "2.13.0",
            "diffusers": "0.42.1",
            "platform": "Linux x86_64",
            "device": "cpu, 2 cores",
        },
        "network": {"name": "UNet2DModel", "parameters": 421_586, "block_out_channels": [32, 64]},
        "classifier_accuracy": 0.9833,
        "extractor_hash": "5b1f09c2d7a94e60",
        "data": {"name": "digits", "shape": [1, 8, 8], "train": 1197, "calibration": 300, "test": 300},
    }


def demo_figures() -> dict[str, Any]:
    logsnr = np.linspace(-12, 12, 25)
    sigmoid = 1 / (1 + np.exp(logsnr))
    twin = 0.28 * sigmoid / (0.28 + sigmoid) + 1e-5
    mmse = twin * (0.25 + 0.75 / (1 + np.exp(1.2 * (logsnr + 1.5))) + 0.3 / (1 + np.exp(-0.8 * (logsnr - 6))))
    wave = np.sin(np.arange(25) * 0.7)
    grid = np.linspace(-10, 9, 20)
    bump = np.exp(-((grid - 2) ** 2) / 12)
    return {
        "mmse": {
            "logsnr": logsnr.tolist(),
            "mmse": mmse.tolist(),
            "se": (0.03 * mmse).tolist(),
            "twin": twin.tolist(),
            "analytic": (mmse * (1 + 0.1 * wave)).tolist(),
        },
        "standardised": {
            name: {"logsnr": logsnr.tolist(), "value": (1 + a * wave + b).tolist(), "se": [0.02] * 25}
            for name, a, b in (
                ("isotropic", 0.03, 0.01),
                ("pixel", 0.04, 0.0),
                ("basis", 0.03, -0.01),
                ("learned", 0.2, 0.35),
            )
        },
        "budget": {
            name: {
                "logsnr": grid.tolist(),
                "bits": (a * (0.02 + 0.2 * bump)).tolist(),
                "se": (0.02 * a * bump).tolist(),
                "total": float(a * (0.02 + 0.2 * bump).sum() + 0.43),
                "total_se": 0.012,
                "prior": 0.011,
                "decoder": 0.42,
            }
            for name, a in (("small", 2.6), ("large", 1.9), ("learned", 1.25), ("isotropic", 1.2), ("basis", 1.0))
        },
        "about": {
            "ddpm-small": "ancestral, variance beta_tilde",
            "ddpm-basis": "ancestral, calibrated variance in the twin's basis",
            "twin-ode": "twin, ODE, predictor-corrector",
            "twin-sde": "twin, SDE, predictor-corrector",
            "diffusers:ddim": "DDIMScheduler as shipped",
        },
    }


def demo_records() -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    records = []
    logsnr = np.linspace(-10, 10, 10)
    for update in range(100, 4001, 100):
        value = 0.05 + 0.9 * float(np.exp(-update / 450))
        record: dict[str, Any] = {"update": update, "loss": value * float(np.exp(0.15 * rng.standard_normal()))}
        if update % 500 == 0:
            bins = value * (0.1 + 2 / (1 + np.exp(-0.6 * logsnr)))
            record |= {"validation_loss": 1.05 * value, "low": value, "high": 1.1 * value}
            record["bins"] = [
                {"logsnr": float(x), "loss": float(y), "se": 0.04 * float(y)} for x, y in zip(logsnr, bins, strict=True)
            ]
        records.append(record | {"seconds": 0.05 * update, "images_per_second": 1280.0})
    return records


def demo_grids() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(2)
    digits = (np.asarray(load_digits(return_X_y=True)[0])[:64].reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
    grids = {"data": digits}
    for steps in (5, 20):
        for sampler, (start, order) in SAMPLERS.items():
            noise = rng.standard_normal(digits[:24].shape).astype(np.float32)
            grids[f"{sampler}@{steps}"] = digits[24:48] + 0.5 * min(start, 1.5) * (3 / steps) ** order * noise
    return grids


def write_run(
    folder: Path, summary: dict[str, Any], figures: Any = None, records: Any = None, grids: Any = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    if figures is not None:
        (folder / "figures.json").write_text(json.dumps(figures))
    if records is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if grids is not None:
        np.savez(folder / "grids.npz", **grids)
    return folder


WriteRun = Callable[..., Path]


@pytest.fixture
def write() -> WriteRun:
    """`write(folder, summary, figures, records, grids)` writes a run folder and returns it."""
    return write_run


@pytest.fixture
def summary() -> dict[str, Any]:
    """The summary of the made-up demo; a fresh one each time."""
    return demo_summary()


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up demo as a run folder with its report; nobody changes it."""
    from lowvar.report import build

    folder = tmp_path_factory.mktemp("run") / "demo"
    build(write_run(folder, demo_summary(), demo_figures(), demo_records(), demo_grids()))
    return folder
