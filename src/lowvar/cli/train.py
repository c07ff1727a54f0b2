"""`lowvar train`: trains a network on a data set; interrupted runs live in RUN.partial and go on with --resume."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvar.cli import ranks
from lowvar.cli.console import Console
from lowvar.cli.folders import kept, make_way, partial_of, publish
from lowvar.cli.options import Common, DataFlags, MaybeInt, MaybePath, MaybeText, at_least, choose_device
from lowvar.cli.stops import stop_word
from lowvar.errors import UserError

if TYPE_CHECKING:
    from lowvar.train.config import TrainConfig
    from lowvar.train.loop import Trainer

__all__ = ["Train", "about_schedule", "run_training", "save_trained", "weighting_figure"]

WEIGHTS = "network.safetensors"  # of a network that is no model of diffusers
_OF_DATA = ("data", "size", "channels")


@dataclass(frozen=True, kw_only=True)
class Train(DataFlags, Common):
    """Train a network, from scratch or from weights that are there.

    Writes a diffusers pipeline folder with the network's averaged weights (of a network that is no model of diffusers
    OUT/network.safetensors instead). Until then checkpoints are kept in
    OUT.partial, where the same command with --resume goes on to the same weights as an undisturbed run. Under torchrun
    the processes share every batch, and the first of them writes.
    """

    out: Path
    """folder to write"""
    config: MaybePath = None
    """YAML file of settings; flags given beside it win; a run's config.yaml is such a file"""
    updates: MaybeInt = None
    """optimiser updates; default: the config's"""
    batch_size: MaybeInt = None
    """samples an update; default: the config's"""
    seed: MaybeInt = None
    """of weights, data order, times and noise; default: the config's"""
    checkpoint_every: MaybeInt = None
    """updates between checkpoints; default: the config's"""
    process: MaybeText = None
    """what is trained: vp (a table of betas), edm or flow, each with its own times and weighting; default: the
    config's, or vp"""
    head: MaybeText = None
    """variance head: range, logvar, basis, lowrank or none; default: the config's"""
    rank: MaybeInt = None
    """directions of head lowrank, 0 to 16; default: the config's"""
    network: MaybeText = None
    """own network: a model or pipeline folder with a diffusers UNet2DModel or DiTTransformer2DModel, or
    module:function, which returns a torch.nn.Module called as network(x, timestep); default: by the config's size"""
    network_weights: MaybeText = None
    """of a folder: fresh (random) or kept, what training begins with; default: fresh"""
    variance_reduction: MaybeText = None
    """auto: the unbiased parts that measured best together; off: the plain recipe; default: the config's, or off"""
    strata: MaybeText = None
    """what every batch holds in the data's proportions: class, cluster:K (K clusters of the data, by k-means) or none;
    default: the config's, or none"""
    conditional: bool = False
    """condition the network on the data's classes, 10% of them dropped (condition_dropout in --config) for guidance"""
    from_profile: MaybePath = None
    """folder of a `lowvar profile`: what its verdict says of training is applied; the config and flags win"""
    profile_every: int = 0
    """updates between shares of the gradient's variance (in metrics of the trackers, and noted); 0: none. They take at
    most 2% of the run's time"""
    resume: bool = False
    """go on in OUT.partial; from the start if there is none"""

    def settings(self) -> TrainConfig:
        """The config file with the flags over it, and what a profile advises beneath it.

        Raises:
            UserError: for a file that cannot be read, an unknown key or a value out of range.
        """
        from lowvar.train.config import config_from

        values = {} if self.from_profile is None else _advised(self.from_profile)
        values |= {} if self.config is None else _read_yaml(self.config)
        given = ("updates", "batch_size", "seed", "checkpoint_every", "process", "head", "rank", "variance_reduction")
        given += ("strata",)
        values |= {name: value for name in given if (value := getattr(self, name)) is not None}
        values |= {"conditional": True} if self.conditional else {}
        own = {"source": self.network, "weights": self.network_weights}
        own = {name: value for name, value in own.items() if value is not None}
        network = values.get("network", {})
        if own and isinstance(network, dict):
            values["network"] = network | own
        return config_from(values)

    def run(self, console: Console) -> dict[str, Any]:
        """See the base class."""
        begun = time.perf_counter()
        partial = partial_of(self.out)
        at_least("--profile-every", self.profile_every, 0)
        ranks.join(self.device)
        ranks.main_first(lambda: make_way(self.out, overwrite=self.overwrite, resume=self.resume))
        config = self.settings()
        from lowvar.cli.results import about_data, summarise, write_run
        from lowvar.train.cautions import cautions
        from lowvar.train.loop import Trainer

        if self.from_profile is not None:
            said = ", ".join(f"{k}: {v}" for k, v in _advised(self.from_profile).items())
            console.note(f"from {self.from_profile}: {said or 'nothing to change'}")
        for sentence in cautions(config):
            console.note(f"warning: {sentence}")
        device = choose_device(self.device)
        data = self.load(config.seed)
        resolved = {"data": self.data, "size": self.size, "channels": self.channels, **dataclasses.asdict(config)}
        trainer = Trainer(data, config, partial, resume=self.resume, device=self.device)
        ranks.main_first(lambda: _begin(partial, resolved))
        try:
            last = run_training(trainer, partial, console, self.profile_every)
        except KeyboardInterrupt as stop:
            raise type(stop)(
                f"{stop_word(stop)} after {trainer.update} of {config.updates} updates; {kept(partial)}: "
                "give the same command with --resume to go on"
            ) from None
        summary = summarise(
            self,
            config.seed,
            begun,
            device,
            updates=trainer.update,
            loss=last["loss"],
            validation_loss=last["validation_loss"],
            low=last["low"],
            high=last["high"],
            training_seconds=round(trainer.seconds, 3),
            schedule=about_schedule(trainer),
            network=about_network(trainer),
            data=about_data(data),
        )
        summary["config"] = resolved

        def finish() -> None:
            if save_trained(trainer, partial) is None:
                console.note(_how_to_open(trainer, self.out))
            write_run(partial, summary, figures={"weighting": weighting_figure(trainer)})
            shutil.rmtree(partial / "checkpoints", ignore_errors=True)
            publish(partial, self.out)

        ranks.main_first(finish)
        console.result(f"validation loss {last['validation_loss']:.4f} after {trainer.update} updates")
        console.result(str(self.out / "report.html"))
        return summary


def _advised(folder: Path) -> dict[str, Any]:
    """Settings that a profile's verdict asks for."""
    from lowvar.cli.profile_summary import read_profile
    from lowvar.profile import applied

    return applied(read_profile(folder, "--from-profile").get("verdict") or [], "training")


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --config {file} ({getattr(error, 'strerror', None) or error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {file} is no YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {file} holds a {type(values).__name__}; give lines of the form `setting: value`")
    return {key: value for key, value in values.items() if key not in _OF_DATA}


def _begin(partial: Path, resolved: dict[str, Any]) -> None:
    import yaml

    from lowvar.cli.results import plain

    partial.mkdir(parents=True, exist_ok=True)
    (partial / "config.yaml").write_text(yaml.safe_dump(plain(resolved), sort_keys=False), encoding="utf-8")


def _how_to_open(trainer: Trainer, out: Path) -> str:
    """The sentence about a network that no pipeline folder can hold."""
    name = trainer.config.network.source or "your network"
    make = name.partition(":")[2] + "()" if ":" in name else name
    return (
        f"the network is no model of diffusers, so {out} is no pipeline folder: its averaged weights are in "
        f"{WEIGHTS}, and lowvar.pipelines.open_weights({str(out)!r}, {make}) gives the denoiser"
    )


def run_training(trainer: Trainer, folder: Path, console: Console, profile_every: int = 0) -> dict[str, Any]:
    """Runs a trainer to its end with a progress bar; the last line of its metrics.jsonl.

    Args:
        trainer: the run.
        folder: of it.
        console: for progress and notes.
        profile_every: updates between shares of the gradient's variance; 0: none.
    """
    from lowvar.profile.watching import SharesRecord
    from lowvar.report.nouns import nouns_of
    from lowvar.train.records import Update, Validation

    warned = False
    many = nouns_of(trainer.data.shape, getattr(trainer.data, "scaling_factor", None)).many
    with console.progress(trainer.config.updates, "training", unit="update") as bar:
        bar.update(trainer.update)
        for record in _records(trainer, profile_every):
            if isinstance(record, Update):
                bar.update()
            elif isinstance(record, SharesRecord):
                console.note(_shares(record))
            elif isinstance(record, Validation):
                if not warned and record.target is not None and record.target.warning is not None:
                    console.note(f"warning: {record.target.warning}")
                    warned = True
                speed = f"{record.images_per_second:,.0f} {many}/s"
                bar.set_postfix_str(f" validation loss {record.validation.loss:.4f}, {speed}", refresh=False)
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    last = json.loads(lines[-1]) if lines else {}
    return last if last.get("update") == trainer.update else trainer.validate().record()


def _records(trainer: Trainer, profile_every: int) -> Iterator[Any]:
    """The run's records, with shares of the variance between them where these are asked for."""
    if not profile_every:
        return trainer.run()
    from lowvar.profile import watched

    return watched(trainer, profile_every)


def _shares(record: Any) -> str:
    """A line about shares of the variance."""
    found = sorted(record.sources.shares.items(), key=lambda item: -item[1].value)[:3]
    most = ", ".join(f"{u.replace(',', ' x ')} {i.value:.2f} ({i.low:.2f} to {i.high:.2f})" for u, i in found)
    return f"update {record.update}: of the gradient's variance {most}; it took {100 * record.share:.1f}% of the run"


def about_schedule(trainer: Trainer) -> str:
    """The noise schedule in a few words, for a summary."""
    config = trainer.config
    if config.process == "vp":
        return config.beta_schedule
    return f"edm, sigma_data {trainer.sigma_data:g}" if config.process == "edm" else f"flow, shift {config.shift:g}"


def about_network(trainer: Trainer) -> dict[str, Any]:
    """What stands in a summary about the trained network."""
    network = trainer.ema_network()
    parameters = sum(p.numel() for p in network.parameters())
    return {"name": type(network).__name__, "parameters": parameters, "prediction": trainer.config.prediction}


def weighting_figure(trainer: Trainer) -> dict[str, Any] | None:
    """What the run's objective weighs noise levels with, and the other weightings, for the report."""
    import torch

    from lowvar.train.uncertainty import weighting_curves

    config = trainer.config
    if config.weighting == "none":
        return None
    logsnr = torch.linspace(-8, 8, 65, dtype=torch.float64)
    curves = weighting_curves(config.prediction, logsnr, uncertainty=trainer.uncertainty, sigma_data=trainer.sigma_data)
    return {
        "chosen": config.weighting,
        "logsnr": logsnr,
        "relative": {curve.name: curve.relative for curve in curves},
        "labels": {curve.name: curve.label for curve in curves},
    }


def save_trained(trainer: Trainer, folder: Path) -> Any:
    """Writes the averaged network as a pipeline with our scheduler; the pipeline.

    Of a network that is no model of diffusers the weights and the scheduler are written, and None is returned.
    """
    from diffusers import DDPMPipeline

    from lowvar.models import null_class
    from lowvar.pipelines import ClassConditionalPipeline, ImagePipeline, LatentPipeline, TablePipeline
    from lowvar.schedulers import ReverseVarianceScheduler
    from lowvar.train.own_networks import is_storable
    from lowvar.train.processes import saved_fields

    config = trainer.config
    factor: float | None = getattr(trainer.data, "scaling_factor", None)
    scheduler = ReverseVarianceScheduler(
        **saved_fields(config, trainer.schedule, trainer.sigma_data),
        clip_sample=factor is None,
        head=config.network_head,
        spectrum=trainer.spectrum,
    )
    network: Any = trainer.ema_network()
    columns = getattr(trainer.data, "columns", None)
    if not is_storable(network):
        _save_weights(network, scheduler, folder, columns)
        return None
    if columns is not None:
        pipeline: Any = TablePipeline(network, scheduler, columns.config())
    elif factor is not None:
        pipeline = LatentPipeline(network, scheduler, factor, _class_names(trainer))
    elif trainer.classes is not None:
        pipeline = ClassConditionalPipeline(network, scheduler, _class_names(trainer))
    elif null_class(network) is not None:  # trained on its null class alone
        pipeline = ClassConditionalPipeline(network, scheduler, [])
    elif config.process == "edm":  # diffusers' DDPMPipeline neither scales the start nor what the network is given
        pipeline = ImagePipeline(network, scheduler)
    else:
        pipeline = DDPMPipeline(network, scheduler)  # type: ignore[arg-type]
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    return pipeline


def _class_names(trainer: Trainer) -> list[str] | None:
    """Names of the classes of a conditional run; their numbers where they have no names."""
    if trainer.classes is None:
        return None
    return list(getattr(trainer.data, "classes", ()) or map(str, range(trainer.classes.count)))


def _save_weights(network: Any, scheduler: Any, folder: Path, columns: Any) -> None:
    """Weights and noise schedule of a network that no pipeline folder can hold, and the columns of a table."""
    from safetensors.torch import save_model

    from lowvar.cli.results import write_json

    save_model(network, str(folder / WEIGHTS))
    scheduler.save_pretrained(str(folder / "scheduler"))
    if columns is not None:
        write_json(folder / "columns.json", columns.config())
