"""Kinds of prompts that are easily misread, by examples that nothing was trained on."""

from pathlib import Path

import pytest
from routes import AGENTS, agent, assert_sound

from orion_oie.models.specs import CONVERSATION, RegistryFile
from orion_oie.routing.base import RouteContext
from orion_oie.routing.hybrid import HybridRouter

ROOT = Path(__file__).parents[2]
SHIPPED = RegistryFile.model_validate_json((ROOT / "models.json").read_text("utf-8")).agents

# Logs, configuration and page layout, alone or with a short question.
CODE = {
    "yaml": """\
services:
  web:
    image: nginx:1.25
    ports:
      - "80:80"
  cache:
    image: redis:7""",
    "ini": """\
[server]
host = 0.0.0.0
port = 8080

[log]
level = debug""",
    "nginx": """\
server {
  listen 80;
  server_name example.org;
  location / {
    proxy_pass http://127.0.0.1:3000;
  }
}""",
    "docker": """\
FROM python:3.12-slim
WORKDIR /app
COPY . .
RUN pip install -r requirements.txt
CMD ["python", "main.py"]""",
    "systemd": """\
[Unit]
Description=Backup
After=network.target

[Service]
ExecStart=/usr/bin/backup
Restart=on-failure

[Install]
WantedBy=multi-user.target""",
    "k8s": """\
apiVersion: v1
kind: Service
metadata:
  name: api
spec:
  selector:
    app: api
  ports:
  - port: 80""",
    "trace": """\
Traceback (most recent call last):
  File "app.py", line 12, in <module>
    main()
KeyError: 'user'""",
    "java": """\
Exception in thread "main" java.lang.NullPointerException
\tat com.acme.App.run(App.java:42)
\tat com.acme.App.main(App.java:9)""",
    "log": """\
2026-03-01 12:00:01 ERROR db: connection refused (10.0.0.5:5432)
2026-03-01 12:00:06 ERROR db: connection refused (10.0.0.5:5432)
what's wrong""",
    "env": """\
DATABASE_URL=postgres://localhost/app
DEBUG=true
SECRET_KEY=abc123
is this safe to commit?""",
    "toml": """\
[tool.black]
line-length = 100
target-version = ["py312"]""",
    "cron": """\
0 3 * * * /usr/bin/backup.sh >> /var/log/backup.log 2>&1
why does it not run""",
    "hosts": """\
127.0.0.1 localhost
192.168.1.10 nas
::1 ip6-localhost""",
    "css": """\
.card { display: flex; gap: 1rem; }
.card img { width: 50%; }""",
    "css2": "how do I center a div",
    "css3": "my sidebar falls below the content on small screens",
    "git": """\
error: failed to push some refs to 'origin'
hint: Updates were rejected because the tip is behind""",
    "npm": """\
npm ERR! code E404
npm ERR! 404 Not Found - GET https://registry.npmjs.org/foo""",
    "ssh": """\
Host bastion
  HostName 10.1.2.3
  User deploy
  IdentityFile ~/.ssh/id_ed25519
why permission denied""",
    "gitlab": """\
stages:
  - test
test:
  script:
    - pytest
why is it not triggered""",
}

# Nothing to go by, in several scripts.
MEANINGLESS = [
    "👍👍",
    "?!?!",
    "....",
    "\u200b",
    "   \u2003",
    "zzzzzzzz",
    "qwerty",
    "asdkjhaskjdh",
    "lkjsdf oiwer zxcv",
    "йцукен",
    "фывафыва",
    "あああああ",
    "ㅋㅋㅋㅋㅋ",
    "هههههه",
    "1234",
    "3.14159",
    "00:00",
    "12/03/2024",
    "+49 170 1234567",
    "d41d8cd98f00b204e9800998ecf8427e",
    "aGVsbG8gd29ybGQsIHRoaXMgaXMgYmFzZTY0",
    "550e8400-e29b-41d4-a716-446655440000",
    "blorptang",
    "Xyzzyx",
    "sdfg sdfg sdfg",
    "⠀",
    "\u180e",
    "----",
    "[]",
    "{}",
    "<>",
    "''",
    "\\n\\n",
    "%20%20",
    "null",
    "\x1b[0m",
]

# Questions that name topics without asking for them.
CONVERSATION_ALL_THE_SAME = [
    "https://example.org/2024/some-python-story",
    "example.org/recipes/poem",
    "summarise www.bbc.co.uk/news/12345",
    "what's on news.ycombinator.com today",
    "ada@example.org",
    "who is ada@example.org?",
    "is bit.ly/3xYz safe",
    "can you read https://shop.example/sql?code=1 and tell me what it sells",
    "no SQL please, why is the sky blue",
    "don't write a poem, just tell me when the sun sets",
    "I'd like plain words rather than code: what is a computer virus",
    "not a translation: what does hygge feel like",
    "without code, explain what the internet is",
    "python sql docker poem translate. What should I cook tonight?",
    "What should I cook tonight? python sql docker poem translate",
    "how do I boil an egg #python #sql #poem",
    "translate poem sql code: why do cats purr",
]


@pytest.fixture(scope="module")
def router() -> HybridRouter:
    return HybridRouter()


@pytest.mark.parametrize("kind", CODE)
def test_configuration_logs_and_layout_are_code(router: HybridRouter, kind: str) -> None:
    assert router.route(CODE[kind], SHIPPED).agent_id == "code"


@pytest.mark.parametrize("text", MEANINGLESS)
def test_what_has_no_sense_goes_to_the_conversation(router: HybridRouter, text: str) -> None:
    """Without any claim to be sure of it, and the reason names nothing that is not there."""
    found = router.route(text, SHIPPED)
    assert (found.agent_id, found.confidence < 0.6) == (CONVERSATION, True)
    assert_sound(found, SHIPPED)


@pytest.mark.parametrize("text", MEANINGLESS[:6])
def test_what_has_no_sense_stays_in_a_conversation(router: HybridRouter, text: str) -> None:
    """A thumb up is an answer to the agent that has just spoken."""
    router.note("s", "code")
    trial = RouteContext(session_id="s", is_trial=True)
    assert router.route(text, SHIPPED, trial).agent_id == "code"


@pytest.mark.parametrize("text", CONVERSATION_ALL_THE_SAME)
def test_topics_that_are_only_named(router: HybridRouter, text: str) -> None:
    """In addresses, in what is excluded, and in lists of keywords."""
    assert router.route(text, SHIPPED).agent_id == CONVERSATION


def test_the_reason_for_nothing() -> None:
    found = HybridRouter().route("?!", SHIPPED)
    assert found.reason == "there is no word in the question to go by"
    assert found.stages == ["linear"]


def test_agents_without_a_topic_look_for_their_hints_in_addresses() -> None:
    """Where a page is may be all that such an agent knows of."""
    tracker = agent(patterns={r"tracker\.example/\d+": 6})
    agents = {**AGENTS, "tracker": tracker}
    router = HybridRouter()
    assert router.route("what about https://tracker.example/4711", agents).agent_id == "tracker"
    owner = {**AGENTS, "data": tracker.model_copy(deep=True)}
    found = router.route("what about https://tracker.example/4711", owner)
    assert found.agent_id == CONVERSATION
