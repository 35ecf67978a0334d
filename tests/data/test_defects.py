"""Drawn defects: their masks are exact, also at another resolution; a whole flower is what it was."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scott_sparse.data.defects import DRAWN_DEFECTS, draw_defect, drawn_source
from scott_sparse.data.petals import petals_mask, petals_source, render


@pytest.mark.parametrize("kind", DRAWN_DEFECTS)
def test_a_mask_is_where_the_flower_changed(kind):
    image, mask = draw_defect(3, kind)
    whole, classes, _ = render([3], split="test")
    change = (image.int() - whole[0].int()).abs().amax(0)
    assert mask.float().mean() > 0.003 and change[mask > 0].float().median() > 20
    near = F.max_pool2d(mask[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0
    if kind == "missing petal":  # nothing but a petal, whose shadow fell beyond it
        assert (classes[0][mask > 0] == 1).all()
    else:
        assert change[~near].max() == 0
    fine = F.avg_pool2d(draw_defect(3, kind, size=128)[1][None, None].float(), 2)[0, 0]
    assert (fine - mask).abs().mean() < 0.02


def test_the_layout():
    source = drawn_source(16)
    assert source.names[0] == "train/good/0" and source.names[-1] == "test/missing petal/99"
    assert source.splits == {"train": range(1000), "test": range(1000, 1500)}
    picture = torch.from_numpy(np.array(source.picture(1000))).permute(2, 0, 1)
    assert torch.equal(picture, render([0], split="test", size=16)[0][0])


def test_masks_of_petals_by_name():
    source = petals_source(16)
    assert (petals_mask(source.names[37], 16) == render([37], split="train", size=16)[1][0].numpy()).all()
