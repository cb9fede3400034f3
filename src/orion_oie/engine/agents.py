"""Personas: the prompt and the settings that an agent adds to a question.

An `Agent` is cheap and holds no model; the factory makes each when it is first asked for, and again
when its specification has changed. The pool has the loaded models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from orion_oie.models.registry import ModelRegistry
from orion_oie.models.specs import AgentSpec
from orion_oie.schemas.requests import (
    GenerationOptions,
    Message,
    RequestOptions,
    SamplingDefaults,
)


@dataclass(frozen=True, slots=True)
class Agent:
    """A persona, ready to put a question to a model."""

    id: str
    spec: AgentSpec

    def messages(
        self, query: str, history: Sequence[Message] = (), system_prompt: str | None = None
    ) -> tuple[Message, ...]:
        """The conversation for the model; `system_prompt` replaces the agent's own, and an
        empty one leaves it out."""
        system = self.spec.system_prompt if system_prompt is None else system_prompt
        head = [Message(role="system", content=system)] if system else []
        return (*head, *history, Message(role="user", content=query))

    def generation_options(self, options: RequestOptions, seed: int) -> GenerationOptions:
        """The caller's options over the agent's defaults over the library's."""
        merged = {
            name: value
            for source in (self.spec.defaults, options)
            for name in SamplingDefaults.model_fields
            if (value := getattr(source, name)) is not None
        }
        return GenerationOptions(
            **merged,
            seed=seed,
            max_tokens_asked=options.max_tokens is not None,
            on_overflow=options.on_overflow,
            logit_bias=list(options.logit_bias.items()),
            json_schema=options.json_schema,
            grammar=options.grammar,
            logprobs=options.logprobs,
        )


class AgentFactory:
    """Makes agents from the registry, each once per version of its specification."""

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry
        self._agents: dict[str, Agent] = {}

    def get(self, agent_id: str) -> Agent:
        """An agent by id. Raises `UnknownAgentError`."""
        spec = self._registry.agent(agent_id)
        agent = self._agents.get(agent_id)
        if agent is None or agent.spec is not spec:
            agent = self._agents[agent_id] = Agent(agent_id, spec)
        return agent
