"""The bundled data sets: splits, scaling, reproducibility."""

import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits

from lowvar.data import Data, Images, TensorImages, load
from lowvar.data.photos import Patches
from lowvar.errors import UserError


def rows(images: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, images.flatten(1).tolist()))


def test_digits_are_all_of_scikit_learns_digits_in_three_disjoint_parts():
    data = load("digits", seed=5)
    parts = (data.train, data.calibration, data.test)
    assert [len(p) for p in parts] == [1197, 300, 300]
    x = torch.cat([p.all() for p in parts])
    y = torch.cat([p.labels for p in parts if p.labels is not None])
    raw = torch.from_numpy(sklearn_digits(return_X_y=True)[0]).reshape(-1, 8, 8).float() / 8 - 1
    assert rows(x) == rows(raw)
    assert y.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert data.half_width == 1 / 16
    assert torch.equal((x + 1) * 8, ((x + 1) * 8).round())
    assert x.dtype == torch.float32
    assert x.min() == -1
    assert x.max() == 1


def test_the_digits_split_does_not_move_with_the_seed_or_between_calls():
    a, b = load("digits", seed=1), load("digits", seed=2)
    assert torch.equal(a.test.all(), b.test.all())
    assert a.fingerprint == b.fingerprint


def test_labels_belong_to_their_images():
    data = load("digits")
    assert data.train.labels is not None
    assert data.test.labels is not None
    x, y = data.train.all().flatten(1), data.train.labels
    nearest = torch.cdist(data.test.all().flatten(1), x).argmin(1)
    assert (y[nearest] == data.test.labels).double().mean() > 0.95


@pytest.mark.parametrize("size", [1, 8, 24, 64, 100, 213])
def test_no_pixel_of_a_training_patch_is_in_another_split(size: int):
    data = load("photos", size=size)
    seen = []
    for split in (data.train, data.calibration, data.test):
        assert isinstance(split, Patches)
        mask = torch.zeros(2, 427, 640, dtype=torch.int32)  # differences, summed to a cover
        for p, i, j in split.corners[:3000].tolist():
            mask[p, i : i + size, j : j + size] = 1
        assert mask.sum() > 0
        seen.append(mask)
    assert int(torch.stack(seen).sum(0).max()) == 1


def test_photo_patches_are_distinct_pixels_of_the_photographs():
    from sklearn.datasets import load_sample_images

    data = load("photos:24", seed=3)
    assert data.shape == (3, 24, 24)
    assert data.levels == 256
    assert data.train.labels is None
    assert isinstance(data.test, Patches)
    assert len(data.test.corners.unique(dim=0)) == len(data.test) == 10_000
    p, i, j = data.test.corners[17].tolist()
    expected = torch.from_numpy(load_sample_images().images[p].copy())[i : i + 24, j : j + 24].permute(2, 0, 1)
    assert torch.equal(data.test[17], expected.float() / 127.5 - 1)


def test_photos_move_with_the_seed_and_only_with_it():
    a, b, c = load("photos:8", seed=1), load("photos", size=8, seed=1), load("photos", size=8, seed=2)
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert torch.equal(a.train.images(range(9)), b.train.images(range(9)))
    assert not torch.equal(a.train.images(range(9)), c.train.images(range(9)))


def test_grey_photos_have_one_channel_and_the_luminance():
    grey, colour = load("photos", size=5, channels=1), load("photos", size=5)
    rgb = (colour.test.images(range(50)) + 1) * 127.5
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    level = (grey.test.images(range(50)) + 1) * 127.5
    assert (level - (rgb * weights).sum(1, keepdim=True)).abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("digit", {}, "digits, photos"),
        ("digits:9", {}, "digits, photos"),
        ("photos:big", {}, "photos:32"),
        ("photos:32", {"size": 16}, "once"),
        ("photos", {"size": 0}, "1 to 213"),
        ("photos", {"size": 214}, "1 to 213"),
        ("photos", {"channels": 2}, "3, or 1"),
        ("digits", {"size": 16}, "give 8"),
        ("digits", {"channels": 3}, "give 1"),
    ],
)
def test_bad_input_is_one_sentence_with_the_allowed_values(name: str, arguments: dict[str, int], words: str):
    with pytest.raises(UserError, match=words) as caught:
        load(name, **arguments)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_batches_cover_the_set_once_in_order():
    images = TensorImages(torch.linspace(-1, 1, 11 * 4).reshape(11, 1, 2, 2))
    assert torch.equal(torch.cat(list(images.batches(4))), images.all())
    assert [len(b) for b in images.batches(4)] == [4, 4, 3]
    order = torch.arange(10, -1, -1)
    assert torch.equal(torch.cat(list(images.batches(4, order))), images.all().flip(0))
    assert len(list(iter(images))) == 11
    with pytest.raises(ValueError, match="batch_size"):
        list(images.batches(0))


def test_a_data_loader_takes_a_split():
    loader = torch.utils.data.DataLoader(load("digits").test, batch_size=64)  # type: ignore[arg-type]
    assert sum(len(batch) for batch in loader) == 300


@pytest.mark.parametrize(
    "values", [torch.zeros(2, 3, 4), torch.zeros(0, 3), torch.full((1, 1, 2, 2), 1.5), torch.full((2, 3), -1.5)]
)
def test_tensor_images_refuse_other_shapes_and_ranges(values: torch.Tensor):
    with pytest.raises(ValueError, match="values"):
        TensorImages(values)


def test_nan_is_refused_and_handing_out_is_a_copy():
    with pytest.raises(ValueError, match="finite"):
        TensorImages(torch.full((1, 1, 2, 2), torch.nan))
    images = TensorImages(torch.zeros(2, 1, 2, 2))
    images.images([0]).add_(1)
    assert images.all().abs().max() == 0


def test_splits_of_different_shapes_are_refused():
    a: Images = TensorImages(torch.zeros(1, 1, 2, 2))
    b: Images = TensorImages(torch.zeros(1, 1, 2, 3))
    with pytest.raises(ValueError, match="different shapes"):
        Data("x", a, a, b, levels=256, fingerprint="")
