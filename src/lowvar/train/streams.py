r"""Training on a stream: which parts of training need a data set that can be looked into, and what stands in for it.

Draw plans take the image of a sample from place floor(i / m) of the stream (`lowvar.data.stream`; m samples share an
image) instead of from a permutation; pairings, times, stratification and couplings act on what was drawn, and stay as
they are; the class of a conditional run comes with the item. What refers to images by number over all data cannot be
had, and is refused: the stable target's references and strata. Figures of the data that training needs (sigma_data, a
head's spectrum, the bounds of the optimal loss) are those of the first 1,024 places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowvar.data.stream import Stream
from lowvar.errors import UserError

if TYPE_CHECKING:
    from lowvar.train.config import TrainConfig
    from lowvar.train.draws import ImageSource

__all__ = ["Known", "check_stream", "known"]


@dataclass(frozen=True)
class Known:
    """What can be looked into of a data set, as training data.

    Attributes:
        train: the training split, or the first places of a stream.
        calibration, shape, levels, fingerprint: of the data.
    """

    train: ImageSource
    calibration: ImageSource
    shape: tuple[int, ...]
    levels: int | None
    fingerprint: str


def known(data: Any) -> Known:
    """The data with the first places in the place of a stream."""
    train = data.train.first if isinstance(data.train, Stream) else data.train
    return Known(train, data.calibration, tuple(data.shape), data.levels, data.fingerprint)


def check_stream(config: TrainConfig) -> None:
    """Refuses what training on a stream cannot have.

    Raises:
        UserError: one sentence.

    Example:
        >>> from lowvar.train import TrainConfig
        >>> try:
        ...     check_stream(TrainConfig(target="stable"))
        ... except UserError as error:
        ...     print(error)
        target is stable, which refers to images of the whole data set, and the data are a stream; give target plain, \
or data that can be looked into by number (a folder, a .npy file)
    """
    needs = {
        "target": (config.target == "stable", "refers to images of", "plain"),
        "strata": (config.strata != "none", "sorts the images of", "none"),
    }
    for name, (asked, does, instead) in needs.items():
        if asked:
            value = str(getattr(config, name)).lower()
            raise UserError(
                f"{name} is {value}, which {does} the whole data set, and the data are a stream; give {name} "
                f"{instead}, or data that can be looked into by number (a folder, a .npy file)"
            )
