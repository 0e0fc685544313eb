"""The one place that knows everything: builds the server from its options, opens its listeners, and ends it in order.

Life: open the listeners (alive, not ready) → load models → ready → a signal → not ready, no new connections → answer
what is in flight → unload → exit. Exit codes are in `Exit`, and in docs/operations.md.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from doorstep.cache import make_cache
from doorstep.client_memory import Regions
from doorstep.config.check_ensemble import check_ensemble
from doorstep.config.check_ensemble_graph import check_ensemble_graph
from doorstep.config.load import load_config, parse_json_config
from doorstep.config.model import ModelConfig
from doorstep.config.options import ServerOptions, TlsFiles
from doorstep.config.support import fields_without_meaning
from doorstep.errors import DoorstepError, InvalidArgument
from doorstep.memory import limit_arenas
from doorstep.model import LoadOptions, Model, load_model
from doorstep.model_control import model_handlers
from doorstep.observability.access import access_hook
from doorstep.observability.custom_metrics import CustomMetrics
from doorstep.observability.log_settings import LogSettings, current_handler
from doorstep.observability.metrics import MetricsEndpoint
from doorstep.observability.tracing import Tracing
from doorstep.protocols import grpc_health, grpc_reflection, kserve, openai
from doorstep.protocols.kserve.categories import category_of
from doorstep.protocols.kserve.forwarding import HeaderForwarding
from doorstep.repository.base import VersionSpec
from doorstep.repository.repository import ModelRepository, RepositoryOptions
from doorstep.scheduler.ensemble_graph import step_model
from doorstep.scheduler.rate_limiter import RateLimiter
from doorstep.security.restricted import restricted_gate
from doorstep.server import InferenceServer
from doorstep.services import Services
from doorstep.trace import Tracer
from doorstep.wire.context import ListenerContext
from doorstep.wire.exchange import Gate
from doorstep.wire.grpc import GrpcServer
from doorstep.wire.grpc_compression import CompressionLevel
from doorstep.wire.http2_settings import Http2Settings
from doorstep.wire.limits import WireLimits
from doorstep.wire.listener import Address, Listener, share
from doorstep.wire.router import Router
from doorstep.wire.tls import TlsOptions

if TYPE_CHECKING:
    from doorstep.protocols.clouds.vertex_ai import VertexAiFront

logger = logging.getLogger("doorstep")


class Exit(IntEnum):
    OK = 0  # stopped by a signal, everything answered
    FAILED = 1  # could not start: a model that does not load, a port that is taken
    BAD_OPTIONS = 2
    CUT_OFF = 3  # stopped before everything was answered: --exit-timeout-secs passed, or a second signal came


class App:
    """One server process. Touched only from the event loop."""

    def __init__(
        self,
        options: ServerOptions,
        on_ready: Callable[[App], None] | None = None,
        on_leave: Callable[[], None] | None = None,
    ) -> None:
        self.options = options
        self.listeners: list[Listener] = []
        self._on_ready = on_ready
        self._on_leave = on_leave
        self._stop = asyncio.Event()
        self._signals = 0
        self._vertex_ai: VertexAiFront | None = None
        self._loop = asyncio.get_running_loop()
        self.repository: ModelRepository[Model] = ModelRepository(
            RepositoryOptions(
                repositories=[Path(p) for p in options.model_repositories],
                control=options.model_control_mode,  # type: ignore[arg-type]
                poll_s=options.repository_poll_secs,
                startup_models=options.load_models,
                load_threads=options.model_load_thread_count,
                load_retries=options.model_load_retry_count,
                namespacing=options.model_namespacing,
            ),
            self._load,
            self._read_config,
            parse_json_config,
            check_ensemble=self._check_ensemble,
        )
        self.server = InferenceServer(
            self.repository,
            name=options.id,
            strict_readiness=options.strict_readiness,
            regions=Regions(allowed=options.allow_client_shm),
        )
        self.custom_metrics = CustomMetrics()
        self.tracing = Tracing(options.trace, self._trace_with)
        self.server.trace_settings = self.tracing.settings
        self.server.log_settings = LogSettings(options, current_handler())
        self.services = Services(
            infer=self.server.infer,
            config=self._config_of,
            model=self.repository.find,
            ready=self.server.model_ready,
            handlers=model_handlers(self.server),
            own_handlers=self.custom_metrics.own,
            limiter=RateLimiter(self._loop, options.rate_limit_resources) if options.rate_limit != "off" else None,
            host_policies=options.host_policies,
        )
        self._load_options = LoadOptions(
            options.backend_config,
            complete=options.auto_complete_config,
            config_name=options.model_config_name,
            services=self.services,
            metrics=options.metrics,
        )

    def _trace_with(self, tracer: Tracer | None) -> None:
        self.server.tracer = tracer

    def _config_of(self, name: str, version: str) -> ModelConfig:
        return self.server.model(name, version).config

    def _check_ensemble(self, config: Any) -> None:
        """Whether the models that are served now fit its steps. What is wrong with it alone is told when it loads."""
        if next(check_ensemble(config), None) is not None:
            return
        steps = config.ensemble_scheduling.step
        configs = {
            (step.model_namespace, step.model_name): self.server.model(step_model(step)).config.proto for step in steps
        }
        problems = list(check_ensemble_graph(config, configs))
        if problems:
            raise InvalidArgument("; ".join(problem.what for problem in problems))

    # What the repository calls, in its loader pool

    def _load(self, spec: VersionSpec) -> Model:
        return load_model(spec, self._load_options, self._loop)

    def _read_config(self, directory: Path, name: str) -> Any:
        config = load_config(
            directory, config_name=self.options.model_config_name, required=not self.options.auto_complete_config
        )
        for note in fields_without_meaning(config):
            logger.info("model '%s': %s", name, note)
        return config

    # Listeners

    def _addresses(self) -> list[Address]:
        o = self.options
        http_tls, grpc_tls = _tls(o.tls), _tls(o.grpc_tls)
        wanted = []
        if o.allow_http:
            wanted.append(
                Address(
                    "http",
                    o.http_address,
                    o.http_port,
                    tls=http_tls,
                    reuse_port=o.reuse_http_port,
                    option="--http-port",
                )
            )
        if o.allow_grpc:
            wanted.append(
                Address(
                    "grpc",
                    o.grpc_address,
                    o.grpc_port,
                    tls=grpc_tls,
                    reuse_port=o.reuse_grpc_port,
                    option="--grpc-port",
                )
            )
        if o.allow_metrics:
            # There is no --reuse-metrics-port: on another's port, that port's option counts.
            reuse = any(a.reuse_port for a in wanted if (a.host, a.port) == (o.metrics_address, o.metrics_port))
            wanted.append(
                Address(
                    "metrics",
                    o.metrics_address,
                    o.metrics_port,
                    tls=http_tls,
                    reuse_port=reuse,
                    option="--metrics-port",
                )
            )
        if o.allow_sagemaker:
            wanted.append(
                Address("sagemaker", o.http_address, o.sagemaker_port, tls=http_tls, option="--sagemaker-port")
            )
        if o.allow_vertex_ai:
            wanted.append(
                Address("vertex-ai", o.http_address, o.vertex_ai_port, tls=http_tls, option="--vertex-ai-port")
            )
        return wanted

    def _build_listeners(self) -> None:
        o = self.options
        limits = WireLimits(**o.limits)  # type: ignore[arg-type]
        http2 = Http2Settings(**o.http2)  # type: ignore[arg-type]
        gate = restricted_gate(category_of, o.http_restricted, o.grpc_restricted, grpc_reflection.is_grpc_route)
        # One list, in order: what is cheapest to refuse, and says least about the rest, comes first.
        gates = [gate] if gate is not None else []
        contexts: list[ListenerContext] = []
        metrics = MetricsEndpoint(
            self.server.models,
            contexts,
            self.repository.index,
            custom=self.custom_metrics,
            cache=lambda: self.services.cache,
            counter_latencies=o.metrics.counter_latencies,
            cpu=o.allow_cpu_metrics,
        )
        for address, names in share(self._addresses()):
            router = Router()
            if address.name in ("sagemaker", "vertex-ai"):
                self._register_front(address.name, router, limits, gates, metrics if o.allow_metrics else None)
                contexts.append(ListenerContext(address.name, router, limits, gates=gates, http2=http2,
                                                on_access=access_hook() if o.access_log else None))  # fmt: skip
                self.listeners.append(Listener(contexts[-1], address))
                continue
            grpc = GrpcServer(limits, compression=CompressionLevel[o.grpc_infer_response_compression_level.upper()])
            if "http" in names or "grpc" in names:
                kserve.register(
                    router if o.allow_http else None,
                    grpc if o.allow_grpc else None,
                    self.server,
                    limits,
                    http_forwarding=_forwarding(o.http_header_forward_pattern),
                    grpc_forwarding=_forwarding(o.grpc_header_forward_pattern),
                )
            if o.allow_http and o.allow_openai and ("http" in names or "grpc" in names):
                openai.register(router, self.server, limits, ping_s=o.sse_ping_secs)
            grpc_health.register(grpc, self.server)
            grpc_reflection.register(grpc)
            grpc.install(router)
            if "metrics" in names:
                metrics.register(router)
            context = ListenerContext(
                address.name,
                router,
                limits,
                gates=gates,
                http2=http2,
                on_access=access_hook() if o.access_log else None,
                keeps_spelling=bool(o.http_header_forward_pattern),
            )
            contexts.append(context)
            self.listeners.append(Listener(context, address))

    def _register_front(
        self, name: str, router: Router, limits: WireLimits, gates: list[Gate], metrics: MetricsEndpoint | None
    ) -> None:
        """A cloud vendor's routes, on a listener of their own."""
        clouds = self.options.clouds
        # Imported here, as most servers have neither.
        if name == "sagemaker":
            from doorstep.protocols.clouds.sagemaker import SageMakerFront

            SageMakerFront(self.server, limits, clouds).register(router)
            return
        from doorstep.protocols.clouds.vertex_ai import VertexAiFront

        front = self._vertex_ai = VertexAiFront(self.server, limits, gates, self.options.vertex_ai_default_model)
        front.register(router, clouds.predict_route, clouds.health_route, metrics.register if metrics else None)

    # Life

    async def run(self) -> Exit:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal, number)
        try:
            self._build_listeners()
            for listener in self.listeners:
                await listener.open()
            if self.options.cache is not None:
                self.services.cache = make_cache(self.options.cache)
            starting = asyncio.ensure_future(self.server.start())
            stopping = asyncio.ensure_future(self._stop.wait())
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():  # a signal while models load
                return await self._end()
            report = starting.result()
            if self._vertex_ai is not None:
                self._vertex_ai.choose_model()
        except DoorstepError as error:
            logger.error("%s", error.message)
            await self._end()
            return Exit.FAILED
        if report.failures:  # why was logged when it happened
            names = ", ".join(f"'{name}'" for name in report.failures)
            if self.options.exit_on_error:
                logger.error("not starting, because of %s (see above; --exit-on-error=false serves the others)", names)
                await self._end()
                return Exit.FAILED
            logger.warning("serving without %s (see above)", names)
        # What was made to start up lives as long as the server: the garbage collector need not look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 20, 50)
        for listener in self.listeners:
            logger.info("%s on %s", _what(listener), listener.url)
        if self._on_ready is not None:
            self._on_ready(self)
        await self._stop.wait()
        return await self._end()

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        name = signal.Signals(number).name
        if self._signals > 1:
            logger.warning("%s again: ending at once", name)
            _leave(Exit.CUT_OFF, self._on_leave)
        logger.info("%s: finishing what is in flight, for at most %d s", name, self.options.exit_timeout_secs)
        self.server.stop_accepting()
        self._stop.set()

    async def _end(self) -> Exit:
        """Not ready, no new connections, answers for what is in flight, then nothing left."""
        deadline = self._loop.time() + self.options.exit_timeout_secs
        self.server.stop_accepting()
        for listener in self.listeners:
            listener.stop_accepting()
        finished = await self.server.drain(max(deadline - self._loop.time(), 0))
        # Answers are written by now; connections get a moment to take them, and are closed.
        await asyncio.gather(*(listener.close(max(deadline - self._loop.time(), 0.1)) for listener in self.listeners))
        left = await self.server.stop(max(deadline - self._loop.time(), 1.0))
        for what in left:
            logger.warning("did not end in time: %s", what)
        # A collector that does not answer is no reason to wait for long, nor to say that something was cut off.
        if not await asyncio.to_thread(self.tracing.close, min(max(deadline - self._loop.time(), 1.0), 5.0)):
            logger.warning("did not end in time: the writing of traces")
        logger.info("stopped")
        return Exit.OK if finished and not left else Exit.CUT_OFF


def _forwarding(pattern: str) -> HeaderForwarding | None:
    return HeaderForwarding(pattern) if pattern else None


def _tls(files: TlsFiles | None) -> TlsOptions | None:
    return None if files is None else TlsOptions(files.cert, files.key, files.client_ca)


def _what(listener: Listener) -> str:
    return _WHAT.get(listener.address.name, "HTTP and gRPC")


_WHAT = {"metrics": "metrics", "sagemaker": "SageMaker", "vertex-ai": "Vertex AI"}


def run(
    options: ServerOptions,
    on_ready: Callable[[App], None] | None = None,
    on_leave: Callable[[], None] | None = None,
) -> int:
    """Serves until a signal; returns the exit code. `on_leave` is called where the process ends without returning."""
    import uvloop

    limit_arenas()
    # Threads of models take the GIL from the loop; short turns keep connections answered while they compute.
    sys.setswitchinterval(0.0005)

    async def main() -> Exit:
        return await App(options, on_ready, on_leave).run()

    code = uvloop.run(main())
    if code is Exit.CUT_OFF:
        _leave(code, on_leave)  # a thread that hangs in a library would be waited for
    return code


def _leave(code: Exit, on_leave: Callable[[], None] | None) -> NoReturn:
    """Ends the process whatever its threads do, with the log written."""
    if on_leave is not None:
        on_leave()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
