"""A scikit-learn classifier on the features of a pretrained encoder, for a folder with one subfolder for each class.

python examples/classify_folder.py runs/photos PHOTOS
"""

import sys
from pathlib import Path

from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scott_sparse.evaluation.sklearn import ScottFeatures


def main(run: str, folder: str) -> None:
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    labels = [path.parent.name for path in paths]
    split = train_test_split(paths, labels, test_size=0.25, random_state=0, stratify=labels)
    train_paths, test_paths, train_labels, test_labels = split
    classifier = make_pipeline(ScottFeatures(run), StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(train_paths, train_labels)
    accuracy = classifier.score(test_paths, test_labels)
    print(f"{len(train_paths)} images to fit on; {100 * accuracy:.1f} % of {len(test_paths)} others are right")


if __name__ == "__main__":
    main(*sys.argv[1:])
