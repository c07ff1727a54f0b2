"""Tables by class of a conditional model, guided or not, as `lowvar calibrate --by-class` measures them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowvar.errors import UserError

if TYPE_CHECKING:
    import torch

    from lowvar.calibrate import Calibration
    from lowvar.cli.console import Console
    from lowvar.cli.models import Model
    from lowvar.data import Data

__all__ = ["calibrate_by_class", "other_guidance", "require_classes"]


def require_classes(model: Model, data: Data, flag: str = "--by-class") -> None:
    """Refuses a model or data without classes, or with other ones.

    Raises:
        UserError: saying which.
    """
    if not model.classes:
        raise UserError(f"{flag} is of models with classes, and this one has none; train one with --conditional")
    if data.calibration.labels is None:
        raise UserError(f"{flag} needs data with labels, and these have none; give data with classes")
    named = tuple(data.classes if data.columns is None else data.columns.classes)
    names = named or tuple(str(k) for k in range(int(data.calibration.labels.max()) + 1))
    if (named and named != model.classes) or len(names) > len(model.classes):
        raise UserError(
            f"the data's classes are {_some(names)}, and the model's are {_some(model.classes)}; give the data that it "
            "was trained on"
        )


def other_guidance(model: Model, label: str | None, guidance: float) -> str | None:
    """What to say where a class is sampled with tables of all classes, because its own are of another guidance."""
    calibration = model.calibration
    if label is None or calibration is None or not calibration.conditional:
        return None  # tables of one class have no others beside them
    return (
        f"tables by class were calibrated with guidance {calibration.guidance:g}, not {guidance:g}: that of all "
        "classes is used; `lowvar calibrate --by-class --guidance` makes others"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", .. ({len(names)})" if len(names) > 4 else "")


def calibrate_by_class(
    model: Model,
    calibration: Calibration,
    data: Data,
    *,
    guidance: float,
    most: int,
    replicates: int,
    seed: int,
    batch_size: int,
    device: torch.device,
    console: Console,
) -> tuple[Calibration, dict[str, Any]]:
    """The calibration with tables of every class, and what stands in the summary.

    Each class is measured on the denoiser that samples it, under guidance where it will be: a guided mean is no
    posterior mean, and the covariance of neither branch belongs to it.

    Args:
        model: with classes.
        calibration: over all classes.
        data: with labels; the first `most` images of the calibration split are used.
        guidance: scale of classifier-free guidance.
        most, replicates, seed: images, noises an image and level, of the noise.
        batch_size, device: of the network's evaluations.
        console: for progress and notes.
    """
    import torch

    from lowvar.calibrate import calibrate_classes
    from lowvar.pipelines import denoiser_of
    from lowvar.process.noise import Independent

    labels = data.calibration.labels
    assert labels is not None, "require_classes refuses data without labels"
    labels = labels[:most]
    count = len(model.classes)
    with console.progress(len(labels) * len(calibration.logsnr) * replicates, "calibrating by class") as bar:

        def batches(label: int) -> Any:
            for batch in data.calibration.batches(batch_size, torch.nonzero(labels == label)[:, 0]):
                yield batch.to(device)
                bar.update(len(batch) * len(calibration.logsnr) * replicates)

        tables = calibrate_classes(
            lambda label: denoiser_of(model.pipeline, class_labels=label, guidance=guidance),
            batches,
            count,
            calibration,
            Independent(seed + 1),
            replicates,
        )
    images = labels.bincount(minlength=count).tolist()
    about = {
        "guidance": guidance,
        "classes": list(model.classes),
        "images": images,
        "variance": [table.variance.tolist() for table in tables["isotropic"].tables],
    }
    few = [name for name, n in zip(model.classes, images, strict=True) if n < 2]
    if few:
        console.note(f"too few images to measure, so with the table of all classes: {', '.join(few)}")
    console.result(f"tables of {count} classes, guidance {guidance:g}")
    return replace(calibration, conditional=tables, guidance=guidance), about
