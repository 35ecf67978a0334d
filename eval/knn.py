"""k-NN on frozen features: k in 1 5 10 20 50 100 200, chosen on val.

accelerate launch eval/knn.py runs/demo --data petals
python eval/knn.py runs/demo --data petals --init pixels
"""

from scott_sparse.evaluation.knn import KNNProbe
from scott_sparse.evaluation.probe import Question, answer, ask


def main(question: Question) -> None:
    answer(question, "knn", lambda features, labels, **where: KNNProbe(features.mean, labels, **where))


if __name__ == "__main__":
    ask(Question, main)
