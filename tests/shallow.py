"""A real model with its first layers alone: its tokenizer, shapes and quantization, so that the
same kernels of llama.cpp compute it, in a fraction of the time. What it says makes no sense."""

from pathlib import Path
from struct import pack

from orion_oie.models.formats.gguf import TensorInfo, read_header


def write_shallow(source: Path, path: Path, layers: int) -> Path:
    """Write so many layers of a llama model; return the path."""
    header, content = read_header(source), source.read_bytes()
    known = header.metadata["llama.block_count"]
    begin = min(content.index(_named(tensor)) for tensor in header.tensors)
    key = b"llama.block_count" + pack("<I", 4)
    metadata = content[24:begin].replace(key + pack("<I", known), key + pack("<I", layers))
    kept = [tensor for tensor in header.tensors if _layer_of(tensor) < layers]
    table, data, placed = b"", [], 0
    for tensor in kept:
        lengths = b"".join(pack("<Q", length) for length in tensor.shape)
        kind = pack("<IQ", tensor.type_id, placed)
        table += _named(tensor) + pack("<I", len(tensor.shape)) + lengths + kind
        data.append(
            _aligned(content[tensor.offset : tensor.offset + tensor.n_bytes], header.alignment)
        )
        placed += len(data[-1])
    start = content[:8] + pack("<QQ", len(kept), len(header.metadata)) + metadata + table
    path.write_bytes(_aligned(start, header.alignment) + b"".join(data))
    return path


def _named(tensor: TensorInfo) -> bytes:
    """How its entry in the table of tensors begins."""
    return pack("<Q", len(tensor.name)) + tensor.name.encode()


def _layer_of(tensor: TensorInfo) -> int:
    """The number of its layer; -1 outside of all layers."""
    return int(tensor.name.split(".")[1]) if tensor.name.startswith("blk.") else -1


def _aligned(content: bytes, alignment: int) -> bytes:
    return content + bytes(-len(content) % alignment)
