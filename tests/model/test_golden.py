"""The paper's own numbers: tokens, targets, features, predictions, losses, gradients and weights after three steps.

Each file in $GOLDEN_DIR (default: tests/golden) was measured by running the paper's code in fp32 without dropout on
random weights. Nothing here shares code with what it checks but the model itself.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import DEVICES
from safetensors import safe_open

from scott_sparse import MIMJEPA, EncoderConfig, ObjectiveConfig, from_paper_checkpoint, to_paper_checkpoint
from scott_sparse.model import vit
from scott_sparse.model.jepa import make_target, target_features, update_target
from scott_sparse.training.optim import Schedules, adamw, set_schedules

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
FILES = sorted(FOLDER.glob("*.safetensors"))
STEPS = 3


def test_there_are_golden_files():
    assert FILES, f"no *.safetensors in {FOLDER}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", ["dense", "halo", "spconv"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_golden(path, engine, device, monkeypatch):
    # The paper's code was run at width 16, where its SwiGLU has no hidden unit.
    monkeypatch.setattr(vit, "check_swiglu", lambda dim, heads: None)
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        golden = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 - not a dict
    model = build(case, engine).to(device)
    model.encoder.load_state_dict(from_paper_checkpoint(under("context.", golden)))
    model.predictor.load_state_dict(from_paper_checkpoint(under("predictor.", golden)))
    target = make_target(model.encoder)

    settings = case["optimizer"]
    optimizer = adamw(model, betas=tuple(settings["betas"]), eps=settings["eps"])
    schedules = Schedules(
        total_steps=settings["total_steps"],
        warmup_steps=settings["warmup_steps"],
        lr=settings["lr_peak"],
        lr_start=settings["lr_start"],
        lr_final=settings["lr_final"],
        flat_fraction=settings["flat_fraction"],
        weight_decay=(settings["wd_start"], settings["wd_final"]),
        momentum=(settings["ema_start"], settings["ema_final"]),
    )
    for step in range(STEPS):
        data = under(f"step{step}.", golden)
        context, visible = data["context_images"], data["visible"]
        targets = target_features(target, data["target_images"])
        if step == 0:
            features = model.context_features(context, visible)
            tokens = model.encoder.tokenizer(context, visible)
            # The golden tokens are recorded before mask tokens: hidden ones are whatever the stem gives there.
            close(tokens[visible], data["context_tokens"][visible])
            close(targets, data["targets"])
            close(features, data["context_features"])
            close(model.predictor(features, model.encoder.tokenizer.grid(context)), data["predictions"])
        loss = model(context[:, None], visible[:, None], targets)["loss"]
        assert loss.item() == pytest.approx(case["losses"][step], rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            check_gradients(model.encoder, under("grad.context.", golden))
            check_gradients(model.predictor, under("grad.predictor.", golden))
        expected = case["schedule"][step]
        set_schedules(optimizer, schedules, step)
        assert schedules.lr_at(step) == pytest.approx(expected["lr"])
        assert schedules.weight_decay_at(step) == pytest.approx(expected["wd"])
        assert schedules.momentum_at(step) == pytest.approx(expected["ema"])
        optimizer.step()
        update_target(target, model.encoder, schedules.momentum_at(step))

    final = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in case["final_norm_and_sum"].items()}
    modules = {"context.": model.encoder, "predictor.": model.predictor, "target.": target}
    for prefix, module in modules.items():
        # [norm, sum] per tensor, renamed as the weights are.
        for name, pair in from_paper_checkpoint(under(prefix, final)).items():
            norm, total = pair.tolist()
            tensor = module.state_dict()[name].double()
            assert tensor.norm().item() == pytest.approx(norm, rel=1e-4), name
            assert tensor.sum().item() == pytest.approx(total, rel=1e-4, abs=1e-4 * max(norm, 1)), name


@pytest.mark.parametrize("part", ["context", "predictor"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_back_to_the_papers_names(path, part, tmp_path, monkeypatch):
    """A file of the paper's code is read, and written again with all of its tensors, positions included."""
    monkeypatch.setattr(vit, "check_swiglu", lambda dim, heads: None)
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        theirs = under(f"{part}.", {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    torch.save(theirs, tmp_path / "theirs.pth")
    model = build(case, "dense")
    module = {"context": model.encoder, "predictor": model.predictor}[part]
    module.load_state_dict(from_paper_checkpoint(tmp_path / "theirs.pth"))
    side = int((len(theirs["transformer.pos_embed"]) - case["num_register_tokens"]) ** 0.5)
    again = to_paper_checkpoint(module, (side, side))
    assert again.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if part == "predictor" and name == "transformer.msk_embed":  # it is not used
            assert again[name].shape == tensor.shape
        else:
            torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=0)


def build(case, engine):
    config = EncoderConfig(
        dim=case["embed_dim"],
        depth=case["depth"],
        heads=case["num_heads"],
        patch_size=case["patch_size"],
        tokenizer={"SCOTT": "scott", "ViT": "patch"}[case["model"]],
        ffn=case["ffn"],
        mlp_ratio=float(case["mlp_ratio"]),
        registers=case["num_register_tokens"],
    )
    return MIMJEPA(config, ObjectiveConfig(predictor_depth=case["predictor_depth"]), engine=engine)


def under(prefix, tensors):
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def check_gradients(module, golden):
    parameters = dict(module.named_parameters())
    expected = from_paper_checkpoint(golden)
    assert set(expected) == set(parameters)
    for name, gradient in expected.items():
        close(parameters[name].grad, gradient, name)


def close(got, expected, name=""):
    error = (got - expected).norm() if expected.numel() else torch.zeros(())
    assert error <= 1e-4 * expected.norm(), f"{name} differs by {error / expected.norm():.1e} relative"
