"""Wires a service together: the port opens first, then a thread loads the model, then requests are taken."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import uvicorn
import uvloop

from service.access import read_access
from service.api.access import Access
from service.api.application import create_application
from service.api.listener import max_connections, open_port, raise_file_limit
from service.api.logs import configure_logging
from service.api.protocol import ConnectionLimits, EdgeProtocol
from service.api.state import ServiceState
from service.api.streams import EventRouter
from service.errors import PennyweightError
from service.loading.progress import Phase
from service.metrics import Metrics
from service.numerics.recipe import parse_recipe
from service.reports.progress import LoggedProgress, TerminalProgress
from service.settings import Settings, model_name, read_hub_token

if TYPE_CHECKING:
    from service.assembly import Loaded
    from service.engine.engine import Engine
    from service.loading.artifact_writer import CacheWriter
    from service.loading.fidelity_run import FidelityCheck

logger = logging.getLogger(__name__)

_MAX_HEADER_BYTES = 16384
_KEEP_ALIVE_S = 75  # longer than clients keep what they do not use, so that none is closed on a new request
_RESPONSE_GRACE_S = 5  # what a response may still take when its last token is there


def run(settings: Settings, *, ignored_variables: tuple[str, ...] = ()) -> int:
    """Serve until a signal, or until the load has failed; returns the exit code.

    Raises:
        SettingError: there is no such address, no token in `--hf-token-file`, or a key that is none.
        PennyweightError: the port is in use.
    """
    configure_logging(settings.log_format)
    if settings.hf_token_file is not None:
        os.environ["HF_TOKEN"] = read_hub_token(settings.hf_token_file)  # where every library looks for it
    access = read_access(settings, os.environ)
    for variable in ignored_variables:
        logger.info("%s is ignored: Kubernetes makes it for a service of this name", variable)
    raise_file_limit()
    listener = open_port(settings.host, settings.port)
    service = uvloop.run(_serve(settings, access, listener))
    if service.is_loading:
        logging.shutdown()
        os._exit(service.exit_code)  # the load thread is inside a library that cannot be interrupted
    return service.exit_code


async def _serve(settings: Settings, access: Access, listener: socket.socket) -> Service:
    service = Service(settings, asyncio.get_running_loop(), access=access, owns_process=True)
    await service.serve(listener)
    return service


class _Server(uvicorn.Server):
    """Starts the load when the port is open, and leaves signals to the service."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._service.start_loading()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.on_signal()


class Service:
    """The life of one service: loading, ready, draining or failed. Owned by the event loop.

    Args:
        owns_process: nothing else runs in this process, so that settings of the interpreter may be its own.

    Attributes:
        exit_code: what the process ends with.
    """

    def __init__(
        self, settings: Settings, loop: asyncio.AbstractEventLoop, *, access: Access, owns_process: bool = False
    ) -> None:
        self._settings = settings
        self._owns_process = owns_process
        self._access = access
        self._loop = loop
        scheme = parse_recipe(settings.quantize).label
        shows_bars = settings.log_format == "text" and sys.stderr.isatty()
        progress = TerminalProgress() if shows_bars else LoggedProgress()
        name = model_name(settings)
        device = "unknown" if settings.device == "auto" else settings.device
        metrics = Metrics(progress, model=name, scheme=scheme, device=device)
        self.state = ServiceState(
            model_name=name,
            scheme=scheme,
            metrics=metrics,
            router=EventRouter(loop),
            progress=progress,
            queue_timeout_s=settings.queue_timeout,
            request_timeout_s=settings.request_timeout,
            log_prompts=settings.log_prompts,
        )
        self.exit_code = 0
        self._server: _Server | None = None
        self._engine: Engine | None = None
        self._fidelity: FidelityCheck | None = None
        self._cache_writer: CacheWriter | None = None
        self._ending: asyncio.Task[None] | None = None
        self._is_signalled = False
        self._load_thread = threading.Thread(target=self._load, name="load", daemon=True)

    @property
    def is_loading(self) -> bool:
        """Whether the load thread still runs."""
        return self._load_thread.is_alive()

    async def serve(self, listener: socket.socket) -> None:
        """Answer on an open port until a signal, or until the load has failed."""
        limits = ConnectionLimits(
            receive_timeout_s=self._settings.receive_timeout,
            send_timeout_s=self._settings.send_timeout,
            max_connections=max_connections(),
        )
        config = uvicorn.Config(
            create_application(
                self.state,
                max_body_bytes=self._settings.max_body_bytes,
                access=self._access,
                with_docs=self._settings.docs == "on",
                twin=self._settings.twin,
            ),
            http=cast("type[asyncio.Protocol]", partial(EdgeProtocol, limits=limits, metrics=self.state.metrics)),
            ws="none",
            lifespan="off",
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_RESPONSE_GRACE_S,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            reset_contextvars=True,
        )
        self._server = _Server(config, self)
        host, port = listener.getsockname()[:2]
        logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        await self._server.serve(sockets=[listener])
        beside = [work for work in (self._fidelity, self._cache_writer) if work is not None]
        for work in beside:
            work.stop()
        if self._engine is not None:
            self._engine.stop()
        for work in beside:
            work.join()
        if self.state.served is not None:
            for helper in (self.state.served.chat_template, self.state.served.grammars):
                if helper is not None:
                    helper.close()

    def start_loading(self) -> None:
        """Begin the load on its own thread."""
        self._load_thread.start()

    def on_signal(self) -> None:
        """First signal: stop taking requests, finish the running ones, end. Second: end at once."""
        if self._is_signalled:
            logger.warning("second signal: ending at once")
            logging.shutdown()
            os._exit(1)
        self._is_signalled = True
        # A signal arrives in the middle of anything, also of a request; its context is not ours.
        self._loop.call_soon_threadsafe(self._begin, self._drain, context=Context())

    def _begin(self, ending: Callable[[], Any]) -> None:
        self._ending = self._loop.create_task(ending())

    async def _drain(self) -> None:
        logger.info("draining: running requests have %g s", self._settings.drain_timeout)
        self.state.progress.enter(Phase.DRAINING)
        if self._fidelity is not None:
            self._fidelity.stop()
        if self._engine is not None:
            # A thread of its own: those of `to_thread` may have a queue of prompts to tokenize.
            with ThreadPoolExecutor(1) as thread:
                await self._loop.run_in_executor(thread, self._engine.drain, self._settings.drain_timeout)
        self._end()

    def _end(self) -> None:
        if self._server is not None:
            self._server.should_exit = True

    def _load(self) -> None:
        """Body of the load thread; it imports what is heavy, so that the port opens first."""
        try:
            from service.assembly import load

            loaded = load(self._settings, self.state)
            if self._owns_process:
                # Hundreds of thousands of objects stay from now on; walking all of them for garbage once in a
                # while would stop every thread for tenths of a second.
                gc.collect()
                gc.freeze()
        except Exception as error:
            if isinstance(error, PennyweightError):
                logger.error("the model cannot be served: %s", error)
            else:
                logger.exception("the load failed")
            self._loop.call_soon_threadsafe(self._begin, partial(self._fail, error))
        else:
            self._loop.call_soon_threadsafe(self._be_ready, loaded)

    async def _fail(self, error: Exception) -> None:
        self.exit_code = error.exit_code if isinstance(error, PennyweightError) else 1
        self.state.progress.enter(Phase.FAILED)
        await asyncio.sleep(self._settings.failed_linger)
        self._end()

    def _be_ready(self, loaded: Loaded) -> None:
        self._engine = loaded.engine
        if self._is_signalled:
            return
        self.state.served = loaded.served
        self.state.metrics.model_loaded(loaded.figures)
        self.state.progress.enter(Phase.READY)
        report = loaded.served.report
        logger.info(
            "ready: %s as %s, %d weight bytes instead of %d",
            self.state.model_name,
            report.scheme,
            report.weight_bytes.total,
            report.original_bytes,
        )
        self._fidelity = loaded.fidelity
        if loaded.run_beside is not None:
            loaded.run_beside()
        self._cache_writer = loaded.cache_writer
        self._cache_writer.start()
