"""The tokenizer in the Vision Transformers of timm and transformers: forward, backward, a training step, state dict."""

import copy
import re

import pytest
import torch
from conftest import ROOT
from torch import nn

from scott_sparse import PatchTokenizer, SparseStem, SparseTokenizer, draw_visible
from scott_sparse.model.stages import Conv, LayerNorm, ReLU

TOKENIZERS = {
    "scott": lambda channels: SparseTokenizer(48, in_channels=channels, stem_width=8),
    "patch": lambda channels: PatchTokenizer(48, in_channels=channels),
    "stem": lambda channels: SparseStem([Conv(8, 4, 4), LayerNorm(), ReLU(), Conv(48, 4, 4)], in_channels=channels),
}


def timm_model(tokenizer):
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(
        img_size=32, in_chans=tokenizer.in_channels, embed_dim=48, depth=2, num_heads=3, num_classes=5
    )
    model.patch_embed = tokenizer
    return model, lambda images, visible: model(images)


def transformers_model(tokenizer):
    transformers = pytest.importorskip("transformers")
    (snippet,) = re.findall(r"\nclass PatchEmbeddings.*?\n\n\n", (ROOT / "docs/library.md").read_text(), re.DOTALL)
    names = {}
    exec("import torch\nfrom types import SimpleNamespace\n" + snippet, names)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    config = transformers.ViTConfig(**sizes, image_size=32, num_channels=tokenizer.in_channels)
    model = transformers.ViTModel(config, use_mask_token=True)
    model.embeddings.patch_embeddings = names["PatchEmbeddings"](tokenizer)

    def forward(images, visible):
        return model(images, bool_masked_pos=None if visible is None else ~visible).pooler_output

    return model, forward


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("tokenizer, channels", [("scott", 3), ("scott", 1), ("scott", 13), ("patch", 4), ("stem", 4)])
@pytest.mark.parametrize("build", [timm_model, transformers_model])
def test_train_and_reload(build, tokenizer, channels, masked):
    model, forward = build(TOKENIZERS[tokenizer](channels))
    own = TOKENIZERS[tokenizer](channels)
    visible = draw_visible(2, (2, 2), hide_ratio=0.5) if masked else None
    images = torch.randn(2, channels, 32, 32)

    def outputs(images):
        tokenizers = [module for module in model.modules() if type(module) is type(own)]
        with tokenizers[0].register_forward_pre_hook(lambda tokenizer, inputs: (*inputs, visible)):
            return forward(images, visible)

    before = outputs(images)
    if masked:  # a hidden pixel changes nothing
        shown = visible.view(2, 1, 2, 2).repeat_interleave(16, 2).repeat_interleave(16, 3)
        assert torch.equal(outputs(torch.where(shown, images, torch.nan)), before)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = (before - 1).square().mean()
    loss.backward()
    parts = ["kernels", "proj.weight", "norms"]
    gradients = {name: p.grad for name, p in model.named_parameters() if any(part in name for part in parts)}
    assert gradients and all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    optimizer.step()
    after = outputs(images)
    assert (after - 1).square().mean() < loss

    state = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert not torch.equal(outputs(images), after)
    model.load_state_dict(state)
    assert torch.equal(outputs(images), after)
