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
    "channels": "RGB",
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
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __call__(self, image: Any) -> Float[Tensor, "*B 3 h w"]:
        """From a PIL image, turned as its EXIF orientation says, or RGB pixels (3, H, W) or (B, 3, H, W) in uint8.

        Raises ValueError for anything else, such as floating-point pixels, whose range is not known.
        """
        pixels = image if isinstance(image, Tensor) else _pixels_of_pil(image)
        if pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-3] != 3:
            raise ValueError(
                f"pixels are {pixels.dtype} of shape {tuple(pixels.shape)}, expected torch.uint8 of shape (3, H, W) or "
                "(B, 3, H, W): RGB from 0 to 255."
            )
        sizes = torch.tensor([pixels.shape[-2:]])
        top, left, height, width = fixed_crops(sizes, size=self.image_size)[0][0, 0].tolist()
        crops = pixels[..., top : top + height, left : left + width].reshape(-1, 3, height, width)
        crops = crops.contiguous(memory_format=torch.channels_last)  # for which torch has a fast path
        views = F.interpolate(crops, self.image_size, mode="bicubic", antialias=True).float() / 255
        mean, std = (views.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((views - mean) / std).reshape(*pixels.shape[:-2], *self.image_size).contiguous()

    def to_json(self) -> dict[str, Any]:
        return {**FIXED, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, entry: Any) -> "Preprocess":
        """From the entry of an encoder.json. Raises ValueError for unknown or missing fields and wrong values."""
        fields = dict(entry) if isinstance(entry, dict) else {}
        wrong = [name for name, value in FIXED.items() if fields.pop(name, value) != value]
        shapes = {"image_size": (2, int), "mean": (3, float), "std": (3, float)}
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


def _pixels_of_pil(image: Any) -> UInt8[Tensor, "3 H W"]:
    if not hasattr(image, "convert"):
        raise ValueError(f"expected a PIL image or a tensor of uint8, got {type(image).__name__}.")
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image).convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)
