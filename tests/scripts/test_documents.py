"""Snippets of README and docs run, the file tree exists, commands name real recipes and flags, links lead somewhere."""

import dataclasses
import re
import shlex

import attentive
import extract
import linear
import pytest
import tyro
from conftest import ROOT

from scott_sparse import Encoder, EncoderConfig, save_encoder
from scott_sparse.evaluation.finetune import FinetuneConfig
from scott_sparse.evaluation.subject import ProbeConfig
from scott_sparse.model.preprocess import Preprocess
from scott_sparse.training import recipe as recipes
from scott_sparse.training.learning_curve import CurveConfig

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES[ROOT / "README.md"]


def blocks(language):
    return [block for text in PAGES.values() for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


SNIPPETS = blocks("python")
LINES = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
COMMANDS = [line for line in LINES if "train/pretrain.py" in line]
QUESTIONS = {
    "knn": ProbeConfig,
    "linear": linear.LinearConfig,
    "attentive": attentive.AttentiveConfig,
    "fewshot": ProbeConfig,
    "extract": extract.ExtractConfig,
    "finetune": FinetuneConfig,
    "learning_curve": CurveConfig,
}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.split("\n")[1])
def test_snippets_run(snippet, tmp_path):
    save_encoder(Encoder(EncoderConfig.named("demo", patch_size=8)), tmp_path, preprocess=Preprocess((64, 96)))
    names = {}
    exec(snippet.replace('"RUN"', repr(str(tmp_path))), names)
    # Shapes promised in comments, such as "# (4, 140, 384)".
    for name, shape in re.findall(r"^(\w+)(?:, \w+)? = .*# \((\d+(?:, \d+)+)\)", snippet, re.MULTILINE):
        assert str(tuple(names[name].shape)) == f"({shape})", name


def test_there_are_snippets_and_commands():
    assert len(SNIPPETS) == 2 and len(COMMANDS) >= 2


def test_the_rooms_exist_and_are_all_named():
    tree = re.search(r"```\n(scott_sparse/.*?)```", README, re.DOTALL)
    rooms = [line.split("  ")[0] if not line.startswith(" ") else line.split()[0] for line in tree[1].splitlines()]
    folders = {path.name for path in (ROOT / "scott_sparse").iterdir() if (path / "__init__.py").exists()}
    assert folders <= {room.strip("/") for room in rooms}
    for modules in ("files distributed cli",):
        assert modules in tree[1] and all((ROOT / "scott_sparse" / f"{name}.py").exists() for name in modules.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    arguments = shlex.split(command)
    arguments = arguments[arguments.index("train/pretrain.py") + 1 :]
    name, recipe = recipes.parse(arguments)
    assert name in recipes.RECIPES and dataclasses.is_dataclass(recipe)


@pytest.mark.parametrize("line", [line for line in LINES if "eval/" in line and "table.py" not in line])
def test_questions_parse(line):
    script, arguments = re.search(r"eval/(\w+)\.py(.*)", line).groups()
    question = tyro.cli(QUESTIONS[script], args=shlex.split(arguments), config=(tyro.conf.OmitArgPrefixes,))
    assert question.source.data if script == "learning_curve" else question.run or question.timm


def test_no_markdown_link_is_dead():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(((?!http)[^)]+)\)", text):
            assert (page.parent / target).exists(), (page.name, target)
