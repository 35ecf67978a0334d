"""What the neighbours of frozen features say: the first question to ask of an encoder, with nothing to train."""

import torch
import torch.nn.functional as F

from scott_sparse.shapes import Float, Int, Tensor

NEIGHBOURS = 20
TEMPERATURE = 0.07


def knn_accuracy(
    bank: Float[Tensor, "n C"],
    bank_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m C"],
    query_labels: Int[Tensor, " m"],
    *,
    neighbours: int = NEIGHBOURS,
) -> float:
    """Per cent of queries classified right by their nearest neighbours (cosine, weights exp(similarity / 0.07)).

    The weighted vote of arXiv 1805.01978, section 3.4, with k = 20 as in DINO (arXiv 2104.14294).
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    right = 0
    for chunk, labels in zip(queries.split(1024), query_labels.split(1024)):
        similarity, nearest = (chunk @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        votes = torch.zeros(len(chunk), classes).scatter_add_(1, bank_labels[nearest], (similarity / TEMPERATURE).exp())
        right += int((votes.argmax(1) == labels).sum())
    return 100 * right / len(query_labels)
