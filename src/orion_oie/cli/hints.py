"""The messages of the library in the words of the command line. Pure.

The library tells a programmer what to change: a setting of `EngineConfig`, or an argument. Who uses
the command line needs the option. The tables here are all there is of that.
"""

import re

from orion_oie.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    OrionError,
    RegistryError,
    UnknownAgentError,
)

SETTINGS = {
    "download.auto": "--auto-download",
    "download.bytes_per_s": "--limit-mb-per-s",
    "download.cache_dir": "--cache-dir",
    "download.connections": "--connections",
    "embeddings.model": "--embedding-model",
    "router.weights": "--weights",
    "serving.context_length": "--context-length",
}
"""The option of each setting that has one."""

ARGUMENTS = {
    "agent": "--agent",
    "cache_dir": "--cache-dir",
    "context_length": "--context-length",
    "deadline": "--deadline",
    "grammar": "--grammar",
    "images": "--image",
    "json_schema": "--json-schema",
    "logprobs": "--logprobs",
    "max_tokens": "--max-tokens",
    "min_p": "--min-p",
    "prompt_format": "--prompt-format",
    "repeat_penalty": "--repeat-penalty",
    "seed": "--seed",
    "stop": "--stop",
    "system_prompt": "--system",
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
}
"""The option of each argument of a call."""

_PHRASES = {
    "set EngineConfig.download.auto": "add --auto-download",
    "EngineConfig.embeddings.model to": "--embedding-model to",
    "allow more time or ask for fewer tokens (max_tokens)": (
        "allow more time with --deadline, or ask for fewer tokens with --max-tokens"
    ),
    "a smaller variant or context_length, raise EngineConfig.memory.budget, or unpin": (
        "a smaller model (-m) or a smaller --context-length"
    ),
    "shorten the question or the history, lower max_tokens": "shorten the text, lower --max-tokens",
    'pass on_overflow="drop_oldest", or': "or",
    "ask without images=, or look at engine.plan() for the route alone": (
        "ask without --image, or look at 'orion-oie route --image 1' for the agent alone"
    ),
    "with prompt_format='plain', or set": "with --prompt-format plain, or set",
    "model= is for a GGUF file": "-m is for a GGUF file",
    "could, but EngineConfig.stand_in is 'error'": "could, but --no-stand-in was given",
    "json_schema and grammar exclude each other: pass one of them": (
        "--json-schema and --grammar exclude each other: give one of them"
    ),
}

_CALLS = (
    (re.compile(r"OrionInferenceEngine\(model='([^']*)'\)"), r"-m \1"),
    (re.compile(r"OrionInferenceEngine\('([^']*)'\)"), r"--registry \1"),
)
"""Engines that a message says to make, and the options that do so."""

_WITHOUT_OPTION = re.compile(r"(?:,? or|;) (?:set|raise|lower) EngineConfig[\w.]+")
_REGISTRY = re.compile(r"a registry is passed as OrionInferenceEngine\('(.*?)'\)")
_SETTING = re.compile(r"EngineConfig\.(\w+\.\w+)")
_ARGUMENT = re.compile(
    rf"(?<![\w/.'\"-])({'|'.join(name for name in ARGUMENTS if '_' in name)})(?![\w/.'\"-])=?"
)
_PLAIN_WORD = re.compile(r"(images|grammar)(?:\[\d+\])?(?=[:, ])")
"""Arguments that are words as well: meant only at the start of a message."""


def message_of(error: OrionError) -> str:
    """The message of an error, for somebody at the command line."""
    if isinstance(error, RegistryError):
        return error.message  # its keys are those of the file, not options
    problems = error.details.get("problems")
    if isinstance(error, InvalidRequestError) and problems:
        return "; ".join(_problem(problem) for problem in problems)
    text = in_options(error.message)
    if isinstance(error, UnknownAgentError):
        return f"--agent: {text}"
    if isinstance(error, ModelNotFoundError):
        agent_id, model_id = error.details.get("agent_id"), error.details.get("model_id")
        if agent_id and model_id:  # the model of the agent may be that of --model
            text = text.replace(f"orion-oie pull {agent_id}'", f"orion-oie pull {model_id}'")
        if text.startswith(("there is no agent", "there is no model")) and ";" not in text:
            text += "; 'orion-oie models' and 'orion-oie agents' list them"
    return text


def in_options(text: str) -> str:
    """A text of the library with the options in place of settings and arguments. Settings without
    an option are left out, where the text offers something else."""
    for phrase, said in _PHRASES.items():
        text = text.replace(phrase, said)
    for call, option in _CALLS:
        text = call.sub(option, text)
    text = _REGISTRY.sub(r"a registry is named with --registry \1", text)
    text = _SETTING.sub(lambda found: SETTINGS.get(found[1], found[0]), text)
    text = _WITHOUT_OPTION.sub("", text)
    if found := _PLAIN_WORD.match(text):
        text = ARGUMENTS[found[1]] + text[found.end() :]
    return _ARGUMENT.sub(lambda found: ARGUMENTS[found[1]], text)


def _problem(text: str) -> str:
    """A line on a field with a wrong value, such as "serving.slots: ..."."""
    name, colon, rest = text.partition(":")
    field = re.sub(r"\.\d+$", "", name)
    option = SETTINGS.get(field) or ARGUMENTS.get(field)
    return f"{option}{colon}{rest}" if option else text
