"""eval/segment.py, anomaly.py and label_next.py as a user runs them: on a run folder and folders of images."""

import csv
import dataclasses
import json
import shutil
import sys

import anomaly
import label_next
import numpy as np
import pytest
import segment
import table
import torch
import torch.nn.functional as F
from conftest import TINY, write_photo
from PIL import Image

from scott_sparse import save_encoder
from scott_sparse.data import builtin, defects, petals
from scott_sparse.data.dataset import DataConfig, open_data, short_side_for
from scott_sparse.data.splits import save_digests
from scott_sparse.evaluation import segment as evaluation_segment
from scott_sparse.evaluation.subject import run_script
from scott_sparse.model.jepa import MIMJEPA, ObjectiveConfig
from scott_sparse.model.weights import PREDICTOR, save_predictor

TRIMAP = np.full(256, 3, dtype=np.uint8)
TRIMAP[:2] = 2, 1  # of our masks' values
SCRIPTS = {
    "segment": (segment.SegmentConfig, segment.run_segmentation),
    "anomaly": (anomaly.AnomalyConfig, anomaly.run_anomaly),
    "label_next": (label_next.LabelNextConfig, label_next.choose_next),
}


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    monkeypatch.setattr(evaluation_segment, "CLUSTERED", 1000)
    monkeypatch.setattr(evaluation_segment, "RATES", (1e-2,))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What train/pretrain.py leaves; encoder and predictor are as they were initialised."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(3)
    model = MIMJEPA(dataclasses.replace(TINY, patch_size=8), ObjectiveConfig(predictor_depth=1, context="visible"))
    for weights in ("target", "context"):
        save_encoder(model.encoder, folder, weights=weights)
    how = {"objective": model.objective, "hide_ratio": 0.5, "mask_shape": "block"}
    save_predictor(model.predictor.state_dict(), folder, **how)
    (folder / "recipe.json").write_text(json.dumps({"image_size": 32, "seed": 3}))
    return folder


def write_square(folder, name, *, seed, height=40, width=48, defect=True):
    """Grey noise with a red square, and where it is: 1, with a border of 255."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(60, 120, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), dtype=np.uint8)
    top, left = generator.integers(4, (height - 16, width - 16))
    if defect:
        mask[top - 1 : top + 13, left - 1 : left + 13] = 255
        mask[top : top + 12, left : left + 12] = 1
        pixels[mask > 0] = (230, 30, 30)
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return mask


def write_mask(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask).convert("P")
    image.putdata(mask.flatten().tolist())
    image.save(path)


@pytest.fixture
def pairs(tmp_path):
    """A function that writes images and masks under the split folders of a layout: pairs("images/{}") -> folder."""

    def write(layout="images", counts=None, name="pairs"):
        root = tmp_path / name
        for number, (split, count) in enumerate((counts or {"": 40}).items()):
            for i in range(count):
                image = f"{layout.format(split)}/{i}.png"
                mask = write_square(root, image, seed=1000 * number + i)
                write_mask(root / image.replace("images", "masks"), mask)
        return root

    return write


@pytest.fixture
def parts(tmp_path):
    """A folder in the layout of MVTec AD: grey parts, and parts with a red square."""
    root = tmp_path / "parts"
    for folder, count, defect in (("train/good", 20, False), ("test/good", 6, False), ("test/red square", 6, True)):
        for i in range(count):
            mask = write_square(root, f"{folder}/{i:03}.png", seed=100 * len(folder) + i, defect=defect)
            if defect:
                path = root / folder.replace("test", "ground_truth") / f"{i:03}_mask.png"
                write_mask(path, 255 * (mask > 0).astype(np.uint8))
    return root


def evaluate(script, run, data, tmp_path, **fields):
    """Run a script with its results in tmp_path/eval; the newest result."""
    config, main = SCRIPTS[script]
    source = {name: fields.pop(name) for name in ("data_root", "protocol") if name in fields}
    source = DataConfig(data=None if data is None else str(data), cache_dir=tmp_path / "cache", **source)
    main(config(run=str(run), source=source, out=tmp_path / "eval", **fields))
    path = max((tmp_path / "eval").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    return json.loads(path.read_text())


def mistake(script, arguments, monkeypatch):
    config, main = SCRIPTS[script]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run_script(config, main)
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code
    return end.value.code


@pytest.mark.parametrize("init, image_size", [(None, None), ("random", (24, 48)), ("pixels", None)])
def test_segmentation_of_a_folder(init, image_size, run_folder, pairs, tmp_path, capsys):
    result = evaluate("segment", run_folder, pairs(), tmp_path, init=init, image_size=image_size, steps=40)
    images = result["images"]
    assert sum(images.values()) == 40 and min(images.values()) >= 1 and result["classes"] == ["0", "1"]
    assert result["protocol"] == "clean" and result["chosen_on"] == "val"
    for head, of_head in result["heads"].items():
        tried = [setting for setting in result["settings_tried"] if setting["head"] == head]
        assert of_head["val"]["miou"] == max(setting["miou"] for setting in tried)
        if head != "kmeans" or init == "pixels":  # clusters of an untrained encoder have no meaning
            assert of_head["test"]["miou"] > 55, head  # every pixel the larger class: 45
    kinds = {setting["features"] for setting in result["settings_tried"]}
    assert kinds == ({"patch", "pixel"} if init == "pixels" else {"last", "last-4"})
    capsys.readouterr()
    table.main(table.TableConfig((tmp_path,)))
    printed = capsys.readouterr().out
    assert all(f"segment-{head}, mIoU" in printed for head in ("linear", "conv", "kmeans"))


@pytest.mark.parametrize("layout", ["images/{}", "{}/images"])
def test_published_splits_and_named_classes(layout, run_folder, pairs, tmp_path):
    root = pairs(layout, {"training": 12, "val": 3, "test": 4})
    (root / "classes.txt").write_text("ground\nsquare\n")
    result = evaluate("segment", run_folder, root, tmp_path, steps=5)
    assert result["images"] == {"train": 12, "val": 3, "test": 4} and result["classes"] == ["ground", "square"]


def test_segmentation_of_petals_and_pets(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(petals, "SPLIT_SIZES", {"train": 32, "val": 8, "test": 8})
    result = evaluate("segment", run_folder, "petals", tmp_path, steps=20)
    assert result["classes"] == ["background", "petals", "centre"] and result["heads"]["conv"]["test"]["iou"][0] > 50
    base = tmp_path / "oxford-iiit-pet"
    for split, numbers in (("trainval", range(10)), ("test", range(10, 14))):
        names = [f"{breed}_{i}" for breed in ("Abyssinian", "beagle") for i in numbers]
        for i, name in enumerate(names):
            mask = write_square(base, f"images/{name}.jpg", seed=i)
            write_mask(base / "annotations" / "trimaps" / f"{name}.png", TRIMAP[mask])
        lines = [f"{name} {1 if name.startswith('A') else 5} 1 1\n" for name in names]
        (base / "annotations" / f"{split}.txt").write_text("".join(lines))
    result = evaluate("segment", run_folder, "pets37", tmp_path, steps=40, data_root=tmp_path)
    assert result["classes"] == ["background", "pet"] and result["heads"]["linear"]["test"]["miou"] > 45


def test_maps_of_val_and_test_are_counted_batch_by_batch(run_folder, pairs, tmp_path, monkeypatch):
    """To the counts of all maps at once."""
    confusions, roles = evaluation_segment.confusions, []

    def compared(candidates, batches, masks, **how):
        parts = []
        batches = ((parts.append(batch), batch)[1] for batch in iter(batches))
        counts = confusions(candidates, batches, masks, **how)
        assert all(len(maps) <= 8 for batch in parts for maps in batch.values())
        for candidate, own in zip(candidates, counts):
            maps = torch.cat([batch[candidate.setting["features"]] for batch in parts]).float()
            with torch.no_grad():
                logits = F.interpolate(candidate.model(maps), size=masks.shape[1:], mode="bilinear")
            pairs = [(masks == row) & (logits.argmax(1) == column) for row in (0, 1) for column in (0, 1)]
            assert torch.equal(own, torch.stack([both.sum((1, 2)) for both in pairs], 1).unflatten(1, (2, 2)))
        roles.append((len(candidates), len(masks)))
        return counts

    monkeypatch.setattr(evaluation_segment, "BATCH", 8)
    monkeypatch.setattr(evaluation_segment, "confusions", compared)
    root = pairs("images/{}", {"train": 12, "val": 9, "test": 18})
    evaluate("segment", run_folder, root, tmp_path, steps=5)
    assert roles == [(1, 12), (1, 12), (6, 9), (3, 18)]  # clusters are named on train; then val, then test once


@pytest.mark.parametrize("levels", [(90,), (90, 230)])
def test_segmentation_of_blank_images(levels, run_folder, pairs, tmp_path, capsys):
    """k-means has no more clusters than there are colours; the class of each is the largest in its pixels."""
    root = pairs(counts={"": 20})
    for i in range(20):
        mask = np.full((40, 48), len(levels), dtype=np.uint8)
        mask[:, :10], mask[:, 10:16] = 0, 2 if len(levels) == 1 else 1
        pixels = np.full((40, 48, 3), levels[-1], dtype=np.uint8)
        pixels[:, :10] = levels[0]
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        write_mask(root / "masks" / f"{i}.png", mask)
    heads = evaluate("segment", run_folder, root, tmp_path, init="pixels", steps=20)["heads"]
    best = heads["kmeans"]["test"]["accuracy"]
    assert f"note: k-means on patch finds {len(levels)} different features for 3 classes" in capsys.readouterr().out
    assert best > (60 if len(levels) == 1 else 80) and heads["linear"]["test"]["accuracy"] >= best - 5


def test_a_run_pretrained_on_test_images_is_not_evaluated_as_clean(run_folder, pairs, tmp_path):
    root, run = pairs(), shutil.copytree(run_folder, tmp_path / "run")
    data = open_data(DataConfig(data=str(root / "images"), cache_dir=tmp_path), short_side=short_side_for((32, 32)))
    save_digests(run, data.pretrain.digests)
    (run / "summary.json").write_text(json.dumps({"data": {"source": "x", "protocol": "clean"}}))
    with pytest.raises(ValueError, match=r"was pretrained on (\d+) of the \1 test images"):
        evaluate("segment", run, root, tmp_path, steps=5)
    assert evaluate("segment", run, root, tmp_path, steps=5, protocol="paper")["chosen_on"] == "test"


def test_mistakes_of_segmentation_end_in_one_line(run_folder, pairs, tmp_path, monkeypatch):
    roots = {name: pairs(name=name, counts={"": 12}) for name in ("missing", "larger", "rgb", "single")}
    for i in range(12):
        write_mask(roots["single"] / "masks" / f"{i}.png", np.full((40, 48), 255 * (i % 2), dtype=np.uint8))
    (roots["missing"] / "masks" / "3.png").unlink()
    write_mask(roots["larger"] / "masks" / "3.png", np.zeros((48, 40), dtype=np.uint8))
    write_photo(roots["rgb"] / "masks" / "3.png", 40, 48)
    roots["unseen"] = pairs("images/{}", {"train": 6, "val": 2, "test": 2}, name="unseen")
    write_mask(roots["unseen"] / "masks" / "test" / "1.png", np.full((40, 48), 7, dtype=np.uint8))
    roots["void"] = pairs("images/{}", {"train": 6, "val": 2, "test": 1}, name="void")
    write_mask(roots["void"] / "masks" / "test" / "0.png", np.full((40, 48), 255, dtype=np.uint8))
    roots["none"] = tmp_path / "none"
    roots["none"].mkdir()
    roots["two"] = pairs(counts={"": 1}, name="two")
    for data, message, *flags in (
        (roots["missing"], "1 of 12 images have no mask (images/3.png); expected images/NAME.jpg with masks/NAME.png"),
        (roots["larger"], "the mask of images/3.png has 48 x 40 pixels, its image 40 x 48 (upright); give both"),
        (roots["rgb"], "mode RGB, expected an indexed (P) or grey (L) PNG"),
        (roots["single"], "hold class 0 alone (255 is ignored); a second one is needed: where 255 marks the object"),
        (roots["unseen"], "class 7 is in masks of test but in none of train; move some images"),
        (roots["void"], "all pixels in the masks of test are 255, which is ignored; move some images there"),
        (roots["none"], "no images/; expected images/NAME.jpg"),
        (roots["two"], "too few images with masks to set some aside for val"),
        (tmp_path / "nowhere", "expected petals, pets37, or a folder with images/ and masks/"),
        (roots["larger"], "--crops 8 averages features over views", "--crops", "8"),
        (roots["larger"], "steps 0 must be 1 or more", "--steps", "0"),
    ):
        arguments = [run_folder, "--data", data, "--cache-dir", tmp_path / "cache", *flags]
        assert message in mistake("segment", arguments, monkeypatch)


def test_defects_in_the_layout_of_mvtec(run_folder, parts, tmp_path, capsys):
    result = evaluate("anomaly", run_folder, parts, tmp_path)
    assert result["images"] == {"good": 16, "held_out": 4, "test": 12} and list(result["methods"]) == [
        "neighbours",
        "prediction",
    ]
    neighbours = result["methods"]["neighbours"]
    assert neighbours["image_auroc"] == 100 and neighbours["pixel_auroc"] > 85 and neighbours["found"] == 100
    assert neighbours["defects"]["red square"]["image_auroc"] == 100
    kinds = {row["kind"] for row in result["scores"]}
    assert kinds == {"good", "red square"} and all(row["prediction"] > 0 for row in result["scores"])
    (folder,) = (path for path in (tmp_path / "eval").iterdir() if path.is_dir())
    drawn = np.asarray(Image.open(folder / "neighbours" / "test" / "red square" / "000.png"))
    assert drawn.shape == (32, 32) and drawn.max() > 128  # the threshold
    assert "anomaly detection on pretrained features" in capsys.readouterr().out
    table.main(table.TableConfig((tmp_path,)))
    assert "anomaly-neighbours, image AUROC" in capsys.readouterr().out


@pytest.mark.parametrize("flat", [False, True])
def test_defects_in_two_folders(flat, run_folder, parts, tmp_path, capsys):
    """Without folders in --test an image with a mask is defective; without masks nothing is known."""
    good, test, masks = parts / "train" / "good", parts / "test", parts / "ground_truth"
    if flat:
        for root, folder in ((test, "good"), (test, "red square"), (masks, "red square")):
            for path in (root / folder).iterdir():
                path.rename(root / f"{folder[:3]}-{path.name}")
            (root / folder).rmdir()
    where = {"good": good, "test": test, "method": "neighbours"}
    result = evaluate("anomaly", run_folder, None, tmp_path, masks=masks, **where)
    assert result["data"] == str(test) and result["methods"]["neighbours"]["image_auroc"] == 100
    assert result["methods"]["neighbours"]["defects"].keys() == ({"defect"} if flat else {"red square"})
    capsys.readouterr()
    result = evaluate("anomaly", run_folder, None, tmp_path, image_size=64, **where)
    neighbours, printed = result["methods"]["neighbours"], capsys.readouterr().out
    assert neighbours["pixel_auroc"] is None and neighbours["above"] >= 6
    assert ("note: AUROC needs good and defective test images, none is known to be good" in printed) == flat


def test_a_run_without_a_predictor(run_folder, parts, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(run_folder, tmp_path / "run")
    (run / PREDICTOR).unlink()
    assert list(evaluate("anomaly", run, parts, tmp_path)["methods"]) == ["neighbours"]
    assert "note: no prediction error: no predictor in" in capsys.readouterr().out
    arguments = [run, "--data", parts, "--cache-dir", tmp_path / "cache", "--method", "prediction"]
    assert "expected predictor.safetensors" in mistake("anomaly", arguments, monkeypatch)
    assert "random has no predictor" in mistake("anomaly", [*arguments, "--init", "random"], monkeypatch)


def test_drawn_defects_and_cells_of_elpv(run_folder, tmp_path, monkeypatch):
    """elpv by a stand-in of its layout: cells of four probabilities, of which one is good and one is left out."""
    monkeypatch.setattr(defects, "DRAWN", {folder: 10 if "train" in folder else 2 for folder in defects.DRAWN})
    result = evaluate("anomaly", run_folder, "petals", tmp_path, init="pixels")
    assert result["methods"]["neighbours"]["defects"].keys() == set(defects.DRAWN_DEFECTS)
    base, lines = tmp_path / "elpv_dataset" / "data", []
    for i in range(60):
        level = i % 4
        write_square(base, f"images/cell{i:04}.png", seed=i, defect=level > 1)
        lines.append(f"images/cell{i:04}.png {level / 3:.4f} mono\n")
    (base / "labels.csv").write_text("".join(lines))
    spec = dataclasses.make_dataclass("Spec", ["submodule_search_locations"])([str(base.parent)])
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: spec)
    result = evaluate("anomaly", run_folder, "elpv", tmp_path, coreset=100)
    assert {row["kind"] for row in result["scores"]} == {"good", "67 %", "100 %"}
    assert result["methods"]["neighbours"]["image_auroc"] == 100


def test_mistakes_of_anomaly_end_in_one_line(run_folder, parts, photos, tmp_path, monkeypatch):
    few = shutil.copytree(parts, tmp_path / "few")
    for i in range(4, 20):
        (few / "train" / "good" / f"{i:03}.png").unlink()
    (parts / "ground_truth" / "red square" / "002_mask.png").unlink()
    classes, empty = photos({"a": 20, "b": 20}), tmp_path / "empty"
    empty.mkdir()
    for flags, message in (
        (["--data", parts], "1 of 12 test images are defective and have no mask"),
        (["--data", few], "4 good images are too few; 5 or more"),
        (["--data", classes], "has no class called good, but a, b; expected train/good"),
        (["--data", parts / "train"], "has no test images; expected train/good, test/good and test/DEFECT"),
        (["--good", parts / "train"], "give --data, or both --good and --test"),
        (["--good", parts / "train", "--test", empty], "no image there"),
        (["--data", parts, "--masks", empty], "--masks belongs to --good and --test"),
        (["--data", parts, "--coreset", "0"], "coreset 0 must be 1 or more"),
        (["--data", parts, "--quantile", "1.1"], "quantile 1.1 must lie above 0"),
        (["--data", parts, "--hidings", "0"], "hidings 0 must be 1 or more"),
    ):
        assert message in mistake("anomaly", [run_folder, "--cache-dir", tmp_path / "cache", *flags], monkeypatch)


def test_what_to_label_next(run_folder, photos, tmp_path, capsys):
    """Three colours: the first three images show one each; with labels of two, the third comes first."""
    root = photos({"a": 9, "b": 9, "c": 9})
    config = label_next.LabelNextConfig(
        str(run_folder), "pixels", source=DataConfig(data=str(root), cache_dir=tmp_path), out=tmp_path, count=3
    )
    label_next.choose_next(config)
    rows = list(csv.DictReader((tmp_path / "label-next-photos.csv").open()))
    assert {row["image"].split("/")[-2] for row in rows} == {"a", "b", "c"} and rows[0]["distance"] == ""
    assert Image.open(tmp_path / "label-next-photos.png").size == (300, 100)
    labels = "".join(f"{name}/{i}.png,{name if name != 'c' else ''}\n" for name in "abc" for i in range(9))
    (root / "labels.csv").write_text(f"file_name,label\n{labels}")
    source = dataclasses.replace(config.source, labels=root / "labels.csv")
    label_next.choose_next(dataclasses.replace(config, source=source, keep_labelled=True))
    rows = list(csv.DictReader((tmp_path / "label-next-photos.csv").open()))
    assert {row["image"].split("/")[-2] for row in rows} == {"c"} and float(rows[0]["distance"]) > 0
    assert "3 of 9 images" in capsys.readouterr().out


def test_mistakes_of_label_next_end_in_one_line(run_folder, photos, tmp_path, monkeypatch):
    unlabelled, labelled = photos({".": 4}, name="unlabelled"), photos({"a": 4, "b": 4})
    for data, flags, message in (
        (unlabelled, ["--count", "5"], "count 5 is outside 1 to 4"),
        (unlabelled, ["--keep-labelled"], "no image of --data"),
        (
            labelled,
            ["--keep-labelled", "--count", "1"],
            "outside 1 to 0, the number of images without a label; leave out --keep",
        ),
    ):
        arguments = [run_folder, "--data", data, "--cache-dir", tmp_path, *flags]
        assert message in mistake("label_next", arguments, monkeypatch)
