"""The same encoder trained with labels from scratch: cross-entropy on the mean token, the views of a recipe, AdamW.

    python benchmarks/supervised.py small-data --data PHOTOS --epochs 6 --out runs/supervised

Flags are those of train/pretrain.py; only the first crop's context view is used, nothing hidden, so that as many
images are seen as in pretraining. Only the images a probe is fitted on have labels here. The run folder serves eval/
like any other; `own_test` in its summary.json is the accuracy of the classifier that was trained with the encoder.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track

from scott_sparse import Encoder, save_encoder
from scott_sparse.cli import exit_on_user_error
from scott_sparse.data.batches import Batches, load
from scott_sparse.data.dataset import Data, open_data, short_side_for
from scott_sparse.data.views import make_views
from scott_sparse.evaluation.features import eval_images
from scott_sparse.randomness import batch_indices
from scott_sparse.training.optim import adamw, set_schedules
from scott_sparse.training.recipe import Recipe, parse


class Classifier(torch.nn.Module):
    def __init__(self, encoder: Encoder, classes: int):
        super().__init__()
        self.encoder, self.classify = encoder, torch.nn.Linear(encoder.config.dim, classes)

    def forward(self, images):
        return self.classify(self.encoder(images).mean(1))


def main() -> None:
    with exit_on_user_error():
        _, recipe = parse(sys.argv[1:])
        data = open_data(recipe.source, short_side=short_side_for(recipe.sides))
        if data.classes is None:
            raise ValueError("supervised training needs labels.")
    encoder, summary = train(recipe, data)
    out = recipe.out or Path("runs/supervised")
    save_encoder(encoder, out)
    (out / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), default=str, indent=1))
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(summary)


def train(recipe: Recipe, data: Data) -> tuple[Encoder, dict]:
    """The encoder, and what summary.json says of its training."""
    torch.manual_seed(recipe.seed)
    model = Classifier(Encoder(recipe.encoder), len(data.classes)).train()
    optimizer = adamw(model)
    views = dataclasses.replace(recipe.views, crops=1)
    batches = Batches(
        data.train, views, recipe.grid, recipe.hide_ratio, recipe.mask_shape, recipe.batch_size, recipe.seed
    )
    # As many images as pretraining sees, though fewer of them have labels.
    schedules = recipe.schedules(len(data.pretrain) // recipe.batch_size)
    steps = schedules.total_steps
    started = time.process_time()
    for step, (part,) in enumerate(track(load(batches, range(steps), workers=0, pin=False), total=steps)):
        set_schedules(optimizer, schedules, step)
        context, _ = make_views(part.crops, part.views, size=recipe.sides)
        rows = batch_indices(step, images=len(data.train), batch=recipe.batch_size, seed=recipe.seed)
        loss = F.cross_entropy(model(context[:, 0]), data.train.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad or float("inf"))
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        parts = torch.arange(len(data.test)).split(256)
        predicted = torch.cat([model(eval_images(data.test, rows, size=recipe.sides)).argmax(1) for rows in parts])
    own = 100 * (predicted == data.test.labels).double().mean().item()
    return model.encoder, {
        "own_test": round(own, 2),
        "cpu_seconds": round(time.process_time() - started, 1),
        "steps": steps,
        "last_loss": loss.item(),
    }


if __name__ == "__main__":
    main()
