"""Published data sets: small copies of their layouts, their official splits, and errors that say what is missing."""

import builtins
import importlib.util
import sys

import pytest
import torch
import torchvision.datasets as tv
from conftest import write_photo
from PIL import Image
from scipy.io import savemat

from scott_sparse.data.builtin import IMAGENET100, TORCHVISION_SETS
from scott_sparse.data.dataset import DataConfig, find_source, open_data


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """As on a cluster: what is not on the disk cannot be fetched."""

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def flowers(root):
    base = root / "flowers-102"
    for i in range(1, 13):
        write_photo(base / "jpg" / f"image_{i:05d}.jpg", 40, 50, seed=i)
    savemat(base / "setid.mat", {"trnid": [[1, 2, 3]], "valid": [[4, 5, 6]], "tstid": [list(range(7, 13))]})
    savemat(base / "imagelabels.mat", {"labels": [[i % 3 + 1 for i in range(1, 13)]]})


def pets(root):
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for split, numbers in (("trainval", range(1, 21)), ("test", range(101, 106))):
        names = [(breed, i) for breed in ("Abyssinian", "beagle") for i in numbers]
        for breed, i in names:
            write_photo(base / "images" / f"{breed}_{i}.jpg", 50, 40, seed=i + 1000 * (breed == "beagle"))
        # Class numbers of the whole set, of which this has two breeds; species and breed within it follow.
        lines = [f"{breed}_{i} {1 if breed == 'Abyssinian' else 5} 1 1\n" for breed, i in names]
        (base / "annotations" / f"{split}.txt").write_text("".join(lines))
    (base / "images" / "Abyssinian_100.mat").write_bytes(b"the real set has some of these")


def imagenet(root, folder="imagenet", names=None):
    for wnid in names or {*IMAGENET100["imagenet100"].split(), *IMAGENET100["imagenet100-animals"].split()}:
        for i in range(2):
            write_photo(root / folder / "train" / wnid / f"{wnid}_{i}.JPEG", 20, 20)
        write_photo(root / folder / "val" / wnid / f"ILSVRC2012_val_{int(wnid[1:])}.JPEG", 20, 20)
    (root / folder / "train" / "n99999999").mkdir()  # a folder of another class, whether empty or not


def sizes(source):
    return {split: len(part) for split, part in source.splits.items()}


def names(source, split):
    return [source.names[i] for i in source.splits[split]]


def test_flowers102(tmp_path, monkeypatch):
    flowers(tmp_path)
    monkeypatch.setattr(tv.flowers102, "check_integrity", lambda *_: True)  # it knows the sums of the real lists
    source = find_source("flowers102", root=tmp_path)
    assert sizes(source) == {"train": 3, "val": 3, "test": 6}
    assert names(source, "val") == [f"flowers-102/jpg/image_{i:05d}.jpg" for i in (4, 5, 6)]
    assert [source.labels[i] for i in source.splits["train"]] == [1, 2, 0]
    config = DataConfig(data="flowers102", data_root=tmp_path)
    assert len(open_data(config, short_side=32).pretrain) == 6  # train and val, as published
    assert len(open_data(DataConfig("flowers102", "paper", tmp_path), short_side=32).pretrain) == 12


def test_pets37(tmp_path):
    pets(tmp_path)
    source = find_source("pets37", root=tmp_path)
    assert sizes(source) == {"train": 40, "test": 10} and source.classes == ("Abyssinian", "Beagle")
    assert sorted(set(source.labels)) == [0, 1] and all(name.endswith(".jpg") for name in source.names)
    data = open_data(DataConfig(data="pets37", data_root=tmp_path), short_side=32)
    assert (len(data.pretrain), len(data.train), len(data.val), len(data.test)) == (40, 38, 2, 10)
    assert data.val.labels.bincount().tolist() == [1, 1]
    assert not set(data.pretrain.names) & set(data.test.names)


def test_the_two_imagenet100_lists():
    usual, animals = (set(IMAGENET100[name].split()) for name in ("imagenet100", "imagenet100-animals"))
    assert len(usual) == len(animals) == 100 and len(usual & animals) == 8
    assert min(animals) == "n01440764" and "n02869837" in usual


@pytest.mark.parametrize("name", IMAGENET100)
def test_imagenet100(name, tmp_path):
    imagenet(tmp_path)
    source = find_source(name, root=tmp_path)
    assert sizes(source) == {"train": 200, "test": 100}  # ImageNet's val is what everyone reports on
    assert source.classes == tuple(sorted(IMAGENET100[name].split()))
    assert all(source.classes[label] in path for label, path in zip(source.labels, source.names))


def test_imagenet100_that_is_not_whole(tmp_path):
    imagenet(tmp_path, folder="imagenet100", names=IMAGENET100["imagenet100"].split()[:99])
    with pytest.raises(ValueError, match=r"imagenet100 needs train/ and val/, each with the 100 folders n01558993"):
        find_source("imagenet100", root=tmp_path)


def test_imagenette(tmp_path):
    for wnid in ("n01440764", "n02102040"):
        write_photo(tmp_path / "imagenette2-320" / "train" / wnid / f"{wnid}_1.JPEG", 20, 20)
        write_photo(tmp_path / "imagenette2-320" / "val" / wnid / f"{wnid}_2.JPEG", 20, 20)
    source = find_source("imagenette", root=tmp_path)
    assert sizes(source) == {"train": 2, "test": 2} and len(source.classes) == 2


def test_eurosat_sets_a_test_aside(tmp_path):
    for name in ("Forest", "River"):
        for i in range(20):
            write_photo(tmp_path / "eurosat" / "2750" / name / f"{name}_{i}.jpg", 64, 64, seed=i)
    data = open_data(DataConfig(data="eurosat", data_root=tmp_path), short_side=64)
    assert (len(data.train), len(data.val), len(data.test)) == (27, 6, 7)
    groups = [set(part.names) for part in (data.train, data.val, data.test)]
    assert len(set.union(*groups)) == 40


class Arrays:
    """What torchvision's sets of arrays look like from outside."""

    def __init__(self, root, *, download, train=None, split=None):
        self.count = {True: 10, "train": 10, False: 4, "test": 4, "unlabeled": 6}[train if split is None else split]
        self.labels = torch.full((self.count,), -1) if split == "unlabeled" else torch.arange(self.count) % 2
        self.classes = ["one", "two"]

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i >= self.count:
            raise IndexError
        return Image.new("L", (28, 28), 10 * i), int(self.labels[i])


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "fashion-mnist"])
def test_sets_of_arrays(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tv, TORCHVISION_SETS[name].dataset, Arrays)
    source = find_source(name, root=tmp_path)
    assert sizes(source) == {"train": 10, "test": 4} | ({"unlabelled": 6} if name == "stl10" else {})
    data = open_data(DataConfig(data=name, data_root=tmp_path, cache_dir=tmp_path), short_side=28)
    assert len(data.pretrain) == 10 + 6 * (name == "stl10") and len(data.test) == 4
    assert data.test.names == [f"test/{i}" for i in range(4)]
    pixels = data.test.crop(torch.tensor([3]), torch.tensor([[[0, 0, 28, 28]]]))
    assert (pixels == 30).all() and data.test.labels.tolist() == [0, 1, 0, 1]
    assert min(data.train.labels) == 0


@pytest.mark.parametrize("name", TORCHVISION_SETS)
def test_a_set_that_is_not_there_says_what_to_put_where(name, tmp_path):
    with pytest.raises(ValueError) as error:
        find_source(name, root=tmp_path)
    message = str(error.value)
    assert f"--data {name} is not complete in {tmp_path / TORCHVISION_SETS[name].folder}" in message
    assert TORCHVISION_SETS[name].contents in message and "--data-root" in message and "no network" in message


def test_elpv(tmp_path, monkeypatch):
    base = tmp_path / "elpv_dataset"
    rows = []
    for i in range(40):
        write_photo(base / "data" / "images" / f"cell{i:04d}.png", 30, 30, seed=i)
        rows.append(f"images/cell{i:04d}.png  {(0.0, 0.3333333333333333, 0.6666666666666666, 1.0)[i % 4]}  mono\n")
    (base / "__init__.py").touch()
    (base / "data" / "labels.csv").write_text("".join(rows))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    source = find_source("elpv", root=tmp_path)
    assert source.classes == ("0 %", "33 %", "67 %", "100 %") and source.labels[:5] == [0, 1, 2, 3, 0]
    data = open_data(DataConfig(data="elpv", cache_dir=tmp_path), short_side=30)
    assert (len(data.train), len(data.val), len(data.test)) == (29, 4, 7)


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install elpv-dataset"):
        find_source("elpv", root=tmp_path)
    real = builtins.__import__

    def without_datasets(name, *rest):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ValueError, match="pip install datasets"):
        find_source("hf:owner/name", root=tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Hugging Face datasets without a network; `load_dataset` reads local folders and files as it reads the Hub's."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return datasets


def test_hugging_face_folder_of_images(hub, photos, tmp_path):
    root = photos({"train/a": 10, "train/b": 10, "validation/a": 2, "validation/b": 2, "test/a": 3, "test/b": 3})
    source = find_source(f"hf:{root}", root=tmp_path)
    assert sizes(source) == {"train": 20, "val": 4, "test": 6} and source.classes == ("a", "b")
    data = open_data(DataConfig(data=f"hf:{root}", cache_dir=tmp_path), short_side=32)
    assert len(data.pretrain) == 24 and data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_hugging_face_parquet_with_bytes_and_hidden_labels(hub, tmp_path):
    import io

    def rows(count, hidden=False):
        for i in range(count):
            stream = io.BytesIO()
            Image.new("RGB", (8, 9), (i, 0, 0)).save(stream, "PNG")
            yield {"photo": {"bytes": stream.getvalue(), "path": None}, "label": -1 if hidden else i % 2}

    features = hub.Features({"photo": hub.Image(), "label": hub.ClassLabel(names=["x", "y"])})
    (tmp_path / "set").mkdir()
    for split, examples in (("train", rows(6)), ("validation", rows(4)), ("test", rows(3, hidden=True))):
        table = hub.Dataset.from_list(list(examples), features=features)
        table.to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    source = find_source(f"hf:{tmp_path / 'set'}", root=tmp_path)
    assert sizes(source) == {"train": 6, "test": 4, "unlabelled": 3} and source.classes == ("x", "y")
    data = open_data(DataConfig(data=f"hf:{tmp_path / 'set'}", cache_dir=tmp_path), short_side=8)
    assert data.test.crop(torch.tensor([2]), torch.tensor([[[0, 0, 9, 8]]]))[0, 0, 0, 0].tolist() == [2, 0, 0]
    assert len(data.pretrain) == 9


def test_hugging_face_mistakes(hub, tmp_path):
    with pytest.raises(ValueError, match=r"--data hf:.*nowhere cannot be loaded"):
        find_source(f"hf:{tmp_path / 'nowhere'}", root=tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected a split train with a column of images"):
        find_source(f"hf:{tmp_path / 'text'}", root=tmp_path)
