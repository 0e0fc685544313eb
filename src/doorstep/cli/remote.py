"""What every subcommand that talks to a running server needs: its options, and a client made from them."""

from __future__ import annotations

import argparse
import os
import ssl
import sys
from collections.abc import Callable

from doorstep.client.sync import Client
from doorstep.errors import DoorstepError, InvalidArgument

DEFAULT_URL = "http://127.0.0.1:8000"


def add_server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        default=os.environ.get("DOORSTEP_URL", DEFAULT_URL),
        help="the server (default: $DOORSTEP_URL, else %(default)s)",
    )
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="for one call (default: 60)")
    parser.add_argument("--header", action="append", default=[], metavar="NAME:VALUE", help="send along; repeatable")
    parser.add_argument("--tls-ca", metavar="FILE", help="certificates to trust, for https (default: the system's)")
    parser.add_argument("--insecure", action="store_true", help="trust any certificate")


def make_client(given: argparse.Namespace) -> Client:
    return Client(given.url, timeout=given.timeout, headers=headers_of(given), tls=tls_of(given))


def headers_of(given: argparse.Namespace) -> dict[str, str]:
    headers = {}
    for header in given.header:
        name, colon, value = header.partition(":")
        if not colon:
            raise InvalidArgument(f"--header {header}: write NAME:VALUE")
        headers[name.strip()] = value.strip()
    return headers


def tls_of(given: argparse.Namespace) -> ssl.SSLContext | None:
    if not given.url.startswith("https://"):
        return None
    try:
        tls = ssl.create_default_context(cafile=given.tls_ca)
    except OSError as error:
        raise InvalidArgument(f"--tls-ca {given.tls_ca}: {error.strerror or error}") from None
    if given.insecure:
        tls.check_hostname = False
        tls.verify_mode = ssl.CERT_NONE
    return tls


def reporting_errors(prog: str, action: Callable[[], int]) -> int:
    """Runs `action`; what the server refused becomes a line on stderr and exit code 1."""
    try:
        return action()
    except DoorstepError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
