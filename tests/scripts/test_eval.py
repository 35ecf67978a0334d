"""The scripts in eval/, as a user runs them: on a run folder and a folder of photos."""

import dataclasses
import json
import subprocess
import sys

import attentive
import extract
import fewshot
import knn
import linear
import pytest
import table
import torch
from conftest import ROOT, TINY, write_photo
from safetensors import safe_open
from safetensors.torch import load_file

from scott_sparse import Encoder, save_encoder
from scott_sparse.data.dataset import DataConfig
from scott_sparse.evaluation import probe as protocol
from scott_sparse.evaluation.probe import Question

PROBES = {
    "knn": (knn, Question, {}),
    "linear": (linear, linear.LinearQuestion, {}),
    "attentive": (attentive, attentive.AttentiveQuestion, {"epochs": 10}),
    "fewshot": (fewshot, Question, {}),
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What train/pretrain.py leaves, as far as an evaluation needs it; the encoder is as it was initialised."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(3)
    encoder = Encoder(dataclasses.replace(TINY, patch_size=8))
    save_encoder(encoder, folder)
    encoder.mask_token.data += 1  # another hash, the same answers
    save_encoder(encoder, folder, weights="context")
    (folder / "recipe.json").write_text(json.dumps({"image_size": 16, "seed": 3}))
    return folder


@pytest.fixture(scope="module")
def photos_folder(tmp_path_factory):
    """Three classes of three colours, with a test set."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for first, split, count in ((0, "train", 24), (100, "test", 8)):
        for label, name in enumerate("abc"):
            for i in range(count):
                path = root / split / name / f"{i}.png"
                write_photo(path, 20, 24, seed=first + 200 * label + i, channel=label)
    return root


def ask(probe, run, photos, cache, **fields):
    module, question, more = PROBES[probe]
    protocol_of = fields.pop("protocol", "clean")
    source = DataConfig(data=str(photos), cache_dir=cache, protocol=protocol_of)
    module.main(question(run=str(run), source=source, out=cache / "eval", **{**more, **fields}))
    return {path.stem: json.loads(path.read_text()) for path in (cache / "eval").glob("*.json")}


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("init", [None, "random", "pixels"])
def test_a_probe_writes_its_answer(probe, init, run_folder, photos_folder, tmp_path, capsys):
    (name,) = answers = ask(probe, run_folder, photos_folder, tmp_path, init=init)
    assert name == f"{probe}-photos" + (f"-{init}" if init else "")
    answer = answers[name]
    assert answer["protocol"] == "clean" and answer["chosen_on"] == "val" and len(answer["weights_hash"]) == 32
    assert answer["images"] == {"train": 66, "val": 6, "test": 24} and answer["classes"] == ["a", "b", "c"]
    assert {"data_fingerprint", "seconds", "commit", "versions", "command"} <= set(answer)
    test = answer["test"]
    assert test["n"] == 24 and len(test["per_class"]) == 3 and sum(map(sum, test["confusion"])) == 24
    assert test["top1_interval"][0] <= test["top1"] <= test["top1_interval"][1]
    if probe != "fewshot":
        assert answer["choice"].items() <= max(answer["settings_tried"], key=lambda s: s["top1"]).items()
        assert answer["val"]["top1"] == max(s["top1"] for s in answer["settings_tried"])
        assert test["top1"] > 60  # chance is 33; each class has a colour
    else:
        assert set(answer["shots"]) == {"1", "5", "10"} and len(answer["shots"]["5"]["top1"]["all"]) == 5
    assert (tmp_path / "eval" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert name in capsys.readouterr().out


def test_random_is_the_runs_own_initialisation(run_folder, photos_folder, tmp_path):
    answers = ask("knn", run_folder, photos_folder, tmp_path)
    answers = ask("knn", run_folder, photos_folder, tmp_path, init="random")
    assert answers["knn-photos"]["weights_hash"] == answers["knn-photos-random"]["weights_hash"]
    answers = ask("knn", run_folder, photos_folder, tmp_path, weights="context")
    assert answers["knn-photos"]["weights_hash"] != answers["knn-photos-context"]["weights_hash"]


def test_the_first_weights_of_a_run_are_those_of_its_seed(tmp_path, photos_folder, monkeypatch):
    """Of a real run, whose learning rate is next to nothing."""
    import pretrain

    tiny = [
        "small-data",
        "--image-size",
        "16",
        "--size",
        "demo",
        "--batch-size",
        "8",
        "--stem-width",
        "8",
        "--lr",
        "1e-30",
    ]
    tiny += ["--lr-start", "1e-30", "--lr-final", "1e-30", "--epochs", "0.3", "--warmup-epochs", "0", "--seed", "5"]
    arguments = [*tiny, "--data", str(photos_folder), "--cache-dir", str(tmp_path), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    pretrain.main()
    first = protocol.open_subject(Question(run=str(tmp_path / "run"), init="random")).model.encoder.state_dict()
    for file in ("encoder.safetensors", "context.safetensors"):
        for name, tensor in load_file(tmp_path / "run" / file).items():
            torch.testing.assert_close(tensor, first[name], atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("probe", ["knn", "linear", "attentive"])
def test_shuffled_test_labels_do_not_move_the_choice(probe, run_folder, photos_folder, tmp_path, monkeypatch):
    """If they did, the choice would have seen them."""
    before = ask(probe, run_folder, photos_folder, tmp_path / "a")[f"{probe}-photos"]
    open_data = protocol.open_data

    def shuffled(*arguments, **options):
        data = open_data(*arguments, **options)
        data.test.labels[:] = data.test.labels.roll(1)
        return data

    monkeypatch.setattr(protocol, "open_data", shuffled)
    after = ask(probe, run_folder, photos_folder, tmp_path / "b")[f"{probe}-photos"]
    assert after["choice"] == before["choice"] and after["settings_tried"] == before["settings_tried"]
    assert after["val"] == before["val"] and after["test"]["top1"] < before["test"]["top1"]


def test_test_is_answered_once_and_by_the_choice_alone(run_folder, photos_folder, tmp_path, monkeypatch):
    asked = []
    answers = knn.KNNProbe.answers

    def watched(self, features, settings):
        asked.append((len(features.pooled), len(list(settings))))
        return answers(self, features, settings)

    monkeypatch.setattr(knn.KNNProbe, "answers", watched)
    ask("knn", run_folder, photos_folder, tmp_path)
    assert asked == [(6, 6), (24, 1)]  # k = 1, 5, 10, 20, 50, and 66, which is the whole bank


def test_the_paper_protocol_says_so(run_folder, photos_folder, tmp_path):
    """No val was published: the choice is made on test, by all of train."""
    answer = ask("knn", run_folder, photos_folder, tmp_path, protocol="paper")["knn-photos-paper"]
    assert answer["protocol"] == "paper" and answer["chosen_on"] == "test"
    assert answer["images"] == {"train": 72, "val": 24, "test": 24} and answer["val"] == answer["test"]


def test_a_run_that_has_seen_test_is_not_evaluated_as_clean(run_folder, photos_folder, tmp_path):
    seen = {"data": {"source": str(photos_folder), "protocol": "paper"}}
    (run_folder / "summary.json").write_text(json.dumps(seen))
    try:
        with pytest.raises(ValueError, match="on the test images too: --protocol paper"):
            ask("knn", run_folder, photos_folder, tmp_path)
        ask("knn", run_folder, photos_folder, tmp_path, init="random")
        answer = ask("knn", run_folder, photos_folder, tmp_path, protocol="paper")["knn-photos-paper"]
        assert answer["pretraining"] == seen["data"] and answer["pretrained_on_this_data"]
    finally:
        (run_folder / "summary.json").unlink()


def test_features_are_extracted_once(run_folder, photos_folder, tmp_path, monkeypatch):
    ask("knn", run_folder, photos_folder, tmp_path)
    monkeypatch.setattr(protocol, "extract", None)
    ask("linear", run_folder, photos_folder, tmp_path)


def test_one_process_and_two_give_the_same_numbers(run_folder, photos_folder, tmp_path, clean_environment):
    launch = {
        1: [sys.executable],
        2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }
    results = []
    for processes, command in launch.items():
        out = tmp_path / str(processes)
        arguments = ["eval/linear.py", run_folder, "--data", photos_folder, "--cache-dir", out, "--out", out / "eval"]
        done = subprocess.run([*command, *arguments], cwd=ROOT, env=clean_environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        answer = json.loads((out / "eval" / "linear-photos.json").read_text())
        features = {path.name: load_file(path) for path in sorted((out / "features").iterdir())}
        results.append(({k: answer[k] for k in ("choice", "val", "test", "settings_tried")}, features))
    (one, features_of_one), (two, features_of_two) = results
    assert one == two
    assert list(features_of_one) == list(features_of_two)
    for name, tensors in features_of_one.items():
        assert torch.equal(tensors["pooled"], features_of_two[name]["pooled"])


def test_extract(run_folder, photos_folder, tmp_path, capsys):
    file = tmp_path / "features.safetensors"
    source = DataConfig(data=str(photos_folder), cache_dir=tmp_path)
    extract.main(extract.ExtractQuestion(run=str(run_folder), source=source, file=file, patches=True))
    tensors = load_file(file)
    assert {name: tuple(x.shape) for name, x in tensors.items()} == {
        "embeddings": (96, 32),
        "blocks": (96, 2, 32),
        "patches": (96, 4, 32),
    }
    torch.testing.assert_close(tensors["patches"].float().mean(1), tensors["embeddings"], atol=2e-3, rtol=0)
    with safe_open(file, "pt") as opened:
        names = json.loads(opened.metadata()["names"])
    assert len(set(names)) == 96 and "train/a/0.png" in names and "test/c/7.png" in names
    assert "embeddings (96, 32)" in capsys.readouterr().out


def test_table(run_folder, photos_folder, tmp_path, capsys):
    for probe in ("knn", "fewshot"):
        ask(probe, run_folder, photos_folder, tmp_path)
    ask("knn", run_folder, photos_folder, tmp_path, init="pixels")
    capsys.readouterr()
    table.main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "photos, clean protocol" in out and "| knn | 1 shot | 5 shots | 10 shots |" in out
    assert "| run pretrained | 100.0 ± " in out and "| run pixels | 100.0 ± " in out
    with pytest.raises(SystemExit, match=r"nothing/eval holds no results; expected those of eval/knn.py"):
        table.main([str(tmp_path / "nothing")])


def mistaken(arguments, monkeypatch, script=knn, question=Question):
    monkeypatch.setattr(sys, "argv", ["knn.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        protocol.ask(question, script.main)
    assert "\n" not in end.value.code
    return end.value.code


def test_mistakes_end_in_one_line(run_folder, photos_folder, tmp_path, monkeypatch, photos):
    data = ["--data", photos_folder, "--cache-dir", tmp_path]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "expected encoder.safetensors and encoder.json" in mistaken([empty, *data], monkeypatch)
    assert "name a run folder" in mistaken(data, monkeypatch)
    assert "--timm stands in place of a run" in mistaken([run_folder, "--timm", "resnet18", *data], monkeypatch)
    assert "no images are named" in mistaken([run_folder], monkeypatch)
    unlabelled = photos({".": 4}, name="unlabelled")
    assert "has no labels" in mistaken([run_folder, "--data", unlabelled, "--cache-dir", tmp_path], monkeypatch)
    wrong = mistaken([run_folder, *data, "--image-size", "20"], monkeypatch)
    assert "multiple of patch_size 8" in wrong
    more = photos({"train/a": 6, "train/b": 6, "test/a": 3, "test/c": 3}, name="more")
    assert "no training image of 1 classes (c)" in mistaken(
        [run_folder, "--data", more, "--cache-dir", tmp_path], monkeypatch
    )
    assert "Unrecognized" in mistaken([run_folder, *data, "--neighbours", "3"], monkeypatch)


def test_weights_that_do_not_fit_are_not_evaluated(run_folder, photos_folder, tmp_path, monkeypatch):
    other = tmp_path / "other"
    save_encoder(Encoder(dataclasses.replace(TINY, patch_size=8)), other)
    config = json.loads((other / "encoder.json").read_text())
    (other / "encoder.json").write_text(json.dumps({**config, "dim": 48}))
    (other / "recipe.json").write_text((run_folder / "recipe.json").read_text())
    said = mistaken([other, "--data", photos_folder, "--cache-dir", tmp_path], monkeypatch)
    assert "mask_token has shape [1, 1, 32], expected [1, 1, 48]" in said
