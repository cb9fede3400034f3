"""Tiny real GGUF files for tests: two layers of random weights, a whole tokenizer, under 1 MB.

llama.cpp loads and runs them, each is written in milliseconds, and equal arguments give equal
bytes. What they say is noise, so nothing here helps where an answer must make sense. Logits vary
between tokens by about 1, yet a greedy choice may flip with rounding: compare logits within a
tolerance.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from struct import pack
from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import quantize
from numpy.typing import NDArray

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Vocab = Literal["bytes", "spm"]
Weights = Literal["F32", "F16", "Q8_0", "Q4_0"]
Array = NDArray[np.float32]

_CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MERGES = (
    "Ġ t", "h e", "i n", "Ġt he", "e r", "Ġ a", "o n", "Ġ s", "l l", "Ġa n", "Ġan d", "Ġ w",
    "o r", "he ll", "hell o", "Ġw or", "l d", "Ġwor ld", "Ġ Ġ",
)  # fmt: skip
_SPM_WORDS = ("the", "and", "hello", "world", "is", "of", "to", "in")
_FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
}


def write_tiny_llama(
    path: Path,
    *,
    layers: int = 2,
    width: int = 64,
    ffn: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: Vocab = "bytes",
    weights: Weights = "F16",
    chat_template: str | None = CHATML,
    context_length: int = 512,
    name: str = "tiny",
    seed: int = 0,
    raw_bytes: bool = False,
    token_bias: Mapping[str, float] | None = None,
    tensors_per_file: int = 0,
) -> Path:
    """Write a model of the llama architecture; return the path of its (first) file.

    `vocab="bytes"` is a gpt2-style BPE with all 256 bytes, a few merges and ChatML control
    tokens; it ends with `<|im_end|>`. `vocab="spm"` is SentencePiece-style with byte fallback,
    a begin token and a space prefix; it ends with `</s>` or `<|im_end|>`.

    It speaks printable ASCII; with `raw_bytes` all its tokens are equally likely, so that most of
    what it says is not valid UTF-8. `token_bias` adds about that much to the logits of some
    tokens at every step: `{"<|im_end|>": -40}` never ends, `{"<|im_end|>": 40}` ends at once.

    `tensors_per_file` splits the model into `<stem>-00001-of-0000N.gguf` and so on.
    """
    vocabulary = _VOCABULARIES[vocab]()
    writer = GGUFWriter(path, "llama", split_max_tensors=tensors_per_file)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(10000.0)

    rng = np.random.default_rng(seed)
    bias = vocabulary.bias(token_bias or {}, raw_bytes)
    tensors = _embeddings(rng, width, bias)
    kv_width = width // heads * kv_heads
    for layer in range(layers):
        block = f"blk.{layer}."
        tensors[block + "attn_norm.weight"] = np.ones(width, np.float32)
        tensors[block + "attn_q.weight"] = _matrix(rng, width, width)
        tensors[block + "attn_k.weight"] = _matrix(rng, kv_width, width)
        tensors[block + "attn_v.weight"] = _matrix(rng, kv_width, width)
        tensors[block + "attn_output.weight"] = _into_residual(_matrix(rng, width, width))
        tensors[block + "ffn_norm.weight"] = np.ones(width, np.float32)
        tensors[block + "ffn_gate.weight"] = _matrix(rng, ffn, width)
        tensors[block + "ffn_up.weight"] = _matrix(rng, ffn, width)
        tensors[block + "ffn_down.weight"] = _into_residual(_matrix(rng, width, ffn))

    _add_general(writer, vocabulary, name, layers, width, context_length, weights, chat_template)
    return _finish(writer, path, tensors, weights)


def write_tiny_recurrent(
    path: Path,
    *,
    layers: int = 2,
    width: int = 64,
    chat_template: str | None = CHATML,
    context_length: int = 512,
    name: str = "tiny-mamba",
    seed: int = 0,
    token_bias: Mapping[str, float] | None = None,
) -> Path:
    """Write a model of the mamba architecture, whose state is no KV cache; return its path.

    The vocabulary and `token_bias` are those of `write_tiny_llama(vocab="bytes")`.
    """
    inner, state, rank, kernel = 2 * width, 16, width // 16, 4
    vocabulary = _byte_vocabulary()
    writer = GGUFWriter(path, "mamba")
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)

    rng = np.random.default_rng(seed)
    tensors = _embeddings(rng, width, vocabulary.bias(token_bias or {}))
    for layer in range(layers):
        block = f"blk.{layer}."
        tensors[block + "attn_norm.weight"] = np.ones(width, np.float32)
        tensors[block + "ssm_in.weight"] = _matrix(rng, 2 * inner, width)
        tensors[block + "ssm_conv1d.weight"] = _matrix(rng, inner, kernel)
        tensors[block + "ssm_conv1d.bias"] = np.zeros(inner, np.float32)
        tensors[block + "ssm_x.weight"] = _matrix(rng, rank + 2 * state, inner)
        tensors[block + "ssm_dt.weight"] = _matrix(rng, inner, rank)
        tensors[block + "ssm_dt.bias"] = np.zeros(inner, np.float32)
        decay = -np.arange(1, state + 1, dtype=np.float32)
        tensors[block + "ssm_a"] = np.tile(decay, (inner, 1))
        tensors[block + "ssm_d"] = np.ones(inner, np.float32)
        tensors[block + "ssm_out.weight"] = _into_residual(_matrix(rng, width, inner))

    _add_general(writer, vocabulary, name, layers, width, context_length, "F32", chat_template)
    return _finish(writer, path, tensors, "F32")


def write_tiny_windowed(
    path: Path,
    *,
    layers: int = 2,
    width: int = 64,
    ffn: int = 128,
    heads: int = 4,
    window: int = 32,
    chat_template: str | None = CHATML,
    context_length: int = 512,
    name: str = "tiny-gemma3",
    seed: int = 0,
    token_bias: Mapping[str, float] | None = None,
) -> Path:
    """Write a model of the gemma3 architecture, which looks back `window` tokens; return its path.

    The vocabulary and `token_bias` are those of `write_tiny_llama(vocab="bytes")`.
    """
    vocabulary = _byte_vocabulary()
    writer = GGUFWriter(path, "gemma3")
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_key_length(width // heads)
    writer.add_value_length(width // heads)
    writer.add_sliding_window(window)
    writer.add_rope_freq_base(10000.0)

    rng = np.random.default_rng(seed)
    tensors = _embeddings(rng, width, vocabulary.bias(token_bias or {}))
    for layer in range(layers):
        block = f"blk.{layer}."
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            tensors[block + norm + ".weight"] = np.ones(width, np.float32)
        for norm in ("attn_q_norm", "attn_k_norm"):
            tensors[block + norm + ".weight"] = np.ones(width // heads, np.float32)
        for matrix in ("attn_q", "attn_k", "attn_v"):
            tensors[block + matrix + ".weight"] = _matrix(rng, width, width)
        tensors[block + "attn_output.weight"] = _into_residual(_matrix(rng, width, width))
        tensors[block + "ffn_gate.weight"] = _matrix(rng, ffn, width)
        tensors[block + "ffn_up.weight"] = _matrix(rng, ffn, width)
        tensors[block + "ffn_down.weight"] = _into_residual(_matrix(rng, width, ffn))

    _add_general(writer, vocabulary, name, layers, width, context_length, "F16", chat_template)
    return _finish(writer, path, tensors, "F16")


def broken_files(good: bytes) -> dict[str, bytes]:
    """Ways in which a GGUF file goes bad, made from a good tiny one."""

    def patched(offset: int, replacement: bytes) -> bytes:
        return good[:offset] + replacement + good[offset + len(replacement) :]

    return {
        "empty": b"",
        "20 bytes": good[:20],
        "50 bytes": good[:50],
        "truncated header": good[:3000],
        "truncated data": good[:-1000],
        "web page": b"<!DOCTYPE html><html><body>Sign in to continue</body></html>",
        "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "wrong magic": patched(0, b"GGML"),
        "version 1": patched(4, pack("<I", 1)),
        "version 4": patched(4, pack("<I", 4)),
        "big endian": patched(4, pack(">I", 3)),
        "absurd tensor count": patched(8, pack("<Q", 2**60)),
        "absurd key count": patched(16, pack("<Q", 2**61)),
        "huge string": patched(24, pack("<Q", 2**62)),
    }


@dataclass
class _Vocabulary:
    """Tokens in the order of their ids, and the metadata that goes with them."""

    model: Literal["gpt2", "llama"]
    bos: str
    eos: str
    merges: tuple[str, ...] = ()
    tokens: dict[str, TokenType] = field(default_factory=dict)

    def add(self, token: str, kind: TokenType = TokenType.NORMAL) -> None:
        self.tokens.setdefault(token, kind)

    def bias(self, token_bias: Mapping[str, float], raw_bytes: bool = False) -> Array:
        """What is added to the logit of each token."""
        chosen = dict.fromkeys(self.tokens, 0.0)
        if not raw_bytes:
            chosen |= {token: -30.0 for token in self.tokens if not self._is_text(token)}
        chosen |= token_bias
        return np.array([chosen[token] for token in self.tokens], np.float32)

    def _is_text(self, token: str) -> bool:
        letters = token.replace("Ġ", " ").replace("▁", " ")
        is_piece = self.tokens[token] == TokenType.NORMAL and letters.isascii()
        return is_piece or token in (self.eos, "<|im_end|>")

    def write(self, writer: GGUFWriter) -> None:
        ids = {token: index for index, token in enumerate(self.tokens)}
        writer.add_tokenizer_model(self.model)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.tokens.values()))
        if self.model == "gpt2":
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_merges(list(self.merges))
        else:
            writer.add_token_scores([-float(index) for index in ids.values()])
            writer.add_unk_token_id(ids["<unk>"])
        writer.add_bos_token_id(ids[self.bos])
        writer.add_eos_token_id(ids[self.eos])
        writer.add_eot_token_id(ids["<|im_end|>"])
        writer.add_add_bos_token(self.model == "llama")
        writer.add_add_space_prefix(self.model == "llama")


def _byte_vocabulary() -> _Vocabulary:
    vocabulary = _Vocabulary("gpt2", bos="<|im_start|>", eos="<|im_end|>", merges=_MERGES)
    for token in _CONTROL_TOKENS:
        vocabulary.add(token, TokenType.CONTROL)
    for letter in _gpt2_letters():
        vocabulary.add(letter)
    for merge in _MERGES:
        vocabulary.add(merge.replace(" ", ""))
    return vocabulary


def _gpt2_letters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself, or else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def _spm_vocabulary() -> _Vocabulary:
    vocabulary = _Vocabulary("llama", bos="<s>", eos="</s>")
    vocabulary.add("<unk>", TokenType.UNKNOWN)
    for token in ("<s>", "</s>", *_CONTROL_TOKENS):
        vocabulary.add(token, TokenType.CONTROL)
    for byte in range(256):
        vocabulary.add(f"<0x{byte:02X}>", TokenType.BYTE)
    # A piece is reached by merging its prefixes one letter at a time, so all of them are there.
    for word in _SPM_WORDS:
        for length in range(len(word), 0, -1):
            vocabulary.add("▁" + word[:length])
    for letter in ("▁", *map(chr, range(0x21, 0x7F))):
        vocabulary.add(letter)
    return vocabulary


_VOCABULARIES = {"bytes": _byte_vocabulary, "spm": _spm_vocabulary}


def _matrix(rng: np.random.Generator, n_out: int, n_in: int) -> Array:
    return rng.standard_normal((n_out, n_in), dtype=np.float32) / np.float32(np.sqrt(n_in))


def _embeddings(rng: np.random.Generator, width: int, bias: Array) -> dict[str, Array]:
    """Channel 0 of the residual stream is a constant; the output layer turns it into the bias."""
    embedding = rng.standard_normal((len(bias), width), dtype=np.float32)
    embedding[:, 0] = 2.0
    output = _matrix(rng, len(bias), width)
    output[:, 0] = bias
    return {
        "token_embd.weight": embedding,
        "output_norm.weight": np.ones(width, np.float32),
        "output.weight": output,
    }


def _into_residual(matrix: Array) -> Array:
    matrix[0] = 0.0
    return matrix


def _add_general(
    writer: GGUFWriter,
    vocabulary: _Vocabulary,
    name: str,
    layers: int,
    width: int,
    context_length: int,
    weights: Weights,
    chat_template: str | None,
) -> None:
    writer.add_name(name)
    writer.add_version("1.0")
    writer.add_license("apache-2.0")
    writer.add_file_type(_FILE_TYPES[weights])
    writer.add_block_count(layers)
    writer.add_embedding_length(width)
    writer.add_context_length(context_length)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary.tokens))
    vocabulary.write(writer)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _finish(writer: GGUFWriter, path: Path, tensors: dict[str, Array], weights: Weights) -> Path:
    for name, tensor in tensors.items():
        kind = GGMLQuantizationType[weights if tensor.ndim > 1 else "F32"]
        writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
    first = writer.format_shard_names(path)[0]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return first
