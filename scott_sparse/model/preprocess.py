"""From a picture to what an encoder was trained on: the view that evaluations of this package use, without torchvision.

It is kept in encoder.json, so that an encoder that is loaded elsewhere says what it wants (`load_encoder`).
"""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F

from scott_sparse.model.crops import fixed_crops
from scott_sparse.shapes import Float, Tensor, UInt8

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FIXED = {  # not to be chosen, and in encoder.json for whoever preprocesses with other programs
    "value_range": [0.0, 1.0],  # before mean and std
    "crop": "largest centred box of image_size's aspect ratio",
    "interpolation": "bicubic",
    "antialias": True,
}


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Centre crop, resize (bicubic, antialiased) and normalisation: `encoder(encoder.preprocess(image)[None])`.

    A picture much larger than `image_size` is resized once here and twice by the scripts, which keep a smaller copy of
    it: the values then agree to a few hundredths on average.
    """

    image_size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Of each channel, where values are 0 to 1; so is `std`."""
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: Any) -> Float[Tensor, "*B C h w"]:
        """From a PIL image, turned as its EXIF orientation says, or pixels (C, H, W) or (B, C, H, W) in uint8.

        Raises ValueError for anything else, such as floating-point pixels, whose range is not known.
        """
        C = len(self.mean)
        pixels = image if isinstance(image, Tensor) else _pixels_of_pil(image, C)
        if pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-3] != C:
            raise ValueError(
                f"pixels are {pixels.dtype} of shape {tuple(pixels.shape)}, expected torch.uint8 of shape ({C}, H, W) "
                f"or (B, {C}, H, W): {_channel_names(C)} from 0 to 255."
            )
        sizes = torch.tensor([pixels.shape[-2:]])
        top, left, height, width = fixed_crops(sizes, size=self.image_size)[0][0, 0].tolist()
        crops = pixels[..., top : top + height, left : left + width].reshape(-1, C, height, width)
        crops = crops.contiguous(memory_format=torch.channels_last)  # for which torch has a fast path
        views = F.interpolate(crops, self.image_size, mode="bicubic", antialias=True).float() / 255
        mean, std = (views.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((views - mean) / std).reshape(*pixels.shape[:-2], *self.image_size).contiguous()

    @property
    def statistics(self) -> dict[str, tuple[float, ...]]:
        """`mean` and `std`, as functions take them."""
        return {"mean": self.mean, "std": self.std}

    def to_json(self) -> dict[str, Any]:
        """The entry of an encoder.json."""
        return {"channels": _channel_names(len(self.mean)), **FIXED, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, entry: Any) -> "Preprocess":
        """From the entry of an encoder.json. Raises ValueError for unknown or missing fields and wrong values."""
        fields = dict(entry) if isinstance(entry, dict) else {}
        C = len(fields["mean"]) if isinstance(fields.get("mean"), list) else 3
        fixed = {"channels": _channel_names(C), **FIXED}
        wrong = [name for name, value in fixed.items() if fields.pop(name, value) != value]
        shapes = {"image_size": (2, int), "mean": (C, float), "std": (C, float)}
        for name, (length, kind) in shapes.items():
            value, smallest = fields.get(name), {"image_size": 1, "mean": -10, "std": 1e-6}[name]
            is_list = isinstance(value, list) and [type(x) in (kind, int) for x in value] == [True] * length
            if not is_list or not all(math.isfinite(x) and smallest <= x <= 2**16 for x in value or ()):
                wrong.append(name)
        wrong += sorted(fields.keys() - shapes.keys())
        if wrong:
            raise ValueError(
                f"preprocess: {', '.join(name[:40] for name in wrong)}: missing, unknown or of a wrong value."
            )
        return cls(**{name: tuple(value) for name, value in fields.items()})


def _channel_names(count: int) -> str:
    return {1: "grey", 3: "RGB"}.get(count, f"{count} bands")


def _pixels_of_pil(image: Any, channels: int) -> UInt8[Tensor, "C H W"]:
    if not hasattr(image, "convert"):
        raise ValueError(f"expected a PIL image or a tensor of uint8, got {type(image).__name__}.")
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if channels in (1, 3):
        image = image.convert("L" if channels == 1 else "RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    if len(image.getbands()) != channels or len(pixels) != image.height * image.width * channels:
        raise ValueError(f"a PIL image of mode {image.mode}, expected {channels} bands of 8 bits; or give a tensor.")
    return pixels.view(image.height, image.width, channels).permute(2, 0, 1)
