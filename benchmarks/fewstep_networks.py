r"""Trains the few-step benchmark's networks by stock diffusers code: nothing of lowvar but the data arrays.

    UNet2DModel, DDPMScheduler() (1000 steps, linear betas 1e-4 .. 0.02), plain MSE on epsilon, AdamW, cosine learning
    rate with warm-up, EMAModel; saved as a DDPMPipeline.

So a scheduler that does well on them does well on networks that know nothing of it. Checkpoints every `_EVERY` updates;
an interrupted training goes on where it was, and a network whose folder is there is not trained again.

    python benchmarks/fewstep_networks.py --networks photos-seed0,photos-seed1,digits-seed0,digits-seed1
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

__all__ = ["RECIPES", "Recipe", "main", "train"]

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("LOWVAR_BENCHMARKS", ROOT / "build" / "benchmarks")) / "fewstep"
_EVERY = 250


@dataclass(frozen=True)
class Recipe:
    """How the networks of one data set are made.

    Attributes:
        data: name for `lowvar.data.load`.
        widths: channels a resolution.
        attention: number of lowest resolutions with attention.
        updates: of AdamW.
        batch: images an update.
        rate: peak learning rate.
    """

    data: str
    widths: tuple[int, ...]
    attention: int
    updates: int
    batch: int = 64
    rate: float = 1e-3


RECIPES = {
    "digits": Recipe("digits", (32, 64), 1, 4000),
    "photos": Recipe("photos:16", (16, 32, 64), 1, 4000),
}


def _network(recipe: Recipe, shape: tuple[int, ...]) -> Any:
    from diffusers import UNet2DModel

    plain = len(recipe.widths) - recipe.attention
    return UNet2DModel(
        sample_size=shape[1],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=recipe.widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",) * recipe.attention,
        up_block_types=("AttnUpBlock2D",) * recipe.attention + ("UpBlock2D",) * plain,
        norm_num_groups=8,
    )


def train(name: str, seed: int, cache: Path = CACHE) -> Path:
    """The network of a data set and a training seed; the folder of its pipeline."""
    from diffusers import DDPMPipeline, DDPMScheduler
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    from lowvar.data import load

    recipe = RECIPES[name]
    folder = cache / "networks" / f"{name}-seed{seed}"
    if (folder / "model_index.json").exists():
        return folder
    images = load(recipe.data).train.all()
    torch.manual_seed(seed)
    network, scheduler = _network(recipe, tuple(images.shape[1:])), DDPMScheduler()
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.rate)
    rate = get_cosine_schedule_with_warmup(optimizer, 100, recipe.updates)
    ema = EMAModel(network.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    random = torch.Generator().manual_seed(seed)
    checkpoint, begin = folder.with_suffix(".checkpoint"), 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        rate.load_state_dict(saved["rate"])
        ema.load_state_dict(saved["ema"])
        random.set_state(saved["random"])
        begin = saved["update"]
    clock, total = time.perf_counter(), 0.0
    for update in range(begin, recipe.updates):
        x0 = images[torch.randint(len(images), (recipe.batch,), generator=random)]
        eps = torch.randn(x0.shape, generator=random)
        t: Any = torch.randint(scheduler.config["num_train_timesteps"], (recipe.batch,), generator=random)
        loss = F.mse_loss(network(scheduler.add_noise(x0, eps, t), t).sample, eps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        ema.step(network.parameters())
        total += float(loss.detach())
        if (update + 1) % _EVERY == 0:
            print(
                f"{name}-seed{seed} update {update + 1} of {recipe.updates}: loss {total / _EVERY:.4f}, "
                f"{(time.perf_counter() - clock) / _EVERY:.3f} s an update",
                flush=True,
            )
            clock, total = time.perf_counter(), 0.0
            state: dict[str, Any] = {"update": update + 1, "network": network.state_dict(), "ema": ema.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "rate": rate.state_dict(), "random": random.get_state()}
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, checkpoint.with_suffix(".writing"))
            checkpoint.with_suffix(".writing").replace(checkpoint)
    ema.copy_to(network.parameters())
    partial = folder.with_suffix(".partial")
    DDPMPipeline(network, scheduler).save_pretrained(str(partial))
    (partial / "recipe.json").write_text(json.dumps(asdict(recipe) | {"seed": seed}) + "\n")
    partial.rename(folder)
    checkpoint.unlink(missing_ok=True)
    return folder


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    every = [f"{name}-seed{seed}" for name in RECIPES for seed in (0, 1)]
    parser.add_argument("--networks", default=",".join(every), help="comma separated, NAME-seedN")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for text in arguments.networks.split(","):
        name, _, seed = text.partition("-seed")
        print(train(name, int(seed)), flush=True)


if __name__ == "__main__":
    main()
