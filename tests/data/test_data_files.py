"""Folders of images and data sets on disk."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from lowvar.data import load
from lowvar.errors import UserError
from lowvar.process.noise import Independent


def rows(images: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, images.flatten(1).tolist()))


def put(path: Path, number: int, width: int = 9, height: int = 7, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    u = Independent(number).uniform([0], (height, width, 3))[0]
    Image.fromarray((u * 256).to(torch.uint8).numpy()).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(60):
        put(tmp_path / "images" / f"{i}.png", i)
    return tmp_path / "images"


def test_pixels_are_the_files_pixels(folder: Path):
    data = load(folder)
    assert data.shape == (3, 7, 9)
    assert data.levels == 256
    assert data.train.labels is None
    found = torch.cat([data.train.all(), data.calibration.all(), data.test.all()])
    expected = torch.stack([(Independent(i).uniform([0], (7, 9, 3))[0] * 256).to(torch.uint8) for i in range(60)])
    expected = expected.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert rows(found) == rows(expected)


def test_an_image_keeps_its_split_when_others_are_added(folder: Path):
    before = load(folder)
    put(folder / "added.png", 999)
    after = load(folder)
    new = {tuple(x.flatten().tolist()) for part in (after.train, after.calibration, after.test) for x in part.all()}
    for old, now in ((before.train, after.train), (before.calibration, after.calibration), (before.test, after.test)):
        a = {tuple(x.flatten().tolist()) for x in old.all()}
        assert a <= {tuple(x.flatten().tolist()) for x in now.all()} <= new
    assert before.fingerprint != after.fingerprint
    assert not torch.equal(load(folder, seed=1).test.all(), before.test.all())


def test_nothing_goes_to_stdout_or_into_the_shared_cache(folder: Path, capfd: pytest.CaptureFixture[str]):
    from datasets.config import HF_DATASETS_CACHE

    cache = Path(HF_DATASETS_CACHE)
    before = set(cache.glob("*")) if cache.exists() else set()
    load(folder)
    assert capfd.readouterr().out == ""
    assert (set(cache.glob("*")) if cache.exists() else set()) == before


def test_class_folders_are_labels_in_alphabetical_order(tmp_path: Path):
    for i in range(40):
        put(tmp_path / ("zebra" if i % 2 else "ant") / f"{i}.png", i, mode="L")
    data = load(tmp_path)
    assert data.shape == (1, 7, 9)
    assert data.train.labels is not None
    assert set(data.train.labels.tolist()) == {0, 1}
    assert len(data.train.labels) == len(data.train)


@pytest.mark.parametrize("names", [("train",), ("train", "val"), ("train", "test"), ("train", "validation", "test")])
def test_sub_folders_are_the_splits_and_missing_ones_come_from_train(tmp_path: Path, names: tuple[str, ...]):
    for k, name in enumerate(names):
        for i in range(50):
            put(tmp_path / name / f"test_{i}.png", 100 * k + i)  # a file's own name decides nothing
    data = load(tmp_path)
    sizes = {"train": len(data.train), "validation": len(data.calibration), "test": len(data.test)}
    assert sum(sizes.values()) == 50 * len(names)
    assert (sizes["validation"] == 50) == ("val" in names or "validation" in names)
    assert (sizes["test"] == 50) == ("test" in names)
    assert data.train.labels is None


def test_files_that_are_no_images_by_name_and_hidden_ones_are_skipped(folder: Path):
    (folder / "notes.txt").write_text("hello")
    put(folder / ".thumbnails" / "1.png", 5, width=3)
    data = load(folder)
    assert len(data.train) + len(data.calibration) + len(data.test) == 60


def test_mixed_sizes_are_refused_without_a_size_and_cropped_with_one(folder: Path):
    put(folder / "large.png", 99, width=30, height=20)
    with pytest.raises(UserError, match=r"mixed sizes.*give a size") as caught:
        load(folder)
    assert "large.png" in str(caught.value)
    assert "30x20" in str(caught.value)
    assert load(folder, size=5).shape == (3, 5, 5)
    assert load(folder, size=5, channels=1).train.all().shape[1:] == (1, 5, 5)


def test_an_unreadable_image_is_named(folder: Path):
    (folder / "broken.png").write_text("hello")
    with pytest.raises(UserError, match=r"broken\.png"):
        load(folder)


def test_a_truncated_image_is_named_when_it_is_read(folder: Path):
    content = (folder / "7.png").read_bytes()
    (folder / "7.png").write_bytes(content[: len(content) - 40])
    data = load(folder)
    with pytest.raises(UserError, match=r"7\.png"):
        _ = [part.all() for part in (data.train, data.calibration, data.test)]


def test_a_folder_without_images_and_one_with_too_few_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="has no images"):
        load(tmp_path)
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match="has no images"):
        load(tmp_path)
    put(tmp_path / "a.png", 1)
    with pytest.raises(UserError, match="split"):
        load(tmp_path)


@pytest.mark.parametrize("arguments", [{"size": 0}, {"channels": 2}])
def test_a_size_or_channels_outside_the_allowed_are_refused(folder: Path, arguments: dict[str, int]):
    with pytest.raises(UserError, match="give"):
        load(folder, **arguments)


def test_unknown_files_are_refused(tmp_path: Path):
    for name in ("a.json", "a.bin"):
        (tmp_path / name).write_text("1,2")
        with pytest.raises(UserError, match="folder of images"):
            load(tmp_path / name)


def test_orientation_palette_alpha_and_16_bit_grey(tmp_path: Path):
    from lowvar.data.decode import decode, header

    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    image.save(tmp_path / "turned.png", exif=exif)
    assert header(tmp_path / "turned.png", "") == (3, 4, 2)
    assert decode(tmp_path / "turned.png", "", channels=3).shape == (3, 4, 2)
    image.convert("P").save(tmp_path / "palette.gif")
    assert decode(tmp_path / "palette.gif", "", channels=3)[:, 0, 0].tolist() == [1, -1, -1]
    image.convert("RGBA").save(tmp_path / "alpha.png")
    assert header(tmp_path / "alpha.png", "") == (3, 2, 4)
    deep = (torch.arange(8).reshape(2, 4) * 8192).to(torch.int32).numpy().astype("uint16")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert header(tmp_path / "deep.png", "")[0] == 1
    x = (decode(tmp_path / "deep.png", "", channels=1) + 1) * 127.5
    assert x.flatten().round().tolist() == [0, 32, 64, 96, 128, 160, 192, 224]


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_a_data_set_on_disk_with_an_image_column(folder: Path, tmp_path: Path, kind: str):
    import datasets

    paths = sorted(map(str, folder.glob("*.png")))
    table = datasets.Dataset.from_dict({"n": list(range(60)), "picture": paths})
    table = table.cast_column("picture", datasets.Image())
    if kind == "parquet":
        path = tmp_path / "images.parquet"
        table.to_parquet(os.fspath(path))
    else:
        path = tmp_path / "saved"
        table.save_to_disk(os.fspath(path))
    data = load(path)
    assert data.shape == (3, 7, 9)
    found = torch.cat([data.train.all(), data.calibration.all(), data.test.all()])
    assert len(found.unique(dim=0)) == 60
    assert load(path, size=4, channels=1).shape == (1, 4, 4)


def test_a_broken_parquet_file_and_a_set_without_images_are_refused(tmp_path: Path):
    import datasets

    (tmp_path / "broken.parquet").write_text("hello")
    with pytest.raises(UserError, match="cannot open"):
        load(tmp_path / "broken.parquet")
    datasets.Dataset.from_dict({"a": [1], "b": [2]}).save_to_disk(os.fspath(tmp_path / "table"))
    with pytest.raises(UserError, match="no image column"):
        load(tmp_path / "table")
