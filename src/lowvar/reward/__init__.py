r"""Tuning by reward: the reverse process as a policy, and its gradients with known bias and low variance.

    policy = Policy(denoiser, ReverseKernel(), grid, Floor(0.05))      # a denoiser and a Gaussian kernel
    ran    = rollout(policy, noise, n, shape, num_generations=8)       # states, actions, log p, x0_hat, samples
    A      = advantages(rewards, ran.groups)                           # what multiplies the scores
    loss   = surrogate_loss(policy, ran, A).loss                       # its gradient is minus the estimate

This is the functional layer, for people with a loop of their own. Everything says what it claims (`Claim`): unbiased,
or in which way not. Estimators:

    scores      `surrogate_loss` with `advantages`, `x0_baseline`, `optimal_constant`, `ValueNetwork`
    pathwise    `pathwise_loss` with `Full`, `Last`, `RandomTruncation`, `Roulette`, `LastAveraged`
    branches    `Branches`: several ends of one beginning
    both        `pathwise_loss(rule=Last(k, rest="score"))`; `surrogate_control` for rewards without derivative
    KL          `kl_loss` to a reference, `BetaController`

Which one is measured, not guessed: `gradient_report` compares them on a `RewardProblem`, `choose` takes the one of
least variance x cost and says why. `Tuner` is the loop around all this: records, checkpoints, KL control, `History`
for baselines that learn from earlier batches, and a `Monitor` of reward, KL and held-out quality. `reward_named` and
`estimator_named` know both by name, as `lowvar tune` does.

Names are those of TRL's GRPO where it has them: `num_generations`, `beta`, `scale_rewards`, `epsilon`, `reward_funcs`.
"""

from lowvar.reward.advantages import BASELINES, SCALES, Advantages, advantages
from lowvar.reward.branches import Branches
from lowvar.reward.claims import Claim
from lowvar.reward.config import TuneConfig, TuneRecord
from lowvar.reward.control import RidgeSurrogate, surrogate_control
from lowvar.reward.edges import edges
from lowvar.reward.estimator_names import ESTIMATORS, estimator_named
from lowvar.reward.estimators import Paths, RewardEstimator, RewardProblem, Scores, SurrogateControl
from lowvar.reward.history import History
from lowvar.reward.kl import KL_ESTIMATORS, BetaController, KLLoss, kl_loss
from lowvar.reward.monitor import Check, Monitor
from lowvar.reward.named import NamedReward, reward_named
from lowvar.reward.pathwise import (
    Full,
    Last,
    LastAveraged,
    RandomTruncation,
    RewardLoss,
    Roulette,
    leave_one_out,
    pathwise_loss,
)
from lowvar.reward.policy import Floor, Policy
from lowvar.reward.report import Choice, GradientReport, GradientRow, candidates, choose, gradient_report
from lowvar.reward.rewards import RewardError, WeightedSum, evaluated, reward_gradient
from lowvar.reward.ridge import Ridge
from lowvar.reward.rollout import Rollout, rollout, step_window
from lowvar.reward.running import RunningStatistics
from lowvar.reward.state_baselines import linear_and_square, optimal_constant, score_norms, x0_baseline
from lowvar.reward.surrogate import SurrogateLoss, surrogate_loss, surrogate_losses
from lowvar.reward.tuner import Tuner
from lowvar.reward.value import ValueNetwork

__all__ = [
    "BASELINES",
    "ESTIMATORS",
    "KL_ESTIMATORS",
    "SCALES",
    "Advantages",
    "BetaController",
    "Branches",
    "Check",
    "Choice",
    "Claim",
    "Floor",
    "Full",
    "GradientReport",
    "GradientRow",
    "History",
    "KLLoss",
    "Last",
    "LastAveraged",
    "Monitor",
    "NamedReward",
    "Paths",
    "Policy",
    "RandomTruncation",
    "RewardError",
    "RewardEstimator",
    "RewardLoss",
    "RewardProblem",
    "Ridge",
    "RidgeSurrogate",
    "Rollout",
    "Roulette",
    "RunningStatistics",
    "Scores",
    "SurrogateControl",
    "SurrogateLoss",
    "TuneConfig",
    "TuneRecord",
    "Tuner",
    "ValueNetwork",
    "WeightedSum",
    "advantages",
    "candidates",
    "choose",
    "edges",
    "estimator_named",
    "evaluated",
    "gradient_report",
    "kl_loss",
    "leave_one_out",
    "linear_and_square",
    "optimal_constant",
    "pathwise_loss",
    "reward_gradient",
    "reward_named",
    "rollout",
    "score_norms",
    "step_window",
    "surrogate_control",
    "surrogate_loss",
    "surrogate_losses",
    "x0_baseline",
]
