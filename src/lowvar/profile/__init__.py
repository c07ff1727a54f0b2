"""The variance profile: where the variance comes from, and what each treatment of it would gain."""

from lowvar.profile.crossed import SOURCES, Crossed, Decomposition
from lowvar.profile.gradient import CrossedDraws, crossed_blocks
from lowvar.profile.inner import Exact, InnerProducts, Sketched, parameter_groups
from lowvar.profile.techniques import TECHNIQUES, Measured, Reduction, Technique, measure

__all__ = [
    "SOURCES",
    "TECHNIQUES",
    "Crossed",
    "CrossedDraws",
    "Decomposition",
    "Exact",
    "InnerProducts",
    "Measured",
    "Reduction",
    "Sketched",
    "Technique",
    "crossed_blocks",
    "measure",
    "parameter_groups",
]
