"""SCOTT and MIM-JEPA (arXiv 2502.18056): Vision Transformers from scratch on small image sets.

Letters used everywhere: B images, V views (crops) per image, H W pixels, h w patch grid, N = h * w patches or tokens, S
visible patches of a batch (packed), n of each image, D width, P patch size, K classes. A boolean is named for what True
means: `visible`, `hidden = ~visible`. Reading order: masks, sparse, tokenizer, vit, jepa, schedules, train/pretrain.py.
"""

from scott_sparse.model.jepa import MIMJEPA, ObjectiveConfig
from scott_sparse.model.masks import draw_visible
from scott_sparse.model.tokenizer import PatchTokenizer, SparseTokenizer
from scott_sparse.model.vit import SIZES, Encoder, EncoderConfig, Predictor
from scott_sparse.model.weights import from_paper_checkpoint, load_encoder, save_encoder

__all__ = [
    "MIMJEPA",
    "SIZES",
    "Encoder",
    "EncoderConfig",
    "ObjectiveConfig",
    "PatchTokenizer",
    "Predictor",
    "SparseTokenizer",
    "draw_visible",
    "from_paper_checkpoint",
    "load_encoder",
    "save_encoder",
]
