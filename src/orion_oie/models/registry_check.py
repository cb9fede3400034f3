"""The check of a whole registry: shapes, references, cycles. Finds every problem at once. Pure."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from orion_oie.errors import RegistryError
from orion_oie.models.specs import AgentSpec, RegistryFile
from orion_oie.schemas.validation import did_you_mean, problems_of


def unique_keys(pairs: list[tuple[str, Any]], duplicates: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            duplicates.append(f"'{key}' appears twice in one object")
        found[key] = value
    return found


def checked_registry(raw: object, name: str, duplicates: list[str]) -> RegistryFile:
    """The checked registry. Raises one `RegistryError` that lists all problems."""
    problems = list(duplicates)
    try:
        data = RegistryFile.model_validate(raw)
    except ValidationError as error:
        problems += problems_of(error, RegistryFile)
    else:
        problems += broken_references(data)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise RegistryError(f"{name} has {count}:\n{listed}", problems)
    return data


def broken_references(data: RegistryFile) -> list[str]:
    models = {**data.models, **data.custom_models}
    problems = [
        f"custom_models.{model_id}: 'models' has the same id"
        for model_id in data.custom_models
        if model_id in data.models
    ]
    if not data.agents:
        problems.append("agents: there is none")
    for agent_id, agent in data.agents.items():
        wanted = [("primary", agent.models.primary), ("lite", agent.models.lite)]
        wanted += [("fallback", model_id) for model_id in agent.models.fallback]
        problems += [
            _unknown(f"agents.{agent_id}.models.{role}", "model", model_id, models)
            for role, model_id in wanted
            if model_id is not None and model_id not in models
        ]
        problems += [
            f"agents.{agent_id}.models.{role}: '{model_id}' is an embedding model, which does not "
            "answer questions"
            for role, model_id in wanted
            if model_id in models and models[model_id].type == "embedding"
        ]
        if agent.fallback_agent is not None and agent.fallback_agent not in data.agents:
            where = f"agents.{agent_id}.fallback_agent"
            problems.append(_unknown(where, "agent", agent.fallback_agent, data.agents))
    listed = {f"model_groups.{name}": ids for name, ids in data.model_groups.items()}
    listed |= {f"recommendations.{n}.models": r.models for n, r in data.recommendations.items()}
    for where, model_ids in listed.items():
        problems += [
            _unknown(where, "model", model_id, models)
            for model_id in model_ids
            if model_id not in models
        ]
    return problems + _fallback_cycles(data.agents)


def _unknown(where: str, kind: str, name: str, known: Mapping[str, Any]) -> str:
    return f"{where}: there is no {kind} '{name}'{did_you_mean(name, known)}"


def _fallback_cycles(agents: Mapping[str, AgentSpec]) -> list[str]:
    problems = []
    reported: set[str] = set()
    for start in agents:
        path: list[str] = []
        current: str | None = start
        while current is not None and current in agents and current not in {*path, *reported}:
            path.append(current)
            current = agents[current].fallback_agent
        if current is not None and current in path:
            circle = path[path.index(current) :]
            problems.append(f"fallback agents go in a circle: {' -> '.join([*circle, current])}")
            reported.update(circle)
    return problems
