"""Any stack of sparse layers gives on every engine what its dense definition says, and what other libraries take."""

import pytest
import torch
from conftest import engines_on
from oracles import stem_by_loop
from torch import nn

from scott_sparse import SparseStem, SparseTokenizer, draw_visible
from scott_sparse.model.engines.spconv import choose_package, import_package
from scott_sparse.model.stages import GELU, BatchNorm, Conv, LayerNorm, MaxBlurPool, ReLU, scott_stem

STEMS = {
    "scott": scott_stem(6, stem_width=5),
    "patchify": [Conv(6, kernel=4, stride=4, bias=True), LayerNorm()],
    "resnet": [
        Conv(5, kernel=7, bias=False),
        BatchNorm(),
        ReLU(),
        MaxBlurPool(),
        Conv(6, kernel=3),
        BatchNorm(),
        GELU(),
    ],
    "convnext": [Conv(5, kernel=4, stride=4), LayerNorm(), Conv(6, kernel=2, stride=2, bias=True)],
    "stride 1": [Conv(5, kernel=3, stride=1, bias=True), GELU(), Conv(6, kernel=5, stride=1), Conv(7, kernel=2)],
    "far": [Conv(5, kernel=3), Conv(6, kernel=9, stride=1), ReLU(), Conv(4, kernel=1, stride=1, bias=True)],
    "pools": [LayerNorm(), MaxBlurPool(), BatchNorm(), Conv(6, kernel=1), GELU(), MaxBlurPool()],
    "padding": [Conv(6, kernel=7, stride=4, padding=2), ReLU(), Conv(5, kernel=7, stride=4, padding=3)],
    "sparse stride": [Conv(5, kernel=1, stride=2), Conv(6, kernel=3, stride=3, bias=True)],
}
GRID = (3, 4)
VISIBLE = {
    "random": draw_visible(2, GRID, hide_ratio=0.5, shape="uniform", generator=torch.Generator().manual_seed(0)),
    "all": torch.ones(2, 12, dtype=torch.bool),
    "uneven": torch.arange(24).view(2, 12) % 5 == 0,
}


def build(name, engine, channels):
    torch.manual_seed(0)
    stem = SparseStem(STEMS[name], in_channels=channels, engine=engine).double()
    for parameter in [*stem.biases, *(p for norm in stem.norms for p in norm.parameters())]:
        nn.init.normal_(parameter)
    return stem


def run(stem, forward, images, visible):
    images = images.clone().requires_grad_()
    tokens = forward(images, visible)
    tokens.backward(torch.linspace(-1, 1, tokens.numel(), dtype=tokens.dtype).view_as(tokens))
    return {"tokens": tokens.detach(), "images": images.grad, **{n: p.grad for n, p in stem.named_parameters()}}


@pytest.mark.parametrize("kind, channels", [("random", 1), ("random", 13), *((kind, 3) for kind in VISIBLE)])
@pytest.mark.parametrize("name", STEMS)
def test_every_engine_is_the_masked_dense_stem(name, kind, channels):
    visible = VISIBLE[kind]
    stem = build(name, "dense", channels)
    images = torch.randn(2, channels, *(side * stem.patch_size for side in GRID), dtype=torch.double)
    expected = run(stem, lambda *pair: stem_by_loop(stem, *pair), images, visible)
    assert not expected["tokens"][~visible].any() and expected["tokens"].any()
    for engine in engines_on("cpu"):
        stem = build(name, engine, channels)
        found = run(stem, stem, images, visible)
        assert found.keys() == expected.keys()
        for what, value in found.items():
            tolerance = 1e-4 if engine == "spconv" else 1e-9  # spconv computes in fp32
            assert (value - expected[what]).norm() <= tolerance * (expected[what].norm() + 1), (engine, what)
    if kind == "all":
        whole = build(name, "auto", channels)(images)
        assert torch.allclose(whole, expected["tokens"])


@pytest.mark.parametrize("engine", ["dense", "halo", "spconv"])
def test_batch_norm_counts_visible_sites_only(engine):
    """In training and in evaluation; where nothing is visible, statistics stay as they are."""
    stem = SparseStem([Conv(4, kernel=2, stride=2), BatchNorm()], engine=engine)
    images, visible = torch.randn(2, 3, 8, 8), torch.arange(32).view(2, 16) % 3 == 0
    tokens = stem(images, visible)[visible]
    assert torch.allclose(tokens.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(tokens.var(0, correction=0), torch.ones(4), atol=1e-3)
    mean = stem.norms[0].running_mean.clone()
    none = stem(images, torch.zeros_like(visible))
    none.sum().backward()
    assert not none.any() and torch.equal(stem.norms[0].running_mean, mean)
    stem.eval()
    one = torch.zeros_like(visible)
    one[0, 3] = True
    assert torch.allclose(stem(images, one)[0, 3], stem(images)[0, 3], atol=1e-5)


def test_published_stem_is_one_such_list():
    torch.manual_seed(0)
    tokenizer = SparseTokenizer(12, patch_size=8, stem_width=8)
    torch.manual_seed(0)
    stem = SparseStem(scott_stem(12, patch_size=8, stem_width=8))
    assert list(tokenizer.state_dict()) == ["kernels.0", "kernels.1"]
    stem.load_state_dict(tokenizer.state_dict())
    images, visible = torch.randn(2, 3, 24, 32), VISIBLE["random"]
    assert torch.equal(stem(images, visible), tokenizer(images, visible))


@pytest.mark.parametrize("engine", ["dense", "halo", "spconv"])
def test_precision(engine):
    """Norms beside layers that compute in another precision: of autocast, or of spconv under weights in bf16."""
    stem = build("resnet", engine, 3).float()
    images, visible = torch.randn(2, 3, 24, 32), VISIBLE["random"]
    expected = stem(images, visible)
    with torch.autocast("cpu", torch.bfloat16):
        assert (stem(images, visible) - expected).norm() < 3e-2 * expected.norm()
    halves = stem.bfloat16()(images, visible)
    assert halves.dtype == torch.bfloat16 and (halves - expected).norm() < 3e-2 * expected.norm()


def test_sparse_conv_tensor_in_and_out():
    library = pytest.importorskip("spconv.pytorch") and import_package(choose_package("cpu")[0])
    stem, visible = build("resnet", "dense", 3).float(), VISIBLE["random"]
    images = torch.randn(2, 3, 24, 32)
    voxels = stem.sparse_input(images, visible)
    order = torch.randperm(len(voxels.indices))
    features = voxels.features[order].requires_grad_()
    shuffled = library.SparseConvTensor(features, voxels.indices[order].contiguous(), [24, 32], 2)
    tokens = stem.forward_sparse(shuffled)
    assert isinstance(tokens, library.SparseConvTensor) and tokens.spatial_shape == list(GRID)
    packed, indices = stem.packed(images, visible)
    assert (tokens.features - packed).norm() < 1e-5 * packed.norm()
    image, row, column = tokens.indices.long().T
    assert torch.equal(torch.stack([image, row * GRID[1] + column], 1), indices)
    tokens.features.sum().backward()
    assert features.grad.any() and all(kernel.grad.any() for kernel in stem.kernels)
    # On to a layer of spconv itself, as a user would.
    layer = library.SubMConv2d(6, 5, 3, algo=library.ConvAlgo.Native)
    assert layer(tokens).features.shape == (len(packed), 5)

    twice = voxels.indices.clone()
    twice[1] = twice[0]
    outside = voxels.indices.clone()
    outside[0, 1] = 24
    for features, indices, shape, words in (
        (voxels.features[1:], voxels.indices[1:], [24, 32], "do not fill patches; expected each of 8 x 8, once"),
        (voxels.features, twice, [24, 32], "do not fill patches"),
        (voxels.features, outside, [24, 32], "outside of 2 images of 24 x 32 sites"),
        (voxels.features, voxels.indices, [24, 30], "image side 30 is not a multiple of patch_size 8"),
        (voxels.features[:, :2], voxels.indices, [24, 32], "has 2 channels; expected in_channels 3"),
    ):
        with pytest.raises(ValueError, match=words):
            stem.forward_sparse(library.SparseConvTensor(features, indices.contiguous(), shape, 2))
