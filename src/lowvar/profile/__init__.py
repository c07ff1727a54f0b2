"""The variance profile: where the variance comes from, and what each treatment of it would gain."""

from lowvar.profile.crossed import SOURCES, Crossed, Decomposition
from lowvar.profile.gradient import CrossedDraws, crossed_blocks
from lowvar.profile.inner import Exact, InnerProducts, Sketched, parameter_groups

__all__ = [
    "SOURCES",
    "Crossed",
    "CrossedDraws",
    "Decomposition",
    "Exact",
    "InnerProducts",
    "Sketched",
    "crossed_blocks",
    "parameter_groups",
]
