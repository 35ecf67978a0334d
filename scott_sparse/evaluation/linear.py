"""Linear probes: multinomial logistic regression on frozen features, for every setting of a sweep.

Features are standardised with the mean and deviation of the training set, so that one range of penalties and learning
rates serves every encoder. Two solvers: Newton's method to the optimum for each L2 penalty, and SGD for all learning
rates at once in one pass over the data (as in DINOv2, arXiv 2304.07193, appendix B.3).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from scott_sparse.evaluation.features import Features
from scott_sparse.randomness import generator_at
from scott_sparse.shapes import Float, Int, Tensor

PENALTIES = tuple(10 ** (power / 2) for power in range(2, -13, -1))  # 10 to 1e-6: 15 of them
RATES = tuple(1e-3 * 2**power for power in range(13))  # 1e-3 to 4
MAX_DIRECT_WIDTH = 2048  # below it a fit is fast as it is
TOLERANCE = 1e-6  # of the loss
CG_TOLERANCE, MAX_CG_STEPS, MAX_NEWTON_STEPS = 0.3, 100, 50
KINDS = ("mean", "last-4")  # pooled features of the last block, or of the last four side by side


class Layer(NamedTuple):
    weight: Float[Tensor, "K C"]
    bias: Float[Tensor, " K"]


@dataclass(frozen=True)
class Scale:
    """Standardisation to mean 0 and deviation 1 on the training set."""

    mean: Float[Tensor, " C"]
    deviation: Float[Tensor, " C"]

    @classmethod
    def of(cls, x: Float[Tensor, "n C"]) -> "Scale":
        return cls(x.mean(0), x.std(0).clamp(min=1e-6))

    def __call__(self, x: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
        return (x - self.mean) / self.deviation


@dataclass(frozen=True)
class LinearProbe:
    """One linear classifier for each setting."""

    settings: list[dict]
    scales: dict[str, Scale]
    layers: list[Layer]

    def logits(self, features: Features, settings: Sequence[int]) -> Iterator[Float[Tensor, "m K"]]:
        for i in settings:
            kind = self.settings[i]["features"]
            yield F.linear(self.scales[kind](of_kind(features, kind)), *self.layers[i])


def of_kind(features: Features, kind: str) -> Float[Tensor, "n C"]:
    return features.mean if kind == "mean" else features.pooled.flatten(1)


def fit_linear(
    features: Features, labels: Int[Tensor, " n"], *, classes: int, device: torch.device, solver: str, epochs: int = 100
) -> LinearProbe:
    """Fit every setting of the solver, "newton" or "sgd" (for `epochs`); one block has features of one kind only."""
    settings, scales, layers = [], {}, []
    for kind in KINDS if features.pooled.shape[1] > 1 else KINDS[:1]:
        x = of_kind(features, kind)
        scales[kind] = Scale.of(x)
        x, y = scales[kind](x).to(device), labels.to(device)
        if solver == "newton":
            layers += fit_newton(x, y, classes=classes)
            settings += [{"features": kind, "l2": float(f"{value:.3g}")} for value in PENALTIES]
        else:
            layers += fit_sgd(x, y, classes=classes, epochs=epochs)
            settings += [{"features": kind, "lr": value} for value in RATES]
    return LinearProbe(settings, scales, layers)


def fit_newton(
    x: Float[Tensor, "n C"], labels: Int[Tensor, " n"], *, classes: int, penalties: Sequence[float] = PENALTIES
) -> list[Layer]:
    """Minimise mean cross-entropy + penalty / 2 * |weight|² for each penalty, by Newton's method.

    scikit-learn's C is 1 / (n * penalty). Each fit starts from the last one, or extrapolates the last two, which are as
    far apart in log(penalty): strongest first is fastest. With far more dimensions than images, as of raw pixels, the
    fit runs in the images' span (`_rotate_to_span`).
    """
    rotation = None
    if x.shape[1] > max(len(x), MAX_DIRECT_WIDTH):
        x, rotation = _rotate_to_span(x)
    x = F.pad(x, (0, 1), value=1.0)  # the last weight is the bias
    theta = before = x.new_zeros(classes, x.shape[1])
    layers = []
    for penalty in penalties:
        l2 = x.new_full((x.shape[1],), penalty)
        l2[-1] = 0
        starts = theta, 2 * theta - before
        losses = [_loss(start, x @ start.T, labels, l2) for start in starts]
        before, theta = theta, _minimise(starts[int(losses[1] < losses[0])], x, labels, l2)
        weight, bias = theta[:, :-1], theta[:, -1]
        layers.append(Layer((weight if rotation is None else weight @ rotation).cpu(), bias.cpu()))
    return layers


def _minimise(theta: Float[Tensor, "K C"], x: Float[Tensor, "n C"], labels: Tensor, l2: Float[Tensor, " C"]) -> Tensor:
    """The minimum of mean cross-entropy + |theta|² / 2 weighted by `l2`, from a start `theta`.

    Newton's method; the equations of a step are solved by conjugate gradients, preconditioned by the Hessian's diagonal
    (truncated Newton: Lin, Weng and Keerthi, JMLR 9:627, 2008). It ends when the Newton decrement says that the loss is
    within `TOLERANCE` of its minimum (Boyd and Vandenberghe, Convex Optimization, 9.5.1).
    """
    n, targets, variance = len(x), F.one_hot(labels, len(theta)).to(x), x.square().mean(0)
    logits = x @ theta.T
    for _ in range(MAX_NEWTON_STEPS):
        p = logits.softmax(1)
        gradient = (p - targets).T @ x / n + l2 * theta
        inverse = 1 / (variance * (p * (1 - p)).mean() + l2 + 1e-12)  # the bias has no penalty
        step, logits_step = torch.zeros_like(theta), torch.zeros_like(logits)
        residual = -gradient
        direction = z = inverse * residual
        error = first_error = (residual * z).sum()
        for _ in range(MAX_CG_STEPS):
            if error <= CG_TOLERANCE**2 * first_error:
                break
            change = x @ direction.T
            curvature = p * (change - (p * change).sum(1, keepdim=True))
            curved = curvature.T @ x / n + l2 * direction  # the Hessian times the direction
            length = error / (direction * curved).sum()
            step, logits_step = step + length * direction, logits_step + length * change
            residual = residual - length * curved
            z = inverse * residual
            error, last_error = (residual * z).sum(), error
            direction = z + error / last_error * direction

        before = _loss(theta, logits, labels, l2)
        for share in (0.5**i for i in range(10)):
            if _loss(theta + share * step, logits + share * logits_step, labels, l2) <= before:
                theta, logits = theta + share * step, logits + share * logits_step
                break
        if -(gradient * step).sum() / 2 < TOLERANCE:
            break
    return theta


def _loss(theta: Tensor, logits: Tensor, labels: Tensor, l2: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels) + (l2 * theta.square()).sum() / 2


def _rotate_to_span(x: Float[Tensor, "n C"]) -> tuple[Float[Tensor, "n r"], Float[Tensor, "r C"]]:
    """Features in the r <= n < C principal axes of n images, and these axes as orthonormal rows.

    The gradient of a linear layer with an L2 penalty lies in the span of its inputs, and so does the optimum: the fit
    in r dimensions is the fit in all C. From the Gram matrix, in float64 as it squares the condition number.
    """
    gram = torch.zeros(len(x), len(x), dtype=torch.float64)
    for columns in x.split(4096, dim=1):
        columns = columns.cpu().double()
        gram.addmm_(columns, columns.T)
    squares, vectors = torch.linalg.eigh(gram)
    resolved = squares > 1e-9 * squares[-1]  # by float32
    lengths, vectors = squares[resolved].sqrt(), vectors[:, resolved]
    return (vectors * lengths).to(x), (vectors / lengths).T.to(x) @ x


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
