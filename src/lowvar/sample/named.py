r"""Samplers by name: a solver, the covariance it needs and the grid it is used with unless another is asked for.

ddpm-*     ancestral kernel (eta = 1) with a choice of variance
ddim-*     deterministic mean (eta = 0), optionally with calibrated noise kappa^2 C
           (of both, one for every C that a calibration may hold: `COVARIANCES`)
adams-*    exponential Adams predictor-corrector without a control variate
twin-flow  the flow of the mixture twin with its last two remainders, on the grid of their path statistics
twin-*     the exponential Adams method on what the Gaussian twin leaves over: ODE (tau = 0) or SDE (tau > 0)
dpmpp-2m, dpmpp-2m-sde, unipc, sa, heun     the published second-order methods
*-basis    with kappa^2 C of the calibrated covariance where it belongs to the mean (`process.linear_multistep`)
*-noise    with the noise that the solver's marginal lacks on its grid (`lowvar.calibrate.marginal_deficit`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from lowvar.process.basis import PixelBasis
from lowvar.process.dpm_solver_pp import DPMSolverPP
from lowvar.process.flow import TwinFlow
from lowvar.process.heun import Heun
from lowvar.process.kernel import ReverseKernel
from lowvar.process.mixture import MixtureTwin
from lowvar.process.multistep import MultistepSolver
from lowvar.process.path import PathMoments
from lowvar.process.sa_solver import SASolver
from lowvar.process.solver import Solver
from lowvar.process.twin import GaussianTwin
from lowvar.process.unipc import UniPC

__all__ = ["COVARIANCES", "SAMPLERS", "NamedSampler", "named_sampler"]

COVARIANCES: Mapping[str, str] = {
    "analytic": "analytic variance",
    "isotropic": "calibrated isotropic variance",
    "channel": "calibrated variance a channel",
    "pixel": "calibrated variance a pixel",
    "basis": "calibrated variance in the twin's basis",
    "npr": "head npr, variance of every state",
    "sn": "head sn, variance of every state",
    "ocm": "head ocm, variance of every state",
    "lowrank": "head lowrank, variance of every state along pixels and learned directions",
    "convert": "variance of every state from the network's learned-range head",
}
"""Covariances that a calibration may hold, in words; ddpm-NAME and ddim-NAME are the samplers that use them."""


@dataclass(frozen=True)
class NamedSampler:
    """A sampler as users name it.

    Attributes:
        name: its name.
        about: one line for help and reports.
        solver: the solver; that of a twin-* sampler gets its twin from `named_sampler`.
        covariance: the calibrated covariance it needs, a name of `COVARIANCES`; `learned` for the network's own
            variance head, or None.
        grid: name of its default grid.
        needs_twin: whether it needs the calibrated twin.
        noise: whether the solver's marginal deficit is measured on its grid and added as noise; needs the twin too.
    """

    name: str
    about: str
    solver: Solver
    covariance: str | None = None
    grid: str = "trailing"
    needs_twin: bool = False
    noise: bool = False


_NO_TWIN = GaussianTwin(torch.zeros(1), PixelBasis((1,)), torch.zeros(1))  # until `named_sampler` gives the right one

_ALL = [
    NamedSampler("ddpm-small", "ancestral, variance beta_tilde", ReverseKernel(1.0, "small")),
    NamedSampler("ddpm-large", "ancestral, variance beta", ReverseKernel(1.0, "large")),
    NamedSampler("ddpm-learned", "ancestral, the network's own variance", ReverseKernel(1.0, "learned"), "learned"),
    *(NamedSampler(f"ddpm-{c}", f"ancestral, {about}", ReverseKernel(1.0), c) for c, about in COVARIANCES.items()),
    NamedSampler("ddim", "deterministic, first order", ReverseKernel(0.0, "small")),
    *(
        NamedSampler(f"ddim-{c}", f"DDIM mean, {about.replace('variance', 'noise')}", ReverseKernel(0.0), c)
        for c, about in COVARIANCES.items()
    ),
    NamedSampler("adams-ode", "predictor-corrector, no control variate", MultistepSolver(None, 2, 2)),
    NamedSampler("adams-sde", "stochastic (tau = 1/2) predictor-corrector", MultistepSolver(None, 2, 2, 0.5)),
    NamedSampler(
        "twin-flow", "flow of the mixture twin, last two remainders", TwinFlow(_NO_TWIN), grid="path", needs_twin=True
    ),
    NamedSampler("twin-ode-1", "twin, ODE, order 1", MultistepSolver(None, 1, 0), needs_twin=True),
    NamedSampler("twin-ode", "twin, ODE, predictor-corrector", MultistepSolver(None, 2, 2, 0.0, 0.5), needs_twin=True),
    NamedSampler("twin-sde-1", "twin, SDE (tau = 1), order 1", MultistepSolver(None, 1, 0, 1.0), needs_twin=True),
    NamedSampler(
        "twin-sde", "twin, SDE (tau = 1/2), predictor-corrector", MultistepSolver(None, 2, 2, 0.5, 0.5), needs_twin=True
    ),
    NamedSampler("dpmpp-2m", "DPM-Solver++(2M), midpoint", DPMSolverPP()),
    NamedSampler(
        "dpmpp-2m-basis",
        "DPM-Solver++(2M), calibrated noise in the first step",
        DPMSolverPP(covariance=True),
        "basis",
    ),
    NamedSampler("unipc-basis", "UniPC-2, calibrated noise in the first step", UniPC(covariance=True), "basis"),
    NamedSampler("dpmpp-2m-sde", "SDE-DPM-Solver++(2M), midpoint", DPMSolverPP(eta=1.0)),
    NamedSampler("unipc", "UniPC-2, bh2", UniPC()),
    NamedSampler("sa", "SA-Solver, noise (tau = 1) in the middle of the process", SASolver()),
    NamedSampler("heun", "Heun (EDM), 2 steps - 1 evaluations", Heun(), grid="karras"),
    NamedSampler("ddim-noise", "DDIM with calibrated marginal noise", ReverseKernel(0.0, "small"), noise=True),
    NamedSampler("dpmpp-2m-noise", "DPM-Solver++(2M) with calibrated marginal noise", DPMSolverPP(), noise=True),
    NamedSampler("unipc-noise", "UniPC-2 with calibrated marginal noise", UniPC(), noise=True),
]
SAMPLERS = {s.name: s for s in _ALL}


def named_sampler(
    name: str,
    twin: GaussianTwin | None = None,
    mixture: MixtureTwin | None = None,
    paths: PathMoments | None = None,
) -> NamedSampler:
    """The sampler of a name, with its twin in place.

    Args:
        name: a key of `SAMPLERS`.
        twin: the calibrated twin; twin-* and *-noise samplers need it.
        mixture: the calibrated mixture twin, for twin-flow (default the twin).
        paths: moments of its remainder, for twin-flow.

    Raises:
        ValueError: if the name is unknown, or a twin is needed and not given.

    Example:
        >>> named_sampler("ddim").solver.order
        1
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler is {name!r}; allowed: {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[name]
    if not sampler.needs_twin and not sampler.noise:
        return sampler
    if twin is None:
        raise ValueError(f"sampler {name!r} needs a Gaussian twin: calibrate the model first (`lowvar calibrate`)")
    if sampler.noise:
        return sampler
    if isinstance(sampler.solver, TwinFlow):
        return replace(sampler, solver=replace(sampler.solver, twin=mixture or twin, paths=paths))
    assert isinstance(sampler.solver, MultistepSolver)
    return replace(sampler, solver=replace(sampler.solver, twin=twin))
