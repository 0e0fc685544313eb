"""TLS with certificates made for the occasion: versions, ALPN, mutual TLS, large bodies, reloading."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from doorstep.errors import InvalidArgument
from doorstep.testing.certificates import Authority
from doorstep.testing.wire import RawClient, WireServer
from doorstep.wire.limits import WireLimits
from doorstep.wire.router import Router
from doorstep.wire.tls import CertificateFiles, TlsOptions, make_context

TEXT = ((b"content-type", b"text/plain"),)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


@pytest.fixture
def options(authority: Authority) -> TlsOptions:
    certificate, key = authority.issue("server")
    return TlsOptions(str(certificate), str(key))


def make_router() -> Router:
    router = Router()
    router.add("GET", "/hello", lambda e: e.respond(200, TEXT, b"hello"))
    router.add("GET", "/secure", lambda e: e.respond(200, TEXT, str(e.connection.secure).encode()))
    router.add("POST", "/echo", lambda e: e.respond(200, TEXT, e.body))
    router.add(
        "GET",
        "/who",
        lambda e: e.respond(200, TEXT, repr((e.connection.client_certificate or {}).get("subject")).encode()),
    )
    return router


@pytest.fixture
def server(options: TlsOptions) -> Iterator[WireServer]:
    with WireServer(make_router(), tls=options) as server:
        yield server
        server.wait_until_empty()


def connect(
    server: WireServer, authority: Authority, alpn: list[str] | None = None, **settings: object
) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(authority.file))
    if alpn:
        context.set_alpn_protocols(alpn)
    for name, value in settings.items():
        setattr(context, name, value)
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    return context.wrap_socket(sock, server_hostname="localhost")


def test_a_client_that_trusts_the_authority_is_served(server: WireServer, authority: Authority) -> None:
    assert requests.get(server.url + "/hello", verify=str(authority.file), timeout=10).content == b"hello"
    assert requests.get(server.url + "/secure", verify=str(authority.file), timeout=10).content == b"True"


def test_alpn_chooses_the_protocol(server: WireServer, authority: Authority) -> None:
    for offered, chosen in (
        (["http/1.1"], "http/1.1"),
        (["h2"], "h2"),
        (["http/1.1", "h2"], "h2"),
        (None, None),
    ):
        with connect(server, authority, offered) as sock:
            assert sock.selected_alpn_protocol() == chosen
            if chosen != "h2":
                sock.sendall(b"GET /hello HTTP/1.1\r\nConnection: close\r\n\r\n")
                answer = b"".join(iter(lambda s=sock: s.recv(1000), b""))
                assert answer.endswith(b"hello")


def test_curl_speaks_both_protocols_over_tls(server: WireServer, authority: Authority) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    for option, version in (("--http1.1", b"1.1"), ("--http2", b"2")):
        command = [curl, "-sS", "--max-time", "20", "--cacert", str(authority.file), option, "-w", "%{http_version}"]
        done = subprocess.run([*command, server.url + "/hello"], check=True, capture_output=True)
        assert done.stdout == b"hello" + version


def test_versions_before_1_2_are_refused(server: WireServer, authority: Authority) -> None:
    with pytest.warns(DeprecationWarning, match="TLSv1"), pytest.raises(ssl.SSLError):
        connect(server, authority, minimum_version=ssl.TLSVersion.TLSv1, maximum_version=ssl.TLSVersion.TLSv1_1)
    with connect(server, authority, maximum_version=ssl.TLSVersion.TLSv1_2) as sock:
        assert sock.version() == "TLSv1.2"


@pytest.mark.parametrize("size", [100, 65_536, 300_000, 5_000_000])
def test_bodies_arrive_whole_over_tls(server: WireServer, authority: Authority, size: int) -> None:
    body = os.urandom(size)
    with requests.Session() as session:
        session.trust_env = False  # it may name another bundle of authorities
        session.verify = str(authority.file)
        for _ in range(3):
            assert session.post(server.url + "/echo", data=body, timeout=30).content == body
    assert server.context.held_bytes == 0


def test_requests_may_follow_a_large_body_at_once_over_tls(server: WireServer, authority: Authority) -> None:
    request = b"POST /echo HTTP/1.1\r\nContent-Length: 200000\r\n\r\n" + b"y" * 200_000 + b"GET /hello HTTP/1.1\r\n\r\n"
    with RawClient(connect(server, authority)) as client:
        for _ in range(3):
            client.send(request * 2)
            for body in (b"y" * 200_000, b"hello") * 2:
                assert client.receive_answer()[2] == body


def test_clear_text_and_nonsense_on_a_tls_port_are_closed(server: WireServer, authority: Authority) -> None:
    for data in (b"GET /hello HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(1000), bytes(100)):
        with server.connect() as client:
            client.send(data)
            client.receive_all()
    assert requests.get(server.url + "/hello", verify=str(authority.file), timeout=10).status_code == 200


def test_a_client_that_never_finishes_its_handshake_is_closed(options: TlsOptions) -> None:
    with WireServer(make_router(), WireLimits(header_timeout_s=0.1), tls=options) as server, server.connect() as client:
        client.send(b"\x16\x03\x01\x02\x00")
        client.receive_all()


def test_mutual_tls_lets_in_only_those_with_a_certificate(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("server")
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other", "stranger").issue("stranger")
    options = TlsOptions(str(certificate), str(key), client_ca=str(authority.file))
    alice = tuple(map(str, authority.issue("alice")))
    with WireServer(make_router(), tls=options) as server:
        assert "alice" in requests.get(server.url + "/who", verify=str(authority.file), cert=alice, timeout=10).text
        for cert in (None, tuple(map(str, stranger))):
            with pytest.raises(requests.ConnectionError):
                requests.get(server.url + "/who", verify=str(authority.file), cert=cert, timeout=10)
        server.wait_until_empty()


def test_a_client_certificate_can_be_optional(authority: Authority) -> None:
    certificate, key = authority.issue("server")
    options = TlsOptions(str(certificate), str(key), str(authority.file), client_certificate_required=False)
    alice = tuple(map(str, authority.issue("alice")))
    with WireServer(make_router(), tls=options) as server:
        assert requests.get(server.url + "/who", verify=str(authority.file), timeout=10).text == "None"
        assert "alice" in requests.get(server.url + "/who", verify=str(authority.file), cert=alice, timeout=10).text
        server.wait_until_empty()


def serial_number(server: WireServer, authority: Authority) -> str:
    with connect(server, authority) as sock:
        return str((sock.getpeercert() or {})["serialNumber"])


def test_a_new_certificate_is_used_without_a_restart_and_old_connections_stay(
    authority: Authority, options: TlsOptions
) -> None:
    with WireServer(make_router(), tls=options) as server:
        old = serial_number(server, authority)
        assert serial_number(server, authority) == old
        with connect(server, authority) as sock:
            sock.sendall(b"GET /hello HTTP/1.1\r\n\r\n")
            assert sock.recv(1000).endswith(b"hello")
            authority.issue("server")  # the same files
            while serial_number(server, authority) == old:
                pass
            sock.sendall(b"GET /hello HTTP/1.1\r\n\r\n")
            assert sock.recv(1000).endswith(b"hello")
        server.wait_until_empty()


def test_a_broken_new_certificate_changes_nothing_and_is_logged_once(
    authority: Authority, options: TlsOptions, caplog: pytest.LogCaptureFixture
) -> None:
    good = Path(options.certificate).read_bytes()
    with WireServer(make_router(), tls=options) as server:
        old = serial_number(server, authority)
        Path(options.certificate).write_text("not a certificate")
        while "keeping the TLS certificate in use" not in caplog.text:
            assert serial_number(server, authority) == old
        for _ in range(3):
            assert serial_number(server, authority) == old
        assert caplog.text.count("keeping the TLS certificate in use") == 1
        Path(options.certificate).write_bytes(good)
        while "certificate reloaded" not in caplog.text and serial_number(server, authority) == old:
            caplog.set_level("INFO")
            os.utime(options.certificate)
        server.wait_until_empty()


def test_a_missing_file_is_a_change_and_not_a_crash(options: TlsOptions, caplog: pytest.LogCaptureFixture) -> None:
    files = CertificateFiles(options)
    assert files.changed() is None
    os.unlink(options.key)
    assert files.changed() is None
    assert files.changed() is None
    assert caplog.text.count("keeping the TLS certificate in use") == 1


def test_unusable_files_are_named(authority: Authority, options: TlsOptions, tmp_path: Path) -> None:
    _, other_key = authority.issue("other")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    encrypted = tmp_path / "encrypted.key"
    encrypted.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
        )
    )
    for wrong, message in (
        (TlsOptions("/nowhere.crt", options.key), "TLS certificate file '/nowhere.crt' does not exist"),
        (TlsOptions(options.certificate, "/nowhere.key"), "TLS key file '/nowhere.key' does not exist"),
        (TlsOptions(options.certificate, str(other_key)), "cannot be used"),
        (TlsOptions(options.certificate, str(encrypted)), "the key unencrypted"),
        (TlsOptions(str(nonsense), options.key), "cannot be used"),
        (TlsOptions(options.certificate, options.key, str(nonsense)), "TLS client CA file"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            make_context(wrong)
        assert message in caught.value.message
