"""An asynchronous application: several questions at once, one stream, one cancelled task."""

import asyncio

from orion_oie import OrionInferenceEngine


async def main() -> None:
    async with OrionInferenceEngine(model="smollm2-135m-instruct") as engine:
        questions = ["What is a star?", "Write a haiku about snow.", "What is 7 * 6?"]
        answers = await asyncio.gather(
            *(engine.ainfer(question, max_tokens=32) for question in questions)
        )
        for question, answer in zip(questions, answers, strict=True):
            print(f"> {question} ({answer.agent_id})\n{answer.content}\n")

        print("> streamed")
        async for event in engine.astream("Say hello to the reader.", max_tokens=24):
            print(event.text, end="", flush=True)
        print()

        task = asyncio.create_task(engine.ainfer("Tell a very long story.", max_tokens=2000))
        await asyncio.sleep(0.3)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            print(f"\nthe long story was cancelled; running now: {engine.stats().running}")


if __name__ == "__main__":
    asyncio.run(main())
