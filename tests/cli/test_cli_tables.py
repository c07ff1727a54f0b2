"""The commands on a table: the wines of scikit-learn with a text, a constant and a class added."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowvar.cli import main
from lowvar.pipelines import TablePipeline, open_pipeline

torch.set_num_threads(1)

CONFIG = "network: {width: 8, levels: 1}\nwarmup: 0\n"


def wines(path: Path) -> Path:
    from sklearn.datasets import load_wine

    bunch: Any = load_wine()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(name.replace("/", " ") for name in bunch.feature_names), "soil", "litres", "label"])
        for i, (row, kind) in enumerate(zip(bunch.data, bunch.target, strict=True)):
            writer.writerow([*row, ("clay", "lime", "sand")[i % 3], 0.75, bunch.target_names[kind]])
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wine.csv, and RUN and CAL made of it by the commands."""
    folder = tmp_path_factory.mktemp("tables")
    data = wines(folder / "wine.csv")
    (folder / "config.yaml").write_text(CONFIG)
    words = ["train", "--data", data, "--out", folder / "RUN", "--updates", 2, "--batch-size", 8]
    assert main([*map(str, words), "--config", str(folder / "config.yaml"), "--quiet"]) == 0
    words = ["calibrate", "--model", folder / "RUN", "--data", data, "--out", folder / "CAL", "--choose", 0]
    assert main([*map(str, words), "--n", "16", "--replicates", "1", "--steps", "2", "--quiet"]) == 0
    return folder


def test_a_trained_table_is_a_pipeline_folder(folder: Path) -> None:
    index = json.loads((folder / "RUN" / "model_index.json").read_text())
    assert index["_class_name"] == "TablePipeline"
    assert index["network"] == ["lowvar.models", "ResidualMLP"]
    assert (folder / "RUN" / "network" / "diffusion_pytorch_model.safetensors").is_file()
    assert (folder / "RUN" / "report.html").is_file()
    a, b = open_pipeline(folder / "RUN"), TablePipeline.from_pretrained(folder / "RUN")
    assert isinstance(a, TablePipeline)
    assert a.columns == b.columns
    assert a.columns.classes == ("class_0", "class_1", "class_2")
    assert a.columns.width == 16  # 13 numbers and 3 soils
    weights = b.components["network"].state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in a.components["network"].state_dict().items())
    a.set_progress_bar_config(disable=True)
    made = a(5, torch.Generator().manual_seed(1), num_inference_steps=3)
    assert tuple(made.samples.shape) == (5, 16)
    assert made.table["litres"] == [0.75] * 5
    assert set(made.table["soil"]) <= {"clay", "lime", "sand"}


@pytest.mark.parametrize("run", ["RUN", "CAL"])
def test_samples_come_in_their_own_units(lowvar, folder: Path, tmp_path: Path, run: str) -> None:
    words = ["sample", "--model", folder / run, "--steps", 10, "--n", 64, "--seed", 0]
    done = lowvar(*words, "--out", tmp_path / "samples.npz", "--csv", tmp_path / "samples.csv", "--json")
    assert done.status == 0, done.err
    assert done.json["shape"] == [15]
    with np.load(tmp_path / "samples.npz") as found:
        samples, names = found["samples"], found["columns"].tolist()
    assert samples.shape == (64, 15)
    rows = list(csv.DictReader((tmp_path / "samples.csv").read_text().splitlines()))
    assert list(rows[0]) == names
    table = list(csv.DictReader((folder / "wine.csv").read_text().splitlines()))
    for k, name in enumerate(names):
        if name == "soil":
            assert [("clay", "lime", "sand")[int(v)] for v in samples[:, k]] == [row[name] for row in rows]
            continue
        values = [float(row[name]) for row in table]
        assert min(values) <= samples[:, k].min() <= samples[:, k].max() <= max(values)
        assert [float(row[name]) for row in rows] == samples[:, k].tolist()
    assert bool((samples[:, names.index("proline")] == samples[:, names.index("proline")].round()).all())


def test_evaluation_scores_rows_in_their_coordinates(lowvar, folder: Path, tmp_path: Path) -> None:
    words = ["evaluate", "--model", folder / "CAL", "--data", folder / "wine.csv", "--out", tmp_path / "E"]
    own = ["--samplers", "ddpm-basis,twin-flow", "--against", "ddim,unipc,ddpm,sde-dpmsolver++"]
    done = lowvar(*words, *own, "--steps", 2, "--n", 64, "--json")
    assert done.status == 0, done.err
    assert done.json["scores"]["extractor"] == "coordinates"
    assert done.json["scores"]["features"] == 16
    found = {row["sampler"] for row in done.json["rows"]}
    assert {"ddpm-basis", "twin-flow", "diffusers:unipc", "diffusers:sde-dpmsolver++"} <= found
    assert all(np.isfinite(row["value"]) for row in done.json["rows"])


def test_tables_by_class_of_a_table(lowvar, folder: Path, tmp_path: Path) -> None:
    """A conditional model of rows: guided tables of its classes, and a pipeline that begins without an evaluation."""
    data = ["--data", folder / "wine.csv"]
    words = ["train", *data, "--conditional", "--config", folder / "config.yaml", "--updates", 2, "--batch-size", 8]
    done = lowvar(*words, "--out", tmp_path / "RUN")
    assert done.status == 0, done.err
    words = ["calibrate", "--model", tmp_path / "RUN", *data, "--by-class", "--guidance", 2, "--choose", 0]
    done = lowvar(*words, "--n", 16, "--replicates", 1, "--steps", 2, "--out", tmp_path / "CAL", "--json")
    assert done.status == 0, done.err
    assert done.json["by_class"]["classes"] == ["class_0", "class_1", "class_2"]
    assert sum(done.json["by_class"]["images"]) == 16
    words = ["sample", "--model", tmp_path / "CAL", "--label", "class_1", "--guidance", 2, "--sampler", "ddpm-basis"]
    done = lowvar(*words, "--steps", 3, "--n", 4, "--out", tmp_path / "s.npz")
    assert done.status == 0, done.err
    pipeline = open_pipeline(tmp_path / "CAL")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config["start_with_twin"] == "input"
    made = pipeline(5, torch.Generator().manual_seed(1), 3, class_labels=1, guidance_scale=2.0)
    assert bool(torch.isfinite(made.samples).all())
    renamed = (folder / "wine.csv").read_text().replace("class_1", "other")
    (tmp_path / "other.csv").write_text(renamed)
    words = ["calibrate", "--model", tmp_path / "RUN", "--data", tmp_path / "other.csv", "--by-class"]
    done = lowvar(*words, "--out", tmp_path / "no")
    assert done.status == 2
    assert "give the data that it was trained on" in done.sentence


def test_what_makes_no_sense_for_tables_is_refused(lowvar, folder: Path, tmp_path: Path) -> None:
    def refused(*words: object) -> str:
        done = lowvar(*words)
        assert done.status == 2, done.err
        return done.sentence

    data, out = ["--data", folder / "wine.csv"], ["--out", tmp_path / "out"]
    sample = ["sample", "--model", folder / "RUN", "--out", tmp_path / "s.npz"]
    assert "--png draws images" in refused(*sample, "--png", tmp_path / "s.png")
    assert "ends in .csv" in refused(*sample, "--csv", tmp_path / "s.txt")
    assert "size is 8" in refused("train", *data, *out, "--size", 8)
    dct = tmp_path / "dct.yaml"
    dct.write_text(CONFIG + "head: basis\n")
    assert "give basis: pca" in refused("train", *data, *out, "--config", dct)
    dct.write_text("network: {attention: true}\n")
    assert "attention is true" in refused("train", *data, *out, "--config", dct)
    sentence = refused("calibrate", "--model", folder / "RUN", "--data", "digits", *out)
    assert sentence == "the network takes rows of a table and the data are images; give data that fit"
    (tmp_path / "t.csv").write_text("a,b\n" + "".join(f"{i},{i * i}\n" for i in range(60)))
    sentence = refused("calibrate", "--model", folder / "RUN", "--data", tmp_path / "t.csv", *out)
    assert "takes rows of 16 numbers and the table has 2" in sentence
    (tmp_path / "nan.csv").write_text("a,b\n" + "".join(f"{i},{'' if i == 4 else i}\n" for i in range(60)))
    assert "'b' of" in refused("train", "--data", tmp_path / "nan.csv", *out)
    index = folder / "RUN" / "model_index.json"
    kept = index.read_text()
    try:
        index.write_text(kept.replace('"ResidualMLP"', '"BaseOutput"'))
        assert "there is ResidualMLP only" in refused(*sample)
    finally:
        index.write_text(kept)


def test_a_tables_network_goes_on_in_another_run(lowvar, folder: Path, tmp_path: Path) -> None:
    words = ["train", "--data", folder / "wine.csv", "--updates", 1, "--batch-size", 4, "--quiet"]
    own = ["--network", folder / "RUN", "--network-weights", "kept"]
    done = lowvar(*words, *own, "--out", tmp_path / "A")
    assert done.status == 0, done.err
    a, b = (open_pipeline(run).components["network"].state_dict() for run in (folder / "RUN", tmp_path / "A"))
    assert all(float((a[k] - b[k]).abs().max()) < 0.01 for k in a)  # one update of a warm-up away
    done = lowvar("train", "--data", "digits", *words[3:], *own, "--out", tmp_path / "B")
    assert "is for rows of a table, and the data are images" in done.sentence


def test_heads_on_tables_train(lowvar, folder: Path, tmp_path: Path) -> None:
    for head in ("logvar", "lowrank", "basis"):
        (tmp_path / "c.yaml").write_text(CONFIG + f"head: {head}\n" + ("basis: pca\n" if head == "basis" else ""))
        words = ["--config", tmp_path / "c.yaml", "--updates", 2, "--batch-size", 8, "--quiet"]
        done = lowvar("train", "--data", folder / "wine.csv", "--out", tmp_path / head, *words)
        assert done.status == 0, done.err
        done = lowvar("sample", "--model", tmp_path / head, "--out", tmp_path / f"{head}.npz", "--n", 4, "--steps", 2)
        assert done.status == 0, done.err
