"""Streams: every item once an epoch, a function of the place alone, skipped items not decoded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from lowvar.data import Stream, StreamData, TensorImages
from lowvar.data.stream import image_of
from lowvar.errors import UserError


class Counted:
    """Items 0 .. n - 1 of an epoch, more of them in odd ones; counts what is read and decoded."""

    def __init__(self, n: int = 10) -> None:
        self.n, self.read, self.decoded, self.begun = n, 0, 0, 0

    def __call__(self, epoch: int) -> Iterator[int]:
        self.begun += 1
        for k in range(self.n + epoch % 2):
            self.read += 1
            yield 100 * epoch + k

    def decode(self, item: int) -> Tensor:
        self.decoded += 1
        return torch.tensor([float(item)])

    def stream(self, **more: Any) -> Stream:
        return Stream(self, (1,), decode=self.decode, **{"buffer": 4, **more})


def numbers(stream: Stream, *places: int) -> list[int]:
    return [int(v) for v in stream.images(range(*places)).flatten().tolist()]


@pytest.mark.parametrize("buffer", [1, 2, 4, 10, 50])
def test_every_item_comes_once_an_epoch_and_not_too_early(buffer: int) -> None:
    order = numbers(Counted().stream(buffer=buffer), 31)
    epochs = order[:10], order[10:21], order[21:]
    assert sorted(epochs[0]) == list(range(10))
    assert sorted(epochs[1]) == list(range(100, 111))
    assert sorted(epochs[2]) == list(range(200, 210))
    for epoch in epochs:
        assert all(item % 100 <= place + buffer - 1 for place, item in enumerate(epoch))
    assert (order == sorted(order)) == (buffer == 1)


def test_the_buffers_law_is_exact() -> None:
    """Two items and a buffer of both: each comes first in half of the orders; 4,000 epochs, |z| < 4."""
    stream = Stream([torch.zeros(1), torch.ones(1)], (1,), buffer=2)
    first = stream.images(range(8000))[::2, 0]
    assert abs(float(first.mean()) - 0.5) < 4 * 0.5 / 4000**0.5
    pairs = stream.images(range(8000)).reshape(-1, 2)
    assert bool((pairs.sum(1) == 1).all())


def test_a_place_is_a_function_of_its_number() -> None:
    whole = numbers(Counted().stream(), 42)
    seeds = {tuple(numbers(Counted().stream(seed=seed), 42)) for seed in (0, 1, 2)}
    assert len(seeds) == 3
    assert tuple(whole) in seeds
    batches = Counted().stream()
    assert [v for k in range(0, 42, 6) for v in numbers(batches, k, k + 6)] == whole
    part = Counted().stream()  # the second of two processes
    assert [v for k in range(0, 42, 6) for v in numbers(part, k + 3, k + 6)] == [
        v for k in range(0, 42, 6) for v in whole[k + 3 : k + 6]
    ]
    back = Counted().stream()
    for k in (30, 3, 17, 0, 25):
        assert numbers(back, k, k + 5) == whole[k : k + 5]
    assert back.images([5, 2, 5]).flatten().tolist() == [whole[5], whole[2], whole[5]]
    assert tuple(back.images([]).shape) == (0, 1)


def test_asking_again_reads_nothing_again() -> None:
    source = Counted(1000)
    stream = source.stream()
    for k in range(0, 300, 10):
        a = numbers(stream, k, k + 10)
        assert numbers(stream, k + 10, k + 20) != a  # a look ahead
        assert numbers(stream, k + 10, k + 20) != a
    assert source.begun == 1
    assert source.read == 310 + 4


def test_resuming_begins_the_last_epoch_only_and_decodes_what_is_asked_for() -> None:
    source = Counted(50)
    before = source.stream()
    numbers(before, 130)
    state = before.state()
    assert state["starts"].tolist() == [0, 50, 101]
    whole = numbers(source.stream(), 140)
    source.read = source.decoded = source.begun = 0
    after = source.stream().restored(state)
    assert numbers(after, 130, 140) == whole[130:]
    assert (source.begun, source.decoded, source.read) == (1, 10, 39 + 4)
    assert len(vars(after)["_recent"]) == 10  # what was skipped is not kept


def test_the_first_places_are_of_one_epoch() -> None:
    stream = Counted().stream()
    assert sorted(stream.first.all().flatten().tolist()) == [float(k) for k in range(10)]
    assert numbers(stream, 5) == [int(v) for v in stream.first.images(range(5)).flatten().tolist()]


class Set(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(6.0)[:, None] / 6


def test_sets_of_torch_and_hugging_face() -> None:
    torch_set: Any = Set()
    assert sorted(Stream(torch_set, (1,)).images(range(6)).flatten().tolist()) == (torch.arange(6.0) / 6).tolist()
    import datasets

    rows = datasets.Dataset.from_dict({"x": list(range(20))}).to_iterable_dataset(num_shards=4)
    shuffled = rows.shuffle(seed=1, buffer_size=3)

    def decode(row: dict[str, int]) -> Tensor:
        return torch.tensor([float(row["x"])])

    order = numbers(Stream(shuffled, (1,), decode=decode, buffer=3), 60)
    assert [sorted(order[k : k + 20]) for k in (0, 20, 40)] == [list(range(20))] * 3
    again = Stream(shuffled, (1,), decode=decode, buffer=3)
    assert numbers(again, 45, 60) == order[45:]  # set_epoch: the set's own shuffle is the epoch's
    assert order[:20] != order[20:40]


def test_items_as_images() -> None:
    from PIL import Image

    levels = (np.arange(12) * 20).astype(np.uint8).reshape(2, 2, 3)
    wanted = torch.from_numpy(levels.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(image_of(Image.fromarray(levels)), wanted)
    assert torch.equal(image_of({"image": Image.fromarray(levels), "label": 1}), wanted)
    assert torch.equal(image_of((np.moveaxis(levels, 2, 0).copy(), 3)), wanted)
    assert tuple(image_of(Image.fromarray(levels[:, :, 0])).shape) == (1, 2, 2)
    assert torch.equal(image_of(torch.full((1, 1, 1), 0.25, dtype=torch.float64)), torch.full((1, 1, 1), 0.25))
    deep = Image.fromarray(np.array([[0, 255, 257, 65535]], dtype=np.uint16))  # as from a file: the upper byte
    assert ((image_of(deep) + 1) * 127.5).round().flatten().tolist() == [0, 0, 1, 255]
    turned = Image.fromarray(levels[:, :1])
    turned.getexif()[0x0112] = 6
    assert tuple(image_of(turned).shape) == (3, 1, 2)
    with pytest.raises(UserError, match="floating point numbers"):
        image_of(Image.fromarray(np.zeros((2, 2), dtype=np.float32)))
    for item in ({"pixels": levels}, "text", torch.tensor([1, 2])):
        with pytest.raises(UserError, match="give decode"):
            image_of(item)


def test_what_is_no_stream_is_refused() -> None:
    with pytest.raises(UserError, match="gone through once"):
        Stream(iter([torch.zeros(1)]), (1,))
    with pytest.raises(UserError, match="the stream is empty"):
        Stream([], (1,)).images([0])
    with pytest.raises(UserError, match=r"has shape \(2,\) and the stream \(1,\)"):
        Stream([torch.zeros(2)], (1,)).images([0])
    with pytest.raises(ValueError, match="buffer is 0"):
        Stream([torch.zeros(1)], (1,), buffer=0)
    with pytest.raises(ValueError, match="what is held out"):
        StreamData(Stream([torch.zeros(1)], (1,)), TensorImages(torch.zeros(2, 3)))


def test_fingerprint_follows_order_and_content() -> None:
    held = TensorImages(torch.zeros(4, 1))

    def of(scale: float = 1.0, **more: Any) -> str:
        items = [torch.full((1,), scale * k) for k in range(5)]
        return StreamData(Stream(items, (1,), **more), held).fingerprint

    assert of() == of()
    assert len({of(), of(2.0), of(seed=1), of(buffer=2)}) == 4
