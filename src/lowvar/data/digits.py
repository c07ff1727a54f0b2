"""The 1,797 handwritten 8x8 digits that ship with scikit-learn.

Grey levels 0..16 become x = g / 8 - 1. The split 1197 / 300 / 300 is part of the data set: it does not move with the
seed, so that the scores of two runs are against the same 300 held-out images. It is one random permutation and not
stratified by class: the splits are then exchangeable, which is what makes the energy and kernel distances of data
against data 0 on average (over such splits; with equal class shares in each split both come out below 0).

Source: E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998 (the test part).
"""

from __future__ import annotations

import torch

from lowvar.data.images import Data, TensorImages
from lowvar.errors import UserError
from lowvar.process.noise import Independent

__all__ = ["load_digits"]

_TEST = 300
_CALIBRATION = 300


def load_digits(*, size: int | None = None, channels: int | None = None) -> Data:
    """The digits as `Data`: float32 (n, 1, 8, 8) in [-1, 1], 17 levels, labels 0..9.

    Args:
        size: None or 8, the only size there is.
        channels: None or 1, the only number of channels there is.

    Raises:
        UserError: for another size or number of channels.

    Example:
        >>> data = load_digits()
        >>> data.test.labels.bincount().tolist()
        [34, 31, 27, 25, 30, 25, 33, 33, 30, 32]
    """
    if size not in (None, 8):
        raise UserError(f"size is {size}, but the digits are 8x8 pixels; leave size out or give 8")
    if channels not in (None, 1):
        raise UserError(f"channels is {channels}, but the digits are grey; leave channels out or give 1")
    from sklearn.datasets import load_digits as read  # 1 s of import, so only where it is needed

    bunch = read()
    x = torch.from_numpy(bunch.images).to(torch.float32)[:, None] / 8 - 1  # type: ignore[union-attr]
    y = torch.from_numpy(bunch.target).to(torch.int64)  # type: ignore[union-attr]

    order = torch.argsort(Independent(seed=0).uniform(range(len(x)), (), dtype=torch.float64))
    splits = (order[_TEST + _CALIBRATION :], order[_TEST : _TEST + _CALIBRATION], order[:_TEST])
    a, b, c = (TensorImages(x[part], y[part]) for part in splits)
    return Data("digits", a, b, c, levels=17, fingerprint=TensorImages(x[order]).fingerprint())
