"""semantic-router over one request, by the peer's interpreter: `python FILE REQUEST ANSWER`.

The request, a JSON file: {"train": [{"text", "label"}], "test": [text], "model": folder,
"aggregation": name or null for the default}. The answer: {"labels": a label or "none" for each
text, "ms": milliseconds for each text, "build_s", "version"}. Not a benchmark itself.
"""

import json
import sys
import time
from pathlib import Path

import semantic_router
from semantic_router import IndexedRouter, Route
from semantic_router.encoders import HuggingFaceEncoder


def main() -> None:
    asked, answered = map(Path, sys.argv[1:])
    request = json.loads(asked.read_text(encoding="utf-8"))
    utterances: dict[str, list[str]] = {}
    for row in request["train"]:
        utterances.setdefault(row["label"], []).append(row["text"])
    chosen = {} if request["aggregation"] is None else {"aggregation": request["aggregation"]}
    encoder = HuggingFaceEncoder(name=request["model"])
    routes = [Route(name=label, utterances=texts) for label, texts in utterances.items()]
    started = time.perf_counter()
    router = IndexedRouter(encoder=encoder, routes=routes, **chosen)
    build_s = time.perf_counter() - started
    router("the first call starts a thread, and is not timed")
    labels, ms = [], []
    for text in request["test"]:
        started = time.perf_counter()
        choice = router(text)
        ms.append((time.perf_counter() - started) * 1e3)
        labels.append("none" if choice.name is None else choice.name)
    answer = {
        "labels": labels,
        "ms": ms,
        "build_s": build_s,
        "version": semantic_router.__version__,
    }
    answered.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
