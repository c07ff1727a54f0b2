r"""The flags that guided-diffusion and improved-diffusion describe a model with.

A checkpoint of these code bases is a bare state dict: what the numbers mean stands in the command-line flags it was
trained with, `model_and_diffusion_defaults()` of `script_util.py`. The noise schedule for T = `diffusion_steps` is

    linear    beta_n from 0.1 / T to 20 / T, evenly (Ho et al. 2020, scaled to T steps)
    cosine    alpha_bar = cos^2((u + 0.008) / 1.008 pi / 2), u = (n + 1) / T, beta_n <= 0.999 (Nichol & Dhariwal 2021)

and with `rescale_timesteps` the network is conditioned on 1000 n / T instead of n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lowvar.errors import UserError
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.process.schedule import Schedule

__all__ = ["GuidedFlags"]

# What does not change the network that sampling evaluates: how it was trained, how it is stored, how it was sampled.
_WITHOUT_EFFECT = (
    "rescale_learned_sigmas",
    "sigma_small",
    "timestep_respacing",
    "use_checkpoint",
    "use_fp16",
    "use_kl",
)
_MULTIPLIERS = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


@dataclass(frozen=True)
class GuidedFlags:
    """Flags of a model, by their original names; the defaults are guided-diffusion's.

    improved-diffusion has one other default that matters: `rescale_timesteps=True`.

    Attributes:
        image_size: height and width of the images.
        num_channels: width c that `channel_mult` multiplies.
        num_res_blocks: residual blocks a level.
        num_heads, num_heads_upsample: attention heads on the way down and up (-1: as many).
        num_head_channels: width of a head, instead of `num_heads` (-1: unset).
        attention_resolutions: "16,8" or numbers: the image sizes at which there is attention.
        channel_mult: "1,2,4" or numbers, one a level; "": the original's choice for the image size.
        dropout: rate in [0, 1); evaluation does not drop.
        class_cond: whether it is conditioned on a class.
        use_scale_shift_norm: time embedding as scale and shift of a norm, instead of a sum.
        resblock_updown: residual blocks change the resolution, instead of convolutions.
        use_new_attention_order: q, k, v split before the heads, instead of after.
        learn_sigma: a learned-range variance head, in the second half of the output channels.
        diffusion_steps: T.
        noise_schedule: `linear` or `cosine`.
        predict_xstart: the network predicts x_0, instead of the noise.
        rescale_timesteps: conditioned on 1000 n / T.

    Raises:
        UserError: for a value that is none of a flag's.

    Example:
        >>> flags = GuidedFlags.read({"image_size": 64, "num_channels": 192, "noise_schedule": "cosine"})
        >>> flags.widths, flags.attends
        ((192, 384, 576, 768), (False, False, True, True))
        >>> flags.schedule.timestep(1.0).item()
        999.0
    """

    image_size: int = 64
    num_channels: int = 128
    num_res_blocks: int = 2
    num_heads: int = 4
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    attention_resolutions: str | Sequence[int] = "16,8"
    channel_mult: str | Sequence[float] = ""
    dropout: float = 0.0
    class_cond: bool = False
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    learn_sigma: bool = False
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    predict_xstart: bool = False
    rescale_timesteps: bool = False

    @classmethod
    def read(cls, flags: Mapping[str, Any]) -> GuidedFlags:
        """The flags in a dictionary as the original scripts hold it; those without effect here are passed over.

        Raises:
            UserError: for an unknown flag, or a value that is none of a flag's.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(flags) - set(known) - set(_WITHOUT_EFFECT))
        if unknown:
            raise UserError(
                f"flag {unknown[0]!r} is none of a guided-diffusion model's; allowed: {', '.join(known)}; "
                f"without effect: {', '.join(_WITHOUT_EFFECT)}"
            )
        return cls(**{name: value for name, value in flags.items() if name in known})

    def __post_init__(self) -> None:
        """Checks each flag by itself."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "bool" and not isinstance(value, bool):
                raise UserError(f"flag {f.name} is {value!r}; allowed: True, False")
            if f.type == "int" and (isinstance(value, bool) or not isinstance(value, int)):
                raise UserError(f"flag {f.name} is {value!r}; give a whole number")
            unset = f.name in ("num_heads_upsample", "num_head_channels") and value == -1
            if f.type == "int" and value < 1 and not unset:
                raise UserError(f"flag {f.name} is {value}; give a number from 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"flag dropout is {self.dropout!r}; give a rate from 0 to below 1")
        if self.noise_schedule not in ("linear", "cosine"):
            raise UserError(f"flag noise_schedule is {self.noise_schedule!r}; allowed: linear, cosine")
        if self.noise_schedule == "linear" and self.diffusion_steps <= 20:
            raise UserError(
                f"flag diffusion_steps is {self.diffusion_steps}; the linear schedule, whose last beta is 20 / T, "
                "needs 21 or more"
            )
        if any(size < 1 for size in self._attention_sizes()):
            raise UserError(f"flag attention_resolutions is {self.attention_resolutions!r}; give sizes from 1")
        if not all(width >= 1 for width in self.widths):
            raise UserError(f"flag channel_mult is {self.channel_mult!r}; give positive multipliers of num_channels")

    def _attention_sizes(self) -> list[int]:
        return [int(v) for v in _numbers("attention_resolutions", self.attention_resolutions)]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the image's resolution down."""
        given = _numbers("channel_mult", self.channel_mult)
        if not given and self.image_size not in _MULTIPLIERS:
            raise UserError(
                f"flag channel_mult is not set, and image_size {self.image_size} has no usual one (those of "
                f"{', '.join(map(str, _MULTIPLIERS))} have): give it, such as '1,2,2'"
            )
        return tuple(int(m * self.num_channels) for m in given or _MULTIPLIERS[self.image_size])

    @property
    def attends(self) -> tuple[bool, ...]:
        """Whether each level has attention: where its factor 2^i is image_size // r for an attention resolution r."""
        factors = {self.image_size // size for size in self._attention_sizes()}
        return tuple(2**i in factors for i in range(len(self.widths)))

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The noise schedule in the words of diffusers' schedulers."""
        T = self.diffusion_steps
        if self.noise_schedule == "cosine":
            return {"num_train_timesteps": T, "beta_schedule": "squaredcos_cap_v2"}
        return {"num_train_timesteps": T, "beta_schedule": "linear", "beta_start": 0.1 / T, "beta_end": 20 / T}

    @property
    def schedule(self) -> Schedule:
        """The noise schedule, a `DiscreteVP` of T steps in float64."""
        return schedule_from_diffusers(self.scheduler_config)

    @property
    def timestep_scale(self) -> float:
        """What a timestep n is multiplied by before the network sees it."""
        return 1000 / self.diffusion_steps if self.rescale_timesteps else 1.0


def _numbers(name: str, value: str | Sequence[float]) -> list[float]:
    """The numbers in "16,8" or in a sequence."""
    parts = [p for p in value.split(",") if p.strip()] if isinstance(value, str) else value
    try:
        return [float(p) for p in parts]
    except (TypeError, ValueError) as error:
        raise UserError(f"flag {name} is {value!r}; give numbers with commas between, such as '16,8'") from error
