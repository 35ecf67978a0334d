"""All engines give the same tokens and gradients, and no hidden pixel reaches a visible token."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, engines_on
from oracles import max_blur_pool_by_loop, pixel_mask

from scott_sparse import PatchTokenizer, SparseTokenizer, draw_visible
from scott_sparse.model.engines import ENGINES, choose_engine, spconv
from scott_sparse.model.engines.dense import max_blur_pool
from scott_sparse.model.sites import ActiveSites

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


def engine(name, patch_size=16):
    """The same weights whatever the engine."""
    torch.manual_seed(1)
    return SparseTokenizer(12, patch_size=patch_size, stem_width=8, engine=name)


def relative(got, expected):
    return ((got - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["all", "random", "block", "one", "none", "uneven"])
@pytest.mark.parametrize("patch_size", [16, 8, 4])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_engines_agree_forward_and_backward(grid, patch_size, kind, batch, device):
    visible = masks(grid, batch)[kind].to(device)
    images = torch.randn(batch, 3, grid[0] * patch_size, grid[1] * patch_size, device=device)
    upstream = torch.randn(batch, grid[0] * grid[1], 12, device=device)
    results = []
    for name in engines_on(device):
        tokenizer = engine(name, patch_size).to(device)
        pixels = images.clone().requires_grad_()
        tokens = tokenizer(pixels, visible, count=None if kind == "uneven" else int(visible[0].sum()))
        (tokens * upstream).sum().backward()
        results.append([tokens.detach(), pixels.grad, *[kernel.grad for kernel in tokenizer.kernels]])
    for dense, *sparse_ones in zip(*results):
        for found in sparse_ones:
            assert relative(found, dense) < 1e-5
    tokens = results[0][0]
    assert tokens.shape == (batch, grid[0] * grid[1], 12)
    assert not tokens[~visible].any()
    if kind == "all":
        assert relative(engine("auto", patch_size).to(device)(images), tokens) < 1e-5


@pytest.mark.parametrize("name", [*ENGINES, "patch"])
def test_hidden_pixels_change_no_visible_token(name):
    tokenizer, grid = PatchTokenizer(12) if name == "patch" else engine(name), (4, 5)
    images = torch.randn(2, 3, 64, 80)
    for kind in ("random", "block", "one"):
        visible = masks(grid, 2)[kind]
        shown = pixel_mask(visible, grid, 16)
        before = tokenizer(images, visible)
        for other in (torch.randn_like(images) * 100, torch.full_like(images, float("nan"))):
            assert torch.equal(tokenizer(torch.where(shown, images, other), visible), before)


def test_a_visible_pixel_does_reach_its_neighbours():
    """The other side of the test above: visible patches do see each other across their border."""
    images, visible = torch.randn(1, 3, 32, 32), torch.ones(1, 4, dtype=torch.bool)
    changed = images.clone()
    changed[..., 15] += 1
    for tokenizer in map(engine, engines_on("cpu")):
        difference = (tokenizer(changed, visible) - tokenizer(images, visible)).abs().sum(-1)[0]
        assert (difference > 0).all()


def test_active_sites_never_grow():
    """After every layer the active sites are those of the visible patches, by spconv's own indices."""
    SparseConvTensor = pytest.importorskip("spconv.pytorch").SparseConvTensor
    tokenizer = engine("spconv")
    grid, images = (3, 4), torch.randn(2, 3, 48, 64)
    visible = masks(grid, 2)["random"]
    layers = spconv.SpConv(ActiveSites(visible, grid))
    x = tokenizer.sparse_input(images, visible)
    assert isinstance(x, SparseConvTensor) and x.indices.is_contiguous() and x.indices.dtype == torch.int32
    assert torch.equal(x.dense(), images * pixel_mask(visible, grid, 16))
    side = 16
    for kernel in tokenizer.kernels:
        for layer in (lambda x, kernel=kernel: layers.conv(x, kernel, stride=2, padding=3), layers.pool):
            x, side = layer(x), side // 2
            expected = pixel_mask(visible, grid, side)[:, 0]
            occupied = torch.zeros_like(expected)
            image, row, column = x.indices.long().T
            occupied[image, row, column] = True
            assert torch.equal(occupied, expected) and len(x.indices) == expected.sum()
    assert side == 1


def test_spconv_really_runs(monkeypatch):
    """The spconv engine calls spconv once per convolution; the others never do."""
    functional = pytest.importorskip("spconv.pytorch.functional")
    calls = []
    original = functional.indice_conv
    monkeypatch.setattr(functional, "indice_conv", lambda *a, **k: calls.append(1) or original(*a, **k))
    images, visible = torch.randn(1, 3, 64, 64), masks((4, 4), 1)["block"]
    engine("dense")(images, visible)
    engine("halo")(images, visible)
    assert not calls
    engine("spconv")(images, visible)
    assert len(calls) == 2


def test_packed_form_and_its_indices():
    for tokenizer in (*map(engine, engines_on("cpu")), PatchTokenizer(12)):
        images, visible = torch.randn(2, 3, 48, 32), masks((3, 2), 2)["random"]
        packed, indices = tokenizer.packed(images, visible)
        assert packed.shape == (visible.sum(), 12)
        assert torch.equal(indices, visible.nonzero())
        assert torch.equal(tokenizer(images, visible)[indices[:, 0], indices[:, 1]], packed)


def test_precision_under_autocast():
    """spconv stays fp32. The others compute in bf16, within its rounding; their gradients differ from those in fp32 by
    more, as another of two nearly equal values is the maximum, but not from each other."""
    images, visible = torch.randn(2, 3, 64, 64), masks((4, 4), 2)["block"]
    upstream = torch.randn(2, 16, 12)
    expected = engine("dense")(images, visible)
    tokens, gradients = {}, {}
    for name in engines_on("cpu"):
        tokenizer = engine(name)
        with torch.autocast("cpu", torch.bfloat16):
            tokens[name] = tokenizer(images, visible).float()
        tokens[name].backward(upstream)
        gradients[name] = [kernel.grad for kernel in tokenizer.kernels]
    if "spconv" in tokens:
        assert relative(tokens["spconv"], expected) < 1e-5
    for name in ("dense", "halo"):
        assert 1e-4 < relative(tokens[name], expected) < 1e-2
    for of_halo, of_dense in zip(gradients["halo"], gradients["dense"]):
        assert relative(of_halo, of_dense) < 1e-2


def test_max_blur_pool_is_what_its_definition_says():
    x = torch.rand(6, 4, dtype=torch.double)
    assert torch.allclose(max_blur_pool(x[None, None])[0, 0], max_blur_pool_by_loop(x))


def test_patch_tokenizer_is_a_convolution():
    tokenizer, images = PatchTokenizer(12), torch.randn(2, 3, 32, 48)
    expected = F.conv2d(images, tokenizer.proj.weight, tokenizer.proj.bias, stride=16).flatten(2).mT
    assert torch.allclose(tokenizer(images), expected, atol=1e-5)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"image side 225 is not a multiple of patch_size 16; nearest: 224 or 240"):
        engine("dense")(torch.zeros(1, 3, 225, 224))
    with pytest.raises(ValueError, match="expected one of"):
        SparseTokenizer(12, patch_size=5)
    for name in ("minkowski", "tiles"):
        with pytest.raises(ValueError, match=f"unknown engine '{name}'; expected one of auto, dense, halo, spconv"):
            SparseTokenizer(12, engine=name)
    with pytest.raises(ValueError, match="tiles is called halo now"):
        choose_engine("tiles", torch.device("cpu"), visible_share=0.4, dim=384)
    with pytest.raises(ValueError, match=r"visible has shape \(1, 9\)"):
        engine("dense")(torch.zeros(1, 3, 32, 32), torch.ones(1, 9, dtype=torch.bool))


def test_engine_that_cannot_work_says_why(monkeypatch):
    monkeypatch.setattr(spconv, "spconv_failure", lambda device: "spconv does not import (no module)")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(ValueError, match="cannot work here: spconv does not import"):
        choose_engine("spconv", cpu, visible_share=0.4, dim=384)
    assert choose_engine("auto", cuda, visible_share=0.4, dim=384) == "dense"
    for name in ("halo", "dense"):
        assert choose_engine(name, cpu, visible_share=0.4, dim=384) == name


def test_auto_follows_the_device_the_width_and_what_is_visible(monkeypatch):
    monkeypatch.setattr(spconv, "spconv_failure", lambda device: None)

    def chosen(device, share, dim):
        return choose_engine("auto", torch.device(device), visible_share=share, dim=dim)

    assert [chosen("cpu", share, 384) for share in (0.1, 0.5, 0.9)] == ["halo", "halo", "dense"]
    assert [chosen("cpu", share, 96) for share in (0.1, 0.4, 0.9)] == ["halo", "dense", "dense"]
    assert chosen("cuda", 0.4, 384) == "spconv"


class ReferenceTensor:
    """What the engine uses of spconv's SparseConvTensor."""

    def __init__(self, features, indices, spatial_shape, batch_size):
        assert features.ndim == 2 and indices.dtype == torch.int32 and indices.is_contiguous()
        self.features, self.indices, self.spatial_shape = features, indices, spatial_shape

    def replace_feature(self, features):
        return ReferenceTensor(features, self.indices, self.spatial_shape, None)


def reference_indice_conv(features, filters, pairs, counts, rows, algo):
    """Each kernel position by itself; like spconv-triton it goes by the -1 in `pairs`, not by `counts`."""
    out = features.new_zeros(rows, len(filters))
    for kernel, (source, into) in zip(filters.flatten(1, 2).unbind(1), pairs.long().unbind(1)):
        out = out.index_add(0, into[into >= 0], features[source[source >= 0]] @ kernel.T)
    return out


@pytest.fixture
def packages(monkeypatch):
    """A function that puts modules in the place of installed packages; None: not installed."""

    def install(**convolutions):
        for package, convolution in convolutions.items():
            names = ("", ".core", ".pytorch", ".pytorch.functional")
            modules = {name: convolution and types.ModuleType(package + name) for name in names}
            if convolution:
                modules[".core"].ConvAlgo = types.SimpleNamespace(Native=None)
                modules[".pytorch"].SparseConvTensor = ReferenceTensor
                modules[".pytorch"].functional = modules[".pytorch.functional"]
                modules[".pytorch.functional"].indice_conv = convolution
            for name, module in modules.items():
                monkeypatch.setitem(sys.modules, package + name, module)
        forget()

    def forget():
        spconv.import_package.cache_clear()
        spconv.choose_package.cache_clear()

    yield install
    monkeypatch.undo()
    forget()


def test_spconv_triton_where_spconv_is_absent(packages):
    """The package itself has no CPU kernels: a reference stands for its functions."""
    packages(spconv=None, spconv_triton=reference_indice_conv)
    images, visible = torch.randn(2, 3, 48, 64), masks((3, 4), 2)["block"]
    found = []
    for name, label in (("dense", "dense"), ("spconv", "spconv (package spconv_triton)")):
        tokenizer = engine(name)
        assert tokenizer.engine_name(name, torch.device("cpu"), visible_share=0.5, dim=12) == label
        tokens = tokenizer(images, visible)
        tokens.square().sum().backward()
        found.append([tokens.detach(), *(kernel.grad for kernel in tokenizer.kernels)])
    assert all(relative(triton, dense) < 1e-5 for dense, triton in zip(*found))


def raises(*arguments):
    raise AssertionError


WRONG = {
    "absent": (None, "does not import (ModuleNotFoundError: import of {}.pytorch halted; None in sys.modules)"),
    "no kernels": (raises, "fails in its self-test (AssertionError)"),
    "wrong": (lambda *a: 1.01 * reference_indice_conv(*a), "differs from F.conv2d by "),
    "no gradient": (lambda *a: reference_indice_conv(*a).detach(), "fails in its self-test (RuntimeError: element 0"),
}


@pytest.mark.parametrize("first, second", [("absent", "no kernels"), ("wrong", "absent"), ("no gradient", "wrong")])
def test_both_packages_broken(first, second, packages):
    packages(spconv=WRONG[first][0], spconv_triton=WRONG[second][0])
    with pytest.raises(ValueError, match="engine spconv cannot work here: expected a package") as error:
        choose_engine("spconv", torch.device("cpu"), visible_share=0.4, dim=384)
    message = str(error.value)
    assert "\n" not in message and message.endswith("; use --engine auto, halo or dense.")
    for package, kind, remedy in (("spconv", first, "spconv-cu120"), ("spconv_triton", second, "spconv-triton")):
        assert f"{package} {WRONG[kind][1].format(package)}" in message
        assert f"remedy: pip install {remedy}" in message
    with pytest.raises(ValueError, match="engine spconv cannot work here"):
        engine("dense").sparse_input(torch.zeros(1, 3, 32, 32), torch.ones(1, 4, dtype=torch.bool))
