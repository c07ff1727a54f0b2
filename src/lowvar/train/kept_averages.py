"""Power averages of a run on disk, and an average of any length from them.

    FOLDER/averages/update-0000500.safetensors    the tracked averages after 500 updates, keys `0.NAME`, `1.NAME`;
                                                  metadata: their exponents and the number of updates

A file is written at about 32 moments of a run, evenly spaced, and at its end; it is there entirely or not at all. Those
after the checkpoint that an interrupted run goes on from are removed and made again.

After training, an average of relative length sigma_rel (see `averaging`) is

    pipeline.unet.load_state_dict(reconstruct_average(RUN, sigma_rel=0.08))

with nothing trained again. It is exact as far as the kept profiles span the wanted one; the more moments, the better.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowvar.errors import UserError
from lowvar.train.averaging import PowerAverages, Snapshot, gamma_of, reconstruct

__all__ = ["AVERAGES", "discard_after", "is_moment", "keep_averages", "kept_snapshots", "reconstruct_average"]

AVERAGES = "averages"
_MOMENTS = 32
_NAME = re.compile(r"update-(\d{7,})\.safetensors$")
_ROUGH = 0.1


def _files(folder: Path) -> list[tuple[int, Path]]:
    found = [(_NAME.match(path.name), path) for path in folder.glob("update-*.safetensors")]
    return sorted((int(match[1]), path) for match, path in found if match)


def is_moment(update: int, updates: int) -> bool:
    """Whether averages are kept after `update` of `updates` updates.

    Example:
        >>> [u for u in range(1, 101) if is_moment(u, 100)][-4:]
        [88, 92, 96, 100]
    """
    return update == updates or update % math.ceil(updates / _MOMENTS) == 0


def keep_averages(folder: Path, averages: PowerAverages) -> None:
    """Writes the averages as they are now under `folder`.

    Args:
        folder: where they live.
        averages: after one update at least.

    Raises:
        UserError: if they cannot be written.
    """
    final = folder / f"update-{averages.updates:07d}.safetensors"
    partial = final.with_suffix(".tmp")
    tensors = {k: v.detach().cpu().contiguous() for k, v in averages.state().items() if k != "updates"}
    about = {"gammas": json.dumps(averages.gammas), "updates": str(averages.updates)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata=about)
        partial.replace(final)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write the averages {final} ({reason}); make room, then go on with --resume") from None


def discard_after(folder: Path, updates: int) -> None:
    """Removes the averages of updates that will be made again."""
    for later, path in _files(folder):
        if later > updates:
            path.unlink(missing_ok=True)


def _read(path: Path) -> Iterator[Snapshot]:
    """The snapshots of a file, without their weights."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
        gammas, updates = json.loads(about["gammas"]), int(about["updates"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}); remove it to do without it") from None
    for gamma in gammas:
        yield Snapshot(float(gamma), updates, {})


def kept_snapshots(run: Path | str) -> list[tuple[Path, int, Snapshot]]:
    """What a run has kept, oldest first: file, number of the average in it, and the snapshot without its weights.

    Raises:
        UserError: if there is none, or a file is damaged.
    """
    folder = Path(run) / AVERAGES
    found = [(path, i, s) for _, path in _files(folder) for i, s in enumerate(_read(path))]
    if not found:
        raise UserError(f"{run} has kept no averages; train with posthoc_ema: true in the config")
    return found


def reconstruct_average(run: Path | str, sigma_rel: float, updates: int | None = None) -> dict[str, Tensor]:
    """The weights' average of any length, from what a run trained with `posthoc_ema` has kept.

    Args:
        run: folder of a run, finished or not.
        sigma_rel: length relative to the training time, above 0 and at most 12^-1/2 = 0.2887 (the plain mean);
            Karras et al. find 0.05 to 0.15 best.
        updates: at which update; default: the newest kept.

    Returns:
        Weights by name, on the CPU, for `load_state_dict` of the run's network (`pipeline.unet`, a table's
        `pipeline.network`).

    Raises:
        UserError: if the run has kept none, none is old enough, or sigma_rel is out of range.

    Warns:
        UserWarning: if the kept averages meet the wanted profile to no better than a tenth.
    """
    kept = kept_snapshots(run)
    try:
        gamma_of(sigma_rel)
        coefficients, error = reconstruct([s for _, _, s in kept], sigma_rel, updates)
    except ValueError as problem:
        raise UserError(str(problem)) from None
    if error > _ROUGH:
        warnings.warn(
            f"the average of length {sigma_rel:g} is met to {error:.0%} only by the {len(kept)} averages kept in "
            f"{run}; lengths between 0.03 and 0.2 are met better",
            stacklevel=2,
        )
    used = [(x, path, i, s) for x, (path, i, s) in zip(coefficients.tolist(), kept, strict=True) if x]
    total: dict[str, Tensor] = {}
    dtypes = {}
    for x, path, i, _ in used:  # one file at a time: the weights of all would not fit
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (no mapping)
                number, _, name = key.partition(".")
                if int(number) != i:
                    continue
                value = file.get_tensor(key)
                dtypes[name] = value.dtype
                part = x * value.double()
                total[name] = total[name] + part if name in total else part
    return {name: value.to(dtypes[name]) for name, value in total.items()}
