"""k-NN on frozen features: k in 1 5 10 20 50 100 200, chosen on val.

accelerate launch eval/knn.py runs/demo --data petals
python eval/knn.py runs/demo --data petals --init pixels
"""

import checkout  # noqa: F401 - first

from scott_sparse.evaluation.knn import fit_knn
from scott_sparse.evaluation.probe import run_probe
from scott_sparse.evaluation.subject import LabelBudgetConfig, run_script


def main(config: LabelBudgetConfig) -> None:
    run_probe(config, "knn", fit_knn)


if __name__ == "__main__":
    run_script(LabelBudgetConfig, main)
