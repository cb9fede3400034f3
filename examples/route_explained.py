"""Which agent a question goes to, and why. Nothing is loaded: `plan` answers before any model does.

The same from a terminal: orion-oie route "write a poem about Python the snake"
"""

import textwrap

from orion_oie import (
    AgentModels,
    AgentSpec,
    ModelRegistry,
    OrionInferenceEngine,
    Route,
    RoutingHints,
)

GARDENER = AgentSpec(
    name="Gardener",
    description="Plants, beds and compost",
    system_prompt="You are a gardener. Give practical advice.",
    models=AgentModels(primary="smollm2-135m-instruct"),
    routing=RoutingHints(
        keywords={"prun*": 2, "compost*": 2, "seedlings": 2, "aphids": 3},
        examples=[
            "When should I cut back my roses?",
            "My tomato leaves turn yellow from the bottom up",
            "What grows well in the shade of a north wall?",
        ],
    ),
)


def show(question: str, route: Route) -> None:
    print(f"{route.agent_id:<13}{route.confidence:.2f}  {question}")
    reason = textwrap.wrap(route.reason, 61, break_on_hyphens=False)
    print(textwrap.indent("\n".join(reason), " " * 19))


def main() -> None:
    registry = ModelRegistry.packaged()
    with OrionInferenceEngine(registry, model="smollm2-135m-instruct") as engine:
        print("-- plain questions")
        for question in (
            "Write a Python function that merges two sorted lists",
            "How do I say 'the ferry is late' in Norwegian?",
            "A train leaves at 9:40 and takes 95 minutes. When does it arrive?",
        ):
            show(question, engine.plan(question).route)

        print("\n-- a misleading one: the words of programming, and no program")
        question = "Write a poem about Python the snake"
        route = engine.plan(question).route
        show(question, route)
        print("\n   agent         " + "  ".join(route.stages))
        for candidate in route.candidates[:3]:
            numbers = "  ".join(
                f"{candidate.stages[stage]:>{len(stage)}.2f}" for stage in route.stages
            )
            print(f"   {candidate.agent_id:<14}{numbers}")

        print("\n-- a follow-up, alone and after a question about code")
        question = "and the other way round?"
        show(question, engine.plan(question).route)
        history = [
            {"role": "user", "content": "Convert this list of tuples to a dict in Python"},
            {"role": "assistant", "content": "dict(pairs)"},
        ]
        show(question, engine.plan(question, conversation_history=history).route)

        print("\n-- an agent of one's own, before and after it is registered")
        questions = ("How do I keep aphids off my beans?", "Should I cut back my roses now?")
        for question in questions:
            show(question, engine.plan(question).route)
        registry.add_agent("gardener", GARDENER)
        for question in questions:
            show(question, engine.plan(question).route)


if __name__ == "__main__":
    main()
