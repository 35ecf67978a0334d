"""How much do more images help? Pretrains on 1/8, 1/4, 1/2 and all of the images under one budget, and probes each.

python eval/learning_curve.py --data PHOTOS --out runs/curve
python eval/learning_curve.py demo --data petals

Writes learning_curve.json and learning_curve.png (gain over the untrained encoder and over supervised training from
scratch) and prints the answer in a sentence. What is finished is not run again; the same command resumes the rest.
"""

from pathlib import Path

import checkout  # noqa: F401 - first

from scott_sparse.evaluation.subject import run_script
from scott_sparse.training.learning_curve import CurveConfig, run_curve


def main(config: CurveConfig) -> None:
    run_curve(config, Path(__file__).resolve().parent.parent)


if __name__ == "__main__":
    run_script(CurveConfig, main)
