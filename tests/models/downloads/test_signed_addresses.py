"""Addresses with a query: the signature goes with each request, and nowhere else."""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from helpers import registry_with
from loopback import (
    LoopbackRequest,
    LoopbackServer,
    Misbehaviour,
)

from orion_oie.cancellation import CancelScope
from orion_oie.config import DownloadConfig
from orion_oie.errors import DownloadError, OrionError, RegistryError
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.downloads.sources import url_source
from orion_oie.models.registry import ModelRegistry
from orion_oie.models.source_names import UrlName, parse_source_name
from orion_oie.models.specs import SourceSpec

SECRET = "5ecre7"
CONTENT = bytes(range(256)) * 8000


class Bucket:
    """A server that gives its files only to requests with the signature that is valid now."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        for name in ("m.gguf", "download", "s-00001-of-00002.gguf", "s-00002-of-00002.gguf"):
            (folder / name).write_bytes(CONTENT)
        self.valid = f"{SECRET}1"
        self.after: int | None = None
        """The number of requests after which none is answered."""
        self.others: dict[str, Misbehaviour] = {}
        self.server = LoopbackServer(folder, misbehave=self._answer)

    def _answer(self, request: LoopbackRequest) -> Misbehaviour | None:
        target = urlsplit(request.path)
        if target.path in self.others:
            return self.others[target.path]
        if parse_qs(target.query).get("X-Amz-Signature") != [self.valid]:
            return Misbehaviour(status=403)
        if self.after is not None and len(self.server.requests) > self.after:
            return Misbehaviour(status=403)
        return None

    def address(self, name: str, more: str = "") -> str:
        return f"{self.server.url}/{name}?{more}X-Amz-Signature={self.valid}&X-Amz-Expires=60"


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Bucket]:
    bucket = Bucket(tmp_path / "bucket")
    yield bucket
    bucket.server.close()


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    return ModelCache(tmp_path / "cache")


def source_of(address: str) -> SourceSpec:
    name = parse_source_name(address)
    assert isinstance(name, UrlName)
    return url_source(name)


def pull(cache: ModelCache, source: SourceSpec) -> tuple[Path, ...]:
    return cache.pull(source, DownloadConfig(connections=1, retries=0), CancelScope())


def test_each_request_is_signed(bucket: Bucket, cache: ModelCache) -> None:
    """The query is sent as it was given; of a split model, with each file."""
    (path,) = pull(cache, source_of(bucket.address("m.gguf")))
    assert path.name == "m.gguf"
    assert path.read_bytes() == CONTENT
    query = f"X-Amz-Signature={SECRET}1&X-Amz-Expires=60"
    assert {request.path for request in bucket.server.requests} == {f"/m.gguf?{query}"}
    first, second = pull(cache, source_of(bucket.address("s-00001-of-00002.gguf")))
    assert (first.name, second.name) == ("s-00001-of-00002.gguf", "s-00002-of-00002.gguf")


def test_another_signature_finds_the_same_file(bucket: Bucket, cache: ModelCache) -> None:
    """Without a request; one without any signature does too."""
    paths = pull(cache, source_of(bucket.address("m.gguf")))
    asked = len(bucket.server.requests)
    bucket.valid = f"{SECRET}2"
    for address in (bucket.address("m.gguf"), f"{bucket.server.url}/m.gguf"):
        assert cache.find(source_of(address)) == paths
        assert pull(cache, source_of(address)) == paths
    assert len(bucket.server.requests) == asked


def test_a_download_goes_on_with_another_signature(bucket: Bucket, cache: ModelCache) -> None:
    """The first one ran out in the middle; the error says so, and what arrived is not fetched
    again."""
    bucket.after = 2
    with pytest.raises(DownloadError, match="may have run out: get a new address") as caught:
        pull(cache, source_of(bucket.address("m.gguf")))
    assert SECRET not in f"{caught.value.message} {caught.value.details}"
    (part,) = cache.files()
    assert 0 < part.arrived_bytes < len(CONTENT)
    bucket.after, bucket.valid = None, f"{SECRET}2"
    sent = bucket.server.bytes_sent
    (path,) = pull(cache, source_of(bucket.address("m.gguf")))
    assert path.read_bytes() == CONTENT
    assert bucket.server.bytes_sent - sent <= len(CONTENT) - part.arrived_bytes + 1


def test_a_query_that_says_which_file_is_meant(bucket: Bucket, cache: ModelCache) -> None:
    """It makes another file of the cache, whatever the signature is."""
    one, two = (source_of(bucket.address("download", f"id={number}&")) for number in (1, 2))
    assert cache.paths(one) != cache.paths(two)
    (path,) = pull(cache, one)
    assert path.name == "download"
    bucket.valid = f"{SECRET}2"
    assert cache.find(source_of(bucket.address("download", "id=1&"))) == (path,)
    assert cache.find(source_of(bucket.address("download", "id=2&"))) is None


def test_names_in_headers_and_percent_encoding(bucket: Bucket, cache: ModelCache) -> None:
    """A name that a server proposes is not used: no server chooses where files are written. Encoded
    names are decoded for the disk, and sent as they were."""
    bucket.others["/a%20b%2Bc.gguf"] = bucket.others["/files/7"] = Misbehaviour(
        redirect=bucket.address("m.gguf"),
        headers={"Content-Disposition": 'attachment; filename="../../evil.gguf"'},
    )
    (path,) = pull(cache, source_of(f"{bucket.server.url}/a%20b%2Bc.gguf"))
    assert path.name == "a b+c.gguf"
    (path,) = pull(cache, source_of(f"{bucket.server.url}/files/7"))
    assert path.name == "7"
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("ignore_range", [False, True])
def test_a_web_page(bucket: Bucket, cache: ModelCache, ignore_range: bool) -> None:
    """The page about a file is not taken for the file: nothing is kept."""
    bucket.others["/page"] = Misbehaviour(
        redirect=f"{bucket.server.url}/html", headers={"Content-Type": "text/html"}
    )
    page = {"Content-Type": "text/html; charset=utf-8", "Content-Range": "bytes 0-0/9"}
    bucket.others["/html"] = Misbehaviour(
        status=200 if ignore_range else 206, body=b"<", headers=page
    )
    with pytest.raises(DownloadError, match="a web page, not a file: use the download link"):
        pull(cache, source_of(f"{bucket.server.url}/page"))
    assert cache.files() == []


# -- secrets


def check_hidden(*shown: object) -> None:
    for one in shown:
        assert SECRET not in str(one)
        assert SECRET not in repr(one)


def test_nothing_that_is_kept_has_the_signature(bucket: Bucket, cache: ModelCache) -> None:
    """No name, no map, no record of the cache."""
    bucket.after = 2
    source = source_of(bucket.address("m.gguf"))
    with pytest.raises(DownloadError):
        pull(cache, source)
    bucket.after = None
    for _ in range(2):
        kept = [path for path in cache.root.rglob("*") if path.is_file()]
        check_hidden(*kept)
        assert not any(SECRET.encode() in path.read_bytes() for path in kept)
        pull(cache, source)
    check_hidden(cache.records(), cache.files(), source)


@pytest.mark.parametrize("kind", ["status", "closed", "digest", "no ranges", "protocol", "loop"])
def test_no_error_has_the_signature(bucket: Bucket, cache: ModelCache, kind: str) -> None:
    """Neither its message nor its details nor their JSON."""
    source = source_of(bucket.address("m.gguf"))
    if kind == "status":
        bucket.others["/m.gguf"] = Misbehaviour(status=404)
    elif kind == "closed":
        bucket.server.close()
    elif kind == "digest":
        source = SourceSpec(**{**source.model_dump(), "sha256": ["0" * 64]})
    elif kind == "no ranges":
        bucket.others["/m.gguf"] = Misbehaviour(ignore_range=True)
    elif kind == "protocol":
        bucket.others["/m.gguf"] = Misbehaviour(redirect=f"ftp://x/?{SECRET}")
    else:
        bucket.others["/m.gguf"] = Misbehaviour(redirect=bucket.address("m.gguf"))
    with pytest.raises(OrionError) as caught:
        pull(cache, source)
    check_hidden(caught.value, caught.value.message, json.dumps(caught.value.details))


def test_logs(bucket: Bucket, cache: ModelCache, caplog: pytest.LogCaptureFixture) -> None:
    """Those of the HTTP library too, also of addresses that were redirected to; the requests of
    others are logged as ever."""
    import httpx

    bucket.others["/r.gguf"] = Misbehaviour(redirect=bucket.address("m.gguf"))
    caplog.set_level(logging.DEBUG)
    pull(cache, source_of(f"{bucket.server.url}/r.gguf?X-Amz-Signature={SECRET}"))
    assert f"GET {bucket.server.url}/m.gguf?..." in caplog.text
    assert SECRET not in caplog.text
    httpx.get(bucket.address("m.gguf"), trust_env=False)
    assert SECRET in caplog.text


# -- specs


def test_a_query_in_a_registry() -> None:
    """At the end of the address or by itself: it is kept apart."""
    for given in (
        {"url": f"https://h/p?sig={SECRET}#x"},
        {"url": "https://h/p", "query": f"sig={SECRET}"},
    ):
        source = SourceSpec.model_validate({**given, "shards": ["m.gguf"]})
        assert (source.url, source.query) == ("https://h/p", f"sig={SECRET}")
        check_hidden(source, source.model_dump_json(), source.model_dump(mode="json"))
        assert source.model_dump()["query"] == source.query
    hub: dict[str, Any] = {"hub": "org/name", "files": ["x"], "query": "y"}
    with pytest.raises(ValueError, match="'query' does not belong to a 'hub' source"):
        SourceSpec.model_validate(hub)


def variants_at(source: Any) -> dict[str, Any]:
    return {"q4": {"quantization": "q4", "size_mb": 1, "min_ram_gb": 0.1, "source": source}}


def test_a_saved_registry(tmp_path: Path) -> None:
    """It keeps what says which file is meant, and no signature; the file is still found."""
    source = SourceSpec(url=f"https://h/p?id=7&sig={SECRET}", shards=["download"])
    variants = variants_at(source.model_dump())
    registry = registry_with(tmp_path, {"talk": ["m"]}, {"m": {"variants": variants}})
    assert registry.find_source("m")[2].query == source.query
    saved = tmp_path / "models.json"
    registry.save(saved)
    assert SECRET not in saved.read_text()
    _, _, loaded = ModelRegistry.load(saved).find_source("m")
    assert loaded.query == "id=7"
    cache = ModelCache(tmp_path / "cache")
    assert cache.paths(loaded) == cache.paths(source)


def test_a_wrong_registry(tmp_path: Path) -> None:
    """The message about it does not repeat the signature."""
    raw = registry_with(tmp_path, {"talk": ["m"]}).data.model_dump(mode="json")
    raw["models"]["m"]["variants"] = variants_at({"url": f"https://h?sig={SECRET}"})
    with pytest.raises(RegistryError, match="needs 'shards'") as caught:
        ModelRegistry.parse(json.dumps(raw), base=tmp_path)
    check_hidden(caught.value, caught.value.problems)


def test_addresses_without_a_query_keep_their_folder(tmp_path: Path) -> None:
    """What was fetched by earlier versions is found."""
    cache = ModelCache(tmp_path)
    source = SourceSpec(url="https://host/p", shards=["m.gguf"])
    digest = hashlib.sha256(b"https://host/p").hexdigest()[:12]
    assert cache.paths(source)[0].parent.name == f"url--host--{digest}"
