"""Data sets of the Hugging Face Hub: splits, columns and labels as they are found, without a network."""

import io
from collections import Counter

import pytest
from PIL import Image

from scott_sparse.data.dataset import DataConfig, UnreadableImages, find_source, open_data

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def kept_in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def picture(number):
    out = io.BytesIO()
    Image.new("RGB", (8, 9), (number, 0, 0)).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def write(folder, *, feature=None, image="image", **labels):
    """Parquet files, one a split, with the labels given; pictures are red, from 0. `feature`: of the labels."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for split, values in labels.items():
        columns = {image: [picture(number + i) for i in range(len(values))], "label": values}
        number += len(values)
        part = datasets.Dataset.from_dict(columns).cast_column(image, datasets.Image())
        part = part.cast_column("label", feature) if feature else part
        part.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def source_of(folder, suffix=""):
    return find_source(f"hf:{folder}{suffix}", root=folder)


def sizes(source):
    return {split: len(part) for split, part in source.splits.items()}


XY = datasets.ClassLabel(names=["x", "y"])
LABELS = {
    # name: feature, then labels of train and test as they are in the files, what they must be here, classes
    "classes": (XY, [0, 1, 1], [1, 0], [0, 1, 1, 1, 0], ("x", "y")),
    "some null": (XY, [0, None, 1], [1, None], [0, -1, 1, 1, -1], ("x", "y")),
    "some -1": (XY, [0, -1, 1], [1, -1], [0, -1, 1, 1, -1], ("x", "y")),
    "hidden test": (XY, [0, 1], [-1, -1], [0, 1, -1, -1], ("x", "y")),
    "null test": (XY, [0, 1], [None, None], [0, 1, -1, -1], ("x", "y")),
    "null train": (XY, [None, None], [1, 0], [-1, -1, 1, 0], ("x", "y")),
    "all null": (XY, [None, None], [None], None, None),
    "all -1": (XY, [-1, -1], [-1], None, None),
    "strings": (None, ["cat", "ant", ""], ["cat", None], [1, 0, -1, 1, -1], ("ant", "cat")),
    "integers": (None, [7, 3, -1], [7, None], [1, 0, -1, 1, -1], ("3", "7")),
    "integers that pandas read": (None, [7.0, 3.0, float("nan")], [7.0], [1, 0, -1, 1], ("3", "7")),
    "truth values": (None, [True, False], [True], [1, 0, 1], ("False", "True")),
    "measurements": (None, [0.5, 0.25], [0.75], None, None),
    "several at once": (datasets.List(XY), [[0], [0, 1]], [[1]], None, None),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels(case, tmp_path):
    feature, train, test, labels, classes = LABELS[case]
    source = source_of(write(tmp_path / "set", feature=feature, train=train, test=test))
    assert source.labels == labels and source.classes == classes
    hidden = sum(label in (None, -1) for label in test)
    expected = {"train": len(train), "test": len(test) - hidden, "unlabelled": hidden}
    assert sizes(source) == {split: count for split, count in expected.items() if count}
    assert labels or source.no_labels
    assert ("labels from the column label" in source.notes[0]) == (case != "several at once")


def test_folder_of_images(photos, tmp_path):
    root = photos({"train/a": 10, "train/b": 10, "validation/a": 2, "validation/b": 2, "test/a": 3, "test/b": 3})
    source = source_of(root)
    assert sizes(source) == {"train": 20, "val": 4, "test": 6} and source.classes == ("a", "b")
    data = open_data(DataConfig(data=f"hf:{root}", cache_dir=tmp_path), short_side=32)
    assert len(data.pretrain) == 24 and data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_bytes_in_parquet_and_splits_of_every_name(tmp_path):
    root = tmp_path / "set"
    splits = {"train": [0, 1] * 3, "validation": [0, 1, 0, 1], "test": [-1] * 3}
    write(root / "data", feature=XY, **splits, unsupervised=[-1] * 2, extra=[0] * 5)
    source = source_of(root)
    assert sizes(source) == {"train": 6, "test": 4, "unlabelled": 5}  # a lone validation split is reported on
    assert source.notes == (
        "images from the column image, labels from the column label",
        "splits not used: extra (5 images)",
    )
    counts = Counter(name.split("/")[0] for name in source.names)
    assert counts == {"train": 6, "validation": 4, "test": 3, "unsupervised": 2}
    data = open_data(DataConfig(data=f"hf:{root}", cache_dir=tmp_path), short_side=8)
    assert [data.test.read(row)[0, 0, 0] for row in data.test.rows.tolist()] == [6, 7, 8, 9]
    assert len(data.pretrain) == 11 and data.about["notes"][:2] == list(source.notes)


def test_the_column_of_images(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    columns = {name: [picture(number)] for number, name in enumerate(("left", "right", "image"))}
    part = datasets.Dataset.from_dict(columns)
    for name in columns:
        part = part.cast_column(name, datasets.Image())
    part.to_parquet(root / "train.parquet")

    def red(suffix):
        return Image.open(source_of(root, suffix).picture(0)).getpixel((0, 0))[0]

    assert [red(suffix) for suffix in ("", ":right", "::right", ":default:left", ":default")] == [2, 1, 1, 0, 2]
    assert source_of(root, ":right").notes == ("images from the column right",)
    with pytest.raises(ValueError, match="no column of images is called middle; name one of left, right, image"):
        source_of(root, ":middle")
    with pytest.raises(ValueError, match="expected hf:NAME"):
        source_of(root, ":a:b:c")
    part.remove_columns("image").to_parquet(root / "train.parquet")
    with pytest.raises(
        ValueError, match=r"no column of images is called image; name one of left, right, as in hf:.*:left"
    ):
        source_of(root)


def test_the_configuration(tmp_path):
    root = tmp_path / "set"
    for name, number in (("small", 2), ("large", 5)):
        write(root / name, train=list(range(number)))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("small", "large"))
    (root / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert sizes(source_of(root, ":small")) == {"train": 2} and sizes(source_of(root, ":large:image")) == {"train": 5}
    with pytest.raises(ValueError, match=r"(?s)cannot be loaded: Config name is missing.*small.*large"):
        source_of(root)


def test_the_column_of_labels(tmp_path):
    columns = {"image": [picture(0), picture(1)], "text": [[1], [2]], "fine": [0, 1], "genus": ["a", "a"]}
    part = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).cast_column("fine", XY)
    (tmp_path / "set").mkdir()
    part.to_parquet(tmp_path / "set" / "train.parquet")
    spec = f"hf:{tmp_path / 'set'}"
    assert find_source(spec, root=tmp_path).classes == ("x", "y")  # the column of classes
    assert find_source(spec, root=tmp_path, label_column="genus").classes == ("a",)
    for name in ("text", "image", "missing"):
        with pytest.raises(ValueError, match=f"--label-column {name}: .*has fine, genus"):
            find_source(spec, root=tmp_path, label_column=name)


@pytest.mark.parametrize("splits", [True, False])
def test_a_set_that_was_saved_to_disk(splits, tmp_path):
    saved = datasets.load_dataset(str(write(tmp_path / "set", train=[0, 1, 0])))
    (saved if splits else saved["train"]).save_to_disk(tmp_path / "saved")
    source = source_of(tmp_path / "saved")
    assert sizes(source) == {"train": 3} and source.labels == [0, 1, 0]


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_a_picture_that_is_null_is_unreadable(cache, tmp_path):
    pictures = [picture(i) for i in range(5)]
    pictures[1] = pictures[3] = None
    part = datasets.Dataset.from_dict({"image": pictures}).cast_column("image", datasets.Image())
    (tmp_path / "set").mkdir()
    part.to_parquet(tmp_path / "set" / "train.parquet")
    config = {"data": f"hf:{tmp_path / 'set'}", "cache": cache, "cache_dir": tmp_path}
    with pytest.raises(
        UnreadableImages, match=r"2 of 5 images.*\ntrain/1: no picture: null\ntrain/3: no picture: null"
    ):
        open_data(DataConfig(**config), short_side=8)
    data = open_data(DataConfig(**config, skip_unreadable=True), short_side=8)
    assert data.pretrain.names == ["train/0", "train/2", "train/4"]
    assert [data.pretrain.read(row)[0, 0, 0] for row in data.pretrain.rows.tolist()] == [0, 2, 4]


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match=r"--data hf:.*nowhere cannot be loaded"):
        source_of(tmp_path / "nowhere")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected a split train with a column of images"):
        source_of(tmp_path / "text")


def test_images_without_labels_pretrain_and_are_in_no_probe(tmp_path):
    root = write(tmp_path / "set", feature=XY, train=[0, 1, None] * 10, validation=[0, -1], test=[1, 0, None])
    data = open_data(DataConfig(data=f"hf:{root}", cache_dir=tmp_path), short_side=8)
    assert len(data.pretrain) == 30 + 2 + 1
    for part, count in ((data.train, 20), (data.val, 1), (data.test, 2)):
        assert len(part) == count and part.labels.min() >= 0
