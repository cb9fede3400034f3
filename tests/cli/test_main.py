"""`python -m orion_oie`: what it prints is what the library says."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
from helpers import wait_until
from internals import set_known_devices
from shops import Shop
from tiny import CHATML, write_tiny_llama

from orion_oie import (
    ModelRegistry,
    OrionError,
    OrionInferenceEngine,
    __version__,
)
from orion_oie.cancellation import CancelScope
from orion_oie.cli.compatibility import CompatibilityReport
from orion_oie.cli.main import SECTIONS, commands, main
from orion_oie.cli.places import Places
from orion_oie.config import DownloadConfig
from orion_oie.engine import lifecycle
from orion_oie.errors import RequestCancelledError
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.formats.gguf import read_header
from orion_oie.telemetry import event_docs

COMMAND = [sys.executable, "-m", "orion_oie"]
Capture = pytest.CaptureFixture[str]


def fetch_half(shop: Shop, shop_cache: ModelCache) -> None:
    """Leave tiny@f32 half-fetched."""
    scope = CancelScope()
    found = ModelRegistry.load(shop.registry).find_source("tiny")[2]
    config = DownloadConfig(connections=1, bytes_per_s=2e6)

    def stop(_download: object) -> None:
        if shop_cache.arrived(found)[0] > 0:
            scope.cancel(RequestCancelledError("enough"))

    with pytest.raises(RequestCancelledError):
        shop_cache.pull(found, config, scope, stop)
    assert shop_cache.find(found) is None
    names = {"orion-fetch", "orion-hash"}
    wait_until(lambda: not names & {thread.name for thread in threading.enumerate()})


# -- texts of the library


def test_schema_is_printed(capsys: Capture) -> None:
    """`schema` prints the JSON Schema of models.json."""
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == ModelRegistry.json_schema()


def test_schema_is_written(tmp_path: Path) -> None:
    """`schema FILE` writes it."""
    assert main(["schema", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == ModelRegistry.json_schema()


def test_lifecycle_is_printed(capsys: Capture) -> None:
    """`lifecycle` prints docs/lifecycle.md."""
    assert main(["lifecycle"]) == 0
    assert capsys.readouterr().out == lifecycle.document()


def test_lifecycle_is_written(tmp_path: Path) -> None:
    """`lifecycle FILE` writes it."""
    assert main(["lifecycle", str(tmp_path / "l.md")]) == 0
    assert (tmp_path / "l.md").read_text() == lifecycle.document()


def test_events_are_printed_and_written(tmp_path: Path, capsys: Capture) -> None:
    """`events` prints docs/events.md; `events FILE` writes it."""
    assert main(["events"]) == 0
    assert capsys.readouterr().out == event_docs.document()
    assert main(["events", str(tmp_path / "e.md")]) == 0
    assert (tmp_path / "e.md").read_text() == event_docs.document()


# -- how it is run


def test_it_runs_as_a_module() -> None:
    """The module can be run, and an unknown command is refused with status 2."""
    version = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.strip() == __version__
    assert subprocess.run([*COMMAND, "nonsense"], capture_output=True, check=False).returncode == 2


def test_it_has_an_entry_point() -> None:
    """The package declares the command `orion-oie`, which is `main`."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    module, _, function = tomllib.loads(text)["project"]["scripts"]["orion-oie"].partition(":")
    assert getattr(sys.modules[module], function) is main


def test_it_starts_without_heavy_packages() -> None:
    """Importing the command line imports neither llama.cpp nor what only some commands need."""
    heavy = ["llama_cpp", "httpx", "rich", "huggingface_hub"]
    heavy += ["orion_oie.engine.build", "orion_oie.engine.request", "orion_oie.engine.chat"]
    script = (
        f"import sys, orion_oie.cli.main; print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["run"],
        ["run", "?", "--seed", "x"],
        ["pull"],
        ["pull", "--limit-mb-per-s", "2"],
        ["inspect", "--what"],
        ["models", "x"],
    ],
    ids=" ".join,
)
def test_wrong_usage_has_status_2(arguments: list[str], capsys: Capture) -> None:
    """What cannot be parsed is explained on the standard error."""
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Usage: orion-oie" in shown.err
    assert "Error: " in shown.err


LISTED = [name for names in SECTIONS.values() for name in names]


@pytest.mark.parametrize("command", [*LISTED, "models list", "models rm", "models verify"])
def test_each_command_has_help(command: str, capsys: Capture) -> None:
    """`COMMAND --help` explains it, and begins with a sentence that is short enough for a list."""
    assert main([*command.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"Usage: orion-oie {command}")
    first = next(
        line.strip() for line in lines[1:] if line.startswith("  ") and "orion" not in line
    )
    assert first[0].isupper()
    assert first.endswith(".")
    assert len(first) <= 76


@pytest.mark.parametrize("command", ["run", "pull", "models", "chat"])
def test_the_help_has_examples(command: str, capsys: Capture) -> None:
    """One a line, as somebody would type them."""
    assert main([command, "--help"]) == 0
    _, _, examples = capsys.readouterr().out.partition("  Examples:\n")
    assert examples.startswith("    orion-oie ")
    assert max(map(len, examples.splitlines())) <= 80


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=str)
def test_the_help_lists_all_commands_by_task(arguments: list[str], capsys: Capture) -> None:
    """Each once; without any command, it is what is shown."""
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    names = [line.strip() for line in shown.out.splitlines()]
    for title, commands_of_it in SECTIONS.items():
        assert f"{title}:" in names
        for name in commands_of_it:
            assert sum(line.startswith(f"{name}  ") for line in names) == 1
    assert set(commands.commands) == {name for name in LISTED if " " not in name}


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["rout"], "did you mean 'route'?"),
        (["modles"], "did you mean 'models'?"),
        (["models", "verfy"], "did you mean 'verify'?"),
        (["run", "?", "--temprature", "0"], "'--temperature'"),
        (["models", "list", "--jsn"], "'--json'"),
        (["Why is the sky blue?"], 'orion-oie run "Why is'),
        (["why", "is", "the", "sky", "blue"], 'orion-oie run "Why is'),
    ],
    ids=str,
)
def test_a_misspelled_name_gets_the_right_one(
    arguments: list[str], hint: str, capsys: Capture
) -> None:
    """Commands, commands of commands, and options; a question gets its command."""
    assert main(arguments) == 2
    assert hint in capsys.readouterr().err


def test_what_the_library_refuses_is_one_line(capsys: Capture) -> None:
    """An error of the library is a line on the standard error, and status 1."""
    assert main(["models", "--registry", "/nowhere/models.json"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"error: there is no registry /nowhere/models.json\n", shown.err)


def test_what_the_system_refuses_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    """So is an error of the file system."""
    assert main(["schema", str(tmp_path)]) == 1
    assert re.fullmatch(r"error: .*Is a directory.*\n", capsys.readouterr().err)


def test_errors_do_not_act_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """What a server or a file put into an error is shown without its control characters."""

    def refuse() -> str:
        raise OrionError("the server says \x1b[2Jboo")

    monkeypatch.setattr(lifecycle, "document", refuse)
    assert main(["lifecycle"]) == 1
    assert capsys.readouterr().err == "error: the server says [2Jboo\n"


def test_ctrl_c_has_status_130(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Ctrl-C ends a command without a traceback."""

    def interrupt(_engine: OrionInferenceEngine, _name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(OrionInferenceEngine, "pull", interrupt)
    assert main(["pull", "conversation"]) == 130
    shown = capsys.readouterr()
    assert (shown.out, shown.err.strip()) == ("", "")


def test_a_reader_who_goes_away_is_no_error(tmp_path: Path) -> None:
    """`orion-oie models | head -0` ends quietly."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*COMMAND, "models"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)
    assert done.stderr == ""


def test_a_terminal_that_knows_few_letters(tmp_path: Path) -> None:
    """What it cannot show is replaced, and is no error."""
    registry = ModelRegistry.packaged()
    registry.add_agent("sea", {**registry.agent("code").model_dump(), "description": "La mér 海"})
    registry.save(tmp_path / "r.json")
    done = subprocess.run(
        [*COMMAND, "agents", "--registry", str(tmp_path / "r.json")],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=True,
    )
    assert "La mér ?".encode("latin-1") in done.stdout


# -- pull


def test_pull_fetches_and_prints_the_paths(shop: Shop, capsys: Capture) -> None:
    """The paths go to the standard output, what happens to the standard error."""
    assert main(["pull", "reader", "tiny@f16", "local", *shop.options]) == 0
    shown = capsys.readouterr()
    paths = [Path(line) for line in shown.out.splitlines()]
    assert [path.name for path in paths] == ["big.gguf", "small.gguf", "local.gguf"]
    assert [path.read_bytes() for path in paths[:2]] == [
        shop.read("big.gguf"),
        shop.read("small.gguf"),
    ]
    assert re.search(r"^tiny@f32: fetched 7\d\d\.\d kB in ", shown.err, re.MULTILINE)
    assert "\x1b" not in shown.err


def test_pull_of_what_is_here_fetches_nothing(shop: Shop, capsys: Capture) -> None:
    """A second pull asks nobody, and prints the same."""
    main(["pull", "tiny", *shop.options])
    first, count = capsys.readouterr().out, len(shop.server.requests)
    assert main(["pull", "tiny", *shop.options]) == 0
    assert capsys.readouterr().out == first
    assert len(shop.server.requests) == count


def test_pull_into_another_cache(shop: Shop, tmp_path: Path, capsys: Capture) -> None:
    """`--cache-dir` says where the files go."""
    assert main(["pull", "tiny@f16", *shop.options, "--cache-dir", str(tmp_path / "other")]) == 0
    assert Path(capsys.readouterr().out.strip()).is_relative_to(tmp_path / "other")


def test_pull_takes_its_limits_along(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """`--limit-mb-per-s` and `--connections` reach the engine; what it refuses has status 1."""
    made: list[DownloadConfig] = []
    real = Places.engine

    def engine(places: Places, **settings: Any) -> OrionInferenceEngine:
        made.append((made_one := real(places, **settings)).config.download)
        return made_one

    monkeypatch.setattr(Places, "engine", engine)
    assert (
        main(["pull", "local", "--limit-mb-per-s", "2.5", "--connections", "3", *shop.options]) == 0
    )
    (download,) = made
    assert download == DownloadConfig(
        bytes_per_s=2.5e6, connections=3, cache_dir=download.cache_dir
    )
    assert main(["pull", "local", "--connections", "0", *shop.options]) == 1
    assert "error: --connections: " in capsys.readouterr().err


def test_pull_of_an_unknown_name_fetches_nothing(shop: Shop, capsys: Capture) -> None:
    """A wrong name is found before anything is fetched, and the closest one is named."""
    assert main(["pull", "tiny", "raeder", *shop.options]) == 1
    assert "no model 'raeder' (did you mean 'reader'?)" in capsys.readouterr().err
    assert main(["pull", "tiny@f23", *shop.options]) == 1
    assert "no variant 'f23' (did you mean 'f32'?)" in capsys.readouterr().err
    assert shop.server.requests == []


@pytest.mark.parametrize(
    ("name", "part"),
    [("wrong", "SHA-256"), ("gone", "status 404"), ("missing", "there is no such file")],
)
def test_pull_says_what_went_wrong(name: str, part: str, shop: Shop, capsys: Capture) -> None:
    """A failed download has status 1 and says why."""
    assert main(["pull", name, *shop.options]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(f"^error: .*{part}", shown.err, re.MULTILINE)


def test_ctrl_c_during_a_pull_keeps_what_arrived(
    shop: Shop, shop_cache: ModelCache, capsys: Capture
) -> None:
    """A process that is interrupted ends at once with status 130; the next pull goes on."""
    arrived = ModelRegistry.load(shop.registry).find_source("tiny")[2]
    slow = ["--limit-mb-per-s", "0.4", "--connections", "1"]
    with subprocess.Popen(
        [*COMMAND, "pull", "tiny", *shop.options, *slow], stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: shop_cache.arrived(arrived)[0] > 0)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in err
    sent = shop.server.bytes_sent
    assert main(["pull", "tiny", *shop.options]) == 0
    assert Path(capsys.readouterr().out.strip()).read_bytes() == shop.read("big.gguf")
    assert shop.server.bytes_sent - sent < len(shop.read("big.gguf"))


# -- models


def rows(capsys: Capture) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


def test_models_says_what_is_where(shop: Shop, shop_cache: ModelCache, capsys: Capture) -> None:
    """Each variant has a line with its state; so has a fetched file of no model."""
    main(["pull", "tiny@f16", *shop.options])
    stray = shop_cache.paths(ModelRegistry.load(shop.registry).find_source("tiny")[2])[0]
    stray.with_name("stray.gguf").write_bytes(b"x" * 2000)
    capsys.readouterr()
    assert main(["models", "--json", *shop.options]) == 0
    listed = rows(capsys)
    states = {name: row["state"] for name, row in listed.items()}
    strange = next(name for name in listed if name.endswith("stray.gguf"))
    assert states == {
        "tiny@f32": "not downloaded",
        "tiny@f16": "downloaded",
        "wrong@f32": "not downloaded",
        "gone@f32": "not downloaded",
        "local@f16": "here",
        "missing@f16": "not here",
        strange: "of no model",
    }
    assert listed[strange]["is_leftover"]
    assert listed["tiny@f16"]["size_bytes"] == len(shop.read("small.gguf"))
    assert Path(listed["tiny@f16"]["where"]).read_bytes() == shop.read("small.gguf")
    assert listed["tiny@f16"]["last_used"].startswith("20")
    assert listed["tiny@f32"]["size_bytes"] == 750_000
    assert listed["tiny@f32"]["last_used"] is None
    assert main(["models", *shop.options]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(listed)
    assert re.fullmatch(r"model +size +state +last used +where", table[0])
    assert re.fullmatch(
        r"tiny@f16 +\d\S+ kB +downloaded +20\S+ \d\d:\d\d +/.*small\.gguf", table[2]
    )
    assert re.fullmatch(rf"tiny@f32 +750\.0 kB +not downloaded +- +{shop.server.url}", table[1])


def test_a_file_of_no_model_can_be_removed(
    shop: Shop, shop_cache: ModelCache, capsys: Capture
) -> None:
    """It goes by the name that `models` shows, and nothing else goes with it."""
    main(["pull", "tiny@f16", *shop.options])
    kept = shop_cache.paths(ModelRegistry.load(shop.registry).find_source("tiny@f16")[2])[0]
    stray = kept.with_name("stray.gguf")
    stray.write_bytes(b"x" * 2000)
    name = stray.relative_to(shop_cache.root).as_posix()
    assert main(["models", "verify", name, *shop.options]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("unknown  ")
    assert main(["models", "rm", name, *shop.options]) == 0
    assert name in capsys.readouterr().out
    assert not stray.exists()
    assert kept.exists()


def test_models_says_how_much_of_a_model_is_here(
    shop: Shop, shop_cache: ModelCache, capsys: Capture
) -> None:
    """A model that was fetched in part has its share, and is nothing else besides."""
    fetch_half(shop, shop_cache)
    main(["models", *shop.options])
    lines = [line for line in capsys.readouterr().out.splitlines() if "partial" in line]
    assert len(lines) == 1
    found = re.match(r"tiny@f32 .* partial (\d+) % ", lines[0])
    assert found is not None
    assert 0 < int(found[1]) < 100


def test_models_of_the_packaged_registry(capsys: Capture) -> None:
    """Without options it lists the models that come with the library."""
    assert main(["models", "--json"]) == 0
    expected = {
        f"{model_id}@{variant}"
        for model_id, model in ModelRegistry.packaged().models.items()
        for variant in model.variants
    }
    assert set(rows(capsys)) == expected


def test_models_rm_removes(shop: Shop, shop_cache: ModelCache, capsys: Capture) -> None:
    """Named variants go, or all variants of a named model; what is known of them goes too."""
    main(["pull", "tiny@f32", "tiny@f16", *shop.options])
    capsys.readouterr()
    assert main(["models", "rm", "tiny@f16", *shop.options]) == 0
    assert re.fullmatch(r"tiny@f16: .* kB removed\n", capsys.readouterr().out)
    assert [file.path.name for file in shop_cache.files()] == ["big.gguf"]
    assert main(["models", "rm", "reader", *shop.options]) == 0
    assert re.fullmatch(
        r"tiny@f32: 7.* kB removed\ntiny@f16: 0 bytes removed\n", capsys.readouterr().out
    )
    assert shop_cache.files() == []
    assert shop_cache.records() == {}


def test_models_rm_leaves_what_it_did_not_fetch(shop: Shop, capsys: Capture) -> None:
    """A file that a registry names by path is not the cache's to remove."""
    assert main(["models", "rm", "local", *shop.options]) == 1
    assert "local was not fetched" in capsys.readouterr().err
    assert (shop.registry.parent / "local.gguf").exists()
    assert main(["models", "rm", "tinny", *shop.options]) == 1
    assert "did you mean 'tiny'?" in capsys.readouterr().err


def test_models_verify_finds_damage(shop: Shop, shop_cache: ModelCache, capsys: Capture) -> None:
    """Files are hashed again; one that is wrong is named, and makes the status 1."""
    main(["pull", "tiny@f32", "tiny@f16", *shop.options])
    capsys.readouterr()
    assert main(["models", "verify"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["right"] * 2
    damaged = next(file.path for file in shop_cache.files() if file.path.name == "small.gguf")
    damaged.write_bytes(b"damaged")
    assert main(["models", "verify", *shop.options]) == 1
    words = {line.split()[2]: line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert words.pop(str(damaged)) == "WRONG"
    assert list(words.values()) == ["right"]
    assert main(["models", "verify", "tiny@f32", *shop.options]) == 0


def test_models_verify_of_what_is_not_here(shop: Shop, capsys: Capture) -> None:
    """Nothing to verify is fine, unless something was named."""
    assert main(["models", "verify", *shop.options]) == 0
    assert capsys.readouterr().out == ""
    assert main(["models", "verify", "tiny", *shop.options]) == 1
    assert "nothing of tiny was fetched" in capsys.readouterr().err


def test_models_prune_removes_what_is_half_fetched(
    shop: Shop, shop_cache: ModelCache, capsys: Capture
) -> None:
    """Without a limit complete files stay; with one the longest unused go."""
    main(["pull", "tiny@f16", *shop.options])
    fetch_half(shop, shop_cache)
    capsys.readouterr()
    assert main(["models", "prune"]) == 0
    assert re.fullmatch(r"\S+big\.gguf: .* removed\n", capsys.readouterr().out)
    assert [file.path.name for file in shop_cache.files()] == ["small.gguf"]
    assert main(["models", "prune", "--keep-gb", "1"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["models", "prune", "--keep-gb", "0"]) == 0
    assert re.fullmatch(r"\S+small\.gguf: .* removed\n", capsys.readouterr().out)


def test_places_can_be_named_before_a_subcommand(
    shop: Shop, tmp_path: Path, capsys: Capture
) -> None:
    """`models --cache-dir X verify` and `models verify --cache-dir X` mean the same."""
    other = ["--cache-dir", str(tmp_path / "other")]
    main(["pull", "tiny@f16", *shop.options, *other])
    capsys.readouterr()
    for arguments in (
        ["models", *shop.options, *other, "verify", "tiny"],
        ["models", "verify", "tiny", *shop.options, *other],
        ["models", *other, "prune", "--keep-gb", "0"],
    ):
        assert main(arguments) == 0
        assert "small.gguf" in capsys.readouterr().out


# -- hardware


def test_hardware_says_what_suits(capsys: Capture) -> None:
    """What this machine has, and which of the packaged registry's models suit it."""
    assert main(["hardware"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert lines[0].startswith("system ")
    assert any(re.match(r"llama.cpp +llama-cpp-python \d", line) for line in lines)
    assert any(re.match(r"  minimal +yes +smollm2", line) for line in lines)


def test_hardware_as_json(shop: Shop, capsys: Capture) -> None:
    """The whole report, with the recommendations of the registry that is named."""
    assert main(["hardware", "--json", *shop.options]) == 0
    report = CompatibilityReport.model_validate_json(capsys.readouterr().out)
    assert report.hardware.usable_cores >= 1
    assert report.llama.is_working
    assert report.recommendations == []
    assert main(["hardware", "--registry", "/nowhere/models.json"]) == 1
    assert capsys.readouterr().out == ""


def test_hardware_shows_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """With a llama.cpp that cannot be loaded, there is a report all the same, and status 1."""
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('no \\x1b[31mlibrary')")
    monkeypatch.syspath_prepend(tmp_path)
    set_known_devices(monkeypatch, None)
    assert main(["hardware"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"^llama.cpp +PROBLEM: llama.cpp cannot be used: ImportError", shown, re.M)
    assert "\x1b" not in shown


# -- inspect


def test_inspect_says_what_a_file_is(tmp_path: Path, capsys: Capture) -> None:
    """The facts of the header, one a line."""
    path = write_tiny_llama(tmp_path / "model.gguf", weights="Q8_0", name="Small One")
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = {line[:20].strip(): line[20:] for line in lines}
    header = read_header(path)
    assert facts == {
        "architecture": "llama",
        "name": "Small One",
        "version": "1.0",
        "license": "apache-2.0",
        "parameters": f"{header.parameter_count:,} (0.1 M)",
        "quantization": "Q8_0",
        "context length": "512",
        "layers": "2",
        "embedding length": "64",
        "tensors": str(len(header.tensors)),
        "file bytes": f"{path.stat().st_size:,} ({path.stat().st_size / 1e3:.1f} kB)",
        "chat template": "yes",
    }


def test_inspect_as_json(tmp_path: Path, capsys: Capture) -> None:
    """`--json` gives the same facts to programs, with the tensors and the template if asked."""
    path = write_tiny_llama(tmp_path / "model.gguf")
    assert main(["inspect", "--json", str(path)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["architecture"], facts["layers"], facts["chat_template"]) == ("llama", 2, True)
    assert not {"tensor_list", "chat_template_text"} & set(facts)
    assert main(["inspect", "--json", "--tensors", "--template", str(path)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["chat_template_text"] == CHATML
    first = read_header(path).tensors[0]
    assert facts["tensor_list"][0] == {
        "name": first.name,
        "type": "F16",
        "shape": list(first.shape),
        "bytes": first.n_bytes,
    }


def test_inspect_lists_tensors(tmp_path: Path, capsys: Capture) -> None:
    """`--tensors` adds a table of them."""
    path = write_tiny_llama(tmp_path / "model.gguf")
    assert main(["inspect", "--tensors", str(path)]) == 0
    table = capsys.readouterr().out.partition("\n\n")[2].splitlines()
    assert table[0].split() == ["tensor", "type", "shape", "bytes"]
    assert len(table) == 1 + len(read_header(path).tensors)
    assert any(re.fullmatch(r"output\.weight +F16 +\[64, \d+\] +\d+", line) for line in table)


def test_inspect_prints_the_template(tmp_path: Path, capsys: Capture) -> None:
    """`--template` prints the chat template alone; a file without one has an empty one."""
    assert main(["inspect", "--template", str(write_tiny_llama(tmp_path / "a.gguf"))]) == 0
    assert capsys.readouterr().out == CHATML + "\n"
    bare = write_tiny_llama(tmp_path / "b.gguf", chat_template=None)
    assert main(["inspect", "--template", str(bare)]) == 0
    assert capsys.readouterr().out == "\n"
    main(["inspect", str(bare)])
    assert re.search(r"^chat template +no$", capsys.readouterr().out, re.MULTILINE)


def test_inspect_of_a_split_file(tmp_path: Path, capsys: Capture) -> None:
    """A file of a split model says which one it is."""
    path = write_tiny_llama(tmp_path / "model.gguf", tensors_per_file=8)
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^split\.no +0$", out, re.MULTILINE)
    assert re.search(r"^split\.count +\d$", out, re.MULTILINE)
    assert re.search(r"^split\.tensors\.count +\d+$", out, re.MULTILINE)


def test_inspect_does_not_let_a_file_act_on_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    """Control characters in a header are not printed."""
    path = write_tiny_llama(tmp_path / "m.gguf", name="a\x1b[2Jb", chat_template="x\x1b[0my")
    for option in ([], ["--template"], ["--tensors"], ["--json"]):
        assert main(["inspect", *option, str(path)]) == 0
        assert "\x1b" not in capsys.readouterr().out


def test_inspect_refuses_what_is_no_model(tmp_path: Path, capsys: Capture) -> None:
    """A file that is no GGUF file, or is not there, has status 1 and a reason."""
    (tmp_path / "page.gguf").write_text("<html>" + " " * 100, encoding="utf-8")
    assert main(["inspect", str(tmp_path / "page.gguf")]) == 1
    assert "a web page, not a model" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none.gguf")]) == 1
    assert "there is no such file" in capsys.readouterr().err
