"""What the neighbours of frozen features say: the first question to ask of an encoder, with nothing to train.

The similarities of all queries to the whole bank would be the largest array of an evaluation by far, so both are cut
into chunks: the best k of the bank so far are merged with those of the next chunk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scott_sparse.evaluation.features import Features
from scott_sparse.evaluation.metrics import check_finite, check_labels
from scott_sparse.shapes import Float, Int, Tensor

NEIGHBOURS = 20
SWEEP = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07
QUERY_CHUNK, BANK_CHUNK = 1024, 16384  # 64 MiB of similarities


@dataclass(frozen=True)
class KNNProbe:
    """The votes of each number of neighbours, with the last block's mean tokens as features."""

    bank: Float[Tensor, "n C"]
    labels: Int[Tensor, " n"]
    classes: int
    device: torch.device

    @property
    def settings(self) -> list[dict]:
        """A k beyond the bank cannot be used."""
        return [{"k": k} for k in sorted({min(k, len(self.bank)) for k in SWEEP})]

    def answers(self, features: Features, settings: Sequence[int]) -> Iterator[Float[Tensor, "m K"]]:
        ks = [self.settings[i]["k"] for i in settings]
        yield from knn_votes(self.bank, self.labels, features.mean, classes=self.classes, ks=ks, device=self.device)


def knn_votes(
    bank: Float[Tensor, "n C"],
    labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m _"],
    *,
    classes: int,
    ks: Sequence[int],
    device: torch.device | str = "cpu",
) -> list[Float[Tensor, "m K"]]:
    """Votes for each class, for each k, whose sum over the k nearest weighs exp(cosine / 0.07); -inf for no vote.

    The vote of arXiv 1805.01978, section 3.4; k = 20 in DINO (arXiv 2104.14294). Which of equally similar features is
    the k-th nearest is not defined.

    Raises:
        ValueError: for labels outside [0, classes), another width, an empty bank, k < 1, and features that are not
            finite.
    """
    check_labels(labels, classes, "labels of the bank")
    if min(ks) < 1:
        raise ValueError(f"k is {min(ks)}; expected 1 or more, {NEIGHBOURS} if in doubt.")
    named_by = labels.to(device)
    votes = [torch.empty(len(queries), classes) for _ in ks]
    start = 0
    for similarity, index in nearest(bank, queries, k=min(max(ks), len(bank)), device=device):
        named, weight = named_by[index], (similarity / TEMPERATURE).exp()
        for of_k, k in zip(votes, ks):
            some = torch.zeros(len(index), classes, device=device).scatter_add_(1, named[:, :k], weight[:, :k])
            of_k[start : start + len(index)] = some.masked_fill_(some == 0, -torch.inf).cpu()
        start += len(index)
    return votes


def knn_accuracy(
    bank: Float[Tensor, "n C"],
    bank_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m _"],
    query_labels: Int[Tensor, " m"],
) -> float:
    """Per cent of queries that their 20 neighbours classify right; see `knn_votes`."""
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    (votes,) = knn_votes(bank, bank_labels, queries, classes=classes, ks=(NEIGHBOURS,))
    return 100 * (votes.argmax(1) == query_labels).double().mean().item()


@torch.inference_mode()
def nearest(
    bank: Float[Tensor, "n C"], queries: Float[Tensor, "m _"], *, k: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Float[Tensor, "c k"], Int[Tensor, "c k"]]]:
    """Cosine similarity and bank index of the k nearest, best first: `QUERY_CHUNK` queries (the last: fewer) at a time.

    Besides its arguments it holds one chunk of each and their similarities, whatever the size of either. k is at most
    n. Raises ValueError for another width, an empty bank and features that are not finite.
    """
    if len(bank) == 0 or bank.shape[1] != queries.shape[1]:
        found = f"{len(bank)} of width {bank.shape[1]}" if len(bank) else "none"
        raise ValueError(f"the bank has {found}, expected features of the queries' width {queries.shape[1]}.")
    check_finite(bank)
    check_finite(queries)
    for asked in queries.split(QUERY_CHUNK):
        asked = F.normalize(asked.to(device).float(), dim=1)
        best = torch.empty(len(asked), 0, device=device), torch.empty(len(asked), 0, dtype=torch.int64, device=device)
        for start in range(0, len(bank), BANK_CHUNK):
            # Normalising again for every query chunk is a few per cent of the work; a copy of a million takes 1.5 GB.
            chunk = F.normalize(bank[start : start + BANK_CHUNK].to(device).float(), dim=1)
            similarity, index = (asked @ chunk.T).topk(min(k, len(chunk)), dim=1)
            similarity, index = torch.cat([best[0], similarity], 1), torch.cat([best[1], index + start], 1)
            similarity, order = similarity.topk(min(k, similarity.shape[1]), dim=1)
            best = similarity, index.gather(1, order)
        yield best
