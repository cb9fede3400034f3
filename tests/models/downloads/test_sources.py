"""Where files come from. The hub is an imitation on this machine, asked by `huggingface_hub` itself
in processes of their own: it reads its environment when it is imported."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import (
    LoopbackRequest,
    LoopbackServer,
    Misbehaviour,
)

from orion_oie.cancellation import CancelScope
from orion_oie.config import DownloadConfig
from orion_oie.errors import DownloadError
from orion_oie.models.downloads.cache import (
    FileRecord,
    ModelCache,
)
from orion_oie.models.downloads.sources import locate
from orion_oie.models.specs import SourceSpec

BOUND_S = 60
OLD, NEW = "a" * 40, "b" * 40  # commits
NUMBERS = random.Random(1)
CONTENT = {
    (commit, name): NUMBERS.randbytes(1_500_000)
    for commit in (OLD, NEW)
    for name in ("model.gguf", "deep/second.gguf")
}
SMALL = b'{"small": true}'  # not kept elsewhere: the hub answers itself


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# -- addresses


def test_files_at_an_address(tmp_path: Path) -> None:
    """Each below it, with its name quoted and its digest; no header."""
    paths = (tmp_path / "x", tmp_path / "y")
    digests = ["0" * 64, "1" * 64]
    for end in ("", "/"):
        source = SourceSpec(
            url=f"https://example.org/a b{end}", shards=["x", "d/y ü%?#.gguf"], sha256=digests
        )
        located = locate(source, paths)
        assert located.local == {}
        assert [file.url for file in located.remote] == [
            "https://example.org/a b/x",
            "https://example.org/a b/d/y%20%C3%BC%25%3F%23.gguf",
        ]
        assert [file.path for file in located.remote] == list(paths)
        assert [file.sha256 for file in located.remote] == digests
        assert all(not file.headers and file.revision is None for file in located.remote)
    (unknown,) = locate(SourceSpec(url="HTTP://example.org", shards=["x"]), paths[:1]).remote
    assert unknown.sha256 is None


@pytest.mark.parametrize(
    "url", ["ftp://example.org", "file:///etc", "example.org/a", "/etc", "", "httpx://a", "s3://b"]
)
def test_other_protocols(tmp_path: Path, url: str) -> None:
    """Only HTTP is spoken."""
    source = SourceSpec(url=url, shards=["hostname"])
    cache = ModelCache(tmp_path)
    with pytest.raises(DownloadError, match="only http and https can be fetched"):
        cache.pull(source, DownloadConfig(), CancelScope())
    assert cache.find(source) is None


@pytest.mark.parametrize("source", [{"path": "x.gguf"}, {"package": "pip", "file": "x"}])
def test_what_is_never_fetched(source: dict[str, str]) -> None:
    """Files of this machine have no address."""
    with pytest.raises(DownloadError, match="cannot be fetched"):
        locate(SourceSpec.model_validate(source), (Path("x"),))


# -- the hub


class Hub:
    """An imitation of the hub, with one repository: it knows commits, and a second server has the
    contents."""

    def __init__(self, folder: Path) -> None:
        self.refs = {"main": OLD, "v1": OLD}
        self.is_moving = False
        """Whether `main` moves as soon as anybody has asked for it."""
        self.refusal: Misbehaviour | None = None
        """The answer to everything, if there is one."""
        self.of_contents: Callable[[], Misbehaviour | None] = lambda: None
        """What is wrong with the next content."""
        contents = folder / "contents"
        contents.mkdir(parents=True)
        for content in CONTENT.values():
            (contents / sha256(content)).write_bytes(content)
        for revision in (*self.refs, OLD, NEW):
            small = folder / "hub" / "org" / "name" / "resolve" / revision / "small.json"
            small.parent.mkdir(parents=True)
            small.write_bytes(SMALL)
        self.contents = LoopbackServer(contents, misbehave=lambda _: self.of_contents())
        self.server = LoopbackServer(folder / "hub", misbehave=self._answer)

    def close(self) -> None:
        self.server.close()
        self.contents.close()

    @property
    def asked(self) -> int:
        """How many requests there were, to both servers."""
        return len(self.server.requests) + len(self.contents.requests)

    def _answer(self, request: LoopbackRequest) -> Misbehaviour:
        if self.refusal is not None:
            return self.refusal
        found = re.fullmatch(r"/org/name/resolve/([^/]+)/(.+)", request.path)
        if found is None:
            return Misbehaviour(status=401, headers={"X-Error-Code": "RepoNotFound"})
        revision, name = found.groups()
        commit = self.refs.get(revision, revision)
        if self.is_moving:
            self.refs["main"] = NEW
        if commit not in (OLD, NEW):
            return Misbehaviour(status=404, headers={"X-Error-Code": "RevisionNotFound"})
        about = {"X-Repo-Commit": commit}
        if name == "small.json":
            etag = hashlib.sha1(SMALL).hexdigest()
            return Misbehaviour(headers={**about, "ETag": f'"{etag}"'})
        content = CONTENT.get((commit, name))
        if content is None:
            return Misbehaviour(status=404, headers={**about, "X-Error-Code": "EntryNotFound"})
        digest = sha256(content)
        about |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        return Misbehaviour(redirect=f"{self.contents.url}/{digest}?signed=1", headers=about)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(tmp_path)
    yield hub
    hub.close()


CHILD = """
import json, sys
root, source, is_of_the_hub = sys.argv[1:]
source = json.loads(source)
if is_of_the_hub:
    from huggingface_hub import hf_hub_download

    print(json.dumps({"paths": [hf_hub_download(source["hub"], f) for f in source["files"]]}))
    sys.exit()
from orion_oie.cancellation import CancelScope
from orion_oie.config import DownloadConfig
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.errors import OrionError
from orion_oie.models.specs import SourceSpec

try:
    config = DownloadConfig(connections=1, retries=0)
    source = SourceSpec.model_validate(source)
    paths = ModelCache(root).pull(source, config, CancelScope())
    print(json.dumps({"paths": [str(path) for path in paths]}))
except OrionError as error:
    print(json.dumps({"error": type(error).__name__, "message": error.message}))
"""


class User:
    """Somebody with a cache of the library and one of the hub, whose commands are processes."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.cache = ModelCache(folder / "cache")
        self._folder = folder
        self._endpoint = endpoint

    def pull(self, *files: str, of_the_hub: bool = False, **source: Any) -> list[Path]:
        """The files that were fetched; `HF_...` are set in the environment. Fails on an error."""
        said = self._run(files, of_the_hub, source)
        assert "error" not in said, said
        return [Path(path) for path in said["paths"]]

    def fail(self, *files: str, **source: Any) -> str:
        """The message of the `DownloadError` that a pull ends with. Nothing is there then."""
        said = self._run(files, False, source)
        assert said.get("error") == "DownloadError", said
        assert [file for file in self.cache.files() if file.state != "partial"] == []
        return said["message"]

    def _run(self, files: tuple[str, ...], of_the_hub: bool, source: dict[str, Any]) -> Any:
        ours = {name: source.pop(name) for name in list(source) if name.startswith("HF_")}
        others = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "SSL_CERT_"))
        }
        environment = {
            **others,
            "NO_PROXY": "*",
            "SSL_CERT_DIR": str(self._folder),  # certificates take long to load
            "HF_HUB_DISABLE_TELEMETRY": "1",  # it has requests of its own
            "HF_HOME": str(self._folder / "hf"),
            "HF_ENDPOINT": self._endpoint,
            **ours,
        }
        spec = {"hub": "org/name", "files": files or ("model.gguf",), **source}
        arguments = [str(self.cache.root), json.dumps(spec), "1" if of_the_hub else ""]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=BOUND_S,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def record(self, path: Path) -> FileRecord:
        return self.cache.records()[path.relative_to(self.cache.root).as_posix()]


@pytest.fixture
def user(tmp_path: Path, hub: Hub) -> User:
    return User(tmp_path, hub.server.url)


def test_files_of_the_hub(hub: Hub, user: User) -> None:
    """They come with the digests that the hub names and the commit they are of; the token goes to
    the hub with every request, and to nobody else."""
    names = ["model.gguf", "small.json", "deep/second.gguf"]
    paths = user.pull(*names, HF_TOKEN="hf_secret")
    model, small, second = paths
    assert model.read_bytes() == CONTENT[OLD, "model.gguf"]
    assert small.read_bytes() == SMALL
    assert second.read_bytes() == CONTENT[OLD, "deep/second.gguf"]
    for path, is_expected in zip(paths, (True, False, True), strict=True):
        record = user.record(path)
        assert record.revision == OLD
        assert record.is_expected == is_expected
        assert record.sha256 == sha256(path.read_bytes())
        assert f"/resolve/{OLD}/" in record.url
    assert {request.method for request in hub.server.requests} == {"HEAD", "GET"}
    for request in hub.server.requests:
        assert request.headers["authorization"] == "Bearer hf_secret"
    for request in hub.contents.requests:
        assert "authorization" not in request.headers
    large = len(model.read_bytes()) + len(second.read_bytes())
    assert hub.contents.bytes_sent == large + 2
    assert not any(path.is_symlink() for path in paths)
    stored = [path for path in user.cache.root.rglob("*") if path.is_file()]
    assert not any(b"hf_secret" in path.read_bytes() for path in stored)


def test_a_revision_that_is_named(hub: Hub, user: User) -> None:
    """A branch, a tag or a commit: that one is fetched. Without a token, none is sent."""
    hub.refs["main"] = NEW
    (tagged,) = user.pull(revision="v1")
    assert tagged.read_bytes() == CONTENT[OLD, "model.gguf"]
    assert user.record(tagged).revision == OLD
    (newest,) = user.pull(revision=NEW)
    assert newest.read_bytes() == CONTENT[NEW, "model.gguf"]
    assert tagged.read_bytes() == CONTENT[OLD, "model.gguf"]
    assert not any("authorization" in request.headers for request in hub.server.requests)


def test_what_the_hub_library_has(hub: Hub, user: User) -> None:
    """Is used where it lies, without a single request; also offline."""
    (theirs,) = user.pull(of_the_hub=True)
    asked = hub.asked
    (ours,) = user.pull(HF_HUB_OFFLINE="1")
    assert hub.asked == asked
    assert ours.is_symlink()
    assert ours.resolve() == theirs.resolve()
    assert ours.read_bytes() == CONTENT[OLD, "model.gguf"]
    assert user.cache.root not in ours.resolve().parents
    assert [file.state for file in user.cache.files()] == ["linked"]


def test_what_the_hub_library_has_may_be_too_old(hub: Hub, user: User) -> None:
    """A file that does not have the digest that is asked for is not used."""
    user.pull(of_the_hub=True)
    hub.refs["main"] = NEW
    content = CONTENT[NEW, "model.gguf"]
    (path,) = user.pull(sha256=[sha256(content)])
    assert path.read_bytes() == content
    assert not path.is_symlink()


def test_files_of_one_model_are_of_one_commit(hub: Hub, user: User) -> None:
    """That of the first file, when the hub's library has it and the hub has a newer one."""
    user.pull("model.gguf", of_the_hub=True)
    hub.refs["main"] = NEW
    first, second = user.pull("model.gguf", "deep/second.gguf")
    assert first.read_bytes() == CONTENT[OLD, "model.gguf"]
    assert second.read_bytes() == CONTENT[OLD, "deep/second.gguf"]
    assert user.record(second).revision == OLD


def test_the_branch_moves_between_two_files(hub: Hub, user: User) -> None:
    """The second file is of the commit of the first."""
    hub.is_moving = True
    paths = user.pull("model.gguf", "deep/second.gguf")
    assert [user.record(path).revision for path in paths] == [OLD, OLD]
    assert paths[1].read_bytes() == CONTENT[OLD, "deep/second.gguf"]


def test_a_resume_stays_with_its_commit(hub: Hub, user: User) -> None:
    """The branch moved since a download ended in the middle: it goes on with what it began, and
    fetches only the rest. So does one of a file that was removed by hand."""
    script = iter([None, None])
    hub.of_contents = lambda: next(script, Misbehaviour(status=410))
    assert "410" in user.fail()
    hub.of_contents = lambda: None
    (part,) = user.cache.files()
    old = CONTENT[OLD, "model.gguf"]
    assert 0 < part.arrived_bytes < len(old)

    hub.refs["main"] = NEW
    sent = hub.contents.bytes_sent
    (path,) = user.pull()
    assert path.read_bytes() == old
    assert user.record(path).revision == OLD
    assert hub.contents.bytes_sent - sent == len(old) - part.arrived_bytes + 1

    path.unlink()
    assert user.pull() == [path]
    assert path.read_bytes() == old
    user.cache.remove(SourceSpec(hub="org/name", files=["model.gguf"]))
    user.pull()
    assert path.read_bytes() == CONTENT[NEW, "model.gguf"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository(hub: Hub, user: User, status: int) -> None:
    """The error says what to do."""
    hub.refusal = Misbehaviour(status=status, headers={"X-Error-Code": "GatedRepo"})
    message = user.fail()
    assert "org/name/model.gguf (revision main) is gated" in message
    assert "HF_TOKEN" in message


def test_what_the_hub_does_not_have(user: User) -> None:
    """A file, a revision, a repository: the error names it."""
    for source, named in [
        ({"files": ["nothing"]}, "org/name/nothing"),
        ({"revision": "v9"}, "revision v9"),
        ({"hub": "org/none"}, "org/none/model.gguf"),
    ]:
        message = user.fail(**source)
        assert named in message
        assert "cannot be fetched from the hub" in message


def test_a_hub_that_is_broken(hub: Hub, user: User) -> None:
    """That is an error like any other."""
    hub.refusal = Misbehaviour(status=500)
    assert "cannot be fetched from the hub" in user.fail()


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    """The error says so."""
    with LoopbackServer(tmp_path) as closed:
        pass
    assert "the hub cannot be reached" in User(tmp_path, closed.url).fail()


def test_access_that_ends(hub: Hub, user: User) -> None:
    """The hub knows the file, but does not give it: the error speaks of the token."""
    hub.of_contents = lambda: Misbehaviour(status=403)
    message = user.fail(HF_TOKEN="hf_secret")
    assert "token" in message
    assert "hf_secret" not in message


def test_offline(hub: Hub, user: User) -> None:
    """The error says why nobody is asked, and nobody is."""
    assert "HF_HUB_OFFLINE is set" in user.fail(HF_HUB_OFFLINE="1")
    assert hub.asked == 0


@pytest.mark.parametrize(
    ("repository", "name"), [("a--b/c..d", "x"), ("org/name", "a\\..\\x"), ("org/-x-", "x")]
)
def test_a_name_that_the_hub_cannot_have(tmp_path: Path, repository: str, name: str) -> None:
    """Nobody is asked for it."""
    source = SourceSpec(hub=repository, files=[name])
    with pytest.raises(DownloadError, match="cannot be on the hub"):
        ModelCache(tmp_path).pull(source, DownloadConfig(), CancelScope())


def test_without_the_hub_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra that brings it."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    source = SourceSpec(hub="org/name", files=["x"])
    with pytest.raises(DownloadError, match=r"orion-oie\[hub\]"):
        ModelCache(tmp_path).pull(source, DownloadConfig(), CancelScope())
