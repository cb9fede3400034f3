"""An agent of one's own: registered at run time, it takes part in the routing at once."""

from orion_oie import AgentModels, AgentSpec, ModelRegistry, OrionInferenceEngine, RoutingHints


def main() -> None:
    registry = ModelRegistry.packaged()
    registry.add_agent(
        "chef",
        AgentSpec(
            name="Chef",
            description="Recipes and cooking",
            system_prompt="You are a chef. Answer with a simple recipe.",
            models=AgentModels(primary="smollm2-135m-instruct"),
            routing=RoutingHints(keywords={"recipe": 3, "cook*": 2, "soup": 3, "ingredients": 2}),
        ),
    )
    with OrionInferenceEngine(registry) as engine:
        result = engine.infer("How do I cook a tomato soup?", max_tokens=80, seed=3)
        print(result.content)
        assert result.receipt.route is not None
        print(f"\nanswered by {result.agent_id}: {result.receipt.route.reason}")


if __name__ == "__main__":
    main()
