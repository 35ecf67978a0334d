"""SCOTT's sparse tokenizer as the patch embedding of a Vision Transformer of timm, for whole and for masked images.

python examples/tokenizer_in_timm.py
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from scott_sparse import SparseTokenizer, draw_visible


class SparsePatchEmbed(nn.Module):
    """What timm expects of `embed_layer`. `visible` (B, N), where set, says which patches are seen."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_):
        super().__init__()
        self.tokenizer = SparseTokenizer(embed_dim, patch_size=patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.visible: torch.Tensor | None = None

    def forward(self, images):
        return self.tokenizer(images, self.visible)


def main() -> None:
    torch.manual_seed(0)
    shape = {"img_size": 64, "patch_size": 16, "embed_dim": 96, "depth": 3, "num_heads": 3, "num_classes": 10}
    model = VisionTransformer(**shape, embed_layer=SparsePatchEmbed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 10
    for step in range(3):
        # Hidden patches cost nothing in the tokenizer, and their pixels reach no token.
        model.patch_embed.visible = draw_visible(8, (4, 4), hide_ratio=0.5) if step else None
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: {'half of the patches' if step else 'whole images'}, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
