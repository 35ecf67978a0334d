"""What users would pick instead, on the same images, CPU seconds and probes: lightly's methods and supervised training.

    python benchmarks/peers.py GROCERY160 IMAGENETTE160 petals                  # folders of photos, or petals
    python benchmarks/peers.py GROCERY160 --only simclr-vit small-data --seeds 1
    python benchmarks/peers.py --tables

Needs `pip install -e ".[peers]"`. All train at 64 px in bf16 on one thread; the budget is CPU time of the process with
reading and augmenting. The ViT has the size of this project's small encoder. Views, heads and losses are lightly's,
settings those of its Imagenette benchmark or, for a ViT, of its ViT benchmark, the learning rate times batch / 256 (a
ViT's times 4 more, see VIT_RATE). Then weights are frozen, and the probes of eval/ are fitted on train, chosen on val,
and read on test. Each finished row is a line of benchmarks/runs/peers.jsonl and is not run again.
"""

import dataclasses
import functools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from PIL import Image
from torch import nn

from scott_sparse import Encoder, load_encoder
from scott_sparse.cli import exit_on_user_error, parse_flags
from scott_sparse.data.cache import CACHE_DIR
from scott_sparse.data.dataset import Data, DataConfig, Images, open_data, short_side_for
from scott_sparse.evaluation.attentive import fit_attentive
from scott_sparse.evaluation.encoders import FrozenEncoder, ImageEncoder, Pixels
from scott_sparse.evaluation.features import extract
from scott_sparse.evaluation.knn import fit_knn
from scott_sparse.evaluation.linear import fit_linear
from scott_sparse.evaluation.metrics import score
from scott_sparse.evaluation.probe import choose, commit
from scott_sparse.model.vit import layer_norm
from scott_sparse.randomness import batch_indices
from scott_sparse.training.recipe import parse

try:
    import timm
    from lightly import loss as losses
    from lightly import transforms
    from lightly.models import modules, utils
except ImportError:  # `main` says so; --help and --tables do without
    timm = None

ROOT = Path(__file__).resolve().parent.parent
SIZE, PATCH, WIDTH, BATCH = 64, 8, 96, 128
# Published rates are for a hundred times the images and more: after 60 s of SimCLR without jitter on grocery160, k-NN
# and linear on val were at 13.9 and 19.9 with the published rate, and at 19.6 and 29.4 with four times that.
VIT_RATE = 4
WARMUP = 0.1  # of the budget: 10 of 100 epochs in lightly's ViT benchmark
PLAIN = {"cj_prob": 0.0, "random_gray_scale": 0.0}  # with no blur either: crops and flips alone
PROBES: dict[str, Callable] = {
    "knn": fit_knn,
    "linear": functools.partial(fit_linear, solver="newton"),
    "attentive": functools.partial(fit_attentive, epochs=30),
}
MEASURES = [f"{probe}_{role}" for probe in PROBES for role in ("val", "test")]


class ViT(ImageEncoder):
    """timm's, initialised by lightly. Each block is normalised and averaged, as this project's own encoder is."""

    def __init__(self):
        super().__init__()
        shape = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 3, "num_heads": 3}
        pool = {"class_token": False, "global_pool": "avg", "fc_norm": False, "dynamic_img_size": True}
        vit = timm.models.VisionTransformer(num_classes=0, **shape, **pool)
        self.net, self.width = modules.MaskedVisionTransformerTIMM(vit), WIDTH

    def forward(self, images):
        blocks = [layer_norm(tokens) for tokens in self.net.forward_intermediates(images)[1]]
        return torch.stack([tokens.mean(1) for tokens in blocks], dim=1), blocks[-1]


class ResNet18(ImageEncoder):
    """timm's; tokens are the positions of the last feature map. `small_stem`: a 3x3 convolution without max-pooling, as
    in lightly's CIFAR-10 benchmark; its stride of 2 makes the feature maps of 64 px those of 32 px there."""

    def __init__(self, *, small_stem: bool = False):
        super().__init__()
        self.net, self.width = timm.create_model("resnet18", num_classes=0), 512
        if small_stem:
            self.net.conv1, self.net.maxpool = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False), nn.Identity()

    def forward(self, images):
        maps = self.net.forward_features(images)
        return maps.mean((2, 3))[:, None], rearrange(maps, "b c h w -> b (h w) c")


class Method(nn.Module):
    """`loss(views, labels)` of the views that `transform` makes of each PIL image trains `encoder`; `rate` is the
    learning rate for a batch of 256."""

    betas = (0.9, 0.999)

    def __init__(self, encoder, transform: Callable, rate: float):
        super().__init__()
        self.encoder, self.transform = encoder, transform
        self.rate = rate * BATCH / 256 * (VIT_RATE if isinstance(encoder, ViT) else 1)

    def optimizer(self) -> torch.optim.Optimizer:
        """SGD for ResNets, AdamW for ViTs."""
        if isinstance(self.encoder, ResNet18):
            return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9, weight_decay=5e-4)
        decayed, others = utils.get_weight_decay_parameters([self])
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, self.rate, self.betas)


class SimCLR(Method):
    def __init__(self, encoder, **colours):
        rate = 6e-2 if isinstance(encoder, ResNet18) else 5e-4  # lightly's DINO: it has no SimCLR of a ViT
        super().__init__(encoder, transforms.SimCLRTransform(SIZE, **colours), rate)
        self.head = modules.SimCLRProjectionHead(encoder.width, encoder.width, 128)
        self.criterion = losses.NTXentLoss()

    def loss(self, views, labels):
        return self.criterion(*(self.head(self.encoder.net(view)) for view in views))


class DINO(Method):
    """Two global and six local crops; heads and momentum of the Imagenette benchmark. The teacher is probed."""

    def __init__(self, encoder, **colours):
        super().__init__(encoder, transforms.DINOTransform(SIZE, local_crop_size=SIZE // 2, **colours), rate=5e-4)
        self.student, self.criterion = ViT(), losses.DINOLoss(output_dim=2048)
        self.head, self.teacher_head = (modules.DINOProjectionHead(encoder.width, 2048, 256, 2048) for _ in range(2))
        self.pairs = (self.student, encoder), (self.head, self.teacher_head)
        for student, teacher in self.pairs:
            teacher.load_state_dict(student.state_dict())
            utils.deactivate_requires_grad(teacher)

    def loss(self, views, labels):
        for student, teacher in self.pairs:
            utils.update_momentum(student, teacher, m=0.99)
        targets = [self.teacher_head(self.encoder.net(view)) for view in views[:2]]
        outputs = [self.head(self.student.net(torch.cat(of_one_size))) for of_one_size in (views[:2], views[2:])]
        return self.criterion(targets, torch.cat(outputs).chunk(len(views)))


class MAE(Method):
    """Three quarters of the patches hidden, targets normalised per patch, and a decoder of two thirds of the encoder's
    width and depth (arXiv 2111.06377)."""

    betas = (0.9, 0.95)

    def __init__(self, encoder):
        super().__init__(encoder, transforms.MAETransform(SIZE), rate=1.5e-4)
        self.tokens, width = (SIZE // PATCH) ** 2, 2 * WIDTH // 3
        self.embed, self.predict = nn.Linear(WIDTH, width), nn.Linear(width, 3 * PATCH**2)
        self.decoder = modules.MaskedVisionTransformerDecoderTIMM(self.tokens, width, 2, 4, num_prefix_tokens=0)

    def loss(self, views, labels):
        shape = len(views[0]), self.tokens
        kept, hidden = utils.random_token_mask(shape, mask_ratio=0.75, mask_class_token=True)
        encoded = self.embed(self.encoder.net.encode(views[0], idx_keep=kept))
        tokens = utils.repeat_token(self.decoder.mask_token, shape).type_as(encoded)
        decoded = self.decoder(utils.set_at_index(tokens, kept, encoded))
        targets = utils.normalize_mean_var(utils.patchify(views[0], PATCH))
        return F.mse_loss(self.predict(utils.get_at_index(decoded, hidden)), utils.get_at_index(targets, hidden))


class Supervised(Method):
    """Cross-entropy with the labels of train; learning rate of torchvision's reference training."""

    def __init__(self, encoder, classes: int):
        super().__init__(encoder, transforms.MAETransform(SIZE), rate=0.1)  # crops and flips
        self.classify = nn.Linear(encoder.width, classes)

    def loss(self, views, labels):
        return F.cross_entropy(self.classify(self.encoder.net(views[0])), labels)


# In the order in which they run: given the number of classes, what is probed as it is or trained before.
METHODS: dict[str, Callable[[int], ImageEncoder | Method]] = {
    "pixels": lambda _: Pixels(PATCH),
    "untrained-vit": lambda _: ViT(),
    "untrained-resnet18": lambda _: ResNet18(),
    "untrained-scott": lambda _: FrozenEncoder(Encoder(parse(["small-data"])[1].encoder)),
    "supervised-resnet18": lambda classes: Supervised(ResNet18(), classes),
    "simclr-vit-plain": lambda _: SimCLR(ViT(), **PLAIN, gaussian_blur=0.0),
    "simclr-resnet18-plain": lambda _: SimCLR(ResNet18(), **PLAIN, gaussian_blur=0.0),
    "simclr-vit": lambda _: SimCLR(ViT()),
    "simclr-resnet18": lambda _: SimCLR(ResNet18()),
    "mae-vit": lambda _: MAE(ViT()),
    "dino-vit": lambda _: DINO(ViT()),
    "dino-vit-plain": lambda _: DINO(ViT(), **PLAIN, gaussian_blur=(0, 0, 0), solarization_prob=0.0),
    "supervised-resnet18-small-stem": lambda classes: Supervised(ResNet18(small_stem=True), classes),
    "simclr-resnet18-small-stem-plain": lambda _: SimCLR(ResNet18(small_stem=True), **PLAIN, gaussian_blur=0.0),
}
SCRIPTS = ("supervised-scott", "small-data", "colour-invariant", "mim-jepa")  # eval/finetune.py; recipes by name
NAMES = (*METHODS, *SCRIPTS)


@dataclasses.dataclass(frozen=True)
class Settings:
    data: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of photos, or petals; not needed with --tables."""
    only: tuple[str, ...] = NAMES
    """Methods by name."""
    seeds: tuple[int, ...] = (0,)
    """Each method runs once per seed."""
    seconds: float = 600.0
    """CPU time of each training."""
    results: Path = ROOT / "benchmarks" / "runs" / "peers.jsonl"
    """File to which finished rows are appended."""
    cache_dir: Path = CACHE_DIR
    """Folder of decoded images."""
    tables: bool = False
    """Print tables of all finished rows as Markdown, and run none."""


def main() -> None:
    with exit_on_user_error():
        settings = parse_flags(Settings, description=__doc__)
        if unknown := set(settings.only) - set(NAMES):
            raise ValueError(f"unknown methods {sorted(unknown)}; expected some of: {', '.join(NAMES)}.")
        if settings.tables:
            return print("\n".join(tables(finished(settings))))
        if not settings.data:
            raise ValueError("name the data (folders of photos, or petals), or pass --tables.")
        if timm is None:
            raise ValueError('timm or lightly is missing: pip install -e ".[peers]".')
        torch.set_num_threads(1)
        for source in settings.data:
            config = DataConfig(data=source, cache_dir=settings.cache_dir)
            data = open_data(config, short_side=short_side_for((SIZE, SIZE)))
            if data.classes is None or data.val is None or data.test is None:
                raise ValueError(f"{source} needs labels, and enough of them for val and test.")
            for seed in settings.seeds:
                for name in settings.only:
                    run(settings, source, data, name, seed)


def finished(settings: Settings) -> list[dict]:
    return [json.loads(line) for line in settings.results.read_text().splitlines()] if settings.results.exists() else []


def run(settings: Settings, source: str, data: Data, name: str, seed: int) -> None:
    """Train, probe, append a line to the file; nothing if the line is there."""
    key = {"data": Path(source).name, "method": name, "seed": seed, "seconds": settings.seconds}
    if any(key.items() <= row.items() for row in finished(settings)):
        return
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)  # lightly's transforms draw from all of them
    if name in METHODS:
        encoder, about = METHODS[name](len(data.classes or ())), {}
        if isinstance(encoder, Method):
            images = data.train if isinstance(encoder, Supervised) else data.pretrain
            encoder, about = encoder.encoder, train(encoder, images, settings.seconds, seed)
    else:
        encoder, about = train_by_script(settings, source, seed, name)
    row = {**key, **probe(encoder, data), **about, "precision": "bf16", "commit": commit()}
    row["versions"] = {package: version(package) for package in ("torch", "timm", "lightly")}
    row["command"] = f"benchmarks/peers.py {key['data']} --only {name} --seeds {seed} --seconds {settings.seconds:g}"
    settings.results.parent.mkdir(parents=True, exist_ok=True)
    with settings.results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def train(method: Method, images: Images, seconds: float, seed: int) -> dict:
    """Train until the CPU time is used up, by a warm-up and a cosine over it; what the row says of it."""
    batch, optimizer, step, started = min(BATCH, len(images)), method.train().optimizer(), 0, time.process_time()
    while (progress := (time.process_time() - started) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = method.rate * min(1, progress / WARMUP) * (1 + math.cos(math.pi * progress)) / 2
        indices = batch_indices(step, images=len(images), batch=batch, seed=seed)
        views = [method.transform(Image.fromarray(images.read(row))) for row in images.rows[indices].tolist()]
        with torch.autocast("cpu", torch.bfloat16):
            labels = None if images.labels is None else images.labels[indices]
            loss = method.loss([torch.stack(of_view) for of_view in zip(*views)], labels)
        if not loss.isfinite():
            raise RuntimeError(f"loss is {loss.item()} at step {step}.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    about = {"cpu_seconds": round(time.process_time() - started, 1), "images_seen": step * batch, "steps": step}
    return {**about, "batch_size": batch, "lr": method.rate, "last_loss": round(loss.item(), 4)}


def train_by_script(settings: Settings, source: str, seed: int, name: str) -> tuple[ImageEncoder, dict]:
    """The same of a script of ours, for as many epochs as use up the CPU time; short runs tell how many."""
    supervised = name == "supervised-scott"

    def cpu_seconds(script: str, *flags: object) -> float:
        command = [sys.executable, ROOT / script, *flags, "--data", source, "--cache-dir", settings.cache_dir]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "bf16"}
        before = os.times()
        subprocess.run(
            list(map(str, [*command, "--seed", seed])), env=environment, stdout=subprocess.DEVNULL, check=True
        )
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    def pretrain(epochs: float) -> float:
        flags = ["--image-size", SIZE, "--report-every", 0, "--epochs", epochs, "--out", out, "--overwrite"]
        return cpu_seconds("train/pretrain.py", "small-data" if supervised else name, *flags)

    def classify(epochs: float) -> float:
        shutil.rmtree(out / "eval", ignore_errors=True)
        return cpu_seconds("eval/finetune.py", out, "--from-scratch", "--epochs", epochs)

    with tempfile.TemporaryDirectory() as folder:
        out, short = Path(folder, "run"), 0.5
        start_up, train = pretrain(0.001), pretrain
        if supervised:  # of a run, whose first weights are then trained
            start_up, train = classify(0.001), classify
        while (used := train(short) - start_up) < settings.seconds / 10:  # the start alone varies by a second or two
            short *= 3
        epochs = round(short * settings.seconds / used, 3)
        about = {"epochs": epochs, "cpu_seconds": round(train(epochs) - start_up, 1)}
        (trained,) = out.glob("eval/finetune/*") if supervised else [out]
        summary, recipe = (json.loads((trained / f"{part}.json").read_text()) for part in ("summary", "recipe"))
        about |= {"images_seen": summary["steps"] * recipe["batch_size"], "steps": summary["steps"]}
        return FrozenEncoder(load_encoder(trained)), about


def probe(encoder: ImageEncoder, data: Data) -> dict:
    """Top-1 of each probe on val and test, and the setting that val chose."""
    parts, result = {"train": data.train, "val": data.val, "test": data.test}, {}
    features = {role: extract(encoder, part, size=(SIZE, SIZE), tokens=True) for role, part in parts.items()}
    for name, fit in PROBES.items():
        labels, device = data.train.labels, torch.device("cpu")
        fitted = fit(features["train"], labels, classes=len(data.classes), device=device)
        choice, val, _ = choose(fitted, features["val"], data.val.labels)
        (logits,) = fitted.logits(features["test"], [choice])
        test = score(logits, data.test.labels)
        result |= {f"{name}_val": round(val.top1, 2), f"{name}_test": round(test.top1, 2)}
        result[f"{name}_choice"] = fitted.settings[choice]
    return result


def tables(rows: list[dict]) -> Iterator[str]:
    """For each data set and budget a row per method: mean over seeds, ± the standard deviation."""
    for data, seconds in dict.fromkeys((row["data"], row["seconds"]) for row in rows):
        columns = [f"{data}, {seconds:g} CPU s", "seeds", *MEASURES, "images seen"]
        yield from ("", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|")
        for name in NAMES:
            of_name = [row for row in rows if (row["data"], row["seconds"], row["method"]) == (data, seconds, name)]
            if of_name:
                cells = [name, str(len(of_name))]
                for measure in MEASURES:
                    values = [row[measure] for row in of_name]
                    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                    cells.append(f"{statistics.mean(values):.1f}{spread}")
                cells.append(f"{statistics.mean(row.get('images_seen', 0) for row in of_name):,.0f}")
                yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
