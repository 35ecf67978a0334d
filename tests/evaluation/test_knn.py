"""k-NN against scikit-learn, whatever the chunks; and a bank of a million in little memory."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from scott_sparse.evaluation import knn
from scott_sparse.evaluation.knn import knn_accuracy, knn_votes, nearest


@pytest.fixture
def sets():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (400,), generator=generator)
    bank = torch.randn(400, 12, generator=generator) + torch.nn.functional.one_hot(labels, 12)
    asked = torch.randint(0, 6, (90,), generator=generator)
    queries = torch.randn(90, 12, generator=generator) + torch.nn.functional.one_hot(asked, 12)
    return bank, labels, queries, asked


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
    bank, labels, queries, asked = sets
    (votes,) = knn_votes(bank, labels, queries, classes=6, ks=(20,))
    assert knn_accuracy(bank, labels, queries, asked) == pytest.approx(100 * (votes.argmax(1) == asked).float().mean())
    few = knn_votes(bank[:3], labels[:3], queries, classes=6, ks=(200,))[0]
    assert torch.equal(few, knn_votes(bank[:3], labels[:3], queries, classes=6, ks=(3,))[0])


def test_mistakes(sets):
    bank, labels, queries, _ = sets
    for arguments, message in (
        ((bank, labels + 1, queries), "labels of the bank lie between 1 to 6, expected 0 to 5"),
        ((bank[:, :5], labels, queries), "400 of width 5, expected features of the queries' width 12"),
        ((bank[:0], labels[:0], queries), "the bank has none"),
        ((bank * torch.inf, labels, queries), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            knn_votes(*arguments, classes=6, ks=(5,))
    with pytest.raises(ValueError, match="k is 0; expected 1 or more"):
        knn_votes(bank, labels, queries, classes=6, ks=(0,))


MILLION = """
import resource, torch
from scott_sparse.evaluation.knn import knn_votes
bank, labels = torch.empty(1_000_000, 256).uniform_(-1, 1), torch.randint(0, 100, (1_000_000,))
knn_votes(bank, labels, bank[:512], classes=100, ks=(1, 200))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_million_features_fit_in_two_gigabytes():
    done = subprocess.run([sys.executable, "-c", MILLION], check=True, capture_output=True, text=True)
    assert 0.95 < int(done.stdout) / 2**20 < 2  # GiB; the features alone are 0.95


def test_nearest_gives_itself_first(sets):
    bank = sets[0]
    ((similarity, index),) = nearest(bank, bank, k=3)
    assert torch.equal(index[:, 0], torch.arange(400)) and (similarity.diff(dim=1) <= 0).all()
