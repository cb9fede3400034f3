"""Loading: from a `LoadSpec` to a model that answers.

    local:        check headers -> read ahead -> load
    progressive:  read headers -> download in the order of the forward pass, and load meanwhile
                  -> answer while shards arrive -> switch to a context that waits for nothing
    sequential:   download -> local

`LlamaBackend` is the backend of the library. The cache downloads and the worker loads; this module
decides on the order of the steps, and reports the progress.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import InvalidStateError
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from orion_oie.backends.base import (
    Footprint,
    LoadSpec,
    usable_context,
)
from orion_oie.backends.llama.host.arriving import Arriving, download_progress
from orion_oie.backends.llama.host.claims import check_claims
from orion_oie.backends.llama.host.client import (
    LlamaModel,
    OnCrash,
    OnLog,
)
from orion_oie.backends.llama.host.devices import probe_devices
from orion_oie.backends.llama.host.footprint import (
    PROCESS_BYTES,
    Use,
    discardable_runs,
    estimate,
    footprint,
)
from orion_oie.backends.llama.host.gpu_layers import layers_for
from orion_oie.backends.llama.host.load_order import forward_order
from orion_oie.backends.llama.host.process import Priority, SpareWorker
from orion_oie.backends.llama.host.threads import ThreadAllocator
from orion_oie.backends.llama.protocol import LoadCommand
from orion_oie.cancellation import CancelScope
from orion_oie.config import DownloadConfig, ShardingConfig
from orion_oie.errors import (
    EngineClosedError,
    ModelNotFoundError,
    OrionError,
    WorkerError,
    described,
)
from orion_oie.hardware import probe
from orion_oie.hardware.cpu import this_cpu
from orion_oie.hardware.machine import usable_cores
from orion_oie.models.digests import check_digests
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.downloads.parts import Run
from orion_oie.models.formats.gguf import GGUFHeader
from orion_oie.models.specs import SourceSpec
from orion_oie.models.split_files import check_gguf_file
from orion_oie.schemas.loading import (
    LoadProgress,
    OnProgress,
)

_POLL_S = 0.02
_REPORT_S = 0.1
_AFTER_A_LOAD_S = 2.0
_READ_AHEAD_BYTES = 8 << 20
_KNOWN_HEADERS = 32
_KNOWN_FOOTPRINTS = 256

_FileIdentity = tuple[Path, int, int]
"""One version of a file: its path, modification time in ns, and size in bytes."""


@dataclass(frozen=True)
class LoaderSettings:
    """Settings for all loads. `prefix_store_bytes` is the disk space for prefix states; 0 stores
    none. `is_adaptive`: workers use fewer threads while other programs use the cores."""

    load_timeout_s: float = 600.0
    cancel_grace_s: float = 5.0
    is_progressive: bool = True
    download: DownloadConfig = field(default_factory=DownloadConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    prefix_store_bytes: int = 0
    is_adaptive: bool = True
    priority: Priority = field(default_factory=Priority)


class LlamaBackend:
    """Loads GGUF models, each in a process of its own.

    Missing files are downloaded into `cache`, by default the user's own. `may_take(size_bytes)`
    returns True while so much memory may be taken for a worker that waits for its model; None keeps
    no such worker. Raises `InvalidRequestError` for cores that this process may not use.
    `on_log(level, line, model_id)` gets warnings and errors of llama.cpp, and
    `on_crash(model_id, error)` every crash of a worker. Both are called on reader threads.
    """

    def __init__(
        self,
        settings: LoaderSettings | None = None,
        *,
        cache: ModelCache | None = None,
        may_take: Callable[[int], bool] | None = None,
        on_log: OnLog = lambda _level, _line, _model_id: None,
        on_crash: OnCrash = lambda _model_id, _error: None,
    ) -> None:
        self._settings = settings or LoaderSettings()
        self._cache = cache or ModelCache()
        self._on_log = on_log
        self._on_crash = on_crash
        self._cores = usable_cores(self._settings.priority.cores)
        self._threads = ThreadAllocator(self._cores)
        self._spare = SpareWorker(
            None if may_take is None else lambda: may_take(self._process_bytes),
            self._threads.one_core,
            self._settings.priority,
        )
        self._process_bytes = PROCESS_BYTES
        self._is_process_measured = False
        # By process. Not a set: one that another thread changes cannot be copied.
        self._models: weakref.WeakValueDictionary[int, LlamaModel] = weakref.WeakValueDictionary()

    def load(self, spec: LoadSpec, scope: CancelScope, on_progress: OnProgress) -> LlamaModel:
        """See `LocalBackend.load`. Headers are checked before any native code reads the files."""
        on_progress(LoadProgress("initializing"))
        try:
            if spec.source is None or self._cache.find(spec.source) is not None:
                with self._threads.one_core():
                    model = self._load_local(spec, scope, on_progress)
            else:
                model = self._load_remote(spec, spec.source, scope, on_progress)
        except BaseException:
            self._spare.refill()
            raise
        # The next spare worker can wait: the new model has requests to answer now.
        model.completion.add_done_callback(lambda _model: self._spare.refill(_AFTER_A_LOAD_S))
        return model

    def footprint(self, spec: LoadSpec) -> Footprint:
        """See `LocalBackend.footprint`. Unchanged files are read once."""
        if spec.source is None or self._cache.find(spec.source) is not None:
            files = tuple(map(_identity, spec.files))
            return _footprint_of(files, self._use(spec), self._process_bytes)
        if spec.expected_bytes is None:
            raise ModelNotFoundError(f"{spec.key} is not on this machine; its size is not known")
        is_progressive = self._is_progressive(spec) and self._sharding(spec).enabled
        return estimate(
            spec.expected_bytes, self._use(spec), self._process_bytes, is_arriving=is_progressive
        )

    def warm_up(self) -> None:
        """See `LocalBackend.warm_up`."""
        self._spare.refill()

    def kill_all(self) -> None:
        """See `LocalBackend.kill_all`."""
        self._spare.kill()
        for reference in self._models.valuerefs():
            model = reference()
            if model is not None:
                model.kill()

    def _use(self, spec: LoadSpec) -> Use:
        return Use(
            context_length=spec.context_length,
            slots=spec.slots,
            threads=spec.threads or self._cores,
            host_cache_bytes=spec.host_cache_bytes,
            is_embedding=spec.is_embedding,
        )

    def _is_progressive(self, spec: LoadSpec) -> bool:
        wanted = spec.is_progressive
        return self._settings.is_progressive if wanted is None else wanted

    def _sharding(self, spec: LoadSpec) -> ShardingConfig:
        return spec.sharding or self._settings.sharding

    def _new_model(self, spec: LoadSpec) -> LlamaModel:
        model = LlamaModel(
            spec,
            self._spare.take(),
            self._threads,
            self._settings.cancel_grace_s,
            self._on_log,
            self._on_crash,
        )
        self._models[model.pid] = model
        if self._spare.is_over:  # `kill_all` ran before it was added
            model.kill()
        return model

    def _load_command(
        self,
        spec: LoadSpec,
        headers: Sequence[GGUFHeader],
        files: Sequence[Path],
        *,
        gpu_layers: int = 0,
        arrival_maps: Sequence[Path | None] | None = None,
    ) -> LoadCommand:
        return LoadCommand(
            files=tuple(files),
            slots=spec.slots,
            context_length=usable_context(spec.context_length, headers[0].context_length),
            threads=spec.threads or self._cores,
            is_adaptive=self._settings.is_adaptive,
            host_cache_bytes=spec.host_cache_bytes,
            is_embedding=spec.is_embedding,
            prompt_format=spec.prompt_format,
            gpu_layers=gpu_layers,
            arrival_maps=None if arrival_maps is None else tuple(arrival_maps),
            discardable=tuple(discardable_runs(headers, this_cpu().features)),
            prefix_folder=self._cache.snapshots,
            prefix_store_bytes=self._settings.prefix_store_bytes,
        )

    def _check_claims(self, spec: LoadSpec, headers: Sequence[GGUFHeader]) -> None:
        for warning in check_claims(spec, headers):
            self._on_log("warning", warning, spec.info.model_id)

    # -- local files

    def _load_local(
        self, spec: LoadSpec, scope: CancelScope, on_progress: OnProgress, note: str = ""
    ) -> LlamaModel:
        headers = _headers_of(tuple(map(_identity, spec.files)))
        self._check_claims(spec, headers)
        check_digests(spec.files, spec.sha256, scope.check)
        scope.check()
        self._cache.note_use(spec.files)
        read_ahead(spec.files, forward_order(headers, self._sharding(spec)).runs)
        total = sum(header.file_size for header in headers)
        progress = LoadProgress(
            "loading_shard",
            shards=len(headers),
            bytes_total=total,
            bytes_loaded=total,
            note=note,
        )

        def on_loading(fraction: float) -> None:
            shards = int(fraction * progress.shards)
            on_progress(replace(progress, fraction=fraction, shards_loaded=shards))

        with contextlib.ExitStack() as undo:
            model = self._new_model(spec)
            undo.callback(model.kill)
            on_loading(0.0)
            if not self._is_process_measured:
                self._await_idle(model, scope)
            gpu_layers, gpu_note = self._gpu_layers(spec, headers, model, scope)
            command = self._load_command(spec, headers, spec.files, gpu_layers=gpu_layers)
            timeout_s = self._settings.load_timeout_s
            try:
                model.load(headers, command, scope, timeout_s, on_loading)
            except OrionError as error:
                if scope.error is not None or not gpu_layers:
                    raise
                gpu_note = f"the GPU could not be used, it is on the CPU: {error.message}"
                self._on_log("warning", gpu_note, spec.info.model_id)
                model = self._new_model(spec)
                undo.callback(model.kill)
                model.load(headers, replace(command, gpu_layers=0), scope, timeout_s, on_loading)
            progress = replace(progress, note="; ".join(filter(None, [note, gpu_note])))
            done = replace(progress, phase="complete", fraction=1.0, shards_loaded=progress.shards)
            on_progress(replace(done, phase="ready"))
            model.show_progress(lambda: done)
            with contextlib.suppress(InvalidStateError):  # the worker died meanwhile
                model.completion.set_result(model.info)
            on_progress(done)
            undo.pop_all()
        return model

    def _gpu_layers(
        self,
        spec: LoadSpec,
        headers: Sequence[GGUFHeader],
        model: LlamaModel,
        scope: CancelScope,
    ) -> tuple[int, str]:
        """The number of layers for GPUs, and if there is a GPU, the reason why not more."""
        if model.device(scope, self._settings.load_timeout_s) != "gpu":
            return 0, ""
        if spec.gpu_layers is not None:
            return spec.gpu_layers, ""
        plan = layers_for(headers, self.footprint(spec), probe_devices(is_fresh=True))
        return plan.layers, plan.reason

    def _await_idle(self, model: LlamaModel, scope: CancelScope) -> str:
        """Wait until a worker is ready for its load, and measure its idle memory. Returns the
        reason why it cannot compute while a model arrives; empty when it can."""
        why_no_gate = model.why_no_gate(scope, self._settings.load_timeout_s)
        self._process_bytes = probe.resident_bytes(model.pid) or self._process_bytes
        self._is_process_measured = True
        return why_no_gate

    # -- files to download

    def _load_remote(
        self, spec: LoadSpec, source: SourceSpec, scope: CancelScope, on_progress: OnProgress
    ) -> LlamaModel:
        # The download outlives this call: it ends with the model.
        fetching = CancelScope()
        undo = scope.on_cancel(lambda: _pass_on(scope, fetching))
        try:
            download = self._cache.open_download(
                source,
                self._settings.download,
                fetching,
                lambda: on_progress(
                    download_progress(
                        *self._cache.arrived(source), note="another process fetches it"
                    )
                ),
            )
            if download is None:
                return self._load_local(spec, scope, on_progress)
            arriving = Arriving(spec.files, download)
            headers = arriving.read_headers()
            self._check_claims(spec, headers)
            arriving.order = forward_order(headers, self._sharding(spec))
            download.hold()
            arriving.start()
            on_progress(arriving.progress("downloading"))
            model, note = self._model_with_gate(spec, scope)
            arriving.note = note
            if model is not None:
                try:
                    self._load_arriving(spec, model, arriving, headers, scope, on_progress)
                except OrionError as error:
                    if download.error is not None:  # the cause, and not the worker's fault
                        raise download.error from error
                    if scope.error is not None:
                        raise
                    arriving.note = f"loading it while it arrives failed: {error.message}"
                else:
                    undo()
                    if scope.error is not None:  # too late for the load to notice
                        model.close(timeout_s=0.0)
                        raise scope.error
                    self._follow(model, arriving, fetching, on_progress)
                    return model
            download.release()
            download.wait(lambda: on_progress(arriving.progress("downloading")), _REPORT_S)
            return self._load_local(spec, scope, on_progress, arriving.note)
        except BaseException:
            fetching.cancel(EngineClosedError("the load that wanted the files has ended"))
            raise
        finally:
            undo()

    def _model_with_gate(self, spec: LoadSpec, scope: CancelScope) -> tuple[LlamaModel | None, str]:
        """A process that can compute while the model arrives, or the reason why there is none."""
        if spec.is_embedding:
            return None, "embedding models are loaded when they are complete"
        if not self._is_progressive(spec) or not self._sharding(spec).enabled:
            return None, ""
        model = self._new_model(spec)
        why = self._await_idle(model, scope)
        if why:
            model.close(timeout_s=0.0)
        return (None, why) if why else (model, "")

    def _load_arriving(
        self,
        spec: LoadSpec,
        model: LlamaModel,
        arriving: Arriving,
        headers: Sequence[GGUFHeader],
        scope: CancelScope,
        on_progress: OnProgress,
    ) -> None:
        """Load files that are not complete. Returns when the worker takes requests."""
        try:
            arriving.mode = "progressive"
            arriving.wait_for_initial_shards(lambda: on_progress(arriving.progress("downloading")))
            on_progress(arriving.progress("loading_shard"))
            command = self._load_command(
                spec, headers, arriving.files(), arrival_maps=arriving.maps()
            )
            with self._threads.one_core():
                model.load(
                    headers,
                    command,
                    scope,
                    self._settings.load_timeout_s,
                    lambda _fraction: on_progress(arriving.progress("loading_shard")),
                )
            model.show_progress(lambda: arriving.progress("loading_shard"))
        except BaseException:
            arriving.mode = "sequential"
            model.close(timeout_s=0.0)
            raise
        finally:
            arriving.download.release()

    def _follow(
        self,
        model: LlamaModel,
        arriving: Arriving,
        fetching: CancelScope,
        on_progress: OnProgress,
    ) -> None:
        """Finish the load of a model that answers already, on a thread of its own."""

        def follow() -> None:
            try:
                arriving.download.wait(
                    lambda: on_progress(arriving.progress("loading_shard")), _REPORT_S
                )
            except OrionError as error:
                model.fail(error)
                return
            except Exception as error:
                model.fail(WorkerError(f"the download met {described(error)}"))
                raise
            model.show_progress(lambda: arriving.progress("ready"))
            on_progress(model.load_progress)
            model.take_over(arriving.paths)
            with contextlib.suppress(OrionError):  # the model ended before that
                model.completion.result()
                done = arriving.progress("complete")
                model.show_progress(lambda: done)
                on_progress(done)

        model.on_exit(lambda: _end(fetching))
        try:
            threading.Thread(target=follow, name="orion-arriving", daemon=True).start()
        except RuntimeError as error:
            model.kill()
            raise WorkerError(f"the system gives no more threads: {error}") from error


def _identity(file: Path) -> _FileIdentity:
    try:
        stat = file.stat()
    except (OSError, ValueError):
        return file, 0, 0  # reading the file raises the reason
    return file, stat.st_mtime_ns, stat.st_size


@lru_cache(_KNOWN_HEADERS)
def _headers_of(files: tuple[_FileIdentity, ...]) -> tuple[GGUFHeader, ...]:
    return tuple(check_gguf_file(path) for path, _, _ in files)


@lru_cache(_KNOWN_FOOTPRINTS)
def _footprint_of(files: tuple[_FileIdentity, ...], use: Use, process_bytes: int) -> Footprint:
    return footprint(_headers_of(files), use, this_cpu().features, process_bytes)


def read_ahead(files: Sequence[Path], runs: Sequence[Run]) -> None:
    """Ask the system to read files in the order of the forward pass, in the background: so a slow
    disk starts before the worker does. Returns at once; does nothing on systems without this."""
    if not hasattr(os, "posix_fadvise"):
        return

    def advise() -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            handles = [opened.enter_context(file.open("rb")).fileno() for file in files]
            for number, start, end in runs:
                for at in range(start, end, _READ_AHEAD_BYTES):
                    length = min(_READ_AHEAD_BYTES, end - at)
                    os.posix_fadvise(handles[number], at, length, os.POSIX_FADV_WILLNEED)

    with contextlib.suppress(RuntimeError):  # no thread for it: the worker reads by itself
        threading.Thread(target=advise, name="orion-read-ahead", daemon=True).start()


def _end(fetching: CancelScope) -> None:
    fetching.cancel(EngineClosedError("the model that wanted the files was unloaded"))


def _pass_on(scope: CancelScope, other: CancelScope) -> None:
    if scope.error is not None:
        other.cancel(scope.error)
