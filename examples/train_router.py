"""Teaching the router an agent of one's own from a few questions, and keeping what it learned.

The same from a terminal: orion-oie route train FILE.jsonl --out weights.npz
"""

import tempfile
from pathlib import Path

from orion_oie import (
    AgentModels,
    AgentSpec,
    EngineConfig,
    ModelRegistry,
    OrionInferenceEngine,
    RouterConfig,
)
from orion_oie.routing.hybrid import HybridRouter

QUESTIONS = [
    ("Reset the controller of turbine 2", "plant"),
    ("The feed pump trips on low suction pressure", "plant"),
    ("What is the alarm limit for the bearing temperature?", "plant"),
    ("Start the second boiler with the bypass valve open", "plant"),
    ("Turbine 1 vibrates after the restart, what should we check?", "plant"),
    ("Which valve isolates the condenser?", "plant"),
    ("Why does the boiler pressure fall when the second pump starts?", "plant"),
    ("Who invented the steam turbine?", "conversation"),
    ("Write a short story about a lighthouse and its boiler", "creative"),
    ("Write a Python class for a valve with a setpoint", "code"),
]
ASKED = [
    "Turbine 3 trips after the restart, what now?",
    "Is the valve of the feed pump open?",
    "Where do steam engines come from?",
    "Write a Python function that reads a pressure sensor",
]


def registry_with_the_plant() -> ModelRegistry:
    registry = ModelRegistry.packaged()
    registry.add_agent(
        "plant",
        AgentSpec(
            name="Plant",
            description="Turbines, boilers and pumps of one power station",
            system_prompt="You help the operators of a power station.",
            models=AgentModels(primary="smollm2-135m-instruct"),
        ),
    )
    return registry


def show(heading: str, engine: OrionInferenceEngine) -> None:
    print(heading)
    for question in ASKED:
        route = engine.plan(question).route
        print(f"  {route.agent_id:<13}{route.confidence:.2f}  {question}")


def main() -> None:
    registry = registry_with_the_plant()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        with OrionInferenceEngine(registry, model="smollm2-135m-instruct") as engine:
            show("before", engine)
            assert isinstance(engine.router, HybridRouter)
            model = engine.router.fit(QUESTIONS, registry.agents)
            print(f"\nlearned {len(QUESTIONS)} questions; topics: {', '.join(model.topics)}")
            print(f"{model.save(weights).stat().st_size / 1e6:.1f} MB of weights\n")
        config = EngineConfig(router=RouterConfig(weights=weights))
        with OrionInferenceEngine(registry, config, model="smollm2-135m-instruct") as engine:
            show("after, in a new engine", engine)


if __name__ == "__main__":
    main()
