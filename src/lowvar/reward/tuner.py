r"""The tuning loop: a generator of records over accelerate.

    update u:  runs u B .. u B + B - 1,   loss = -E R (by an estimator) + beta KL(policy || reference),   clip, AdamW,

`num_iterations` times on the same runs where the estimator is a score function (ratios bounded by `trust_nats`, the KL
in the first only). Noise
is a function of the run's number, so an update is a function of its number and of the last checkpoint: a run that was
interrupted goes on to the same parameters. With n processes each takes an n-th of the runs, whole groups, and gradients
are averaged: the same gradient as one process with all of them, for baselines that stay within a group.

`estimator="auto"` asks `choose` before the first update and every `pilot_every` updates, on runs of their own; the
record of that update says why. Watch reward *against KL*: every method overdoes it if left alone.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lowvar.process.noise import NoiseSource
from lowvar.reward.estimators import RewardEstimator, RewardProblem, Scores
from lowvar.reward.kl import BetaController, kl_loss
from lowvar.reward.pathwise import RewardLoss
from lowvar.reward.policy import Policy
from lowvar.reward.report import candidates, choose
from lowvar.reward.rewards import reward_gradient
from lowvar.reward.rollout import rollout
from lowvar.reward.surrogate import surrogate_loss
from lowvar.train import checkpoints

__all__ = ["TuneConfig", "TuneRecord", "Tuner"]

_PILOT = 2**40  # first run of pilots; training never gets there


@dataclass(frozen=True)
class TuneConfig:
    """How to tune.

    Args:
        updates: how many.
        batch: B, runs an update, over all processes; a multiple of the problem's `num_generations`.
        estimator: an estimator, or "auto".
        learning_rate: of AdamW (no weight decay).
        num_iterations: gradient steps on the same runs (TRL's name); above 1 for `Scores` only.
        trust_nats: bound of the log ratio then.
        beta: factor of the KL to the reference (TRL's name).
        target_kl: KL in nats that beta is steered to; None: beta stays.
        stop_kl: KL in nats at which tuning ends; None: never.
        max_grad_norm: bound of the gradient's norm.
        pilot_every: updates between pilots of "auto"; 0: only before the first.
        pilot_batch, pilot_repeats: of a pilot.
        checkpoint_every: updates between checkpoints; 0: none.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> TuneConfig(updates=10, batch=32).estimator
        'auto'
    """

    updates: int = 100
    batch: int = 64
    estimator: RewardEstimator | Literal["auto"] = "auto"
    learning_rate: float = 1e-4
    num_iterations: int = 1
    trust_nats: float | None = 0.2
    beta: float = 0.0
    target_kl: float | None = None
    stop_kl: float | None = None
    max_grad_norm: float = 1.0
    pilot_every: int = 0
    pilot_batch: int = 64
    pilot_repeats: int = 8
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        least = {"updates": 1, "batch": 1, "num_iterations": 1, "pilot_every": 0, "checkpoint_every": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; give {low} or more")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0")
        if self.num_iterations > 1 and not isinstance(self.estimator, Scores):
            raise ValueError(
                f"num_iterations is {self.num_iterations}, and only a score function can use its runs again; give "
                "estimator=Scores(...), or num_iterations=1"
            )
        BetaController(self.beta, self.target_kl)


@dataclass(frozen=True)
class TuneRecord:
    """Of one update.

    Attributes:
        update: its number, from 0.
        reward, reward_std: mean and standard deviation over the runs.
        kl: to the reference, nats a run; nan where there is none.
        beta: factor of it.
        gradient_norm: before clipping.
        estimator: its name.
        why: why it was chosen, in updates where it was.
        log_ratio: largest size of a log ratio in the last iteration.
        clipped: share of terms that clipping left without a gradient there.
        idle: share of groups whose rewards were all equal.
        reward_calls: so far, pilots included.
        seconds: of the update.
    """

    update: int
    reward: float
    reward_std: float
    kl: float
    beta: float
    gradient_norm: float
    estimator: str
    why: str
    log_ratio: float
    clipped: float
    idle: float
    reward_calls: int
    seconds: float


class Tuner:
    """Tunes a policy for a reward.

    Args:
        problem: what is tuned for what.
        config: how.
        noise: of the runs.
        reference: the policy the KL is to, with parameters of its own; needed for beta, target_kl and stop_kl.
        folder: for `metrics.jsonl` and checkpoints; None: nothing is written.
        resume: go on from the newest checkpoint in the folder.

    Raises:
        ValueError: if the batch holds no whole number of groups a process, or a reference is missing.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, Independent, PixelBasis, ReverseKernel
        >>> from lowvar.reward import Floor
        >>> schedule, shift = CosineVP(), torch.zeros(2, requires_grad=True)
        >>> twin = GaussianTwin(shift, PixelBasis((2,)), torch.ones(2))
        >>> policy = Policy(twin.denoiser(schedule), ReverseKernel(), torch.linspace(1, 0, 5), Floor(0.1))
        >>> problem = RewardProblem(policy, lambda x, p: x.sum(1), [shift], (2,))
        >>> config = TuneConfig(updates=5, batch=32, estimator=Scores("x0"), learning_rate=0.1)
        >>> records = list(Tuner(problem, config, Independent(0)).run())
        >>> len(records), records[-1].reward > records[0].reward
        (5, True)
    """

    def __init__(
        self,
        problem: RewardProblem,
        config: TuneConfig,
        noise: NoiseSource,
        *,
        reference: Policy | None = None,
        folder: str | Path | None = None,
        resume: bool = False,
    ) -> None:
        from accelerate import Accelerator

        self.problem, self.config, self.noise, self.reference = problem, config, noise, reference
        self.accelerator = Accelerator(cpu=torch.device(problem.device).type == "cpu")
        parts = self.accelerator.num_processes
        if config.batch % (parts * problem.num_generations):
            raise ValueError(
                f"batch is {config.batch}; give a multiple of {parts * problem.num_generations}: {parts} processes "
                f"with groups of {problem.num_generations}"
            )
        if reference is None and (config.beta or config.target_kl or config.stop_kl):
            raise ValueError("a KL needs a policy to be measured from; give reference, with parameters of its own")
        self.optimizer = torch.optim.AdamW(list(problem.parameters), config.learning_rate, weight_decay=0.0)
        self.control = BetaController(config.beta, config.target_kl)
        self.estimator = config.estimator if isinstance(config.estimator, RewardEstimator) else None
        self.folder = None if folder is None else Path(folder)
        self.update = self.calls = 0
        if resume:
            self._restore()
        elif self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> Iterator[TuneRecord]:
        """Updates, until their number or the KL's bound is reached.

        Yields:
            A record an update, once its parameters (and checkpoint) are there.
        """
        config = self.config
        while self.update < config.updates:
            record = self._update()
            self.update += 1
            if self.folder is not None and self.accelerator.is_main_process:
                with (self.folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(record)) + "\n")
                if config.checkpoint_every and self.update % config.checkpoint_every == 0:
                    self._save()
            yield record
            if config.stop_kl is not None and record.kl > config.stop_kl:
                return

    def _chosen(self) -> str:
        """Chooses where it is time to, and says why."""
        every, config = self.config.pilot_every, self.config
        due = self.estimator is None or (every and self.update and self.update % every == 0)
        if config.estimator != "auto" or not due:
            return ""
        choice = choose(
            self.problem,
            self.noise,
            n=config.pilot_batch,
            repeats=config.pilot_repeats,
            first=_PILOT + self.update * config.pilot_batch * config.pilot_repeats,
        )
        self.calls += config.pilot_batch * config.pilot_repeats * len(choice.report.rows)
        every_one = candidates(self.problem)
        place = torch.tensor(every_one.index(choice.estimator), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:  # seconds differ: all take the main process's choice
            place = self.accelerator.gather(place[None])[0]  # pyright: ignore[reportIndexIssue, reportCallIssue]
        self.estimator = every_one[int(place)]
        return choice.why

    def _update(self) -> TuneRecord:
        begin, config, problem = time.perf_counter(), self.config, self.problem
        why = self._chosen()
        assert self.estimator is not None
        n = config.batch // self.accelerator.num_processes
        first = self.update * config.batch + self.accelerator.process_index * n
        out = self.estimator(problem, self.noise, n, first)
        self.calls += config.batch
        kl, norm, ratio, clipped = float("nan"), 0.0, 0.0, 0.0
        weights = slope = None
        if config.num_iterations > 1 and isinstance(self.estimator, Scores) and out.ran is not None:
            weights = self.estimator.advantages(out.ran, out.rewards)
            if problem.policy.terminal == "pathwise":
                slope = reward_gradient(problem.reward, out.samples, out.ran.prompts)[1]
        for i in range(config.num_iterations):
            loss = out.loss
            if i and weights is not None and out.ran is not None:
                again = surrogate_loss(
                    problem.policy, out.ran, weights, trust_nats=config.trust_nats, reward_gradient=slope
                )
                loss, ratio, clipped = again.loss, float(again.log_ratio.abs().max()), again.clipped
            if self.reference is not None and i == 0:
                value, term = self._kl(out, n, first)
                kl = value
                loss = loss + self.control.beta * term if self.control.beta else loss
            norm = self._step(loss)
        self.control = self.control.updated(kl) if self.reference is not None else self.control
        rewards = self._gathered(out.rewards)
        return TuneRecord(
            self.update,
            float(rewards.mean()),
            float(rewards.std()),
            kl,
            self.control.beta,
            norm,
            self.estimator.name,
            why,
            ratio,
            clipped,
            self._idle(rewards),
            self.calls,
            time.perf_counter() - begin,
        )

    def _kl(self, out: RewardLoss, n: int, first: int) -> tuple[float, Tensor]:
        """Its mean over all processes, and the loss of this one's runs."""
        problem, ran = self.problem, out.ran
        assert self.reference is not None
        if ran is None or len(ran.steps) < problem.policy.steps:
            ran = rollout(problem.policy, self.noise, n, problem.shape, x0_hat=False, **problem.run(n, first))
        with torch.set_grad_enabled(self.control.beta > 0):
            found = kl_loss(problem.policy, self.reference, ran)
        return float(self._gathered(found.kl.sum(0)).mean()), found.loss

    def _step(self, loss: Tensor) -> float:
        parameters = list(self.problem.parameters)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        for p, g in zip(parameters, grads, strict=True):
            g = torch.zeros_like(p) if g is None else g
            if self.accelerator.num_processes > 1:
                g = self.accelerator.reduce(g, "mean")
            p.grad = g  # pyright: ignore[reportAttributeAccessIssue]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise ValueError(
                f"the gradient of update {self.update} is not finite; lower the learning rate, or raise the floor of "
                "the last step (parameters are as they were)"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def _gathered(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values.detach()
        return self.accelerator.gather(values.detach())  # pyright: ignore[reportReturnType]

    def _idle(self, rewards: Tensor) -> float:
        groups = rewards.reshape(-1, self.problem.num_generations)
        return float((groups.amax(1) == groups.amin(1)).double().mean())

    def _identity(self) -> dict[str, Any]:
        free = ("updates", "checkpoint_every")
        settings = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config) if f.name not in free}
        own = self.config.estimator
        return {**settings, "estimator": own if isinstance(own, str) else repr(own), "noise": repr(self.noise)}

    def _save(self) -> None:
        assert self.folder is not None
        kept = self.optimizer.state_dict()["state"]
        moments = {f"{i}.{name}": torch.as_tensor(v) for i, values in kept.items() for name, v in values.items()}
        every = candidates(self.problem)
        state = {
            "update": self.update,
            "identity": self._identity(),
            "beta": self.control.beta,
            "calls": self.calls,
            "choice": every.index(self.estimator) if self.config.estimator == "auto" and self.estimator else None,
        }
        own = {str(i): p for i, p in enumerate(self.problem.parameters)}
        checkpoints.save(self.folder / "checkpoints", state, {"parameters": own, "optimizer": moments})
        checkpoints.prune(self.folder / "checkpoints", 2)

    @torch.no_grad()
    def _restore(self) -> None:
        kept = None if self.folder is None else checkpoints.latest(self.folder / "checkpoints")
        if kept is None or self.folder is None:
            raise ValueError(f"there is no checkpoint to resume in {self.folder}; start without resume")
        checkpoints.check_same(kept, self._identity(), {}, self.folder)
        for i, p in enumerate(self.problem.parameters):
            p.copy_(kept.tensors["parameters"][str(i)])
        whole = self.optimizer.state_dict()
        for key, value in kept.tensors["optimizer"].items():
            i, name = key.split(".", 1)
            whole["state"].setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict(whole)
        self.update, self.calls = int(kept.state["update"]), int(kept.state["calls"])
        self.control = replace(self.control, beta=float(kept.state["beta"]))
        if kept.state["choice"] is not None:
            self.estimator = candidates(self.problem)[kept.state["choice"]]
        checkpoints.truncate(self.folder / "metrics.jsonl", self.update - 1)
