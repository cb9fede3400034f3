"""The model that benchmarks ask: SmolLM2, or a tiny one where only is seen that they run.

Not a benchmark itself.
"""

import sys
from pathlib import Path

from _random_model import registry_of, smollm2_path

from orion_oie import ModelRegistry

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import write_tiny_llama

AGENT = "conversation"
MODEL = "smollm2-135m-instruct"


def model_file(folder: Path, *, is_smoke: bool) -> Path:
    """The file of SmolLM2; in a smoke run that of a tiny model, written into the folder."""
    if not is_smoke:
        return smollm2_path()
    path = folder / "smoke.gguf"
    endless = {"<|im_end|>": -40.0}
    return write_tiny_llama(path, weights="Q4_0", context_length=8192, token_bias=endless)


def agent_and_file(folder: Path, *, is_smoke: bool) -> tuple[ModelRegistry, Path]:
    """A registry with the agent, and the file of the model that answers."""
    if is_smoke:
        file = model_file(folder, is_smoke=True)
        return registry_of({AGENT: file}, folder), file
    registry = ModelRegistry.packaged()
    choice = next(c for c in registry.resolve(AGENT) if c.model_id == MODEL)
    assert choice.files is not None
    return registry, choice.files[0]
