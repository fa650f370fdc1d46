"""Shared by several folders of tests: a tiny text backbone on disk, and the data sets beside the checkout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest
import torch

WORDS = """
the a it was is this and but not very film book good great fine bad poor dull awful lovely happy sad plot actor
story scene music long short quick slow red blue green one two three never always maybe
"""


class TorchRandom:
    """torch's generator as Hypothesis knows random ones: it seeds it before each example, so that failures repeat."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


torch_random = TorchRandom()  # Hypothesis keeps a weak reference only
hypothesis.register_random(torch_random)
# The same examples in every run; HYPOTHESIS_PROFILE=explore draws new ones.
hypothesis.settings.register_profile("repeat", derandomize=True, database=None)
hypothesis.settings.register_profile("explore")
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """Ends what tests have started and left behind: Python waits for such children, for ever where they hang."""
    before = psutil.Process().children()
    yield
    for child in psutil.Process().children(recursive=True):
        if child not in before and not any("resource_tracker" in word for word in child.cmdline()):
            child.kill()


@pytest.fixture(scope="session")
def tiny_bert_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random-weight BERT (3 layers, width 16, 64 positions) and a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
        )
        BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real data sets: LEVI_FAST_DATA, else ``../shared/data`` beside the checkout."""
    named = os.environ.get("LEVI_FAST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}; set LEVI_FAST_DATA to their folder")
    return folder
