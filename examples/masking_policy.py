"""MIM-JEPA with a masking policy of one's own: here one row or column band of patches is hidden in each image.

python examples/masking_policy.py
"""

import torch

from scott_sparse import MIMJEPA, EncoderConfig, ObjectiveConfig
from scott_sparse.model.jepa import make_target, target_features, update_target


def visible_outside_a_band(batch: int, side: int, width: int) -> torch.Tensor:
    """(B, N), True where visible. A policy is free but for one rule: every image has as many visible patches."""
    visible = torch.ones(batch, side, side, dtype=torch.bool)
    for image in visible:
        start = int(torch.randint(side - width + 1, ()))
        band = image if torch.rand(()) < 0.5 else image.T
        band[start : start + width] = False
    return visible.flatten(1)


def main() -> None:
    torch.manual_seed(0)
    config = EncoderConfig(dim=96, depth=3, heads=3, patch_size=8, stem_width=32)
    model = MIMJEPA(config, ObjectiveConfig(predictor_depth=1, context="visible"))
    target = make_target(model.encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.randn(8, 3, 64, 64)
    for step in range(3):
        visible = visible_outside_a_band(len(images), side=8, width=3)
        # One crop of each image: (B, V, ...) with V = 1.
        loss = model(images[:, None], visible[:, None], target_features(target, images))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_target(target, model.encoder, momentum=0.99)
        print(f"step {step}: {int(visible[0].sum())} of {visible.shape[1]} patches visible, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
