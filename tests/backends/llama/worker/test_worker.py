"""The worker and its host at their worst: storms, stuck processes, odd prompts and templates."""

import os
import queue
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import psutil
import pytest
from contracts import BOUND_S, INFO, Running, job, said
from helpers import until
from hypothesis import given
from hypothesis import strategies as st
from internals import pending_of
from interrupts import Interrupted, points_of
from test_chat import conversation, rendered
from tiny import write_tiny_llama

from orion_oie.backends.base import (
    GenerationJob,
    LoadSpec,
)
from orion_oie.backends.llama.host.client import LlamaModel
from orion_oie.backends.llama.host.loader import (
    LlamaBackend,
    LoaderSettings,
)
from orion_oie.backends.llama.protocol import CancelCommand, GenerateCommand
from orion_oie.backends.llama.worker import chat
from orion_oie.backends.llama.worker.chat import (
    ChatTemplate,
    Segment,
)
from orion_oie.backends.llama.worker.main import Worker
from orion_oie.backends.llama.worker.prepare import prepared
from orion_oie.cancellation import CancelScope
from orion_oie.errors import (
    ContextOverflowError,
    EngineClosedError,
    InvalidRequestError,
    ModelCorruptError,
    RequestCancelledError,
    WorkerCrashedError,
    WorkerError,
    WorkerTimeoutError,
)
from orion_oie.models.specs import PromptFormat
from orion_oie.schemas.loading import LoadProgress
from orion_oie.schemas.requests import (
    GenerationOptions,
    Message,
)

LARGE = "x" * 2_000_000  # more than any socket takes while nobody reads


def load(path: Path, backend: LlamaBackend | None = None, **settings: object) -> LlamaModel:
    spec = LoadSpec(INFO, (path,), **{"context_length": 512, **settings})
    return (backend or LlamaBackend()).load(spec, CancelScope(), lambda _fraction: None)


def asked(model: LlamaModel, *contents: str, **options: object) -> int:
    """The prompt tokens of a question after these turns of the user."""
    messages = tuple(Message(role="user", content=content) for content in contents)
    work = GenerationJob(messages, GenerationOptions(**{"max_tokens": 2, **options}))
    return model.generate(work, CancelScope(), lambda _t, _n: None).usage.prompt_tokens


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[LlamaModel]:
    model = load(tiny_model)
    yield model
    model.close()


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Iterator[LlamaModel]:
    model = load(smollm2, context_length=2048)
    yield model
    model.close()


# -- prompts


@pytest.mark.parametrize(
    "content",
    [
        "",
        " ",
        "\n\n",
        "\x00",
        "a\x00b",
        "".join(map(chr, range(256))),
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "\ufffd\uffff\U0010ffff",
    ],
    ids=["empty", "blank", "lines", "nul", "nul inside", "256 letters", "joined emoji", "odd"],
)
def test_any_text_is_answered(real: LlamaModel, content: str) -> None:
    """Empty, blank, binary or composed: no text harms the worker."""
    assert asked(real, content) > 0


def test_no_control_token_of_the_vocabulary_acts(real: LlamaModel) -> None:
    """Each control token of SmolLM2 in a message is several tokens of text."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>"]
    names += ["<gh_stars>", "<issue_start>", "<jupyter_code>", "<empty_output>"]
    base = asked(real, "")
    for name in names:
        assert asked(real, name) > base + 2


def test_a_prompt_that_cannot_fit_is_counted(tiny: LlamaModel) -> None:
    """A prompt of 300000 tokens is refused with its count."""
    with pytest.raises(ContextOverflowError) as caught:
        asked(tiny, "x" * 300_000)
    assert caught.value.details["prompt_tokens"] > 300_000


def test_an_empty_prompt_is_the_callers_error(tiny_model: Path) -> None:
    """A prompt of no tokens is refused, and the worker does not spin on it."""
    model = load(tiny_model, prompt_format=PromptFormat(user_prefix="", assistant_prefix=""))
    try:
        running = Running(model, GenerationJob((Message(role="user", content=""),)))
        running.join()
        assert isinstance(running.error, InvalidRequestError)
        assert asked(model, "x") == 1
    finally:
        model.close()


class LetterModel:
    """One token for each character; counts what its vocabulary is asked."""

    context_length = 100

    def __init__(self) -> None:
        self.calls = 0
        self.vocabulary = self

    def tokenize(self, segments: list[tuple[str, bool]]) -> list[int]:
        self.calls += 1
        return [ord(letter) for text, _ in segments for letter in text]


class PlainForm:
    """The contents, one after the other."""

    def render(self, messages: list[Message]) -> list[Segment]:
        return [Segment(message.content, is_control=False) for message in messages]


def command(messages: list[Message], request_id: int = 1, **options: object) -> GenerateCommand:
    return GenerateCommand(request_id, GenerationJob(tuple(messages), GenerationOptions(**options)))


roles = st.sampled_from(["user", "assistant"])


@given(
    system=st.booleans(),
    turns=st.lists(st.tuples(roles, st.integers(1, 60)), max_size=12),
    last=st.integers(1, 120),
)
def test_drop_oldest_drops_as_few_turns_as_it_can(
    system: bool, turns: list[tuple[str, int]], last: int
) -> None:
    """The prompt is the longest end of the conversation, from a question on, that fits."""
    history = [(role, "h" * length) for role, length in turns]
    head = [("system", "s")] if system else []
    messages = conversation(*head, *history, ("user", "q" * last))
    dropped_choices = [0] + [
        count for count in range(1, len(history) + 1) if messages[len(head) + count].role == "user"
    ]
    fitting = [
        count
        for count in dropped_choices
        if len(head) + sum(len(text) for _, text in history[count:]) + last < 100
    ]
    work = command(messages, on_overflow="drop_oldest", max_tokens=1)
    if fitting:
        task = prepared(work, LetterModel(), PlainForm())
        assert task.dropped_turns == fitting[0]
    else:
        with pytest.raises(ContextOverflowError) as caught:
            prepared(work, LetterModel(), PlainForm())
        assert caught.value.details["prompt_tokens"] >= last


def test_drop_oldest_is_quick_about_long_histories() -> None:
    """How much of ten thousand turns must go is found in a few tries."""
    history = [("user", "h"), ("assistant", "a")] * 10_000
    model = LetterModel()
    task = prepared(
        command(conversation(*history, ("user", "q")), on_overflow="drop_oldest"),
        model,
        PlainForm(),
    )
    assert len(task.tokens) == 99
    assert model.calls < 20


def prepare_in(
    worker: Worker, model: LetterModel, commands: list[GenerateCommand], wanted: set[int]
) -> "queue.Queue[Any]":
    """Run the preparing thread of a worker alone, on commands of which only those `wanted` were not
    cancelled; returns where the tasks arrive. A whole worker would be too quick to be cancelled."""
    for one in commands:
        worker._to_prepare.put(one)
    worker._preparing = wanted
    threading.Thread(target=worker._prepare_tasks, args=(model, PlainForm()), daemon=True).start()
    return worker._inbox


def test_what_was_cancelled_is_not_prepared() -> None:
    """A request that was cancelled while it waited costs the next one no time."""
    ours, theirs = Pipe()
    with ours, theirs:
        model = LetterModel()
        commands = [command(conversation(("user", "x")), number) for number in (1, 2, 3)]
        inbox = prepare_in(Worker(theirs), model, commands, wanted={3})
        assert inbox.get(timeout=BOUND_S).task.id == 3
        assert model.calls == 2  # the prompt, and the prefix in it
        with pytest.raises(queue.Empty):
            inbox.get_nowait()


# -- cancels


def send_cancel(model: LlamaModel, request_id: int) -> None:
    """Cancel a request by its number, which no caller knows: it may be any."""
    model._send(CancelCommand(request_id))


def send_noise(model: LlamaModel, noise: bytes) -> None:
    """Send a worker bytes that no host would."""
    model._process.send_bytes(noise)


def await_exit(model: LlamaModel) -> None:
    """Wait until the host has seen the worker's process end: only then is a crash reported."""
    assert model._exited.wait(BOUND_S)


def test_after_a_storm_of_cancels_the_worker_rests(tiny: LlamaModel) -> None:
    """Hundreds of cancels in all phases leave no raised flag, no busy thread, a sound answer."""
    before = said(tiny, job("Hello?", max_tokens=8))

    def storm(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(25):
            scope = CancelScope()
            timer = threading.Timer(
                chance.random() * 0.03, lambda s=scope: s.cancel(RequestCancelledError("x"))
            )
            timer.start()
            work = job("q" * chance.randrange(1, 200), max_tokens=200)
            with suppress(RequestCancelledError):
                tiny.generate(work, scope, lambda _t, _n: None)
            timer.join()

    threads = [threading.Thread(target=storm, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
        assert not thread.is_alive()
    for request_id in (0, 1, 10**9):  # cancels that nobody needs
        send_cancel(tiny, request_id)
    assert said(tiny, job("Hello?", max_tokens=8)) == before
    process = psutil.Process(tiny.pid)
    until(lambda: process.cpu_percent(interval=0.1) < 20, "the worker rests")


# -- workers that are stuck or dead


def test_a_worker_that_does_not_read_holds_up_no_cancel(tiny_model: Path) -> None:
    """A request that the worker does not even take can be cancelled, and costs the worker."""
    model = load(tiny_model, LlamaBackend(LoaderSettings(cancel_grace_s=0.3)))
    os.kill(model.pid, signal.SIGSTOP)
    running = Running(model, job(LARGE))
    another = Running(model, job(LARGE))
    for one in (running, another):
        one.scope.cancel(RequestCancelledError("x"))
    for one in (running, another):
        one.join()
        assert isinstance(one.error, WorkerTimeoutError)
    model.close()


def test_a_worker_that_does_not_read_can_be_closed(tiny_model: Path) -> None:
    """close() ends a stuck worker, even with a message half written."""
    model = load(tiny_model)
    os.kill(model.pid, signal.SIGSTOP)
    running = Running(model, job(LARGE))
    until(lambda: len(pending_of(model)) == 1, "the request is on its way")
    model.close(timeout_s=0.2)
    running.join()
    assert isinstance(running.error, EngineClosedError)


def test_many_close_and_many_ask_at_once(tiny_model: Path) -> None:
    """Whatever the order, every call ends."""
    model = load(tiny_model)
    runs = [Running(model, job("Go on.", max_tokens=300)) for _ in range(10)]
    closers = [
        threading.Thread(target=model.close, args=(timeout_s,)) for timeout_s in (5.0, 0.0, 5.0)
    ]
    for closer in closers:
        closer.start()
    runs += [Running(model, job("Go on.", max_tokens=300)) for _ in range(10)]
    for closer in closers:
        closer.join(BOUND_S)
        assert not closer.is_alive()
    for running in runs:
        running.join()
        assert isinstance(running.error, EngineClosedError)


def test_a_load_that_fails_is_no_crash(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that says that it cannot load, and ends, is not reported as crashed."""
    path = tmp_path / "renamed.gguf"
    data = tiny_model.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight")
    path.write_bytes(data)
    crashes: list[WorkerCrashedError] = []
    close = LlamaModel.close

    def close_late(model: LlamaModel, timeout_s: float) -> None:
        await_exit(model)
        close(model, timeout_s)

    monkeypatch.setattr(LlamaModel, "close", close_late)
    backend = LlamaBackend(on_crash=lambda _model_id, error: crashes.append(error))
    with pytest.raises(ModelCorruptError):
        load(path, backend)
    assert crashes == []


def test_a_load_that_is_interrupted_leaves_no_worker(smollm2: Path) -> None:
    """Ctrl-C while a model loads ends its worker: nobody else ever could."""
    before = len(psutil.Process().children())
    main = threading.main_thread().ident
    assert main is not None
    sent: list[LoadProgress] = []

    def interrupt(progress: LoadProgress) -> None:
        if not sent:
            sent.append(progress)
            signal.pthread_kill(main, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        LlamaBackend().load(LoadSpec(INFO, (smollm2,)), CancelScope(), interrupt)
    until(lambda: len(psutil.Process().children()) == before, "the worker is gone")


def test_no_process_can_be_started(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that has no processes left is a WorkerError with its reason."""

    def refuse(*_arguments: object, **_settings: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(WorkerError, match="temporarily unavailable"):
        load(tiny_model)


@pytest.mark.parametrize(
    "noise",
    [b"no json", b"[]", b'{"id": 1}', b"\xff\xfe", b'{"kind": "?"}', b'{"kind": "cancel"}'],
)
def test_a_worker_that_hears_nonsense_ends(tiny_model: Path, noise: bytes) -> None:
    """A worker that cannot understand its host does not live on without one."""
    model = load(tiny_model)
    send_noise(model, noise)
    until(lambda: not model.is_alive(), "the worker is gone")
    with pytest.raises(WorkerCrashedError, match=r"exit code 1.*the host sent a malformed message"):
        said(model, job("Hello?"))
    model.close()


def test_nothing_leaks_over_many_loads(tiny_model: Path, tmp_path: Path) -> None:
    """Loads that succeed, fail, or take too long leave no descriptor and no thread."""
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(tiny_model.read_bytes().replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))

    def cycle() -> None:
        load(tiny_model).close()
        with pytest.raises(ModelCorruptError):
            load(bad)
        with pytest.raises(WorkerTimeoutError):
            load(tiny_model, LlamaBackend(LoaderSettings(load_timeout_s=0.001)))

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    cycle()
    before = held()
    for _ in range(3):
        cycle()
    until(lambda: held() <= before, "descriptors and threads are gone")


# -- templates as real models have them

SYSTEM_FIRST = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}"
    "{% set system = false %}{% endif %}"
)
LLAMA_2 = SYSTEM_FIRST + (
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%%') %}{%- endif %}{%- endif %}"
    "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<system>' }}{%- if tools is not none %}{{- 'tools' }}{%- endif %}"
    "{{- date_string + system + '|' }}"
    "{%- for message in messages %}"
    "{%- if not (message.role == 'ipython' or 'tool_calls' in message) %}"
    "{{- '<' + message['role'] + '>' + message['content'] | trim + '|' }}"
    "{%- endif %}{%- endfor %}"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}"
    "{%- set ns = namespace() %}{%- set ns.index = 0 %}"
    "{%- for message in rest %}{%- if not (message.tool_calls is defined and "
    "message.tool_calls is not none) %}{%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}"
    "{{- raise_exception('must alternate') }}{%- endif %}{%- set ns.index = ns.index + 1 %}"
    "{%- endif %}{%- endfor %}{{- bos_token }}"
    "{%- for message in rest %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system is defined %}"
    "{{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content']|trim + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system') }}"
    "{% endif %}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<' + role + '\\n' + message['content'] | trim + '>\\n' }}{% endfor %}"
)
QWEN = (
    "{%- if tools %}{{- tools | tojson }}{%- endif %}"
    "{%- set ns = namespace(last=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if message.role == 'user' and message.content is string and not "
    "(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}"
    "{%- set ns.last = index %}{%- break %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if loop.first and message.role != 'system' %}{{- '<s>default<e>' }}{%- endif %}"
    "{%- if message.content is string %}{%- set content = message.content %}"
    "{%- else %}{%- set content = '' %}{%- endif %}"
    "{%- if message.role == 'assistant' %}{%- if '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}{%- endif %}"
    "{{- '<' + message.role + '>' + content + '<e>' }}{%- endfor %}"
)
DEEPSEEK = (
    "{% set ns = namespace(system='') %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}{%- endif %}"
    "{%- endfor %}{{ bos_token }}{{ ns.system }}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{ '<U>' + message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<A>' + content + eos_token }}{%- endif %}{%- endfor %}"
)
PHI = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{ '<sys>' + message['content'] + '<e>' }}{% elif message['role'] == 'user' %}"
    "{{ '<user>' + message['content'] + '<e>' }}{% elif message['role'] == 'assistant' %}"
    "{{ '<bot>' + message['content'] + '<e>' }}{% endif %}{% endfor %}"
)
MACRO = (
    "{% macro shown(m) %}{% if m.content is string %}{{ m.content }}"
    "{% else %}{{ m.content[0]['text'] }}{% endif %}{% endmacro %}"
    "{% for m in messages %}{{ m.get('role') }}:{{ shown(m).strip() }};{% endfor %}"
)
TYPED_FIRST = "{% for m in messages %}{{ m.role }}:{{ m['content'][0]['text'] }};{% endfor %}"
TYPED_ALL = (
    "{% for m in messages %}{{ m.role }}:"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %};"
    "{% endfor %}"
)
TYPED_FILTER = (
    "{% for m in messages %}{{ m.role + ':' + (m.content | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join('')) + ';' }}{% endfor %}"
)
TYPED_ALONE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}" + TYPED_ALL
)


@pytest.mark.parametrize(
    ("template", "prompt"),
    {
        "llama-2": (
            LLAMA_2,
            "^[INST] <<SYS>>\n«S»\n<</SYS>>\n\n«Q» [/INST] «A» $^[INST] «R» [/INST]",
        ),
        "llama-3": (LLAMA_3, "<system>%«S»|<user>«Q»|<assistant>«A»|<user>«R»|"),
        "mistral": (MISTRAL, "^[INST] «Q»[/INST] «A»$[INST] «S»\n\n«R»[/INST]"),
        "gemma": (GEMMA, "^<user\n«S\n\nQ»>\n<model\n«A»>\n<user\n«R»>\n"),
        "qwen": (QWEN, "<system>«S»<e><user>«Q»<e><assistant>«A»<e><user>«R»<e>"),
        "deepseek": (DEEPSEEK, "^«S»<U>«Q»<A>«A»$<U>«R»"),
        "phi": (PHI, "<sys>«S»<e><user>«Q»<e><bot>«A»<e><user>«R»<e>"),
        "macro": (MACRO, "system:«S»;user:«Q»;assistant:«A»;user:«R»;"),
        "typed first": (TYPED_FIRST, "system:«S»;user:«Q»;assistant:«A»;user:«R»;"),
        "typed all": (TYPED_ALL, "system:«S»;user:«Q»;assistant:«A»;user:«R»;"),
        "typed filter": (TYPED_FILTER, "system:«S»;user:«Q»;assistant:«A»;user:«R»;"),
        "typed alone": (TYPED_ALONE, "user:«S\n\nQ»;assistant:«A»;user:«R»;"),
    }.values(),
)  # fmt: skip
def test_a_template_as_real_models_have_it(template: str, prompt: str) -> None:
    """What popular templates do with contents gives the prompt that they mean."""
    turns = [("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "R")]
    assert rendered(template, *turns, bos="^", eos="$") == prompt


@pytest.mark.parametrize(
    ("template", "shown"), [(QWEN, "<assistant>«Yes.»"), (DEEPSEEK, "<A>«Yes.»")]
)
def test_reasoning_of_earlier_answers_is_left_out(template: str, shown: str) -> None:
    """A template that cuts the reasoning off earlier answers gets them without it; what the user
    says about </think> stays."""
    turns = [("user", "Q"), ("assistant", "<think>\nhm\n</think>\n\nYes."), ("user", "a</think>b")]
    prompt = rendered(template, *turns)
    assert shown in prompt
    assert "«a</think>b»" in prompt


def test_an_empty_content_is_nothing_to_a_template() -> None:
    """A template that asks whether there is a system text is told that there is none."""
    assert rendered(PHI, ("system", ""), ("user", "Q")) == "<user>«Q»<e>"
    assert rendered(GEMMA, ("system", ""), ("user", "Q")) == "<user\n«Q»>\n"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for a in range(99999) %}{% for b in messages * 99999 %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_ended(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that would compute for hours fails as what it is: a broken model."""
    monkeypatch.setattr(chat, "RENDER_LIMIT_S", 0.2)
    form = ChatTemplate(template + "{{ messages[0].content }}")
    with pytest.raises(ModelCorruptError, match=r"does not end within 0\.2 s.*prompt_format"):
        form.render(conversation(("user", "x")))
    assert rendered(PHI, ("user", "x")) == "<user>«x»<e>"


def test_a_slow_template_holds_up_nobody_else(tmp_path: Path) -> None:
    """A request whose template hangs can be cancelled at once, and the next one is answered."""
    hang = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + hang + "{% endif %}"
        "{{ m.role }}:{{ m.content }};{% endfor %}"
    )
    path = write_tiny_llama(
        tmp_path / "slow.gguf", chat_template=template, token_bias={"<|im_end|>": -40}
    )
    model = load(path)
    try:
        history = (Message(role="user", content="a"), Message(role="assistant", content="b"))
        slow = Running(model, job("Hello?", history))
        after = Running(model, job("Hello?", max_tokens=4))
        slow.scope.cancel(RequestCancelledError("x"))
        slow.join()
        assert isinstance(slow.error, RequestCancelledError)
        after.join()
        assert after.error is None
    finally:
        model.close()


# -- callers that are interrupted


def test_an_interrupt_at_any_point_costs_its_own_request_alone(tiny: LlamaModel) -> None:
    """Nothing waits for its answer, the worker works no more for it, and others are answered."""
    work = job("Hello?", max_tokens=2)
    before = said(tiny, work)

    def ask() -> None:
        tiny.generate(work, CancelScope(), lambda _text, _tokens: None)

    for at in range(3, points_of(ask) + 1, 3):
        with suppress(KeyboardInterrupt), Interrupted(at) as interrupted:
            ask()
        until(lambda: not pending_of(tiny), f"nothing is left of {at}: {interrupted.where}")
        assert said(tiny, work) == before
