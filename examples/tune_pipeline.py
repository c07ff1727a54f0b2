"""Tuning a stock DDPMPipeline for a reward: the pipeline's network is the policy, and is changed in place.

    python examples/tune_pipeline.py FOLDER OUT      # any folder of an unconditional DDPMPipeline

Here the reward is the mean pixel, which has a derivative; `estimator="auto"` measures whether to use it. A reward of
your own is a function f(samples in [-1, 1] (n, c, h, w), prompts) -> (n,), differentiable or not.
"""

import copy
import sys

import torch
from diffusers import DDPMPipeline

from lowvar.pipelines import denoiser_of
from lowvar.process import Independent, ReverseKernel
from lowvar.process.grid import trailing
from lowvar.reward import Floor, Policy, RewardProblem, TuneConfig, Tuner, TuneRecord


def brightness(samples: torch.Tensor, prompts: object) -> torch.Tensor:
    return samples.flatten(1).mean(1)


brightness.differentiable = True


def policy_of(pipeline: DDPMPipeline, steps: int) -> Policy:
    """Ancestral sampling in a few steps, with a little noise in the last one, so that it has a density too."""
    denoiser = denoiser_of(pipeline)
    return Policy(denoiser, ReverseKernel(variance="small"), trailing(denoiser.schedule, steps), Floor(0.05))


def tune(pipeline: DDPMPipeline, config: TuneConfig, steps: int = 10) -> list[TuneRecord]:
    frozen = copy.deepcopy(pipeline)
    frozen.unet.requires_grad_(False)
    unet = pipeline.unet.eval()
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    problem = RewardProblem(policy_of(pipeline, steps), brightness, parameters, shape)
    records = []
    for record in Tuner(problem, config, Independent(0), reference=policy_of(frozen, steps)).run():
        print(
            f"{record.update:4d}  reward {record.reward:.4f}  KL {record.kl:.3g} nats  {record.estimator}  {record.why}"
        )
        records.append(record)
    return records


if __name__ == "__main__":
    folder, out = sys.argv[1:3]
    pipeline = DDPMPipeline.from_pretrained(folder)
    tune(pipeline, TuneConfig(updates=50, batch=64, beta=0.001, target_kl=20.0))
    pipeline.save_pretrained(out)
