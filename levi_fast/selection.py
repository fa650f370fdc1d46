"""Which layers to tap: from the user's words to indices."""

from __future__ import annotations

from collections.abc import Sequence

TAP_FORMS = '"all", "last", "even:k", or a list of layer indices'


def resolve_taps(taps: str | Sequence[int], num_layers: int) -> list[int]:
    """Layer indices, ascending and without repeats.

    Args:
        taps: "all"; "last"; "even:k", k layers spread evenly over the depth, the last one included; or indices
            counted from 0 at the first layer, negative ones from the end. Index i means the output of layer i.
        num_layers: how many layers the backbone has.

    Raises:
        ValueError: for another form, an index out of range or repeated, or k outside 1 to ``num_layers``.
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
    name, _, count = taps.partition(":")
    if name != "even" or not count.isdecimal():
        raise ValueError(f"taps: expected {TAP_FORMS}, got {taps!r}")
    k = int(count)
    if not 1 <= k <= num_layers:
        raise ValueError(f"taps: even:k needs k from 1 to {num_layers}, the number of layers; got {k}")
    return [round((i + 1) * num_layers / k) - 1 for i in range(k)]
