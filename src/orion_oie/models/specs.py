"""The shapes of models.json: agents, models, variants, sources, providers.

Shapes only: `registry` reads files and checks cross-references and availability.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from orion_oie.models.queries import lasting_query
from orion_oie.models.split_files import split_name
from orion_oie.schemas.requests import SamplingDefaults

Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
Weight = Annotated[float, Field(gt=0, le=100)]
RouteFeature = Literal["non_english", "code_shape", "math_shape", "table_shape"]

CONVERSATION = "conversation"
PACKAGED = "packaged"
"""The name of the packaged registry for a file that extends it."""
_BYTES_PER_MB = 10**6


class Spec(BaseModel):
    """Base of the registry's shapes: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        defer_build=True,
        allow_inf_nan=False,  # JSON cannot hold them
    )

    also_known: ClassVar[tuple[str, ...]] = ()
    """Keys that are read beside the fields, for suggestions."""


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


class SourceSpec(Spec):
    """The source of a variant's files: exactly one of `path`, `url`, `hub`, `package`.

    path: a GGUF file, relative to the registry file; of a split model the first one. url: base
    address of `shards`. query: goes with each request, and may also stand at the end of `url`. It
    may be a signature, which no message repeats and no registry keeps: JSON gets only what says
    which file is meant. hub: `org/repo` with `files` and a `revision`. package: an installed Python
    package that carries `file`; it is located without being imported. sha256: a digest for each
    file.
    """

    path: str | None = None
    url: str | None = None
    hub: Annotated[str, Field(pattern=r"^[^/\s]+/[^/\s]+$")] | None = None
    package: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    query: str | None = Field(default=None, repr=False)
    shards: list[str] = []
    sha256: list[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = []
    files: list[str] = []
    revision: str | None = None
    file: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _query_apart(cls, data: Any) -> Any:
        if isinstance(data, str):
            raise ValueError(
                'a source is an object, such as {"path": "my-model.gguf"} or {"hub": "org/repo", '
                '"files": ["model.gguf"]}'
            )
        if not isinstance(data, Mapping) or not isinstance(data.get("url"), str):
            return data
        url, mark, query = data["url"].partition("#")[0].partition("?")
        given = {"query": query} if mark and not data.get("query") else {}
        return {**data, "url": url, **given}

    @model_serializer(mode="wrap", when_used="json")
    def _without_signature(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = serialize(self)
        if found.get("query") is not None:
            found["query"] = self.lasting_query or None
        return {key: value for key, value in found.items() if key != "query" or value is not None}

    @model_validator(mode="after")
    def _exactly_one_kind(self) -> "SourceSpec":
        kinds = [k for k in ("path", "url", "hub", "package") if getattr(self, k) is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"exactly one of path, url, hub, package is needed, found {kinds or 'none'}"
            )
        kind = kinds[0]
        needed = {"path": (), "url": ("shards",), "hub": ("files",), "package": ("file",)}[kind]
        allowed = {"url": {"sha256", "query"}, "hub": {"sha256", "revision"}}.get(kind, {"sha256"})
        for name in ("shards", "files", "file", "sha256", "revision", "query"):
            given = bool(getattr(self, name))
            if name in needed and not given:
                raise ValueError(f"a '{kind}' source needs '{name}'")
            if given and name not in needed and name not in allowed:
                raise ValueError(f"'{name}' does not belong to a '{kind}' source")
        split = split_name(Path(self.path).name) if self.path else None
        local = 1 if split is None else split.count
        count = {"url": len(self.shards), "hub": len(self.files)}.get(kind, local)
        if self.sha256 and len(self.sha256) != count:
            raise ValueError(f"{len(self.sha256)} sha256 values for {count} file(s)")
        return self

    @property
    def lasting_query(self) -> str:
        """The part of the query that says which file is meant: no signature, "" for none."""
        return lasting_query(self.query or "", self.shards[0] if self.shards else "")

    @property
    def kind(self) -> Literal["path", "url", "hub", "package"]:
        if self.path is not None:
            return "path"
        if self.url is not None:
            return "url"
        return "hub" if self.hub is not None else "package"

    @property
    def is_remote(self) -> bool:
        """True when the files are fetched over HTTP and kept in the cache."""
        return self.url is not None or self.hub is not None


class ShardingSpec(Spec):
    """The division of a variant into shards; overrides `EngineConfig.loading.sharding`.

    `initial_shards` must arrive before anything is computed. For a variant, `enabled` means that
    its files are split; for an agent, if given, that its models compute while they arrive.
    """

    enabled: bool = False
    num_shards: int = Field(default=1, ge=1)
    initial_shards: int = Field(default=0, ge=0)


class VariantSpec(Spec):
    """One file set of a model. Sizes are megabytes (10^6 bytes) and gigabytes (10^9 bytes).

    Only `source` is required. What is left out is read from the file once it is on this machine;
    what is stated must agree with it.
    """

    quantization: str | None = None
    size_mb: float | None = Field(default=None, gt=0)
    min_ram_gb: float | None = Field(default=None, gt=0)
    source: SourceSpec
    sharding: ShardingSpec | None = None

    @property
    def size_bytes(self) -> int:
        """The size of its files; 0 while it is unknown."""
        return int((self.size_mb or 0) * _BYTES_PER_MB)


class PromptFormat(Spec):
    """A prompt format that replaces the chat template of the GGUF file.

    A turn is its prefix, its content, and `eos_token`; the prompt ends with `assistant_prefix`.
    The prefixes and `eos_token` may contain control tokens; contents never act as such.
    """

    system_prefix: str = ""
    user_prefix: str
    assistant_prefix: str
    eos_token: str = ""


class FusionSpec(Spec):
    """The merge that a model was made by."""

    method: str
    sources: list[str]
    ratio: list[float] = []


class PriceSpec(Spec):
    """US dollars per million tokens."""

    prompt: float = Field(default=0.0, ge=0)
    completion: float = Field(default=0.0, ge=0)


ONLY_VARIANT = "default"
"""The name of the variant of a model that is given by its `source` alone."""


class ModelSpec(Spec):
    """Weights, in one or more variants; the first available variant is used.

    Only `variants` is required; `source` may stand in its place for a model with one variant. What
    is left out is read from the file once it is on this machine; what is stated must agree with
    it. `prompt_format` replaces the chat template of the file; "plain" joins the texts of the
    conversation by blank lines, which suits a base model.
    """

    also_known = ("source",)

    name: str | None = None
    version: str = "1.0"
    type: Literal["causal-lm", "vision-lm", "embedding"] = "causal-lm"
    license: str | None = None
    context_length: int | None = Field(default=None, ge=1)
    prompt_format: PromptFormat | Literal["plain"] | None = None
    variants: dict[Identifier, VariantSpec] = Field(min_length=1)
    price: PriceSpec | None = None
    fusion: FusionSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _source_is_one_variant(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or "source" not in given:
            return given
        if "variants" in given:
            raise ValueError("'source' is for a model without 'variants', found both")
        rest = {key: value for key, value in given.items() if key != "source"}
        return {**rest, "variants": {ONLY_VARIANT: {"source": given["source"]}}}


class AgentModels(Spec):
    """The models of an agent, in order; `lite` answers while `primary` is not on this machine."""

    primary: str
    lite: str | None = None
    fallback: list[str] = []
    prefer_local: bool = True


class RoutingHints(Spec):
    """The signs that a question belongs to this agent.

    keywords: whole words, compared without regard to case; a `*` at the end makes one a stem
    (`translat*`). phrases: several words in a row, likewise. patterns: regular expressions,
    case-insensitive. features: shapes that the router detects. Each maps to a weight in
    (0, 100]. examples: questions that this agent should answer. topics: the topics of the router's
    weights that are this agent's (conversation, code, creative, multilingual, math, logic, data,
    vision, and those of one's own training); None takes the topic of the agent's name, and for
    `reasoning` both math and logic.
    """

    keywords: dict[str, Weight] = {}
    phrases: dict[str, Weight] = {}
    patterns: dict[Annotated[str, AfterValidator(_compiles)], Weight] = {}
    features: dict[RouteFeature, Weight] = {}
    examples: list[str] = []
    topics: list[Identifier] | None = None


class AgentSpec(Spec):
    """A persona: its system prompt, its sampling, its purpose and its models. Only `models` is
    required; without a system prompt the model gets the question alone.

    `fallback_agent` answers when none of the agent's own models can; the conversation agent
    comes last in any case.

    For the agent's own models, `quantization` is the wanted level of variant ("auto" is the best
    that fits) and `optimized_size` the largest size of its file, in megabytes (10^6 bytes);
    `loading_strategy` and `sharding` override those of the engine and of the variant.
    """

    name: str = ""
    description: str = ""
    version: str = "1.0"
    capabilities: list[str] = []
    system_prompt: str = ""
    models: AgentModels
    routing: RoutingHints = Field(default_factory=RoutingHints)
    defaults: SamplingDefaults = Field(default_factory=SamplingDefaults)
    fallback_agent: str | None = None
    quantization: Literal["auto", "q4", "q8", "f16", "f32"] = "auto"
    optimized_size: Annotated[float, Field(gt=0)] | None = None
    loading_strategy: Literal["progressive", "sequential"] | None = None
    sharding: ShardingSpec | None = None


class Recommendation(Spec):
    """Models that suit a machine with at least `min_ram_gb` (10^9 bytes)."""

    description: str
    min_ram_gb: float = Field(ge=0)
    models: list[str]


class ProviderModel(Spec):
    """A model behind a provider, with its price."""

    name: str
    price: PriceSpec = Field(default_factory=PriceSpec)
    context_length: int | None = Field(default=None, ge=1)


class ProviderSpec(Spec):
    """A remote or separate server that can answer instead, with the key in `api_key_env`."""

    kind: Literal["openai", "anthropic", "ollama"]
    base_url: Annotated[str, Field(pattern=r"^https?://")]
    api_key_env: str | None = None
    models: dict[str, ProviderModel] = {}


class RegistryFile(Spec):
    """The whole of models.json.

    extends: "packaged" or the path of another registry file, relative to this one. This file then
    needs to state only what it adds or changes: see `registry_layers`.
    """

    version: str = "1.0"
    extends: str | None = None
    models: dict[Identifier, ModelSpec] = {}
    agents: dict[Identifier, AgentSpec] = {}
    custom_models: dict[Identifier, ModelSpec] = {}
    model_groups: dict[str, list[str]] = {}
    recommendations: dict[str, Recommendation] = {}
    providers: dict[Identifier, ProviderSpec] = {}
