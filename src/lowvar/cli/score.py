"""`lowvar estimate --statistic frechet|kernel|energy`: a score that is no mean, from independent blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowvar.cli.console import Console
from lowvar.cli.folders import new_folder
from lowvar.errors import UserError

if TYPE_CHECKING:
    import torch

    from lowvar.cli.estimate import Estimate
    from lowvar.cli.models import Model
    from lowvar.expect import Sampler

__all__ = ["SCORES", "check_score", "scored"]

SCORES = ("frechet", "kernel", "energy")
_BLOCKS = 32


def check_score(command: Estimate) -> None:
    """Refuses flags that a score cannot have.

    Raises:
        UserError: saying which.
    """
    name = command.statistic
    if command.tol is not None or command.budget is None:
        raise UserError(f"{name} is no mean and has no tolerance to stop at; give --budget in place of --tol")
    if command.data is None:
        raise UserError(f"{name} is a distance to data; give --data")
    if command.design not in ("auto", "independent"):
        raise UserError(f"--design is {command.design!r}; {name} is no mean and takes independent samples only")
    if command.against is not None or command.resume:
        raise UserError(f"{name} takes neither --against nor --resume; run each model by itself")


def scored(
    command: Estimate,
    model: Model,
    chain: Sampler,
    settings: dict[str, Any],
    begun: float,
    device: torch.device,
    console: Console,
) -> dict[str, Any]:
    """Runs the score and writes the run; the value is the one with the bias taken off.

    Raises:
        UserError: for data of another shape, or a budget below two samples a block.
    """
    from lowvar.cli.results import summarise, write_run
    from lowvar.data import load
    from lowvar.expect import score_estimate
    from lowvar.metrics import extractor_for
    from lowvar.process.noise import Independent

    assert command.budget is not None
    assert command.data is not None
    data = load(command.data)
    if tuple(data.shape) != tuple(model.shape):
        raise UserError(
            f"--data {data.name} has images {data.shape}, and the model makes {model.shape}; give reference images "
            "of the model's shape"
        )
    size = 2 * (command.budget // (2 * _BLOCKS * chain.nfe))
    if size < 2:
        raise UserError(
            f"--budget is {command.budget} evaluations; {command.statistic} takes {_BLOCKS} blocks of at least 2 "
            f"samples, {2 * _BLOCKS * chain.nfe} evaluations"
        )
    extractor = None if command.statistic == "energy" else extractor_for(data)
    reference = data.test.images(range(min(len(data.test), 4096)))
    with console.progress(_BLOCKS * size, f"scoring {command.statistic}") as bar:
        found = score_estimate(
            chain,
            reference,
            command.statistic,  # type: ignore[arg-type]
            features=None if extractor is None else extractor.features,
            blocks=_BLOCKS,
            block_size=size,
            noise=Independent(command.seed),
            progress=bar.update,
        )
    value, raw = found.corrected, found.at_n
    sentence = (
        f"{command.statistic} is no mean: {_BLOCKS} independent blocks, bias {found.declared_bias}, taken off by the "
        f"block jackknife ({raw.value:.4g} [{raw.low:.4g}, {raw.high:.4g}] at n = {found.samples} with it)"
    )
    figures = {"value": value.value, "low": value.low, "high": value.high, "se": value.se}
    figures |= {"half_width": (value.high - value.low) / 2, "nfe": found.nfe, "samples": found.samples}
    figures |= {"design": "independent", "vrf": 1.0, "vrf_low": 1.0, "vrf_high": 1.0, "nfe_independent": found.nfe}
    figures |= {"reached": True, "undercovers": found.undercovers, "shape": [], "tol": None}
    figures |= {"at_n": {"value": raw.value, "low": raw.low, "high": raw.high}, "bias": found.bias}
    decision = {"chosen": "independent", "sentence": sentence, "candidates": [], "pilot": 0}
    figures |= {"decision": decision, "scheduler": settings, "network": model.about}
    summary = summarise(command, command.seed, begun, device, statistic=command.statistic, **figures)
    with new_folder(command.out, overwrite=command.overwrite) as folder:
        write_run(folder, summary, records=[])
    console.result(
        f"{command.statistic} = {value.value:.4g} [{value.low:.4g}, {value.high:.4g}] for {found.nfe} evaluations"
    )
    console.result(sentence)
    if found.undercovers is not None:
        console.result(f"the interval may cover too little: {found.undercovers}")
    console.result(str(command.out / "report.html"))
    return summary
