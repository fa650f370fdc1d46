"""Which layers to tap: from the user's words to indices."""

from __future__ import annotations

from collections.abc import Sequence

TAP_FORMS = '"all", "last", "mid", "even:k", or a list of layer indices'


def resolve_taps(taps: str | Sequence[int], num_layers: int) -> list[int]:
    """Layer indices, ascending and without repeats.

    Args:
        taps: "all"; "last"; "mid", the layers from 20 to 80 % of the depth (Zhao et al., Layer-wise Analysis of
            Supervised Fine-tuning); "even:k", k layers spread evenly, the last one included; or indices counted
            from 0 at the first layer, negative ones from the end. Index i means the output of layer i.
        num_layers: how many layers the backbone has.

    Raises:
        ValueError: for another form, one that only data can resolve (:func:`data_dependent`), an index out of range
            or repeated, or k outside 1 to ``num_layers``.
    """
    if isinstance(taps, str):
        return _named_taps(taps, num_layers)
    if not len(taps):
        raise ValueError(f"taps: expected {TAP_FORMS}, got an empty list")
    resolved = []
    for position, index in enumerate(taps):
        if isinstance(index, bool) or not isinstance(index, int):
            raise ValueError(f"taps[{position}]: expected an integer, got {index!r}")
        if not -num_layers <= index < num_layers:
            raise ValueError(
                f"taps[{position}]: {index} is out of range for a backbone of {num_layers} layers "
                f"(0 to {num_layers - 1}, or -{num_layers} to -1)"
            )
        resolved.append(index % num_layers)
    if len(set(resolved)) != len(resolved):
        raise ValueError(f"taps: expected each layer once, got {list(taps)} for {num_layers} layers")
    return sorted(resolved)


def _named_taps(taps: str, num_layers: int) -> list[int]:
    if taps == "all":
        return list(range(num_layers))
    if taps == "last":
        return [num_layers - 1]
    if taps == "mid":  # the output of layer i is at depth (i + 1) / num_layers; integers, as 0.2 has no exact float
        middle = [i for i in range(num_layers) if num_layers <= 5 * (i + 1) <= 4 * num_layers]
        return middle or [num_layers // 2]
    if data_dependent(taps):
        raise ValueError(
            f"taps: {taps!r} needs data to be resolved: levi-fast train and levi-fast compare do so before training; "
            "in Python, pass the indices that levi-fast select-taps prints"
        )
    name, _, count = taps.partition(":")
    if name != "even" or not count.isdecimal():
        raise ValueError(f"taps: expected {TAP_FORMS}, got {taps!r}")
    k = int(count)
    if not 1 <= k <= num_layers:
        raise ValueError(f"taps: even:k needs k from 1 to {num_layers}, the number of layers; got {k}")
    return [round((i + 1) * num_layers / k) - 1 for i in range(k)]


def data_dependent(taps: object) -> bool:
    """Whether ``taps`` is "cka:k", "gradnorm" or "probe", which are resolved from taps of the training data.

    Raises:
        ValueError: "cka:k" without a whole number k of at least 1.
    """
    if not isinstance(taps, str):
        return False
    name, _, count = taps.partition(":")
    if name == "cka" and (not count.isdecimal() or int(count) < 1):
        raise ValueError(f"taps: cka:k needs a whole number k of at least 1, got {taps!r}")
    return name == "cka" or taps in ("gradnorm", "probe")
