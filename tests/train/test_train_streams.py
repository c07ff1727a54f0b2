"""Training on a stream: exact resume, the draws of plans, what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowvar.data import Stream, StreamData, TensorImages, load
from lowvar.errors import UserError
from lowvar.process import CosineVP
from lowvar.train import CrossPairs, DrawPlan, Trainer, UniformTimes, config_from
from lowvar.train.conditional import Classes, classes_of

torch.set_num_threads(1)

BASE = {"updates": 9, "batch_size": 8, "warmup": 0, "head": "none", "checkpoint_every": 2, "validate_every": 4}
DIGITS = load("digits")
IMAGES = DIGITS.train.images(range(30))  # 9 updates see 2.4 epochs


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + timestep[:, None, None, None] / 1000))


def stream(**more: Any) -> Stream:
    def items(epoch: int) -> Iterator[Tensor]:
        yield from IMAGES

    return Stream(items, (1, 8, 8), **{"buffer": 7, **more})


def trainer(folder: Path | None = None, resume: bool = False, **settings: Any) -> Trainer:
    data = StreamData(stream(), DIGITS.calibration, levels=17)
    return Trainer(data, config_from(BASE | settings), folder, network=Small(), resume=resume, device="cpu")


def run(made: Trainer, until: int | None = None) -> Trainer:
    for _ in made.run():
        if until is not None and made.update >= until:
            break
    return made


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pairing": "cross", "stratified": True, "times": "loss-second-moment"},
        {"coupling": "optimal-transport"},
        {"noise_scale_every": 2, "pairing": "sobol"},
        {"process": "edm", "sigma_data": "data"},
        {"head": "basis", "basis": "pca"},
    ],
)
def test_interrupted_runs_go_on_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    if "head" in settings:
        settings = settings | {"network": {"width": 8}}

        def made(folder: Path, resume: bool = False) -> Trainer:
            data = StreamData(stream(), DIGITS.calibration, levels=17)
            return Trainer(data, config_from(BASE | settings), folder, resume=resume, device="cpu")
    else:

        def made(folder: Path, resume: bool = False) -> Trainer:
            return trainer(folder, resume, **settings)

    whole = run(made(tmp_path / "whole")).ema_network().state_dict()
    run(made(tmp_path / "cut"), until=7)
    cut = run(made(tmp_path / "cut", resume=True)).ema_network().state_dict()
    assert all(torch.equal(v, cut[k]) for k, v in whole.items())


def test_plans_take_places_in_order() -> None:
    plain = DrawPlan(stream(), CosineVP(), batch_size=6, seed=3)
    order = stream().images(range(36))
    draws = plain.draws(0, UniformTimes())
    for update in range(3):
        draws = plain.draws(update, UniformTimes())
        assert draws.image.tolist() == list(range(6 * update, 6 * update + 6))
        assert torch.equal(draws.x0, order[6 * update : 6 * update + 6])
        half = DrawPlan(stream(), CosineVP(), batch_size=6, seed=3).draws(update, UniformTimes(), part=1, parts=2)
        assert torch.equal(half.x0, draws.x0[3:])
        assert torch.equal(half.eps, draws.eps[3:])
    of_set = DrawPlan(DIGITS.train, CosineVP(), batch_size=6, seed=3).draws(2, UniformTimes())
    assert torch.equal(of_set.eps, draws.eps)  # noise and times know nothing of the data
    assert torch.equal(of_set.level.t, draws.level.t)
    pairs = DrawPlan(stream(), CosineVP(), batch_size=6, pairing=CrossPairs()).draws(1, UniformTimes())
    assert pairs.image.tolist() == list(range(6, 12))
    with pytest.raises(ValueError, match="no permutation"):
        plain.permutation(0)
    with pytest.raises(ValueError, match="a stream has an order of its own"):
        DrawPlan(stream(), CosineVP(), batch_size=2, labels=torch.zeros(30))


def test_without_a_buffer_the_order_is_the_streams_own() -> None:
    images = IMAGES[:8]
    data = StreamData(Stream(list(images), (1, 8, 8), buffer=1), DIGITS.calibration, levels=17)
    made = Trainer(data, config_from(BASE | {"updates": 1}), network=Small(), device="cpu")
    draws = made.plan.draws(0, made.times)
    assert torch.equal(draws.x0, images)
    assert made._known.train.images(torch.arange(8)).equal(images)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"target": "stable"}, "target is stable, which refers to images of the whole data set"),
        ({"strata": "cluster"}, "strata is cluster, which sorts the images"),
        ({"strata": "class"}, "give strata none, or data that can be looked into"),
        ({"conditional": True}, "conditional is true, and the stream has no label; give Stream"),
        ({"variance_reduction": "auto"}, "give target plain"),
    ],
)
def test_what_needs_the_whole_set_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        trainer(**settings)


LABELS = DIGITS.train.labels


class SmallOfClasses(Small):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"num_class_embeds": 11}
        self.of = nn.Embedding(11, 4)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        assert class_labels is not None
        h = self.first(x) + timestep[:, None, None, None] / 1000 + self.of(class_labels)[:, :, None, None]
        return self.last(torch.tanh(h))


def labelled(
    folder: Path | None = None, resume: bool = False, *, names: tuple[str, ...] = tuple("0123456789"), **settings: Any
) -> Trainer:
    assert LABELS is not None
    items = list(zip(IMAGES, LABELS[:30].tolist(), strict=True))
    source = Stream(items, (1, 8, 8), buffer=7, label=lambda item: item[1])
    data = StreamData(source, DIGITS.calibration, levels=17, classes=names)
    config = config_from(BASE | {"conditional": True, "condition_dropout": 0.25} | settings)
    return Trainer(data, config, folder, network=SmallOfClasses(), resume=resume, device="cpu")


def test_classes_come_with_the_items() -> None:
    """Each sample is trained with the class of the very image that it is, or with none; the share of none is p."""
    assert LABELS is not None
    made = labelled(batch_size=30, pairing="cross", noise_scale_every=1)
    classes, dropped = made.classes, 0
    assert classes is not None
    for update in range(8):
        draws = made.plan.draws(update, made.times)
        which = torch.cdist(draws.x0.flatten(1), IMAGES.flatten(1)).argmin(1)
        told = classes.labels(draws.number, draws.image)
        none = told == 10
        dropped += int(none.sum())
        assert torch.equal(told[~none], LABELS[which][~none])
        assert torch.equal(classes.known(draws.number, draws.image) == -1, none)
    assert 40 < dropped < 80
    assert torch.equal(classes.train, classes.stream.classes(range(30)))  # type: ignore[union-attr]


def test_conditional_runs_go_on_exactly(tmp_path: Path) -> None:
    whole = run(labelled(tmp_path / "whole")).ema_network().state_dict()
    run(labelled(tmp_path / "cut"), until=7)
    again = labelled(tmp_path / "cut", resume=True)
    assert again.classes is not None
    assert again.classes.stream is again.plan.images
    cut = run(again).ema_network().state_dict()
    assert all(torch.equal(v, cut[k]) for k, v in whole.items())
    with pytest.raises(UserError, match="data"):  # other names, other data
        labelled(tmp_path / "cut", resume=True, names=tuple("abcdefghij"))


def test_classes_that_do_not_fit_are_refused() -> None:
    def data(label: Any, count: int = 2) -> StreamData:
        held = TensorImages(IMAGES[:4], torch.arange(4) % count)
        return StreamData(Stream(list(IMAGES), (1, 8, 8), buffer=1, label=label), held, levels=17)

    numbers = iter(range(10**6))
    with pytest.raises(UserError, match=r"place 0 of the stream has class 0\.5; give label"):
        classes_of(data(lambda item: 0.5), 0.1)
    with pytest.raises(UserError, match=r"place 1 of the stream has class -1"):
        classes_of(data(lambda item: -next(numbers)), 0.1)
    with pytest.raises(UserError, match="what is held out has no classes"):
        classes_of(StreamData(data(lambda item: 0).train, TensorImages(IMAGES[:4])), 0.1)
    with pytest.raises(UserError, match="the data have no classes"):
        classes_of(data(lambda item: 1), 0.1)
    with pytest.raises(ValueError, match="has no label"):
        stream().classes([0])
    found = Classes(2, torch.tensor([0, 1]), torch.tensor([0]), 0.0, stream=data(lambda item: torch.tensor(3)).train)
    with pytest.raises(UserError, match="place 5 of the stream has class 3, and there are 2 classes, 0 to 1; name"):
        found.labels(torch.tensor([0]), torch.tensor([5]))


def test_another_stream_is_refused_on_resume(tmp_path: Path) -> None:
    run(trainer(tmp_path), until=5)
    data = StreamData(stream(buffer=3), DIGITS.calibration, levels=17)
    with pytest.raises(UserError, match="data"):
        Trainer(data, config_from(BASE), tmp_path, network=Small(), resume=True, device="cpu")


SCRIPT = """
import sys, torch; torch.set_num_threads(1)
from torch import nn
from lowvar.data import Stream, StreamData, load
from lowvar.train import Trainer, config_from

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
    def forward(self, x, timestep):
        return self.last(torch.tanh(self.first(x) + timestep[:, None, None, None] / 1000))

digits = load("digits")
images = digits.train.images(range(30))
data = StreamData(Stream(lambda epoch: iter(images), (1, 8, 8), buffer=7), digits.calibration, levels=17)
folder, updates, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"
config = config_from({
    "updates": 9, "batch_size": 8, "warmup": 0, "head": "none", "checkpoint_every": 2, "validate_every": 4,
    "pairing": "cross", "stratified": True, "coupling": "none", "noise_scale_every": 3,
})
trainer = Trainer(data, config, folder, network=Small(), resume=resume, device="cpu")
for _ in trainer.run():
    if trainer.update >= updates: break
if trainer.accelerator.is_main_process:
    torch.save(trainer.ema_network().state_dict(), folder + "/final.pt")
"""


@pytest.mark.slow
def test_processes_share_a_stream_and_an_own_network(tmp_path: Path) -> None:
    """Two processes learn what one does (to rounding), also when they go on after an interruption."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def trained(name: str, processes: int, *words: str) -> dict[str, Tensor]:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        run = [sys.executable, *(launch if processes > 1 else []), str(script), str(tmp_path / name), *words]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return torch.load(tmp_path / name / "final.pt", weights_only=True)

    one, two = trained("one", 1, "9", "new"), trained("two", 2, "9", "new")
    assert all(torch.allclose(v, two[k], atol=1e-5) for k, v in one.items())
    trained("cut", 2, "7", "new")
    cut = trained("cut", 2, "9", "resume")
    assert all(torch.allclose(v, two[k], atol=1e-6) for k, v in cut.items())
