r"""Reverse kernels and solvers of this package as one scheduler for diffusers' pipelines.

The protocol of diffusers is a loop that the pipeline owns and a scheduler that remembers where it is:

    scheduler.set_timesteps(K)                       t_0 > .. > t_{K-1} > t_K = 0     (`lowvar.process.grid`)
    for t in scheduler.timesteps:                    what the network is conditioned on, schedule.timestep(t_k)
        out = network(x, t)                          eps, x_0, v or flow velocity; 2C channels with a variance head
        x = scheduler.step(out, t, x).prev_sample    x_{t_{k+1}} ~ N(a x + kappa x0_hat, lambda^2 I + kappa^2 C)

`ReverseVarianceScheduler` reads the output as a `Posterior`, attaches the calibrated covariance, and hands both to a
`Solver`. It is the one stateful object of the package, because its protocol is: the chain's memory is held from one
step to the next, and dropped by `set_timesteps`, by a step out of order and by a sample of another shape.

    sampler      kernel       first-order Gaussian kernel with stochasticity `eta`: 1 ancestral (DDPM), 0 DDIM
                 multistep    exponential Adams predictor-corrector with stochasticity `tau`: 1 reverse SDE, 0 ODE
                 twin         the same on what the calibrated Gaussian twin leaves over
                 a name       another solver of `lowvar.sample.SAMPLERS`, as it stands there
    variance     small, large, learned                                 the kernel's noise without calibration
                 analytic, isotropic, channel, pixel, basis, twin      lambda^2 I + kappa^2 C, C calibrated
                 npr, sn, ocm, lowrank, convert                        the same, C of every state, where the calibration
                                                                       holds that head

A solver that asks the network twice a step (Heun) has its timesteps twice, as diffusers' own has.

Variance-exploding (EDM) models keep EDM's protocol: `scale_model_input` multiplies by c_in, `init_noise_sigma` is
sqrt(sigma_max^2 + 1), timesteps are c_noise.

The step to t = 0 returns x0_hat and adds no noise, whatever the grid (diffusers' DDPMScheduler adds noise there where
the last timestep is not 0, as with `trailing`). States are float32 or wider, coefficients come from float64.

On disk: `scheduler_config.json`, and `calibration.safetensors` beside it for bases and large tables. `model_index.json`
names this module, ["lowvar.schedulers", "ReverseVarianceScheduler"]. diffusers imports no module because a folder names
it, so a program that opens such a folder with `DiffusionPipeline.from_pretrained` says `import lowvar.schedulers` above
that line; it needs no trust flag. `lowvar.pipelines.open_pipeline` does both.
"""

from __future__ import annotations

# diffusers asks this module for the name SchedulerMixin when it looks for the way to load the class below.
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin

from lowvar.schedulers._fields import sampler_fields
from lowvar.schedulers._output import ReverseVarianceSchedulerOutput
from lowvar.schedulers._scheduler import ReverseVarianceScheduler
from lowvar.schedulers._storage import CALIBRATION_FILE

__all__ = ["CALIBRATION_FILE", "ReverseVarianceScheduler", "ReverseVarianceSchedulerOutput", "sampler_fields"]
