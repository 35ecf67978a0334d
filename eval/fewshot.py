"""Few-shot probe: logistic regression on 1, 5 and 10 labels per class, for five draws of them; nothing is chosen.

accelerate launch eval/fewshot.py runs/demo --data petals
"""

import checkout  # noqa: F401 - first

from scott_sparse.evaluation.fewshot import run_few_shot
from scott_sparse.evaluation.subject import ProbeConfig, run_script

if __name__ == "__main__":
    run_script(ProbeConfig, run_few_shot)
