"""Encoders survive the disk, and a load that does not fit stops."""

import dataclasses
import json

import pytest
import torch
from conftest import TINY, engines_on
from safetensors.torch import load_file, save_file

from scott_sparse import Encoder, from_paper_checkpoint, load_encoder, save_encoder, to_paper_checkpoint
from scott_sparse.model.jepa import MIMJEPA, ObjectiveConfig
from scott_sparse.model.weights import CONFIG, PREDICTOR_CONFIG, WEIGHTS, load_predictor, save_predictor


@pytest.fixture
def saved(tmp_path):
    encoder = Encoder(TINY).eval()
    save_encoder(encoder, tmp_path / "run")
    return encoder, tmp_path / "run"


def test_round_trip(saved):
    encoder, folder = saved
    images = torch.randn(2, 3, 32, 48)
    again = load_encoder(folder)
    assert again.config == TINY and not again.training
    assert torch.equal(again(images), encoder(images))
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS["target"]]


@pytest.mark.parametrize("target, context", [("last", "all"), ("last", "visible"), ("all", "visible")])
def test_a_predictor_survives_the_disk(target, context, tmp_path):
    objective = ObjectiveConfig(predictor_depth=2, mim_target=target, context=context, cross_crop_weight=0.5)
    model = MIMJEPA(TINY, objective).eval()
    save_encoder(model.encoder, tmp_path, weights="context")
    with pytest.raises(ValueError, match=r"no predictor in .*: expected predictor.safetensors .*; pretrain again"):
        load_predictor(tmp_path)
    how = {"hide_ratio": 0.5, "mask_shape": "uniform"}
    save_predictor(model.predictor.state_dict(), tmp_path, objective=objective, **how)
    again, *loaded = load_predictor(tmp_path)
    images, visible = torch.randn(2, 3, 32, 48), torch.tensor([[True, False, True, False, False, True]] * 2)
    assert loaded == [0.5, "uniform"] and not again.training
    assert torch.equal(again.predict_hidden(images, visible), model.predict_hidden(images, visible))
    assert not torch.equal(again.predict_hidden(images, visible, span=(1, 1)), model.predict_hidden(images, visible))
    written = json.loads((tmp_path / PREDICTOR_CONFIG).read_text())
    assert written.pop("target") == target
    if target == "last":
        (tmp_path / PREDICTOR_CONFIG).write_text(json.dumps(written))
        load_predictor(tmp_path)
    (tmp_path / PREDICTOR_CONFIG).write_text(json.dumps({"depth": "2"}))
    with pytest.raises(ValueError, match="damaged: expected depth, target, context, hide_ratio, mask_shape"):
        load_predictor(tmp_path)


def test_engines_share_one_checkpoint(saved):
    _, folder = saved
    images = torch.randn(2, 3, 32, 48)
    visible = torch.tensor([[True, False, True, False, False, True]] * 2)
    expected = load_encoder(folder, engine="dense")(images, visible)
    for engine in engines_on("cpu"):
        assert torch.allclose(load_encoder(folder, engine=engine)(images, visible), expected, atol=1e-5)


def test_an_encoder_is_exported_for_any_batch(saved):
    encoder, folder = saved
    images = torch.randn(5, 3, 32, 48)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(load_encoder(folder), (images[:2],), dynamic_shapes=({0: batch},)).module()
    assert torch.allclose(exported(images), encoder(images), atol=1e-6)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="no encoder in"):
        load_encoder(tmp_path)


def test_weights_of_another_size_are_refused(saved):
    _, folder = saved
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "dim": 64}))
    with pytest.raises(ValueError, match=r"mask_token has shape \[1, 1, 32\], expected \[1, 1, 64\]"):
        load_encoder(folder)


def test_missing_tensor_is_refused(saved):
    _, folder = saved
    state = load_file(folder / WEIGHTS["target"])
    state.pop("mask_token")
    save_file(state, folder / WEIGHTS["target"])
    with pytest.raises(ValueError, match="mask_token"):
        load_encoder(folder)


def test_a_strangers_checkpoint_is_refused():
    with pytest.raises(ValueError, match="no tensor of the paper's checkpoints"):
        from_paper_checkpoint({"backbone.conv1.weight": torch.zeros(1)})


def test_a_strangers_file_is_not_executed(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (exec, ("raise SystemExit('executed')",))

    for content, message in ((Malicious(), "reads safely"), ({"model": {}}, "no state dict but 'model'"), ([], "list")):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=message):
            from_paper_checkpoint(tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_bytes(b"not a file of torch")
    with pytest.raises(ValueError, match="reads safely"):
        from_paper_checkpoint(str(tmp_path / "weights.pth"))


def test_what_the_papers_code_does_not_have():
    with pytest.raises(ValueError, match=r"patch_size 8 has no stem in the paper's code; expected 16"):
        to_paper_checkpoint(Encoder(dataclasses.replace(TINY, patch_size=8)), (2, 2))
