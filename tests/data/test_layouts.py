"""Folders as people keep them: what each becomes, as the line with which a run starts says it."""

import json
from pathlib import Path
from types import MappingProxyType

import pytest
from conftest import write_photo

from scott_sparse.data.dataset import DataConfig, open_data

# Files; how many images to pretrain, train, validate and test on; first and last part of the start line.
# `a=20`: twenty images in a; `a/*.cr2=20`: twenty files of that name; `a/`: an empty folder.
LAYOUTS = [
    # train, valid, test
    ("train/a=20 train/b=20 valid/a=8 valid/b=8 test/a=8 test/b=8", "56 40 16 16", "72 images, 2 classes (a, b)"),
    # any case, other names
    (
        "Training/a=20 Training/b=20 VALIDATION/a=8 VALIDATION/b=8 Testing/a=8 Testing/b=8",
        "56 40 16 16",
        "72 images, 2 classes (a, b)",
    ),
    # dev
    ("TRAIN/a=20 TRAIN/b=20 Dev/a=8 Dev/b=8 test/a=8 test/b=8", "56 40 16 16", "72 images, 2 classes (a, b)"),
    # two folders of a split
    ("train/a=20 Training/b=20 val/a=8 val/b=8 test/a=8 test/b=8", "56 40 16 16", "72 images, 2 classes (a, b)"),
    # a lone val is the test
    ("train/a=20 train/b=20 val/a=8 val/b=8", "40 36 4 16", "56 images, 2 classes (a, b)"),
    # plain splits
    ("Train=30 Test=10", "30 30 0 10", "40 images, no labels, because no image lies in a class folder"),
    # plain splits with val
    ("train=30 val=5 test=10", "35 30 5 10", "45 images, no labels, because no image lies in a class folder"),
    # train alone
    ("train/a=20 train/b=20", "34 31 3 6", "40 images, 2 classes (a, b)"),
    # train alone, no classes
    ("train=20", "20 20 0 0", "20 images, no labels, because no image lies in a class folder"),
    # unlabelled beside splits
    (
        "train/a=20 train/b=20 unlabeled=50 test/a=8 test/b=8",
        "90 36 4 16",
        "106 images, 2 classes (a, b)",
        "images without a label, in no probe: 50 (unlabeled/0.png, unlabeled/1.png, unlabeled/10.png, ...)",
    ),
    # a class called train
    (
        "bus=20 car=20 train=20",
        "51 45 6 9",
        "60 images, 3 classes (bus, car, train)",
        "taken as class, not as split, as bus stands beside: train",
    ),
    # classes called train and test
    (
        "bus=20 train=20 test=20",
        "46 40 6 14",
        "60 images, 3 classes (bus, test, train)",
        "taken as class, not as split, as bus stands beside: test, train",
    ),
    # splits beside another folder
    (
        "train/a=20 train/b=20 test/a=8 test/b=8 extra=12 masks/*.npy=3",
        "40 36 4 16",
        "56 images, 2 classes (a, b)",
        "3 files passed over (3 .npy), folders not used: masks, extra (12 images)",
    ),
    # class folders
    ("a=20 b=20", "35 31 4 5", "40 images, 2 classes (a, b)"),
    # deep class folders
    ("a/2023/may=10 a/2024=10 b/x/y/z=20", "35 33 2 5", "40 images, 2 classes (a, b)"),
    # mixed depths
    ("train/a=10 train/a/more=10 train/b/2024=20 test/a=8 test/b/x=8", "40 36 4 16", "56 images, 2 classes (a, b)"),
    # a stray image
    (
        "a=20 b=20 cover.png",
        "36 31 4 5",
        "41 images, 2 classes (a, b)",
        "images without a label, in no probe: 1 (cover.png)",
    ),
    # stray images beside and in splits
    (
        "cover.png train/cover.png train/a=20 train/b=20 test/a=8 test/b=8 test/x.png",
        "42 36 4 16",
        "59 images, 2 classes (a, b)",
        "test images without a label, not used: 1 (test/x.png); "
        "images without a label, in no probe: 2 (train/cover.png, cover.png)",
    ),
    # thumbnails
    (
        "a=20 b=20 a/@eaDir=20 @eaDir=5 .thumbs=9 __MACOSX/a/*.png=20",
        "35 31 4 5",
        "40 images, 2 classes (a, b)",
        "folders not used: .thumbs, @eaDir, __MACOSX, a/@eaDir",
    ),
    # labelled train, flat test
    (
        "train/a=20 train/b=20 test=16",
        "34 31 3 6",
        "56 images, 2 classes (a, b)",
        "test images without a label, not used: 16 (test/0.png, test/1.png, test/10.png, ...)",
    ),
    # labelled train, flat val and test
    (
        "train/a=20 train/b=20 val=10 test=16",
        "44 31 3 6",
        "66 images, 2 classes (a, b)",
        "test images without a label, not used: 16 (test/0.png, test/1.png, test/10.png, ...); "
        "images without a label, in no probe: 10 (val/0.png, val/1.png, val/2.png, ...)",
    ),
    # flat train, labelled test
    ("train=20 test/a=8 test/b=8", "20 20 0 16", "36 images, no labels, because no training image has one"),
    # flat
    ("*.jpg=9", "9 9 0 0", "9 images, no labels, because no image lies in a class folder"),
    # one class
    ("only=9", "9 9 0 0", "9 images, no labels, because all training images are of one class, only"),
    # one folder around splits
    (
        "archive/train/a=9 archive/test/a=9",
        "18 18 0 0",
        "18 images, no labels, because all training images are of one class, archive",
    ),
    # one image in a class
    ("a=20 b=20 c=1", "36 32 4 5", "41 images, 3 classes (a, b, c)"),
    # other files
    (
        "a=20 b=20 a/*.cr2=20 b/scan*=10 notes.txt labels.txt a/.hidden.png .DS_Store Thumbs.db",
        "35 31 4 5",
        "40 images, 2 classes (a, b)",
        "34 files passed over (20 .cr2, 10 without extension, 2 .txt, 1 .db, 1 hidden)",
    ),
    # a class of other files
    (
        "a=20 b=20 c/*.cr2=20",
        "35 31 4 5",
        "40 images, 2 classes (a, b)",
        "20 files passed over (20 .cr2), folders not used: c",
    ),
    # annotations
    (
        "a=20 b=20 annotations/*.xml=40",
        "35 31 4 5",
        "40 images, 2 classes (a, b)",
        "40 files passed over (40 .xml), folders not used: annotations",
    ),
    # classes with numbers and other scripts
    ("0=20 花=20 ζώα=20", "54 48 6 6", "60 images, 3 classes (0, ζώα, 花)"),
]


def make(root, spec, texts=MappingProxyType({})):
    for token in spec.split():
        name, _, count = token.partition("=")
        for i in range(int(count or 1)):
            path = root / (name.replace("*", str(i)) if "*" in name or not count else f"{name}/{i}.png")
            if name.endswith("/"):
                path.mkdir(parents=True)
            elif path.suffix in (".png", ".jpg"):
                write_photo(path, 4, 4, seed=i)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    for name, text in texts.items():
        (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return root


def opened(root, **flags):
    return open_data(DataConfig(str(root), cache_dir=root.parent / "kept", **flags), short_side=8)


def counts(data):
    return " ".join(str(len(part or ())) for part in (data.pretrain, data.train, data.val, data.test))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_layouts(layout, tmp_path):
    files, roles, first, *last = layout
    data = opened(make(tmp_path / "x", files))
    pretrain, train, val, test = roles.split()
    start = f"{first}, pretrain {pretrain}, train {train}, val {val}, test {test}"
    assert data.describe() in ([f"{start}, {last[0]}", f"{start}; {last[0]}"] if last else [start])
    assert counts(data) == roles and json.dumps(data.about)


MISTAKES = [
    ("train/ test=3", r"no image in .*train; expected"),
    ("train=3 Val/*.cr2=9", r"no image in .*Val but 9 \.cr2; expected files ending in \.apng"),
    ("val/a=3 test/a=3", r"holds test, val but no train; rename one"),
    ("a=3 b=3 c/", "class folder .*c holds no image"),
    ("train/a=3 train/b=3 train/c/ test/a=1", "class folder .*c holds no image"),
    ("*.cr2=20", r"no image in .* but 20 \.cr2"),
]


@pytest.mark.parametrize(("files", "message"), MISTAKES)
def test_folders_that_cannot_be_used(files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        opened(make(tmp_path / "x", files))


def test_unlabelled_test_images_are_pretrained_on_under_paper_only(tmp_path):
    root = make(tmp_path / "x", "train/a=20 train/b=20 test=16")
    clean, paper = opened(root), opened(root, protocol="paper")
    assert not any(name.startswith("test/") for name in clean.pretrain.names)
    assert counts(paper) == "56 34 6 6" and "in no probe: 16 (test/0.png, " in paper.describe()
    for data in (clean, paper):
        assert len(data.unlabelled_test) == 16 and data.about["images"]["unlabelled_test"] == 16
        assert all((part.labels >= 0).all() for part in (data.train, data.val, data.test))


# Thirty images, of which ten are train, val and test, in two classes in turn.
ROWS = [(f"pics/{i}.png", "ab"[i % 2], ("Train", "valid", "TEST")[i // 10]) for i in range(30)]
CSV = "file_name,label,split\n" + "".join(",".join(row) + "\n" for row in ROWS)
JSONL = "".join(json.dumps(dict(zip(("file_name", "label", "split"), row))) + "\n" for row in ROWS)
T = {"labels": "t.csv"}
TABLES = {  # name of the table, its text, flags
    "comma": ("t.csv", CSV, T),
    "tab": ("t.tsv", CSV.replace(",", "\t"), {"labels": "t.tsv"}),
    "semicolon": ("t.csv", CSV.replace(",", ";"), T),
    "quotes": ("t.csv", CSV.replace("pics/1.png", '"pics/1.png"').replace("label", '"label"'), T),
    "of a spreadsheet": ("t.csv", "\ufeff" + CSV.replace("\n", "\r\n") + "\r\n", T),
    "JSON lines": ("t.jsonl", JSONL, {"labels": "t.jsonl"}),
    "found by name": ("metadata.csv", CSV, {}),
    "found by name beside the images": ("pics/metadata.jsonl", JSONL.replace("pics/", ""), {}),
    "usual names in any case": ("t.csv", CSV.replace("file_name,label,split", "Image,Class,Split"), T),
    "columns by flag": (
        "t.csv",
        CSV.replace("file_name,label,split", "id,kind,part"),
        T | {"image_column": "id", "label_column": "kind", "split_column": "part"},
    ),
    "separators of Windows": ("t.csv", CSV.replace("pics/", ".\\pics\\"), T),
    "no folders": ("t.csv", CSV.replace("pics/", ""), T),
    "no extensions": ("t.csv", CSV.replace(".png", ""), T),
    "neither": ("t.csv", CSV.replace("pics/", "").replace(".png", ""), T),
    "repeated rows": ("t.csv", CSV + CSV.partition("\n")[2], T),
}


@pytest.mark.parametrize("table", TABLES)
def test_labels_and_splits_from_a_table(table, tmp_path):
    name, text, flags = TABLES[table]
    root = make(tmp_path / "x", "pics=30", {name: text})
    flags = flags | {"labels": root / flags["labels"]} if flags else flags
    data = opened(root, **flags)
    assert counts(data) == "20 10 10 10" and data.classes == ("a", "b")
    for part, split in ((data.train, "Train"), (data.val, "valid"), (data.test, "TEST")):
        expected = {name: label for name, label, of in ROWS if of == split}
        assert {name: data.classes[label] for name, label in zip(part.names, part.labels.tolist())} == expected
    line = data.describe()
    assert f"; labels from {root.joinpath(name).name} (columns " in line and "passed over" not in line


def test_images_without_a_row_or_a_label_pretrain_only(tmp_path):
    """Of 26 images two have no row, and one each of the ways to write that a label is not known."""
    rows = [f"{i}.png,{i % 2 + 9}\n" for i in range(20)] + ["20.png,\n", "21.png,-1\n", "22.png,nan\n", "23.png\n"]
    root = make(tmp_path / "x", "*.png=26 0.cr2", {"l.csv": "image,label\n" + "".join(rows) + "0.cr2,9\n"})
    data = opened(root, labels=root / "l.csv")
    assert data.classes == ("9", "10")  # in the order of numbers
    known = {*data.train.names, *data.val.names, *data.test.names}
    assert known == {f"{i}.png" for i in range(20)}
    assert {f"{i}.png" for i in range(20, 26)} < set(data.pretrain.names)
    line = data.describe()
    assert "labels from l.csv (columns image, label, 1 rows name files that are not used)" in line
    assert "images without a label, in no probe: 6 (20.png, 21.png, 22.png, ...)" in line


def test_a_table_of_labels_for_splits_that_are_folders(tmp_path):
    def table(count):
        return "file_name,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(count))

    texts = {"train/metadata.csv": table(20), "test/metadata.csv": table(6), "val/metadata.csv": table(4)}
    data = opened(make(tmp_path / "x", "train=20 val=4 test=6", texts))
    assert counts(data) == "24 20 4 6" and data.classes == ("a", "b")
    assert data.test.labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_captions_do_not_replace_the_labels_of_folders(tmp_path):
    data = opened(make(tmp_path / "x", "a=20 b=20", {"metadata.csv": "file_name,text\na/1.png,a cat\n"}))
    assert (
        data.classes == ("a", "b")
        and "metadata.csv not used, as none of its columns is called label" in data.describe()
    )


BAD_TABLES = [  # text of the table, flags, message
    ("image,kind\n0.png,a\n", {}, r"l\.csv has the columns image, kind; name one with --label-column"),
    ("id,label\n0.png,a\n", {}, r"l\.csv has the columns id, label; name one with --image-column"),
    ("image,label\n0.png,a\n", {"label_column": "x"}, r"no column x \(--label-column\); it has image, label"),
    ("image,label\n0.png,a\n", {"split_column": "x"}, r"no column x \(--split-column\); it has image, label"),
    ("", {}, r"l\.csv has the columns ; name one"),
    ("image,label\n0.png,a\n7.png,b\n8.png,b\n", {}, r"2 of 3 images in .*l\.csv do not exist in .*: 7\.png, 8\.png"),
    ("image,label\n,a\n", {}, r"1 of 1 images in .*l\.csv do not exist"),
    ("image,label\n2.png,a\n", {}, r"1 names in .*l\.csv are those of several images: 2\.png; give their paths"),
    ("image,label\n0.png,a\n0.png,b\n", {}, r"rows that contradict each other, for 0\.png"),
    ("image,label\n0.png,a,b\n", {}, r"cannot be read as a table in UTF-8: line 2 has 3 fields, the header 2"),
    ('image,label\n"0.png,a\n', {}, r"cannot be read as a table in UTF-8: "),
    ("image,label\n0.png,é\n".encode("latin-1"), {}, r"cannot be read as a table in UTF-8: 'utf-8' codec"),
    ("image,label,split\n0.png,a,fold1\n", {}, r"'fold1' is not the name of a split; expected one of train, training"),
    ("image,label,split\n0.png,a,test\n", {}, r"has no image in the split train"),
]


@pytest.mark.parametrize(("text", "flags", "message"), BAD_TABLES)
def test_tables_that_do_not_fit(text, flags, message, tmp_path):
    root = make(tmp_path / "x", "0.png 1.png c/2.png d/2.png", {"l.csv": text})
    with pytest.raises(ValueError, match=message):
        opened(root, labels=root / "l.csv", **flags)


BAD_FLAGS = [
    ({"labels": Path("gone.csv")}, r"--labels gone\.csv: no such file"),
    ({"list": Path("gone.txt")}, r"--list gone\.txt: no such file"),
    ({"label_column": "x"}, r"no table; give --labels FILE, or put metadata\.csv in"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS)
def test_flags_that_do_not_fit(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        opened(make(tmp_path / "x", "a=3 b=3"), **flags)
    with pytest.raises(ValueError, match="describe the images of a folder; --data flowers102 is none"):
        open_data(DataConfig("flowers102", **flags), short_side=8)


@pytest.mark.parametrize("relative", [True, False])
def test_a_list_of_images(relative, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = make(tmp_path / "x", "train/a=20 train/b=20 val/a=4 val/b=4 test/a=4 test/b=4 more=9")
    elsewhere = make(tmp_path / "y", "e.png")
    names = [f"{split}/{name}/{i}.png" for split in ("train", "val", "test") for name in "ab" for i in range(3)]
    lines = [*names[::-1], "", f"./{names[0]}", str(root / names[1]), str(elsewhere / "e.png")]
    (tmp_path / "list.txt").write_text("\r\n".join(lines))
    data = opened(Path("x") if relative else root, list=tmp_path / "list.txt")
    assert counts(data) == "13 6 6 6" and data.classes == ("a", "b")
    assert "images without a label, in no probe: 1 (../y/e.png)" in data.describe()
    (tmp_path / "list.txt").write_text("train/a/0.png\ntrain/c/0.png\n")
    with pytest.raises(ValueError, match=r"1 of 2 files listed in .*list\.txt do not exist: .*x/train/c/0\.png"):
        opened(root, list=tmp_path / "list.txt")
