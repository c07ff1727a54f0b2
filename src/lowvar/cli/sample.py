"""`lowvar sample`: samples of a model, with per-sample seeds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvar.cli.console import Console
from lowvar.cli.folders import check_free, new_file
from lowvar.cli.options import MaybeFloat, MaybePath, MaybeText, Sampling, at_least, choose_device
from lowvar.errors import UserError

__all__ = ["Sample"]


@dataclass(frozen=True, kw_only=True)
class Sample(Sampling):
    """Draw samples from a model.

    Writes `samples` (float32 in [-1, 1]) and `seeds` to one .npz file. The sampler is the one in the model folder's
    scheduler, unless one is named: ddpm-small, ddpm-large, ddpm-learned, ddpm-analytic, ddpm-isotropic, ddpm-pixel,
    ddpm-basis, ddim, ddim-basis, adams-ode, adams-sde, twin-ode-1, twin-ode, twin-sde-1, twin-sde.
    """

    model: Path
    """folder of a diffusers pipeline"""
    out: Path
    """file to write, ending in .npz"""
    steps: int = 20
    """number of reverse steps"""
    n: int = 64
    """number of samples"""
    sampler: MaybeText = None
    """name of the sampler; default: the one in the folder's scheduler"""
    covariance: MaybeText = None
    """of ddpm-* and ddim-*: small, large, learned, analytic, isotropic, channel, pixel or basis"""
    eta: MaybeFloat = None
    """stochasticity of ddpm-* and ddim-*: 0 (DDIM) to 1 (ancestral)"""
    tau: MaybeFloat = None
    """stochasticity of adams-* and twin-*: 0 (ODE) to 1 (SDE)"""
    grid: MaybeText = None
    """trailing, uniform, leading, quadratic, uniform-logsnr, karras or variance-matched;
    default: the sampler's own"""
    png: MaybePath = None
    """also write a picture of the first samples"""

    def run(self, console: Console) -> dict[str, Any]:
        """See the base class."""
        begun = time.perf_counter()
        at_least("--n", self.n)
        at_least("--batch-size", self.batch_size)
        at_least("--steps", self.steps)
        if self.out.suffix != ".npz":
            raise UserError(f"--out is {self.out}; samples go to one file, give a name that ends in .npz")
        if self.png is not None and self.png.suffix.lower() != ".png":
            raise UserError(f"--png is {self.png}; give a name that ends in .png")
        for path in (self.out, self.png):
            if path is not None:
                check_free(path, overwrite=self.overwrite)
        import numpy as np

        from lowvar.cli.models import open_model, run_scheduler, scheduler_of
        from lowvar.evaluation import check_steps
        from lowvar.process.noise import Independent

        device = choose_device(self.device)
        model = open_model(self.model, device)
        scheduler = scheduler_of(
            model, self.sampler, covariance=self.covariance, eta=self.eta, tau=self.tau, grid=self.grid
        )
        check_steps(self.steps, model.denoiser.schedule)
        with console.progress(self.n * self.steps, "sampling") as bar:
            samples = run_scheduler(
                model,
                scheduler,
                self.steps,
                self.n,
                Independent(self.seed),
                batch_size=self.batch_size,
                device=device,
                progress=bar.update,
            )
        array = samples.numpy()
        bad = int((~np.isfinite(array)).reshape(len(array), -1).any(1).sum())
        if bad:
            raise UserError(
                f"{bad} of {self.n} samples are not finite: the sampler diverged in {self.steps} steps; "
                "give more --steps or another --sampler"
            )
        with new_file(self.out, overwrite=self.overwrite) as file:
            np.savez(file, samples=array, seeds=np.arange(self.n, dtype=np.int64))
        console.result(str(self.out))
        if self.png is not None:
            with new_file(self.png, overwrite=self.overwrite) as file:
                write_png(file, samples)
            console.result(str(self.png))
        from lowvar.cli.results import summarise

        nfe = self.steps * model.denoiser.nfe
        names = ("sampler", "variance", "eta", "tau", "grid", "timestep_spacing")
        settings = {name: scheduler.config[name] for name in names}
        figures = {"scheduler": settings, "steps": self.steps, "nfe": nfe, "n": self.n}
        return summarise(self, self.seed, begun, device, **figures, shape=list(model.shape), samples=str(self.out))


def write_png(file: Any, samples: Any, most: int = 64, scale: int = 4) -> None:
    """The first samples (n, C, H, W) in [-1, 1] as a picture, nearly square, small images enlarged without smoothing.

    Args:
        file: open for binary writing.
        samples: float tensor.
        most: how many are shown.
        scale: smallest factor by which images under 64 pixels are enlarged.
    """
    import math

    import torch
    from PIL import Image

    x = samples[:most]
    n, c, h, w = x.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    factor = max(1, scale if max(h, w) < 64 else 1)
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    h, w, gap = h * factor, w * factor, 2
    sheet = torch.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[:, top : top + h, left : left + w] = image
    array = sheet.permute(1, 2, 0).numpy() if c == 3 else sheet[0].numpy()
    Image.fromarray(array).save(file, format="PNG")
