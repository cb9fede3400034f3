"""The states of a request and the moves between them.

One `transitions` machine holds the table. Every move is looked up in what it compiled; firing its
own triggers would take most of the time of a request. A move that the table does not allow is a bug
in the engine and raises `transitions.MachineError`. The work of a state is done elsewhere.
"""

from collections.abc import Callable
from enum import StrEnum
from time import monotonic
from typing import Any

from transitions import Machine, MachineError


class RequestState(StrEnum):
    """The stages of a request."""

    IDLE = "idle"  # made, not looked at yet
    VALIDATING = "validating"  # options, question and history are checked
    ROUTING = "routing"  # an agent is chosen
    LOADING_AGENT = "loading_agent"  # waits for its turn, then for its model to be in memory
    INFERENCING = "inferencing"  # the model reads the prompt and writes the answer
    FALLBACK = "fallback"  # that model failed: the next one of the chain is chosen
    SUCCESS = "success"  # the result is there
    CANCELLED = "cancelled"  # ended by the caller
    ERROR = "error"  # ended by an error

    @property
    def is_final(self) -> bool:
        return self in _FINAL


_FINAL = frozenset({RequestState.SUCCESS, RequestState.CANCELLED, RequestState.ERROR})
_UNFINISHED = [state for state in RequestState if state not in _FINAL]
_S = RequestState

TRANSITIONS: list[list[Any]] = [
    # trigger, source, destination
    ["validate", _S.IDLE, _S.VALIDATING],
    ["route", _S.VALIDATING, _S.ROUTING],
    ["load", [_S.ROUTING, _S.FALLBACK], _S.LOADING_AGENT],
    ["generate", _S.LOADING_AGENT, _S.INFERENCING],
    ["fall_back", [_S.LOADING_AGENT, _S.INFERENCING], _S.FALLBACK],
    ["succeed", _S.INFERENCING, _S.SUCCESS],
    ["cancel", _UNFINISHED, _S.CANCELLED],
    ["fail", _UNFINISHED, _S.ERROR],
]

_PROGRESS_AT = {
    _S.IDLE: 0,
    _S.VALIDATING: 1,
    _S.ROUTING: 2,
    _S.LOADING_AGENT: 5,
    _S.FALLBACK: 5,
    _S.INFERENCING: 40,
    _S.SUCCESS: 100,
}

_PROGRESS_CEILING = {_S.LOADING_AGENT: 40, _S.INFERENCING: 99}

_machine = Machine(
    model=None,
    states=RequestState,
    transitions=TRANSITIONS,
    initial=RequestState.IDLE,
    auto_transitions=False,
)
_DESTINATIONS = {
    (RequestState[source], trigger): RequestState[str(moves[0].dest)]
    for trigger, event in _machine.events.items()
    for source, moves in event.transitions.items()
}


class RequestLifecycle:
    """The state of one request, the time it spent in each state, and its progress.

    Only the thread that owns the request at a time moves it. `on_change(old, new)` is called
    after every move. `clock` gives seconds.
    """

    def __init__(
        self,
        on_change: Callable[[RequestState, RequestState], None],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.state = RequestState.IDLE
        self._on_change = on_change
        self._clock = clock
        self._entered_at = self._advanced_at = clock()
        self._spent_ms: dict[str, float] = {}
        self._progress = 0.0

    def move(self, trigger: str) -> None:
        """Fire a trigger of `TRANSITIONS`; raises `transitions.MachineError` if it is not allowed
        in the current state."""
        old = self.state
        new = _DESTINATIONS.get((old, trigger))
        if new is None and trigger not in _machine.events:
            raise AttributeError(f"there is no move '{trigger}'")
        if new is None:
            raise MachineError(f"Can't trigger event {trigger} from state {old.name}!")
        now = self._clock()
        self._spent_ms[old.value] = self._spent_ms.get(old.value, 0.0) + self._since_entry_ms(now)
        self._entered_at = self._advanced_at = now
        self.state = new
        if new in _PROGRESS_AT:
            self._progress = float(_PROGRESS_AT[new])
        self._on_change(old, new)

    @property
    def progress(self) -> float:
        """0 to 100, never falling except when a fallback starts over."""
        return self._progress

    def advance(self, fraction: float) -> None:
        """Report how much of the current state is done, from 0 to 1."""
        self._advanced_at = self._clock()
        ceiling = _PROGRESS_CEILING.get(self.state)
        if ceiling is not None:
            floor = _PROGRESS_AT[self.state]
            reached = floor + (ceiling - floor) * min(max(fraction, 0.0), 1.0)
            self._progress = max(self._progress, reached)

    def quiet_s(self) -> float:
        """Seconds since the last move or report."""
        return self._clock() - self._advanced_at

    def state_ms(self) -> dict[str, float]:
        """Milliseconds spent in each state that was visited, the current one included."""
        spent = dict(self._spent_ms)
        if not self.state.is_final:
            name = self.state.value
            spent[name] = spent.get(name, 0.0) + self._since_entry_ms(self._clock())
        return spent

    def _since_entry_ms(self, now: float) -> float:
        return (now - self._entered_at) * 1e3


def mermaid() -> str:
    """The machine as a Mermaid state diagram, drawn from the table above."""
    from transitions.extensions import GraphMachine  # slow to import, needed for documents only

    graph = GraphMachine(
        states=RequestState,
        transitions=TRANSITIONS,
        initial=RequestState.IDLE,
        auto_transitions=False,
        graph_engine="mermaid",
        title="States of a request",
    )
    lines = str(graph.get_graph().draw(None)).splitlines()
    plain = [ln for ln in lines if not ln.strip().startswith(("classDef", "Class "))]
    return "\n".join(ln.rstrip() for ln in plain) + "\n"


def document() -> str:
    """The text of docs/lifecycle.md."""
    rows = "\n".join(
        f"| `{trigger}` | {_names(source)} | `{dest.value}` |"
        for trigger, source, dest in TRANSITIONS
    )
    return (
        "# The life of a request\n\n"
        "Generated by `python -m orion_oie lifecycle`; a test keeps it in step with "
        "`src/orion_oie/engine/lifecycle.py`.\n\n"
        f"```mermaid\n{mermaid()}```\n\n"
        f"| move | from | to |\n|---|---|---|\n{rows}\n"
    )


def _names(source: Any) -> str:
    states = source if isinstance(source, list) else [source]
    return ", ".join(f"`{state.value}`" for state in states)
