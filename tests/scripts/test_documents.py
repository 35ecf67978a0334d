"""Snippets of README and docs run, the file tree exists, commands name real recipes and flags, links lead somewhere."""

import dataclasses
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import anomaly
import attentive
import compare
import export
import extract
import label_next
import linear
import pytest
import report
import segment
import table
import tyro
import visualize
from conftest import ROOT, TINY_RUN

import scott_sparse
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
    "segment": segment.SegmentConfig,
    "anomaly": anomaly.AnomalyConfig,
    "label_next": label_next.LabelNextConfig,
    "finetune": FinetuneConfig,
    "learning_curve": CurveConfig,
    "visualize": visualize.VisualizeConfig,
    "report": report.ReportConfig,
    "compare": compare.CompareConfig,
    "table": table.TableConfig,
    "export": export.ExportConfig,
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
    assert len(SNIPPETS) >= 5 and len(COMMANDS) >= 2


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


@pytest.mark.parametrize("line", [line for line in LINES if "eval/" in line])
def test_questions_parse(line):
    script, arguments = re.search(r"eval/(\w+)\.py(.*)", line).groups()
    question = tyro.cli(QUESTIONS[script], args=shlex.split(arguments), config=(tyro.conf.OmitArgPrefixes,))
    named = ("run", "runs", "timm")
    assert question.source.data if script == "learning_curve" else any(getattr(question, x, None) for x in named)


@pytest.mark.slow
def test_the_commands_of_docs_run(photos, tmp_path, clean_environment):
    """In the order of a reader, on photos that are quickly trained on; what needs other data or a download is left."""
    photos({f"{split}/{kind}": 24 for split in ("train", "val", "test") for kind in "ab"}, name="PHOTOS")
    for folder in ("train", "eval"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = {**clean_environment, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    quick = {"train/pretrain.py": TINY_RUN, "eval/finetune.py": ["--epochs", 1], "eval/attentive.py": ["--epochs", 1]}
    ran, scripts = set(), set()
    for page in ("photos", "curves", "recipes", "protocols"):
        for block in re.findall(r"```bash\n(.*?)```", PAGES[ROOT / "docs" / f"{page}.md"], re.DOTALL):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if "--timm" in words or "runs/timm-resnet18" in words or tuple(words) in ran:
                    continue
                ran.add(tuple(words))
                script = next(word for word in words if word.endswith(".py"))
                words += map(str, quick.get(script, ()))  # the last of equal flags wins
                done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, (page, line, done.stdout[-500:], done.stderr[-2000:])
                scripts.add(script)
    assert len(scripts) >= 8


def test_no_markdown_link_is_dead():
    for page, text in PAGES.items():
        for target, place in re.findall(r"\]\(((?!http)[^)#]+)#?([^)]*)\)", text):
            assert (page.parent / target).exists(), (page.name, target)
            headings = re.findall(r"^#+ (.*)", (page.parent / target).read_text(), re.MULTILINE) if place else []
            assert not place or place in {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings}


class Page(HTMLParser):
    """The links of a page, and the places in it that can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.places = set(), {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.places.add(attributes.get("id", ""))
        self.links |= {attributes[name] for name in ("href", "src") if attributes.get(name)}


@pytest.mark.slow
def test_reference_has_all_public_names_and_no_dead_link(tmp_path):
    pytest.importorskip("pdoc")
    arguments = re.search(r"\$\(BIN\)/python (.*-m pdoc .*) site\n", (ROOT / "Makefile").read_text())[1]
    subprocess.run([sys.executable, *shlex.split(arguments), str(tmp_path)], check=True, capture_output=True, cwd=ROOT)
    pages = {path.relative_to(tmp_path).as_posix(): Page(path) for path in tmp_path.rglob("*.html")}
    assert set(scott_sparse.__all__) - {"engines", "masks", "stages"} <= pages["scott_sparse.html"].places
    assert {"scott_sparse/model/masks.html", "scott_sparse/model/engines.html"} <= pages.keys()
    for name, page in pages.items():
        for link in page.links:
            if not link.startswith(("http:", "https:", "data:")):
                target, _, place = link.partition("#")
                path = (tmp_path / name).parent / target if target else tmp_path / name
                assert path.exists(), (name, link)
                if path.suffix == ".html":
                    assert place in pages[path.resolve().relative_to(tmp_path.resolve()).as_posix()].places, (
                        name,
                        link,
                    )
