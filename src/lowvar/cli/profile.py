"""`lowvar profile`: where a model's variance comes from, what each treatment of it would gain, and what to do."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowvar.cli.console import Console
from lowvar.cli.folders import check_free, new_folder
from lowvar.cli.options import DataFlags, MaybePath, MaybeText, Sampling, at_least, choose_device, parse_names
from lowvar.cli.profile_summary import (
    USUAL_BATCH,
    about_profile,
    about_promises,
    about_reverse,
    about_reward,
    about_statistic,
    read_profile,
    reverse_figures,
    trained_batch,
)
from lowvar.errors import UserError

if TYPE_CHECKING:
    import torch

    from lowvar.cli.models import Model
    from lowvar.cli.profiling import InUse, Scores
    from lowvar.data import Data
    from lowvar.metrics import Statistic
    from lowvar.profile import Advice, ReverseProfile
    from lowvar.reward import NamedReward

__all__ = ["Profile"]

PARTS = ("training", "sampling", "statistics", "reward")
_SHARES = {"training": 0.45, "sampling": 0.4, "statistics": 0.15, "reward": 0.2}  # of the time
_SCORES = 0.45  # of the sampling part's time


@dataclass(frozen=True, kw_only=True)
class Profile(DataFlags, Sampling):
    """Say where a model's variance comes from, and what would lower it: in training, sampling, statistics and tuning.

    Decomposes the variance of one sample's gradient, at the model's weights, into what images, times, noises and their
    interactions bring, by layer group and noise level; measures what each technique of `lowvar train` takes off it;
    finds noise levels that were not learned; estimates the batch that pays. Measures the reverse process: its error
    curve, the covariance by noise level, whether the sampler's variance is right, and scores against evaluations. Says
    which designs pay for statistics and, with --reward, which estimator for a reward's gradient. Ranks what to do, with
    the words that do it: `lowvar train --from-profile OUT` and `lowvar calibrate --from-profile OUT` apply them.
    """

    model: str
    """folder of a diffusers pipeline, or module:function, which returns a torch.nn.Module called as
    network(x, timestep), with its weights, and --prediction"""
    out: Path
    """folder to write"""
    batch_size: int = 0
    """batch of your training, at which techniques are measured, a multiple of 4; 0: what the model's folder says that
    it was trained with, and 64 where it does not"""
    minutes: float = 5.0
    """time to spend; intervals say what it allowed, and what does not fit is left out with a note"""
    memory: float = 4.0
    """gigabytes that gradients may take; where 8 of them need more, random projections stand for them"""
    parts: str = "all"
    """training, sampling, statistics, reward, separated by commas; default: all, reward with --reward only"""
    steps: int = 10
    """reverse steps that the sampler in use is profiled at"""
    statistic: MaybeText = None
    """statistics whose designs are compared, names or module:function separated by commas; default: brightness and
    jpeg of images, none of others"""
    reward: MaybeText = None
    """as of `lowvar tune`, a name, module:function or a weighted sum of them: the estimators of its gradient are
    compared"""
    against: MaybePath = None
    """an earlier profile: what its verdict promised stands beside what is measured now"""
    prediction: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "epsilon"
    """of --model module:function: what the network predicts"""
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear", "sigmoid"] = "squaredcos_cap_v2"
    """of --model module:function: table of the noise schedule, by diffusers' name (not for flow_prediction)"""

    def _checked(self) -> tuple[str, ...]:
        """A look at all flags before anything heavy is imported; the parts."""
        if self.batch_size:
            at_least("--batch-size", self.batch_size, 4)
        if self.batch_size % 4:
            raise UserError(f"--batch-size is {self.batch_size}; give a multiple of 4, so that pairs and groups fit")
        for flag, value in (("--minutes", self.minutes), ("--memory", self.memory)):
            if not 0 < value < float("inf"):
                raise UserError(f"{flag} is {value:g}; give a number above 0")
        at_least("--steps", self.steps, 2)
        parts = PARTS[:3] if self.parts == "all" else tuple(parse_names("--parts", self.parts))
        unknown = [name for name in parts if name not in PARTS]
        if unknown:
            raise UserError(f"--parts has {unknown[0]!r}; allowed: all, {', '.join(PARTS)}")
        if "reward" in parts and self.reward is None:
            raise UserError("--parts has 'reward', and there is no reward; give --reward, for example brightness")
        if self.reward is not None:
            from lowvar.reward.named import parsed

            parsed(self.reward)
            parts = parts if "reward" in parts else (*parts, "reward")
        check_free(self.out, overwrite=self.overwrite)
        return parts

    def run(self, console: Console) -> dict[str, Any]:
        """See the base class."""
        begun = time.perf_counter()
        parts = self._checked()
        first = None if self.against is None else read_profile(self.against, "--against")
        from lowvar.cli.classes import require_classes
        from lowvar.cli.models import fitting
        from lowvar.cli.results import about_data, summarise, write_run
        from lowvar.profile import promises, ranked

        device = choose_device(self.device)
        data = self.load(self.seed)
        model = self._opened(data, device)
        data = fitting(model, data)
        trained = trained_batch(Path(self.model)) if not self.batch_size else self.batch_size
        batch = max(4 * round(trained / 4), 4)
        if "training" in parts and len(data.train) < batch:
            raise UserError(
                f"--batch-size is {batch} and the training split has {len(data.train)} images; give at most "
                "that, or more data"
            )
        if model.classes:
            require_classes(model, data, "profile of a model with classes")
        statistics, reward = self._statistics(model, data)
        work = _Work(self, parts, model, data, device, console, batch, trained)
        work.run(statistics, reward)
        lines = ranked(work.lines)
        fields = {**work.found, "verdict": [asdict(line) for line in lines], "notes": work.notes}
        summary = summarise(
            self, self.seed, begun, device, **fields, network=model.about, data=about_data(data), parts=parts
        )
        if first is not None:
            summary["against"] = about_promises(promises(first, summary), self.against)
        with new_folder(self.out, overwrite=self.overwrite) as folder:
            write_run(folder, summary, records=summary.get("techniques", []), figures=work.figures)
        for k, line in enumerate(lines, start=1):
            mark = f"{k}. {line.do}" if line.worth else f"not worth doing: {line.do}"
            console.result(f"{mark}: {line.expect}" + (f"  [{line.command}]" if line.command else ""))
        console.result(str(self.out / "report.html"))
        return summary

    def _opened(self, data: Data, device: torch.device) -> Model:
        """The model: of a folder, or a plain module with a declared prediction."""
        from lowvar.cli.models import Model, open_model

        if ":" not in self.model or Path(self.model).exists():
            return open_model(Path(self.model), device)
        from types import SimpleNamespace

        from lowvar.process import Flow
        from lowvar.process.denoiser import NetworkDenoiser
        from lowvar.schedulers import ReverseVarianceScheduler
        from lowvar.train.own_networks import own_network

        network = own_network(self.model).to(device).eval().requires_grad_(False)
        bound = data.scaling_factor is None
        fields: dict[str, Any] = {"prediction_type": self.prediction, "clip_sample": bound}
        if self.prediction == "flow_prediction":
            fields |= {"schedule": Flow().config(), "sampler": "multistep", "grid": "uniform"}
        else:
            fields |= {"beta_schedule": self.beta_schedule, "timestep_spacing": "trailing"}
        scheduler = ReverseVarianceScheduler(**fields)
        kind: Any = "flow" if self.prediction == "flow_prediction" else self.prediction
        denoiser = NetworkDenoiser(network, scheduler.schedule, kind, None, 1.0 if bound else None)
        pipeline = SimpleNamespace(network=network, scheduler=scheduler)
        return Model(pipeline, denoiser, None, tuple(data.shape))

    def _statistics(self, model: Model, data: Data) -> tuple[list[Statistic], NamedReward | None]:
        """Statistics, and the reward."""
        from lowvar.metrics import needs_data, statistic_named
        from lowvar.reward import reward_named
        from lowvar.reward.named import parsed

        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # a module of one's own stands beside the run
        images = len(data.shape) == 3 and model.bound is not None
        words = parse_names("--statistic", self.statistic) if self.statistic else ["brightness", "jpeg"] * images
        rewards = [] if self.reward is None else [name for _, name in parsed(self.reward)]
        own = [word for word in (*words, *rewards) if ":" not in word or needs_data(word)]
        if own and not images and model.bound is None:
            raise UserError(f"statistic {own[0]!r} is of images, and the model makes latents; give a module:function")
        reward = None if self.reward is None else reward_named(self.reward, data=data, bound=model.bound)
        return [statistic_named(word, data=data) for word in words], reward


class _Work:
    """The parts of a profile, one after the other, and what they found.

    Attributes:
        found: entries of the summary.
        figures: entries of figures.json.
        lines: of the verdict.
        notes: what was left out.
        batch: samples a batch of what is measured.
        trained: batch of the model's training.
    """

    def __init__(
        self,
        asked: Profile,
        parts: tuple[str, ...],
        model: Model,
        data: Data,
        device: torch.device,
        console: Console,
        batch: int,
        trained: int,
    ) -> None:
        self.batch, self.trained = batch, trained
        self.asked, self.parts, self.model, self.data = asked, parts, model, data
        self.device, self.console = device, console
        total = sum(_SHARES[p] for p in parts)
        self.seconds = {p: 60 * asked.minutes * _SHARES[p] / total for p in parts}
        self.found: dict[str, Any] = {}
        self.figures: dict[str, Any] = {}
        self.lines: list[Advice] = []
        self.notes: list[str] = []

    def run(self, statistics: list[Statistic], reward: NamedReward | None) -> None:
        """All parts that are asked for."""
        from lowvar.cli.profiling import in_use

        asked = self.asked
        with self.console.progress(100, "profiling", unit="%") as bar:
            self._bar, self._done, self._base = bar, 0, 0.0
            if "training" in self.parts:
                self._training()
                self._passed("training")
            if set(self.parts) - {"training"}:
                used = in_use(self.model, asked.steps)
                reverse = self._sampling(used)
                if "statistics" in self.parts:
                    self._statistics_of(used, reverse, statistics)
                    self._passed("statistics")
                if "reward" in self.parts and reward is not None:
                    self._reward_of(used, reward)
                    self._passed("reward")

    def _told(self, part: str, share: float) -> None:
        total = sum(self.seconds.values())
        now = int(100 * (self._base + share * self.seconds.get(part, 0.0) / total))
        if now > self._done:
            self._bar.update(now - self._done)
            self._done = now

    def _passed(self, part: str) -> None:
        self._told(part, 1.0)
        self._base += self.seconds.get(part, 0.0) / sum(self.seconds.values())

    def _training(self) -> None:
        from lowvar.profile import profile_training

        asked, model = self.asked, self.model
        network: Any = model.denoiser.network
        network.requires_grad_(True)
        found = profile_training(
            model.denoiser,
            self.data.train,
            levels=self.data.levels,
            batch_size=self.batch,
            trained=self.trained,
            conditional=bool(model.classes),
            held_out=self.data.calibration,
            minutes=self.seconds["training"] / 60,
            memory=1e9 * asked.memory,
            seed=asked.seed,
            device=self.device,
            progress=lambda part: self._told("training", part),
        )
        network.requires_grad_(False)
        self.found |= about_profile(found)
        self.lines += found.verdict

    def _sampling(self, used: InUse) -> ReverseProfile:
        """The reverse process; where only later parts are asked for, the least that they need of it."""
        from lowvar.cli.profiling import scores_part
        from lowvar.profile import profile_reverse

        asked, wanted = self.asked, "sampling" in self.parts
        seconds = self.seconds.get("sampling", 1.0)
        found = profile_reverse(
            self.model.denoiser,
            self.data,
            own=used.variance if wanted else None,
            grid=used.grid,
            calibration=self.model.calibration,
            steps=asked.steps,
            seconds=(1 - _SCORES) * seconds,
            seed=asked.seed,
            batch_size=max(self.batch, USUAL_BATCH),
            device=self.device,
            structure=wanted,
            progress=lambda part: self._told("sampling", (1 - _SCORES) * part),
        )
        if not wanted:
            return found
        self.notes += found.notes
        scores: Scores = scores_part(
            self.model,
            self.data,
            found.calibration,
            used,
            steps=asked.steps,
            seconds=_SCORES * seconds,
            seed=asked.seed,
            batch_size=max(self.batch, USUAL_BATCH),
            device=self.device,
        )
        self.notes += scores.notes
        self.found["reverse"] = about_reverse(found, asked.steps)
        names = ("rows", "floor", "current", "recommended", "metric")
        self.found |= {name: getattr(scores, name) for name in names} if scores.rows else {}
        self.figures = reverse_figures(found, self.model, scores.about)
        self.lines += _sampling_lines(asked, found, used, scores)
        self._passed("sampling")
        return found

    def _statistics_of(self, used: InUse, reverse: ReverseProfile, statistics: list[Statistic]) -> None:
        from lowvar.cli.profiling import statistics_part
        from lowvar.profile import statistic_gain

        if not statistics:
            self.notes.append("no statistics were named, and rows of a table and latents have no usual ones")
            return
        asked = self.asked
        found, notes = statistics_part(
            self.model,
            reverse.calibration,
            used,
            statistics,
            steps=asked.steps,
            seconds=self.seconds["statistics"],
            seed=asked.seed,
            batch_size=max(self.batch, USUAL_BATCH),
            device=self.device,
        )
        self.notes += notes
        self.found["statistics"] = [about_statistic(s) for s in found]
        for one in found:
            own = self.model.calibration is None and {"twin", "mixture"} & set(one.design.split("+"))
            model = "CALIBRATED" if own else asked.model  # a twin is the calibration's
            words = f"lowvar estimate --model {model} --statistic {one.name} --design {one.design}"
            self.lines.append(statistic_gain(one, words))

    def _reward_of(self, used: InUse, reward: NamedReward) -> None:
        from lowvar.cli.profiling import reward_part
        from lowvar.profile import reward_gain

        asked = self.asked
        found, notes = reward_part(
            self.model,
            used,
            reward,
            steps=asked.steps,
            seconds=self.seconds["reward"],
            memory=1e9 * asked.memory,
            seed=asked.seed,
            device=self.device,
        )
        self.notes += notes
        if found is not None:
            self.found["reward"] = about_reward(found)
            words = f"lowvar tune --model {asked.model} --steps {asked.steps} --out TUNED"
            self.lines.append(reward_gain(found, words))


def _sampling_lines(asked: Profile, found: ReverseProfile, used: InUse, scores: Scores) -> list[Advice]:
    """The verdict of the sampling part."""
    from lowvar.profile import covariance_gain, sampler_gain, variance_fault
    from lowvar.profile.sampling import NUMBER

    command = f"lowvar calibrate --model {asked.model} --data {asked.data} --from-profile {asked.out} --out CALIBRATED"
    lines: list[Advice | None] = []
    best = scores.recommended
    if used.variance is not None and found.paid is not None and found.own is not None:
        settings: dict[str, Any] = {"sampler": "ddpm-basis", "grid": "trailing", "steps": asked.steps}
        if best is not None and best["sampler"] != (scores.current or best)["sampler"]:
            settings = best  # few samples may not tell the wrong variance from a right one; then the right one
        lines.append(variance_fault(found.checks[found.own], found.paid, used.variance.name, settings, command))
    if best is not None and scores.current is not None:
        floor = scores.floor.get(scores.metric, 0.0)
        lines.append(sampler_gain(scores.rows, scores.current, best, scores.metric, floor, command))
    if found.saved is not None and used.grid is not None:  # of a sampler without noise it is no gain
        lines.append(covariance_gain(found.checks["basis"], found.checks[NUMBER], found.saved, command))
    return [line for line in lines if line is not None]
