"""The key of a cache: everything that its activations depend on, and what differs between two keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from levi_fast.errors import DataError

# What a config says about a run, a release or a head, not about the activations.
_VOLATILE = {
    "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict", "id2label",
    "label2id", "problem_type", "output_hidden_states", "output_attentions", "gradient_checkpointing",
}  # fmt: skip
NAMES = (
    *("fingerprint", "backbone_dtype", "config", "preprocessor", "taps", "pooling", "max_length", "dtype"),
    *("views", "view_seed"),
)
_TITLES = {"fingerprint": "backbone weights", "config": "backbone config", "max_length": "max_length (truncation)"}


class CacheMismatchError(DataError):
    """A cache was made from something else than what is asked for.

    Attributes:
        changes: one sentence for everything that changed.
    """

    def __init__(self, path: str, changes: list[str], remedy: str) -> None:
        super().__init__(f"cache: {path} was built from something else: {'; '.join(changes)}. {remedy}")
        self.changes = changes


def config_key(config: Any) -> dict[str, Any]:
    """A transformers config as JSON values, without what does not reach the activations; {} for None."""
    if config is None:
        return {}
    document: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str, sort_keys=True))
    return _without_volatile(document)


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_volatile(v) for k, v in value.items() if k not in _VOLATILE and not k.startswith("_")}
    return value


def preprocessor_key(preprocessor: Any) -> str | None:
    """Digest of a tokenizer or an image processor.

    Args:
        preprocessor: a transformers tokenizer or processor; a string of the user's own that tells it from others;
            None where the data's content says all there is.

    Raises:
        DataError: for anything else.
    """
    if preprocessor is None or isinstance(preprocessor, str):
        return preprocessor
    if hasattr(preprocessor, "get_vocab"):
        state: Any = {
            "special": {name: str(token) for name, token in preprocessor.special_tokens_map.items()},
            "pad_token_id": preprocessor.pad_token_id,
        }
        backend: Any = getattr(preprocessor, "backend_tokenizer", None)
        if hasattr(backend, "to_str"):
            core = json.loads(backend.to_str())
            # Set by the latest call, not by the tokenizer; truncation is a part of the key in its own right.
            state["core"] = {k: v for k, v in core.items() if k not in ("truncation", "padding")}
        else:
            state["vocabulary"] = preprocessor.get_vocab()
            state["settings"] = {k: str(v) for k, v in preprocessor.init_kwargs.items() if "path" not in k}
    elif hasattr(preprocessor, "to_dict"):
        state = _without_volatile(preprocessor.to_dict())
    else:
        raise DataError(
            f"preprocessor: expected a transformers tokenizer or processor, or a string, got {type(preprocessor)}"
        )
    text = json.dumps(state, sort_keys=True, default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def data_key(digests: Iterable[bytes]) -> str:
    """Digest of a part's content: its rows' digests, in order."""
    total = hashlib.sha256()
    for digest in digests:
        total.update(digest)
    return "sha256:" + total.hexdigest()


def differences(have: Mapping[str, Any], want: Mapping[str, Any]) -> list[str]:
    """What changed between the key of a cache and the one asked for, one sentence each.

    ``data`` is compared part by part for those asked for. Where the preprocessing changed, the data's tokens change
    with it, and are not named.
    """
    changes = []
    for name in NAMES:
        if name not in want:
            continue
        if name == "config":
            changes += _config_differences(have.get(name, {}), want[name])
        elif have.get(name) != want[name]:
            changes.append(f"{_TITLES.get(name, name)}: {have.get(name)!r} in the cache, {want[name]!r} now")
    if have.get("preprocessor") == want.get("preprocessor") and have.get("max_length") == want.get("max_length"):
        changes += _data_differences(have.get("data", {}), want.get("data", {}))
    return changes


def _config_differences(have: Mapping[str, Any], want: Mapping[str, Any], prefix: str = "") -> list[str]:
    changes = []
    for name in sorted(set(have) | set(want)):
        old, new = have.get(name), want.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _config_differences(old, new, f"{prefix}{name}.")
        elif old != new:
            changes.append(f"backbone config {prefix}{name}: {_brief(old)} in the cache, {_brief(new)} now")
    return changes


def _data_differences(have: Mapping[str, Any], want: Mapping[str, Any]) -> list[str]:
    changes = []
    for name, digest in want.items():
        if name not in have:
            changes.append(f"data {name!r}: not in the cache, which holds {', '.join(map(repr, have)) or 'none'}")
        elif have[name] != digest:
            changes.append(f"content of data {name!r}: {str(have[name])[:19]} in the cache, {digest[:19]} now")
    return changes


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
