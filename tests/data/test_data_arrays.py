"""Arrays in one file: what is read is what was written, scaled by one number; what is not right is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowvar.data import ArrayImages, Data, TensorImages, load
from lowvar.data.folder import split_of
from lowvar.errors import UserError
from lowvar.process import Independent

N = 60


def latents(dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of mean 3 and standard deviation 5 about."""
    return (3 + 5 * Independent(1).normal(range(N), (4, 3, 2))).to(dtype)


def written(path: Path, z: Tensor, labels: Tensor | None = None, name: str = "latents") -> Path:
    more = {} if labels is None else {"labels": labels}
    if path.suffix == ".npy":
        np.save(path, z.numpy())
    elif path.suffix == ".npz":
        arrays: dict[str, Any] = {name: z.numpy(), **{k: v.numpy() for k, v in more.items()}}
        np.savez(path, **arrays)
    else:
        save_file({name: z, **more}, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_latents_are_scaled_by_one_number(suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    z, labels = latents(dtype), torch.arange(N) % 3
    data = load(written(tmp_path / f"z{suffix}", z, labels if suffix != ".npy" else None), seed=4)
    where = torch.tensor([split_of(str(i), 4) for i in range(N)])
    assert (data.levels, data.bound) == (None, None)
    assert data.scaling_factor is not None
    std = z[where == 0].double().std(correction=0)
    assert data.scaling_factor == pytest.approx(1 / float(std), rel=1e-5)
    for k, split in enumerate((data.train, data.calibration, data.test)):
        own = z[where == k].float()
        assert torch.equal(split.all(), own * data.scaling_factor)
        assert torch.equal(split.images([1, 0]), own[[1, 0]] * data.scaling_factor)
        found = split.labels
        assert (found is None) == (suffix == ".npy")
        assert found is None or torch.equal(found, labels[where == k])
    assert float(data.train.all().std()) == pytest.approx(1, abs=0.01)


def test_bfloat16_is_read_from_safetensors(tmp_path: Path) -> None:
    z = latents(torch.bfloat16)
    data = load(written(tmp_path / "z.safetensors", z))
    assert data.train.images([0]).dtype == torch.float32


def test_images_of_8_bits_are_those_of_files(tmp_path: Path) -> None:
    from PIL import Image

    from lowvar.data.decode import decode

    levels = (torch.arange(N * 3 * 16 * 16) % 256).reshape(N, 3, 16, 16).to(torch.uint8)
    data = load(written(tmp_path / "images.npz", levels, name="images"), seed=1)
    assert (data.levels, data.bound, data.scaling_factor) == (256, 1.0, None)
    first = next(i for i in range(N) if split_of(str(i), 1) == 2)
    Image.fromarray(levels[first].permute(1, 2, 0).numpy()).save(tmp_path / "one.png")
    assert torch.equal(data.test.images([0])[0], decode(tmp_path / "one.png", "one", channels=3))


def test_a_mapped_file_is_not_read_into_memory(tmp_path: Path) -> None:
    data = load(written(tmp_path / "z.npy", latents()))
    array: Any = vars(data.train)["_array"]
    assert isinstance(array, np.memmap)
    assert array.mode == "r"
    taken = data.train.images([0])
    taken += 1  # a copy
    assert not torch.equal(taken, data.train.images([0]))


def test_fingerprint_follows_content_split_and_labels(tmp_path: Path) -> None:
    z, labels = latents(), torch.arange(N) % 3
    other = z.clone()
    other[17, 0, 0, 0] += 0.5
    prints = [
        load(written(tmp_path / f"{k}.npz", values, classes), seed=seed).fingerprint
        for k, (values, classes, seed) in enumerate(
            [(z, labels, 0), (z, labels, 0), (z, labels, 1), (z, None, 0), (z, labels.flip(0), 0), (other, None, 0)]
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 5


def test_what_is_no_array_of_latents_is_refused(tmp_path: Path) -> None:
    def refused(path: Path, **more: Any) -> str:
        with pytest.raises(UserError) as caught:
            load(path, **more)
        return str(caught.value)

    z = latents()
    bad = z.clone()
    bad[11, 2, 1, 0] = torch.nan
    assert "row 11 of the latents is not finite" in refused(written(tmp_path / "a.npy", bad))
    assert "all latents in" in refused(written(tmp_path / "b.npy", torch.full_like(z, 2.5)))
    assert "has shape (60, 24)" in refused(written(tmp_path / "c.npy", z.flatten(1)))
    assert "of type float64" in refused(written(tmp_path / "d.npy", z.double()))
    assert "have 4 channels" in refused(written(tmp_path / "e.npy", torch.zeros(N, 4, 2, 2, dtype=torch.uint8)))
    assert "has 4 rows, of which" in refused(written(tmp_path / "f.npy", z[:4]))
    assert "no array called latents or images (it has codes)" in refused(written(tmp_path / "g.npz", z, name="codes"))
    assert "one whole number from 0" in refused(written(tmp_path / "h.npz", z, torch.arange(3)))
    assert "labels in" in refused(written(tmp_path / "i.npz", z, torch.rand(N)))
    assert "labels in" in refused(written(tmp_path / "j.npz", z, torch.arange(N) - 1))
    np.save(tmp_path / "k.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "without pickled objects" in refused(tmp_path / "k.npy")
    (tmp_path / "l.safetensors").write_bytes(b"nothing")
    assert "cannot read the array" in refused(tmp_path / "l.safetensors")
    assert "leave size out" in refused(written(tmp_path / "m.npy", z), size=4)


def test_a_later_row_is_checked_when_it_is_asked_for() -> None:
    rows = ArrayImages(torch.tensor([1.0, torch.inf]).reshape(2, 1, 1, 1), torch.tensor([1, 0]), 2.0)
    assert float(rows.images([1])) == 2.0
    with pytest.raises(UserError, match="row 1 of the latents"):
        rows.images([0])


def test_latents_have_no_levels() -> None:
    split = TensorImages(torch.zeros(2, 1, 2, 2))
    with pytest.raises(ValueError, match="latents have a density"):
        Data("x", split, split, split, 256, "f", scaling_factor=0.5)
