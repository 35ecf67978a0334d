"""The page of a run, as a user finds it: whole, of this machine alone, safe whatever names say, and in a browser."""

import base64
import errno
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import compare
import pretrain
import pytest
import report
import torch
from conftest import TINY_RUN, run_pretraining, write_photo
from PIL import Image

from scott_sparse.evaluation import subject
from scott_sparse.training import html_report, pictures
from scott_sparse.training.recipe import RECIPES, Recipe
from scott_sparse.training.verdict import ADVICE, advice

HOSTILE = "<img src=x onerror=alert(1)> & \"b\" $x_ 'c'"
VOID = {"meta", "link", "img", "path", "use", "input", "br"}
SECTIONS = ["verdict", "curves", "views", "tokens", "attention", "neighbours", "closest", "isolated", "probes"]
SECTIONS += ["commands", "settings", "environment"]
RESULT = {
    "probe": "knn",
    "subject": "pretrained",
    "run": f"runs/{HOSTILE}",
    "image_size": [32, 32],
    "data": HOSTILE,
    "protocol": "clean",
    "test": {"top1": 50.0, "top1_interval": [40.0, 60.0]},
}


class Page(HTMLParser):
    """The elements of a page; fails where tags do not close each other."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.found, self.words = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]

    def pictures(self):
        """All images, decoded."""
        sources = [image["src"].removeprefix("data:image/webp;base64,") for image in self.of("img")]
        return [Image.open(io.BytesIO(base64.b64decode(source, validate=True))).convert("RGB") for source in sources]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photos"
    for split, count in (("train", 10), ("test", 4)):
        for channel, name in enumerate(("a", HOSTILE)):
            for i in range(count):
                write_photo(folder / split / name / f"{i}.png", 50, 60, seed=100 * channel + i, channel=channel)
    shutil.copy(folder / "train" / "a" / "0.png", folder / "train" / "a" / "copy.png")
    return folder


def train(photos, out, *more):
    return run_pretraining(*TINY_RUN, "--data", photos, "--out", out, "--report-every", 1, *more)


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """A run, and the pages that it wrote on its way; in a folder that is named by someone hostile."""
    out, pages = tmp_path_factory.mktemp("runs") / HOSTILE, []
    write = html_report.write_atomically

    def watched(path, content):
        state = torch.get_rng_state()
        write(path, content)
        if path.name == "report.html":
            pages.append(content)
        assert torch.equal(state, torch.get_rng_state())

    start = pretrain.start_report

    def start_and_compare(run):
        state = torch.get_rng_state()
        start(run)
        assert torch.equal(state, torch.get_rng_state())

    with (
        mock.patch.object(html_report, "write_atomically", watched),
        mock.patch.object(pretrain, "start_report", start_and_compare),
    ):
        code, printed = train(photos, out, "--overwrite")
    assert code is None and "cannot be written" not in printed
    return out, pages


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def test_a_page_is_whole_and_holds_everything(finished, photos):
    out, _ = finished
    (out / "eval").mkdir(exist_ok=True)
    (out / "eval" / "knn.json").write_text(json.dumps(RESULT))
    report.main(report.ReportConfig(out))
    text, page = (out / "report.html").read_text(), Page(out / "report.html")
    assert [section["id"] for section in page.of("section")] == SECTIONS and "Not drawn yet" not in text
    summary = json.loads((out / "summary.json").read_text())
    assert summary["verdict"] in page.text and advice(summary["verdict"]) in page.text
    titles = re.findall(r"<figcaption>(\S[^<]*?)\n", text)
    for title in ("Loss", "Loss term NT-Xent", "k-NN on val, %", "Learning rate", "EMA momentum", "Images per second"):
        assert title in titles
    assert len(page.of("svg")) == 10 and text.count("var(--c0)") > 10 and "#a0000" not in text
    pictures = page.pictures()
    views, tokens, attention, neighbours, pairs = 6 * (2 + 2), 2 * (1 + 4), 2 * (1 + 3), 12 * (1 + 5), 8 * 2
    assert len(pictures) == views + tokens + attention + neighbours + 2 * pairs  # there are two val images
    assert all(max(picture.size) <= 96 for picture in pictures) and len(text) < 1_500_000
    assert "50.0 ± 10.0" in page.text and "halo" in page.text
    assert "--overwrite" not in page.text  # the command would delete the run that it is to resume
    flags = shlex.join(["--data", str(photos), "--cache-dir", str(photos.parent / "cache")])
    assert f"eval/knn.py {shlex.quote(str(out))} {flags}" in page.text
    assert "accelerate launch pretrain.py --size demo" in page.text and f"load_encoder({str(out)!r})" in page.text


def test_nothing_comes_from_elsewhere_or_is_executed(finished):
    """No address but those of the page itself, no script; names are text, never tags or attributes."""
    out, pages = finished
    for text in (*pages, (out / "report.html").read_text()):
        assert "://" not in re.sub(r">[^<]*<", "><", text)
    page = Page(out / "report.html")
    assert page.of("script") == [] and all("onerror" not in attributes for _, attributes in page.found)
    for _, attributes in page.found:
        for name in ("src", "href", "xlink:href"):
            assert name not in attributes or attributes[name].startswith(("data:", "#"))
    assert HOSTILE in page.text and page.text.count("1.0000") >= 1  # the copy is the closest of all


def test_it_is_written_while_the_run_trains(finished):
    _, pages = finished
    assert len(pages) == 5  # start, reports at epochs 0, 1 and 2, end
    assert "No step has been logged yet" in pages[0] and "No verdict yet" in pages[0]
    assert all("What the first step sees" in page and "epoch" in page for page in pages)
    assert "Principal components" not in pages[3] and "head 1" not in pages[3] and "head 1" in pages[4]
    assert pages[1].count("<svg") == 3 and pages[3].count("<svg") == 10
    assert "Resume, if it was stopped" in pages[3] and "Train longer than 2 epochs" in pages[4]


def test_a_run_that_was_stopped(photos, tmp_path, capsys):
    """Its pictures are those of the checkpoint; what a killed process had begun to write is left out."""
    out, update = tmp_path / "run", pretrain.update_target
    calls = []

    def stop(*arguments, **options):
        update(*arguments, **options)
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(pretrain, "update_target", stop):
        assert train(photos, out, "--share", 0.9)[0] == 75
    assert "head 1" not in (out / "report.html").read_text()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ep')
    report.main(report.ReportConfig(out))
    page = Page(out / "report.html")
    assert "By the checkpoint after step 3." in page.text and "epoch 1.5 of 2" in page.text.lower()
    assert capsys.readouterr().err.strip() == "" and len(page.pictures()) > 50
    # And of one whose images are gone, or others.
    shutil.rmtree(out / "report")
    report.main(report.ReportConfig(out, data=str(tmp_path / "nowhere")))
    assert "missing cannot be drawn: --data" in capsys.readouterr().err
    shutil.copytree(photos, tmp_path / "others")
    write_photo(tmp_path / "others" / "train" / "a" / "more.png", 50, 60)
    report.main(report.ReportConfig(out, data=str(tmp_path / "others")))
    assert "are not those that" in capsys.readouterr().err
    assert Page(out / "report.html").pictures() == []
    # It resumes, and draws all of them.
    assert train(photos, out, "--share", 0.9)[0] is None
    assert len(Page(out / "report.html").pictures()) > 50


def test_without_labels_and_reports(tmp_path):
    for i in range(9):
        write_photo(tmp_path / "photos" / f"{i}.png", 50, 60, seed=i)
    code, _ = run_pretraining(*TINY_RUN, "--data", tmp_path / "photos", "--out", tmp_path / "run", "--mim-weight", 0)
    page = Page(tmp_path / "run" / "report.html")
    assert code is None and "No verdict yet" in page.text and "k-NN on val" not in page.text
    assert "0.png" in page.text and "target view" not in page.text


def test_a_full_disk_does_not_end_the_run(photos, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        mock.patch.object(html_report, "write_atomically", full),
        mock.patch.object(pictures, "write_atomically", full),
    ):
        code, printed = train(photos, tmp_path / "run")
    assert code is None and printed.count("report.html cannot be written (No space left on device)") == 6
    assert (tmp_path / "run" / "summary.json").exists() and not (tmp_path / "run" / "report.html").exists()


def test_others():
    """Equal images are found whichever comes first; no image is its own neighbour."""
    features = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)[[0, 1, 2, 2, 2, 3, 4]]
    similarity, index = pictures.others(features, 3)
    expected = (features @ features.T).fill_diagonal_(-2).sort(dim=1, descending=True)
    torch.testing.assert_close(similarity, expected.values[:, :3], atol=1e-5, rtol=0)
    assert all(i not in row for i, row in enumerate(index.tolist()))
    assert set(index[2, :2].tolist()) == {3, 4}
    assert pictures.others(features[:1], 3)[1].shape == (1, 0)


def test_comparison(run, finished, photos, tmp_path):
    other = tmp_path / "other"
    train(photos, other, "--lr", 0.001, "--epochs", 1)
    (other / "eval").mkdir()
    (other / "eval" / "knn.json").write_text(json.dumps({**RESULT, "run": "other"}))
    compare.main(compare.CompareConfig((run, other), out=tmp_path / "compare.html"))
    text, page = (tmp_path / "compare.html").read_text(), Page(tmp_path / "compare.html")
    assert "different data" not in page.text and "://" not in re.sub(r">[^<]*<", "><", text)
    rows = re.findall(r"<tr><th>([\w.]+)</th><td>(.*?)</td><td>(.*?)</td></tr>", text)
    assert ("lr", "0.003", "0.001") in rows and {name for name, *_ in rows} == {"lr", "epochs"}
    assert len(page.of("svg")) == 10 and "var(--c1)" in text and "50.0 ± 10.0" in page.text
    assert page.text.count(str(other)) > 3 and len(page.pictures()) == 2 * (1 + 2 + 2)  # images are the same

    started = tmp_path / "started"
    started.mkdir()
    recipe = json.loads((run / "recipe.json").read_text())
    (started / "recipe.json").write_text(json.dumps({**recipe, "source": {**recipe["source"], "data": "<b>else"}}))
    compare.main(compare.CompareConfig((run, started), out=tmp_path / "compare.html"))
    page = Page(tmp_path / "compare.html")
    assert "The runs are on different data" in page.text and "<b>else" in page.text and page.of("script") == []
    assert "no step logged yet" in page.text


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        (report, ["nothing"], "nothing is not a run: expected a folder of train/pretrain.py"),
        (report, [], "Run folder of train/pretrain.py. (required)"),
        (compare, ["RUN"], "got 1 run folders, expected two or more"),
        (compare, ["RUN", "nothing"], "nothing is not a run"),
        (report, ["TUNED"], "tuned is of eval/finetune.py"),
    ],
)
def test_mistakes_end_in_one_line(script, arguments, message, run, monkeypatch):
    config = {report: getattr(report, "ReportConfig", None), compare: getattr(compare, "CompareConfig", None)}[script]
    (run / "tuned").mkdir()
    (run / "tuned" / "recipe.json").write_text('{"recipe": "finetune"}')
    folders = {"RUN": str(run), "TUNED": str(run / "tuned")}
    monkeypatch.setattr(sys, "argv", ["script.py", *(folders.get(word, word) for word in arguments)])
    with pytest.raises(SystemExit) as end:
        subject.run_script(config, script.main)
    assert end.value.code.startswith("error: ") and message in end.value.code and "\n" not in end.value.code


@pytest.mark.parametrize("recipe", [recipe for _, recipe in RECIPES.values()], ids=RECIPES)
def test_recipes_are_read_again(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(ValueError, match=r"recipe\.json is of another version: .*spread"):
        Recipe.from_json({**recipe.to_json(), "spread": 1})


def test_every_verdict_has_advice(finished):
    assert all(advice(f"{words} so far; try this") == text for words, text in ADVICE.items())
    reports = [json.loads(line) for line in (finished[0] / "reports.jsonl").read_text().splitlines()]
    assert all(advice(row["verdict"]) for row in reports)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<!doctype html><iframe src="report.html" style="width: 360px; height: 800px"></iframe><pre></pre><script>
addEventListener("load", () => {  // of the frame's images too
  const page = document.querySelector("iframe").contentDocument, images = [...page.images]
  document.querySelector("pre").textContent = JSON.stringify({
    width: page.documentElement.scrollWidth, images: images.length, broken: images.filter(x => !x.naturalWidth).length,
    colour: page.defaultView.getComputedStyle(page.querySelector(".chart svg text")).fill,
  })
})</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(scheme, run, tmp_path):
    """At 360 pixels nothing is wider than the screen, all pictures decode, the console is empty."""
    (run / "probe.html").write_text(PROBE)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", "--timeout=60000"]
    flags += [f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"]
    done = subprocess.run([CHROMIUM, *flags, f"file://{run}/probe.html"], capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r"<pre>(.*)</pre>", done.stdout)[1])
    assert found["width"] <= 360 and found["images"] > 50 and found["broken"] == 0
    assert found["colour"] == {"light": "rgb(28, 36, 48)", "dark": "rgb(228, 233, 240)"}[scheme]
    assert "CONSOLE" not in done.stderr, done.stderr
