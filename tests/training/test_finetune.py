"""eval/finetune.py as a user runs it: it learns, it resumes to the same weights, it refuses what cannot work."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
from unittest import mock

import knn
import linear
import pytest
import table
import torch
from conftest import ROOT, TINY, write_photo
from safetensors.torch import load_file

from scott_sparse import Encoder, load_encoder, save_encoder
from scott_sparse.data.dataset import DataConfig, open_data, short_side_for
from scott_sparse.data.splits import load_digests, save_digests
from scott_sparse.evaluation.finetune import Augment, Classifier, FinetuneConfig, balanced_weights
from scott_sparse.evaluation.labels import draw_labels
from scott_sparse.evaluation.subject import LabelBudgetConfig, run_script
from scott_sparse.model.hub import model_card
from scott_sparse.training import finetune
from scott_sparse.training.optim import adamw

SIZE, CLASSES = 32, ("a", "b", "c")


@pytest.fixture(scope="module")
def photos_folder(tmp_path_factory):
    """Three classes of three colours."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for first, split, count in ((0, "train", 24), (100, "test", 8)):
        for label, name in enumerate(CLASSES):
            for i in range(count):
                write_photo(root / split / name / f"{i}.png", 20, 24, seed=first + 200 * label + i, channel=label)
    return root


@pytest.fixture(scope="module")
def run_of_tests(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(3)
    save_encoder(Encoder(TINY), folder)
    views = {"colour": 1.0, "plain_share": 0.5, "crop_scale": [0.4, 1.0], "crops": 8}
    (folder / "recipe.json").write_text(json.dumps({"image_size": SIZE, "seed": 3, "views": views}))
    return folder


@pytest.fixture
def run_folder(run_of_tests, tmp_path):
    return shutil.copytree(run_of_tests, tmp_path / "run")


def run(*arguments, cut=None):
    """The script: how it ended, and what it printed in one line. `cut`: told to stop after so many updates."""
    update, calls = finetune.update_target, []

    def update_and_cut(*values, **options):
        update(*values, **options)
        calls.append(1)
        if len(calls) == cut:
            signal.raise_signal(signal.SIGTERM)

    printed, code = io.StringIO(), None
    argv = ["finetune.py", *map(str, arguments)]
    with (
        mock.patch.object(finetune, "update_target", update_and_cut),
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(printed),
    ):
        try:
            run_script(FinetuneConfig, finetune.run_finetune)
        except SystemExit as end:
            code = end.code
    return code, " ".join(printed.getvalue().split())


def result_of(folder, name="finetune"):
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"eval/{name}*.json"))]


def result_of_knn(folder, photos, cache, **fields):
    knn.main(LabelBudgetConfig(str(folder), source=DataConfig(data=str(photos), cache_dir=cache), **fields))
    return result_of(ROOT / folder, "knn")


def flags(run_folder, photos, cache, *more):
    return [run_folder, "--data", photos, "--cache-dir", cache, "--batch-size", 16, "--points", 4, *more]


def test_it_learns_chooses_on_val_and_reads_test_once(run_folder, photos_folder, tmp_path):
    seen = []

    def watched(self, features, logits=Classifier.logits):
        seen.append(len(features.pooled))
        return logits(self, features)

    with mock.patch.object(Classifier, "logits", watched):
        code, printed = run(*flags(run_folder, photos_folder, tmp_path, "--epochs", 5, "--lr", 1e-5, 1e-2))
    assert code is None and "epoch 5: " in printed and "% of val" in printed
    (result,) = result_of(run_folder)
    assert result["probe"] == "finetune-epochs5-batch_size16-lr1e-05_0.01-points4"
    assert result["images"] == {"train": 66, "val": 6, "test": 24} and result["subject"] == "pretrained"
    tried = result["settings_tried"]
    assert [point["epoch"] for point in tried] == [0.0, 1.25, 2.5, 3.75, 5.0] * 2
    assert result["val"]["top1"] == max(point["top1"] for point in tried) and result["test"]["top1"] > 60
    assert result["choice"].items() <= max(tried, key=lambda point: point["top1"]).items()
    assert seen == [*[6] * 10, 6, 24]  # val at each point, then val and test by the choice

    # The same command reads what is there.
    with mock.patch.object(finetune, "loop", side_effect=AssertionError):
        run(*flags(run_folder, photos_folder, tmp_path, "--epochs", 5, "--lr", 1e-5, 1e-2))
    (again,) = result_of(run_folder)
    assert again["test"] == result["test"] and again["settings_tried"] == tried
    assert not list(run_folder.glob("eval/finetune/*/checkpoints"))

    # The classifier's folder stands in for a run. Which images the first run saw is not known.
    (of_knn,) = result_of_knn(result["classifier"], photos_folder, tmp_path)
    assert of_knn["image_size"] == [SIZE, SIZE] and of_knn["test_images_pretrained_on"] is None


def test_a_fine_tuned_encoder_has_seen_what_its_run_has(run_folder, photos_folder, tmp_path):
    config = DataConfig(data=str(photos_folder), cache_dir=tmp_path)
    test = open_data(config, short_side=short_side_for((SIZE, SIZE))).test.digests
    save_digests(run_folder, test[:3])
    assert run(*flags(run_folder, photos_folder, tmp_path, "--epochs", 1))[0] is None
    (result,) = result_of(run_folder)
    assert len(load_digests(ROOT / result["classifier"])) == 3 + 66
    with pytest.raises(ValueError, match="was pretrained on 3 of the 24 test images"):
        result_of_knn(result["classifier"], photos_folder, tmp_path)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_cut_twice_is_the_same_run(precision, run_folder, photos_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    other = shutil.copytree(run_folder, tmp_path / "other")
    more = ("--epochs", 3, "--mixup", 0.4, "--cutmix", 1, "--erase", 0.5, "--save-every", 5)  # 12 steps
    assert run(*flags(run_folder, photos_folder, tmp_path, *more))[0] is None
    code, printed = run(*flags(other, photos_folder, tmp_path, *more), cut=4)
    assert code == 75 and "SIGTERM: saved after step 4 of 12" in printed
    with mock.patch.object(finetune, "start_from_probe", side_effect=AssertionError):
        code, printed = run(*flags(other, photos_folder, tmp_path, *more), cut=3)
        assert code == 75 and "resuming after step 4 of 12" in printed
        assert run(*flags(other, photos_folder, tmp_path, *more))[0] is None
    ((a,), (b,)) = (list(folder.glob("eval/finetune/*")) for folder in (run_folder, other))
    assert a.name == b.name
    for file in ("encoder.safetensors", "head.safetensors"):
        tensors = load_file(a / file), load_file(b / file)
        assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items()), file
    logs = [[json.loads(line) for line in (x / "metrics.jsonl").read_text().splitlines()] for x in (a, b)]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]] and len(logs[0]) == 12
    (first,), (second,) = result_of(run_folder), result_of(other)
    assert first["settings_tried"] == second["settings_tried"] and first["test"] == second["test"]


def test_one_table_of_frozen_fine_tuned_and_scratch(run_folder, photos_folder, tmp_path, capsys):
    source = DataConfig(data=str(photos_folder), cache_dir=tmp_path)
    for budget in ("10%", "100%"):
        linear.main(linear.LinearConfig(str(run_folder), source=source, label_budget=budget))
        for scratch in ((), ("--from-scratch",)):
            more = ("--epochs", 1, "--label-budget", budget, *scratch)
            assert run(*flags(run_folder, photos_folder, tmp_path, *more))[0] is None
    counts = [result["images"]["train"] for result in result_of(run_folder, "linear")]
    assert sorted(counts) == [6, 66]
    capsys.readouterr()
    table.main(table.TableConfig((run_folder,)))
    header, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    of_finetune = [f"finetune{budget}-epochs1-batch_size16-points4" for budget in ("", "-10%")]
    assert columns[1:] == ["linear", "linear-10%", *of_finetune]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0].split()[-3] for row in cells] == ["pretrained,", "random,"] and all(map(all, cells[:1]))
    assert cells[1][1:3] == ["", ""] and all(cells[1][3:])


def test_a_classifiers_folder_says_how_it_was_trained(run_folder, photos_folder, tmp_path, capsys):
    for name, scratch in (("fine-tuned", ()), ("trained from scratch", ("--from-scratch",))):
        more = ("--epochs", 1, "--out", tmp_path / name, *scratch)
        assert run(*flags(run_folder, photos_folder, tmp_path, *more))[0] is None
        (folder,) = (tmp_path / name).glob("finetune/*")
        (result,) = result_of_knn(folder, photos_folder, tmp_path)
        assert result["subject"] == name
        table.main(table.TableConfig((folder,)))
        printed = capsys.readouterr().out
        assert f"{folder} {name}, 32 px" in printed and f"on {name} features" in printed
        card = str(model_card(load_encoder(folder), "photos"))
        assert f", {name} with labels: tokenizer" in card and "| knn | photos" in card
        assert "Protocol clean: training saw no test image" in card and "pretraining" not in card
        assert ("self-supervised" in card) == (name == "fine-tuned")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--blocks", 3), "blocks 3 is outside 1 to 2"),
        (("--blocks", 0), "blocks 0 is outside 1 to 2"),
        (
            ("--label-budget", "1%"),
            "leaves no image of 3 of 3 classes (a, b, c); use a larger share, or --label-budget 1",
        ),
        (("--label-budget", "0"), "is neither a share of each class (10%) or a number"),
        (("--label-budget", "120%"), "is neither"),
        (("--label-budget", "2.5"), "is neither"),
        (("--label-budget", "ten"), "is neither"),
        (("--init", "random"), "--from-scratch is the baseline"),
        (("--image-size", 48), "at its own image size"),
        (("--layer-decay", 0), "layer_decay 0.0 is outside (0, 1]"),
        (("--label-smoothing", 2), "label_smoothing 2.0 is outside [0, 1]"),
        (("--mixup", -1), "mixup -1.0 must be 0 or more"),
        (("--lr", 0), "lr 0.0 must be positive"),
        (("--batch-size", 0), "batch_size 0 must be positive"),
        (("--epochs", -1), "epochs -1.0 must be positive"),
        (("--save-every", "often"), "save_every 'often'"),
    ],
)
def test_mistakes_end_in_one_line(more, message, run_folder, photos_folder, tmp_path):
    code, _ = run(*flags(run_folder, photos_folder, tmp_path, *more))
    assert message in str(code) and str(code).startswith("error: ") and "\n" not in str(code)
    assert not (run_folder / "eval").exists()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train/a": 4, "test/a": 2}, "has no labels"),
        ({"a": 4}, "has no labels"),
        ({"train/a": 4, "train/b": 4, "test/a": 2, "test/c": 2}, "has no training image of 1 classes (c)"),
        ({"": 4}, "has no labels"),
    ],
)
def test_data_that_cannot_be_learnt_from(counts, message, run_folder, photos, tmp_path):
    code, _ = run(*flags(run_folder, photos(counts), tmp_path))
    assert message in str(code) and "\n" not in str(code)


def test_labels_are_drawn_by_class_and_nested():
    labels = torch.arange(3).repeat_interleave(torch.tensor([100, 40, 10]))
    few, more = (draw_labels(labels, budget, CLASSES, seed=1) for budget in ("10%", "50%"))
    assert torch.bincount(labels[few]).tolist() == [10, 4, 1] and torch.isin(few, more).all()
    assert not torch.equal(few, draw_labels(labels, "10%", CLASSES, seed=2))
    assert torch.bincount(labels[draw_labels(labels, "20", CLASSES, seed=0)]).tolist() == [20, 20, 10]
    assert torch.equal(draw_labels(labels, "100%", CLASSES, seed=0), torch.arange(150))


def test_layers_learn_at_falling_rates_and_frozen_ones_not_at_all():
    classifier = Classifier(Encoder(TINY), 3)  # two blocks
    classifier.freeze_below(None)
    groups = adamw(classifier, lr_scale=classifier.lr_scale(0.5)).param_groups
    assert {group["lr_scale"] for group in groups} == {1.0, 0.5, 0.25, 0.125}
    (head,) = (group["params"] for group in groups if group["lr_scale"] == 1 and group["decays"])
    assert head == [classifier.head.weight]
    classifier.freeze_below(1)
    trained = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert all(name.startswith(("encoder.transformer.blocks.1.", "head.")) for name in trained) and len(trained) == 6
    classifier(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in classifier.parameters() if p.requires_grad)


def test_augmentations_keep_the_sum_of_labels_and_erase_each_image_elsewhere():
    images, labels = torch.ones(8, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    plain, targets = Augment(FinetuneConfig(), 3)(images, labels)
    assert torch.equal(plain, images) and torch.equal(targets.argmax(1), labels)
    for fields in ({"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}):
        torch.testing.assert_close(Augment(FinetuneConfig(**fields), 3)(images, labels)[1].sum(1), torch.ones(8))
    erased, _ = Augment(FinetuneConfig(erase=1.0), 3)(images, labels)
    assert len({tuple(image.flatten().tolist()) for image in erased}) > 4
    weights = balanced_weights(torch.tensor([0, 0, 0, 1, 2, 2]), 3)
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 2.0, 1.0]))


@pytest.mark.slow
def test_two_processes_train_what_one_does(run_folder, photos_folder, tmp_path, clean_environment):
    """To rounding; nothing is mixed or erased here."""
    tops, common = [], flags(run_folder, photos_folder, tmp_path, "--epochs", 2, "--minutes", 9)
    for processes in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        command = [*launch, ROOT / "eval" / "finetune.py", *common, "--out", tmp_path / str(processes)]
        done = subprocess.run(list(map(str, command)), env=clean_environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (folder,) = (tmp_path / str(processes)).glob("finetune/*")
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["processes"] == processes
        tops.append(load_file(folder / "encoder.safetensors"))
    for name, tensor in tops[0].items():
        torch.testing.assert_close(tensor, tops[1][name], rtol=1e-3, atol=1e-4)
