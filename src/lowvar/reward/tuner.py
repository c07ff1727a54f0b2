r"""The tuning loop: a generator of records over accelerate.

    update u:  runs u B .. u B + B - 1,   loss = -E R (by an estimator) + beta KL(policy || reference),   clip, AdamW,

`num_iterations` times on the same runs where the estimator is a score function (ratios bounded by `trust_nats`; the KL
in every one of them, by its form for moved parameters). Noise is a function of the run's number, so an update is a
function of its number and of the last checkpoint: a run that was interrupted goes on to the same parameters. With n
processes each takes an n-th of the runs, whole groups, and gradients are averaged: the same gradient as one process
with all of them, for baselines by rewards; one that is a regression on states ("x0", "value") is fitted to each
process's own runs.

**Parts.** The runs of an update are differentiated in `gradient_accumulation_steps` parts of whole groups, g_1 .. g_m
their gradients. With g the mean, Var g = sum |g_i - g|^2 / (m (m - 1)): the noise of the gradient in every update, at
no cost, and |g|^2 - Var g over Var g is its signal-to-noise ratio.

`estimator="auto"` asks `choose` before the first update and every `pilot_every` updates, on runs of their own, and
counts cost in network evaluations, since seconds would make a resumed run another one; the record of that update says
why. Watch reward *against KL* and held-out quality (`Monitor`): every method overdoes it if left alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvar.process.noise import NoiseSource
from lowvar.reward.advantages import Advantages
from lowvar.reward.config import TuneConfig, TuneRecord
from lowvar.reward.estimators import RewardEstimator, RewardProblem, Scores
from lowvar.reward.history import History
from lowvar.reward.kl import BetaController, kl_loss
from lowvar.reward.monitor import Check, Monitor
from lowvar.reward.policy import Policy
from lowvar.reward.report import Choice, candidates, choose
from lowvar.reward.rewards import RewardError
from lowvar.reward.rollout import Rollout, rollout
from lowvar.reward.surrogate import surrogate_loss
from lowvar.train import checkpoints
from lowvar.train.snapshot import moments_of, restore_moments

__all__ = ["TuneConfig", "TuneRecord", "Tuner"]

_PILOT = 2**40  # first run of pilots; training never gets there


@dataclass
class _Runs:
    """What an update has seen so far, over its parts and iterations.

    Attributes:
        rewards, kl: of its parts.
        scored: of an estimator by scores, all of the process's runs, whose gradient can be taken again.
        ratio, clipped: of the last iteration.
    """

    rewards: list[Tensor]
    kl: list[Tensor]
    scored: _Scored | None = None
    ratio: float = 0.0
    clipped: float = 0.0


@dataclass(frozen=True)
class _Scored:
    """Runs with their advantages, and dR/dx_0 where the last step is differentiated."""

    ran: Rollout
    rewards: Tensor
    advantages: Advantages
    slope: Tensor | None


class Tuner:
    """Tunes a policy for a reward.

    Args:
        problem: what is tuned for what.
        config: how.
        noise: of the runs.
        reference: the policy the KL is to, with parameters of its own; needed for beta, target_kl and stop_kl.
        folder: for `metrics.jsonl` and checkpoints; None: nothing is written.
        resume: go on from the newest checkpoint in the folder.
        history: what the estimator remembers; None: a new one, without a value network.
        monitor: checks the parameters every `check_every` updates, on the main process.

    Raises:
        ValueError: if the batch holds no whole number of groups a process and part, or a reference is missing.

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
        history: History | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        from accelerate import Accelerator

        self.problem, self.config, self.noise, self.reference = problem, config, noise, reference
        self.accelerator = Accelerator(
            cpu=torch.device(problem.device).type == "cpu", mixed_precision=config.mixed_precision
        )
        self._check_sizes()
        self.parameters = list(problem.parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, config.learning_rate, weight_decay=0.0)
        self.control = BetaController(config.beta, config.target_kl)
        self.estimator = config.estimator if isinstance(config.estimator, RewardEstimator) else None
        self.choice: Choice | None = None
        self.history = History(problem.numbers) if history is None else history
        if self.accelerator.num_processes > 1:
            if self.history.value is not None:
                raise ValueError("a value network learns in one process; take another baseline, or start one process")
            self.history.gather, self.history.place = self._gathered, self.accelerator.process_index
        wanted = config.measure_kl or config.beta or config.target_kl or config.stop_kl
        self.kl_to = reference if wanted else None
        self.monitor = monitor
        self.averages = [p.detach().clone() for p in self.parameters] if config.average else []
        self.folder = None if folder is None else Path(folder)
        self.update = self.calls = 0
        if resume:
            self._restore()
        elif self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def _check_sizes(self) -> None:
        config, groups, processes = self.config, self.problem.num_generations, self.accelerator.num_processes
        parts = processes * config.gradient_accumulation_steps
        if config.batch % (parts * groups):
            raise ValueError(
                f"batch is {config.batch}; give a multiple of {parts * groups}: {processes} processes and "
                f"{config.gradient_accumulation_steps} parts with groups of {groups}"
            )
        if self.reference is None and (config.beta or config.target_kl or config.stop_kl):
            raise ValueError("a KL needs a policy to be measured from; give reference, with parameters of its own")

    def run(self) -> Iterator[TuneRecord]:
        """Updates, until their number, or the bound of KL or quality, is reached.

        Yields:
            A record an update, once its parameters (and checkpoint) are there.
        """
        config = self.config
        while self.update < config.updates:
            record = self._update()
            self.update += 1
            if config.check_every and (self.update % config.check_every == 0 or self.update == config.updates):
                record = replace(record, check=self.check())
            if self.folder is not None and self.accelerator.is_main_process:
                with (self.folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(record.plain()) + "\n")
                if config.checkpoint_every and self.update % config.checkpoint_every == 0:
                    self.save()
            yield record
            if self._over(record):
                return

    def check(self, progress: Callable[[int], object] | None = None) -> Check | None:
        """What the parameters (their average, where there is one) are worth now; None without a monitor."""
        if self.monitor is None or not self.accelerator.is_main_process:
            return None
        with self.averaged():
            self.calls += self.monitor.n
            return self.monitor(progress)

    def _over(self, record: TuneRecord) -> bool:
        config, quality = self.config, None if record.check is None else record.check.quality
        far = config.stop_kl is not None and record.kl > config.stop_kl
        bad = config.stop_quality is not None and quality is not None and quality.value > config.stop_quality
        if self.accelerator.num_processes == 1:
            return far or bad
        told = torch.tensor([float(far or bad)], device=self.accelerator.device)
        return bool(self._gathered(told).max())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters are their moving averages; as they are without one."""
        if not self.averages:
            yield
            return
        with torch.no_grad():
            own = [p.clone() for p in self.parameters]
            for p, a in zip(self.parameters, self.averages, strict=True):
                p.copy_(a)
            try:
                yield
            finally:
                for p, kept in zip(self.parameters, own, strict=True):
                    p.copy_(kept)

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
            cost="evaluations",
        )
        self.choice = choice
        self.calls += config.pilot_batch * config.pilot_repeats * len(choice.report.rows)
        every_one = candidates(self.problem)
        place = torch.tensor(every_one.index(choice.estimator), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:  # rounding may differ: all take the main process's choice
            place = self._gathered(place[None])[0]
        self.estimator = every_one[int(place)]
        return choice.why

    def _update(self) -> TuneRecord:
        begin, config = time.perf_counter(), self.config
        why = self._chosen()
        assert self.estimator is not None
        n = config.batch // self.accelerator.num_processes
        first = self.update * config.batch + self.accelerator.process_index * n
        seen = _Runs([], [])
        norm, variance, snr, kl = 0.0, math.nan, math.nan, math.nan
        try:
            for i in range(config.num_iterations):
                losses = self._scored(seen, again=True) if i else self._parts(self.estimator, n, first, seen)
                found = self._gradients(losses)
                if not i:
                    kl = float(self._gathered(torch.cat(seen.kl)).mean()) if seen.kl else math.nan
                    variance, snr = found[1:]
                norm = self._step(found[0])
        except RewardError as error:
            raise RewardError(error.what, self.update) from error.__cause__
        if seen.scored is not None:
            self.history.seen(seen.scored.ran, seen.scored.rewards)
        if self.kl_to is not None:
            self.control = self.control.updated(kl)
        rewards = self._gathered(torch.cat(seen.rewards))
        self.calls += len(rewards)
        return TuneRecord(
            self.update,
            float(rewards.mean()),
            float(rewards.std()),
            kl,
            self.control.beta,
            norm,
            self.estimator.name,
            why,
            seen.ratio,
            seen.clipped,
            self._idle(rewards),
            self.calls,
            time.perf_counter() - begin,
            variance,
            snr,
        )

    def _parts(self, estimator: RewardEstimator, n: int, first: int, seen: _Runs) -> Iterator[Tensor]:
        """Losses whose mean is the update's: of each part of its runs, KL included."""
        problem, m = self.problem, self.config.gradient_accumulation_steps
        if isinstance(estimator, Scores):  # baselines are fitted to all runs, then gradients are taken in parts
            with self.accelerator.autocast():
                ran, rewards, slope = estimator.rolled(problem, self.noise, n, first)
                seen.scored = _Scored(ran, rewards, estimator.advantages(ran, rewards, self.history), slope)
            seen.rewards.append(rewards)
            yield from self._scored(seen)
            return
        for j in range(m):
            at, size = first + j * (n // m), n // m
            with self.accelerator.autocast():
                out = estimator(problem, self.noise, size, at, history=self.history)
                loss = out.loss
                seen.rewards.append(out.rewards)
                if self.kl_to is not None:
                    ran = out.ran
                    if ran is None or len(ran.steps) < problem.policy.steps or ran.n != size:
                        ran = rollout(
                            problem.policy, self.noise, size, problem.shape, x0_hat=False, **problem.run(size, at)
                        )
                    loss = self._with_kl(loss, ran, seen)
            yield loss

    def _scored(self, seen: _Runs, *, again: bool = False) -> Iterator[Tensor]:
        """Losses of runs by scores, of each part of them; `again`: at parameters that have moved since."""
        runs, m = seen.scored, self.config.gradient_accumulation_steps
        assert runs is not None, "only an estimator by scores is asked again"
        nats = self.config.trust_nats if again else None
        if again:
            seen.ratio = seen.clipped = 0.0
        for which in torch.arange(runs.ran.n).chunk(m):
            own = runs.ran.part(which) if m > 1 else runs.ran
            A = replace(runs.advantages, values=runs.advantages.values[..., which])
            slope = None if runs.slope is None else runs.slope[which]
            with self.accelerator.autocast():
                out = surrogate_loss(self.problem.policy, own, A, trust_nats=nats, reward_gradient=slope)
                if again:
                    seen.ratio = max(seen.ratio, float(out.log_ratio.abs().max()))
                    seen.clipped += out.clipped / m
                loss = out.loss
                if self.kl_to is not None:
                    loss = self._with_kl(loss, own, None if again else seen)
            yield loss

    def _with_kl(self, loss: Tensor, ran: Rollout, seen: _Runs | None) -> Tensor:
        """Plus beta KL; `seen` is told the runs' KL."""
        assert self.kl_to is not None
        if not self.control.beta and seen is None:
            return loss
        with torch.set_grad_enabled(self.control.beta > 0):
            found = kl_loss(self.problem.policy, self.kl_to, ran)
        if seen is not None:
            seen.kl.append(found.kl.sum(0))
        return loss + self.control.beta * found.loss if self.control.beta else loss

    def _gradients(self, losses: Iterator[Tensor]) -> tuple[list[Tensor], float, float]:
        """Their mean, the variance of one run, and the signal-to-noise ratio of the batch."""
        total = [torch.zeros_like(p) for p in self.parameters]
        squares, m = torch.zeros((), dtype=torch.float64, device=self.accelerator.device), 0
        for loss in losses:
            for part, g in zip(total, torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True):
                if g is not None:
                    part += g
                    squares += g.double().square().sum()
            m += 1
        grads = [g / m for g in total]
        squares /= m
        processes = self.accelerator.num_processes
        if processes > 1:
            grads = [self._reduced(g) for g in grads]
            squares = self._reduced(squares)
        if m * processes < 2:
            return grads, math.nan, math.nan
        length = sum(float(g.double().square().sum()) for g in grads)
        noise = max(float(squares) - length, 0.0) / (m * processes - 1)  # of the batch's mean
        return grads, noise * self.config.batch, (length - noise) / noise if noise else math.inf

    def _step(self, grads: Sequence[Tensor]) -> float:
        for p, g in zip(self.parameters, grads, strict=True):
            p.grad = g
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            self.optimizer.zero_grad()
            raise ValueError(
                f"the gradient of update {self.update} is not finite; lower the learning rate, or raise the floor of "
                "the last step (parameters are as they were)"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for a, p in zip(self.averages, self.parameters, strict=False):
                a.lerp_(p, 1 - self.config.average)
        return float(norm)

    def _reduced(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "mean")  # pyright: ignore[reportReturnType]

    def _gathered(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values.detach()
        return self.accelerator.gather(values.detach())  # pyright: ignore[reportReturnType]

    def _idle(self, rewards: Tensor) -> float:
        groups = rewards.reshape(-1, self.problem.num_generations)
        return float((groups.amax(1) == groups.amin(1)).double().mean())

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _identity(self) -> dict[str, Any]:
        free = ("updates", "checkpoint_every")
        settings = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config) if f.name not in free}
        own = self.config.estimator
        which = own if isinstance(own, str) else f"{own.name}: {own!r}"  # features are in the name alone
        return {**settings, "estimator": which, "noise": repr(self.noise)}

    def save(self) -> None:
        """Writes a checkpoint of the last update into the folder."""
        assert self.folder is not None
        every = candidates(self.problem)
        history, learned = self.history.state()
        state = {
            "update": self.update,
            "identity": self._identity(),
            "beta": self.control.beta,
            "calls": self.calls,
            "choice": every.index(self.estimator) if self.config.estimator == "auto" and self.estimator else None,
            "history": history,
        }
        tensors = {
            "parameters": {str(i): p for i, p in enumerate(self.parameters)},
            "averages": {str(i): p for i, p in enumerate(self.averages)},
            "optimizer": moments_of(self.optimizer),
            "history": learned,
        }
        checkpoints.save(self.folder / "checkpoints", state, tensors)
        checkpoints.prune(self.folder / "checkpoints", 2)

    @torch.no_grad()
    def _restore(self) -> None:
        kept = None if self.folder is None else checkpoints.latest(self.folder / "checkpoints")
        if kept is None or self.folder is None:
            raise ValueError(f"there is no checkpoint to resume in {self.folder}; start without resume")
        checkpoints.check_same(kept, self._identity(), {}, self.folder)
        for name, values in (("parameters", self.parameters), ("averages", self.averages)):
            for i, p in enumerate(values):
                p.copy_(kept.tensors[name][str(i)])
        restore_moments(self.optimizer, kept.tensors.get("optimizer", {}))
        self.update, self.calls = int(kept.state["update"]), int(kept.state["calls"])
        self.control = replace(self.control, beta=float(kept.state["beta"]))
        self.history.restore(kept.state["history"], kept.tensors.get("history", {}))
        if kept.state["choice"] is not None:
            self.estimator = candidates(self.problem)[kept.state["choice"]]
        checkpoints.truncate(self.folder / "metrics.jsonl", self.update - 1)
