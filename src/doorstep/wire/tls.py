"""TLS for listeners: contexts from files, and new ones when the files change. Knows no socket.

A broken new file changes nothing but the log: the certificate in use stays until the files are right again.
"""

from __future__ import annotations

import logging
import os
import ssl
from dataclasses import dataclass

from doorstep.errors import InvalidArgument

log = logging.getLogger("doorstep.wire")

ALPN = ("h2", "http/1.1")
_Stamp = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """PEM files. With `client_ca` clients must show a certificate that it has signed (mutual TLS)."""

    certificate: str  # the chain, the server's own first
    key: str
    client_ca: str = ""
    client_certificate_required: bool = True  # False: asked for and checked, but a client without one may come in

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.certificate, self.key, self.client_ca)))


def make_context(options: TlsOptions) -> ssl.SSLContext:
    """A server's context: TLS 1.2 or newer, ALPN for HTTP/2 and HTTP/1.1. Raises InvalidArgument naming the file."""
    for what, path in (("certificate", options.certificate), ("key", options.key), ("client CA", options.client_ca)):
        if path and not os.access(path, os.R_OK):
            raise InvalidArgument(f"TLS {what} file '{path}' does not exist or cannot be read")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(ALPN)
    try:
        context.load_cert_chain(options.certificate, options.key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise InvalidArgument(
            f"TLS certificate '{options.certificate}' and key '{options.key}' cannot be used: {error}. "
            "Both must be PEM files, the key unencrypted and the certificate's own"
        ) from None
    if options.client_ca:
        try:
            context.load_verify_locations(options.client_ca)
        except (ssl.SSLError, OSError) as error:
            raise InvalidArgument(f"TLS client CA file '{options.client_ca}' cannot be used: {error}") from None
        context.verify_mode = ssl.CERT_REQUIRED if options.client_certificate_required else ssl.CERT_OPTIONAL
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")


class CertificateFiles:
    """Watches a listener's files. `changed` may block on the file system and belongs on a thread of its own."""

    def __init__(self, options: TlsOptions) -> None:
        self.options = options
        self._seen = self._stamp()

    def changed(self) -> ssl.SSLContext | None:
        """A new context if the files have changed and are usable; complains, once, if they are not usable."""
        stamp = self._stamp()
        if stamp == self._seen:
            return None
        self._seen = stamp
        try:
            return make_context(self.options)
        except InvalidArgument as error:
            log.error("keeping the TLS certificate in use: %s", error.message)
            return None

    def forget(self) -> None:
        """The last new context could not be used: `changed` is to make it again."""
        self._seen = ()

    def _stamp(self) -> _Stamp:
        stamps = []
        for path in self.options.files:
            try:
                found = os.stat(path)
                stamps.append((path, found.st_mtime_ns, found.st_size, found.st_ino))
            except OSError:
                stamps.append((path, 0, 0, 0))
        return tuple(stamps)
