"""Flags of train/pretrain.py: which recipe they choose, what --help shows, what old and wrong ones say."""

import dataclasses
import re

import pytest

from scott_sparse.cli import ADVANCED
from scott_sparse.training import recipe as recipes
from scott_sparse.training.recipe import SMALL_DATA, parse


def shown(capsys, *arguments):
    """What --help prints: its flags with what it says of each, and the first and last line."""
    with pytest.raises(SystemExit) as end:
        parse([*arguments])
    assert not end.value.code
    lines = capsys.readouterr().out.splitlines()
    flags, flag = {}, None
    for line in lines[:-1]:
        start = re.match(r"[│ ] {1,2}(--[a-z][\w-]+)( \S+)*?(?=  |$)", line.removesuffix("│").rstrip())
        flag = start[1] if start else flag
        if flag:
            flags[flag] = f"{flags.get(flag, '')} {line[len(start[0]) if start else 1 :].removesuffix('│').strip()}"
    return flags, lines[0], lines[-1]


def fields(config=recipes.Recipe):
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(field.type):
            yield from fields(field.type)
        else:
            yield field


def test_help_shows_forty_flags_and_help_advanced_all(capsys):
    flags, _, last = shown(capsys, "demo", "--help")
    assert len(flags) <= 40 and not {"--lr-start", "--blur-sigma"} & set(flags)
    every, _, _ = shown(capsys, "demo", "--help-advanced")
    advanced = [field for field in fields() if ADVANCED in getattr(field.type, "__metadata__", ())]
    assert last == f"--help-advanced lists {len(advanced)} more flags, whose defaults rarely need a change."
    assert len(every) == len(list(fields())) == len(flags) + len(advanced)


def test_every_flag_has_a_help_line(capsys):
    flags, _, _ = shown(capsys, "demo", "--help-advanced")
    assert {f"--{field.name.replace('_', '-')}" for field in fields()} == flags.keys()
    for flag, words in flags.items():
        assert re.fullmatch(r".{20,}\(default: .*\).*", words), (flag, words)


def test_the_recipe_is_chosen_before_anything_is_parsed(capsys):
    """The demo has 5 epochs and 6 crops, small-data 24 and 8."""
    name, recipe = parse(["--data", "PHOTOS", "--warmup-epochs", "6"])
    assert name == "small-data" and recipe.warmup_epochs == 6 and recipe.epochs == 24
    assert parse(["--warmup-epochs", "1", "--data=PHOTOS"])[0] == "small-data"
    assert parse([])[0] == parse(["--data", "petals"])[0] == parse(["--data=petals", "--lr", "1"])[0] == "demo"
    assert parse(["flowers102", "--data", "PHOTOS"])[0] == "flowers102"
    flags, first, _ = shown(capsys, "--data", "PHOTOS", "--help")
    assert "train/pretrain.py small-data" in first and "(default: 24.0)" in flags["--epochs"]


MISTAKES = {
    "flowers": "unknown recipe 'flowers'; expected one of: demo",
    "--hide-ration 0.5": "--hide-ration, 0.5 Perhaps you meant: --hide-ratio FLOAT",
    "--hide-ratio 0": "hide_ratio 0.0 is outside (0, 1)",
    "--hide-ratio 1": "hide_ratio 1.0 is outside (0, 1)",
    "--crops 1": "cross_crop_weight 0.5 compares crops of an image, but crops is 1; use --crops 2",
    "--crops 2 --plain-share 0.5": "but crops is 1 and 1 (plain_share 0.5); use --crops 4 or --plain-share 0",
    "--batch-size 1": "ntxent compares images, but batch_size is 1",
    "--cross-crop-loss sigreg --temperature 0.1": "temperature 0.1 has no effect: it is for NT-Xent",
    "--mim-weight 0 --predictor-depth 2": "predictor_depth 2 has no effect: it is for MIM-JEPA, the loss is NT-Xent",
    "--engine tiles": "expected one of auto, dense, halo, spconv; tiles is called halo now",
    "--tokenizer conv": "unknown tokenizer 'conv'; expected one of scott, patch",
    "--temperature 0": "temperature 0.0 must be positive",
    "--epochs many": "Error parsing --epochs: could not convert string to float: 'many'",
    "--crop-scale 0.5 2.0": "crop_scale is (0.5, 2.0)",
    "--workers -1": "workers -1 must be 0 or more",
    "--keep-last 0": "keep_last 0 must be positive",
    "--minutes 0": "minutes 0.0 must be positive",
    "--report-every -1": "report_every -1.0 must be 0 or more",
    "--ema-momentum 0.9 1.1": "ema_momentum (0.9, 1.1) must lie in [0, 1]",
    "--warmup-epochs 99": "must be less than epochs",
    **{f"--save-every {words}": "save_every" for words in ("0", "ten", "5s", "0min", "1.5")},
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_name_field_value_and_remedy(flags):
    with pytest.raises(ValueError) as mistake:
        parse(flags.split())
    assert MISTAKES[flags] in str(mistake.value) and "\n" not in str(mistake.value)


@pytest.mark.parametrize(
    "flags",
    [
        "demo --mim-weight 0",
        "small-data --cross-crop-weight 0 --crops 1",
        "flowers102 --batch-size 8 --accumulate 8",
        "flowers102 --batch-size 1",
    ],
)
def test_a_term_that_is_off_is_not_validated(flags):
    assert len(parse(flags.split())[1].objective.terms) == 1


OLD = {
    "--mask uniform": "--mask is --mask-shape now.",
    "--momentum 0.9 1": "--momentum is --ema-momentum now.",
    "--clip=1": "--clip is --clip-grad now.",
    "--lr_batch 64": "--lr-batch is --lr-batch-size now.",
    "--keep 3": "--keep is --keep-last now.",
    "--masks 2": "--masks was removed: it gained nothing (benchmarks/EVIDENCE.md).",
    "--invariance 1": "--invariance is --cross-crop-weight now.",
    "--spread contrast": "--spread is --cross-crop-loss now (ntxent or sigreg).",
    "--spread vicreg": "--spread vicreg was removed: it gained nothing (benchmarks/EVIDENCE.md).",
    "--spread=vicreg": "--spread vicreg was removed: it gained nothing (benchmarks/EVIDENCE.md).",
    "--spread-share 0": "--spread-share is --sigreg-weight now.",
    "--mim 0": "--mim is --mim-weight now.",
    "--directions 64": "--directions is --sigreg-projections now.",
    "--target-blocks 2": "--target-blocks was removed: it gained nothing (benchmarks/EVIDENCE.md).",
}


@pytest.mark.parametrize("flags", OLD)
def test_flags_of_earlier_versions_name_the_new_ones(flags):
    with pytest.raises(ValueError) as mistake:
        parse(["small-data", "--data", "PHOTOS", *flags.split()])
    assert str(mistake.value) == OLD[flags]


@pytest.mark.parametrize("flag", ["--jitter .1 .1 .1 .1", "--grey 0", "--plain-share 0.25"])
def test_what_colour_auto_decides_is_refused_beside_it(flag):
    arguments = ["small-data", "--data", "PHOTOS", *flag.split()]
    with pytest.raises(ValueError, match=f"{flag.split()[0]} is decided by --colour auto; pass --colour 1 with it"):
        parse(arguments)
    parse([*arguments, "--colour", "1"])
    parse(["small-data", "--data", "PHOTOS", "--plain-share", "0"])  # as it may become


def test_recipes_hold_the_published_values():
    paper = recipes.FLOWERS102
    assert (paper.sides, paper.encoder.dim, paper.encoder.depth, paper.encoder.heads) == ((224, 224), 384, 12, 4)
    assert (paper.epochs, paper.batch_size, paper.hide_ratio, paper.mask_shape) == (300, 64, 0.6, "block")
    assert paper.objective.terms == ("MIM-JEPA",) and paper.objective.context == "all"
    assert (paper.dropout, paper.attention_dropout, paper.drop_path) == (0.2, 0.1, 0.1)


def test_rates_follow_batch_and_length():
    """Adam's rate goes with the root of the batch, warm-up and the target's window with the length of the run."""
    short = dataclasses.replace(SMALL_DATA, epochs=5.0).schedules(100)
    assert short.warmup_steps == 50 and short.lr == SMALL_DATA.lr
    assert short.momentum_at(0) == short.momentum_at(499) == pytest.approx(1 - 1 / (0.04 * 500))
    large = dataclasses.replace(SMALL_DATA, epochs=10.0, batch_size=256).schedules(25)
    assert large.warmup_steps == 25 and large.lr == pytest.approx(2 * SMALL_DATA.lr)
    assert large.momentum_at(0) == pytest.approx(1 - 1 / 10)
    assert dataclasses.replace(SMALL_DATA, epochs=0.1).schedules(10).momentum_at(0) == 0  # a step: the target copies
    fixed = {"lr_batch_size": None, "batch_size": 256, "ema_momentum": (0.9, 1.0), "warmup_epochs": 1.0}
    schedules = dataclasses.replace(SMALL_DATA, **fixed).schedules(25)
    assert schedules.lr == SMALL_DATA.lr and schedules.warmup_steps == 25 and schedules.momentum == (0.9, 1.0)
