"""The model card (README.md) of a saved LEVI folder: what it was trained on, what it reached, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from levi_fast.config import LeviConfig
from levi_fast.report.tables import METHOD_TITLES, METRIC_TITLES, figure
from levi_fast.training.blending import Blend
from levi_fast.training.image_tasks import IMAGE_TASKS
from levi_fast.training.methods import METHODS
from levi_fast.training.metrics import LOWER_IS_BETTER

PIPELINES = {
    "single_label_classification": "text-classification",
    "multi_label_classification": "text-classification",
}

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ description }} Trained with levi_fast {{ versions.levi_fast }}. This folder holds the trained part{{ carried }}.

## Data

{{ data }}

## Results

The epoch ({{ document.best_epoch }} of {{ document.epochs }}) and the blend ({{ blend }}) were chosen on
in-distribution validation rows{{ chosen_by }}.

{{ results }}

## How to load

```python
{{ usage }}
```

`levi-fast evaluate --model FOLDER --data {{ more }}.

## Configuration

{{ settings }}

Versions: {{ version_list }}.
"""


def model_card(document: Mapping[str, Any], config: LeviConfig, reads: Sequence[str], include_backbone: bool) -> str:
    """Markdown with the hub's YAML header.

    Args:
        document: the content of ``metrics.json``.
        config: of the model, with its backbone named as in the folder.
        reads: names of the columns that the model reads.
        include_backbone: whether the folder carries the backbone.
    """
    backbone = config.backbone or "no backbone"
    on_hub = config.backbone is not None and not config.backbone.startswith(".")
    pipeline_tag = _pipeline(document["task"], config)
    scored = list(document["id"])
    frozen = config.backbone_training == "frozen" and config.tap_layers is not None
    card_data = ModelCardData(
        base_model=config.backbone if on_hub else None,
        library_name="levi_fast",
        pipeline_tag=pipeline_tag,
        tags=["levi", "out-of-distribution", *(["frozen-backbone"] if frozen else [])],
        metrics=[name for name in scored if name in ("accuracy", "rmse", "mae")] or None,
    )
    settings = {
        "method": document["method"],
        "backbone": config.backbone,
        "taps": config.taps,
        "pooling": config.pooling,
        "hidden width": config.hidden_width,
        "objective": config.objective,
        "mix": config.mix,
        "view dropout": config.view_dropout,
        "view loss": config.view_loss,
        "standalone task model": config.standalone_view,
        "blend": Blend(config.blend, config.view_blend),
        "task model": (config.task_model or {}).get("type"),
        "trained parameters": f"{document['trained_parameters']:,}",
        "seed": document["seed"],
    }
    card = ModelCard.from_template(
        card_data,
        template_str=_TEMPLATE,
        document=document,
        versions=document["versions"],
        version_list=", ".join(f"{name} {version}" for name, version in document["versions"].items()),
        chosen_by=(
            ", the blend on held-out training rows too"
            if document.get("blend_rows", 0) > document["sizes"]["validation"]
            else " alone"
        ),
        title=f"{METHOD_TITLES[document['method']]}, on {backbone}",
        description=_description(document["method"], config),
        carried=" and the backbone" if include_backbone else ", not the backbone's weights",
        data=_data(document, reads),
        blend=str(Blend(config.blend, config.view_blend)),
        results=_results(document),
        usage=_usage(config, pipeline_tag),
        more="IMAGES` scores images of the same classes"
        if document["task"] in IMAGE_TASKS
        else "FILE` scores a file of the same columns",
        settings="\n".join(f"- {name}: {value}" for name, value in settings.items()),
    )
    return str(card)


def _pipeline(task: str, config: LeviConfig) -> str | None:
    """Which of transformers' pipelines takes the folder."""
    if config.tap_layers is None or task == "digits":  # digits has no image processor: its pixels are made
        return None
    found = PIPELINES.get(str(config.problem_type))
    return "image-classification" if found is not None and task in IMAGE_TASKS else found


def _description(method: str, config: LeviConfig) -> str:
    """What was trained: LEVI as it is, or the baseline that the folder holds."""
    if not method.startswith("levi"):
        return f"A baseline of LEVI: {METHOD_TITLES[method]} ({METHODS[method].source})."
    backbone = {
        "frozen": "A frozen backbone",
        "lora": "A backbone with trained adapters",
        "full": "A trained backbone",
    }
    depths = "read at its last layer" if method == "levi-last-tap" else "read at several depths"
    return (
        f"{backbone[config.backbone_training]}, {depths}, combined layer by layer with a small task model trained "
        f"from scratch: LEVI, *Layer-wise Ensemble of Different Views* (Roh et al., ICML 2024, arXiv 2402.04644)."
        + (" Averaged with a second task model that was trained by itself." if config.standalone_view else "")
    )


def _data(document: Mapping[str, Any], reads: Sequence[str]) -> str:
    sizes = document["sizes"]
    lines = [f"- training rows: {sizes['train']:,}", f"- in-distribution validation rows: {sizes['validation']:,}"]
    if sizes["test"] is not None:
        lines.append(f"- in-distribution test rows: {sizes['test']:,}")
    lines += [f"- out-of-distribution rows, {name}: {rows:,}" for name, rows in sizes["ood"].items()]
    if reads:
        lines.append(f"- columns read: {', '.join(reads)}")
    return "\n".join(lines)


def _results(document: Mapping[str, Any]) -> str:
    names = list(document["id"])
    heads = [f"{METRIC_TITLES.get(n, n)} {'↓' if n in LOWER_IS_BETTER else '↑'}" for n in names]
    rows = [(f"ID ({document['id_split']})", document["id"])]
    rows += [(f"OOD {name}", scores) for name, scores in document["ood"].items()]
    lines = [f"| data | {' | '.join(heads)} |", f"|---|{'---:|' * len(names)}"]
    lines += [
        f"| {split} | {' | '.join(figure(scores.get(n), n).strip() for n in names)} |" for split, scores in rows
    ]
    return "\n".join(lines)


def _usage(config: LeviConfig, pipeline_tag: str | None) -> str:
    if pipeline_tag is None or (config.task_model or {}).get("type") not in (None, "text", "image"):
        return 'from levi_fast import LeviModel\n\nmodel = LeviModel.from_pretrained("FOLDER")'
    call = 'classify("image.jpg")' if pipeline_tag == "image-classification" else 'classify(["..."], truncation=True)'
    return (
        "import levi_fast  # makes transformers know LEVI\nfrom transformers import pipeline\n\n"
        f'classify = pipeline("{pipeline_tag}", model="FOLDER")\n{call}'
    )
