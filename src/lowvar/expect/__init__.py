"""Expectations over a sampler, with an interval: designs of lower variance, and a planner that may decline them.

`estimate(sampler, statistic, tol=)` gives E f(x_0) over a reverse process with a 95% interval, what it cost and what
independent sampling would have cost. A sampler is a function of noise (`ChainSampler`: a denoiser, a solver and a
grid); designs are ways of choosing the noise and of subtracting what is known. `estimates` is the same as a generator.
"""

from lowvar.expect.catalogue import CONTROLS, NOISES, STRUCTURES
from lowvar.expect.compare import Comparison, compare
from lowvar.expect.estimate import Candidate, Decision, Estimate, Progress, RunState
from lowvar.expect.loop import estimate, estimates
from lowvar.expect.sampler import ChainSampler, ClassSampler, FunctionSampler, Sampler

__all__ = [
    "CONTROLS",
    "NOISES",
    "STRUCTURES",
    "Candidate",
    "ChainSampler",
    "ClassSampler",
    "Comparison",
    "Decision",
    "Estimate",
    "FunctionSampler",
    "Progress",
    "RunState",
    "Sampler",
    "compare",
    "estimate",
    "estimates",
]
