"""The registry, the cache and the model of a command: the options that name them, and what they
name.

An option of `orion-oie models` holds for its subcommands, too, unless these are given their own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import click

from orion_oie import (
    EngineConfig,
    ModelRegistry,
    OrionInferenceEngine,
    RouterConfig,
)
from orion_oie.cli.completion import complete_source
from orion_oie.cli.console import given
from orion_oie.models.downloads.cache import ModelCache

_Command = TypeVar("_Command", bound=Callable[..., None])


@dataclass
class Places:
    """The object of a command's context. None stands for the default registry, for the user's
    cache folder, and for the models of the registry."""

    registry_file: Path | None = None
    cache_dir: Path | None = None
    model: str | None = None

    def registry(self) -> ModelRegistry:
        if self.registry_file is None:
            return ModelRegistry.default()
        return ModelRegistry.load(self.registry_file)

    def cache(self) -> ModelCache:
        return ModelCache(self.cache_dir)

    def engine(
        self,
        *,
        stand_in: Literal["allow", "error"] = "allow",
        serving: Mapping[str, Any] = MappingProxyType({}),
        loading: Mapping[str, Any] = MappingProxyType({}),
        download: Mapping[str, Any] = MappingProxyType({}),
        router: RouterConfig | None = None,
        embedding_model: str | None = None,
    ) -> OrionInferenceEngine:
        """An engine for one command, which asks one question at a time, and says itself when
        another model answers than the one that should."""
        sections: dict[str, Any] = {
            "stand_in": stand_in,
            "serving": {"slots": 1, **serving},
            "loading": {"keep_spare_worker": False, **loading},
            "download": {"cache_dir": self.cache_dir, **download},
            "router": router or RouterConfig(),
            "embeddings": {"model": embedding_model},
        }
        return OrionInferenceEngine(
            self.registry_file, EngineConfig(**sections), **given(model=self.model)
        )


pass_places = click.make_pass_decorator(Places, ensure=True)


def _note_registry(context: click.Context, _option: click.Parameter, path: Path | None) -> None:
    places = context.ensure_object(Places)
    places.registry_file = path or places.registry_file


def _note_cache_dir(context: click.Context, _option: click.Parameter, path: Path | None) -> None:
    places = context.ensure_object(Places)
    places.cache_dir = path or places.cache_dir


def _note_model(context: click.Context, _option: click.Parameter, source: str | None) -> None:
    if source is not None and not source.strip():
        raise click.BadParameter("it is empty: name a model, or leave the option out")
    places = context.ensure_object(Places)
    places.model = source or places.model


cache_place = click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    expose_value=False,
    callback=_note_cache_dir,
    metavar="FOLDER",
    help="where fetched models lie; default: ORION_CACHE_DIR, or the user's cache folder",
)

registry_place = click.option(
    "--registry",
    type=click.Path(path_type=Path),
    expose_value=False,
    callback=_note_registry,
    metavar="FILE",
    help="the models.json with the agents and models; default: ORION_REGISTRY, the "
    "user's own, or the packaged one",
)

model_place = click.option(
    "-m",
    "--model",
    expose_value=False,
    callback=_note_model,
    shell_complete=complete_source,
    metavar="SOURCE",
    help="the model that answers, whoever the agent is: a GGUF file, a name of 'orion-oie models', "
    "hf:ORG/REPO, ollama:NAME; default: the agent's own",
)


def both_places(command: _Command) -> _Command:
    """The options `--registry` and `--cache-dir`."""
    return registry_place(cache_place(command))
