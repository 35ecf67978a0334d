"""Fixed crops, and features averaged over them, against a loop over images and crops."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY

from scott_sparse import Encoder, load_encoder, save_encoder
from scott_sparse.model.crops import CORNER_SIDE, cut_crops, fixed_crops


@pytest.mark.parametrize("size", [(8, 24), (16, 16), (24, 8)])
def test_eight_crops_are_the_corners_and_their_mirror_images(size):
    sizes = torch.tensor([[40, 60], [60, 40], [1, 7], [33, 33]])
    boxes, mirrored = fixed_crops(sizes, size=size, crops=8)
    assert mirrored.tolist() == [False] * 4 + [True] * 4 and torch.equal(boxes[:, :4], boxes[:, 4:])
    (largest,) = fixed_crops(sizes, size=size)[0].unbind(1)
    for (height, width), image_boxes, (_, _, tallest, widest) in zip(sizes.tolist(), boxes.tolist(), largest.tolist()):
        h, w = image_boxes[0][2:]
        assert h == pytest.approx(CORNER_SIDE * tallest, abs=1) and w == pytest.approx(CORNER_SIDE * widest, abs=1)
        corners = [(top, left) for top in (0, height - h) for left in (0, width - w)]
        assert image_boxes[:4] == [[*corner, h, w] for corner in corners]


@torch.inference_mode()
@pytest.mark.parametrize("crops", [1, 8])
@pytest.mark.parametrize("size", [None, (16, 24)])
def test_pooled_features(crops, size, tmp_path):
    save_encoder(Encoder(dataclasses.replace(TINY, patch_size=8)), tmp_path)
    encoder, images = load_encoder(tmp_path), torch.randn(3, 3, 32, 40)
    pooled = encoder.pooled(images, size=size, crops=crops)
    boxes, mirrored = fixed_crops(torch.tensor([[32, 40]]), size=size or (32, 40), crops=crops)
    for image, ours in zip(images, pooled):
        vectors = []
        for (top, left, height, width), mirror in zip(boxes[0].tolist(), mirrored.tolist()):
            crop = image[:, top : top + height, left : left + width][None]
            crop = F.interpolate(crop, size or (32, 40), mode="bicubic", antialias=True)
            tokens = encoder(torch.flip(crop, (3,)) if mirror else crop)[0]
            vectors += [(token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt() for token in tokens]
        torch.testing.assert_close(ours, torch.stack(vectors).mean(0), atol=1e-5, rtol=1e-4)
    if crops == 1 and size is None:
        assert next(cut_crops(images, size=(32, 40))).equal(images)


def test_another_number_is_refused():
    with pytest.raises(ValueError, match="crops is 5; expected 1, the centre crop, or 8"):
        fixed_crops(torch.tensor([[8, 8]]), size=(8, 8), crops=5)
