"""The variance profile: where the variance comes from, and what each treatment of it would gain."""

from lowvar.profile.against import Promise, promises
from lowvar.profile.crossed import SOURCES, Crossed, Decomposition
from lowvar.profile.excess import LevelError, level_errors
from lowvar.profile.faults import error_fault, variance_fault
from lowvar.profile.gains import covariance_gain, reward_gain, sampler_gain, statistic_gain
from lowvar.profile.gradient import CrossedDraws, crossed_blocks
from lowvar.profile.inner import Exact, InnerProducts, Sketched, parameter_groups
from lowvar.profile.reverse import ReverseVariance, StepRows, VarianceCheck, checked, lost, step_rows
from lowvar.profile.rewards import EstimatorRow, RewardProfile, profile_reward
from lowvar.profile.sampling import Predicted, ReverseProfile, profile_reverse
from lowvar.profile.statistics import StatisticProfile, profile_statistic
from lowvar.profile.structure import STRUCTURES, Structure, StructureBlocks, structure_blocks
from lowvar.profile.techniques import TECHNIQUES, Measured, Reduction, Technique, measure
from lowvar.profile.training import TrainingProfile, profile_training
from lowvar.profile.verdict import Advice, advise, applied, batch_advice, ranked
from lowvar.profile.watching import SharesRecord, watched

__all__ = [
    "SOURCES",
    "STRUCTURES",
    "TECHNIQUES",
    "Advice",
    "Crossed",
    "CrossedDraws",
    "Decomposition",
    "EstimatorRow",
    "Exact",
    "InnerProducts",
    "LevelError",
    "Measured",
    "Predicted",
    "Promise",
    "Reduction",
    "ReverseProfile",
    "ReverseVariance",
    "RewardProfile",
    "SharesRecord",
    "Sketched",
    "StatisticProfile",
    "StepRows",
    "Structure",
    "StructureBlocks",
    "Technique",
    "TrainingProfile",
    "VarianceCheck",
    "advise",
    "applied",
    "batch_advice",
    "checked",
    "covariance_gain",
    "crossed_blocks",
    "error_fault",
    "level_errors",
    "lost",
    "measure",
    "parameter_groups",
    "profile_reverse",
    "profile_reward",
    "profile_statistic",
    "profile_training",
    "promises",
    "ranked",
    "reward_gain",
    "sampler_gain",
    "statistic_gain",
    "step_rows",
    "structure_blocks",
    "variance_fault",
    "watched",
]
