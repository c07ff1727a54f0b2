"""What a reverse process is: schedules, posteriors, covariances, kernels, solvers, grids, noise. Torch only, no I/O."""

from lowvar.process.basis import Basis, DCTBasis, MatrixBasis, PixelBasis
from lowvar.process.corrected import CorrectedDenoiser, MeanCorrection
from lowvar.process.covariance import BasisDiagonal, Covariance, Diagonal, Isotropic, LowRankPlusDiagonal
from lowvar.process.denoiser import Denoiser, Guided, NetworkDenoiser, WithCovariance
from lowvar.process.discrete import DiscreteVP, schedule_from_config, schedule_from_diffusers
from lowvar.process.dpm_solver_pp import DPMSolverPP
from lowvar.process.flow import TwinFlow
from lowvar.process.heun import Heun
from lowvar.process.jacobian import JacobianCovariance
from lowvar.process.kernel import Gaussian, ReverseKernel
from lowvar.process.linear_multistep import LinearMultistep
from lowvar.process.matrix import Dense, Implicit
from lowvar.process.mixture import MixtureTwin
from lowvar.process.multistep import MultistepSolver
from lowvar.process.noise import Antithetic, Common, Independent, NoiseSource, TorchGenerators
from lowvar.process.posterior import Posterior
from lowvar.process.sa_solver import SASolver
from lowvar.process.schedule import VE, CosineVP, Flow, Level, LinearVP, Schedule
from lowvar.process.solver import Solver, State, StepInfo
from lowvar.process.twin import GaussianTwin
from lowvar.process.unipc import UniPC
from lowvar.process.with_noise import WithNoise

__all__ = [
    "VE",
    "Antithetic",
    "Basis",
    "BasisDiagonal",
    "Common",
    "CorrectedDenoiser",
    "CosineVP",
    "Covariance",
    "DCTBasis",
    "DPMSolverPP",
    "Denoiser",
    "Dense",
    "Diagonal",
    "DiscreteVP",
    "Flow",
    "Gaussian",
    "GaussianTwin",
    "Guided",
    "Heun",
    "Implicit",
    "Independent",
    "Isotropic",
    "JacobianCovariance",
    "Level",
    "LinearMultistep",
    "LinearVP",
    "LowRankPlusDiagonal",
    "MatrixBasis",
    "MeanCorrection",
    "MixtureTwin",
    "MultistepSolver",
    "NetworkDenoiser",
    "NoiseSource",
    "PixelBasis",
    "Posterior",
    "ReverseKernel",
    "SASolver",
    "Schedule",
    "Solver",
    "State",
    "StepInfo",
    "TorchGenerators",
    "TwinFlow",
    "UniPC",
    "WithCovariance",
    "WithNoise",
    "schedule_from_config",
    "schedule_from_diffusers",
]
