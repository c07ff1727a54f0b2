r"""The training loop: a generator of typed records over accelerate.

Update u draws samples u B .. u B + B - 1 (see `draws`), and with n processes process r computes the r-th n-th of them:

    loss = mean_i weight_i loss_i,    g = clip(grad loss),    theta <- AdamW(theta, g),    ema <- d ema + (1 - d) theta.

What an update does is a function of its number and of the state in the last checkpoint (weights, moments, average,
learned times), so a run interrupted anywhere goes on to the same weights, bit for bit on one process.

A loss or gradient that is not finite stops the run before it reaches the weights.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from lowvar.data.stream import Stream
from lowvar.errors import UserError
from lowvar.models import null_class
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.train import checkpoints
from lowvar.train.accumulation import backward
from lowvar.train.averaging import PowerAverages
from lowvar.train.batch_loss import BatchLoss
from lowvar.train.conditional import classes_of
from lowvar.train.config import TrainConfig
from lowvar.train.draws import Draws, ImageSource
from lowvar.train.gradient_norm import GradientNormTimes
from lowvar.train.guards import NonFiniteError
from lowvar.train.kept_averages import AVERAGES, discard_after, is_moment, keep_averages
from lowvar.train.networks import build_network
from lowvar.train.noise_probe import Blocks, measured
from lowvar.train.noise_scale import NoiseScale
from lowvar.train.norm_probe import squared_norm
from lowvar.train.objectives import Objective
from lowvar.train.own_networks import OfNullClass, check_network, own_network, structure
from lowvar.train.pairs import OrthogonalNoise
from lowvar.train.parts import make_objective, make_plan, make_references, make_schedule, make_times
from lowvar.train.processes import resolved_sigma_data
from lowvar.train.records import Record, Sampled, Saved, Update, Validation
from lowvar.train.snapshot import Parts, capture, restore
from lowvar.train.spectrum import make_spectrum, restored, stored
from lowvar.train.stable_target import StableTarget
from lowvar.train.streams import check_stream, known
from lowvar.train.targets import GivenTarget
from lowvar.train.together import gathered, make_accelerator, of_the_main_process, summed, written
from lowvar.train.tracking import (
    check_pictures,
    check_trackers,
    draw_picture,
    scalars,
    start_trackers,
    stop_trackers,
)
from lowvar.train.uncertainty import Uncertainty
from lowvar.train.watch import Watch

__all__ = ["Trainer", "TrainingData"]

_FREE = (  # settings that change no update: a run may go on with others
    "validate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "noise_scale_every",
    "sample_every",
    "trackers",
)


class TrainingData(Protocol):
    """What training needs of a data set: `lowvar.data.Data` and `StreamData` have it."""

    @property
    def train(self) -> ImageSource | Stream: ...
    @property
    def calibration(self) -> ImageSource: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def levels(self) -> int | None: ...
    @property
    def fingerprint(self) -> str: ...


class Trainer:
    """A training run: `run()` yields its records, `ema_network()` is what comes out.

    Args:
        data: splits `train` (or a stream) and `calibration`, with shape, levels and fingerprint.
        config: settings.
        folder: for `metrics.jsonl` and `checkpoints/`; None keeps nothing.
        network: an own network, called as network(x, timestep), with class_labels=labels where the config says
            conditional (`own_networks`); default: what the config says.
        resume: go on from the newest checkpoint in `folder` (from the start if there is none yet).
        device: "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        UserError: if the data, the head or the classes do not fit the network, the batch does not divide among the
            processes, or a checkpoint belongs to other settings or data.

    Example:
        >>> from lowvar.data import load
        >>> config = TrainConfig(updates=2, batch_size=4, network={"width": 8}, warmup=0)
        >>> trainer = Trainer(load("digits"), config, device="cpu")
        >>> [type(record).__name__ for record in trainer.run()]
        ['Update', 'Update', 'Validation']
    """

    def __init__(
        self,
        data: TrainingData,
        config: TrainConfig,
        folder: Path | str | None = None,
        *,
        network: nn.Module | None = None,
        resume: bool = False,
        device: Literal["auto", "cpu", "cuda"] = "auto",
    ) -> None:
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("device is cuda, but no CUDA device is there; give auto or cpu")
        self.data, self.config = data, config
        self.folder = None if folder is None else Path(folder)
        check_trackers(config.trackers, self.folder)
        if config.sample_every:
            check_pictures(data.shape, self.folder, latent=getattr(data, "scaling_factor", None) is not None)
        log: dict[str, Any] = {"log_with": [*config.trackers], "project_dir": self.folder} if config.trackers else {}
        cpu = device == "cpu" or not torch.cuda.is_available()  # said outright: else processes on CPUs do not meet
        self.accelerator = make_accelerator(config.mixed_precision, cpu=cpu, **log)
        parts = self.accelerator.num_processes
        if config.batch_size % parts:
            raise UserError(
                f"batch_size {config.batch_size} does not divide among {parts} processes; give a multiple of {parts}"
            )
        if config.batch_size % (parts * config.gradient_accumulation_steps):
            raise UserError(
                f"gradient_accumulation_steps is {config.gradient_accumulation_steps} and a process has "
                f"{config.batch_size // parts} samples an update; give a divisor of {config.batch_size // parts}"
            )
        self.schedule = make_schedule(config)
        if isinstance(data.train, Stream):
            check_stream(config)
        self._known = known(data)
        self.sigma_data = resolved_sigma_data(config, self._known.train)
        self.objective: Objective = make_objective(config, data.levels, self.sigma_data)
        self.uncertainty = Uncertainty(seed=config.seed) if config.weighting == "uncertainty" else None
        self.times = make_times(config, self.schedule, self.sigma_data)
        self.plan = make_plan(config, data.train, self.schedule)
        if config.clusters is not None and self.plan.labels is not None and parts > 1:  # rounding may differ
            shared = of_the_main_process(self.accelerator, {"labels": self.plan.labels})
            self.plan.labels = shared["labels"]
        if isinstance(self.plan.pairing, OrthogonalNoise) and math.prod(data.shape) < self.plan.pairing.size:
            raise UserError(
                f"pairing is orthogonal, which makes {self.plan.pairing.size} noises orthogonal, and the data have "
                f"{math.prod(data.shape)} numbers each, of which no more can be; give another pairing"
            )
        self.references = make_references(config, self._known.train)
        size = 1 if self.plan.pairing.splits else self.plan.pairing.size
        if config.batch_size % (parts * size):
            raise UserError(
                f"batch_size {config.batch_size} among {parts} processes would split the groups of {size} samples of "
                f"pairing {config.pairing}; give a multiple of {parts * size}"
            )
        one_set = self.references is not None and self.references.source == "added"  # all draws share its chances
        group = config.batch_size if one_set else self.plan.group_size
        self._blocks = Blocks.of(config.batch_size, group, parts)
        self.noise_scale = NoiseScale(max(config.batch_size, 2)) if config.noise_scale_every else None
        self.spectrum = None if config.head_basis is None else make_spectrum(self._known, config.head_basis)
        if self.spectrum is not None and parts > 1:  # eigenvectors may differ between machines
            self.spectrum = restored(of_the_main_process(self.accelerator, stored(self.spectrum)), self.spectrum)
        self.classes = classes_of(data, config.condition_dropout, config.seed) if config.conditional else None
        self.watch = Watch(
            self._known, config, self.schedule, self.objective, self.sigma_data, self.classes, self.references
        )
        classes = None if self.classes is None else self.classes.count
        is_own = network is not None or config.network.source is not None
        if network is None and config.network.source is not None:
            network = own_network(config.network.source, config.network.weights, config.seed)
        if network is None:
            network = build_network(
                data.shape, config.network, config.network_head, config.seed, config.head_rank, classes
            )
        else:
            check_network(network, data.shape, config.network_head, config.head_rank, classes)
        self._structure = structure(network) if is_own else None
        self._null = null_class(network) if classes is None else None
        self._average = _copy(network)
        minimised = self.objective
        groups: list[dict[str, Any]] = [{"params": list(network.parameters())}]
        if self.uncertainty is not None:
            self.uncertainty.to(self.accelerator.device)
            minimised = dataclasses.replace(self.objective, uncertainty=self.uncertainty)
            groups.append({"params": list(self.uncertainty.parameters()), "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay, fused=True)
        self._scheduler = get_scheduler(
            config.lr_schedule, optimizer, num_warmup_steps=config.warmup, num_training_steps=config.updates
        )
        prepared: Any = self.accelerator.prepare(network, optimizer)
        self._network, self._optimizer = prepared
        self._average.to(self.accelerator.device)
        self._ema = EMAModel(self._network.parameters(), decay=config.ema, foreach=True)
        self.averages = PowerAverages.of() if config.posthoc_ema else None
        drops = is_own or any(isinstance(m, nn.Dropout) and m.p > 0 for m in network.modules())
        self.batch = BatchLoss(
            minimised, self._as_denoiser, self.classes, self.references, config.seed, drops, self.accelerator.device
        )
        self.update = 0
        self.seconds = 0.0
        self._seen = (0.0, 0.0)  # effective sample size of the last update's targets, share of those of one image
        if resume:
            self._resume()
        elif self.folder is not None and checkpoints.latest(self.folder / "checkpoints") is not None:
            raise UserError(f"{self.folder} holds checkpoints of a run; go on with --resume or choose another folder")

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The network that is being trained."""
        return self._as_denoiser(self._network)

    # ------------------------------------------------------------------------------------------------------- one update

    def _as_denoiser(self, network: nn.Module) -> NetworkDenoiser:
        c = self.config
        called = network if self._null is None else OfNullClass(network, self._null)
        return NetworkDenoiser(
            called, self.schedule, c.prediction, c.network_head, sigma_data=self.sigma_data, spectrum=self.spectrum
        )

    def _step(self) -> Update:
        a = self.accelerator
        self._network.train()
        draws = self._draws(self.update)
        target, seen = self.batch.target(self.update, draws), torch.zeros(2, dtype=torch.float64)
        if isinstance(target, StableTarget):
            clean, info = target.weighted(draws.x0, draws.eps, draws.level)
            target, seen = GivenTarget(clean, target), torch.stack([info.ess.mean(), info.alone.double().mean()])
        plain = a.unwrap_model(self._network)  # without the hooks that would average gradients
        pieces = self.config.gradient_accumulation_steps
        if self.noise_scale is not None and (self.update + 1) % self.config.noise_scale_every == 0:
            self.noise_scale = measured(
                self.noise_scale,
                self._blocks,
                self.batch,
                a,
                plain,
                self.update,
                draws,
                lambda: self._draws(self.update + 1),
                pieces,
            )
        probe: tuple[Tensor, Tensor] | None = None
        if isinstance(self.times, GradientNormTimes) and self.times.due(self.update):
            place = self.times.place(self.config.batch_size)
            probe = squared_norm(self.batch, a, plain, self.update, draws, target, place)
        losses = backward(self.batch, a, self._network, self.update, draws, target, pieces)
        loss = (draws.weight.to(losses) * losses).mean()
        sums = summed(a, torch.cat([loss.double()[None], seen.to(loss.device)]))
        mean, ess, alone = (v / a.num_processes for v in sums.tolist())
        if not math.isfinite(mean):
            self._optimizer.zero_grad()
            raise NonFiniteError.of_losses(losses, draws, self.watch.validation, self.update, self.config, self._kept())
        if self.uncertainty is not None and a.num_processes > 1:  # a few numbers, outside what accelerate wraps
            for p in self.uncertainty.parameters():
                p.grad = None if p.grad is None else cast("Tensor", a.reduce(p.grad, "mean"))
        norm = self._clip()
        lr = float(self._scheduler.get_last_lr()[0])
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._scheduler.step()
        self._ema.step(self._network.parameters())
        if self.averages is not None:
            state = a.unwrap_model(self._network).state_dict()
            self.averages = self.averages.updated({k: v for k, v in state.items() if v.is_floating_point()})
        if probe is not None:
            self.times = self.times.updated(*probe) if bool(torch.isfinite(probe[1]).all()) else self.times
        elif self.times.learns_from == "losses" and self.times.state():
            learnt = losses
            if self.uncertainty is not None:  # its price u is no error
                learnt = learnt - self.uncertainty.log_uncertainty(draws.level.logsnr).detach()
            self.times = self.times.updated(*gathered(a, draws.bin, learnt))
        self.update += 1
        self._seen = (ess, alone)
        return Update(self.update, mean, norm, lr)

    def _draws(self, update: int) -> Draws:
        """This process's share of an update's draws."""
        a = self.accelerator
        return self.plan.draws(update, self.times, a.process_index, a.num_processes, a.device)

    def _clip(self) -> float:
        a = self.accelerator
        limit = self.config.clip_grad if self.config.clip_grad > 0 else math.inf
        norm = a.clip_grad_norm_(self._network.parameters(), limit)
        norm = float("nan") if norm is None else float(norm)
        if not math.isfinite(norm) and a.scaler is None:  # a scaler (fp16) skips such updates and lowers its scale
            raise NonFiniteError.of_gradient(self.update, self.config, self._kept())
        return norm

    def _kept(self) -> str:
        if self.folder is None or not (self.folder / "checkpoints").is_dir():
            return ""
        return "; the last checkpoint is kept"

    # ---------------------------------------------------------------------------------------------------------- records

    def run(self) -> Iterator[Record]:
        """Trains from `self.update` to the end; the last records are a checkpoint (with a folder) and a validation.

        Raises:
            NonFiniteError: if the loss or the gradient is not finite; nothing of that update is kept.
            UserError: if a checkpoint cannot be written.
        """
        start_trackers(self.accelerator, self.update)
        try:
            for record in self._records():
                if isinstance(record, Update | Validation):
                    self.accelerator.log(scalars(record), step=record.update)
                yield record
        finally:
            stop_trackers(self.accelerator)

    def _records(self) -> Iterator[Record]:
        config = self.config
        while self.update < config.updates:
            start = time.perf_counter()
            record = self._step()
            elapsed = time.perf_counter() - start
            self.seconds += elapsed
            self.watch.since = self.watch.since.counted(record.loss, elapsed, *self._seen)
            self._keep_averages()
            yield record
            last = self.update == config.updates
            if last or self.update % config.validate_every == 0:
                yield self.validate()
            if self.folder is not None and config.sample_every and (last or self.update % config.sample_every == 0):
                yield Sampled(self.update, self._draw(self.folder / "samples"))
            if self.folder is not None and (last or self.update % config.checkpoint_every == 0):
                yield Saved(self.update, self._save(self.folder / "checkpoints"))

    def validate(self) -> Validation:
        """Validates the averaged weights and, with a folder, adds a line to `metrics.jsonl`."""
        denoiser = self._as_denoiser(self._averaged())
        record = self.watch.validated(self.accelerator, denoiser, self.update, self.seconds, self.noise_scale)
        if self.folder is not None and self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record.record()) + "\n")
        return record

    def _draw(self, folder: Path) -> Path:
        """Draws a grid of samples from the averaged weights; the main process does, the others wait."""
        path = folder / f"update-{self.update:07d}.png"
        classes = None if self.classes is None else self.classes.count

        def draw() -> None:
            denoiser = self._as_denoiser(self._averaged())
            draw_picture(self.accelerator, denoiser, path, self.update, self.data.shape, self.config.seed, classes)

        written(self.accelerator, draw, path)
        return path

    def ema_network(self) -> nn.Module:
        """A copy of the network with the averaged weights, in evaluation mode, on the CPU: what a run gives."""
        return _copy(self._averaged()).eval()

    def _averaged(self) -> nn.Module:
        """The averaged weights, in evaluation mode; what is no weight (running statistics) as it is now."""
        self._ema.copy_to(self._average.parameters())
        now = self.accelerator.unwrap_model(self._network)
        for kept, value in zip(self._average.buffers(), now.buffers(), strict=True):
            kept.copy_(value)
        return self._average.eval()

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _identity(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that goes on from it."""
        config = dataclasses.asdict(self.config)
        for free in _FREE:
            del config[free]
        own = {} if self._structure is None else {"the network's structure": self._structure}
        return {"data": self.data.fingerprint, "schedule": self.schedule.fingerprint, **own, **config}

    def _parts(self) -> Parts:
        a = self.accelerator
        return Parts(a.unwrap_model(self._network), self._optimizer, self._scheduler, self._ema, a.scaler)

    def _save(self, folder: Path) -> Path:
        a = self.accelerator
        path = folder / f"update-{self.update:07d}"
        if a.is_main_process:
            state, tensors = capture(self._parts())
            state |= {
                "update": self.update,
                "identity": self._identity(),
                "seconds": self.seconds,
            }
            state["since"], validation = self.watch.state()
            own = {"times": self.times.state(), "spectrum": {} if self.spectrum is None else stored(self.spectrum)}
            own |= {"uncertainty": {} if self.uncertainty is None else dict(self.uncertainty.state_dict())}
            own |= {"averages": {} if self.averages is None else self.averages.state()}
            own |= {"validation": validation}
            own |= {"stream": self.plan.images.state() if isinstance(self.plan.images, Stream) else {}}
            own |= {"noise_scale": {} if self.noise_scale is None else self.noise_scale.state()}
            contents = tensors | own
        else:
            state, contents = {}, {}

        def write() -> None:
            checkpoints.save(folder, state, contents)
            checkpoints.prune(folder, self.config.keep_checkpoints)

        written(a, write, path)
        return path

    def _keep_averages(self) -> None:
        if self.averages is None or self.folder is None or not is_moment(self.update, self.config.updates):
            return
        folder, averages = self.folder / AVERAGES, self.averages
        written(self.accelerator, lambda: keep_averages(folder, averages), folder)

    def _resume(self) -> None:
        if self.folder is None:
            raise UserError("there is nothing to resume: no folder was given")
        kept = checkpoints.latest(self.folder / "checkpoints")
        if kept is None:
            self._truncate_records()
            return
        checkpoints.check_same(kept, self._identity(), dataclasses.asdict(TrainConfig()), self.folder)
        restore(self._parts(), kept.state, kept.tensors, self.accelerator.device)
        self.times = self.times.restored(kept.tensors.get("times", {})) if self.times.state() else self.times
        if self.uncertainty is not None:
            self.uncertainty.load_state_dict(kept.tensors["uncertainty"])
        if self.averages is not None:
            on_device = {k: v.to(self.accelerator.device) for k, v in kept.tensors["averages"].items()}
            self.averages = self.averages.restored(on_device)
        if isinstance(self.plan.images, Stream):
            self.plan.images = self.plan.images.restored(kept.tensors["stream"])
            if self.classes is not None:
                self.classes = dataclasses.replace(self.classes, stream=self.plan.images)
                self.batch = dataclasses.replace(self.batch, classes=self.classes)
        self.watch.restore(kept.state["since"], kept.tensors.get("validation", {}))
        if self.noise_scale is not None and "noise_scale" in kept.tensors:
            self.noise_scale = self.noise_scale.restored(kept.tensors["noise_scale"])
        if self.spectrum is not None:  # as it was: eigenvectors may differ between machines
            self.spectrum = restored(kept.tensors["spectrum"], self.spectrum)
        self.update, self.seconds = int(kept.state["update"]), float(kept.state["seconds"])
        self._truncate_records()

    def _truncate_records(self) -> None:
        """Drops the records and averages of updates that will be made again."""
        file = None if self.folder is None else self.folder / "metrics.jsonl"
        if file is None or not self.accelerator.is_main_process:
            return
        discard_after(file.with_name(AVERAGES), self.update)
        checkpoints.truncate(file, self.update)


def _copy(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).cpu().requires_grad_(False)
