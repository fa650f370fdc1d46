"""Text and table columns together: one view made of two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import TaskModel
from .tabular import TabularTaskModel
from .text import TextTaskModel


class TableTaskModel(TaskModel):
    """A text model and a tabular model side by side; the view is their views concatenated.

    Args:
        text: keyword arguments of :class:`TextTaskModel`, or None for no text column.
        tabular: keyword arguments of :class:`TabularTaskModel`, or None for no other column.

    Raises:
        ValueError: neither part is given, or an argument of a part is wrong.
        TypeError: a part's arguments are incomplete or unknown.
    """

    type_name = "table"

    def __init__(self, text: Mapping[str, Any] | None = None, tabular: Mapping[str, Any] | None = None) -> None:
        if text is None and tabular is None:
            raise ValueError("text, tabular: expected at least one part, got None for both")
        text_model = None if text is None else TextTaskModel(**_arguments("text", text))
        tabular_model = None if tabular is None else TabularTaskModel(**_arguments("tabular", tabular))
        parts = [part for part in (text_model, tabular_model) if part is not None]
        super().__init__(sum(part.view_width for part in parts))
        self._spec = {
            "type": self.type_name,
            "text": None if text_model is None else text_model.spec,
            "tabular": None if tabular_model is None else tabular_model.spec,
        }
        self.text = text_model
        self.tabular = tabular_model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        numeric: Tensor | None = None,
        categorical: Tensor | None = None,
    ) -> Tensor:
        """Return the view ``[B, V_text + V_tabular]``; arguments of an absent part are not used.

        Raises:
            ValueError: a tensor that a part needs is missing or has the wrong shape.
        """
        parts = []
        if self.text is not None:
            if input_ids is None:
                raise ValueError("input_ids: expected a tensor of shape [any, any], got None")
            parts.append(self.text(input_ids=input_ids, attention_mask=attention_mask))
        if self.tabular is not None:
            parts.append(self.tabular(numeric=numeric, categorical=categorical))
        return torch.cat(parts, dim=1)


def _arguments(name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the part's own "type", which its spec carries, after checking that it is the right one."""
    if not isinstance(spec, Mapping):
        raise TypeError(f"{name}: expected a mapping of constructor arguments or None, got {spec!r}")
    arguments = dict(spec)
    found = arguments.pop("type", name)
    if found != name:
        raise ValueError(f"{name}: expected a spec of type {name!r}, got type {found!r}")
    return arguments
