r"""The diffusers schedulers as peers: driven by our loop on the same network, from the same starting noise.

    x = init_noise_sigma z_i;    for t in scheduler.timesteps:  x = step(network(scale_model_input(x, t), t), t, x)

What is made equal, so that a row compares samplers and nothing else:

- the network and its conditioning; a variance head's channels are split off for peers that cannot read them;
- the start: sample i has our noise source's draw 0;
- the noise of step k: our draw k + 1 where `step` takes `variance_noise` (DDIM, DPM-Solver++); where it takes only
  `generator` (DDPM, SA-Solver), a list with one `torch.Generator` a sample, seeded from our source, so that sample i
  has the same noise whatever the batch size, though not the same numbers as ours;
- clipping of x0 to [-b, b], wherever the peer offers it: `clip_sample` (DDPM, DDIM, Heun; DDIM with
  `use_clipped_model_output`, without which its noise prediction is not that of the clipped x0), or `thresholding` with
  `sample_max_value=b`, whose "dynamic" threshold is then the constant b (the multistep schedulers). Flow and EDM
  schedulers offer none; the final clip is the same for all;
- the noise schedule: the betas the network was trained with (of a continuous schedule: its values at (n + 1) / T).

The grid is the peer's own: `spacing` is trailing unless asked otherwise; `karras` is the peer's `use_karras_sigmas`,
`default` the spacing it ships with. A peer's other settings are its defaults.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.discrete import DiscreteVP
from lowvar.process.noise import NoiseSource
from lowvar.process.schedule import VE, Flow, Schedule

__all__ = ["PEERS", "Peer", "Spacing", "make_peer", "peer_named", "run_peer"]

Spacing = Literal["trailing", "linspace", "leading", "karras", "default"]
_SEEDS = 0xFFFFFFFF  # the draw that a sample's generator is seeded from; no reverse step has this number


@dataclass(frozen=True)
class Peer:
    """A diffusers scheduler and how it is set up.

    Attributes:
        name: as users write it, without the prefix `diffusers:`.
        scheduler: class name in `diffusers`.
        about: one line for help and reports.
        clip: how it clips x0: `clip_sample`, `thresholding` or None.
        families: noise schedules it can run.
        predictions: predictions it can read.
        fields: its settings that differ from its defaults.
        head: whether it is given the variance head's channels.
    """

    name: str
    scheduler: str
    about: str
    clip: Literal["clip_sample", "thresholding"] | None = "thresholding"
    families: tuple[str, ...] = ("vp", "flow")
    predictions: tuple[str, ...] = ("epsilon", "sample", "v_prediction", "flow")
    fields: Mapping[str, Any] = field(default_factory=dict)
    head: bool = False

    def evaluations(self, steps: int) -> int:
        """Network evaluations that this many steps cost."""
        return 2 * steps - 1 if self.name.endswith("heun") else steps


_VP = {"families": ("vp",), "predictions": ("epsilon", "sample", "v_prediction")}
_EDM = {"clip": None, "families": ("ve",), "predictions": ("edm",)}
_FLOW = {"clip": None, "families": ("flow",), "predictions": ("flow",)}
_DPM = "DPMSolverMultistepScheduler"
_ALL = (
    Peer("ddpm", "DDPMScheduler", "diffusers DDPM, variance fixed_small", "clip_sample", **_VP),
    Peer(
        "ddpm-large",
        "DDPMScheduler",
        "diffusers DDPM, variance fixed_large (adds noise in the last step, as shipped)",
        "clip_sample",
        **_VP,
        fields={"variance_type": "fixed_large"},
    ),
    Peer(
        "ddpm-learned",
        "DDPMScheduler",
        "diffusers DDPM, the network's own variance",
        "clip_sample",
        **_VP,
        fields={"variance_type": "learned_range"},
        head=True,
    ),
    Peer("ddim", "DDIMScheduler", "diffusers DDIM, eta 0", "clip_sample", **_VP),
    Peer(
        "euler-ancestral",
        "EulerAncestralDiscreteScheduler",
        "diffusers Euler ancestral",
        None,
        families=("vp",),
        predictions=("epsilon", "v_prediction"),
    ),
    Peer("dpmsolver++", _DPM, "diffusers DPM-Solver++(2M)"),
    Peer("dpmsolver++3", _DPM, "diffusers DPM-Solver++(3M)", fields={"solver_order": 3}),
    Peer("sde-dpmsolver++", _DPM, "diffusers SDE-DPM-Solver++(2M)", fields={"algorithm_type": "sde-dpmsolver++"}),
    Peer("unipc", "UniPCMultistepScheduler", "diffusers UniPC, order 2"),
    Peer("deis", "DEISMultistepScheduler", "diffusers DEIS, order 2"),
    Peer("sa-solver", "SASolverScheduler", "diffusers SA-Solver, stochastic Adams"),
    Peer("heun", "HeunDiscreteScheduler", "diffusers Heun, 2 steps - 1 evaluations", "clip_sample", **_VP),
    Peer("edm-euler", "EDMEulerScheduler", "diffusers EDM, Euler", **_EDM),
    Peer("edm-dpmsolver++", "EDMDPMSolverMultistepScheduler", "diffusers EDM, DPM-Solver++(2M)", **_EDM),
    Peer("flow-euler", "FlowMatchEulerDiscreteScheduler", "diffusers flow matching, Euler", **_FLOW),
    Peer("flow-heun", "FlowMatchHeunDiscreteScheduler", "diffusers flow matching, Heun", **_FLOW),
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}


def peer_named(name: str) -> Peer:
    """The peer of a name, with or without the prefix `diffusers:`.

    Raises:
        UserError: naming the allowed ones.

    Example:
        >>> peer_named("diffusers:ddim").scheduler
        'DDIMScheduler'
    """
    plain = name.removeprefix("diffusers:")
    if plain not in PEERS:
        raise UserError(f"peer is {name!r}; allowed: {', '.join(PEERS)}")
    return PEERS[plain]


def _schedule_fields(schedule: Schedule, accepted: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The noise schedule in the peer's own words."""
    if isinstance(schedule, Flow):
        named: dict[str, Any] = {"shift": schedule.shift, "flow_shift": schedule.shift, "use_flow_sigmas": True}
        named["num_train_timesteps"] = int(schedule.timesteps)
        return {k: v for k, v in named.items() if k in accepted}
    if isinstance(schedule, VE):
        return {"sigma_max": schedule.sigma_max, "sigma_min": 0.002, "rho": schedule.rho}
    shifted = isinstance(schedule, DiscreteVP) and "snr_shift_scale" in schedule.beta_config  # no peer has the field
    if isinstance(schedule, DiscreteVP) and schedule.beta_config and not shifted:
        defaults = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
        fields = {**defaults, **schedule.beta_config}
        if fields.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in accepted:
            raise UserError(f"diffusers:{name} cannot run a schedule with zero terminal SNR; leave it out of --against")
        return {k: v for k, v in fields.items() if k in accepted}
    if float(schedule.at(1.0).alpha) == 0:
        raise UserError(f"diffusers:{name} cannot run a schedule with zero terminal SNR; leave it out of --against")
    T = schedule.steps if isinstance(schedule, DiscreteVP) else 1000
    bar = schedule.at(torch.arange(1, T + 1, dtype=torch.float64) / T).alpha ** 2
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    return {"num_train_timesteps": T, "trained_betas": (1 - bar / before).tolist()}


@contextmanager
def _their_warnings() -> Iterator[None]:
    """What diffusers does with arrays is not ours to mend, and is said once at most."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"diffusers\.")
        yield


def make_peer(peer: Peer, denoiser: NetworkDenoiser, spacing: Spacing = "trailing") -> Any:
    """The peer's scheduler for a network's schedule, prediction and clipping.

    Args:
        peer: which one.
        denoiser: the network it will run; its `clip` is the bound of x0.
        spacing: of the timesteps, where the peer has the choice.

    Raises:
        UserError: if the peer cannot run this schedule, read this prediction, or the spacing is unknown or `karras`
            where the peer has no such switch.
    """
    import diffusers

    if spacing not in get_args(Spacing):
        raise UserError(f"spacing is {spacing!r}; allowed: {', '.join(get_args(Spacing))}")
    schedule, name = denoiser.schedule, f"diffusers:{peer.name}"
    if schedule.family not in peer.families or denoiser.prediction not in peer.predictions:
        able = ", ".join(
            p.name for p in PEERS.values() if schedule.family in p.families and denoiser.prediction in p.predictions
        )
        raise UserError(
            f"{name} cannot run a {schedule.family} schedule with prediction {denoiser.prediction!r}; "
            f"for this model there are {able or 'none'}"
        )
    if peer.head and denoiser.head != "range":
        raise UserError(f"{name} needs a network with a learned-range variance head, and this one has none")
    kind = getattr(diffusers, peer.scheduler)
    accepted = inspect.signature(kind.__init__).parameters
    fields = _schedule_fields(schedule, accepted, peer.name)
    if "prediction_type" in accepted and denoiser.prediction != "edm":
        fields["prediction_type"] = "flow_prediction" if denoiser.prediction == "flow" else denoiser.prediction
    if "sigma_data" in accepted:
        fields["sigma_data"] = denoiser.sigma_data
    if spacing == "karras":
        if "use_karras_sigmas" not in accepted:
            raise UserError(f"{name} has no Karras spacing; allowed: trailing, linspace, leading, default")
        fields["use_karras_sigmas"] = True
    elif spacing != "default" and "timestep_spacing" in accepted:
        fields["timestep_spacing"] = spacing
    bound = denoiser.clip
    if peer.clip == "clip_sample":
        fields |= {"clip_sample": bound is not None, "clip_sample_range": 1.0 if bound is None else bound}
    elif peer.clip == "thresholding":
        # the threshold max(1, quantile) is limited to sample_max_value, and values are divided by it: exact for b = 1
        fields |= {"thresholding": bound == 1.0, "sample_max_value": 1.0}
    with _their_warnings():
        return kind(**fields, **peer.fields)


def _generators(noise: NoiseSource, index: Tensor, device: torch.device | str) -> list[torch.Generator]:
    u = noise.uniform(index, (1,), draw=_SEEDS, dtype=torch.float64)[:, 0]
    return [torch.Generator(device).manual_seed(seed) for seed in (u * 2.0**52).to(torch.int64).tolist()]


def _network(denoiser: NetworkDenoiser, x: Tensor, timestep: Tensor) -> Tensor:
    out = denoiser.network(x, timestep, **denoiser.conditioning)
    return out if isinstance(out, Tensor) else (out[0] if isinstance(out, tuple) else out.sample)


@torch.no_grad()
def run_peer(
    peer: Peer,
    denoiser: NetworkDenoiser,
    steps: int,
    index: Sequence[int] | Tensor,
    shape: Sequence[int],
    noise: NoiseSource,
    *,
    spacing: Spacing = "trailing",
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, int]:
    """One batch through a peer.

    Args:
        peer: which one.
        denoiser: the network, its schedule and prediction.
        steps: what its `set_timesteps` is given.
        index: sample numbers of the batch.
        shape: event shape.
        noise: source of the start and, as far as the peer takes it, of the steps' noise.
        spacing: of the timesteps.
        device: of the states.
        progress: called with the number of samples after each call of the denoiser.

    Returns:
        (samples on `device`, not clipped; calls of the denoiser a sample, each of `denoiser.nfe` evaluations).
    """
    index = torch.as_tensor(index)
    scheduler = make_peer(peer, denoiser, spacing)
    with _their_warnings():
        scheduler.set_timesteps(steps)
    schedule = denoiser.schedule
    discrete = schedule.family != "vp" or isinstance(schedule, DiscreteVP)
    takes = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {}
    if "generator" in takes and "variance_noise" not in takes:
        extra["generator"] = _generators(noise, index, device)
    if "use_clipped_model_output" in takes:
        extra["use_clipped_model_output"] = denoiser.clip is not None
    start = getattr(scheduler, "init_noise_sigma", 1.0)
    x = noise.normal(index, shape, draw=0, device=device) * float(start)
    nfe = 0
    axes = (..., None) if len(shape) == 1 else (...,)  # their schedulers threshold states of two axes and more
    for k, t in enumerate(scheduler.timesteps):
        # a network on a continuous schedule is conditioned on that schedule's own input at time (n + 1) / T
        own = t if discrete else schedule.timestep((float(t) + 1) / scheduler.config["num_train_timesteps"])
        timestep = torch.as_tensor(own, dtype=torch.float32).to(x.device).expand(len(x))
        entry = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = _network(denoiser, entry, timestep).float()
        if denoiser.head is not None and not peer.head:
            out = out[:, : x.shape[1]]
        if "variance_noise" in takes:
            extra["variance_noise"] = noise.normal(index, shape, draw=k + 1, device=device)[axes]
        with _their_warnings():
            after = scheduler.step(out[axes], t, x[axes], **extra, return_dict=False)[0]
        x = after.float().reshape(x.shape)
        nfe += 1
        if progress is not None:
            progress(len(x))
    return x, nfe
