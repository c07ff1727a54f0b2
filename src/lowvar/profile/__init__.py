"""The variance profile: where the variance comes from, and what each treatment of it would gain."""

from lowvar.profile.crossed import SOURCES, Crossed, Decomposition
from lowvar.profile.gradient import CrossedDraws, crossed_blocks
from lowvar.profile.inner import Exact, InnerProducts, Sketched, parameter_groups
from lowvar.profile.techniques import TECHNIQUES, Measured, Reduction, Technique, measure
from lowvar.profile.training import TrainingProfile, profile_training
from lowvar.profile.verdict import Advice, advise

__all__ = [
    "SOURCES",
    "TECHNIQUES",
    "Advice",
    "Crossed",
    "CrossedDraws",
    "Decomposition",
    "Exact",
    "InnerProducts",
    "Measured",
    "Reduction",
    "Sketched",
    "Technique",
    "TrainingProfile",
    "advise",
    "crossed_blocks",
    "measure",
    "parameter_groups",
    "profile_training",
]
