"""The stem of a ResNet swapped for the sparse one: at patch size 4 it has the same stride and number of channels.

python examples/resnet_stem.py
"""

import timm
import torch
from einops import rearrange
from torch import nn

from scott_sparse import SparseTokenizer, draw_visible


class SparseStem(nn.Module):
    """A 7x7 convolution and a max-blur-pool (B, 64, H/4, W/4), in which hidden pixels reach no visible site."""

    def __init__(self):
        super().__init__()
        self.tokenizer = SparseTokenizer(64, patch_size=4)
        self.visible: torch.Tensor | None = None  # (B, H/4 * W/4)

    def forward(self, images):
        height, width = self.tokenizer.grid(images)
        return rearrange(self.tokenizer(images, self.visible), "b (h w) c -> b c h w", h=height, w=width)


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    model.conv1, model.bn1, model.act1, model.maxpool = SparseStem(), nn.BatchNorm2d(64), nn.Identity(), nn.Identity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 10
    for step in range(2):
        # Blocks of 8 x 8 sites are hidden: a ResNet halves the map three times more, to 2 x 2 here.
        coarse = draw_visible(8, (2, 2), hide_ratio=0.5).view(8, 2, 2)
        model.conv1.visible = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2).flatten(1) if step else None
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: {'half of the image' if step else 'whole images'}, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
