"""Views of both implementations against torchvision, image by image."""

import cv2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from scott_sparse.data import views_cpu, views_gpu
from scott_sparse.data.views import (
    IDLE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    OPS,
    ViewConfig,
    Views,
    draw_views,
    make_views,
    resize,
)
from scott_sparse.model.preprocess import center_crop_boxes

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
    """Noise of medium contrast, so that a resize of it stays within 0 and 255.

    Bytes are clipped between the two passes of a resize, floats after both; they would differ where it overshoots.
    """
    return torch.randint(64, 192, shape, generator=seeded(seed), dtype=torch.uint8)


def padded_crops(image, boxes):
    """Boxes of an image (3, H, W), each (height, width, 3), padded with noise that must not be seen."""
    H, W = boxes[:, 2:].amax(0).tolist()
    crops = random_bytes(len(boxes), H + 2, W + 3, 3, seed=9)
    for crop, (top, left, height, width) in zip(crops, boxes.tolist()):
        crop[:height, :width] = image[:, top : top + height, left : left + width].permute(1, 2, 0)
    return crops


def cropped_by_torchvision(image, box, flip, size):
    out = image.float() / 255
    out = TF.resized_crop(out, *box.tolist(), list(size), InterpolationMode.BICUBIC, antialias=True)
    return (out.flip(-1) if flip else out).clamp(0, 1)


def normalised(image):
    return TF.normalize(image, list(IMAGENET_MEAN), list(IMAGENET_STD))


# How far from torchvision a resize may be, in normalised units, of which a level is at most 1 / 255 / 0.224: bytes are
# rounded after each of the two passes.
TOLERANCE = {views_gpu: 1e-3, views_cpu: 1.6 / 255 / 0.224}


@pytest.fixture(params=TOLERANCE, ids=["gpu", "cpu"])
def module(request, monkeypatch):
    """Each implementation in turn makes the views, here on the CPU."""
    monkeypatch.setattr("scott_sparse.data.views_cpu", request.param)
    return request.param


@pytest.mark.parametrize("size", [(64, 64), (17, 40), (224, 96), (1, 1)])
@pytest.mark.parametrize("sides", [(61, 47), (128, 341), (9, 200)])
def test_resize_equals_torchvision(module, sides, size):
    H, W = sides
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
    image = random_bytes(3, H, W)
    ours = resize(padded_crops(image, boxes), boxes[:, 2:], flip, size=size)
    theirs = [cropped_by_torchvision(image, *x, size) for x in zip(boxes, flip, strict=True)]
    theirs = normalised(torch.stack(theirs))
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE[module], rtol=0)


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
    images = torch.rand(len(amounts), 3, 12, 15, generator=seeded())
    # Ties between channels, greys, black and white: where hue branches.
    images[..., 0, :6] = images[..., 1, :6]
    images[..., 2, 3:9] = images[..., 1, 3:9]
    images[..., :, 9, :4], images[..., :, 9, 4:] = 0, 1
    theirs = torch.stack([ORACLE[name](image, x) for image, x in zip(images, amounts, strict=True)])
    op = OPS.index(name)
    ours = views_gpu.colour(
        images.clone(), ops=torch.full((len(amounts), 1), op), amounts=torch.tensor(amounts)[:, None]
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4 if name == "hue" else 1e-5, rtol=0)

    # In bytes: rounded once, by a blur twice; a hue is one of 256 (Pillow errs by up to 12 levels).
    tolerance = {"hue": 10, "blur": 1.5}.get(name, 1.01)
    levels = (images * 255).round().byte()
    theirs = torch.stack([ORACLE[name](image / 255, x) for image, x in zip(levels, amounts, strict=True)])
    levels, ops = levels.permute(0, 2, 3, 1).contiguous(), torch.full((len(amounts), 1), op)
    ours = views_cpu.colour(levels, ops=ops, amounts=torch.tensor(amounts)[:, None])
    for difference in (ours.permute(0, 3, 1, 2) - 255 * theirs).abs():
        assert difference.max() <= tolerance and difference.mean() < 0.9


def test_idle_colourings_change_nothing():
    images = torch.rand(4, 3, 8, 8, generator=seeded())
    ops = torch.full((4, 6), IDLE)
    ops[1, 0] = OPS.index("grey")
    out = views_gpu.colour(images.clone(), ops=ops, amounts=torch.zeros(4, 6))
    assert torch.equal(out[[0, 2, 3]], images[[0, 2, 3]]) and not torch.equal(out[1], images[1])


@pytest.fixture(scope="module")
def batch():
    """Images of four sizes and two crops of each, padded with noise that must not be seen."""
    sizes = torch.tensor([[40, 52], [33, 60], [48, 21], [10, 10]]).repeat(6, 1)
    config = ViewConfig(crops=2, colour=0.9, grey=0.3, blur=0.5)
    images = [random_bytes(3, *side, seed=i) for i, side in enumerate(sizes.tolist())]
    views = draw_views(sizes, config, generator=seeded(3))
    H, W = views.boxes[..., 2:].amax((0, 1)).tolist()
    crops = random_bytes(24, 2, H, W, 3, seed=5)
    for image, image_crops, boxes in zip(images, crops, views.boxes):
        for crop, (_, _, h, w), padded in zip(image_crops, boxes.tolist(), padded_crops(image, boxes)):
            crop[:h, :w] = padded[:h, :w]
    return images, crops, views


def test_pipeline_equals_torchvision_replayed(module, batch):
    images, crops, views = batch
    context, target = make_views(crops, views, size=(32, 24))
    assert context.shape == (24, 2, 3, 32, 24) and target.shape == (24, 3, 32, 24)
    errors = []
    for b, image in enumerate(images):
        for v, k, ours in ((0, 0, context[b, 0]), (1, 0, context[b, 1]), (0, 1, target[b])):
            box, flip = views.boxes[b, v], views.flip[b, v]
            theirs = cropped_by_torchvision(image, box, flip, (32, 24))
            for op, amount in zip(views.ops[b, v, k].tolist(), views.amounts[b, v, k].tolist(), strict=True):
                if op != IDLE:
                    theirs = ORACLE[OPS[op]](theirs, amount)
            errors.append((ours - normalised(theirs)).abs())
    errors = torch.stack(errors)
    if module is views_gpu:
        assert errors.max() < 1e-3
    else:  # up to six roundings to a byte and to a hue, in normalised units
        assert errors.mean() < 0.8 / 255 / 0.225 and errors.quantile(0.99) < 6 / 255 / 0.225


def test_a_cpu_makes_views_in_bytes_and_gives_opencv_its_threads_back(batch):
    _, crops, views = batch
    cv2.setNumThreads(2)
    context, _ = make_views(crops, views, size=(16, 16))
    levels = context * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    assert (255 * levels - (255 * levels).round()).abs().max() < 1e-3
    assert cv2.getNumThreads() == 2


@pytest.mark.parametrize("rows", [slice(5, 13), torch.tensor([20, 0, 7])], ids=["slice", "indices"])
def test_a_share_of_the_views_is_that_share_of_the_whole(module, batch, rows):
    _, crops, views = batch
    parts = make_views(crops[rows], views[rows], size=(32, 24))
    for part, every in zip(parts, make_views(crops, views, size=(32, 24)), strict=True):
        torch.testing.assert_close(part, every[rows], atol=1e-5, rtol=0)


def test_views_of_another_batch_are_refused(batch):
    _, crops, views = batch
    with pytest.raises(ValueError, match="crops of 23 images but views of 24"):
        make_views(crops[1:], views, size=(8, 8))
    with pytest.raises(ValueError, match="an extent is empty or exceeds the 5 x"):
        make_views(crops[:, :, :5], views, size=(8, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_views_on_the_gpu_equal_the_batched_ones_on_the_cpu(batch, monkeypatch):
    _, crops, views = batch
    monkeypatch.setattr("scott_sparse.data.views_cpu", views_gpu)
    on_cpu = make_views(crops, views, size=(32, 24))
    for ours, expected in zip(make_views(crops.cuda(), views, size=(32, 24)), on_cpu, strict=True):
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


def test_center_crop_boxes_are_the_largest_centred_ones():
    sizes = torch.tensor([[40, 60], [40, 20], [1, 7]])
    boxes = torch.tensor([[10, 0, 20, 60], [16, 0, 7, 20], [0, 2, 1, 3]])
    assert torch.equal(center_crop_boxes(sizes, size=(8, 24)), boxes)
    image = random_bytes(3, 40, 60)
    upright = torch.zeros(3, dtype=torch.bool)
    ours = resize(padded_crops(image, boxes), boxes[:, 2:], upright, size=(8, 24))
    theirs = normalised(torch.stack([cropped_by_torchvision(image, box, False, (8, 24)) for box in boxes]))
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE[views_cpu], rtol=0)
    with pytest.raises(ValueError, match="exceeds"):
        resize(padded_crops(image, boxes), boxes[:, 2:] + 9, upright, size=(8, 24))


def test_a_share_of_views_is_their_rows():
    views = draw_views(torch.tensor([[30, 40]] * 5), ViewConfig(), generator=seeded(7))
    assert isinstance(views[1:3], Views) and torch.equal(views[1:3].boxes, views.boxes[1:3])


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


def test_a_resize_that_overshoots_is_clipped(module):
    """Of a hard edge, bicubic makes values below 0 and above 1."""
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[:, :, 4:] = 255
    boxes, flip = torch.tensor([[0, 0, 8, 8]]), torch.tensor([False])
    theirs = normalised(cropped_by_torchvision(image, boxes[0], flip[0], (20, 20)))
    ours = resize(padded_crops(image, boxes), boxes[:, 2:], flip, size=(20, 20))[0]
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE[module], rtol=0)
