"""k-NN against scikit-learn, for any chunks, and its memory."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scott_sparse.evaluation import knn
from scott_sparse.evaluation.knn import knn_accuracy, knn_votes, nearest


@pytest.fixture
def sets():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (400,), generator=generator)
    bank = torch.randn(400, 12, generator=generator) + torch.nn.functional.one_hot(labels, 12)
    query_labels = torch.randint(0, 6, (90,), generator=generator)
    queries = torch.randn(90, 12, generator=generator) + torch.nn.functional.one_hot(query_labels, 12)
    return bank, labels, queries, query_labels


@pytest.mark.parametrize("chunks", [(1024, 16384), (7, 50)])
def test_votes_equal_scikit_learns(sets, chunks, monkeypatch):
    monkeypatch.setattr(knn, "QUERY_CHUNK", chunks[0])
    monkeypatch.setattr(knn, "BANK_CHUNK", chunks[1])
    bank, labels, queries, _ = sets
    ks = (1, 5, 20, 100)
    for k, votes in zip(ks, knn_votes(bank, labels, queries, classes=6, ks=ks)):
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        shares = theirs.fit(bank.numpy(), labels.numpy()).predict_proba(queries.numpy())
        ours = votes.clamp(min=0)
        torch.testing.assert_close(
            ours / ours.sum(1, keepdim=True), torch.from_numpy(shares).float(), atol=1e-5, rtol=0
        )
        assert torch.equal(votes == -torch.inf, torch.from_numpy(shares) == 0)


def test_accuracy_and_a_small_bank(sets):
    bank, labels, queries, query_labels = sets
    (votes,) = knn_votes(bank, labels, queries, classes=6, ks=(20,))
    expected = 100 * (votes.argmax(1) == query_labels).float().mean()
    assert knn_accuracy(bank, labels, queries, query_labels) == pytest.approx(expected)
    few = knn_votes(bank[:3], labels[:3], queries, classes=6, ks=(200,))[0]
    assert torch.equal(few, knn_votes(bank[:3], labels[:3], queries, classes=6, ks=(3,))[0])


def test_mistakes(sets):
    bank, labels, queries, _ = sets
    for arguments, message in (
        ((bank, labels + 1, queries), "labels of the bank lie between 1 to 6, expected 0 to 5"),
        ((bank[:, :5], labels, queries), "400 features of width 5, expected features of the queries' width 12"),
        ((bank[:0], labels[:0], queries), "the bank has no features"),
        ((bank * torch.inf, labels, queries), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            knn_votes(*arguments, classes=6, ks=(5,))
    with pytest.raises(ValueError, match="k is 0; expected 1 or more"):
        knn_votes(bank, labels, queries, classes=6, ks=(0,))


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, operation, types, arguments=(), kwargs=None):
        output = operation(*arguments, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(output) if isinstance(x, torch.Tensor))])
        return output


def test_memory_does_not_grow_with_the_bank(monkeypatch):
    """Not with the similarities of all queries to all of the bank, nor with a copy of it."""
    monkeypatch.setattr(knn, "QUERY_CHUNK", 100)
    monkeypatch.setattr(knn, "BANK_CHUNK", 2000)
    bank, labels = torch.rand(100_000, 16), torch.arange(100_000) % 10
    with LargestTensor() as largest:
        knn_votes(bank, labels, bank[:1000], classes=10, ks=(1, 200))
    assert largest.numel <= max(100 * 2000, 16384 * 16)  # a chunk's similarities; a chunk of the check for NaN


def test_nearest_gives_itself_first(sets):
    bank = sets[0]
    ((similarity, index),) = nearest(bank, bank, k=3)
    assert torch.equal(index[:, 0], torch.arange(400)) and (similarity.diff(dim=1) <= 0).all()
