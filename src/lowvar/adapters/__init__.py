"""Models of other code bases as denoisers, and denoisers as models of other code bases."""

from lowvar.adapters.guided_diffusion import guided_diffusion_denoiser, guided_diffusion_pipeline
from lowvar.adapters.guided_flags import GuidedFlags
from lowvar.adapters.guided_unet import unet_from_guided
from lowvar.adapters.k_diffusion import KDenoiser, KModel

__all__ = [
    "GuidedFlags",
    "KDenoiser",
    "KModel",
    "guided_diffusion_denoiser",
    "guided_diffusion_pipeline",
    "unet_from_guided",
]
