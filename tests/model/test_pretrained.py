"""A ViT of timm becomes an encoder with the same features, and what does not map is refused."""

import dataclasses

import pytest
import timm
import torch
from conftest import TINY
from safetensors.torch import save_file
from torch import nn

from scott_sparse import Encoder, EncoderConfig, load_encoder, save_encoder
from scott_sparse.evaluation.encoders import TimmModel
from scott_sparse.model.pretrained import encoder_from, from_timm, open_start

SMALL = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 0}
KINDS = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": ""},
    "registers, positions of patches only": {"reg_tokens": 4, "no_embed_class": True},
    "LayerScale, patch size 8": {"init_values": 0.1, "patch_size": 8},
    "without biases": {"qkv_bias": False},
    "narrow MLP": {"mlp_ratio": 2.7},
}


def vit(**fields):
    """A ViT of timm whose parameters are all random, those that begin as ones and zeros included."""
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **SMALL | fields).eval()
    for x in model.parameters():
        x.data += 0.1 * torch.randn_like(x)
    return model


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
@pytest.mark.parametrize("kind", KINDS)
def test_same_features(kind, size):
    model = vit(**KINDS[kind], dynamic_img_size=True)
    images = torch.randn(2, 3, *size)
    encoder = from_timm(model)
    # timm's normalisation of these models is mean .5, deviation .5
    pixels = (
        images * torch.tensor([0.229, 0.224, 0.225])[:, None, None] + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    )
    expected = model.forward_features((pixels - 0.5) / 0.5)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(encoder(images), expected, atol=2e-4, rtol=2e-4)
    count, visible = 4, torch.zeros(2, expected.shape[1], dtype=torch.bool)
    visible[:, :count] = True
    assert encoder.forward_visible(images, visible).shape == (2, count, 64)


def test_a_converted_encoder_is_saved_like_any_other(tmp_path):
    encoder = from_timm(vit(reg_tokens=2))
    save_encoder(encoder, tmp_path)
    again, images = load_encoder(tmp_path), torch.randn(1, 3, 64, 64)
    assert torch.equal(again(images), encoder(images)) and again.config.position_grid == 4


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def with_other_gelu():
    model = vit()
    for block in model.blocks:
        block.mlp.act = Twice()
    return model


REFUSED = {
    "another activation": (with_other_gelu, "computes something else than a plain ViT: its features differ by"),
    "norm of queries and keys": (lambda: vit(qk_norm=True), r"no plain ViT of timm: blocks.0.attn.k_norm.bias has no"),
    "no positions": (lambda: vit(pos_embed="none"), "no ViT of timm with learned positions: it has no pos_embed"),
    "oblong images": (lambda: vit(img_size=(64, 32)), "positions of a 4 x 2 grid, expected a square one"),
    "grey images": (lambda: vit(in_chans=1), "expected RGB"),
    "a ResNet": (lambda: timm.create_model("resnet18"), "ResNet is no ViT of timm"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_plain_vit(kind):
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        from_timm(make())


RECIPE = EncoderConfig(dim=64, depth=2, heads=1, tokenizer="patch", drop_path=0.1)


@pytest.mark.parametrize("tokenizer, patch_size", [("patch", 16), ("patch", 8), ("scott", 16)])
def test_a_file_of_timm_and_what_stays_new(tokenizer, patch_size, tmp_path):
    save_file(vit(num_heads=1).state_dict() | {"head.weight": torch.zeros(10, 64)}, tmp_path / "vit.safetensors")
    start = open_start(str(tmp_path / "vit.safetensors"))
    config = start.config(dataclasses.replace(RECIPE, tokenizer=tokenizer, patch_size=patch_size))
    assert (config.drop_path, config.registers, config.block, config.ffn) == (0.1, 1, "pre-norm", "mlp")
    encoder = Encoder(config)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    line, loaded = start.load_into(encoder), "2 blocks, last LayerNorm, 1 registers, positions of a 4 x 4 grid"
    kept = {name for name, tensor in encoder.state_dict().items() if torch.equal(tensor, before[name])}
    if (tokenizer, patch_size) == ("patch", 16):
        assert kept == {"mask_token"}
        assert f"loaded tokenizer (patch, patch size 16), {loaded}; new: mask token, predictor, projectors" in line
    else:
        assert kept == {name for name in before if name.startswith(("tokenizer.", "mask_token"))}
        new = f"tokenizer ({tokenizer}, patch size {patch_size}), mask token, predictor, projectors"
        assert f"loaded {loaded}; new: {new}" in line


@pytest.mark.parametrize("where", ["", "context.safetensors"])
def test_a_run_is_a_start(where, tmp_path):
    for weights in ("target", "context"):
        save_encoder(Encoder(TINY), tmp_path / "run", weights=weights)
    start = open_start(str(tmp_path / "run" / where))
    encoder = Encoder(start.config(dataclasses.replace(TINY, registers=0, dropout=0.1)))
    assert start.load_into(encoder).endswith("2 registers, mask token; new: predictor, projectors")
    expected = load_encoder(tmp_path / "run", weights="context" if where else "target").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in encoder.state_dict().items())


def test_another_size_is_refused_with_the_size_that_fits(tmp_path):
    save_encoder(Encoder(EncoderConfig.named("demo")), tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"has width, depth, heads \(96, 3, 3\), expected \(192, 12, 3\).*use --size demo"
    ):
        open_start(str(tmp_path / "run")).config(EncoderConfig.named("tiny"))


def test_files_that_hold_no_vit(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"x.safetensors is no safetensors file"):
        open_start(str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match=r"no encoder in .*none"):
        open_start(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"--init timm:nothing: unknown to timm"):
        open_start("timm:nothing")
    with pytest.raises(ValueError, match=r"it has no patch_embed.proj.weight"):
        encoder_from({}, name="x")


def test_timm_by_name(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **how: create(name, pretrained=False, **how))
    start = open_start("timm:vit_tiny_patch16_224")
    config = start.config(EncoderConfig.named("tiny", tokenizer="patch"))
    assert (config.heads, config.position_grid) == (3, 14) and "new: mask token" in start.load_into(Encoder(config))
    assert TimmModel("vit_tiny_patch16_224").size == (224, 224)
