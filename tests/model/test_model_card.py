"""An encoder goes to a repository of the Hub and comes back. A folder stands in for the Hub."""

import shutil
from pathlib import Path

import huggingface_hub.hub_mixin
import knn
import pytest
import torch
from conftest import TINY, TINY_RUN, run_pretraining
from huggingface_hub import ModelCard

from scott_sparse import Encoder, load_encoder
from scott_sparse.data.dataset import DataConfig
from scott_sparse.evaluation.subject import ProbeConfig
from scott_sparse.model.weights import CONFIG, WEIGHTS

FILES = ["README.md", CONFIG, WEIGHTS["target"]]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Repositories are folders in it; it answers the calls that huggingface_hub makes to upload and download one."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, token=None): ...

        def create_repo(self, repo_id, **_):
            (root / repo_id).mkdir(parents=True, exist_ok=True)
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **_):
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return f"commit of {repo_id}"

    def download(repo_id, *, allow_patterns, revision="main"):
        if revision != "main" or not (root / repo_id).is_dir():
            raise OSError(f"404: {repo_id} at {revision}")
        return str(root / repo_id)

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return root


def test_there_and_back(hub):
    encoder = Encoder(TINY).eval()
    assert encoder.push_to_hub("someone/flowers") == "commit of someone/flowers"
    assert sorted(path.name for path in (hub / "someone" / "flowers").iterdir()) == FILES
    images = torch.randn(2, 3, 32, 48)
    for load in (Encoder.from_pretrained, load_encoder):
        again = load("someone/flowers", revision="main", engine="dense")
        assert torch.equal(again(images), encoder(images)) and not again.training
    with pytest.raises(OSError, match="404: someone/flowers at v2"):
        Encoder.from_pretrained("someone/flowers", revision="v2")


def test_a_card_without_a_run_claims_nothing(tmp_path):
    Encoder(TINY).save_pretrained(tmp_path / "flowers")
    text = (tmp_path / "flowers" / "README.md").read_text()
    assert text.count("Not recorded.") == 2 and "Weights: not stated" in text and "license:" not in text
    assert "No probe was run" in text
    (tmp_path / "flowers" / "README.md").write_text("mine")
    Encoder.from_pretrained(tmp_path / "flowers").save_pretrained(tmp_path / "flowers")
    assert (tmp_path / "flowers" / "README.md").read_text() == "mine"


def test_the_card_of_a_run(hub, photos, tmp_path):
    data = photos({f"{split}/{name}": count for split, count in (("train", 12), ("test", 4)) for name in "ab"})
    run = tmp_path / "run"
    flags = ["--data", data, "--out", run, "--report-every", 1]
    assert run_pretraining(*TINY_RUN, *flags)[0] is None
    source = DataConfig(data=str(data), cache_dir=tmp_path / "cache")
    for init in (None, "random"):
        knn.main(ProbeConfig(run=str(run), source=source, init=init))
    encoder = Encoder.from_pretrained(run)
    encoder.push_to_hub("someone/flowers", model_card_kwargs={"license": "cc-by-4.0"})
    text = (hub / "someone" / "flowers" / "README.md").read_text()
    assert str(tmp_path) not in text and str(Path.home()) not in text
    card = ModelCard(text)
    assert card.data.license == "cc-by-4.0" and card.data.pipeline_tag == "image-feature-extraction"
    (result,) = card.data.eval_results  # of the pretrained encoder, not of the baseline
    assert result.dataset_name == "photos" and 0 <= result.metric_value <= 100
    for words in (
        'Encoder.from_pretrained("someone/flowers")',
        '"interpolation": "bicubic"',
        "Images: photos (all 32, ",
        "Protocol clean: pretraining saw no test image",
        '"batch_size": 8',
        '"cross_crop_weight": 0.5',
        "; loss: MIM-JEPA, NT-Xent",
        "| knn | photos | clean | 32 x 32 | k ",
        "chosen on val",
        "k-NN on val at the end of pretraining, %: pixels ",
        "Weights: cc-by-4.0. The code, scott-sparse: Apache-2.0.",
    ):
        assert words in text, words
    assert Encoder.from_pretrained("someone/flowers").preprocess == encoder.preprocess
