"""What `lowvar tune` does between its flags and its files: the problem, the checks, the loop, the tuned pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowvar.cli import ranks
from lowvar.cli.models import Model, open_model, require_shape
from lowvar.cli.results import plain, summarise, write_run
from lowvar.cli.tuned import SHOWN, about_choice, read_samples, save_samples, save_tuned
from lowvar.errors import UserError
from lowvar.evaluation import check_steps
from lowvar.metrics import Scorer
from lowvar.metrics.intervals import Interval
from lowvar.pipelines import denoiser_of
from lowvar.process.denoiser import Denoiser
from lowvar.process.grid import trailing
from lowvar.process.kernel import ReverseKernel
from lowvar.process.noise import Independent
from lowvar.reward import (
    Check,
    Floor,
    History,
    Monitor,
    Policy,
    RewardError,
    RewardProblem,
    Scores,
    TuneConfig,
    Tuner,
    TuneRecord,
    ValueNetwork,
    estimator_named,
    reward_named,
)
from lowvar.reward.monitor import changed
from lowvar.reward.named import reward_needs_data

if TYPE_CHECKING:
    from lowvar.cli.console import Console
    from lowvar.cli.tune import Tune

__all__ = ["Tuning"]

_FREE = ("out", "device", "updates", "checkpoint_every")  # what a resumed run may change
_DIGITS = (1, 8, 8)


class Tuning:
    """A tuning run of the command line.

    Args:
        flags: the command.
        device: where the network runs.

    Raises:
        UserError: for a model, reward or setting that does not fit.
    """

    def __init__(self, flags: Tune, device: torch.device) -> None:
        self.flags, self.device, self.done = flags, device, 0
        self.model = open_model(flags.model, device, flags.label, flags.guidance)
        check_steps(flags.steps, self.model.denoiser.schedule)
        self.data = self._data()
        self.reward = self._reward()
        frozen = open_model(flags.model, device, flags.label, flags.guidance)
        self.reference = self._policy(frozen)
        self.merge: Callable[[], None] | None = None
        self.problem = self._problem()
        self.scorer = None if self.data is None else Scorer(self.data, metrics=("kernel",))
        self.config = self._config()
        self.noise = Independent(flags.seed)
        self.tuner: Tuner | None = None

    # ------------------------------------------------------------------------------------------------------- the parts

    def _data(self) -> Any:
        from lowvar.data import load

        flags, shape = self.flags, tuple(self.model.shape)
        named = flags.data or ("digits" if shape == _DIGITS and self.model.scaling_factor is None else None)
        if named is None:
            wanted = "--stop-quality" if flags.stop_quality is not None else ""
            wanted = f"--reward {flags.reward}" if reward_needs_data(flags.reward) else wanted
            if wanted:
                raise UserError(f"{wanted} needs data of the model's shape {shape}; give --data")
            return None
        data = load(named)
        require_shape(self.model, data.shape)
        return data

    def _reward(self) -> Any:
        flags = self.flags
        if self.model.scaling_factor is not None and ":" not in flags.reward:
            raise UserError(
                f"reward {flags.reward!r} is of images in [-1, 1], and the model makes latents; give a module:function"
            )
        data = self.data if reward_needs_data(flags.reward) else None
        reward = reward_named(flags.reward, data=data, seed=flags.seed, bound=self.model.bound)
        if flags.floor == 0 and not reward.differentiable:
            raise UserError(
                f"--floor is 0, so the last step is differentiated, and reward {flags.reward!r} does not say that it "
                "has a derivative; give --floor 0.05, or declare function.differentiable = True"
            )
        return reward

    @property
    def _conditional(self) -> bool:
        """Whether all classes are tuned together, each group one of them."""
        return bool(self.model.classes) and self.flags.label is None

    def _classes(self, index: Tensor) -> Tensor:
        return (index // self.flags.num_generations % len(self.model.classes)).to(self.device)

    def _policy(self, model: Model) -> Policy:
        flags = self.flags

        def of_classes(labels: Tensor) -> Denoiser:
            return denoiser_of(model.pipeline, class_labels=labels, guidance=flags.guidance)

        denoiser = of_classes if self._conditional else model.denoiser
        schedule = model.denoiser.schedule
        kernel = ReverseKernel(eta=flags.eta, variance="small")
        try:
            return Policy(
                denoiser, kernel, trailing(schedule, flags.steps), Floor(flags.floor) if flags.floor else "pathwise"
            )
        except ValueError as error:
            raise UserError(str(error)) from None

    def _problem(self) -> RewardProblem:
        from lowvar.pipelines import network_of

        network: Any = network_of(self.model.pipeline)
        if self.flags.lora is not None:
            from lowvar.reward.lora import add_lora

            parameters, self.merge = add_lora(network, self.flags.lora, seed=self.flags.seed)
        else:
            network.requires_grad_(True)
            parameters = [p for p in network.parameters() if p.is_floating_point()]
        conditional = self._conditional
        return RewardProblem(
            self._policy(self.model),
            self.reward,
            parameters,
            self.model.shape,
            prompts=self._classes if conditional else None,
            num_generations=self.flags.num_generations,
            device=self.device,
            numbers=(lambda index: self._classes(index).cpu()) if conditional else None,
            columns=(lambda index: {"label": self._classes(index)}) if conditional else None,
        )

    def _config(self) -> TuneConfig:
        f = self.flags
        given = estimator_named(f.estimator, scale_rewards=f.scale_rewards, steps=f.steps)
        reason = None if isinstance(given, str) else given.refusal(self.problem)
        if reason is not None:
            raise UserError(f"--estimator {f.estimator} cannot run here: {reason}; give another, or auto")
        beta = f.beta
        if f.target_kl is not None and not beta:
            raise UserError(
                f"--target-kl is {f.target_kl:g} and --beta 0; a target steers beta: give what to begin with, about "
                "the reward's standard deviation over the target"
            )
        return TuneConfig(
            f.updates,
            f.batch_size,
            given,
            learning_rate=f.lr,
            num_iterations=f.num_iterations,
            beta=beta,
            target_kl=f.target_kl,
            stop_kl=f.stop_kl,
            stop_quality=f.stop_quality,
            pilot_batch=max(f.batch_size // ranks.count(), 2 * f.num_generations),
            pilot_repeats=4,
            checkpoint_every=f.checkpoint_every,
            gradient_accumulation_steps=f.accumulate,
            average=f.average,
            mixed_precision=f.mixed_precision,
            measure_kl=False,
            check_every=f.check_every or max(f.updates // 5, 1),
        )

    def _monitor(self, *, before: bool = False) -> Monitor:
        problem = replace(self.problem, policy=self.reference) if before else self.problem
        score = None if self.scorer is None else self._quality
        return Monitor(problem, self.noise, self.flags.n, reference=self.reference, quality=score, batch_size=64)

    def _quality(self, samples: Tensor) -> Interval:
        assert self.scorer is not None
        return self.scorer.score(samples)["kernel"]

    # --------------------------------------------------------------------------------------------------------- the run

    def begin(self, partial: Path) -> None:
        """Makes the unfinished run's folder; refuses one of other flags."""
        import yaml

        resolved = plain(self.flags.resolved())
        file = partial / "config.yaml"
        if file.is_file():
            before = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            other = [k for k in sorted(before.keys() | resolved.keys()) if before.get(k) != resolved.get(k)]
            for key in other:
                if key not in _FREE:
                    raise UserError(
                        f"the run in {partial} has {key} {before.get(key)!r}, now it is {resolved.get(key)!r}; resume "
                        "with the same arguments, or start anew with --overwrite"
                    )
        partial.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")

    def before(self, console: Console) -> Check:
        """The check of the model as it is given, once the reward has been asked a first time."""
        with console.progress(self.flags.n, "checking the model as it is") as bar:
            try:
                return self._monitor(before=True)(bar.update)
            except RewardError as error:
                raise UserError(f"{error}; nothing was tuned") from None

    def run(self, partial: Path, console: Console, *, resume: bool) -> Check | None:
        """The loop; the check of its end, on the main process."""
        history = History(self.problem.numbers, value=self._value())
        tuner = self.tuner = Tuner(
            self.problem,
            self.config,
            self.noise,
            reference=self.reference,
            folder=partial,
            resume=resume,
            history=history,
            monitor=self._monitor(),
        )
        self.done, last = tuner.update, None
        with console.progress(self.flags.updates, f"tuning for {self.flags.reward}", unit="update") as bar:
            bar.update(tuner.update)
            if self.config.estimator == "auto" and tuner.estimator is None:
                console.note("comparing gradient estimators in a pilot")
            try:
                for record in tuner.run():
                    self.done, last = tuner.update, record
                    bar.update()
                    bar.set_postfix_str(f" reward {record.reward:.4g}", refresh=False)
                    self._note(record, partial, console)
            except RewardError as error:
                self._keep(tuner, partial)
                raise UserError(
                    f"{error}; the updates before it are kept in {partial}: mend the reward and give the same command "
                    "with --resume"
                ) from None
            except ValueError as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{error}; {partial} holds what was done before") from None
        if last is not None and last.check is not None:
            return last.check
        return tuner.check()

    def _value(self) -> ValueNetwork | None:
        given = self.config.estimator
        if not isinstance(given, Scores) or given.baseline != "value":
            return None
        d = int(torch.Size(self.model.shape).numel())
        prompts = len(self.model.classes) if self._conditional else 0
        return ValueNetwork(d, self.flags.steps, prompts, seed=self.flags.seed).to(self.device)

    def _keep(self, tuner: Tuner, partial: Path) -> None:
        """A checkpoint of the last whole update, where there is one that has none."""
        if tuner.update and tuner.accelerator.is_main_process:
            tuner.save()

    def _note(self, record: TuneRecord, partial: Path, console: Console) -> None:
        if record.why:
            console.note(record.why)
            if self.tuner is not None and self.tuner.choice is not None and ranks.is_main():
                (partial / "choice.json").write_text(
                    json.dumps(plain(about_choice(self.tuner.choice, record.why))), encoding="utf-8"
                )
        if record.check is not None:
            save_samples(partial, record.update + 1, record.check.samples)

    def finish(self, partial: Path, before: Check, after: Check, begun: float, console: Console) -> dict[str, Any]:
        """Writes the tuned pipeline, the run's files and its report into the unfinished run's folder."""
        tuner, flags = self.tuner, self.flags
        assert tuner is not None
        with tuner.averaged():
            if self.merge is not None:
                self.merge()
            save_tuned(self.model, partial, flags.eta)
        gain = changed(before, after)
        found = [] if before.quality is None else ["quality_before", "quality_after"]
        metric = {"metric": "kernel"}
        quality = dict.fromkeys(("quality_before", "quality_after"))
        if found:
            quality = {n: _about(c.quality) | metric for n, c in zip(found, (before, after), strict=True)}
        file = partial / "choice.json"
        summary = summarise(
            flags,
            flags.seed,
            begun,
            self.device,
            reward=flags.reward,
            updates=tuner.update,
            reward_before=_about(before.reward),
            reward_after=_about(after.reward),
            gain=gain,
            kl=after.kl.value,
            kl_low=after.kl.low,
            kl_high=after.kl.high,
            reward_calls=tuner.calls + flags.n,
            estimator=None if tuner.estimator is None else tuner.estimator.name,
            **quality,
            quality_floor=None if self.scorer is None else _about(self.scorer.floor(flags.n)["kernel"]),
            choice=json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None,
            ended=self._ended(after),
            network=self.model.about,
            sampler={"kind": "ancestral", "eta": flags.eta, "steps": flags.steps, "grid": "trailing"},
        )
        grids = {"before tuning": before.samples[:SHOWN], **read_samples(partial)}
        records = partial / "metrics.jsonl"
        records.touch()
        write_run(partial, summary, grids=grids if len(self.model.shape) == 3 else None)
        for name in ("checkpoints", "samples"):
            shutil.rmtree(partial / name, ignore_errors=True)
        file.unlink(missing_ok=True)
        low, high = gain["low"], gain["high"]
        console.result(
            f"{flags.reward}: {before.reward.value:.4g} before, {after.reward.value:.4g} after {tuner.update} updates "
            f"(rise {gain['value']:.4g}, 95% {low:.4g} to {high:.4g}), KL {after.kl.value:.3g} nats"
        )
        return summary

    def _ended(self, after: Check) -> str:
        """Why it ended, in a word: updates, kl or quality."""
        config, tuner = self.config, self.tuner
        assert tuner is not None
        if tuner.update >= config.updates:
            return "updates"
        worse = config.stop_quality is not None and after.quality is not None
        return "quality" if worse and after.quality.value > config.stop_quality else "kl"  # pyright: ignore[reportOptionalMemberAccess, reportOperatorIssue]


def _about(found: Interval | None) -> dict[str, float]:
    assert found is not None
    return {"value": found.value, "low": found.low, "high": found.high}
