"""Fine-tuning with labels: the encoder of a run and a linear head; epoch and learning rate are chosen on val.

accelerate launch eval/finetune.py runs/demo --data petals --label-budget 10%
accelerate launch eval/finetune.py runs/demo --data petals --label-budget 10% --from-scratch
accelerate launch eval/finetune.py RUN --data PHOTOS --lr 3e-4 1e-3 --blocks 2 --mixup .2 --cutmix 1

A pretrained encoder starts with the head of a linear probe. The result goes to RUN/eval, the classifier to a folder in
RUN/eval/finetune, which the other scripts of eval/ take in place of RUN. The same command resumes a run that was
interrupted (exit code 75), to the same weights bit for bit.
"""

import checkout  # noqa: F401 - first

from scott_sparse.evaluation.finetune import FinetuneConfig
from scott_sparse.evaluation.subject import run_script
from scott_sparse.training.finetune import run_finetune

if __name__ == "__main__":
    run_script(FinetuneConfig, run_finetune)
