"""An encoder in the hands of other libraries: timm's method names, copies, replicas, devices without float64."""

import copy
import pickle
import sys

import pytest
import torch
from conftest import write_photo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from scott_sparse import Encoder, EncoderConfig
from scott_sparse.model.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from scott_sparse.model.vit import layer_norm

DEEP = EncoderConfig(dim=32, depth=4, heads=4, stem_width=8, registers=2)
IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "indices, blocks",
    [
        (None, [0, 1, 2, 3]),
        (1, [3]),
        (2, [2, 3]),
        (4, [0, 1, 2, 3]),
        ([0, 2], [0, 2]),
        ((-1, 1), [1, 3]),
        ([-1, 3], [3]),
    ],
)
def test_intermediates_are_maps_of_the_blocks(indices, blocks):
    encoder = Encoder(DEEP).eval()
    every = encoder.last_blocks(IMAGES, 4)
    features, maps = encoder.forward_intermediates(IMAGES, indices)
    assert torch.equal(features, encoder(IMAGES)) and torch.equal(features, encoder.forward_features(IMAGES))
    assert [tuple(x.shape) for x in maps] == [(2, 32, 2, 3)] * len(blocks) and encoder.num_features == 32
    how = {"norm": True, "output_fmt": "NLC", "intermediates_only": True}
    for block, x, tokens in zip(blocks, maps, encoder.forward_intermediates(IMAGES, indices, **how), strict=True):
        assert torch.equal(x.flatten(2).mT, every[block]) and x[0, :, 1, 2].equal(every[block][0, 5])
        assert torch.equal(tokens, layer_norm(every[block]))


@pytest.mark.parametrize("indices", [0, -1, 5, [], [4], [-5]])
def test_blocks_that_do_not_exist(indices):
    with pytest.raises(ValueError, match="expected 1 to 4"):
        Encoder(DEEP).forward_intermediates(IMAGES, indices)


def test_timm_takes_the_same_arguments():
    import timm

    theirs = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), embed_dim=32, depth=4, num_heads=4).eval()
    ours = Encoder(DEEP).eval()
    for how in ({"indices": 2}, {"indices": [0, 3], "norm": True}, {"output_fmt": "NLC"}, {"intermediates_only": True}):
        shapes = []
        for model in (ours, theirs):
            given = model.forward_intermediates(IMAGES, **how)
            shapes.append([x.shape for x in (given if how.get("intermediates_only") else given[1])])
        assert shapes[0] == shapes[1]
    assert ours.num_features == theirs.num_features


def on_two_devices(encoder, monkeypatch):
    """The second replica of torch.nn.DataParallel, with its copies to GPUs left out."""
    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_get_device_index", lambda device, _: device)
    copies = lambda tensors, devices, detach=False: [[x.clone() for x in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    return module.replicate(encoder, [0, 1])[1]


COPIES = {
    "deepcopy": lambda encoder, _: copy.deepcopy(encoder),
    "pickle": lambda encoder, _: pickle.loads(pickle.dumps(encoder)),
    "DataParallel": lambda encoder, _: torch.nn.DataParallel(encoder).module,
    "replica": on_two_devices,
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("tokenizer", ["scott", "patch"])
def test_copies_give_the_same(kind, tokenizer, monkeypatch):
    encoder = Encoder(EncoderConfig(dim=32, depth=2, heads=4, tokenizer=tokenizer, stem_width=8, registers=2)).eval()
    encoder.preprocess = Preprocess((32, 48))
    visible = torch.tensor([[True, False, True, False, False, True]] * 2)
    again = COPIES[kind](encoder, monkeypatch)
    assert torch.equal(again(IMAGES, visible), encoder(IMAGES, visible)) and again.preprocess == encoder.preprocess


class NoFloat64(TorchDispatchMode):
    """As MPS: no tensor of 64-bit floats anywhere but on the CPU."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for x in tree_leaves(result):
            assert not isinstance(x, torch.Tensor) or x.device.type == "cpu" or x.dtype != torch.float64, function
        return result


def test_mps_has_no_float64(monkeypatch):
    """Without the device: "meta" tensors have shapes and dtypes, and no values."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # unknown for "meta"
    encoder, images = Encoder(DEEP).eval().to("meta"), IMAGES.to("meta")
    with NoFloat64():
        assert encoder(images, span=(3, 3)).device.type == "meta"
        encoder.pooled(images, size=(16, 16), crops=8)
        with pytest.raises(AssertionError):
            images.double()


def test_preprocess_is_the_transform_that_torchvision_users_write(tmp_path):
    """As `transform` of a data set, and in a Compose; its values are those of torchvision's own transforms."""
    preprocess = Preprocess((32, 32))
    for number, sides in enumerate([(40, 60), (70, 50), (32, 34)]):  # with an even rest, which centres without rounding
        write_photo(tmp_path / "class" / f"{number}.png", *sides, seed=number)
    data = ImageFolder(tmp_path, transform=v2.Compose([preprocess]))
    normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    for (ours, _), (path, _) in zip(data, data.samples):
        picture = data.loader(path)
        resize = v2.Resize((32, 32), v2.InterpolationMode.BICUBIC, antialias=True)
        theirs = v2.Compose([v2.PILToTensor(), v2.CenterCrop(min(picture.size)), resize, *normalise])(picture)
        assert ours.shape == (3, 32, 32) and ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=1.01 / 255 / min(IMAGENET_STD), rtol=0)  # one of 255 levels
