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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from lowvar.errors import UserError
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.train import checkpoints
from lowvar.train.conditional import classes_of, of_classes
from lowvar.train.config import TrainConfig, make_objective, make_plan, make_references, make_schedule, make_times
from lowvar.train.draws import Draws, ImageSource
from lowvar.train.networks import build_network
from lowvar.train.objectives import Losses, Objective
from lowvar.train.processes import plain_times, resolved_sigma_data
from lowvar.train.records import Record, Saved, Update, Validation
from lowvar.train.snapshot import Parts, capture, restore
from lowvar.train.spectrum import make_spectrum, restored, stored
from lowvar.train.targets import PlainTarget
from lowvar.train.validation import BINS, ValidationSet, logsnr_edges

__all__ = ["NonFiniteError", "Trainer", "TrainingData"]

_ALL = slice(None)


class TrainingData(Protocol):
    """What training needs of a data set: `lowvar.data.Data` has it."""

    @property
    def train(self) -> ImageSource: ...
    @property
    def calibration(self) -> ImageSource: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def levels(self) -> int | None: ...
    @property
    def fingerprint(self) -> str: ...


class NonFiniteError(UserError):
    """The loss or its gradient stopped being finite; the sentence names the update and the noise levels."""


@dataclass(frozen=True)
class _Since:
    """What happened since the last validation."""

    loss: float = 0.0
    updates: int = 0
    seconds: float = 0.0


class Trainer:
    """A training run: `run()` yields its records, `ema_network()` is what comes out.

    Args:
        data: splits `train` and `calibration`, with shape, levels and fingerprint.
        config: settings.
        folder: for `metrics.jsonl` and `checkpoints/`; None keeps nothing.
        network: an own network, called as diffusers' UNet2DModel is; default: built from the config.
        resume: go on from the newest checkpoint in `folder` (from the start if there is none yet).
        device: "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        UserError: if the data do not fit the network, the batch does not divide among the processes, or a checkpoint
            belongs to other settings or data.

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
        from accelerate import Accelerator
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("device is cuda, but no CUDA device is there; give auto or cpu")
        self.data, self.config = data, config
        self.folder = None if folder is None else Path(folder)
        cpu = device == "cpu" or not torch.cuda.is_available()  # said outright: else processes on CPUs do not meet
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=cpu)
        parts = self.accelerator.num_processes
        if config.batch_size % parts:
            raise UserError(
                f"batch_size {config.batch_size} does not divide among {parts} processes; give a multiple of {parts}"
            )
        self.schedule = make_schedule(config)
        self.sigma_data = resolved_sigma_data(config, data.train)
        self.objective: Objective = make_objective(config, data.levels, self.sigma_data)
        self.times = make_times(config, self.schedule, self.sigma_data)
        self.plan = make_plan(config, data.train, self.schedule)
        self.references = make_references(config, data.train)
        size = 1 if self.plan.pairing.splits else self.plan.pairing.size
        if config.batch_size % (parts * size):
            raise UserError(
                f"batch_size {config.batch_size} among {parts} processes would split the groups of {size} samples of "
                f"pairing {config.pairing}; give a multiple of {parts * size}"
            )
        self.validation = ValidationSet(
            data.calibration,
            self.schedule,
            plain_times(config, self.schedule),
            prediction=config.prediction,
            weighting=self.objective.weighting,
            sigma_data=self.sigma_data,
        )
        self.spectrum = None if config.head_basis is None else make_spectrum(data, config.head_basis)
        if self.spectrum is not None and parts > 1:  # eigenvectors may differ between machines
            self.spectrum = restored(_of_the_main_process(self.accelerator, stored(self.spectrum)), self.spectrum)
        self.classes = classes_of(data, config.condition_dropout, config.seed) if config.conditional else None
        if network is None:
            classes = None if self.classes is None else self.classes.count
            network = build_network(
                data.shape, config.network, config.network_head, config.seed, config.head_rank, classes
            )
        self._average = _copy(network)
        optimizer = torch.optim.AdamW(network.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
        self._scheduler = get_scheduler(
            config.lr_schedule, optimizer, num_warmup_steps=config.warmup, num_training_steps=config.updates
        )
        prepared: Any = self.accelerator.prepare(network, optimizer)
        self._network, self._optimizer = prepared
        self._average.to(self.accelerator.device)
        self._ema = EMAModel(self._network.parameters(), decay=config.ema, foreach=True)
        self._denoiser = self._as_denoiser(self._network)
        self._drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in network.modules())
        self.update = 0
        self.seconds = 0.0
        self._since = _Since()
        if resume:
            self._resume()
        elif self.folder is not None and checkpoints.latest(self.folder / "checkpoints") is not None:
            raise UserError(f"{self.folder} holds checkpoints of a run; go on with --resume or choose another folder")

    # ------------------------------------------------------------------------------------------------------- one update

    def _as_denoiser(self, network: nn.Module) -> NetworkDenoiser:
        c = self.config
        return NetworkDenoiser(
            network, self.schedule, c.prediction, c.network_head, sigma_data=self.sigma_data, spectrum=self.spectrum
        )

    def _step(self) -> Update:
        a = self.accelerator
        self._network.train()
        draws = self.plan.draws(self.update, self.times, a.process_index, a.num_processes, a.device)
        target = PlainTarget() if self.references is None else self.references.target(self.update, a.device)
        denoiser = self._of_classes(self._denoiser, draws)
        with self._seeded(a.process_index):
            losses = self.objective.losses(denoiser, draws.x0, draws.eps, draws.level, target)
        probe = self._probe(draws) if self.times.learns_from == "squared gradient norms" else None
        loss = (draws.weight.to(losses.loss) * losses.loss).mean()
        mean = float(_summed(a, loss.detach().double())) / a.num_processes
        if not math.isfinite(mean):
            raise NonFiniteError(self._diagnosis(draws, losses))
        a.backward(loss)
        norm = self._clip()
        lr = float(self._scheduler.get_last_lr()[0])
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._scheduler.step()
        self._ema.step(self._network.parameters())
        if probe is not None:
            self.times = self.times.updated(*probe) if bool(torch.isfinite(probe[1]).all()) else self.times
        elif self.times.state():
            self.times = self.times.updated(*_gathered(a, draws.bin, losses.loss))
        self.update += 1
        return Update(self.update, mean, norm, lr)

    @contextmanager
    def _seeded(self, number: int) -> Iterator[None]:
        """Within: dropout, which draws from torch's generators, is a function of the update and of `number`."""
        if not self._drops:
            yield
            return
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(hash((self.config.seed, self.update, number)))
            yield

    def _of_classes(self, denoiser: NetworkDenoiser, draws: Draws, rows: slice = _ALL) -> NetworkDenoiser:
        """The denoiser of the draws' classes, some of them dropped; as it is without classes."""
        if self.classes is None:
            return denoiser
        labels = self.classes.labels(draws.number[rows], draws.image[rows])
        return of_classes(denoiser, labels.to(self.accelerator.device))

    def _probe(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Bin and squared gradient norm of one sample's unweighted loss, sample u mod B of the batch."""
        a, count = self.accelerator, len(draws.number)
        place = self.update % self.config.batch_size - a.process_index * count
        found = torch.zeros(2, dtype=torch.float64)
        if 0 <= place < count:
            one = slice(place, place + 1)
            network = a.unwrap_model(self._network)  # without the hooks that would average gradients
            denoiser = self._of_classes(self._as_denoiser(network), draws, one)
            with self._seeded(-1), a.autocast():
                losses = self.objective.losses(denoiser, draws.x0[one], draws.eps[one], draws.level[one])
            weights = [p for p in network.parameters() if p.requires_grad]
            gradient = torch.autograd.grad(losses.loss.sum(), weights, allow_unused=True)
            square = sum(float((g.double() ** 2).sum()) for g in gradient if g is not None)
            found = torch.tensor([float(draws.bin[place]), square], dtype=torch.float64)
        found = _summed(a, found)
        return found[:1].long(), found[1:]

    def _clip(self) -> float:
        a = self.accelerator
        limit = self.config.clip_grad if self.config.clip_grad > 0 else math.inf
        norm = a.clip_grad_norm_(self._network.parameters(), limit)
        norm = float("nan") if norm is None else float(norm)
        if not math.isfinite(norm) and a.scaler is None:  # a scaler (fp16) skips such updates and lowers its scale
            raise NonFiniteError(
                f"the gradient is not finite at update {self.update + 1}; lower lr (now {self.config.lr:g}) or "
                f"clip_grad (now {self.config.clip_grad:g}), or train with mixed_precision no{self._kept()}"
            )
        return norm

    def _kept(self) -> str:
        if self.folder is None or not (self.folder / "checkpoints").is_dir():
            return ""
        return "; the last checkpoint is kept"

    def _diagnosis(self, draws: Draws, losses: Losses) -> str:
        bad = ~torch.isfinite(losses.loss.detach()).cpu()
        least = self.validation.times.t_min
        edges = logsnr_edges(self.schedule, least)
        place = (draws.level.t.cpu()[bad] - 1e-9 - least) / (1 - least)
        numbers = sorted({min(max(int(v * BINS), 0), BINS - 1) for v in place.tolist()})
        where = ", ".join(f"{edges[k + 1]:.2g} to {edges[k]:.2g}" for k in numbers) or "of another process"
        return (
            f"the loss is not finite at update {self.update + 1} in the logsnr bin {where} ({int(bad.sum())} of "
            f"{len(bad)} samples); lower lr (now {self.config.lr:g}) or train with mixed_precision no{self._kept()}"
        )

    # ---------------------------------------------------------------------------------------------------------- records

    def run(self) -> Iterator[Record]:
        """Trains from `self.update` to the end; the last records are a checkpoint (with a folder) and a validation.

        Raises:
            NonFiniteError: if the loss or the gradient is not finite; nothing of that update is kept.
            UserError: if a checkpoint cannot be written.
        """
        config = self.config
        while self.update < config.updates:
            start = time.perf_counter()
            record = self._step()
            elapsed = time.perf_counter() - start
            self.seconds += elapsed
            self._since = _Since(self._since.loss + record.loss, self._since.updates + 1, self._since.seconds + elapsed)
            yield record
            last = self.update == config.updates
            if last or self.update % config.validate_every == 0:
                yield self.validate()
            if self.folder is not None and (last or self.update % config.checkpoint_every == 0):
                yield Saved(self.update, self._save(self.folder / "checkpoints"))

    def validate(self) -> Validation:
        """Validates the averaged weights and, with a folder, adds a line to `metrics.jsonl`."""
        a, since = self.accelerator, self._since
        self._ema.copy_to(self._average.parameters())
        self._average.eval()
        with a.autocast():
            values = self.validation.values(
                self._as_denoiser(self._average),
                self.objective,
                a.process_index,
                a.num_processes,
                a.device,
                None if self.classes is None else self.classes.calibration,
            )
        values = _summed(a, values)
        rate = since.updates * self.config.batch_size / since.seconds if since.seconds else math.nan
        record = Validation(
            self.update,
            since.loss / since.updates if since.updates else math.nan,
            self.validation.summary(values, self.objective.variance is not None),
            self.seconds,
            rate,
        )
        self._since = _Since()
        if self.folder is not None and a.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record.record()) + "\n")
        return record

    def ema_network(self) -> nn.Module:
        """A copy of the network with the averaged weights, in evaluation mode, on the CPU: what a run gives."""
        self._ema.copy_to(self._average.parameters())
        return _copy(self._average).eval()

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _identity(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that goes on from it."""
        config = dataclasses.asdict(self.config)
        for free in ("validate_every", "checkpoint_every", "keep_checkpoints"):
            del config[free]
        return {"data": self.data.fingerprint, "schedule": self.schedule.fingerprint, **config}

    def _parts(self) -> Parts:
        a = self.accelerator
        return Parts(a.unwrap_model(self._network), self._optimizer, self._scheduler, self._ema, a.scaler)

    def _save(self, folder: Path) -> Path:
        a = self.accelerator
        path = folder / f"update-{self.update:07d}"
        failure: UserError | None = None
        if a.is_main_process:
            state, tensors = capture(self._parts())
            state |= {
                "update": self.update,
                "identity": self._identity(),
                "seconds": self.seconds,
                "since": dataclasses.astuple(self._since),
            }
            own = {"times": self.times.state(), "spectrum": {} if self.spectrum is None else stored(self.spectrum)}
            try:
                path = checkpoints.save(folder, state, tensors | own)
                checkpoints.prune(folder, self.config.keep_checkpoints)
            except UserError as error:
                failure = error
        if a.num_processes > 1:  # the others wait, and stop where it failed
            failed = bool(_summed(a, torch.tensor(float(failure is not None))))
            failure = failure or (UserError(f"the main process could not write {path}") if failed else None)
        if failure is not None:
            raise failure
        return path

    def _resume(self) -> None:
        if self.folder is None:
            raise UserError("there is nothing to resume: no folder was given")
        kept = checkpoints.latest(self.folder / "checkpoints")
        if kept is None:
            self._truncate_metrics()
            return
        own = json.loads(json.dumps(self._identity()))
        defaults = json.loads(json.dumps(dataclasses.asdict(TrainConfig())))  # of settings later than the checkpoint
        saved = {k: v for k, v in defaults.items() if k in own} | kept.state["identity"]
        other = sorted(k for k in own.keys() | saved.keys() if own.get(k) != saved.get(k))
        if other:
            key = other[0]
            raise UserError(
                f"the checkpoint in {self.folder} was made with {key} {saved.get(key)!r}, now it is {own.get(key)!r}; "
                "resume with the same settings and data, or train into another folder"
            )
        restore(self._parts(), kept.state, kept.tensors, self.accelerator.device)
        self.times = self.times.restored(kept.tensors.get("times", {})) if self.times.state() else self.times
        if self.spectrum is not None:  # as it was: eigenvectors may differ between machines
            self.spectrum = restored(kept.tensors["spectrum"], self.spectrum)
            self._denoiser = self._as_denoiser(self._network)
        self.update, self.seconds = int(kept.state["update"]), float(kept.state["seconds"])
        self._since = _Since(*kept.state["since"])
        self._truncate_metrics()

    def _truncate_metrics(self) -> None:
        """Drops the records of updates that will be made again."""
        file = None if self.folder is None else self.folder / "metrics.jsonl"
        if file is None or not file.exists() or not self.accelerator.is_main_process:
            return
        lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if json.loads(line)["update"] <= self.update]
        partial = file.with_suffix(".tmp")
        partial.write_text("".join(kept))
        partial.replace(file)


def _copy(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).cpu().requires_grad_(False)


def _summed(accelerator: Any, values: Tensor) -> Tensor:
    """The sum over processes, on the CPU."""
    if accelerator.num_processes == 1:
        return values.cpu()
    return accelerator.reduce(values.to(accelerator.device), "sum").cpu()


def _of_the_main_process(accelerator: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The main process's values of tensors that all processes have, on the CPU."""
    from accelerate.utils import broadcast

    return {k: cast("Tensor", broadcast(v.to(accelerator.device))).cpu() for k, v in tensors.items()}


def _gathered(accelerator: Any, bins: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Bins and losses of all processes, in the order of the sample numbers."""
    if accelerator.num_processes == 1:
        return bins, losses
    return accelerator.gather(bins.to(accelerator.device)), accelerator.gather(losses.detach())
