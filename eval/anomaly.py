"""Which images are defective, and where: an encoder that has seen good images makes a map of each test image.

python eval/anomaly.py runs/parts --data PARTS                       # train/good, test/good, test/DEFECT, ground_truth
python eval/anomaly.py runs/parts --good PHOTOS/good --test PHOTOS/new
python eval/anomaly.py runs/demo --data petals                       # drawn scratches, spots and missing petals

Two scores: the distance of patch features to those of good images (PatchCore), and the error of the run's predictor
where a patch is hidden. The threshold comes from good images alone. Also --data elpv, or any data set with labels of
which one is called good. Results in RUN/eval: JSON with the score of each image, a picture of some, a map of each.
"""

import checkout  # noqa: F401 - first

from scott_sparse.evaluation.anomaly import AnomalyConfig, run_anomaly
from scott_sparse.evaluation.subject import run_script

if __name__ == "__main__":
    run_script(AnomalyConfig, run_anomaly)
