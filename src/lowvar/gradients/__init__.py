r"""Gradients of expectations over programs with random numbers in them, and control variates.

**Programs.** A stochastic computation graph is a plain function `program(theta, s)` of one sample: `s.sample(name,
distribution, estimator)`, `s.cost(name, value, parents=...)`, `s.markov(name, step, steps, start, estimator)`. An
`Expectation` runs it on a `NoiseSource` and returns (surrogate, state, info): the surrogate's value is the mean cost,
its gradient the estimators'. See `program` and `expectation`.

**The contract of an estimator** (`estimator`). It says

    noise       which base noise it needs: an argument, so it can be replayed, mirrored, integrated
    branches    how many values the site takes, and what is asked of each: main, live, probe
    draw        values and a small record, from noise, inside the program
    surrogate   one surrogate from the branches' surrogates and costs
    breaks      where it jumps as a function of uniform noise: for certificates only

Estimators that evaluate what comes after the site several times (ARM, DisARM, REBAR, measure-valued, enumeration,
several draws) do not run the program themselves: they ask for branches, and the interpreter runs all worlds of all
sites at once under `torch.func.vmap`. Then it goes from the last site to the first, each estimator turning its
branches' results into one. Composition is by that recursion: if the surrogates after a site are unbiased given its
value, and the site's own rule is, then so is the surrogate before it. That is all the interpreter knows, and why a
user's estimator needs no change of it.

**Certificates.** `lowvar.testing.certify(estimator)` computes expectation and variance exactly on small programs.

**Control variates for any loss**: `controlled`, `lagged`, `Controlled`, whose coefficients do not bias what they
control.

Sources: J. Schulman, N. Heess, T. Weber, P. Abbeel, "Gradient estimation using stochastic computation graphs", 2015;
S. Mohamed, M. Rosca, M. Figurnov, A. Mnih, "Monte Carlo gradient estimation in machine learning", 2020; A. Lew, M.
Huot, S. Staton, V. Mansinghka, "ADEV: sound automatic differentiation of expected values", 2023.
"""

from lowvar.gradients.antithetic import Antithetic
from lowvar.gradients.arm import ARM
from lowvar.gradients.baselines import Baseline, Constant, LeaveOneOut, MovingAverage
from lowvar.gradients.chain import ChainGradient, ReverseChain, Roulette, reverse_chain
from lowvar.gradients.controlled import Controlled, ControlState, controlled, lagged
from lowvar.gradients.diagnostics import Automatic, Diagnosis, EstimatorComparison, automatic, compare, diagnose
from lowvar.gradients.dice import DiCE
from lowvar.gradients.disarm import DisARM
from lowvar.gradients.enumeration import Enumerate
from lowvar.gradients.estimator import BaseNoise, Branch, Estimator, SiteDraw
from lowvar.gradients.expectation import Expectation, Info, ProgramState, without_validation
from lowvar.gradients.gumbel_softmax import GumbelSoftmax
from lowvar.gradients.measure_valued import MeasureValued
from lowvar.gradients.multisample import MultiSample
from lowvar.gradients.pathwise import Pathwise
from lowvar.gradients.per_parameter import PerParameter
from lowvar.gradients.program import Sites, swapped
from lowvar.gradients.rebar import REBAR
from lowvar.gradients.relax import RELAX
from lowvar.gradients.score import Score
from lowvar.gradients.straight_through import StraightThrough
from lowvar.gradients.tuning import second_moment
from lowvar.gradients.variates import Regression, Taylor
from lowvar.gradients.weighted import Learned, Optimal

__all__ = [
    "ARM",
    "REBAR",
    "RELAX",
    "Antithetic",
    "Automatic",
    "BaseNoise",
    "Baseline",
    "Branch",
    "ChainGradient",
    "Constant",
    "ControlState",
    "Controlled",
    "DiCE",
    "Diagnosis",
    "DisARM",
    "Enumerate",
    "Estimator",
    "EstimatorComparison",
    "Expectation",
    "GumbelSoftmax",
    "Info",
    "Learned",
    "LeaveOneOut",
    "MeasureValued",
    "MovingAverage",
    "MultiSample",
    "Optimal",
    "Pathwise",
    "PerParameter",
    "ProgramState",
    "Regression",
    "ReverseChain",
    "Roulette",
    "Score",
    "SiteDraw",
    "Sites",
    "StraightThrough",
    "Taylor",
    "automatic",
    "compare",
    "controlled",
    "diagnose",
    "lagged",
    "reverse_chain",
    "second_moment",
    "swapped",
    "without_validation",
]
