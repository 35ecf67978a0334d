"""Which images to label next: those that cover all others best (greedy k-centre over the pooled features).

python eval/label_next.py runs/photos --data PHOTOS --count 50
python eval/label_next.py runs/photos --data PHOTOS --labels some.csv --keep-labelled    # beyond those of the table

Writes RUN/eval/label-next-DATA.csv, the most telling image first, and a contact sheet beside it. Of --data the images
that pretraining may see are chosen from, so that test stays out. It pays for the first few dozens of labels; where
there are hundreds, random images are as good (benchmarks/RESULTS.md).
"""

import checkout  # noqa: F401 - first

from scott_sparse.evaluation.label_next import LabelNextConfig, choose_next
from scott_sparse.evaluation.subject import run_script

if __name__ == "__main__":
    run_script(LabelNextConfig, choose_next)
