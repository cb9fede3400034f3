"""Which files of the hub a name stands for. The hub is an imitation on this machine."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import (
    LoopbackRequest,
    LoopbackServer,
    Misbehaviour,
)

from orion_oie.errors import DownloadError, ModelNotFoundError
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.downloads.listing import ResolvedHub, resolve_hub
from orion_oie.models.source_names import HubName, parse_source_name

OLD, NEW = "a" * 40, "b" * 40
SECRET = "hf_secret"
NAMES = ("m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-F16.gguf")
BIG = tuple(f"BF16/m-BF16-0000{number}-of-00002.gguf" for number in (1, 2))
BOUND_S = 60


def content_of(commit: str, name: str) -> bytes:
    return f"GGUF {commit} {name}".encode() * 50


class Hub:
    """Repositories with lists of their files, and the files themselves."""

    def __init__(self, folder: Path) -> None:
        self.files = {"Org/Name": [*NAMES, *BIG, "README.md"]}
        self.commit = OLD
        self.refusal: Misbehaviour | None = None
        for name in (*NAMES, *BIG):
            for commit in (OLD, NEW):
                path = folder / "Org" / "Name" / "resolve" / commit / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content_of(commit, name))
        self.server = LoopbackServer(folder, misbehave=self._answer)

    @property
    def asked(self) -> list[str]:
        """The lists that were asked for. The hub's library has requests of its own too."""
        paths = [request.path for request in self.server.requests]
        return [path for path in paths if path.startswith("/api/models/")]

    def _answer(self, request: LoopbackRequest) -> Misbehaviour | None:
        if self.refusal is not None:
            return self.refusal
        found = re.fullmatch(
            r"/api/models/([^/]+/[^/?]+)(?:/revision/([^?]+))?\?blobs=[Tt]rue", request.path
        )
        if found is None:
            return self._file(request)
        repository = {name.lower(): name for name in self.files}.get(found[1].lower())
        if repository is None:
            return Misbehaviour(status=401, headers={"X-Error-Code": "RepoNotFound"})
        commit = {None: self.commit, "main": self.commit, "v1": OLD, OLD: OLD, NEW: NEW}.get(
            found[2]
        )
        if commit is None:
            return Misbehaviour(status=404, headers={"X-Error-Code": "RevisionNotFound"})
        siblings = [self._sibling(commit, name) for name in self.files[repository]]
        about = {"id": repository, "sha": commit, "private": False, "tags": [], "downloads": 0,
                 "likes": 0, "siblings": siblings}  # fmt: skip
        return Misbehaviour(
            status=200,
            body=json.dumps(about).encode(),
            headers={"Content-Type": "application/json"},
        )

    def _file(self, request: LoopbackRequest) -> Misbehaviour | None:
        found = re.fullmatch(r"/Org/Name/resolve/([^/]+)/(.+)", request.path)
        if found is None:
            return Misbehaviour(status=404, headers={"X-Error-Code": "EntryNotFound"})
        commit, name = found.groups()
        if commit == "main":
            return Misbehaviour(redirect=f"/Org/Name/resolve/{self.commit}/{name}")
        digest = hashlib.sha256(content_of(commit, name)).hexdigest()
        return Misbehaviour(headers={"X-Repo-Commit": commit, "ETag": f'"{digest}"'})

    def _sibling(self, commit: str, name: str) -> dict[str, Any]:
        content = content_of(commit, name)
        sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
        if name.endswith(".gguf"):
            digest = hashlib.sha256(content).hexdigest()
            sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 1}
        return sibling


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that `huggingface_hub` asks; its own cache is empty."""
    import huggingface_hub.constants as constants

    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", hub.server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "*")
    yield hub
    hub.server.close()


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    return ModelCache(tmp_path / "cache")


def resolve(cache: ModelCache, text: str, **options: Any) -> ResolvedHub:
    name = parse_source_name(text)
    assert isinstance(name, HubName)
    return resolve_hub(name, cache, **options)


def put(cache: ModelCache, found: ResolvedHub) -> None:
    """Put the files of an answer into the cache, as if they had been fetched."""
    for path in cache.paths(found.source):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def put_into_hub_cache(folder: Path, name: str, commit: str = OLD) -> Path:
    """Put a file into the cache of the hub's library."""
    path = folder / "hf" / "models--Org--Name" / "snapshots" / commit / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content_of(commit, name))
    refs = path.parents[2] / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(commit)
    return path


def test_files_with_commit_digests_and_sizes(hub: Hub, cache: ModelCache) -> None:
    """As the hub lists them, with one request; the name is spelled as on the hub."""
    found = resolve(cache, "hf:org/name")
    content = content_of(OLD, NAMES[0])
    assert found.source.hub == "Org/Name"
    assert found.source.files == [NAMES[0]]
    assert found.source.revision == OLD
    assert found.source.sha256 == [hashlib.sha256(content).hexdigest()]
    assert (found.sizes, found.size_bytes) == ((len(content),), len(content))
    assert (found.quantization, found.paths) == ("Q4_K_M", None)
    assert hub.asked == ["/api/models/org/name?blobs=true"]
    assert hub.server.requests[-1].headers["authorization"] == f"Bearer {SECRET}"


def test_quantizations_files_and_revisions(hub: Hub, cache: ModelCache) -> None:
    """Whatever a name can say."""
    assert resolve(cache, "hf:org/name:q8_0").source.files == [NAMES[1]]
    assert resolve(cache, "hf:org/name:bf16").source.files == list(BIG)
    assert resolve(cache, f"hf:org/name/{NAMES[1]}").source.files == [NAMES[1]]
    hub.commit = NEW
    assert resolve(cache, "hf:org/name@v1").source.revision == OLD
    assert resolve(cache, f"hf:org/name@{NEW}").source.revision == NEW


def test_a_commit_is_asked_for_once(hub: Hub, cache: ModelCache) -> None:
    """Its listing cannot change; a branch may have moved on while its files were not fetched."""
    for _ in range(3):
        resolve(cache, f"hf:org/name@{OLD}")
        resolve(cache, f"hf:org/name:q8_0@{OLD}")
    assert len(hub.asked) == 1
    assert resolve(cache, "hf:org/name").source.revision == OLD
    hub.commit = NEW
    assert resolve(cache, "hf:org/name").source.revision == NEW
    assert len(hub.asked) == 3


def test_files_that_are_here_are_the_answer(hub: Hub, cache: ModelCache) -> None:
    """Without a request, though the branch moved on; `refresh` follows it."""
    put(cache, resolve(cache, "hf:org/name"))
    hub.commit = NEW
    assert resolve(cache, "hf:org/name").source.revision == OLD
    assert len(hub.asked) == 1
    assert resolve(cache, "hf:org/name", refresh=True).source.revision == NEW
    assert len(hub.asked) == 2


def test_files_in_the_cache_of_the_hub_library(hub: Hub, cache: ModelCache, tmp_path: Path) -> None:
    """They are the answer, in place, when nothing better can be there."""
    path = put_into_hub_cache(tmp_path, NAMES[1])
    found = resolve(cache, "hf:org/name:q8_0")
    assert found.paths == (path,)
    assert found.source.revision == OLD
    assert hub.asked == []
    assert resolve(cache, "hf:org/name").quantization == "Q4_K_M"  # the hub has a better one
    assert len(hub.asked) == 1
    best = put_into_hub_cache(tmp_path, NAMES[0])
    assert resolve(cache, "hf:org/name").paths == (best,)
    assert len(hub.asked) == 1


@pytest.mark.parametrize("how", ["closed", "500", "offline", "no library"])
def test_without_the_hub(
    hub: Hub, cache: ModelCache, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was known before is the answer, then what the library has; else the error says what to
    do."""
    known = resolve(cache, "hf:org/name")
    if how == "closed":
        hub.server.close()
    elif how == "500":
        hub.refusal = Misbehaviour(status=500)
    elif how == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert resolve(cache, "hf:org/name") == known
    assert resolve(cache, "hf:org/name", refresh=True) == known
    with pytest.raises(ModelNotFoundError, match=r"has no quantization 'Q2_K' .* there are Q4_K_M"):
        resolve(cache, "hf:org/name:q2_k")
    expected = {"closed": "cannot be reached", "500": "status 500", "offline": "HF_HUB_OFFLINE",
                "no library": r"orion-oie\[hub\]"}[how]  # fmt: skip
    with pytest.raises(DownloadError, match=expected) as caught:
        resolve(cache, "hf:org/other")
    assert SECRET not in caught.value.message
    put_into_hub_cache(tmp_path, NAMES[1])
    assert resolve(ModelCache(tmp_path / "new"), "hf:org/name").quantization == "Q8_0"


def test_what_the_hub_does_not_have(hub: Hub, cache: ModelCache) -> None:
    """A repository, a revision, a quantization, a GGUF file: each has its error."""
    hub.files["Org/Tensors"] = ["model.safetensors", "config.json"]
    for text, reason in {
        "hf:org/none": "there is no such repository on http.*, or it is private: check the sp",
        "hf:org/name@v9": "no such branch, tag or commit",
        "hf:org/name:q5_k_m": r"hf:Org/Name has no quantization 'Q5_K_M' \(did you mean 'Q4_K_M'",
        "hf:org/name/m-Q4_0.gguf": "has no file 'm-Q4_0.gguf'",
        "hf:org/tensors": "no GGUF model, but a model in another format",
    }.items():
        with pytest.raises(ModelNotFoundError, match=reason) as caught:
            resolve(cache, text)
        assert SECRET not in f"{caught.value.message} {caught.value.details}"


def test_a_gated_repository(hub: Hub, cache: ModelCache) -> None:
    """The error says what to do."""
    hub.refusal = Misbehaviour(status=403, headers={"X-Error-Code": "GatedRepo"})
    with pytest.raises(DownloadError, match="is gated: accept its terms on the hub, then set HF_"):
        resolve(cache, "hf:org/name")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"files": 5}', "[" * 10**5, "digest", "name"])
def test_a_damaged_memory(hub: Hub, cache: ModelCache, damage: str) -> None:
    """Counts as none."""
    known = resolve(cache, f"hf:org/name@{OLD}")
    (path,) = (cache.root / "listings").iterdir()
    if damage in ("digest", "name"):
        raw = json.loads(path.read_text())
        raw["files"][0]["sha256" if damage == "digest" else "name"] = 5
        damage = json.dumps(raw)
    path.write_text(damage)
    assert resolve(cache, f"hf:org/name@{OLD}") == known
    assert len(hub.asked) == 2


def test_a_cache_that_cannot_be_written(hub: Hub, cache: ModelCache) -> None:
    """The answer is the same; it is just not remembered."""
    cache.root.parent.mkdir(exist_ok=True)
    cache.root.write_text("a file in its place")
    assert resolve(cache, "hf:org/name").source.files == [NAMES[0]]


def test_other_hubs_have_other_listings(
    hub: Hub, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one endpoint said is not taken for another's; nothing remembered holds the token."""
    resolve(cache, f"hf:org/name@{OLD}")
    monkeypatch.setenv("HF_ENDPOINT", "https://other.example")
    resolve(cache, f"hf:org/name@{OLD}")
    assert len(hub.asked) == 2
    for path in (cache.root / "listings").iterdir():
        assert SECRET not in path.read_text()


CHILD = """
import json, sys
from orion_oie.cancellation import CancelScope
from orion_oie.config import DownloadConfig
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.downloads.listing import resolve_hub
from orion_oie.models.source_names import parse_source_name

_, root, text, *of_the_library = sys.argv
if of_the_library:
    from huggingface_hub import hf_hub_download

    paths = [hf_hub_download("Org/Name", name) for name in of_the_library]
elif root:
    cache = ModelCache(root)
    found = resolve_hub(parse_source_name(text), cache)
    paths = cache.pull(found.source, DownloadConfig(), CancelScope())
else:
    paths = resolve_hub(parse_source_name(text), ModelCache("/nonexistent")).paths
print(json.dumps([str(path) for path in paths]))
"""


class Processes:
    """Processes that ask a hub by `HF_ENDPOINT`, with everything of its library as it is."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        self._environment = {
            **others,
            "NO_PROXY": "*",
            "SSL_CERT_DIR": str(folder),  # certificates take long to load
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(folder / "hf"),
            "HF_ENDPOINT": endpoint,
        }

    def run(self, *arguments: str, **more: str) -> list[Path]:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments],
            env={**self._environment, **more},
            capture_output=True,
            text=True,
            timeout=BOUND_S,
        )
        assert done.returncode == 0, done.stderr
        return [Path(path) for path in json.loads(done.stdout.splitlines()[-1])]


def test_a_name_is_fetched(tmp_path: Path) -> None:
    """Into the cache; the next time it is found there offline."""
    hub = Hub(tmp_path / "hub")
    processes = Processes(tmp_path, hub.server.url)
    arguments = (str(tmp_path / "cache"), "hf:org/name:bf16")
    first = processes.run(*arguments)
    assert [path.read_bytes() for path in first] == [content_of(OLD, name) for name in BIG]
    hub.server.close()
    assert processes.run(*arguments) == processes.run(*arguments, HF_HUB_OFFLINE="1") == first


def test_what_the_hub_library_fetched_is_found(tmp_path: Path) -> None:
    """In the folders as it really writes them, without a hub."""
    hub = Hub(tmp_path / "hub")
    processes = Processes(tmp_path, hub.server.url)
    theirs = processes.run("", "", *BIG)
    hub.server.close()
    assert processes.run("", "hf:org/name:bf16") == theirs
    assert [path.read_bytes() for path in theirs] == [content_of(OLD, name) for name in BIG]
