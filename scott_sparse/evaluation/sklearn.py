"""An encoder as a step of a scikit-learn pipeline (extra `sklearn`).

    from scott_sparse.evaluation.sklearn import ScottFeatures

    classifier = Pipeline([("ssl", ScottFeatures("runs/demo")), ("clf", LogisticRegression())])
    classifier.fit(paths, labels).predict(other_paths)

Features are those of the probes in eval/: pictures are read as for pretraining (orientation, colour profile,
transparency), one vector for each.
"""

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scott_sparse.data.dataset import short_side_for
from scott_sparse.data.decode import decode
from scott_sparse.data.readers import Selection, Unreadable, prepare_pillow
from scott_sparse.model.weights import load_encoder
from scott_sparse.shapes import Tensor, UInt8

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils import Tags
    from sklearn.utils.validation import check_is_fitted
except ImportError:  # also of an older one
    raise ImportError(f"{__name__} needs scikit-learn 1.6: pip install 'scikit-learn>=1.6'.") from None


class ScottFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Pooled features (n, D) of n pictures: paths, PIL images, or uint8 arrays (h, w), (h, w, 3) or (h, w, 4).

    `fit` learns nothing: it loads the encoder, which a pickle then holds. Copies for pipelines and searches
    (`sklearn.base.clone`) are made of the parameters alone.

    Args:
        run: Run folder, or a Hub repository "owner/name", as for `load_encoder`.
        weights: "target" or "context" encoder.
        crops: 1, the centre crop, or 8, over which features are averaged, for eight times the work.
        batch_size: Pictures at a time.
        device: Where the encoder runs; None: a GPU if there is one.
    """

    def __init__(
        self, run: Any, *, weights: str = "target", crops: int = 1, batch_size: int = 64, device: str | None = None
    ):
        self.run, self.weights, self.crops, self.batch_size, self.device = run, weights, crops, batch_size, device

    def fit(self, X: Iterable, y: object = None) -> "ScottFeatures":
        """Load the encoder. Raises ValueError as `load_encoder`, and where it lacks the size of its images."""
        self.encoder_ = load_encoder(self.run, weights=self.weights)
        if self.encoder_.preprocess is None:
            raise ValueError(f"{self.run} does not say what images it wants; save it with `preprocess` (save_encoder).")
        self._n_features_out = self.encoder_.num_features
        return self

    @torch.inference_mode()
    def transform(self, X: Iterable) -> np.ndarray:
        """(n, D) in float32. Raises ValueError, naming the picture, for what is no picture or cannot be read."""
        check_is_fitted(self)
        if isinstance(X, str | Path):
            raise ValueError(f"X is {str(X)!r}, expected a list of pictures; [path] for one.")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        encoder = copy.deepcopy(self.encoder_).to(device)  # a pickle of `encoder_` is to open on any machine
        preprocess = encoder.preprocess
        assert preprocess is not None
        features = [torch.empty(0, encoder.num_features)]
        pictures = _pixels(X, short_side_for(preprocess.image_size), Selection(channels=encoder.config.in_channels))
        if self.crops == 1:
            while views := [preprocess(pixels) for pixels in itertools.islice(pictures, self.batch_size)]:
                features.append(encoder.pooled(torch.stack(views).to(device)).cpu())
            return torch.cat(features).numpy()
        for pixels in pictures:  # crops are cut from the whole picture, whose size is its own
            _, height, width = pixels.shape
            whole = dataclasses.replace(preprocess, image_size=(height, width))(pixels)[None]
            features.append(encoder.pooled(whole.to(device), size=preprocess.image_size, crops=self.crops).cpu())
        return torch.cat(features).numpy()

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.string, tags.no_validation = False, True, True
        return tags


def _pixels(pictures: Iterable, short_side: int, selection: Selection) -> Iterator[UInt8[Tensor, "C h w"]]:
    """Upright pixels of each picture, reduced as pretraining does it."""
    prepare_pillow()
    for i, picture in enumerate(pictures):
        name = f"X[{i}]" if not isinstance(picture, str | Path) else f"X[{i}], {picture}"
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,), (4,)):
                form = f"an array of {picture.dtype} of shape {picture.shape}"
                raise ValueError(f"{name} is {form}, expected uint8 of (h, w), (h, w, 3) or (h, w, 4).")
            picture = Image.fromarray(picture)
        if not isinstance(picture, str | Path | Image.Image):
            raise ValueError(f"{name} is {type(picture).__name__}, expected a path, a PIL image or an array of uint8.")
        try:  # decoding changes an image that is not loaded yet: a copy is
            own = picture.copy() if isinstance(picture, Image.Image) else Path(picture)
            pixels = decode(own, short_side, selection)
        except Unreadable as reason:
            raise ValueError(f"{name} cannot be read: {reason}.") from None
        yield pixels.permute(2, 0, 1)
