"""SCOTT and MIM-JEPA (arXiv 2502.18056): Vision Transformers trained from scratch on small image sets.

Axes, in shapes such as `Float[Tensor, "B N D"]`:
    B images, V views (masked crops) of an image, H W pixels, C K channels (C of images: in_channels)
    h w patch grid, P patch size, N = h * w patches, D width of a token, E of an embedding, F of what is predicted
    n visible patches of an image, S visible patches of a batch (packed in one row), s sites per side of a patch
Booleans are named after what True means: `visible`, `hidden = ~visible`.

Reading order:
    model/       masks (what is hidden), sites, stages and engines (sparse convolutions), tokenizer, vit, crops, losses,
                 jepa, weights
    data/        sources, decode, dataset, views, batches
    training/    recipe, optim, run, then the loop itself, train/pretrain.py; checkpoint, resume, saver, log;
                 health, verdict and monitor; record, charts, pictures and html_report (report.html); choice and plan
                 (--plan); finetune and learning_curve
    evaluation/  encoders, features, metrics, probe, then one file per probe; the scripts are in eval/
files, distributed, shapes and randomness are used by all of them.
"""

from scott_sparse.model import engines, masks, stages
from scott_sparse.model.jepa import MIMJEPA, ObjectiveConfig, make_target, target_features, update_target
from scott_sparse.model.masks import draw_visible
from scott_sparse.model.tokenizer import PatchTokenizer, SparseStem, SparseTokenizer
from scott_sparse.model.vit import SIZES, Encoder, EncoderConfig, Predictor
from scott_sparse.model.weights import from_paper_checkpoint, load_encoder, save_encoder, to_paper_checkpoint

__all__ = [
    "MIMJEPA",
    "SIZES",
    "Encoder",
    "EncoderConfig",
    "ObjectiveConfig",
    "PatchTokenizer",
    "Predictor",
    "SparseStem",
    "SparseTokenizer",
    "draw_visible",
    "engines",
    "from_paper_checkpoint",
    "load_encoder",
    "make_target",
    "masks",
    "save_encoder",
    "stages",
    "target_features",
    "to_paper_checkpoint",
    "update_target",
]
