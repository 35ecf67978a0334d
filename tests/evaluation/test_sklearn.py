"""ScottFeatures is what scikit-learn expects of a transformer, and gives the features of the probes."""

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, write_photo
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.utils import estimator_checks as checks

from scott_sparse import Encoder, save_encoder
from scott_sparse.data.dataset import DataConfig, open_data, short_side_for
from scott_sparse.evaluation.encoders import FrozenEncoder
from scott_sparse.evaluation.features import extract
from scott_sparse.evaluation.sklearn import ScottFeatures
from scott_sparse.model.preprocess import Preprocess


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(0)
    save_encoder(Encoder(TINY), folder, preprocess=Preprocess((32, 32)))
    return folder


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Twelve photos of two colours."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    for i in range(12):
        write_photo(folder / "ab"[i % 2] / f"{i}.png", 40 + i, 60, seed=i, channel=i % 2)
    return sorted(folder.rglob("*.png"))


LABELS = [0] * 6 + [1] * 6


@pytest.mark.parametrize("crops, channels", [(1, 3), (8, 3), (1, 1)])
def test_they_are_the_features_of_the_probes(run, paths, crops, channels, tmp_path):
    if channels == 1:
        run = tmp_path / "grey"
        save_encoder(
            Encoder(dataclasses.replace(TINY, in_channels=1)), run, preprocess=Preprocess((32, 32), (0.5,), (0.2,))
        )
    source = DataConfig(data=str(paths[0].parents[1]), protocol="paper", cache_dir=tmp_path, channels=channels)
    images = open_data(source, short_side=short_side_for((32, 32))).pretrain
    scott = ScottFeatures(run, crops=crops, batch_size=5).fit(paths)
    expected = extract(FrozenEncoder(scott.encoder_), images, size=(32, 32), crops=crops).mean
    order = [str(name).split("/")[-1] for name in images.names]
    features = scott.transform(sorted(paths, key=lambda path: order.index(path.name)))
    assert features.shape == (12, 32) and features.dtype == np.float32
    if crops == 1:
        torch.testing.assert_close(torch.from_numpy(features), expected, atol=2e-3, rtol=0)
    else:  # resized before the values are rounded to 8 bits here, after it there
        assert (torch.from_numpy(features) - expected).norm() < 0.05 * expected.norm()


def test_a_pipeline_on_paths_is_fitted_searched_and_pickled(run, paths):
    pipeline = Pipeline([("ssl", ScottFeatures(str(run))), ("clf", LogisticRegression())])
    search = GridSearchCV(pipeline, {"clf__C": [1.0, 10.0], "ssl__crops": [1]}, cv=2)
    names = list(map(str, paths))
    search.fit(names, LABELS)
    again = pickle.loads(pickle.dumps(search))
    assert (again.predict(names) == LABELS).all()
    assert list(pipeline[:1].fit(names).get_feature_names_out())[:2] == ["scottfeatures0", "scottfeatures1"]
    assert clone(pipeline).get_params()["ssl__run"] == str(run)


def test_the_forms_of_a_picture(run, paths, tmp_path):
    turned = Image.open(paths[0]).convert("RGB")
    turned.getexif()[0x0112] = 3  # upside down
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    upright = np.asarray(turned)[::-1, ::-1].copy()
    opened = Image.open(tmp_path / "turned.png")  # not loaded
    pictures = [tmp_path / "turned.png", str(tmp_path / "turned.png"), opened, upright, Image.fromarray(upright)]
    features = ScottFeatures(run).fit_transform(pictures)
    assert all(np.array_equal(row, features[0]) for row in features)
    assert opened.size == turned.size and ScottFeatures(run).fit([]).transform([]).shape == (0, 32)
    grey = np.zeros((40, 40), np.uint8)
    transparent = np.dstack([upright[..., :3], np.full(upright.shape[:2], 255, np.uint8)])
    assert ScottFeatures(run).fit_transform([grey, transparent]).shape == (2, 32)


WRONG = {
    "a path alone": ("photo.png", r"expected a list of pictures"),
    "no file": (["none.png"], r"X\[0\], none.png cannot be read: No such file"),
    "floats": ([np.zeros((8, 8, 3))], r"X\[0\] is an array of float64 of shape \(8, 8, 3\), expected uint8"),
    "channels first": ([np.zeros((3, 8, 8), np.uint8)], r"expected uint8 of \(h, w\)"),
    "a number": ([7], r"X\[0\] is int, expected a path"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_picture(case, run):
    pictures, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        ScottFeatures(run).fit(pictures).transform(pictures)


def test_runs_that_do_not_serve(run, tmp_path):
    with pytest.raises(NotFittedError):
        ScottFeatures(run).transform([])
    with pytest.raises(ValueError, match="no encoder in"):
        ScottFeatures(tmp_path).fit([])
    save_encoder(Encoder(TINY), tmp_path)
    with pytest.raises(ValueError, match="does not say what images it wants"):
        ScottFeatures(tmp_path).fit([])


# scikit-learn's own checks, but for those that give tables of numbers to `transform`.
CHECKS = (
    "estimator_cloneable estimator_tags_renamed valid_tag_types estimator_repr no_attributes_set_in_init mixin_order "
    "estimators_overwrite_params dont_overwrite_parameters estimators_fit_returns_self readonly_memmap_input "
    "n_features_in_after_fitting positive_only_tag_during_fit get_params_invariance set_params fit_check_is_fitted"
)


@pytest.mark.parametrize("name", CHECKS.split())
def test_checks_of_scikit_learn(name, run):
    getattr(checks, f"check_{name}")("ScottFeatures", ScottFeatures(run))


def test_the_package_does_not_import_it():
    code = "import scott_sparse, scott_sparse.model, sys; assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
