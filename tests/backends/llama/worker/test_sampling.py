"""Choosing tokens with llama.cpp's samplers: what they choose is what numpy would, a grammar is
obeyed, and all that was allocated is freed once."""

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp as lc
import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import write_tiny_llama

from orion_oie.backends.llama.worker import sampling
from orion_oie.backends.llama.worker.native import (
    AbortFlag,
    NativeModel,
)
from orion_oie.backends.llama.worker.sampling import (
    Candidates,
    NoTokenAllowedError,
    Sampler,
    log_probabilities,
)
from orion_oie.schemas.requests import GenerationOptions

VOCAB = 60
WINDOW = 64  # of the last tokens, repetition is measured against these
GREEDY = {"temperature": 0.0}
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
AB_OR_AC = 'root ::= "ab" | "ac"'

Logits = NDArray[np.float32]


class Allocations:
    """The samplers of llama.cpp that are alive, and those that were freed."""

    def __init__(self) -> None:
        self.alive: set[int | None] = set()
        self.freed: list[int | None] = []

    def made(self, sampler: Any) -> Any:
        assert sampler
        self.alive.add(_address(sampler))
        return sampler

    def free(self, sampler: Any) -> None:
        self.alive.remove(_address(sampler))
        self.freed.append(_address(sampler))


def _address(sampler: Any) -> int | None:
    return ctypes.cast(sampler, ctypes.c_void_p).value


@pytest.fixture(autouse=True)
def allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[Allocations]:
    """Every chain and every grammar that a test makes is freed, once."""
    counted = Allocations()
    chain_init, grammar_init = lc.llama_sampler_chain_init, lc.llama_sampler_init_grammar
    native_free = lc.llama_sampler_free

    def free(sampler: Any) -> None:
        counted.free(sampler)
        native_free(sampler)

    monkeypatch.setattr(
        lc, "llama_sampler_chain_init", lambda params: counted.made(chain_init(params))
    )
    monkeypatch.setattr(
        lc, "llama_sampler_init_grammar", lambda *args: counted.made(grammar_init(*args))
    )
    monkeypatch.setattr(lc, "llama_sampler_free", free)
    yield counted
    assert not counted.alive


@pytest.fixture(scope="module")
def candidates() -> Candidates:
    return Candidates(VOCAB)


class Opened:
    """Makes samplers and closes them at the end of the test."""

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates
        self._open: list[Sampler] = []

    def __call__(
        self,
        prompt: Sequence[int] = (),
        bias: Sequence[tuple[int, float]] = (),
        grammar: Any = None,
        **options: Any,
    ) -> Sampler:
        settings = GenerationOptions(**{**PLAIN, **options})
        sampler = Sampler(self._candidates, settings, prompt, bias, grammar)
        self._open.append(sampler)
        return sampler

    def close(self) -> None:
        for sampler in self._open:
            sampler.close()


@pytest.fixture
def sampler_of(candidates: Candidates, allocations: Allocations) -> Iterator[Opened]:
    opened = Opened(candidates)
    yield opened
    opened.close()


def random_logits(seed: int, size: int = VOCAB) -> Logits:
    return np.random.default_rng(seed).normal(0, 2, size).astype(np.float32)


def drawn(sampler: Sampler, logits: Logits, count: int) -> list[int]:
    """As many tokens, all from the same logits."""
    return [sampler.sample(logits) for _ in range(count)]


# -- greedy


@pytest.mark.parametrize("temperature", [0.0, 1e-7, 5e-324])
def test_greedy_is_argmax(sampler_of: Opened, temperature: float) -> None:
    """Without a temperature the best token is chosen, whatever the other settings say."""
    sampler = sampler_of(temperature=temperature, top_k=5, top_p=0.5, min_p=0.5, seed=3)
    for seed in range(50):
        logits = random_logits(seed)
        assert sampler.sample(logits) == int(logits.argmax())


def test_a_low_temperature_is_nearly_greedy(sampler_of: Opened) -> None:
    """The coldest temperature at which there is still a draw has one outcome."""
    logits = random_logits(1)
    assert set(drawn(sampler_of(temperature=1e-5), logits, 100)) == {int(logits.argmax())}


def test_near_equals_are_drawn_at_a_low_temperature(sampler_of: Opened) -> None:
    """A low temperature is not none: tokens that are as near as it is low are drawn in turn."""
    logits = np.zeros(VOCAB, np.float32)
    logits[[4, 9]] = 1.0, 1.001
    tokens = drawn(sampler_of(temperature=1e-3), logits, 1000)
    check_distribution(tokens, reference(logits, {"temperature": 1e-3}))
    assert set(tokens) == {4, 9}


def penalized(logits: Logits, recent: Sequence[int], penalty: float) -> Logits:
    """What a repeat penalty makes of logits."""
    result = logits.copy()
    for token in set(recent):
        result[token] = result[token] * penalty if result[token] <= 0 else result[token] / penalty
    return result


@pytest.mark.parametrize("penalty", [0.5, 1.1, 2.0, 10.0])
@pytest.mark.parametrize("prompt_tokens", [0, 10, WINDOW, WINDOW + 1, 300])
def test_greedy_with_a_repeat_penalty(
    sampler_of: Opened, penalty: float, prompt_tokens: int
) -> None:
    """Tokens among the last of prompt and answer are penalized, then the best is chosen."""
    chance = np.random.default_rng(prompt_tokens)
    text = chance.integers(0, VOCAB // 2, prompt_tokens).tolist()
    if prompt_tokens > WINDOW:  # a token of which the sampler should not know any more
        text = [token if token != 7 else 8 for token in text]
        text[-WINDOW - 1] = 7
    sampler = sampler_of(text, **GREEDY, repeat_penalty=penalty)
    for seed in range(100):
        logits = random_logits(seed)
        if seed == 0:
            logits[7] = logits.max() + 0.01
        expected = int(penalized(logits, text[-WINDOW:], penalty).argmax())
        assert sampler.sample(logits) == expected, seed
        text.append(expected)


def test_a_penalty_of_one_ignores_the_prompt(sampler_of: Opened) -> None:
    """The best token may be said again and again."""
    logits = random_logits(1)
    best = int(logits.argmax())
    assert drawn(sampler_of([best] * WINDOW, **GREEDY), logits, 5) == [best] * 5


# -- sampling


def reference(logits: Logits, options: dict[str, Any]) -> NDArray[np.float64]:
    """The probability of each token: top_k, top_p and min_p of the model's own probabilities,
    then the temperature."""
    scores = logits.astype(np.float64)
    order = np.argsort(-scores)
    if options.get("top_k"):
        order = order[: options["top_k"]]
    own = softmax(scores[order])
    if options.get("top_p", 1.0) < 1:
        count = int(np.searchsorted(own.cumsum(), options["top_p"])) + 1
        order = order[:count]
        own = own[:count]
    order = order[own >= options.get("min_p", 0.0) * own[0]]
    result = np.zeros(len(scores))
    result[order] = softmax(scores[order] / options["temperature"])
    return result


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def check_distribution(tokens: Sequence[int], expected: NDArray[np.float64]) -> None:
    """Impossible tokens were not drawn, and the others about as often as they should be."""
    counts = np.bincount(tokens, minlength=len(expected))
    assert not counts[expected == 0].any()
    expected = expected * len(tokens)
    common = expected >= 5
    seen = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    chi_square = ((seen - wanted) ** 2 / wanted).sum()
    freedom = len(seen) - 1
    assert chi_square <= freedom + 4 * np.sqrt(2 * freedom) + 4


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 0.6},
    {"min_p": 0.2, "temperature": 3.0},
    {"top_p": 0.7, "temperature": 0.3},
    {"top_k": 8, "top_p": 0.8, "temperature": 1.5},
    {"top_k": 20, "top_p": 0.95, "min_p": 0.03, "temperature": 0.8},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_draws_follow_the_settings(sampler_of: Opened, options: dict[str, Any]) -> None:
    """Each token is drawn as often as a softmax over what the settings leave says."""
    options = {**PLAIN, **options}
    for seed in range(2):
        logits = random_logits(seed)
        tokens = drawn(sampler_of(**options, seed=seed), logits, 3000)
        check_distribution(tokens, reference(logits, options))


def test_draws_with_a_repeat_penalty(sampler_of: Opened) -> None:
    """What was said recently is drawn less often, as the penalized logits say."""
    logits = random_logits(5)
    said = [int(token) for token in np.argsort(-logits)[:4]]
    tokens = []
    for seed in range(2000):
        sampler = sampler_of(said, repeat_penalty=1.5, seed=seed * 7919)
        tokens.append(sampler.sample(logits))
        sampler.close()
    check_distribution(tokens, reference(penalized(logits, said, 1.5), PLAIN))


def test_a_seed_reproduces(sampler_of: Opened) -> None:
    """One seed gives one answer, other seeds give others."""
    logits = random_logits(2)
    answers = [tuple(drawn(sampler_of(seed=seed), logits, 40)) for seed in (7, 7, 8, 2**32 - 2)]
    assert answers[0] == answers[1]
    assert len(set(answers)) == 3


def test_samplers_share_a_table_and_nothing_else(sampler_of: Opened) -> None:
    """Two that take turns draw what each draws alone."""
    first, second = random_logits(1), random_logits(2)
    settings: list[dict[str, Any]] = [{"seed": 1, "top_k": 3}, {"seed": 2, "repeat_penalty": 1.3}]
    alone = [
        drawn(sampler_of(**options), logits, 20)
        for options, logits in zip(settings, (first, second), strict=True)
    ]
    one, other = (sampler_of(**options) for options in settings)
    together = [(one.sample(first), other.sample(second)) for _ in range(20)]
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone


# -- logit bias


@pytest.mark.parametrize("options", [GREEDY, {}, {"top_k": 1}, {**GREEDY, "repeat_penalty": 1.1}])
def test_a_bias_forbids_and_forces(sampler_of: Opened, options: dict[str, Any]) -> None:
    """A token with -100 is not chosen although it is the best, one with 100 although the worst."""
    logits = random_logits(3)
    best, worst = int(logits.argmax()), int(logits.argmin())
    assert best not in drawn(sampler_of(bias=[(best, -100.0)], **options), logits, 200)
    assert drawn(sampler_of(bias=[(worst, 100.0)], **options), logits, 200)[0] == worst
    both = sampler_of(bias=[(best, 100.0), (worst, 100.0)], **options)
    assert both.sample(logits) == best


def test_a_bias_is_added_to_the_logits(sampler_of: Opened) -> None:
    """Small biases make tokens that much more and less likely; the caller's logits stay."""
    logits = random_logits(4)
    bias = [(3, 2.5), (int(logits.argmax()), -1.5), (10, 1.0)]
    biased = logits.copy()
    for token, value in bias:
        biased[token] += value
    before = logits.copy()
    tokens = drawn(sampler_of(bias=bias, seed=1), logits, 3000)
    check_distribution(tokens, reference(biased, PLAIN))
    assert (logits == before).all()


# -- grammars


class Language:
    """A tiny model's vocabulary, with logits that prefer given tokens."""

    def __init__(self, path: Path) -> None:
        self.model = NativeModel(
            [path],
            slots=1,
            context_length=64,
            threads=1,
            abort=AbortFlag(),
            on_progress=lambda _fraction: None,
        )
        self.size = self.model.vocabulary.size
        self.candidates = Candidates(self.size)

    def grammar(self, text: str) -> Any:
        return lc.llama_sampler_init_grammar(self.model.vocabulary.handle, text.encode(), b"root")

    def token(self, text: str) -> int:
        (token,) = self.model.vocabulary.tokenize([(text, True)])
        return token

    def logits(self, *preferred: str) -> Logits:
        """The first of these is the best, then the second; all others are far worse."""
        result = random_logits(len(preferred), self.size) - 10
        for rank, text in enumerate(preferred):
            result[self.token(text)] = 30 - 3 * rank
        return result

    def text(self, tokens: Sequence[int]) -> str:
        return b"".join(self.model.vocabulary.piece(token) for token in tokens).decode()


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Language:
    return Language(write_tiny_llama(tmp_path_factory.mktemp("sampling") / "tiny.gguf"))


@pytest.fixture
def speaker(language: Language, allocations: Allocations) -> Iterator[Opened]:
    """Makes samplers over the vocabulary of the tiny model."""
    opened = Opened(language.candidates)
    yield opened
    opened.close()


def size_of(candidates: Candidates) -> int:
    """The number of candidates that a sampler sees now: they are in llama.cpp's own array."""
    return candidates._native.size


class Asked:
    """How many candidates a grammar was asked about, in turn; kept apart from the chain."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, candidates: Candidates, grammar: Any):
        self.sizes: list[int] = []
        apply = candidates.apply

        def counting(sampler: Any) -> None:
            if _address(sampler) == _address(grammar):
                self.sizes.append(size_of(candidates))
            apply(sampler)

        monkeypatch.setattr(candidates, "apply", counting)


def answer(language: Language, sampler: Sampler, *logits: Logits) -> str:
    """A token from each of the logits, from the last ones again and again, up to the end."""
    tokens: list[int] = []
    while not tokens or not language.model.vocabulary.is_end(tokens[-1]):
        tokens.append(sampler.sample(logits[min(len(tokens), len(logits) - 1)]))
        assert len(tokens) < 50, "it does not end"
    return language.text(tokens)


CHOOSERS = [GREEDY, {**GREEDY, "repeat_penalty": 1.2}, {}, {"top_k": 3, "top_p": 0.9}]


@pytest.mark.parametrize("options", CHOOSERS, ids=str)
def test_a_grammar_restricts(language: Language, speaker: Opened, options: dict[str, Any]) -> None:
    """Whatever the model prefers, the answer is in the language, and ends where that ends."""
    refused = language.logits("z", "hello", "<|im_start|>", " ")
    refused[[language.token("b"), language.token("c")]] = [0.0, 0.1]
    answers = set()
    for seed in range(30):
        sampler = speaker(grammar=language.grammar(AB_OR_AC), seed=seed, **options)
        answers.add(answer(language, sampler, refused))
    assert answers <= {"ab", "ac"}
    assert len(answers) == (1 if options.get("temperature") == 0 else 2)


def test_a_grammar_is_asked_about_one_token_first(
    language: Language, speaker: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About the whole vocabulary it is asked only when it refused the token."""
    grammar = language.grammar(AB_OR_AC)
    asked = Asked(monkeypatch, language.candidates, grammar)
    sampler = speaker(grammar=grammar, **GREEDY)
    assert sampler.sample(language.logits("a", "b")) == language.token("a")
    assert asked.sizes == [1]
    assert sampler.sample(language.logits("a", "z", "c", "b")) == language.token("c")
    assert asked.sizes == [1, 1, language.size]
    assert sampler.sample(language.logits("<|im_end|>", "a")) == language.token("<|im_end|>")
    assert asked.sizes == [1, 1, language.size, 1]


@pytest.mark.parametrize("options", CHOOSERS, ids=str)
def test_what_a_grammar_allows_is_the_best_of_it(
    language: Language, speaker: Opened, options: dict[str, Any]
) -> None:
    """Among the allowed tokens, the model's preferences decide."""
    logits = [language.logits("z", "a"), language.logits("z", "c", "b"), language.logits("z")]
    logits[1][language.token("b")] = 0.0
    sampler = speaker(grammar=language.grammar(AB_OR_AC), **options)
    assert answer(language, sampler, *logits) == "ac"


def test_a_grammar_does_not_change_the_odds_of_what_it_allows(
    language: Language, speaker: Opened
) -> None:
    """Draws are those of a softmax over the allowed tokens, although one is drawn first."""
    logits = language.logits("z")
    logits[language.token("z")] = 1.0
    logits[language.token("b")] = 0.5
    logits[language.token("c")] = 1.5
    counts = {"b": 0, "c": 0}
    for seed in range(600):
        sampler = speaker(grammar=language.grammar('root ::= "b" | "c"'), seed=seed * 7919)
        counts[language.text([sampler.sample(logits)])] += 1
        sampler.close()
    share = 1 / (1 + np.exp(-1))
    assert counts["c"] == pytest.approx(600 * share, abs=4 * np.sqrt(600 * share * (1 - share)))


def test_a_grammar_counts_what_was_chosen(language: Language, speaker: Opened) -> None:
    """It goes on from the tokens before: three digits, then nothing but the end."""
    sampler = speaker(grammar=language.grammar("root ::= [0-9] [0-9] [0-9]"), **GREEDY)
    assert answer(language, sampler, language.logits("7", "1", "<|im_end|>")) == "777"


def test_a_choice_against_the_model_counts_as_repetition(
    language: Language, speaker: Opened
) -> None:
    """The repeat penalty sees the token that the grammar left, not the one that it refused."""
    logits = language.logits("z")
    logits[language.token("a")], logits[language.token("b")] = 2.0, 1.5
    sampler = speaker(
        grammar=language.grammar("root ::= [ab] [ab] [ab] [ab]"), **GREEDY, repeat_penalty=2.0
    )
    assert language.text(drawn(sampler, logits, 4)) == "abaa"


def test_a_bias_and_a_grammar_together(language: Language, speaker: Opened) -> None:
    """The bias decides among what the grammar allows."""
    logits = language.logits("z", "a")
    for best, other in ("bc", "cb"):
        bias = [(language.token(best), 20.0), (language.token(other), -20.0)]
        sampler = speaker(grammar=language.grammar(AB_OR_AC), bias=bias, **GREEDY)
        assert answer(language, sampler, logits) == "a" + best


@pytest.mark.parametrize("options", CHOOSERS, ids=str)
def test_nothing_is_allowed(language: Language, speaker: Opened, options: dict[str, Any]) -> None:
    """A grammar that nothing in the vocabulary can satisfy is an error, not a wrong token."""
    logits = language.logits("z", "a")
    only = [(language.token("a"), -np.inf)]
    sampler = speaker(grammar=language.grammar('root ::= "a"'), bias=only, **options)
    with pytest.raises(NoTokenAllowedError):
        sampler.sample(logits)


# -- freeing


def test_close_frees_once(language: Language, allocations: Allocations) -> None:
    """A chain with all its stages and a grammar go with the first close; more closes do nothing."""
    settings = GenerationOptions(repeat_penalty=1.1)
    grammar = language.grammar(AB_OR_AC)
    sampler = Sampler(language.candidates, settings, [], (), grammar)
    assert len(allocations.alive) == 2
    sampler.sample(language.logits("a"))
    sampler.close()
    assert not allocations.alive
    assert len(allocations.freed) == 2
    sampler.close()
    assert len(allocations.freed) == 2


def test_close_without_a_grammar(candidates: Candidates, allocations: Allocations) -> None:
    """The chain alone is freed; there is nothing else."""
    sampler = Sampler(candidates, GenerationOptions(), [])
    sampler.close()
    sampler.close()
    assert len(allocations.freed) == 1


def test_a_sampler_that_failed_is_closed_like_any_other(
    language: Language, allocations: Allocations
) -> None:
    """After an error about the grammar, nothing is left behind."""
    logits = np.full(language.size, -np.inf, np.float32)
    logits[language.token("z")] = 1.0
    sampler = Sampler(language.candidates, GenerationOptions(), [], (), language.grammar(AB_OR_AC))
    with pytest.raises(NoTokenAllowedError):
        sampler.sample(logits)
    sampler.close()
    assert len(allocations.freed) == 2


def test_stages_belong_to_their_chain(
    candidates: Candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage that is made is added to the chain, which frees it."""
    made, added = [], []
    for name in ("penalties", "greedy", "top_k", "top_p", "min_p", "temp", "dist"):
        init = getattr(lc, f"llama_sampler_init_{name}")

        def noting(*args: Any, init: Any = init) -> Any:
            made.append(_address(stage := init(*args)))
            return stage

        monkeypatch.setattr(lc, f"llama_sampler_init_{name}", noting)
    add = lc.llama_sampler_chain_add

    def adding(chain: Any, stage: Any) -> None:
        added.append(_address(stage))
        add(chain, stage)

    monkeypatch.setattr(lc, "llama_sampler_chain_add", adding)
    for options in ({"repeat_penalty": 1.1}, {**GREEDY, "repeat_penalty": 1.1}, PLAIN, GREEDY):
        Sampler(candidates, GenerationOptions(**options), []).close()
    assert made == added
    assert len(made) == 6 + 2 + 2 + 1


def test_free_sampler_takes_none() -> None:
    """There may be no sampler to free."""
    sampling.free_sampler(None)


# -- log-probabilities


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    scores = logits.astype(np.float64)
    return scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())


@pytest.mark.parametrize("top", [0, 1, 2, 5, 20, VOCAB])
def test_log_probabilities(top: int) -> None:
    """Of the token and of the most probable ones, best first, as a log-softmax gives them."""
    for seed in range(5):
        logits = random_logits(seed)
        expected = log_softmax(logits)
        own, best = log_probabilities(logits, 17, top)
        assert own == pytest.approx(expected[17], abs=1e-9)
        assert [token for token, _ in best] == np.argsort(-expected)[:top].tolist()
        assert [value for _, value in best] == pytest.approx(np.sort(expected)[::-1][:top])


def test_log_probabilities_of_equals() -> None:
    """Where fewer values than alternatives are distinct, the alternatives are still as many
    tokens, no token twice, and the best among them."""
    logits = np.zeros(VOCAB, np.float32)
    logits[5] = 2.0
    _, best = log_probabilities(logits, 0, 20)
    tokens = [token for token, _ in best]
    assert tokens[0] == 5
    assert len(set(tokens)) == 20
    assert len({value for _, value in best}) == 2


def test_log_probabilities_of_extremes() -> None:
    """Huge logits do not overflow, and what is impossible has a probability of zero."""
    logits = np.array([3e38, -3e38, 3e38, -np.inf], np.float32)
    own, best = log_probabilities(logits, 3, 2)
    assert own == -np.inf
    assert {token for token, _ in best} == {0, 2}
    assert [value for _, value in best] == pytest.approx([np.log(0.5)] * 2)
    certain, _ = log_probabilities(np.array([0.0, -1e4], np.float32), 0, 0)
    assert certain == 0.0


def test_log_probabilities_know_no_settings(sampler_of: Opened) -> None:
    """They are the model's own: the logits are not changed by a sampler, nor by them."""
    logits = random_logits(6)
    before = log_probabilities(logits, 3, 5)
    sampler_of(bias=[(3, 50.0)], **GREEDY, repeat_penalty=1.5).sample(logits)
    assert log_probabilities(logits, 3, 5) == before
    assert (logits == random_logits(6)).all()
