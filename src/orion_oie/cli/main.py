"""The command line: parses, calls the library, prints. Holds no logic.

Answers and lists go to the standard output, everything else to the standard error. Exit statuses:
0, 1 when the library refused or found something wrong, 2 for wrong usage, 130 after Ctrl-C.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from orion_oie import (
    EngineConfig,
    InferenceResult,
    ModelNotFoundError,
    ModelRegistry,
    OrionError,
    OrionInferenceEngine,
    __version__,
)
from orion_oie.backends.llama.host.devices import probe_devices
from orion_oie.cli.compatibility import (
    compatibility,
    report_lines,
)
from orion_oie.cli.console import (
    cache_place,
    print_json,
    print_table,
    printable,
    registry_place,
)
from orion_oie.cli.route import route
from orion_oie.cli.train import (
    evaluate,
    export_weights,
    train,
)
from orion_oie.engine import lifecycle
from orion_oie.hardware.machine import (
    detect,
    find_gpus,
)
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.formats.gguf import (
    GGUFHeader,
    TensorInfo,
    read_header,
)
from orion_oie.models.inventory import (
    Entry,
    fetched_files,
    inventory,
)
from orion_oie.schemas.units import size_text
from orion_oie.telemetry import event_docs
from orion_oie.telemetry.progress import LoadDisplay

_Command = TypeVar("_Command", bound=Callable[..., None])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    try:
        status = commands.main(argv, prog_name="orion-oie", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except SystemExit as ended:  # click has seen to a reader who went away
        return ended.code if isinstance(ended.code, int) else 1
    except OrionError as error:
        click.echo(f"error: {printable(error.message)}", err=True)
        return 1
    except OSError as error:
        click.echo(f"error: {printable(str(error))}", err=True)
        return 1
    return status if isinstance(status, int) else 0


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(version)s")
def commands() -> None:
    """Answers from local language models: fetch models, look at them, ask them."""


commands.add_command(route)
for command in (train, evaluate, export_weights):
    route.add_command(command)


def _places(command: _Command) -> _Command:
    """The options that say which models there are, and where fetched ones lie."""
    return registry_place(cache_place(command))


def _registry(path: Path | None) -> ModelRegistry:
    return ModelRegistry.packaged() if path is None else ModelRegistry.load(path)


# -- texts of the library


@commands.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
def schema(file: Path | None) -> None:
    """Write the JSON Schema of models.json.

    Goes to FILE or the standard output.
    """
    _write(json.dumps(ModelRegistry.json_schema(), indent=2) + "\n", file)


@commands.command("lifecycle")
@click.argument("file", type=click.Path(path_type=Path), required=False)
def write_lifecycle(file: Path | None) -> None:
    """Write the states of a request, as Markdown.

    Goes to FILE or the standard output.
    """
    _write(lifecycle.document(), file)


@commands.command("events")
@click.argument("file", type=click.Path(path_type=Path), required=False)
def write_events(file: Path | None) -> None:
    """Write the catalogue of events, as Markdown.

    Goes to FILE or the standard output.
    """
    _write(event_docs.document(), file)


def _write(text: str, file: Path | None) -> None:
    if file is None:
        click.echo(text, nl=False)
    else:
        file.write_text(text, encoding="utf-8")


# -- fetching


@commands.command()
@click.argument("names", nargs=-1, required=True, metavar="AGENT|MODEL[@VARIANT]...")
@click.option("--limit-mb-per-s", type=float, metavar="X", help="at most 10^6 bytes a second")
@click.option("--connections", type=int, metavar="N", help="how many at once; default: 4")
@_places
def pull(
    names: Sequence[str],
    limit_mb_per_s: float | None,
    connections: int | None,
    registry: Path | None,
    cache_dir: Path | None,
) -> None:
    """Fetch models that are not here; print where their files lie.

    NAME is an agent (its primary model), a model (its first variant), or MODEL@VARIANT. What
    arrived is kept when the command ends early, and the next one goes on from there.
    """
    limit = None if limit_mb_per_s is None else limit_mb_per_s * 1e6
    download = _given(bytes_per_s=limit, connections=connections)
    files: list[Path] = []
    with LoadDisplay() as display, _engine(registry, cache_dir, download=download) as engine:
        engine.subscribe(display.show)
        for name in names:
            engine.registry.find_source(name)  # the last name is wrong before the first is fetched
        for name in names:
            files += engine.pull(name)
    for file in files:
        click.echo(file)


def _engine(
    registry: Path | None,
    cache_dir: Path | None,
    *,
    download: Mapping[str, Any],
    loading: Mapping[str, Any] | None = None,
) -> OrionInferenceEngine:
    """An engine for one command: nobody asks a second question."""
    sections: dict[str, Any] = {
        "serving": {"slots": 1},
        "loading": {"keep_spare_worker": False, **(loading or {})},
        "download": {"cache_dir": cache_dir, **download},
    }
    return OrionInferenceEngine(registry, EngineConfig(**sections))


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


# -- asking


@commands.command()
@click.argument("question")
@click.option("--agent", metavar="A", help="who answers; default: whom the question suits")
@click.option("--max-tokens", type=int, metavar="N", help="longest answer")
@click.option("--temperature", type=float, metavar="T", help="0 always says the likeliest")
@click.option("--seed", type=int, metavar="N", help="what chance draws from; default: a new one")
@click.option("--system", metavar="TEXT", help="replaces the agent's system prompt")
@click.option("--auto-download", is_flag=True, help="fetch models that are not here")
@click.option("--sequential", is_flag=True, help="compute nothing before the whole model is here")
@_places
def run(
    question: str,
    agent: str | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    system: str | None,
    auto_download: bool,
    sequential: bool,
    registry: Path | None,
    cache_dir: Path | None,
) -> None:
    """Answer QUESTION; "-" reads it from the standard input."""
    if question == "-":
        question = sys.stdin.read()
    options = _given(
        agent=agent,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        system_prompt=system,
    )
    download = {"auto": auto_download}
    loading = {
        "strategy": "sequential" if sequential else "progressive",
        "stand_in": False,  # nobody asks a second question that the full model could answer
    }
    with (
        LoadDisplay() as display,
        _engine(registry, cache_dir, download=download, loading=loading) as engine,
    ):
        engine.subscribe(display.show)
        with engine.stream(question, **options) as handle:
            try:
                for event in handle:
                    display.close()  # the terminal belongs to the answer now
                    click.echo(event.text, nl=False)
            finally:
                if handle.text and not handle.text.endswith("\n"):
                    click.echo()
        result = handle.result()
    for note in _notes(result):
        click.echo(f"note: {printable(note)}", err=True)
    click.echo(_account(result), err=True)


def _notes(result: InferenceResult) -> Iterator[str]:
    """Why another model answered than the one that is meant to."""
    for skipped in result.receipt.considered:
        if skipped.outcome == "unavailable" and skipped.role == "primary":
            yield (
                f"{skipped.model_id} is not on this machine, {result.model_id} stood in; fetch it "
                f"with 'orion-oie pull {skipped.agent_id}' or --auto-download"
            )
        elif skipped.error is not None:
            yield f"{skipped.model_id} did not answer: {skipped.error}"


def _account(result: InferenceResult) -> str:
    timings, usage = result.timings, result.usage
    parts = [
        result.agent_id,
        f"{result.model_id}@{result.variant}",
        f"load {timings.load_ms:.0f} ms",
        f"first token {timings.ttft_ms or 0:.0f} ms",
        f"{timings.tokens_per_second or 0:.1f} tokens/s",
        f"total {timings.total_ms:.0f} ms",
        f"tokens {usage.prompt_tokens} in ({usage.cached_tokens} cached), "
        f"{usage.completion_tokens} out",
    ]
    return ", ".join(parts)


# -- models on this machine


@commands.group(invoke_without_command=True)
@click.option("--json", "is_json", is_flag=True, help="as JSON")
@_places
@click.pass_context
def models(
    context: click.Context, is_json: bool, registry: Path | None, cache_dir: Path | None
) -> None:
    """List the models of the registry, and what else was fetched."""
    if context.invoked_subcommand is not None:
        places = {"registry": registry, "cache_dir": cache_dir}
        context.default_map = dict.fromkeys(("rm", "verify", "prune"), places)
        return
    entries = inventory(_registry(registry), ModelCache(cache_dir))
    if is_json:
        print_json([_entry_facts(entry) for entry in entries])
    else:
        head = ["model", "size", "state", "last used", "where"]
        print_table(head, [_cells(entry) for entry in entries])


@models.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="AGENT|MODEL[@VARIANT]...")
@_places
def remove(names: Sequence[str], registry: Path | None, cache_dir: Path | None) -> None:
    """Remove what was fetched of models, and what is known of it.

    A model without a variant stands for all its variants; a file of no model goes by the name
    that `models` shows.
    """
    cache = ModelCache(cache_dir)
    for key, paths in fetched_files(_registry(registry), cache, names):
        click.echo(f"{key}: {size_text(cache.remove_files(paths))} removed")


@models.command()
@click.argument("names", nargs=-1, metavar="[AGENT|MODEL[@VARIANT]]...")
@_places
@click.pass_context
def verify(
    context: click.Context, names: Sequence[str], registry: Path | None, cache_dir: Path | None
) -> None:
    """Hash fetched files again and compare; by default all of them."""
    cache = ModelCache(cache_dir)
    paths = None
    if names:
        named = fetched_files(_registry(registry), cache, names)
        paths = [path for _, of_one in named for path in of_one if path.exists()]
        if not paths:
            raise ModelNotFoundError(f"nothing of {', '.join(names)} was fetched as a whole")
    is_right = True
    for found in cache.verify(paths):
        is_right = is_right and found.is_right
        word = "unknown" if found.expected is None else "right" if found.is_right else "WRONG"
        click.echo(f"{word}  {found.sha256}  {found.path}")
    context.exit(0 if is_right else 1)


@models.command()
@click.option("--keep-gb", type=float, metavar="X", help="also the longest unused, down to X GB")
@cache_place
def prune(keep_gb: float | None, cache_dir: Path | None) -> None:
    """Remove what was left half-fetched."""
    for file in ModelCache(cache_dir).prune(None if keep_gb is None else int(keep_gb * 1e9)):
        click.echo(f"{file.path}: {size_text(file.arrived_bytes)} removed")


def _cells(entry: Entry) -> list[str]:
    percent = f" {100 * entry.arrived_bytes / max(1, entry.size_bytes):.0f} %"
    return [
        entry.name,
        size_text(entry.size_bytes),
        entry.state + (percent if entry.state == "partial" else ""),
        "-" if entry.last_used is None else _date(entry.last_used).isoformat(" ", "minutes"),
        entry.where,
    ]


def _entry_facts(entry: Entry) -> dict[str, object]:
    used = None if entry.last_used is None else _date(entry.last_used).isoformat(" ", "seconds")
    return {**asdict(entry), "last_used": used}


# -- this machine


@commands.command()
@click.option("--json", "is_json", is_flag=True, help="as JSON")
@registry_place
@click.pass_context
def hardware(context: click.Context, is_json: bool, registry: Path | None) -> None:
    """Say what this machine offers, what llama.cpp makes of it, and which models suit it.

    Has status 1 when llama.cpp does not work here.
    """
    recommendations = _registry(registry).data.recommendations
    llama = probe_devices()
    report = compatibility(detect(llama.devices), llama, find_gpus(), recommendations)
    if is_json:
        print_json(report.model_dump(mode="json"))
    else:
        for line in report_lines(report):
            click.echo(printable(line))
    context.exit(0 if llama.is_working else 1)


# -- making a file


@commands.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT.gguf")
@click.option(
    "--type",
    "quantization",
    type=click.Choice(["f32", "f16", "q8_0"]),
    default="f16",
    show_default=True,
    help="of the matrices",
)
def convert(folder: Path, out: Path, quantization: Literal["f32", "f16", "q8_0"]) -> None:
    """Make a GGUF file of the embedding model in FOLDER, so that it embeds without torch.

    FOLDER is one of sentence-transformers with a BERT model. Prints what to write into models.json.
    """
    # It imports numpy, which most commands do without.
    from orion_oie.foundry.bert_gguf import write_bert_gguf

    header = read_header(write_bert_gguf(folder, out, quantization=quantization))
    click.echo(f"{out}: {size_text(header.file_size)}; in models.json, it is:", err=True)
    print_json({"models": {out.stem: _registry_entry(header, out)}})


def _registry_entry(header: GGUFHeader, file: Path) -> Mapping[str, Any]:
    size_gb = header.file_size / 1e9
    variant = {
        "quantization": header.quantization,
        "size_mb": round(size_gb * 1e3, 1),
        "min_ram_gb": round(size_gb + 0.15, 1),
        "source": {"path": str(file.resolve())},
    }
    return {
        "name": header.name,
        "type": "embedding",
        "license": header.license or "unknown",
        "context_length": header.context_length,
        "variants": {header.quantization.lower(): variant},
    }


# -- looking into a file


@commands.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.gguf")
@click.option("--template", "wants_template", is_flag=True, help="print the chat template")
@click.option("--tensors", "wants_tensors", is_flag=True, help="list the tensors")
@click.option("--json", "is_json", is_flag=True, help="as JSON")
def inspect(file: Path, wants_template: bool, wants_tensors: bool, is_json: bool) -> None:
    """Say what a GGUF file is, from its header alone."""
    header = read_header(file)
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
        print_table(["tensor", "type", "shape", "bytes"], cells)


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


def _date(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds)
