"""An embedder inside the process leaves the application's terminal alone."""

import pytest
from minilm import minilm_folder

from orion_oie.cancellation import CancelScope
from orion_oie.embeddings.sentence_transformer import SentenceTransformerEmbedder


def test_a_load_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """The libraries that read the weights would draw a progress bar."""
    pytest.importorskip("sentence_transformers")
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    embedder = SentenceTransformerEmbedder(minilm_folder())
    assert embedder.embed(["a text"], CancelScope()).shape == (1, 384)
    embedder.close()
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    assert logging.is_progress_bar_enabled() == was_enabled
