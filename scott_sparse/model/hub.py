"""An encoder as a repository of the Hugging Face Hub: its files, and a model card made from its run folder.

`Encoder.save_pretrained` and `Encoder.push_to_hub` import it when called: the model needs no huggingface_hub.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, ModelHubMixin

from scott_sparse.files import read_json
from scott_sparse.model.vit import Encoder
from scott_sparse.model.weights import TRAINED, save_encoder, trained_by

# Fields of recipe.json that say nothing of the weights, or where files lie on the machine of the run.
PRIVATE = {"out", "overwrite", "plan", "resume", "time_budget", "workers", "minutes", "tracker", "log_every"}
PRIVATE |= {"save_every", "keep_last", "keep_every", "data_root", "cache", "cache_dir", "ram_gib", "list", "labels"}


class HubEncoder(ModelHubMixin):
    """What the mixin saves and uploads for an encoder: the files of `save_encoder`, and README.md."""

    def __init__(self, encoder: Encoder, name: str):
        self.encoder, self.name = encoder, name
        self._hub_mixin_config = None  # else it writes a config.json beside encoder.json

    def _save_pretrained(self, save_directory: Path) -> None:
        save_encoder(self.encoder, save_directory)

    def generate_model_card(self, *args: Any, **fields: Any) -> ModelCard:
        return model_card(self.encoder, self.name, **fields)


def model_card(encoder: Encoder, name: str, *, license: str | None = None) -> ModelCard:
    """README.md of a repository: what the run folder `encoder.run` says of recipe, data, protocol and metrics.

    Of the run's paths the last part alone is published. `license` is that of the weights, by an identifier of the Hub
    such as "cc-by-4.0"; images may forbid some.
    """
    recipe, summary = (_read(encoder.run, file) for file in ("recipe.json", "summary.json"))
    results = [read_json(path) for path in sorted((encoder.run / "eval").glob("*.json"))] if encoder.run else []
    results = [result for result in results if result["subject"] in TRAINED]
    config, count = encoder.config, sum(p.numel() for p in encoder.parameters())
    scores = [(result, result["test"]["top1"]) for result in results if "test" in result]
    trained = trained_by(recipe, summary)
    finetuned = trained != "pretrained"
    self_supervised = [] if trained == "trained from scratch" else ["self-supervised-learning", "mim-jepa"]
    metadata = ModelCardData(
        license=license,
        library_name="scott-sparse",
        pipeline_tag="image-feature-extraction",
        tags=["vision-transformer", "scott", *self_supervised],
        model_name=name if scores else None,
        eval_results=[_hub_result(result, top1) for result, top1 in scores] or None,
    )
    title = f"# {name}\n\nVision Transformer, {count / 1e6:.1f} M parameters, {TRAINED[trained]}"
    title += ": " if finetuned else " by [SCOTT and MIM-JEPA](https://arxiv.org/abs/2502.18056): "
    title += f"tokenizer {config.tokenizer}, width {config.dim}, {config.depth} blocks, patches of {config.patch_size}."
    if recipe.get("init"):
        title += f" Pretraining went on from the weights of {_last_part(recipe['init'])}."
    lines = [f"---\n{metadata.to_yaml()}\n---", title, USE.format(name=name)]
    if encoder.preprocess:
        lines.append(f"## Preprocessing\n\n{_json(encoder.preprocess.to_json())}")
    lines.append(f"## Data and protocol\n\n{_about_data(recipe, summary, finetuned)}")
    lines.append(
        f"## Recipe\n\n{_about_training(summary, finetuned)}{_json(_public(recipe)) if recipe else 'Not recorded.'}"
    )
    lines.append(f"## Metrics\n\n{_metrics(results, summary)}")
    lines.append(f"## Licence\n\nWeights: {license or 'not stated'}. The code, scott-sparse: Apache-2.0.")
    return ModelCard("\n\n".join(lines) + "\n")


USE = """```python
from scott_sparse import Encoder

encoder = Encoder.from_pretrained("{name}")
features = encoder(encoder.preprocess(image)[None])  # a PIL image; (1, N, D), one vector for each patch
```"""


def _read(run: Path | None, file: str) -> dict:
    return read_json(run / file) if run is not None and (run / file).is_file() else {}


def _json(value: Any) -> str:
    return f"```json\n{json.dumps(value, indent=2)}\n```"


def _public(fields: dict) -> dict:
    """A recipe without `PRIVATE` and unset fields, and without the folders of what is named by a path."""
    public = {}
    for name, value in fields.items():
        if name in PRIVATE or value is None:
            continue
        if name in ("data", "init"):
            value = _last_part(value)
        public[name] = _public(value) if isinstance(value, dict) else value
    return public


def _last_part(name: str) -> str:
    return name if name.startswith(("timm:", "hf:")) else Path(name).name


def _about_data(recipe: dict, summary: dict, finetuned: bool) -> str:
    data, source = summary.get("data", {}), recipe.get("source", {})
    if not source.get("data"):
        return "Not recorded."
    counts = ", ".join(f"{role} {n:,}" for role, n in data.get("images", {}).items() if n)
    protocol = {
        "clean": f"clean: {'' if finetuned else 'pre'}training saw no test image, every choice was made on val",
        "paper": "paper: trained on train and val, a choice may have been made on test images"
        if finetuned
        else "paper: pretraining saw all images, test images included",
    }[source["protocol"]]
    return f"Images: {_last_part(source['data'])} ({counts or 'counts are not recorded'}). Protocol {protocol}."


def _about_training(summary: dict, finetuned: bool) -> str:
    if not summary:
        return ""
    terms = "cross-entropy" if finetuned else ", ".join(summary["terms"])
    return (
        f"{summary['steps']:,} steps in {summary['train_seconds']:,.0f} s on {summary['processes']} x "
        f"{summary['device']}, mixed precision {summary['mixed_precision']}; loss: {terms}.\n\n"
    )


def _metrics(results: list[dict], summary: dict) -> str:
    rows = []
    for result in results:
        height, width = result["image_size"]
        start = [result["probe"], _last_part(result["data"]), result["protocol"], f"{height} x {width}"]
        for shots, row in result.get("shots", {}).items():
            rows.append([*start, f"{shots} labels a class", f"{row['top1']['mean']:.1f}"])
        if "test" in result:
            chosen = ", ".join(f"{key} {value}" for key, value in result["choice"].items())
            low, high = result["test"]["top1_interval"]
            top1 = f"{result['test']['top1']:.1f} ({low:.1f} - {high:.1f})"
            rows.append([*start, f"{chosen}, chosen on {result['chosen_on']}", top1])
    knn = {name: value for name, value in summary.get("knn", {}).items() if value is not None}
    text = (
        f"k-NN on val at the end of pretraining, %: {', '.join(f'{k} {v:g}' for k, v in knn.items())}.\n\n"
        if knn
        else ""
    )
    if not rows:
        return text + "No probe was run on test images."
    head = ["probe", "data", "protocol", "pixels", "setting", "test top-1, % (95 % interval)"]
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [head, ["---"] * len(head), *rows]]
    return text + "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _hub_result(result: dict, top1: float) -> EvalResult:
    data = _last_part(result["data"])
    how = "" if result["probe"].startswith("finetune") else " probe on frozen features"
    return EvalResult(
        task_type="image-classification",
        task_name=f"{result['probe']}{how}, {result['protocol']} protocol",
        dataset_type=data,
        dataset_name=data,
        dataset_split="test",
        metric_type="accuracy",
        metric_value=round(top1, 2),
    )
