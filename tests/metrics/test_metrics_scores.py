"""Feature networks and the scorer on the bundled data."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowvar.data import Data, TensorImages, load
from lowvar.metrics import (
    METRICS,
    Scorer,
    digit_classifier,
    energy_distance,
    extractor_for,
    frechet_distance,
    frechet_metric,
    kernel_distance,
    mean_error,
    random_features,
    sliced_wasserstein,
    spectrum_error,
)
from lowvar.process.noise import Independent


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits")


@pytest.fixture(scope="module")
def scorer(digits: Data) -> Scorer:
    return Scorer(digits)


@pytest.fixture(scope="module")
def samples(digits: Data) -> Tensor:
    """Training digits with noise: 1,197 samples of a middling sampler, some outside [-1, 1]."""
    x = digits.train.all()
    return x + 0.2 * Independent(1).normal(range(len(x)), digits.shape)


def test_the_classifier_is_accurate_reproducible_and_leaves_the_global_generator_alone(scorer: Scorer, digits: Data):
    extractor = scorer.extractor
    assert extractor is not None
    assert extractor.accuracy is not None
    assert extractor.accuracy >= 0.97
    assert extractor.num_features == 32
    assert extractor_for(digits) is extractor
    state = torch.random.get_rng_state()
    a, b = digit_classifier(digits, seed=3, updates=3), digit_classifier(digits, seed=3, updates=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert a.hash == b.hash != digit_classifier(digits, seed=4, updates=3).hash
    assert a.hash != extractor.hash
    assert len(a.hash) == 12


def test_the_classifier_can_be_kept_on_disk_and_trained_in_inference_mode(digits: Data, tmp_path: Path):
    with torch.inference_mode():
        a = digit_classifier(digits, updates=3, cache=tmp_path / "new")
    assert [p.suffix for p in (tmp_path / "new").iterdir()] == [".safetensors"]
    b = digit_classifier(digits, updates=3, cache=tmp_path / "new")
    assert a.hash == b.hash
    assert a.accuracy == b.accuracy
    assert not any(p.requires_grad for p in b.parameters())


def test_the_classifiers_weights_do_not_depend_on_the_number_of_threads_which_is_left_as_it_was(digits: Data):
    before, hashes = torch.get_num_threads(), set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            hashes.add(digit_classifier(digits, updates=5).hash)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(hashes) == 1


def test_features_do_not_depend_on_the_batch_and_have_full_rank(scorer: Scorer, digits: Data):
    assert scorer.extractor is not None
    x = digits.test.all()
    f = scorer.extractor.features(x)
    assert f.shape == (300, 32)
    assert f.dtype == torch.float64
    assert torch.allclose(f, scorer.extractor.features(x, batch_size=7), atol=1e-4)
    assert torch.linalg.matrix_rank(torch.cov(f.mT)) == 32


def test_random_features_are_fixed_by_the_seed_and_standardised():
    data = load("photos", size=12)
    a, b, c = random_features(data.train), random_features(data.train), random_features(data.train, seed=1)
    assert a.hash == b.hash != c.hash
    assert a.accuracy is None
    assert a.num_features == 64
    f = a.features(data.train.images(range(2000)))
    assert torch.allclose(f.mean(0), torch.zeros(64, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(f.std(0), torch.ones(64, dtype=torch.float64), atol=1e-3)
    assert extractor_for(data).name == "random-convolutions"
    assert random_features(TensorImages(torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1)), num_features=8).num_features == 8
    with pytest.raises(ValueError, match="at least 10"):
        random_features(data.train, num_features=9)


def test_labels_are_needed_for_a_classifier():
    with pytest.raises(ValueError, match="random_features"):
        digit_classifier(load("photos", size=8))


def test_values_are_those_of_the_plain_functions_after_the_clip(scorer: Scorer, digits: Data, samples: Tensor):
    found = scorer.score(samples)
    x, y = samples.clamp(-1, 1), digits.test.all()
    assert scorer.extractor is not None
    f, g = scorer.extractor.features(x), scorer.extractor.features(y)
    assert list(found) == list(METRICS)
    assert found["frechet"].value == pytest.approx(frechet_distance(f, g), rel=1e-9)
    assert found["kernel"].value == pytest.approx(kernel_distance(f, g), rel=1e-9)
    assert found["energy"].value == pytest.approx(energy_distance(x, y), abs=1e-10)
    assert found["sliced_wasserstein"].value == pytest.approx(sliced_wasserstein(x, y), rel=1e-9)
    assert found["mean"].value == pytest.approx(mean_error(x, y), rel=1e-9)
    assert found["spectrum"].value == pytest.approx(spectrum_error(x, y), rel=1e-9)
    metric = frechet_metric(scorer.extractor)
    metric.update(y, real=True)
    metric.update(x, real=False)
    assert found["frechet"].value == pytest.approx(metric.compute().item(), rel=1e-4)


def test_rows_are_the_records_of_summary_json(scorer: Scorer, samples: Tensor):
    import json

    rows = scorer.rows(samples, sampler="ddim", steps=10)
    assert [set(r) for r in rows] == [{"sampler", "steps", "metric", "value", "low", "high"}] * len(METRICS)
    assert all(r["low"] < r["value"] < r["high"] for r in rows)
    assert json.loads(json.dumps(rows)) == rows
    assert json.loads(json.dumps(scorer.description))["reference"] == 300


def test_the_floor_is_small_and_below_damaged_data(scorer: Scorer, samples: Tensor):
    floor, damaged = scorer.floor(), scorer.score(samples)
    for name in ("frechet", "sliced_wasserstein", "mean", "spectrum"):
        assert 0 < floor[name].value < damaged[name].value
    for name in ("energy", "kernel"):  # unbiased: about 0, either sign
        assert not floor[name].excludes(0.0)
        assert damaged[name].low > floor[name].value
    assert floor["frechet"].value < 1.5
    assert floor["energy"].value < 0.01
    assert scorer.floor(n=200)["frechet"].value > floor["frechet"].value  # the bias grows as n falls


def test_a_gaussian_with_the_datas_moments_is_told_apart_in_features(scorer: Scorer, digits: Data):
    x = digits.train.all().flatten(1).double()
    root = torch.linalg.cholesky(torch.cov(x.mT) + 1e-6 * torch.eye(64))
    z = Independent(2).normal(range(1197), (64,), dtype=torch.float64)
    twin = (x.mean(0) + z @ root.mT).reshape(-1, 1, 8, 8)
    found = scorer.score(twin.float())
    assert found["frechet"].low > 4 * scorer.floor()["frechet"].value
    assert energy_distance(twin, digits.test.all()) < 0.02  # unclipped, the energy distance hardly sees it


def test_paired_differences_see_what_separate_intervals_do_not(scorer: Scorer, digits: Data):
    x = digits.train.all()
    noise = Independent(1).normal(range(len(x)), digits.shape)
    a, b = x + 0.05 * noise, x + 0.07 * noise
    paired = scorer.paired(a, b, "frechet")
    separate = scorer.score(a, ("frechet",))["frechet"], scorer.score(b, ("frechet",))["frechet"]
    assert paired.high < 0
    assert not separate[0].excludes(separate[1].value)
    assert paired.value == pytest.approx(separate[0].value - separate[1].value, abs=1e-9)
    kept = scorer.replicates(a)["frechet"].minus(scorer.replicates(b)["frechet"]).interval()
    assert kept == paired


def test_blur_noise_and_lost_contrast_of_photos_are_seen_in_random_features():
    data = load("photos")
    small = Data("small", data.train, data.calibration, TensorImages(data.test.images(range(2000))), 256, "x")
    scorer = Scorer(small, metrics=("frechet",))
    x = data.train.images(range(2000))
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noisy = x + 0.05 * Independent(1).normal(range(2000), data.shape)
    for damaged in (blurred, noisy, 0.8 * x):
        assert scorer.paired(x, damaged, "frechet").high < 0


def test_every_score_of_photos_has_an_interval_around_it():
    data = load("photos", size=8)
    small = Data("small", data.train, data.calibration, TensorImages(data.test.images(range(500))), 256, "x")
    floor = Scorer(small, blocks=16).floor(n=400)
    assert list(floor) == list(METRICS)
    assert all(i.low < i.value < i.high for i in floor.values())


def test_bad_arguments_are_refused(scorer: Scorer, digits: Data, samples: Tensor):
    with pytest.raises(ValueError, match="give names from frechet"):
        Scorer(digits, metrics=("fid",))
    with pytest.raises(ValueError, match="at least 16"):
        Scorer(digits, metrics=("mean",), blocks=4)
    with pytest.raises(ValueError, match="shape"):
        scorer.score(samples[:, :, :4])
    with pytest.raises(ValueError, match="draw at least 64"):
        scorer.score(samples[:63])
    diverged = samples.clone()
    diverged[3, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="diverged"):
        scorer.score(diverged)
    with pytest.raises(ValueError, match="different blocks"):
        scorer.paired(samples, samples[:-64], "mean")
    with pytest.raises(ValueError, match="give names from mean"):
        Scorer(digits, metrics=("mean",)).score(samples, ("energy",))
