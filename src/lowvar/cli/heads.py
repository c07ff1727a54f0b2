"""Covariance heads as `lowvar calibrate --head` makes them: checked, then learned one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowvar.cli.options import parse_names
from lowvar.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lowvar.calibrate import Calibration
    from lowvar.cli.console import Console
    from lowvar.cli.models import Model
    from lowvar.data import Data

__all__ = ["learn_heads", "parse_heads", "require_heads"]

_ROUNDS = 8
_LEAST = 6  # images a head needs


def parse_heads(text: str, rank: int) -> list[str]:
    """Names of heads separated by commas.

    Args:
        text: the names.
        rank: directions of lowrank.

    Raises:
        UserError: for an unknown name, or a rank that is not allowed.

    Example:
        >>> parse_heads("npr,lowrank", 4)
        ['npr', 'lowrank']
    """
    from lowvar.calibrate import HEADS

    names, known = parse_names("--head", text), (*HEADS, "convert")
    for name in names:
        if name not in known:
            raise UserError(f"--head is {name!r}; allowed: {', '.join(known)}")
    if "lowrank" in names and not 0 <= rank <= 16:
        raise UserError(f"--rank is {rank}; allowed: 0 to 16")
    return names


def require_heads(heads: Sequence[str], model: Model, data: Data, found: int) -> None:
    """Refuses heads that this model or so many images or rows cannot have, before anything is computed.

    Raises:
        UserError: saying which.
    """
    if "convert" in heads and model.denoiser.head != "range":
        raise UserError("--head convert reads a network's learned-range head, and this network has none")
    if heads and found < _LEAST:
        from lowvar.report.nouns import nouns_of

        many = nouns_of(data.shape, data.scaling_factor).many
        raise UserError(f"a head needs at least {_LEAST} calibration {many} and there are {found}; raise --n")


def learn_heads(
    heads: Sequence[str],
    model: Model,
    calibration: Calibration,
    images: Tensor,
    *,
    basis: str,
    rank: int,
    draws: int,
    seed: int,
    batch_size: int,
    console: Console,
) -> tuple[Calibration, dict[str, Any]]:
    """The calibration with these heads, and what each gained.

    Args:
        heads: names.
        model: the model.
        calibration: of its network.
        images: to learn from, where the network is.
        basis: coordinates of the heads; auto: those of the twin.
        rank: directions of lowrank.
        draws: noisy images a head.
        seed: of the noise.
        batch_size: images a network call.
        console: for progress and results.
    """
    from lowvar.calibrate import FitConfig, add_head, convert
    from lowvar.process.noise import Independent

    basis = calibration.twin.basis.name if basis == "auto" else basis
    config = FitConfig(rounds=_ROUNDS, pool=max(1, draws // _ROUNDS), chunk=batch_size)
    found: dict[str, Any] = {}
    for k, name in enumerate(heads):
        noise = Independent(seed + 100 + k)
        if name == "convert":
            table = calibration.table("pixel")
            converted, report = convert(model.denoiser, table, images, noise, chunk=batch_size)
            calibration = dataclasses.replace(calibration, converted=converted)
            about: dict[str, Any] = {"basis": "pixel"}
        else:
            with console.progress(_ROUNDS, f"training {name}") as bar:
                calibration, report = add_head(
                    calibration,
                    model.denoiser,
                    images,
                    name,
                    noise,
                    basis=basis,
                    rank=rank,
                    config=config,
                    progress=lambda _, bar=bar: bar.update(),
                )
            about = {"basis": basis, **({"rank": rank} if name == "lowrank" else {})}
        found[name] = about | {"note": str(report)} | vars(report)
        console.result(f"{name}: {report}")
    return calibration, found
