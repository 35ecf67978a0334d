"""Linear probes on frozen features: multinomial logistic regression, every setting of the sweep at once.

Features are standardised with the mean and deviation of the fitting set, so that one range of penalties and learning
rates serves every encoder. Two ways to fit: L-BFGS to the optimum for each L2 penalty, and SGD for each learning rate,
all of them in one pass over the data (as in DINOv2, arXiv 2304.07193, appendix B.3).
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from scott_sparse.evaluation.features import Features
from scott_sparse.evaluation.metrics import check_fitting_set
from scott_sparse.randomness import generator_at
from scott_sparse.shapes import Float, Int, Tensor

PENALTIES = tuple(10 ** (power / 2) for power in range(2, -13, -1))  # 10 to 1e-6: 15 of them
RATES = tuple(1e-3 * 2**power for power in range(13))  # 1e-3 to 4
KINDS = ("mean", "last-4")


@dataclass(frozen=True)
class LinearProbe:
    """A classifier for each setting; `features`: the last block's, or those of the last four side by side."""

    settings: list[dict]
    scales: dict[str, "Scale"]
    layers: list["Layer"]

    def answers(self, features: Features, settings: Sequence[int]) -> Iterator[Float[Tensor, "m K"]]:
        for i in settings:
            kind = self.settings[i]["features"]
            yield F.linear(self.scales[kind](of_kind(features, kind)), *self.layers[i])


class Layer(NamedTuple):
    weight: Float[Tensor, "K C"]
    bias: Float[Tensor, " K"]


@dataclass(frozen=True)
class Scale:
    """Mean 0 and deviation 1 on the images it is taken from."""

    centre: Float[Tensor, " C"]
    spread: Float[Tensor, " C"]

    @classmethod
    def of(cls, x: Float[Tensor, "n C"]) -> "Scale":
        return cls(x.mean(0), x.std(0).clamp(min=1e-6))

    def __call__(self, x: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
        return (x - self.centre) / self.spread


def of_kind(features: Features, kind: str) -> Float[Tensor, "n C"]:
    return features.mean if kind == "mean" else features.pooled.flatten(1)


def fit_linear(
    features: Features,
    labels: Int[Tensor, " n"],
    *,
    classes: int,
    solver: str,
    device: torch.device,
    epochs: int = 100,
    penalties: Sequence[float] = PENALTIES,
) -> LinearProbe:
    """Fit every setting of a solver, "lbfgs" or "sgd", on both kinds of features where there is more than one block.

    `epochs` are those of sgd, `penalties` those of lbfgs. Raises ValueError as `check_fitting_set` does.
    """
    check_fitting_set(features.pooled, labels, classes)
    settings, scales, layers = [], {}, []
    for kind in KINDS if features.pooled.shape[1] > 1 else KINDS[:1]:
        x = of_kind(features, kind)
        scales[kind] = Scale.of(x)
        x, where = scales[kind](x).to(device), labels.to(device)
        if solver == "lbfgs":
            layers += fit_lbfgs(x, where, classes=classes, penalties=penalties)
            settings += [{"features": kind, "l2": float(f"{value:.3g}")} for value in penalties]
        else:
            layers += fit_sgd(x, where, classes=classes, epochs=epochs)
            settings += [{"features": kind, "lr": value} for value in RATES]
    return LinearProbe(settings, scales, layers)


def fit_lbfgs(
    x: Float[Tensor, "n C"],
    labels: Int[Tensor, " n"],
    *,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
    iterations: int = 200,
) -> list[Layer]:
    """Minimise mean cross-entropy + penalty / 2 * |weight|² for each penalty, each from where the last one ended.

    Strongest first is fastest. scikit-learn's C is 1 / (n * penalty).
    """
    theta = torch.zeros(classes, x.shape[1] + 1, device=x.device, requires_grad=True)
    layers = []
    for penalty in penalties:
        optimizer = torch.optim.LBFGS(
            [theta], max_iter=iterations, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
        )
        optimizer.step(functools.partial(_loss, theta, x, labels, penalty))
        found = theta.detach().cpu().clone()
        layers.append(Layer(found[:, :-1], found[:, -1]))
    return layers


def _loss(theta: Tensor, x: Tensor, labels: Tensor, penalty: float) -> Tensor:
    weight = theta[:, :-1]
    loss = F.cross_entropy(F.linear(x, weight, theta[:, -1]), labels) + penalty / 2 * weight.square().sum()
    (theta.grad,) = torch.autograd.grad(loss, theta)
    return loss


def fit_sgd(
    x: Float[Tensor, "n C"], labels: Int[Tensor, " n"], *, classes: int, epochs: int = 100, batch: int = 256
) -> list[Layer]:
    """SGD with momentum 0.9 and cosine decay, for each of `RATES`.

    SGD is linear in the gradient: a learning rate is the same as a weight of the loss, so that one layer with the
    outputs of all settings trains them side by side.
    """
    rates = torch.tensor(RATES, device=x.device)
    layer = torch.nn.Linear(x.shape[1], len(RATES) * classes, device=x.device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // batch))
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator_at("order of a probe", epoch)).to(x.device)
        for rows in order.split(batch):
            logits = layer(x[rows]).unflatten(1, (len(RATES), classes))
            losses = F.cross_entropy(logits.flatten(0, 1), labels[rows].repeat_interleave(len(RATES)), reduction="none")
            optimizer.zero_grad()
            (losses.view(-1, len(RATES)).mean(0) * rates).sum().backward()
            optimizer.step()
            schedule.step()
    weights, biases = layer.weight.detach().cpu(), layer.bias.detach().cpu()
    return [Layer(*of_rate) for of_rate in zip(weights.split(classes), biases.split(classes))]
