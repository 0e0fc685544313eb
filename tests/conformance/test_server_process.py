"""The helper that starts servers for tests: it waits, tells why a server did not start, and leaves nothing behind."""

from __future__ import annotations

import sys
import urllib.request

import pytest

from doorstep.testing.server import ManagedProcess, ServerFailed, free_ports

SERVE = """
import http.server, sys
http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind="127.0.0.1")
"""


def managed(port: int, *argv: str, start_timeout_s: float = 30.0) -> ManagedProcess:
    url = f"http://127.0.0.1:{port}/"
    return ManagedProcess([sys.executable, "-u", *argv], ready_url=url, start_timeout_s=start_timeout_s)


def test_inside_the_context_it_answers_and_after_it_the_process_is_gone() -> None:
    (port,) = free_ports(1)
    with managed(port, "-c", SERVE, str(port)) as server:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
            assert answer.status == 200
        assert '"GET / HTTP/1.1" 200' in server.logs()
    assert not server.running
    assert not server.log_path.exists()


def test_a_server_that_ends_before_it_is_ready_fails_with_its_own_last_words() -> None:
    server = managed(free_ports(1)[0], "-c", "raise SystemExit('no models here')")
    with pytest.raises(ServerFailed, match="ended with 1 before it was ready; its log:\nno models here"):
        server.start()
    server.log_path.unlink()


def test_a_server_that_is_never_ready_is_killed_and_reported() -> None:
    server = managed(free_ports(1)[0], "-c", "import signal; signal.pause()", start_timeout_s=0.1)
    with pytest.raises(ServerFailed, match=r"not ready after 0\.1 s"):
        server.start()
    assert not server.running
    server.log_path.unlink()


def test_stop_gives_the_exit_code() -> None:
    (port,) = free_ports(1)
    code = f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)){SERVE}"
    with managed(port, "-c", code, str(port)) as server:
        assert server.stop() == 7


def test_free_ports_are_different_ports() -> None:
    assert len(set(free_ports(5))) == 5
