"""Statistics of single samples: what the named ones are worth, and what is refused."""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lowvar.data import Data, load
from lowvar.errors import UserError
from lowvar.metrics import STATISTICS, Statistic, needs_data, statistic_named
from lowvar.metrics.thickness import thickness
from lowvar.process.noise import Independent


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return Independent(seed).uniform(range(shape[0]), shape[1:]) * 2 - 1


# ------------------------------------------------------------------------------------------------------ the named ones


def named(digits: Data) -> list[Statistic]:
    words = ("brightness", "mean", "jpeg", "thickness", "class:3", "fraction:3")
    return [statistic_named(word, data=digits) for word in words]


def test_every_name_of_the_list_is_known(digits: Data) -> None:
    assert [s.name.partition(":")[0] for s in named(digits)] == [w.partition(":")[0] for w in STATISTICS][:-1]
    assert [w for w in STATISTICS if needs_data(w)] == ["class:K", "fraction:K"]


def test_declared_flags_hold(digits: Data) -> None:
    """Smooth: the value's change falls with the sample's. Indicator: 0 and 1 only. Differentiable: autograd."""
    x = digits.test.images(torch.arange(64))
    step = Independent(1).normal(range(64), x.shape[1:])
    for statistic in named(digits):
        values = statistic.check(x)
        assert (statistic.indicator is True) == set(values.flatten().tolist()).issubset({0.0, 1.0}), statistic.name
        changes = [(statistic(x + h * step) - values).abs().max().item() for h in (1e-3, 1e-4, 1e-5)]
        falls = changes[0] > changes[1] > changes[2] and changes[2] < changes[0] / 20
        assert falls == statistic.smooth, (statistic.name, changes)
        leaf = x.clone().requires_grad_()
        out = statistic(leaf)
        assert out.requires_grad == statistic.differentiable, statistic.name
        if statistic.differentiable:
            (gradient,) = torch.autograd.grad(out.sum(), leaf)
            assert gradient.isfinite().all()
            assert gradient.abs().sum() > 0


def test_jpeg_is_the_size_of_the_file() -> None:
    """Small images enlarged 4 times, larger ones as they are; grey and colour."""
    for shape, factor in (((2, 1, 8, 8), 4), ((2, 3, 32, 32), 1)):
        x = noise(*shape)
        found = statistic_named("jpeg")(x)
        for image, value in zip(x, found.tolist(), strict=True):
            pixels = ((image.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
            big = pixels.repeat(factor, 0).repeat(factor, 1).squeeze()
            file = io.BytesIO()
            Image.fromarray(big).save(file, format="JPEG", quality=95)
            assert value == -len(file.getvalue())
    with pytest.raises(UserError, match=r"jpeg.*\(4, 5\)"):
        statistic_named("jpeg")(torch.zeros(4, 5))


def bar(width: float, length: float, degrees: float, n: int = 48, sub: int = 8) -> Tensor:
    """A stroke around the middle of a pixel, (1, 1, n + 1, n + 1), with grey edges."""
    n += 1
    line = (torch.arange(n * sub, dtype=torch.float64) + 0.5) / sub - n / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    a = math.radians(degrees)
    along, across = x * math.cos(a) + y * math.sin(a), y * math.cos(a) - x * math.sin(a)
    ink = ((along.abs() < length / 2) & (across.abs() < width / 2)).double()
    return (2 * ink.reshape(n, sub, n, sub).mean((1, 3)) - 1)[None, None]


@pytest.mark.parametrize("width", [2.0, 3.0, 5.0])
def test_thickness_of_strokes(width: float) -> None:
    exact = 2 * width * 30 / (2 * (width + 30))
    for degrees in (0, 15, 22.5, 45, 60, 90):
        assert thickness(bar(width, 30, degrees)).item() == pytest.approx(exact, rel=0.13 if width < 3 else 0.09), (
            degrees
        )


def test_thickness_does_not_see_place_and_quarter_turns() -> None:
    x = bar(3, 20, 25)
    same = [x.flip(2), x.flip(3), x.rot90(1, (2, 3)), x.roll((3, -2), (2, 3)), x.expand(1, 3, -1, -1)]
    assert torch.allclose(torch.cat([thickness(y) for y in same]), thickness(x).expand(5), rtol=1e-12)
    assert thickness(-torch.ones(1, 1, 8, 8)).item() == 0


def test_thickness_grows_with_the_strokes_of_digits(digits: Data) -> None:
    x = digits.test.images(torch.arange(100))
    thicker = torch.nn.functional.max_pool2d(x, 3, 1, 1)
    assert (thickness(thicker) > thickness(x)).all()


def test_fraction_is_the_share_and_class_its_smooth_relative(digits: Data) -> None:
    x, labels = digits.test.images(torch.arange(300)), digits.test.labels
    assert labels is not None
    hit, p = statistic_named("fraction:7", data=digits)(x), statistic_named("class:7", data=digits)(x)
    assert ((hit == 1) == (labels == 7)).double().mean() > 0.98
    assert p[labels == 7].mean() > 0.8
    assert p[labels != 7].mean() < 0.03  # .01 by the smoothing of labels
    every = torch.stack([statistic_named(f"class:{k}", data=digits)(x[:5]) for k in range(10)])
    assert torch.allclose(every.sum(0), torch.ones(5))


# ------------------------------------------------------------------------------------------------------ what is refused


class Restless:
    """A value that changes when it is asked again."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x[:, 0] + 0.1 * Independent(self.calls).normal(range(len(x)), ())


WRONG: list[tuple[Callable[..., object], str]] = [
    (lambda x: x.sum(), r"returned shape \(\) for 6 samples; return one value a sample: \(6,\)"),
    (lambda x: x[:-1], r"returned shape \(5, 3\)"),
    (lambda x: "high", r"returned a str"),
    (lambda x: x.to(torch.complex64), r"complex"),
    (lambda x: torch.where(x == x[4, 1], torch.nan, x), r"is nan for sample 14; it must be finite"),
    (lambda x: 1 / (x[:, 0] - x[2, 0]), r"is inf for sample 12"),
    (Restless(), r"random itself: sample 1\d has the value .*fixed seed"),
    (lambda x: x[:, 0] - x[:, 0].mean(), r"within 6 samples and .* within 3; .*not depend on the other samples"),
    (lambda x: x @ x.mT, r"shape \(6, 6\) for 6 samples and \(3, 3\) for 3"),
]


@pytest.mark.parametrize(("function", "words"), WRONG, ids=range(len(WRONG)))
def test_what_is_no_statistic_is_refused(function: Callable[..., object], words: str) -> None:
    with pytest.raises(UserError, match=f"^statistic 'mine'.*{words}") as caught:
        Statistic("mine", function).check(noise(6, 3), index=range(10, 16))
    assert "\n" not in str(caught.value)


def test_a_sample_that_is_not_finite_is_blamed_itself() -> None:
    x = noise(3, 1, 4, 4)
    x[1, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match="is nan for sample 1, which is not finite itself"):
        statistic_named("brightness")(x)


def test_rounding_and_columns_are_no_offence() -> None:
    """A value that moves by rounding with the batch passes; columns with an entry a sample are cut with it."""

    def f(x: Tensor, weight: Tensor, power: int) -> Tensor:
        return weight * x[:, 0] ** power + 1e-7 * len(x)

    x = noise(8, 3)
    found = Statistic("f", f).check(x, weight=torch.arange(8.0), power=2)
    assert torch.allclose(found, torch.arange(8.0) * x[:, 0] ** 2, atol=1e-5)
    whole = Statistic("count", lambda x: (x > 0).sum(1))(x)
    assert whole.is_floating_point()
    assert whole.dtype == torch.float64
    assert Statistic("list", lambda x: x[:, 0].tolist())(x).shape == (8,)
    assert Statistic("hit", lambda x: x[:, 0] > 0)(x).dtype == torch.float32


def test_what_a_function_raises_is_one_sentence_with_its_cause() -> None:
    def f(x: Tensor, prompt: list[str]) -> Tensor:
        raise KeyError("first\nsecond")

    with pytest.raises(
        UserError, match=r"^statistic 'f' raised KeyError: .*it is called as f\(samples \(2, 3\), prompt=\)$"
    ):
        Statistic("f", f)(noise(2, 3), prompt=["a", "b"])
    out_of_disk = Statistic("f", lambda x: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        out_of_disk(noise(2, 3))


def test_values_may_be_infinite_where_they_are_asked_anywhere() -> None:
    root = Statistic("root", lambda x: x[:, 0].sqrt())
    assert root.anywhere(torch.tensor([[4.0], [-1.0]]))[0] == 2
    with pytest.raises(UserError, match="must be finite"):
        root(torch.tensor([[4.0], [-1.0]]))


NAMES = [
    (
        "sharpness",
        r"there is no statistic 'sharpness'; allowed: brightness, mean, jpeg, thickness, class:K, fraction:K",
    ),
    ("class:3", "needs labelled images"),
    ("no_such_module:f", "there is no module 'no_such_module'; allowed: brightness"),
    ("math:no_such", "module 'math' has no function 'no_such'; it has acos"),
    ("math:pi", "has no function 'pi'"),
    ("os.path:join:x", "there is no statistic"),
    (":f", "there is no statistic"),
    ("brightness:", "there is no statistic"),
]


@pytest.mark.parametrize(("word", "words"), NAMES, ids=[word for word, _ in NAMES])
def test_unknown_names_are_refused_with_the_known(word: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        statistic_named(word)


def test_classes_have_to_exist(digits: Data) -> None:
    with pytest.raises(UserError, match=r"allowed: class:K with K in 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"):
        statistic_named("class:12", data=digits)
    with pytest.raises(UserError, match="needs images with labels"):
        statistic_named("class:1", data=load("photos", size=8))
    with pytest.raises(UserError, match=re.escape("judges images (1, 8, 8), and the samples have shape (2, 3, 8, 8)")):
        statistic_named("class:1", data=digits)(torch.zeros(2, 3, 8, 8))


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_test.py").write_text(
        "import torch\n"
        "def corner(samples, **columns):\n    'Top left pixel.'\n    return samples[:, 0, 0, 0]\n"
        "corner.differentiable = corner.smooth = True\n"
        "def wrong(samples):\n    return samples\nwrong.smooth = 'very'\n"
    )
    (tmp_path / "needs_for_test.py").write_text("import no_such_thing_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = statistic_named("mine_for_test:corner")
    x = noise(4, 1, 2, 2)
    assert torch.equal(found.check(x), x[:, 0, 0, 0])
    assert found.__name__ == found.name == "mine_for_test:corner"
    assert (found.about, found.differentiable, found.smooth, found.indicator) == ("Top left pixel.", True, True, None)
    with pytest.raises(UserError, match="declares smooth = 'very'; allowed: True, False"):
        statistic_named("mine_for_test:wrong")
    with pytest.raises(UserError, match="imports 'no_such_thing_at_all', which is not installed"):
        statistic_named("needs_for_test:f")
    sys.modules.pop("mine_for_test", None)
