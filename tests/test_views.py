"""Batched views against torchvision, image by image."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from scott_sparse.views import (
    IDLE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    OPS,
    ViewConfig,
    colour,
    crop,
    draw_views,
    make_views,
    normalise,
    whole,
)

ORACLE = {
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
    "grey": lambda image, _: TF.rgb_to_grayscale(image, num_output_channels=3),
    "blur": lambda image, sigma: TF.gaussian_blur(image, [9, 9], [sigma, sigma]),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_bytes(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=seeded(seed), dtype=torch.uint8)


def cropped_by_torchvision(image, box, flip, size):
    top, left, height, width = box.tolist()
    out = TF.resized_crop(
        image.float() / 255, top, left, height, width, list(size), InterpolationMode.BICUBIC, antialias=True
    )
    return (out.flip(-1) if flip else out).clamp(0, 1)


@pytest.mark.parametrize("size", [(64, 64), (17, 40), (224, 96), (1, 1)])
@pytest.mark.parametrize("padded", [(61, 47), (128, 341), (9, 200)])
def test_crop_equals_torchvision(padded, size):
    H, W = padded
    boxes = torch.tensor(
        [
            [0, 0, H, W],
            [H - 5, W - 7, 5, 7],  # the far corner, enlarged
            [2, 3, 1, W - 3],  # one pixel high
            [0, W // 2, H, 1],  # one pixel wide
            [H - 1, W - 1, 1, 1],
            [1, 1, H - 2, W // 2],
        ]
    )
    flip = torch.tensor([False, True, True, False, False, True])
    images = random_bytes(len(boxes), 3, H, W)
    ours = crop(images, boxes, flip, size=size)
    theirs = torch.stack([cropped_by_torchvision(*x, size) for x in zip(images, boxes, flip, strict=True)])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_crop_sees_nothing_outside_its_box():
    images, boxes, flip = random_bytes(1, 3, 30, 30), torch.tensor([[5, 6, 10, 12]]), torch.tensor([False])
    around = random_bytes(1, 3, 30, 30, seed=1)
    around[..., 5:15, 6:18] = images[..., 5:15, 6:18]
    assert torch.equal(crop(images, boxes, flip, size=(8, 8)), crop(around, boxes, flip, size=(8, 8)))


def test_crop_refuses_a_box_outside_the_image():
    images = random_bytes(1, 3, 10, 20)
    with pytest.raises(ValueError, match="10 x 20"):
        crop(images, torch.tensor([[0, 0, 20, 10]]), torch.tensor([False]), size=(8, 8))


@pytest.mark.parametrize(
    "name, amounts",
    [
        ("brightness", [0.0, 0.6, 1.0, 1.4]),
        ("contrast", [0.0, 0.6, 1.0, 1.4]),
        ("saturation", [0.0, 0.8, 1.0, 1.2]),
        ("hue", [-0.5, -0.1, 0.0, 0.03, 0.1, 0.5]),
        ("grey", [0.0]),
        ("blur", [0.1, 0.7, 2.0]),
    ],
)
def test_each_colour_operation_equals_torchvision(name, amounts):
    images = torch.rand(len(amounts), 1, 3, 12, 15, generator=seeded())
    # Ties between channels, greys, black and white: where hue branches.
    images[..., 0, :6] = images[..., 1, :6]
    images[..., 2, 3:9] = images[..., 1, 3:9]
    images[..., :, 9, :4], images[..., :, 9, 4:] = 0, 1
    ops = torch.full((len(amounts), 1, 1, 1), OPS.index(name))
    ours = colour(images, ops=ops, amounts=torch.tensor(amounts).view(-1, 1, 1, 1))[:, 0, 0]
    theirs = torch.stack([ORACLE[name](image[0], x) for image, x in zip(images, amounts, strict=True)])
    torch.testing.assert_close(ours, theirs, atol=1e-4 if name == "hue" else 1e-5, rtol=0)


def test_idle_colourings_change_nothing_and_inputs_are_not_overwritten():
    images = torch.rand(3, 2, 3, 8, 8, generator=seeded())
    before = images.clone()
    for ways in (1, 2):
        ops = torch.full((3, 2, ways, 6), IDLE)
        ops[1, 0, 0, 0] = OPS.index("grey")
        out = colour(images, ops=ops, amounts=torch.zeros(3, 2, ways, 6))
        assert torch.equal(images, before)
        assert torch.equal(out[[0, 2]], before[[0, 2], :, None].expand(-1, -1, ways, -1, -1, -1))
        assert not torch.equal(out[1, 0, 0], before[1, 0])


@pytest.fixture(scope="module")
def batch():
    """Images of four sizes, padded with noise that must not be seen, and two crops of each."""
    sizes = torch.tensor([[40, 52], [33, 60], [48, 21], [10, 10]]).repeat(6, 1)
    config = ViewConfig(crops=2, colour=0.9, grey=0.3, blur=0.5)
    return random_bytes(24, 3, 48, 60), sizes, draw_views(sizes, config, generator=seeded(3))


def test_pipeline_equals_torchvision_replayed(batch):
    images, _, views = batch
    for k, ours in enumerate(make_views(images, views, size=(32, 24))):
        assert ours.shape == (24, 2, 3, 32, 24)
        for b in range(24):
            for v in range(2):
                image = cropped_by_torchvision(images[b], views.boxes[b, v], views.flip[b, v], (32, 24))
                steps = views.ops[b, v, k].tolist(), views.amounts[b, v, k].tolist()
                for op, amount in zip(*steps, strict=True):
                    if op != IDLE:
                        image = ORACLE[OPS[op]](image, amount)
                theirs = TF.normalize(image, list(IMAGENET_MEAN), list(IMAGENET_STD))
                torch.testing.assert_close(ours[b, v], theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("rows", [slice(5, 13), torch.tensor([20, 0, 7])], ids=["slice", "indices"])
def test_a_share_of_the_views_is_that_share_of_the_whole(batch, rows):
    images, _, views = batch
    parts = make_views(images[rows], views[rows], size=(32, 24))
    for part, every in zip(parts, make_views(images, views, size=(32, 24)), strict=True):
        torch.testing.assert_close(part, every[rows], atol=1e-5, rtol=0)


def test_views_of_another_batch_are_refused(batch):
    images, _, views = batch
    with pytest.raises(ValueError, match="23 images but views of 24"):
        make_views(images[1:], views, size=(8, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_views_on_the_gpu_equal_those_on_the_cpu(batch):
    images, _, views = batch
    on_cpu = make_views(images, views, size=(32, 24))
    for chosen in (views, views.to("cuda")):
        for ours, expected in zip(make_views(images.cuda(), chosen, size=(32, 24)), on_cpu, strict=True):
            torch.testing.assert_close(ours.cpu(), expected, atol=1e-3, rtol=0)


def test_draws_follow_their_probabilities():
    config = ViewConfig()
    views = draw_views(torch.tensor([[200, 300]]).expand(8000, 2), config, generator=seeded())
    area = views.boxes[..., 2] * views.boxes[..., 3] / (200 * 300)
    ratio = views.boxes[..., 3] / views.boxes[..., 2]
    assert 0.195 < area.min() < 0.21 and 0.8 < area.max() <= 1
    assert 0.73 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.36
    assert views.flip.float().mean() == pytest.approx(0.5, abs=0.02)

    def share(name):
        return (views.ops == OPS.index(name)).any(-1).float().mean().item()

    for name in OPS[:4]:
        assert share(name) == pytest.approx(0.6 * 0.8, abs=0.02)
    assert share("grey") == pytest.approx(0.6 * 0.1, abs=0.01)
    assert share("blur") == pytest.approx(0.6 * 0.3, abs=0.02)
    assert (views.ops == IDLE).all(-1).float().mean() == pytest.approx(0.4 + 0.6 * 0.2 * 0.9 * 0.7, abs=0.02)
    assert not torch.equal(views.ops[:, :, 0], views.ops[:, :, 1])  # context and target are coloured apart

    # Orders: each jitter is first of the four a quarter of the time, and nothing comes between them.
    jitter = views.ops[views.ops[..., 0] < 4]
    for op in range(4):
        assert (jitter[:, 0] == op).float().mean() == pytest.approx(0.25, abs=0.02)
    assert (jitter[:, :4] < 4).all()
    both = ((views.ops == OPS.index("blur")).any(-1) & (views.ops < 4).any(-1)).sum()
    blur_first = ((views.ops[..., 0] == OPS.index("blur")) & (views.ops < 4).any(-1)).sum()
    assert blur_first / both == pytest.approx(0.5, abs=0.06)

    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
        ("blur", 0.1, 2.0),
    ):
        amounts = views.amounts[views.ops == OPS.index(name)]
        assert low <= amounts.min() < low + 0.02 and high - 0.02 < amounts.max() <= high + 1e-6


def test_same_seed_same_views():
    sizes = torch.tensor([[30, 40]] * 5)
    a, b = (draw_views(sizes, ViewConfig(), generator=seeded(7)) for _ in range(2))
    assert torch.equal(a.boxes, b.boxes) and torch.equal(a.ops, b.ops) and torch.equal(a.amounts, b.amounts)


side = st.integers(1, 60)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.tuples(side, side), min_size=1, max_size=8), seed=st.integers(0, 2**31))
def test_boxes_lie_in_their_images(sizes, seed):
    sizes = torch.tensor([*sizes, (1, 50), (50, 1), (3, 3), (1, 1)])
    boxes = draw_views(sizes, ViewConfig(crops=3), generator=seeded(seed)).boxes
    start, extent = boxes[..., :2], boxes[..., 2:]
    assert (start >= 0).all() and (extent >= 1).all()
    assert (start + extent <= sizes[:, None]).all()


def test_hopeless_ratios_fall_back_to_the_centre():
    sizes = torch.tensor([[100, 4000], [4000, 100]])
    boxes = draw_views(sizes, ViewConfig(), generator=seeded()).boxes[:, 0]
    assert boxes.tolist() == [[0, 1933, 100, 133], [1933, 0, 133, 100]]


def test_whole_is_the_centred_largest_box():
    images, sizes = random_bytes(3, 3, 40, 60), torch.tensor([[40, 60], [40, 20], [1, 7]])
    boxes = torch.tensor([[10, 0, 20, 60], [16, 0, 7, 20], [0, 2, 1, 3]])
    expected = normalise(crop(images, boxes, torch.zeros(3, dtype=torch.bool), size=(8, 24)))
    assert torch.equal(whole(images, sizes, size=(8, 24)), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"crops": 0}, "crops"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"crop_scale": (0.2, 1.5)}, "crop_scale"),
        ({"crop_ratio": (0.0, 1.0)}, "crop_ratio"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"grey": 1.2}, "grey"),
        ({"jitter": (0.4, 0.4, 0.2, 0.6)}, "hue"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ViewConfig(**change)


def test_empty_images_are_refused():
    with pytest.raises(ValueError, match="image 1 of the batch has no pixels"):
        draw_views(torch.tensor([[3, 3], [0, 5]]), ViewConfig(), generator=seeded())
