"""k-NN on frozen features: a classifier without training, the first measure of an encoder.

The similarities of all queries to the whole bank would be the largest array of an evaluation by far, so both are split
into chunks, and the best k of the bank so far are merged with those of the next chunk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scott_sparse.evaluation.features import Features
from scott_sparse.evaluation.metrics import check_finite, check_labels
from scott_sparse.shapes import Float, Int, Tensor

DEFAULT_K = 20
SWEEP = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07
QUERY_CHUNK, BANK_CHUNK = 1024, 16384  # 64 MiB of similarities


@dataclass(frozen=True)
class KNNProbe:
    """Votes of the k nearest training images for each k of `SWEEP`, on the pooled features of the last block."""

    bank: Float[Tensor, "n C"]
    labels: Int[Tensor, " n"]
    classes: int
    device: torch.device

    @property
    def settings(self) -> list[dict]:
        """A k beyond the bank becomes the bank's size."""
        return [{"k": k} for k in sorted({min(k, len(self.bank)) for k in SWEEP})]

    def logits(self, features: Features, settings: Sequence[int]) -> Iterator[Float[Tensor, "m K"]]:
        ks = [self.settings[i]["k"] for i in settings]
        yield from knn_votes(self.bank, self.labels, features.mean, classes=self.classes, ks=ks, device=self.device)


def fit_knn(features: Features, labels: Int[Tensor, " n"], *, classes: int, device: torch.device) -> KNNProbe:
    return KNNProbe(features.mean, labels, classes, device)


def knn_votes(
    bank: Float[Tensor, "n C"],
    labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m _"],
    *,
    classes: int,
    ks: Sequence[int],
    device: torch.device | str = "cpu",
) -> list[Float[Tensor, "m K"]]:
    """For each k, the sum of exp(cosine / 0.07) over those of the k nearest in each class; -inf for a class of none.

    The weighted vote of arXiv 1805.01978, section 3.4; DINO (arXiv 2104.14294) uses it with k = 20. Which of equally
    similar features is the k-th nearest is not defined.

    Raises ValueError for labels outside [0, classes), k < 1, and as `nearest`.
    """
    check_labels(labels, classes, "labels of the bank")
    if min(ks) < 1:
        raise ValueError(f"k is {min(ks)}; expected 1 or more, {DEFAULT_K} if in doubt.")
    labels = labels.to(device)
    votes = [torch.empty(len(queries), classes) for _ in ks]
    start = 0
    for similarity, index in nearest(bank, queries, k=min(max(ks), len(bank)), device=device):
        neighbours, weight = labels[index], (similarity / TEMPERATURE).exp()
        for votes_of_k, k in zip(votes, ks):
            sums = torch.zeros(len(index), classes, device=device)
            sums.scatter_add_(1, neighbours[:, :k], weight[:, :k])
            votes_of_k[start : start + len(index)] = sums.masked_fill_(sums == 0, -torch.inf).cpu()
        start += len(index)
    return votes


def knn_accuracy(
    bank: Float[Tensor, "n C"],
    bank_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m _"],
    query_labels: Int[Tensor, " m"],
) -> float:
    """Per cent of the queries that their 20 nearest neighbours classify correctly; see `knn_votes`."""
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    (votes,) = knn_votes(bank, bank_labels, queries, classes=classes, ks=(DEFAULT_K,))
    return 100 * (votes.argmax(1) == query_labels).double().mean().item()


@torch.inference_mode()
def nearest(
    bank: Float[Tensor, "n C"], queries: Float[Tensor, "m _"], *, k: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Float[Tensor, "c k"], Int[Tensor, "c k"]]]:
    """Cosine similarity and bank index of the k <= n nearest, best first, for `QUERY_CHUNK` queries at a time.

    Besides its arguments it holds one chunk of each and their similarities, for any n and m. Raises ValueError for
    another width, an empty bank and features that are not finite.
    """
    if len(bank) == 0 or bank.shape[1] != queries.shape[1]:
        contents = f"{len(bank)} features of width {bank.shape[1]}" if len(bank) else "no features"
        raise ValueError(f"the bank has {contents}, expected features of the queries' width {queries.shape[1]}.")
    check_finite(bank)
    check_finite(queries)
    for query in queries.split(QUERY_CHUNK):
        query = F.normalize(query.to(device).float(), dim=1)
        best = torch.empty(len(query), 0, device=device), torch.empty(len(query), 0, dtype=torch.int64, device=device)
        for start in range(0, len(bank), BANK_CHUNK):
            # Normalising again for every query chunk is a few per cent of the work; a copy of a million takes 1.5 GB.
            chunk = F.normalize(bank[start : start + BANK_CHUNK].to(device).float(), dim=1)
            similarity, index = (query @ chunk.T).topk(min(k, len(chunk)), dim=1)
            similarity, index = torch.cat([best[0], similarity], 1), torch.cat([best[1], index + start], 1)
            similarity, order = similarity.topk(min(k, similarity.shape[1]), dim=1)
            best = similarity, index.gather(1, order)
        yield best
