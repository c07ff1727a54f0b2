r"""diffusers' unconditional training loop with three changed lines, each marked `# lowvar`.

The draws of an update (images, noises, timesteps) come from a plan: times stratified over the batch, noises in
antithetic pairs. The expected gradient stays what it was; its variance falls. Noise
and data order are functions of the update's number, so the loop can be stopped and begun again at any update.

    python examples/diffusers_training.py --updates 200 --out build/example
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

from lowvar.data import load
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.train import CrossPairs, DrawPlan, UniformTimes


def train(updates: int, batch_size: int = 64, seed: int = 0) -> tuple[DDPMPipeline, list[float]]:
    """The trained pipeline and the losses."""
    torch.manual_seed(seed)
    images = load("digits").train
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ema = EMAModel(model.parameters(), decay=0.995)
    schedule, times = schedule_from_diffusers(noise_scheduler.config), UniformTimes(1000)
    plan = DrawPlan(images, schedule, batch_size, seed, pairing=CrossPairs(), stratified=True)  # lowvar

    losses = []
    for update in range(updates):
        draws = plan.draws(update, times)  # lowvar: instead of a batch, torch.randn and torch.randint
        clean, noise, timesteps = draws.x0, draws.eps, draws.bin  # lowvar
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        loss = F.mse_loss(model(noisy, timesteps).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.step(model.parameters())
        losses.append(float(loss.detach()))
    ema.copy_to(model.parameters())
    return DDPMPipeline(model, noise_scheduler), losses


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--out", default="build/example")
    arguments = parser.parse_args()
    pipeline, losses = train(arguments.updates)
    pipeline.save_pretrained(arguments.out)
    print(f"loss {sum(losses[-20:]) / len(losses[-20:]):.4f} over the last 20 updates; {arguments.out}")


if __name__ == "__main__":
    main()
