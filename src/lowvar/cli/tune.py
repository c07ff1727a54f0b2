"""`lowvar tune`: tunes a model for a reward; interrupted runs live in RUN.partial and go on with --resume."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowvar.cli import ranks
from lowvar.cli.console import Console
from lowvar.cli.folders import kept, make_way, partial_of, publish
from lowvar.cli.options import (
    ClassFlags,
    Common,
    MaybeFloat,
    MaybeInt,
    MaybeText,
    at_least,
    choose_device,
)
from lowvar.cli.stops import stop_word
from lowvar.errors import UserError

__all__ = ["Tune"]


@dataclass(frozen=True, kw_only=True)
class Tune(ClassFlags, Common):
    """Tune a model for a reward: the reverse process as a policy, with the gradient estimator that measures best.

    Rewards: jpeg, brightness, thickness, class:K, module:function of your own, called as f(samples (n, C, h, w) in
    [-1, 1], **columns) -> (n,), and sums such as 0.5*jpeg+20*brightness. Writes a pipeline folder whose network is
    tuned. Checks on runs of their own measure reward, KL to the model before, and distance to held-out data along the
    way. Until then checkpoints are kept in OUT.partial, where the same command with --resume goes on to the same
    weights as an undisturbed run. Under torchrun or accelerate the processes share every batch.
    """

    model: Path
    """folder of a diffusers pipeline"""
    reward: str
    """name, module:function, or a weighted sum of them"""
    out: Path
    """folder to write"""
    updates: int = 40
    """optimiser updates"""
    steps: int = 10
    """reverse steps, of the ancestral sampler"""
    batch_size: int = 64
    """runs an update"""
    num_generations: int = 8
    """runs a group, of one class: what leave-one-out compares"""
    lr: float = 1e-4
    """learning rate of AdamW"""
    estimator: str = "auto"
    """of the gradient: auto (a pilot measures), leave-one-out, batch, x0, optimal, running, value, none, grpo, ddpo,
    branches, surrogate, x0-edges and surrogate-edges (on the details of a picture), pathwise, pathwise-K (the last K
    steps, scores before), draft-K (those only) or roulette"""
    scale_rewards: Literal["none", "group", "batch", "running", "prompt"] = "none"
    """standard deviation that advantages are divided by; all but none and running change what is maximised"""
    num_iterations: int = 1
    """gradient steps on the same runs; above 1 with an estimator by scores"""
    accumulate: int = 2
    """parts of a batch that are differentiated one after the other; from 2 the gradient's noise is measured"""
    beta: float = 0.0
    """factor of the KL to the model before"""
    target_kl: MaybeFloat = None
    """KL in nats a run that beta is steered to"""
    stop_kl: MaybeFloat = None
    """KL in nats at which tuning ends"""
    stop_quality: MaybeFloat = None
    """distance to held-out data (kernel distance) at which tuning ends"""
    floor: float = 0.05
    """noise of the last step in training, so that it has a density; 0: that step is differentiated, for rewards with a
    derivative"""
    eta: float = 1.0
    """stochasticity of the sampler: above 0, to 1 (ancestral)"""
    lora: MaybeInt = None
    """rank of low-rank adapters (needs peft), merged into the network at the end; default: all weights are tuned"""
    average: float = 0.0
    """decay of the weights' moving average, which is then what is saved; 0: none"""
    mixed_precision: Literal["no", "bf16"] = "no"
    """of the network's evaluations"""
    data: MaybeText = None
    """held-out data for the quality, and for the classifier of class:K; default: digits, where the shape is theirs"""
    check_every: MaybeInt = None
    """updates between checks; default: a fifth of --updates"""
    n: int = 256
    """samples of a check, at least 64"""
    checkpoint_every: int = 5
    """updates between checkpoints"""
    seed: int = 0
    """of all random numbers"""
    resume: bool = False
    """go on in OUT.partial; from the start if there is none"""

    # -------------------------------------------------------------------------------------------------------- before

    def _checked(self) -> None:
        """A look at all flags before anything heavy is imported."""
        whole = ("updates", "steps", "batch_size", "num_iterations", "accumulate", "checkpoint_every")
        for name in whole:
            at_least(f"--{name.replace('_', '-')}", getattr(self, name))
        at_least("--num-generations", self.num_generations, 2)
        at_least("--n", self.n, 64)
        for flag, value in (("--check-every", self.check_every), ("--lora", self.lora)):
            if value is not None:
                at_least(flag, value)
        above = {"--lr": self.lr, "--target-kl": self.target_kl, "--stop-kl": self.stop_kl}
        for flag, value in {**above, "--stop-quality": self.stop_quality, "--eta": self.eta}.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{flag} is {value:g}; give a number above 0")
        for flag, value in (("--beta", self.beta), ("--floor", self.floor)):
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{flag} is {value:g}; give a number from 0")
        if self.eta > 1:
            raise UserError(f"--eta is {self.eta:g}; give a number above 0, at most 1")
        if not 0 <= self.average < 1:
            raise UserError(f"--average is {self.average:g}; give a decay from 0 (none), below 1")
        part = self.num_generations * self.accumulate * ranks.count()
        if self.batch_size % part:
            raise UserError(
                f"--batch-size is {self.batch_size}; give a multiple of {part}: --num-generations "
                f"{self.num_generations} x --accumulate {self.accumulate} x {ranks.count()} processes"
            )
        self.check_guidance()
        from lowvar.reward import Scores, estimator_named
        from lowvar.reward.named import parsed

        parsed(self.reward)
        given = estimator_named(self.estimator, scale_rewards=self.scale_rewards, steps=self.steps)
        if self.num_iterations > 1 and not isinstance(given, Scores):
            raise UserError(
                f"--num-iterations is {self.num_iterations}, and only an estimator by scores can use its runs again; "
                "give --estimator x0 or leave-one-out"
            )

    def run(self, console: Console) -> dict[str, Any]:
        """See the base class."""
        begun = time.perf_counter()
        self._checked()
        partial = partial_of(self.out)
        ranks.join(self.device)
        ranks.main_first(lambda: make_way(self.out, overwrite=self.overwrite, resume=self.resume))
        from lowvar.cli.tuning import Tuning

        device = choose_device(self.device)
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # a module of one's own stands beside the run
        tuning = Tuning(self, device)
        resume = self.resume and (partial / "checkpoints").is_dir()
        ranks.main_first(lambda: tuning.begin(partial))
        before = tuning.before(console) if ranks.is_main() else None
        try:
            after = tuning.run(partial, console, resume=resume)
        except KeyboardInterrupt as stop:
            raise type(stop)(
                f"{stop_word(stop)} after {tuning.done} of {self.updates} updates; {kept(partial)}: give the same "
                "command with --resume to go on"
            ) from None
        summary: dict[str, Any] = {}

        def finish() -> None:
            assert before is not None
            assert after is not None
            summary.update(tuning.finish(partial, before, after, begun, console))
            publish(partial, self.out)
            console.result(str(self.out / "report.html"))

        ranks.main_first(finish)
        return summary
