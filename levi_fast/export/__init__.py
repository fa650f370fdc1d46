"""Trained LEVI models as artefacts that run without levi_fast: torch.export, ONNX, AOTInductor."""

from levi_fast.export.artefact import FORMATS, OPS, Artefact, export_model

__all__ = ["FORMATS", "OPS", "Artefact", "export_model"]
