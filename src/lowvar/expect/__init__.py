"""Expectations over a sampler, with an interval: designs of lower variance, and a planner that may decline them.

`estimate(sampler, statistic, tol=)` gives E f(x_0) over a reverse process with a 95% interval, what it cost and what
independent sampling would have cost. A sampler is a function of noise (`ChainSampler`: a denoiser, a solver and a
grid); designs are ways of choosing the noise and of subtracting what is known. `estimates` is the same as a generator.

`posterior` samples x_0 given a linear measurement. `score_estimate` is for scores that are no means: Frechet, kernel
and energy distance.
"""

from lowvar.expect.catalogue import CONTROLS, NOISES, STRUCTURES
from lowvar.expect.compare import Comparison, compare
from lowvar.expect.conditioning import Measurement
from lowvar.expect.estimate import Candidate, Decision, Estimate, Progress, RunState
from lowvar.expect.jackknife import ScoreEstimate, score_estimate
from lowvar.expect.loop import estimate, estimates
from lowvar.expect.operators import Blur, Linear, LinearOperator, Masking, Matrix, Pooling, Whole
from lowvar.expect.posterior import ConditionedDenoiser, Reconstruction, posterior
from lowvar.expect.sampler import ChainSampler, ClassSampler, FunctionSampler, Sampler

__all__ = [
    "CONTROLS",
    "NOISES",
    "STRUCTURES",
    "Blur",
    "Candidate",
    "ChainSampler",
    "ClassSampler",
    "Comparison",
    "ConditionedDenoiser",
    "Decision",
    "Estimate",
    "FunctionSampler",
    "Linear",
    "LinearOperator",
    "Masking",
    "Matrix",
    "Measurement",
    "Pooling",
    "Progress",
    "Reconstruction",
    "RunState",
    "Sampler",
    "ScoreEstimate",
    "Whole",
    "compare",
    "estimate",
    "estimates",
    "posterior",
    "score_estimate",
]
