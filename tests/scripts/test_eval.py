"""The scripts in eval/ as a user runs them: on a run folder and a folder of photos."""

import ast
import dataclasses
import inspect
import itertools
import json
import shutil
import subprocess
import sys

import anomaly
import attentive
import compare
import extract
import fewshot
import knn
import label_next
import linear
import pytest
import report
import segment
import table
import torch
import visualize
from conftest import ROOT, TINY, write_photo
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from scott_sparse import Encoder, save_encoder
from scott_sparse.cli import parse_flags
from scott_sparse.data.dataset import DataConfig, open_data, short_side_for
from scott_sparse.data.splits import save_digests
from scott_sparse.evaluation import features, probe, subject
from scott_sparse.evaluation.knn import KNNProbe
from scott_sparse.evaluation.subject import ProbeConfig

SCRIPTS = {  # name: what runs it, its flags, some of them shortened for the tests
    "knn": (knn.main, ProbeConfig, {}),
    "linear": (linear.main, linear.LinearConfig, {}),
    "attentive": (attentive.main, attentive.AttentiveConfig, {"epochs": 10}),
    "fewshot": (fewshot.run_few_shot, ProbeConfig, {}),
}
CONFIGS = {name: config for name, (_, config, _) in SCRIPTS.items()}
CONFIGS |= {"extract": extract.ExtractConfig, "visualize": visualize.VisualizeConfig}
CONFIGS |= {"report": report.ReportConfig, "compare": compare.CompareConfig}
CONFIGS |= {"segment": segment.SegmentConfig, "anomaly": anomaly.AnomalyConfig}
CONFIGS |= {"label_next": label_next.LabelNextConfig}


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


def evaluate(script, run, photos, cache, **fields):
    """Run a script; the results of this call, in the order in which they were written."""
    main, config, shortened = SCRIPTS[script]
    source = DataConfig(data=str(photos), cache_dir=cache, protocol=fields.pop("protocol", "clean"))
    out = fields.pop("out", cache / "eval")
    main(config(run=str(run), source=source, out=out, **{**shortened, **fields}))
    return json.loads(max(out.glob("*.json"), key=lambda path: path.stat().st_mtime_ns).read_text())


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("init", [None, "random", "pixels"])
def test_a_probe_writes_its_result(script, init, run_folder, photos_folder, tmp_path, capsys):
    result = evaluate(script, run_folder, photos_folder, tmp_path, init=init)
    (path,) = (tmp_path / "eval").glob("*.json")
    probe_name = "attentive-epochs10" if script == "attentive" else script
    assert path.stem.startswith(f"{probe_name}-photos" + (f"-{init}-" if init else "-"))
    assert result["protocol"] == "clean" and result["chosen_on"] == "val" and len(result["weights_hash"]) == 32
    assert result["images"] == {"train": 66, "val": 6, "test": 24} and result["classes"] == ["a", "b", "c"]
    assert {"data_fingerprint", "seconds", "commit", "versions", "command"} <= set(result)
    test = result["test"]
    assert test["n"] == 24 and len(test["per_class"]) == 3 and sum(map(sum, test["confusion"])) == 24
    assert test["top1_interval"][0] <= test["top1"] <= test["top1_interval"][1]
    if script != "fewshot":
        assert result["choice"].items() <= max(result["settings_tried"], key=lambda s: s["top1"]).items()
        assert result["val"]["top1"] == max(s["top1"] for s in result["settings_tried"])
        assert test["top1"] > 60  # chance is 33; each class has a colour
    else:
        assert set(result["shots"]) == {"1", "5", "10"} and len(result["shots"]["5"]["top1"]["all"]) == 5
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert path.name in capsys.readouterr().out


def test_random_is_the_runs_own_initialisation(run_folder, photos_folder, tmp_path):
    hashes = [
        evaluate("knn", run_folder, photos_folder, tmp_path, **fields)["weights_hash"]
        for fields in ({}, {"init": "random"}, {"weights": "context"})
    ]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("image_size, span", [(None, None), (16, None), (32, (2, 2)), ((16, 24), (2, 2))])
def test_at_another_size_positions_span_the_grid_of_training(run_folder, image_size, span):
    config = ProbeConfig(run=str(run_folder), image_size=image_size)
    assert subject.open_encoder(config).model.span == span
    assert subject.open_encoder(dataclasses.replace(config, init="random")).model.span == span


def test_the_first_weights_of_a_run_are_those_of_its_seed(tmp_path, photos_folder, monkeypatch):
    """Of a real run, whose learning rate is next to nothing."""
    import pretrain

    tiny = "small-data --image-size 16 --size demo --batch-size 8 --stem-width 8 --lr 1e-30 --lr-start 1e-30"
    tiny += " --lr-final 1e-30 --epochs 0.3 --warmup-epochs 0 --seed 5"
    places = ["--data", str(photos_folder), "--cache-dir", str(tmp_path), "--out", str(tmp_path / "run")]
    arguments = [*tiny.split(), *places]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    pretrain.main()
    first = subject.open_encoder(ProbeConfig(run=str(tmp_path / "run"), init="random")).model.encoder.state_dict()
    for file in ("encoder.safetensors", "context.safetensors"):
        for name, tensor in load_file(tmp_path / "run" / file).items():
            torch.testing.assert_close(tensor, first[name], atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("script", ["knn", "linear", "attentive"])
def test_shuffled_test_labels_do_not_move_the_choice(script, run_folder, photos_folder, tmp_path, monkeypatch):
    """If they did, the choice would have seen them."""
    before = evaluate(script, run_folder, photos_folder, tmp_path / "a")

    def shuffled(*arguments, **options):
        data = open_data(*arguments, **options)
        data.test.labels[:] = data.test.labels.roll(1)
        return data

    monkeypatch.setattr(probe, "open_data", shuffled)
    after = evaluate(script, run_folder, photos_folder, tmp_path / "b")
    assert after["choice"] == before["choice"] and after["settings_tried"] == before["settings_tried"]
    assert after["val"] == before["val"] and after["test"]["top1"] < before["test"]["top1"]


def test_the_probe_sees_test_once_with_the_chosen_setting(run_folder, photos_folder, tmp_path, monkeypatch):
    calls = []

    def watched(self, features, settings, logits=KNNProbe.logits):
        calls.append((len(features.pooled), len(list(settings))))
        return logits(self, features, settings)

    monkeypatch.setattr(KNNProbe, "logits", watched)
    evaluate("knn", run_folder, photos_folder, tmp_path)
    assert calls == [(6, 6), (24, 1)]  # k = 1, 5, 10, 20, 50, and 66, which is the whole bank


def test_the_paper_protocol(run_folder, photos_folder, tmp_path):
    """No val was published: the choice is made on test, by all of train."""
    result = evaluate("knn", run_folder, photos_folder, tmp_path, protocol="paper")
    assert result["protocol"] == "paper" and result["chosen_on"] == "test"
    assert result["images"] == {"train": 72, "val": 24, "test": 24} and result["val"] == result["test"]


@pytest.fixture
def pretrained_on(run_folder, tmp_path):
    """A function that makes a run which was pretrained on a folder under a protocol: its run folder."""

    def make(photos, protocol="clean", *, digests=True):
        run = shutil.copytree(run_folder, tmp_path / f"run-{protocol}-{digests}", dirs_exist_ok=True)
        data = open_data(
            DataConfig(data=str(photos), cache_dir=tmp_path, protocol=protocol), short_side=short_side_for((16, 16))
        )
        about = {"source": str(photos), "protocol": protocol, "fingerprint": data.fingerprint}
        (run / "summary.json").write_text(json.dumps({"data": about}))
        if digests:
            save_digests(run, data.pretrain.digests)
        return run

    return make


@pytest.mark.parametrize("image_size", [None, 32, 256])
@pytest.mark.parametrize("moved", [False, True])
def test_a_run_pretrained_on_test_is_not_evaluated_as_clean(pretrained_on, photos_folder, tmp_path, moved, image_size):
    """Wherever the images lie, and at whatever size they are evaluated."""
    run = pretrained_on(photos_folder, "paper")
    photos = shutil.copytree(photos_folder, tmp_path / "moved" / "elsewhere") if moved else photos_folder
    with pytest.raises(ValueError, match=r"on 24 of the 24 test images of .*: evaluate with --protocol paper"):
        evaluate("knn", run, photos, tmp_path, image_size=image_size)
    evaluate("knn", run, photos, tmp_path, init="random")
    result = evaluate("knn", run, photos, tmp_path, protocol="paper")
    assert result["test_images_pretrained_on"] == 24 and result["pretraining"]["protocol"] == "paper"


def test_a_run_that_started_from_one_pretrained_on_test(pretrained_on, photos_folder, tmp_path):
    start, run = pretrained_on(photos_folder, "paper"), pretrained_on(photos_folder)
    assert evaluate("knn", run, photos_folder, tmp_path)["test_images_pretrained_on"] == 0
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**recipe, "init": str(start / "encoder.safetensors")}))
    with pytest.raises(ValueError, match=r"on 24 of the 24 test images"):
        evaluate("knn", run, photos_folder, tmp_path)


def test_a_folder_without_splits_that_was_pretrained_on_whole(pretrained_on, photos_folder, tmp_path, capsys):
    """Test images are images of pretraining under other names, and in another data set."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in photos_folder.rglob("*.png"):
        shutil.copy(path, flat / "-".join(path.relative_to(photos_folder).parts))
    with pytest.raises(ValueError, match="on 24 of the 24 test images"):
        evaluate("knn", pretrained_on(flat), photos_folder, tmp_path)
    assert f"was pretrained on other images ({flat})" in capsys.readouterr().out


def test_copies_within_the_data_set_are_reported_and_allowed(pretrained_on, photos_folder, tmp_path, capsys):
    photos = shutil.copytree(photos_folder, tmp_path / "with-copies")
    for i in range(3):
        shutil.copy(photos / "test" / "a" / f"{i}.png", photos / "train" / "a" / f"copy-{i}.png")
    run = pretrained_on(photos)
    for image_size in (None, 256):
        result = evaluate("knn", run, photos, tmp_path, image_size=image_size)
        assert result["test_images_pretrained_on"] == 3 == result["test_images_also_in_training"]
    assert "other images" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="on 3 of the 24 test images"):  # these copies are not in this data set
        evaluate("knn", run, photos_folder, tmp_path)


def test_a_run_without_digests(pretrained_on, photos_folder, tmp_path):
    run = pretrained_on(photos_folder, digests=False)
    assert evaluate("knn", run, photos_folder, tmp_path)["test_images_pretrained_on"] is None
    run = pretrained_on(photos_folder, "paper", digests=False)  # all that is known: the same images, test included
    with pytest.raises(ValueError, match="on 24 of the 24 test images"):
        evaluate("knn", run, photos_folder, tmp_path)


def test_features_are_extracted_once(run_folder, photos_folder, tmp_path, monkeypatch):
    evaluate("knn", run_folder, photos_folder, tmp_path)
    monkeypatch.setattr(probe, "extract", None)
    evaluate("linear", run_folder, photos_folder, tmp_path)


def test_a_full_disk_of_the_feature_cache_does_not_end_an_evaluation(run_folder, photos_folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "write_atomically", full)
    assert evaluate("knn", run_folder, photos_folder, tmp_path)["test"]["n"] == 24


def test_results_of_different_data_sizes_and_settings_are_kept_apart(run_folder, photos_folder, tmp_path, capsys):
    """Two folders of one name, two sizes, two settings and two sets of weights: six files, and all in the table."""
    other = shutil.copytree(photos_folder, tmp_path / "other" / "photos")
    (other / "train" / "a" / "0.png").unlink()
    out = tmp_path / "eval"
    for data in (photos_folder, other):
        evaluate("knn", run_folder, data, tmp_path, out=out)
    for fields in ({"image_size": 32}, {"image_size": (16, 24)}, {"weights": "context"}):
        evaluate("knn", run_folder, photos_folder, tmp_path, out=out, **fields)
    for epochs in (1, 2):
        evaluate("attentive", run_folder, photos_folder, tmp_path, out=out, epochs=epochs)
    evaluate("knn", run_folder, photos_folder, tmp_path, out=out)  # the same again
    assert len(list(out.glob("*.json"))) == len(list(out.glob("*.png"))) == 7
    capsys.readouterr()
    table.main(table.TableConfig((tmp_path,)))
    printed = capsys.readouterr().out
    assert f"{photos_folder}, clean protocol" in printed and f"{other}, clean protocol" in printed
    for encoder in ("pretrained, 16 px", "pretrained, 32 px", "pretrained, 16 x 24 px", "context, 16 px"):
        assert f"| {run_folder} {encoder} " in printed
    assert "| attentive-epochs1 | attentive-epochs2 |" in printed


@pytest.mark.slow
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
        (path,) = (out / "eval").glob("linear-photos-*.json")
        result = json.loads(path.read_text())
        tensors = {path.name: load_file(path) for path in sorted((out / "features").iterdir())}
        results.append(({k: result[k] for k in ("choice", "val", "test", "settings_tried")}, tensors))
    (one, features_of_one), (two, features_of_two) = results
    assert one == two
    assert list(features_of_one) == list(features_of_two)
    for name, tensors in features_of_one.items():
        assert torch.equal(tensors["pooled"], features_of_two[name]["pooled"])


def test_extract(run_folder, photos_folder, tmp_path, capsys):
    file = tmp_path / "features.safetensors"
    source = DataConfig(data=str(photos_folder), cache_dir=tmp_path)
    extract.main(extract.ExtractConfig(run=str(run_folder), source=source, file=file, patches=True))
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


def test_crops_are_a_setting_of_every_probe(run_folder, photos_folder, tmp_path, capsys):
    """Of their own result files, features in the cache and columns of the table; 1 is what there was before."""
    for script in SCRIPTS:
        for crops in (1, 8):
            result = evaluate(script, run_folder, photos_folder, tmp_path, crops=crops)
            assert result["settings"].get("crops", 1) == crops and result["test"]["n"] == 24
    results = [path.name for path in (tmp_path / "eval").glob("*.json")]
    assert len(results) == 2 * len(SCRIPTS) and sum("-crops8-" in name for name in results) == len(SCRIPTS)
    capsys.readouterr()
    table.main(table.TableConfig((tmp_path,)))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    columns = "knn | knn-crops8 | linear | linear-crops8 | attentive-epochs10 | attentive-crops8-epochs10 | "
    assert any(line.startswith(f"| encoder | {columns}") for line in lines)
    (row,) = (line for line in lines if line.startswith(f"| {run_folder} pretrained"))
    assert row.count("±") == 6 + 2 * 3 and ";" not in row  # few-shot has three columns
    file = tmp_path / "features.safetensors"
    source = DataConfig(data=str(photos_folder), cache_dir=tmp_path)
    config = extract.ExtractConfig(run=str(run_folder), source=source, file=file, crops=8)
    extract.main(config)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["crops"] == "8" and opened.get_tensor("embeddings").shape == (96, 32)
    with pytest.raises(ValueError, match="--patches writes the tokens of one view"):
        extract.main(dataclasses.replace(config, patches=True))
    with pytest.raises(ValueError, match="--copies fits on single random crops, --crops 8 on averages"):
        evaluate("linear", run_folder, photos_folder, tmp_path, crops=8, copies=2)


def test_unlabelled_test_images_are_extracted(run_folder, tmp_path):
    root = tmp_path / "photos"
    for name in (*(f"train/{label}/{i}" for label in "ab" for i in range(4)), "test/0", "test/1"):
        write_photo(root / f"{name}.png", 20, 24)
    file, source = tmp_path / "features.safetensors", DataConfig(data=str(root), cache_dir=tmp_path)
    extract.main(extract.ExtractConfig(run=str(run_folder), source=source, file=file))
    with safe_open(file, "pt") as opened:
        assert {"test/0.png", "test/1.png"} <= set(json.loads(opened.metadata()["names"]))


def test_table(run_folder, photos_folder, tmp_path, capsys):
    for script in ("fewshot", "knn"):
        evaluate(script, run_folder, photos_folder, tmp_path)
    evaluate("knn", run_folder, photos_folder, tmp_path, init="pixels")
    capsys.readouterr()
    table.main(table.TableConfig((tmp_path,)))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith(f"{photos_folder}, clean protocol: test top-1, %") for line in lines)
    assert "| encoder | knn | 1 shot | 5 shots | 10 shots |" in lines
    assert any(line.startswith(f"| {run_folder} pretrained, 16 px | 100.0 ± ") for line in lines)
    assert any(line.startswith(f"| {run_folder} pixels, 16 px | 100.0 ± ") for line in lines)


@pytest.mark.parametrize("image_size, shape", [(None, (32, 32)), ((16, 24), (16, 24))])
def test_visualize(run_folder, photos, tmp_path, capsys, image_size, shape):
    """One class, no labels, names that are neither markup nor in the font; at two sizes."""
    folder = photos({"only": 3})
    (folder / "only" / "0.png").rename(folder / "only" / "[red] $x_ 🌼.png")
    source = DataConfig(data=str(folder), cache_dir=tmp_path / "unused")
    config = visualize.VisualizeConfig(
        str(run_folder), source, images=2, image_size=image_size, stride=4, out=tmp_path / "pictures"
    )
    visualize.main(config)
    assert f"{shape[0] // 4} x {shape[1] // 4} tokens, images of {shape[0]} x {shape[1]}" in capsys.readouterr().out
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == ["attention.png", "similarity.png", "tokens.png"]
    assert all(Image.open(path).width > 200 for path in pictures)
    assert not (tmp_path / "unused").exists()


def test_mistakes_of_visualize_end_in_one_line(run_folder, photos_folder, tmp_path, monkeypatch):
    data = ["--data", photos_folder, "--out", tmp_path / "pictures"]
    for arguments, message in (
        ([tmp_path, *data], "expected encoder.safetensors and encoder.json"),
        (data, "Run folder of train/pretrain.py. (required)"),
        ([run_folder], "no images are named"),
        ([run_folder, *data, "--image-size", "20"], "multiple of patch_size 8"),
        ([run_folder, *data, "--stride", "3"], "stride 3 does not divide patch_size 8"),
        ([run_folder, *data, "--images", "0"], "images 0 must be 1 or more"),
        ([run_folder, *data, "--points", "0.5", "1.5"], "point 0.5 1.5 is outside the image"),
    ):
        assert message in mistake(arguments, monkeypatch, "visualize")


def mistake(arguments, monkeypatch, script="knn"):
    """The line with which a script ends."""
    others = {
        "table": (table.main, table.TableConfig, {}),
        "visualize": (visualize.main, visualize.VisualizeConfig, {}),
    }
    main, config, _ = {**others, **SCRIPTS}[script]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        subject.run_script(config, main)
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code
    return end.value.code


def test_mistakes_end_in_one_line(run_folder, photos_folder, tmp_path, monkeypatch, photos):
    data = ["--data", photos_folder, "--cache-dir", tmp_path]
    empty = tmp_path / "empty"
    empty.mkdir()
    unlabelled = photos({".": 4}, name="unlabelled")
    lacking = photos({"train/a": 6, "train/b": 6, "test/a": 3, "test/c": 3}, name="lacking")
    for arguments, message in (
        ([empty, *data], "expected encoder.safetensors and encoder.json"),
        (data, "name a run folder"),
        ([run_folder, "--timm", "resnet18", *data], "--timm stands in place of a run"),
        ([run_folder], "no images are named"),
        ([run_folder, "--data", unlabelled, "--cache-dir", tmp_path], "has no labels"),
        ([run_folder, *data, "--image-size", "20"], "multiple of patch_size 8"),
        ([run_folder, "--data", lacking, "--cache-dir", tmp_path], "no training image of 1 classes (c)"),
        ([run_folder, *data, "--neighbours", "3"], "Unrecognized"),
    ):
        assert message in mistake(arguments, monkeypatch)
    assert "nothing/eval holds no results; expected those of eval/knn.py" in mistake(
        [tmp_path / "nothing"], monkeypatch, "table"
    )
    assert "name at least one run folder" in mistake([], monkeypatch, "table")


def test_weights_that_do_not_fit_are_not_evaluated(run_folder, photos_folder, tmp_path, monkeypatch):
    other = tmp_path / "other"
    save_encoder(Encoder(dataclasses.replace(TINY, patch_size=8)), other)
    config = json.loads((other / "encoder.json").read_text())
    (other / "encoder.json").write_text(json.dumps({**config, "dim": 48}))
    (other / "recipe.json").write_text((run_folder / "recipe.json").read_text())
    message = mistake([other, "--data", photos_folder, "--cache-dir", tmp_path], monkeypatch)
    assert "mask_token has shape [1, 1, 32], expected [1, 1, 48]" in message


@pytest.mark.parametrize("config", [*CONFIGS.values(), table.TableConfig, DataConfig])
def test_every_flag_has_a_help_line(config):
    body = ast.parse(inspect.getsource(config)).body[0].body
    for field, following in itertools.pairwise([*body, ast.Pass()]):
        if isinstance(field, ast.AnnAssign) and field.target.id != "source":  # its own fields are flags
            is_help = isinstance(following, ast.Expr) and isinstance(following.value.value, str)
            assert is_help and len(following.value.value.split()) >= 3, field.target.id


def test_help_names_what_inherited_flags_do(capsys):
    with pytest.raises(SystemExit):
        parse_flags(subject.LabelBudgetConfig, ["--help"])
    assert "Evaluate a baseline instead" in " ".join(capsys.readouterr().out.split())
