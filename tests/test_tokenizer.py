"""Both engines give the same tokens and gradients, and no hidden pixel reaches a visible token."""

import pytest
import torch
import torch.nn.functional as F

from scott_sparse import PatchEmbed, SparseTokenizer, draw_visible, sparse
from scott_sparse.sparse import ActivePatches

GRIDS = [(2, 2), (3, 5), (7, 2), (1, 4), (4, 4)]


def masks(grid, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]
    one = torch.zeros(batch, n, dtype=torch.bool)
    one[:, n // 2] = True
    uneven = torch.rand(batch, n, generator=generator) < 0.5
    uneven[0] = False  # one image without any visible patch beside others with some
    return {
        "all": torch.ones(batch, n, dtype=torch.bool),
        "random": draw_visible(batch, grid, hide_ratio=0.5, shape="uniform", generator=generator),
        "block": draw_visible(batch, grid, hide_ratio=0.5, generator=generator),
        "one": one,
        "none": torch.zeros(batch, n, dtype=torch.bool),
        "uneven": uneven,
    }


def pair(dim=12, patch_size=16, stem_width=8):
    """The same weights on both engines."""
    torch.manual_seed(1)
    dense = SparseTokenizer(dim, patch_size=patch_size, stem_width=stem_width, engine="dense")
    spconv = SparseTokenizer(dim, patch_size=patch_size, stem_width=stem_width, engine="spconv")
    spconv.load_state_dict(dense.state_dict())
    return dense, spconv


def relative(got, expected):
    return ((got - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("kind", ["all", "random", "block", "one", "none", "uneven"])
@pytest.mark.parametrize("patch_size", [16, 8, 4])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_engines_agree_forward_and_backward(grid, patch_size, kind, batch):
    visible = masks(grid, batch)[kind]
    images = torch.randn(batch, 3, grid[0] * patch_size, grid[1] * patch_size)
    upstream = torch.randn(batch, grid[0] * grid[1], 12)
    results = []
    for tokenizer in pair(patch_size=patch_size):
        pixels = images.clone().requires_grad_()
        tokens = tokenizer(pixels, visible)
        (tokens * upstream).sum().backward()
        results.append([tokens.detach(), pixels.grad, *[kernel.grad for kernel in tokenizer.kernels]])
    for dense, spconv in zip(*results):
        assert relative(spconv, dense) < 1e-5
    tokens = results[0][0]
    assert tokens.shape == (batch, grid[0] * grid[1], 12)
    assert not tokens[~visible].any()
    if kind == "all":
        assert relative(pair(patch_size=patch_size)[1](images), tokens) < 1e-5


@pytest.mark.parametrize(
    "make", [lambda: pair()[0], lambda: pair()[1], lambda: PatchEmbed(12)], ids=["dense", "spconv", "patch"]
)
def test_hidden_pixels_change_no_visible_token(make):
    tokenizer, grid = make(), (4, 5)
    images = torch.randn(2, 3, 64, 80)
    for kind in ("random", "block", "one"):
        visible = masks(grid, 2)[kind]
        shown = visible.view(2, 1, *grid).repeat_interleave(16, 2).repeat_interleave(16, 3)
        before = tokenizer(images, visible)
        for other in (torch.randn_like(images) * 100, torch.full_like(images, float("nan"))):
            assert torch.equal(tokenizer(torch.where(shown, images, other), visible), before)


def test_a_visible_pixel_does_reach_its_neighbours():
    """The other side of the test above: visible patches do see each other across their border."""
    dense, spconv = pair()
    images, visible = torch.randn(1, 3, 32, 32), torch.ones(1, 4, dtype=torch.bool)
    changed = images.clone()
    changed[..., 15] += 1
    for tokenizer in (dense, spconv):
        difference = (tokenizer(changed, visible) - tokenizer(images, visible)).abs().sum(-1)[0]
        assert (difference > 0).all()


def test_active_sites_never_grow():
    """After every layer the active sites are those of the visible patches, by spconv's own indices."""
    _, tokenizer = pair()
    grid, images = (3, 4), torch.randn(2, 3, 48, 64)
    visible = masks(grid, 2)["random"]
    active = ActivePatches(visible, grid)
    x = tokenizer.sparse_input(images, visible)
    side = 16
    for kernel, pool in zip(tokenizer.kernels, tokenizer.pools):
        x = sparse.strided_submanifold_conv(x, kernel, active)
        side //= 2
        check_sites(x, visible, grid, side)
        if pool:
            x = sparse.sparse_max_blur_pool(x, active)
            side //= 2
            check_sites(x, visible, grid, side)
    assert side == 1


def check_sites(x, visible, grid, side):
    occupied = torch.zeros(len(visible), grid[0] * side, grid[1] * side, dtype=torch.bool)
    image, row, column = x.indices.long().T
    occupied[image, row, column] = True
    expected = visible.view(-1, *grid).repeat_interleave(side, 1).repeat_interleave(side, 2)
    assert torch.equal(occupied, expected)
    assert len(x.indices) == expected.sum()


def test_masked_image_is_a_real_sparse_tensor():
    import spconv.pytorch

    _, tokenizer = pair()
    images, visible = torch.randn(2, 3, 32, 48), masks((2, 3), 2)["random"]
    x = tokenizer.sparse_input(images, visible)
    assert isinstance(x, spconv.pytorch.SparseConvTensor)
    assert x.features.shape == (visible.sum() * 256, 3)
    assert x.indices.is_contiguous() and x.indices.dtype == torch.int32
    shown = visible.view(2, 1, 2, 3).repeat_interleave(16, 2).repeat_interleave(16, 3)
    assert torch.equal(x.dense(), images * shown)


def test_spconv_really_runs(monkeypatch):
    """The spconv engine calls spconv once per convolution; the dense engine never does."""
    from spconv.pytorch import functional

    calls = []
    original = functional.indice_conv
    monkeypatch.setattr(functional, "indice_conv", lambda *a, **k: calls.append(1) or original(*a, **k))
    dense, spconv = pair()
    images, visible = torch.randn(1, 3, 64, 64), masks((4, 4), 1)["block"]
    dense(images, visible)
    assert not calls
    spconv(images, visible)
    assert len(calls) == 2


def test_packed_form_and_its_indices():
    for tokenizer in (*pair(), PatchEmbed(12)):
        images, visible = torch.randn(2, 3, 48, 32), masks((3, 2), 2)["random"]
        packed, indices = tokenizer.packed(images, visible)
        assert packed.shape == (visible.sum(), 12)
        assert torch.equal(indices, visible.nonzero())
        assert torch.equal(tokenizer(images, visible)[indices[:, 0], indices[:, 1]], packed)


def test_under_autocast_spconv_stays_fp32():
    dense, spconv = pair()
    images, visible = torch.randn(2, 3, 64, 64), masks((4, 4), 2)["block"]
    expected = dense(images, visible)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(spconv(images, visible), expected) < 1e-5
        assert relative(dense(images, visible).float(), expected) < 3e-2


def test_max_blur_pool_by_hand():
    """From its definition: max over 2x2, no padding, then [1 2 1] x [1 2 1] / 16, stride 2, zero padding 1."""
    x = torch.rand(1, 1, 6, 4, dtype=torch.double)
    top = torch.zeros(7, 5, dtype=torch.double)  # the maximum map with one zero all round
    for i in range(5):
        for j in range(3):
            top[1 + i, 1 + j] = x[0, 0, i : i + 2, j : j + 2].max()
    tap = torch.tensor([1, 2, 1], dtype=torch.double)
    kernel = tap[:, None] * tap / 16
    expected = torch.stack(
        [torch.stack([(top[i : i + 3, j : j + 3] * kernel).sum() for j in range(0, 3, 2)]) for i in range(0, 5, 2)]
    )
    assert torch.allclose(sparse.max_blur_pool(x)[0, 0], expected)


def test_patch_embed_is_a_convolution():
    tokenizer, images = PatchEmbed(12), torch.randn(2, 3, 32, 48)
    expected = F.conv2d(images, tokenizer.proj.weight, tokenizer.proj.bias, stride=16).flatten(2).mT
    assert torch.allclose(tokenizer(images), expected, atol=1e-5)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"image side 225 is not a multiple of patch_size 16; nearest: 224 or 240"):
        pair()[0](torch.zeros(1, 3, 225, 224))
    with pytest.raises(ValueError, match="expected one of"):
        SparseTokenizer(12, patch_size=5)
    with pytest.raises(ValueError, match="unknown engine"):
        SparseTokenizer(12, engine="minkowski")
    with pytest.raises(ValueError, match=r"visible has shape \(1, 9\)"):
        pair()[0](torch.zeros(1, 3, 32, 32), torch.ones(1, 9, dtype=torch.bool))


def test_engine_that_cannot_work_says_why(monkeypatch):
    monkeypatch.setattr(sparse, "spconv_failure", lambda device: "spconv does not import (no module)")
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="cannot work here: spconv does not import"):
        sparse.choose_engine("spconv", cpu)
    assert sparse.choose_engine("auto", cpu) == "dense"
    assert sparse.choose_engine("dense", cpu) == "dense"


def test_self_test_notices_a_wrong_convolution(monkeypatch):
    from spconv.pytorch import functional

    original = functional.indice_conv
    monkeypatch.setattr(functional, "indice_conv", lambda *a, **k: 1.01 * original(*a, **k))
    assert "self-test" in sparse.spconv_failure.__wrapped__("cpu")
