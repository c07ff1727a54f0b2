r"""Estimators as values: a problem in, a loss whose gradient is the estimate out.

    estimator(problem, noise, n, first) -> RewardLoss

so that they can be compared (`gradient_report`), chosen (`choose`) and run in a loop. `Scores` needs the reward's
values only; `Paths` its derivative; `SurrogateControl` values, and makes a derivative of its own. `Branches` (module
`branches`) are scores with several ends a run.

Each says what it costs, in network evaluations a run: a forward is 1, a backward 2 more. Baselines that learn from
earlier batches are kept in a `History`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lowvar.process.noise import NoiseSource
from lowvar.reward.advantages import AdvantageBaseline, Advantages, ScaleRewards, advantages
from lowvar.reward.control import surrogate_control
from lowvar.reward.history import History
from lowvar.reward.pathwise import (
    Full,
    Last,
    LastAveraged,
    PathwiseRule,
    RandomTruncation,
    RewardLoss,
    Roulette,
    pathwise_loss,
)
from lowvar.reward.policy import Policy
from lowvar.reward.rewards import Reward, evaluated, is_differentiable, reward_gradient
from lowvar.reward.rollout import Rollout, rollout
from lowvar.reward.state_baselines import Features, linear_and_square, optimal_constant, x0_baseline
from lowvar.reward.surrogate import surrogate_loss

__all__ = ["Paths", "RewardEstimator", "RewardProblem", "Scores", "SurrogateControl"]


@dataclass(frozen=True, eq=False)
class RewardProblem:
    """What is tuned for what.

    Args:
        policy: the policy.
        reward: f(samples, prompts) -> (n,).
        parameters: of the policy, that require gradients.
        shape: of a sample.
        prompts: from sample numbers (n,) to prompts, for a conditional policy; samples of a group need the same.
        num_generations: G, size of a group (TRL's name): neighbouring sample numbers.
        dtype, device: of the states.
        numbers: from sample numbers (n,) to the number of the prompt, the same in every batch (running baselines).
        columns: from sample numbers (n,) to further arguments of the reward, by name, one entry a sample.

    Raises:
        ValueError: if no parameter requires a gradient.
    """

    policy: Policy
    reward: Reward
    parameters: Sequence[Tensor] = field(repr=False)
    shape: Sequence[int]
    prompts: Callable[[Tensor], Any] | None = None
    num_generations: int = 8
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    numbers: Callable[[Tensor], Tensor] | None = None
    columns: Callable[[Tensor], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        """Checks the parameters."""
        if not self.parameters or not all(p.requires_grad for p in self.parameters):
            raise ValueError("parameters are the tensors to tune: give at least one, all with requires_grad")

    def given(self, index: Tensor) -> tuple[Any, Mapping[str, Any]]:
        """Prompts and columns of samples (n,)."""
        prompts = None if self.prompts is None else self.prompts(index)
        return prompts, {} if self.columns is None else self.columns(index)

    def run(self, n: int, first: int) -> dict[str, Any]:
        """Arguments of `rollout` and its kin for the samples first .. first + n - 1."""
        return {
            "first": first,
            "prompts": self.given(first + torch.arange(n))[0],
            "num_generations": self.num_generations,
            "dtype": self.dtype,
            "device": self.device,
        }


class RewardEstimator(ABC):
    """See the module; subclasses are frozen dataclasses.

    Attributes:
        multiplies: whether an estimate is a product of derivatives over steps, which a few runs may dominate.
    """

    multiplies: ClassVar[bool]

    @property
    @abstractmethod
    def name(self) -> str:
        """In a few words."""

    @abstractmethod
    def refusal(self, problem: RewardProblem) -> str | None:
        """Why it cannot run on a problem, or None."""

    @abstractmethod
    def evaluations(self, problem: RewardProblem) -> float:
        """Network evaluations a run, its gradient included: what `choose` counts where seconds would not repeat."""

    @abstractmethod
    def __call__(
        self,
        problem: RewardProblem,
        noise: NoiseSource,
        n: int,
        first: int = 0,
        *,
        history: History | None = None,
    ) -> RewardLoss:
        """The loss of n runs; `history` is what earlier batches have taught, and is not changed."""


def _of(features: Features) -> str:
    """What names features of one's own."""
    return "" if features is linear_and_square else f" of {getattr(features, '__name__', 'own features')}"


@dataclass(frozen=True)
class Scores(RewardEstimator):
    """The score function.

    Args:
        baseline: as of `advantages`, or "x0" (`x0_baseline`), "optimal" (`optimal_constant`, a group at a time) or
            "value" (`ValueNetwork`, of a `History`).
        scale_rewards, clip: as of `advantages`.
        folds, ridge, features: of "x0", as of `x0_baseline`; a batch of fewer runs has a fold a run.

    Example:
        >>> Scores("x0").name
        'scores, x0 baseline'
    """

    multiplies: ClassVar[bool] = False

    baseline: AdvantageBaseline | Literal["x0", "optimal", "value"] = "leave-one-out"
    scale_rewards: ScaleRewards = "none"
    clip: float | None = None
    folds: int = 4
    ridge: float | None = None
    features: Features = field(default=linear_and_square, repr=False)  # a function has no lasting repr

    @property
    def name(self) -> str:
        """See the base class."""
        scale = "" if self.scale_rewards == "none" else f", scaled by {self.scale_rewards}"
        clip = "" if self.clip is None else f", clipped at {self.clip:g}"
        return f"scores, {self.baseline} baseline{_of(self.features)}{scale}{clip}"

    def refusal(self, problem: RewardProblem) -> str | None:
        """See the base class."""
        if problem.policy.terminal == "pathwise" and not is_differentiable(problem.reward):
            return "the last step is differentiated and the reward has no derivative"
        return None

    def evaluations(self, problem: RewardProblem) -> float:
        """See the base class: the rollout, and every step again with its gradient."""
        return 4.0 * problem.policy.steps

    def advantages(self, ran: Rollout, rewards: Tensor, history: History | None = None) -> Advantages:
        """Of a rollout.

        Raises:
            ValueError: if the baseline is "value" and there is no history that has one.
        """
        b, how = self.baseline, {"scale_rewards": self.scale_rewards, "clip": self.clip}
        streams = ran.streams
        given: Any = b
        if b == "value":
            if history is None or history.value is None:
                raise ValueError("baseline 'value' is a network: give history=History(value=ValueNetwork(..))")
            given = history.value.predict(history.told(ran))
        elif b == "x0":
            folds = min(self.folds, ran.independent)
            given = x0_baseline(ran, rewards, folds=folds, ridge=self.ridge, features=self.features)
        elif b == "optimal":
            given = optimal_constant(rewards, ran.score2, groups=ran.groups, streams=streams)
        past = b in ("running", "running-including") or self.scale_rewards in ("running", "prompt")
        if history is None:
            return advantages(rewards, ran.groups, baseline=given, streams=streams, **how)  # pyright: ignore[reportArgumentType]
        groups = history.numbers_of(ran.index).to(rewards.device) if past else ran.groups
        state = history.statistics
        if isinstance(given, Tensor):
            return advantages(rewards, groups, baseline=given, state=state, **how)  # pyright: ignore[reportArgumentType]
        whole = history.whole(groups if past else groups + history.place * ran.n)
        shared = None if streams is None else history.whole(streams.to(rewards.device))
        found = advantages(history.whole(rewards), whole, baseline=given, state=state, streams=shared, **how)  # pyright: ignore[reportArgumentType]
        return replace(found, values=history.mine(found.values, ran.n))

    def rolled(
        self, problem: RewardProblem, noise: NoiseSource, n: int, first: int = 0
    ) -> tuple[Rollout, Tensor, Tensor | None]:
        """The rollout, its rewards (n,), and dR/dx_0 where the last step is differentiated."""
        how = problem.run(n, first)
        ran = rollout(problem.policy, noise, n, problem.shape, x0_hat=self.baseline in ("x0", "value"), **how)
        columns = problem.given(ran.index)[1]
        if problem.policy.terminal == "pathwise":
            rewards, slope = reward_gradient(problem.reward, ran.samples, how["prompts"], **columns)
            return ran, rewards, slope
        return ran, evaluated(problem.reward, ran.samples, how["prompts"], columns).detach(), None

    def __call__(
        self,
        problem: RewardProblem,
        noise: NoiseSource,
        n: int,
        first: int = 0,
        *,
        history: History | None = None,
    ) -> RewardLoss:
        """See the base class."""
        ran, rewards, slope = self.rolled(problem, noise, n, first)
        out = surrogate_loss(problem.policy, ran, self.advantages(ran, rewards, history), reward_gradient=slope)
        return RewardLoss(out.loss, out.each, rewards, ran.samples, 0, out.claim, ran)


@dataclass(frozen=True)
class Paths(RewardEstimator):
    """The pathwise estimator.

    Args:
        rule: how far the derivative goes.
        scores: for the steps by scores of `Last(k, rest="score")`.
        checkpoint: as of `pathwise_loss`.

    Example:
        >>> Paths().name
        'pathwise, Full()'
    """

    multiplies: ClassVar[bool] = True

    rule: PathwiseRule = field(default_factory=Full)
    scores: Scores = field(default_factory=Scores)
    checkpoint: int = 1

    @property
    def name(self) -> str:
        """See the base class."""
        return f"pathwise, {self.rule}"

    def refusal(self, problem: RewardProblem) -> str | None:
        """See the base class."""
        return None if is_differentiable(problem.reward) else "the reward has no derivative"

    def evaluations(self, problem: RewardProblem) -> float:
        """See the base class: a step that is differentiated is run, run again (`checkpoint`) and differentiated."""
        K, rule = problem.policy.steps, self.rule
        again = 3.0 + bool(self.checkpoint)
        if isinstance(rule, LastAveraged):
            return K + 3.0 * rule.m
        if isinstance(rule, Last):
            return again * rule.k + (K - rule.k) * (4.0 if rule.rest == "score" else 1.0)
        if isinstance(rule, RandomTruncation):
            k = (rule.low + (K if rule.high is None else rule.high)) / 2
            return again * k + K - k
        if isinstance(rule, Roulette):
            return K + (again - 1) * sum(rule.keep**j for j in range(K))
        return again * K

    def __call__(
        self,
        problem: RewardProblem,
        noise: NoiseSource,
        n: int,
        first: int = 0,
        *,
        history: History | None = None,
    ) -> RewardLoss:
        """See the base class."""
        return pathwise_loss(
            problem.policy,
            problem.reward,
            noise,
            n,
            problem.shape,
            rule=self.rule,
            advantage=lambda ran, rewards: self.scores.advantages(ran, rewards, history),
            checkpoint=self.checkpoint,
            columns=problem.given(first + torch.arange(n))[1],
            **problem.run(n, first),
        )


@dataclass(frozen=True)
class SurrogateControl(RewardEstimator):
    """A cross-fitted surrogate as control variate: a quadratic, or a sum of other features of the sample.

    Args:
        scores: for the residual.
        folds, ridge, features, checkpoint: as of `surrogate_control`; a batch of fewer runs has a fold a run.

    Example:
        >>> SurrogateControl().name
        'surrogate control variate'
    """

    multiplies: ClassVar[bool] = True

    scores: Scores = field(default_factory=Scores)
    folds: int = 4
    ridge: float | None = None
    features: Features = field(default=linear_and_square, repr=False)  # a function has no lasting repr
    checkpoint: int = 1

    @property
    def name(self) -> str:
        """See the base class."""
        return f"surrogate control variate{_of(self.features)}"

    def refusal(self, problem: RewardProblem) -> str | None:
        """See the base class."""
        whole = len(problem.policy.scored) == problem.policy.steps
        return None if whole else "the last step has no density, and the residual needs one in every step"

    def evaluations(self, problem: RewardProblem) -> float:
        """See the base class: the scores' and a whole path's."""
        return (7.0 + bool(self.checkpoint)) * problem.policy.steps

    def __call__(
        self,
        problem: RewardProblem,
        noise: NoiseSource,
        n: int,
        first: int = 0,
        *,
        history: History | None = None,
    ) -> RewardLoss:
        """See the base class."""
        return surrogate_control(
            problem.policy,
            problem.reward,
            noise,
            n,
            problem.shape,
            advantage=lambda ran, rewards: self.scores.advantages(ran, rewards, history),
            folds=self.folds,
            ridge=self.ridge,
            features=self.features,
            checkpoint=self.checkpoint,
            columns=problem.given(first + torch.arange(n))[1],
            **problem.run(n, first),
        )
