"""A classifier to fine-tune: what a linear probe is fitted on, with the encoder below it trained as well.

The loop that trains it is `scott_sparse.training.finetune`. Learning rates fall from the head to the tokenizer by a
factor for each layer (arXiv 2106.08254, appendix), and a pretrained encoder starts with the head of a linear probe: a
random head would first distort the features that it is to use (arXiv 2202.10054).
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn

from scott_sparse.cli import ADVANCED
from scott_sparse.evaluation.encoders import FrozenEncoder, ImageEncoder
from scott_sparse.evaluation.features import Features
from scott_sparse.evaluation.linear import Scale, fit_newton
from scott_sparse.evaluation.metrics import score
from scott_sparse.evaluation.subject import LabelBudgetConfig
from scott_sparse.files import load_strictly, tensors_to_bytes, write_atomically
from scott_sparse.model.preprocess import Preprocess
from scott_sparse.model.vit import Encoder, layer_norm
from scott_sparse.model.weights import load_encoder, save_encoder
from scott_sparse.shapes import Float, Int, Tensor

HEAD = "head.safetensors"


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(LabelBudgetConfig):
    """Flags of eval/finetune.py."""

    from_scratch: bool = False
    """Train the run's encoder as it was initialised: the supervised baseline."""
    blocks: int | None = None
    """Train only the last so many blocks, and the head. Default: all blocks and the tokenizer."""
    epochs: float | None = None
    """Passes over the training images. Default: 30, and more for few labels, so that there are 300 steps."""
    batch_size: int = 64
    """Images per optimizer step, over all processes; fewer where there are fewer labels."""
    lr: tuple[float, ...] = ()
    """Highest learning rate of the head. Of several, each is trained with, and the best is chosen on val. Default: 3e-3
    for an encoder of width 96, and in proportion to 1 / width for others."""
    layer_decay: float | None = None
    """Factor of the learning rate from each layer to the one below it, from the head to the tokenizer, in (0, 1].
    Default: .75, and 1 from scratch."""
    weight_decay: float = 0.05
    """Weight decay of AdamW."""
    crop_scale: tuple[float, float] | None = None
    """Smallest and largest area of the random crops as a share of their image. Default: as in pretraining."""
    colour: float | None = None
    """Probability, 0 to 1, that the colours of an image are changed. Default: the share of crops in pretraining. Use 0
    where colours tell the classes apart."""
    mixup: float = 0.0
    """Alpha of mixup (arXiv 1710.09412); 0: none. With cutmix as well, each batch has one of the two."""
    cutmix: float = 0.0
    """Alpha of cutmix (arXiv 1905.04899); 0: none."""
    erase: float = 0.0
    """Probability, 0 to 1, that a rectangle of an image is erased (arXiv 1708.04896)."""
    label_smoothing: float = 0.1
    """Share of each label that is spread over all classes, 0 to 1."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: weigh images by the inverse frequency of their class."""
    ema: float = 0.04
    """Share of the steps over which the evaluated weights are averaged (EMA). 0: no average."""
    points: Annotated[int, ADVANCED] = 10
    """Evaluations on val, equally spaced, of which the best is chosen; one more before the first step."""
    seed: int = 0
    """Seed of the order of the images, crops and everything else that is random."""
    minutes: float | None = None
    """End after so many minutes with a checkpoint and exit code 75; the same command resumes (for limited queues)."""
    save_every: Annotated[str, ADVANCED] = "10min"
    """Between checkpoints: optimizer steps (500) or minutes (10min)."""

    @property
    def own_settings(self) -> dict:
        """Those that decide the result."""
        return {k: v for k, v in super().own_settings.items() if k not in ("from_scratch", "minutes", "save_every")}

    def validate(self, model: ImageEncoder) -> None:
        """Raises ValueError for a value out of range, or that does not fit the encoder."""
        if self.init or not isinstance(model, FrozenEncoder):
            raise ValueError("--timm and --init name encoders that are not fine-tuned; --from-scratch is the baseline.")
        if model.span is not None:
            raise ValueError("an encoder is fine-tuned at its own image size; leave out --image-size.")
        depth = model.encoder.config.depth
        if self.blocks is not None and not 1 <= self.blocks <= depth:
            raise ValueError(f"blocks {self.blocks} is outside 1 to {depth}, the blocks of this encoder.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay {self.layer_decay} is outside (0, 1].")
        for name in ("colour", "erase", "label_smoothing", "ema"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is outside [0, 1].")
        for name, least in (("mixup", 0), ("cutmix", 0), ("weight_decay", 0), ("points", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} {getattr(self, name)} must be {least} or more.")


class Classifier(nn.Module):
    """Encoder, LayerNorm, mean token, linear layer; the head starts at zero."""

    def __init__(self, encoder: Encoder, classes: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.dim, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        return self.head(layer_norm(self.encoder(images).float()).mean(1)).float()

    def layer_of(self, name: str) -> int:
        """Of a parameter: 0 for the tokenizer, then the number of its block, and one more for the head."""
        block = re.match(r"encoder\.transformer\.blocks\.(\d+)\.", name)
        return int(block[1]) + 1 if block else (self.encoder.config.depth + 1) * name.startswith("head.")

    def freeze_below(self, blocks: int | None) -> None:
        """Train the head and the last `blocks` blocks alone; None: everything. No image has mask tokens here."""
        lowest = 0 if blocks is None else self.encoder.config.depth + 1 - blocks
        for name, p in self.named_parameters():
            p.requires_grad_(self.layer_of(name) >= lowest)
        self.encoder.mask_token.requires_grad_(False)

    def lr_scale(self, decay: float) -> Callable[[str], float]:
        """The factor of the learning rate of a parameter by its name."""
        return lambda name: decay ** (self.encoder.config.depth + 1 - self.layer_of(name))

    def logits(self, features: Features) -> Float[Tensor, "n K"]:
        """Of images by the features of the encoder, which `FrozenEncoder` and `extract` make of any view."""
        return F.linear(features.mean, self.head.weight.detach().cpu(), self.head.bias.detach().cpu())


def linear_head(
    train: Features, labels: Int[Tensor, " n"], val: Features, val_labels: Int[Tensor, " m"], *, classes: int
) -> tuple[Float[Tensor, "K D"], Float[Tensor, " K"]]:
    """Weight and bias of the linear probe of the last block whose penalty is the best on val."""
    scale = Scale.of(train.mean)
    layers = fit_newton(scale(train.mean), labels, classes=classes)
    best = max(layers, key=lambda layer: score(F.linear(scale(val.mean), *layer), val_labels).top1)
    weight = best.weight / scale.deviation
    return weight, best.bias - weight @ scale.mean


class Augment:
    """What happens to a batch after crops, flips and colours; draws from torch's global generator."""

    def __init__(self, config: FinetuneConfig, classes: int):
        from torchvision.transforms import v2

        self.classes = classes
        self.erase = v2.RandomErasing(p=config.erase) if config.erase else None  # by zeros, which is the mean colour
        mixes = [
            *([v2.MixUp(alpha=config.mixup, num_classes=classes)] if config.mixup else []),
            *([v2.CutMix(alpha=config.cutmix, num_classes=classes)] if config.cutmix else []),
        ]
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def __call__(
        self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """Images, and the share of each class in them."""
        if self.erase is not None:
            images = torch.stack([self.erase(image) for image in images])  # one rectangle for each
        if self.mix is not None:
            return self.mix(images, labels)
        return images, F.one_hot(labels, self.classes).float()


def balanced_weights(labels: Int[Tensor, " n"], classes: int) -> Float[Tensor, " K"]:
    """n / (K n_k) for a class of n_k images, so that the mean over images is 1."""
    return len(labels) / (classes * torch.bincount(labels, minlength=classes).float())


def save_classifier(classifier: Classifier, folder: Path, *, size: tuple[int, int]) -> None:
    """Write the encoder as `save_encoder` does, and the head beside it."""
    preprocess = dataclasses.replace(classifier.encoder.preprocess or Preprocess(size), image_size=size)
    save_encoder(classifier.encoder, folder, preprocess=preprocess)
    write_atomically(folder / HEAD, tensors_to_bytes(classifier.head.state_dict()))


def load_classifier(folder: Path, classes: int) -> Classifier:
    """What `save_classifier` wrote, in eval mode. Raises ValueError where it is not there or does not fit."""
    classifier = Classifier(load_encoder(folder), classes)
    load_strictly(classifier.head, folder / HEAD)
    return classifier.eval()
