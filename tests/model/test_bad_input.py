"""A user's mistakes: ValueError in one line with what was expected, what was given, and the remedy."""

import jaxtyping
import pytest
import torch

from scott_sparse import MIMJEPA, Encoder, EncoderConfig, ObjectiveConfig, PatchTokenizer, SparseStem, SparseTokenizer
from scott_sparse.model.stages import Conv, MaxBlurPool

IMAGES, VISIBLE = torch.zeros(2, 3, 32, 48), torch.ones(2, 6, dtype=torch.bool)
FORWARD = {  # images and visible for all models: what the message says
    "bytes": (
        IMAGES.byte(),
        VISIBLE,
        "images are torch.uint8 of shape (2, 3, 32, 48); expected floating point",
        "/ 255",
    ),
    "integers": (IMAGES.long(), None, "images are torch.int64", "normalise"),
    "one image": (IMAGES[0], None, "expected floating point of shape (B, 3, H, W)", "give a batch"),
    "rank 5": (IMAGES[None], VISIBLE, "of shape (1, 2, 3, 32, 48); expected", "(B, 3, H, W)"),
    "channels last": (IMAGES.permute(0, 2, 3, 1), None, "of shape (2, 32, 48, 3)", "in_channels"),
    "one channel": (IMAGES[:, :1], VISIBLE, "of shape (2, 1, 32, 48)", "in_channels"),
    "side": (IMAGES[..., :40], None, "image side 40 is not a multiple of patch_size 16", "nearest: 32 or 48"),
    "small side": (IMAGES[..., :8], None, "image side 8 is not a multiple", "nearest: 16"),
    "visible: patches": (IMAGES, VISIBLE[:, :5], "visible has shape (2, 5); expected (2, 6)", "one entry per patch"),
    "visible: rows": (IMAGES, VISIBLE[:1], "visible has shape (1, 6); expected (2, 6)", "one row per image"),
    "visible: grid": (IMAGES, VISIBLE.view(2, 2, 3), "visible has shape (2, 2, 3); expected (2, 6)", "2 x 3 grid"),
    "visible: float": (IMAGES, VISIBLE.float(), "visible is torch.float32; expected torch.bool", "visible.bool()"),
    "visible: device": (
        IMAGES,
        VISIBLE.to("meta"),
        "visible is on meta, images are on cpu",
        "visible.to(images.device)",
    ),
}
MODELS = {
    "scott": lambda: SparseTokenizer(8),
    "patch": lambda: PatchTokenizer(8),
    "stem": lambda: SparseStem([Conv(8, kernel=16, stride=16)]),
    "encoder": lambda: Encoder(EncoderConfig(dim=32, depth=1, heads=2)),
}
WORDS = {
    "negative dim": (lambda: SparseTokenizer(-8), "expected 1 or more"),
    "negative channels": (lambda: SparseTokenizer(8, in_channels=-3), "in_channels is -3; expected 1 or more"),
    "no channels": (lambda: PatchTokenizer(8, in_channels=0), "in_channels is 0; expected 1 or more"),
    "channels of a stem": (lambda: SparseStem([Conv(8)], in_channels=-1), "in_channels is -1"),
    "channels of an encoder": (lambda: EncoderConfig(32, 1, 2, in_channels=-3), "in_channels -3 is outside 1 to 1024"),
    "engine": (lambda: SparseTokenizer(8, engine="cuda"), "'cuda'; expected one of auto, dense, halo, spconv"),
    "engine of a stem": (lambda: SparseStem([Conv(8)], engine="x"), "unknown engine 'x'; expected one of auto"),
    "patch size": (lambda: SparseTokenizer(8, patch_size=14), "patch_size 14 has no SCOTT stem; expected one of"),
    "no patch size": (lambda: PatchTokenizer(8, patch_size=0), "patch_size is 0; expected 1 or more"),
    "no stage": (lambda: SparseStem([]), "0 stages without a convolution; expected a Conv"),
    "only a pool": (lambda: SparseStem([MaxBlurPool()]), "1 stages without a convolution; expected a Conv"),
    "a module": (lambda: SparseStem([torch.nn.ReLU()]), "ReLU is no stage of a sparse stem; expected some of Conv"),
    "width": (lambda: Conv(0), "width is 0; expected 1 or more"),
    "stride": (lambda: Conv(8, stride=0), "stride is 0; expected 1 or more"),
    "padding": (
        lambda: Conv(8, kernel=7, stride=2, padding=0),
        "by exactly the stride 2; expected padding 3 to 3",
    ),
    "negative padding": (lambda: Conv(8, padding=-1), "padding is -1; expected 0 or more"),
    "even kernel": (lambda: Conv(8, kernel=4, stride=1), "shrink by exactly the stride 1; expected an odd kernel"),
}


@pytest.fixture(autouse=True)
def _without_shape_checks():
    """As for a user: jaxtyping and beartype, where tests run, would refuse some of these calls themselves."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def check(call, *words):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("case", FORWARD)
@pytest.mark.parametrize("model", MODELS)
def test_forward(model, case):
    images, visible, *words = FORWARD[case]
    check(lambda: MODELS[model]()(images, visible), *words)
    if visible is not None and model != "encoder":
        check(lambda: MODELS[model]().packed(images, visible), *words)


@pytest.mark.parametrize("case", WORDS)
def test_construction(case):
    call, *words = WORDS[case]
    check(call, *words)


def test_mim_jepa():
    model = MIMJEPA(EncoderConfig(32, 1, 2), ObjectiveConfig(predictor_depth=1))
    check(lambda: model(IMAGES, VISIBLE), "images have shape (2, 3, 32, 48)", "(B, V, C, H, W)", "images[:, None]")
    check(lambda: model(IMAGES[:, None], VISIBLE), "visible (2, 6); expected", "visible[:, None]")
    check(lambda: model(IMAGES[:, None], VISIBLE[:, None]), "targets are missing", "target_features(target, images)")
