"""Semantic segmentation on frozen patch features: linear head, small convolutional head, k-means without labels.

python eval/segment.py runs/demo --data petals
python eval/segment.py runs/demo --data petals --init pixels         # raw colours; --init random: untrained
python eval/segment.py runs/photos --data FOLDER --image-size 128    # FOLDER holds images/ and masks/ of equal names

Masks: indexed or grey PNGs of class numbers, 255 where no class counts; classes.txt may name the classes, one a line.
Also --data pets37 (its trimaps). Features (last block or last four) and learning rate are chosen on val. Results: mean
IoU over the classes and that of each, as JSON, and a picture of some test images with their masks, in RUN/eval.

The feature maps of the training images are kept in memory: 0.8 GB for a thousand images of 224 pixels at width 384. A
smaller --image-size takes less.
"""

import checkout  # noqa: F401 - first

from scott_sparse.evaluation.segment import SegmentConfig, run_segmentation
from scott_sparse.evaluation.subject import run_script

if __name__ == "__main__":
    run_script(SegmentConfig, run_segmentation)
