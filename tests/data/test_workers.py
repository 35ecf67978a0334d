"""What a worker of a DataLoader needs can be pickled: it starts by forkserver (Python 3.14) or spawn (macOS)."""

import multiprocessing

import pytest
import torch
from test_hub import datasets, write
from test_pictures import halves, png16
from torch.utils.data import Dataset

from scott_sparse.data.batches import Batches, load
from scott_sparse.data.dataset import DataConfig, open_data
from scott_sparse.data.views import ViewConfig


class OneOfEach(Dataset):
    """Item s: the batch of step 0 of set s, so that one worker reads all of them."""

    def __init__(self, sets: list[Batches]):
        self.sets = sets

    def __getitem__(self, s):
        return self.sets[s][0]


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_every_kind_of_source(method, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "deep").mkdir()
    for i in range(4):
        (tmp_path / "deep" / f"{i}.png").write_bytes(png16(halves(1000 * i, 4095)))
    folders = {"folder": photos({"a": 4, "b": 4}), "12-bit": tmp_path / "deep"}
    names = {
        **{name: str(path) for name, path in folders.items()},
        "hub": f"hf:{write(tmp_path / 'set', train=[0, 1] * 2)}",
    }
    configs = [DataConfig(data=name, cache="none", cache_dir=tmp_path) for name in names.values()]
    configs.append(DataConfig(data=names["folder"], cache_dir=tmp_path))
    views = ViewConfig(crops=2)
    sets = []
    for config in configs:
        images = open_data(config, short_side=32).pretrain
        sets.append(Batches(images, views, (2, 2), 0.5, "block", 2, seed=0))
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        of_worker = list(load(OneOfEach(sets), range(len(sets)), workers=1, pin=False))
    finally:
        multiprocessing.set_start_method(before, force=True)
    for (here,), (there,) in zip((batches[0] for batches in sets), of_worker, strict=True):
        assert torch.equal(here.crops, there.crops) and here.crops.any()
