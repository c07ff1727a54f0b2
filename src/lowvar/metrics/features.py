r"""Feature networks that need no download: a classifier trained on the spot, or fixed random convolutions.

With labels. A small convolutional network is trained on the train split for a few seconds,

    images -> 3 convolutions -> f in R^32 -> ReLU -> linear -> class scores,

and f, before its ReLU (so that no feature is constant), is what distances are computed in. Its accuracy on the held-out
split is kept: features of a classifier that does not classify say nothing.

Without labels. A fixed seeded network: zero-mean random 5x5 filters (edges and textures, not brightness), |.|, pooling,
zero-mean random filters again; the spatial means of both layers, and mean and spread of every colour, 64 numbers at
most. (Logarithms or whitening of these were tried on photo patches: both raise the floor against what blur, shrinkage
and noise add.) Random convolutional features separate textures well enough to rank samplers (Saxe et al. 2011), depend
on nothing but the seed, and are divided by their standard deviation over the train split.

32 and at most 64 dimensions are chosen for the Frechet distance: a covariance of d features needs well over d images,
and 300 held-out digits are what there is. Scores of different extractors are not comparable: `Extractor.hash` names the
weights and stands beside every score.

Rows of a table are their own features: d coordinates.

Source: A. Saxe et al., "On random weights and unsupervised feature learning", ICML 2011.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowvar.process.noise import Independent

__all__ = [
    "DataSet",
    "Extractor",
    "ImageSet",
    "digit_classifier",
    "extractor_for",
    "random_features",
    "trained_classifier",
]

_UPDATES = 700
_BATCH = 96


class ImageSet(Protocol):
    """What metrics need of a split: `lowvar.data.Images` has it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def labels(self) -> Tensor | None: ...
    def __len__(self) -> int: ...
    def images(self, indices: Tensor) -> Tensor: ...
    def batches(self, batch_size: int) -> Iterator[Tensor]: ...


class DataSet(Protocol):
    """What metrics need of a data set: `lowvar.data.Data` has it."""

    @property
    def train(self) -> ImageSet: ...
    @property
    def test(self) -> ImageSet: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def fingerprint(self) -> str: ...


class Extractor(nn.Module):
    """A frozen feature network (n, C, H, W) in [-1, 1] -> (n, num_features), float32.

    Attributes:
        name: what kind of network it is.
        num_features: width d of the features (torchmetrics reads it).
        accuracy: share of held-out images classified correctly, or None for a network that does not classify.
    """

    def __init__(self, name: str, body: nn.Module, num_features: int, accuracy: float | None = None) -> None:
        """Freezes `body`."""
        super().__init__()
        self.name, self.num_features, self.accuracy = name, num_features, accuracy
        self.body = body.eval().requires_grad_(False)

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of all weights."""
        digest = hashlib.sha256(self.name.encode())
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode() + value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def forward(self, images: Tensor) -> Tensor:
        """Features of a batch."""
        return self.body(images)

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 1024) -> Tensor:
        """Features (n, d) of many images, in batches, float64 on the CPU."""
        device = next(self.buffers(), next(self.parameters(), torch.empty(0))).device
        parts = [self(part.to(device, torch.float32)).to("cpu", torch.float64) for part in images.split(batch_size)]
        return torch.cat(parts)


class _Classifier(nn.Module):
    """Three convolutions and a linear layer to the features."""

    def __init__(self, channels: int, side: tuple[int, int], width: int, num_features: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.third = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        rows, columns = (side[0] + 1) // 2, (side[1] + 1) // 2
        self.last = nn.Linear(2 * width * rows * columns, num_features)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.second(x))
        x = F.relu(self.third(x))
        return self.last(x.flatten(1))


class _RandomConvolutions(nn.Module):
    """Zero-mean random filters, rectified, pooled; divided by a scale that is set afterwards."""

    first: Tensor
    second: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, num_features: int, seed: int) -> None:
        super().__init__()
        half = (num_features - 2 * channels) // 2
        source = Independent(seed)
        for draw, (name, inputs, outputs) in enumerate((("first", channels, half), ("second", half, half))):
            w = source.normal(range(outputs), (inputs, 5, 5), draw=draw)
            w = w - w.mean(dim=(2, 3), keepdim=True)
            self.register_buffer(name, w / w.flatten(1).norm(dim=1)[:, None, None, None])
        self.num_features = 2 * half + 2 * channels
        self.register_buffer("mean", torch.zeros(self.num_features))
        self.register_buffer("std", torch.ones(self.num_features))

    def forward(self, x: Tensor) -> Tensor:
        a = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), self.first).abs()
        pooled = F.avg_pool2d(a, 2) if min(a.shape[2:]) > 1 else a
        b = F.conv2d(F.pad(pooled, (2, 2, 2, 2), mode="replicate"), self.second).abs()
        colours = (x.mean(dim=(2, 3)), x.std(dim=(2, 3), correction=0))
        z = torch.cat([a.mean(dim=(2, 3)), b.mean(dim=(2, 3)), *colours], dim=1)
        return (z - self.mean) / self.std


def _initialise(module: nn.Module, source: Independent) -> None:
    """He-normal weights and zero biases from the noise source: no global generator is read or moved."""
    for number, parameter in enumerate(module.parameters()):
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.zero_()
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(source.normal(range(len(parameter)), parameter.shape[1:], draw=number))
                parameter.mul_((2.0 / fan_in) ** 0.5)


def _shifted(x: Tensor, u: Tensor) -> Tensor:
    """Images moved by -1, 0 or 1 pixels in each direction according to u (n, 2) in (0, 1), edges repeated."""
    n, _, h, w = x.shape
    moves = (u * 3).floor().to(torch.int64)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    i = (moves[:, :1] + torch.arange(h))[:, None, :, None]
    j = (moves[:, 1:] + torch.arange(w))[:, None, None, :]
    return padded[torch.arange(n)[:, None, None, None], torch.arange(x.shape[1])[None, :, None, None], i, j]


def digit_classifier(data: DataSet, *, seed: int = 0, updates: int = _UPDATES, cache: Path | None = None) -> Extractor:
    """Trains a classifier on the train split; its 32 features, with its accuracy on the held-out split.

    Args:
        data: a labelled data set.
        seed: of the weights, the order of the images and their shifts by a pixel.
        updates: of AdamW, batches of 96 with labels smoothed by .1.
        cache: folder in which the weights are kept and looked for, by the data's fingerprint; None: not kept.

    Raises:
        ValueError: if the data has no labels, or `updates` is below 1.

    Example:
        >>> from lowvar.data import load
        >>> extractor = digit_classifier(load("digits"), updates=60)
        >>> extractor.num_features, extractor.accuracy > 0.7
        (32, True)
    """
    labels, held = data.train.labels, data.test.labels
    if labels is None or held is None:
        raise ValueError("the data has no labels; use random_features")
    if updates < 1:
        raise ValueError(f"updates is {updates}; give a whole number of at least 1")
    return _judged(_trained(data, labels, seed, updates, cache), data, held)


def trained_classifier(data: DataSet, *, seed: int = 0, cache: Path | None = None) -> nn.Sequential:
    """The whole classifier: images (n, C, H, W) -> class scores (n, classes); its first part gives the features.

    Trained once a process, with labels smoothed by .1: its softmax says .91 where it is sure. Frozen, and shared.

    Args:
        data: a labelled data set.
        seed: of the classifier.
        cache: folder in which the weights are kept and looked for; None: only this process remembers them.

    Raises:
        ValueError: if the data has no labels.
    """
    labels = data.train.labels
    if labels is None:
        raise ValueError("the data has no labels; a classifier needs labelled images")
    key = (data.fingerprint, seed)
    if key not in _CLASSIFIERS:
        _CLASSIFIERS[key] = _trained(data, labels, seed, _UPDATES, cache).eval().requires_grad_(False)
    return _CLASSIFIERS[key]


def _judged(net: nn.Sequential, data: DataSet, held: Tensor) -> Extractor:
    with torch.no_grad():
        right = torch.cat([net(part).argmax(1) for part in data.test.batches(1024)]) == held
    return Extractor("classifier", net[0], 32, right.to(torch.float64).mean().item())


def _trained(data: DataSet, labels: Tensor, seed: int, updates: int, cache: Path | None) -> nn.Sequential:
    channels, h, w = data.shape
    classes = int(labels.max() if data.test.labels is None else max(labels.max(), data.test.labels.max())) + 1
    with torch.inference_mode(False), torch.device("meta"):
        body, head = _Classifier(channels, (h, w), 24, 32), nn.Linear(32, classes)
        net = nn.Sequential(body, nn.ReLU(), head).to_empty(device="cpu")
    path = None if cache is None else cache / f"classifier-{data.fingerprint}-{seed}-{updates}.safetensors"
    if path is not None and path.exists():
        from safetensors.torch import load_file

        net.load_state_dict(load_file(path))
        return net
    with torch.inference_mode(False), torch.enable_grad(), _one_thread():
        _train(net, data.train, labels, seed, updates)
    if path is not None:
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(net.state_dict(), partial)
        partial.replace(path)
    return net


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread inside.

    The batches are too small for more (on a busy machine two threads were 10 times slower than one), and the order of
    summation, hence the weights' hash, then does not depend on the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(net: nn.Module, train: ImageSet, labels: Tensor, seed: int, updates: int) -> None:
    source, n = Independent(seed), len(train)
    _initialise(net, Independent(seed + 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=updates + 1)
    batch = min(_BATCH, n)
    order = torch.empty(0, dtype=torch.int64)
    for update in range(updates):
        if len(order) < batch:
            order = torch.argsort(source.uniform(range(n), (), draw=2 * update, dtype=torch.float64))
        index, order = order[:batch], order[batch:]
        x = _shifted(train.images(index), source.uniform(range(batch), (2,), draw=2 * update + 1))
        loss = F.cross_entropy(net(x), labels[index], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def random_features(train: ImageSet, *, num_features: int = 64, seed: int = 0) -> Extractor:
    """A fixed seeded convolutional network, scaled by the standard deviation of its features on `train`.

    Args:
        train: images; the first 2,000 set the scale.
        num_features: at most this many; 2 C + 4 or more.
        seed: of the filters.

    Raises:
        ValueError: if `num_features` is below 2 C + 4.

    Example:
        >>> from lowvar.data import load
        >>> data = load("photos", size=8)
        >>> extractor = random_features(data.train)
        >>> extractor.num_features, tuple(extractor.features(data.test.images(torch.arange(5))).shape)
        (64, (5, 64))
    """
    channels = train.shape[0]
    if num_features < 2 * channels + 4:
        raise ValueError(f"num_features is {num_features}; {channels} channels need at least {2 * channels + 4}")
    body = _RandomConvolutions(channels, num_features, seed)
    extractor = Extractor("random-convolutions", body, body.num_features)
    z = extractor.features(train.images(torch.arange(min(len(train), 2000))))
    body.mean.copy_(z.mean(0))
    body.std.copy_(z.std(0).clamp_min(1e-6))
    return extractor


def extractor_for(data: DataSet, *, seed: int = 0, cache: Path | None = None) -> Extractor:
    """The extractor a data set is scored in: a classifier for labelled images up to 16 pixels, else random features.

    Rows of a table are scored in their coordinates.

    Args:
        data: the data set; a classifier is trained on its train split.
        seed: of the extractor.
        cache: folder for a classifier's weights; None: only this process remembers them.

    Example:
        >>> from lowvar.data import load
        >>> extractor_for(load("photos", size=8)).name
        'random-convolutions'
    """
    if len(data.shape) == 1:
        return Extractor("coordinates", nn.Identity(), data.shape[0])
    if data.train.labels is None or max(data.shape[1:]) > 16:
        return random_features(data.train, seed=seed)
    key = (data.fingerprint, seed)
    if key not in _REMEMBERED:
        held = data.test.labels
        if held is None:
            raise ValueError("the held-out split has no labels; give labelled data")
        _REMEMBERED[key] = _judged(trained_classifier(data, seed=seed, cache=cache), data, held)
    return _REMEMBERED[key]


_CLASSIFIERS: dict[tuple[str, int], nn.Sequential] = {}
_REMEMBERED: dict[tuple[str, int], Extractor] = {}
