"""`orion-oie convert` and `orion-oie inspect`: make a GGUF file, look into one.

Parses, calls the library, prints.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import click

from orion_oie.cli.console import print_json, print_note, print_table, printable
from orion_oie.models.formats.gguf import GGUFHeader, TensorInfo, read_header
from orion_oie.models.naming import entry_of
from orion_oie.models.split_files import check_gguf_file
from orion_oie.schemas.units import size_text


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT.gguf")
@click.option(
    "--type",
    "quantization",
    type=click.Choice(["f32", "f16", "q8_0"]),
    default="f16",
    show_default=True,
    help="how its matrices are stored; q8_0 is the smallest",
)
def convert(folder: Path, out: Path, quantization: Literal["f32", "f16", "q8_0"]) -> None:
    """Convert an embedding model to a GGUF file.

    The file works without torch. FOLDER is one of sentence-transformers with a BERT model. Prints
    a models.json that adds it to the packaged models, ready to be used as it is.
    """
    # This imports numpy, which most commands do not need.
    from orion_oie.foundry.bert_gguf import write_bert_gguf

    header = read_header(write_bert_gguf(folder, out, quantization=quantization))
    print_note(f"{out}: {size_text(header.file_size)}; a models.json with it:")
    print_json(entry_of(out))


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.gguf")
@click.option(
    "--template", "wants_template", is_flag=True, help="print the chat template and nothing else"
)
@click.option("--tensors", "wants_tensors", is_flag=True, help="list the tensors as well")
@click.option(
    "--entry",
    "wants_entry",
    is_flag=True,
    help="print a models.json that adds it to the packaged models, and nothing else",
)
@click.option("--json", "is_json", is_flag=True, help="print it as JSON, for programs")
def inspect(
    file: Path, wants_template: bool, wants_tensors: bool, wants_entry: bool, is_json: bool
) -> None:
    """Describe a model file: architecture, size, quantization, licence.

    Only the header of the GGUF file is read.
    """
    if wants_entry:
        entry = entry_of(file)
        print_json(entry)
        (name,) = entry["models"]
        print_note(f"note: with --registry and that file, -m {name} answers with it")
        return
    header = check_gguf_file(file)
    facts = _facts(header)
    if is_json:
        if wants_template:
            facts["chat_template_text"] = header.chat_template
        if wants_tensors:
            facts["tensor_list"] = [_tensor_facts(tensor) for tensor in header.tensors]
        print_json(facts)
    elif wants_template:
        click.echo(printable(header.chat_template or ""))
    else:
        for name, value in facts.items():
            click.echo(f"{name.replace('_', ' '):20}{printable(_fact_text(name, value))}")
    if wants_tensors and not is_json:
        click.echo()
        cells = [[str(value) for value in _tensor_facts(t).values()] for t in header.tensors]
        print_table(["tensor", "type", "shape", "bytes"], cells, numbers=(3,))


def _facts(header: GGUFHeader) -> dict[str, Any]:
    splits = {
        key: value
        for key, value in header.metadata.items()
        if key.startswith("split.") and isinstance(value, int)
    }
    return {
        "architecture": header.architecture,
        "name": header.name,
        "version": header.model_version,
        "license": header.license,
        "parameters": header.parameter_count,
        "quantization": header.quantization,
        "context_length": header.context_length,
        "layers": header.block_count,
        "embedding_length": header.embedding_length,
        "tensors": len(header.tensors),
        "file_bytes": header.file_size,
        "chat_template": header.chat_template is not None,
        **splits,
    }


def _fact_text(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "parameters" and isinstance(value, int):
        short = f"{value / 1e9:.1f} B" if value >= 1e9 else f"{value / 1e6:.1f} M"
        return f"{value:,} ({short})"
    if name == "file_bytes" and isinstance(value, int):
        return f"{value:,} ({size_text(value)})"
    return str(value) or "-"


def _tensor_facts(tensor: TensorInfo) -> Mapping[str, Any]:
    return {
        "name": tensor.name,
        "type": tensor.type_name,
        "shape": list(tensor.shape),
        "bytes": tensor.n_bytes,
    }
