"""Shared memory that clients made and told the server of: its names, its bounds, and who uses it. Knows no tensor.

Rules and texts are Triton's (server, shared_memory_manager.cc, common.cc; extension_shared_memory.md). Unlike there,
nothing is mapped: bytes are read and written through the file, with pread and pwrite. A client may shrink its region at
any time, and touching a mapping beyond the file's end is SIGBUS, the end of the server; through the file it is a short
count. (Sealing against shrinking, which would make views safe, works on memfds only, and those have no name to give.)
What that costs, and saves, is in docs/shared-memory.md.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from doorstep.errors import AlreadyExists, DoorstepError, Internal, InvalidArgument, NotFound, Unsupported

DISABLED = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
RESERVED_PREFIX = "triton_python_backend_shm_region_"
SIZE_MAX = 2**64 - 1
MOST_REGIONS = 4096  # each of another file holds a descriptor
LONG_BYTES = 1 << 20  # more than this is not read on the event loop

_FOLDER = "/dev/shm"  # noqa: S108  where shm_open looks
_PAGE = os.sysconf("SC_PAGESIZE")
_LARGEST_NAME = 255
_AT_ONCE = 1 << 30  # the kernel moves less than 2 GiB with one call


class LongRead(Exception):
    """There is more to read than the event loop has time for: begin again in a thread."""


class _File:
    """An open file of /dev/shm, which regions may share. Touched only under the registry's lock, but for its `fd`."""

    __slots__ = ("fd", "identity", "users")

    def __init__(self, fd: int, identity: tuple[int, int]) -> None:
        self.fd = fd
        self.identity = identity
        self.users = 0


class Region:
    """A part of a file that a client gave a name."""

    __slots__ = ("_file", "byte_size", "key", "leaving", "name", "offset", "users")

    def __init__(self, name: str, key: str, offset: int, byte_size: int, file: _File) -> None:
        self.name = name
        self.key = key
        self.offset = offset
        self.byte_size = byte_size
        self.users = 0  # requests that name it and are not answered yet
        self.leaving = False  # unregistered; it goes with the last of its users
        self._file = file

    def check(self, offset: int, size: int) -> None:
        """Whether `size` bytes at `offset` are within what was registered."""
        if offset >= self.byte_size:
            raise InvalidArgument(f"Invalid offset for shared memory region: '{self.name}'")
        if size > SIZE_MAX - offset:
            raise InvalidArgument(
                f"Integer overflow detected: byte_size ({size}) + offset ({offset}) exceeds maximum value ({SIZE_MAX}) "
                f"for region '{self.name}'"
            )
        if offset + size > self.byte_size:
            raise self._beyond()

    def read(self, offset: int, size: int) -> bytes:
        """A copy, which the client cannot change or take away while a model works on it. `check` has passed."""
        start = self.offset + offset
        data = os.pread(self._file.fd, min(size, _AT_ONCE), start)
        if len(data) == size:
            return data
        parts = [data]
        got = len(data)
        while got < size and parts[-1]:
            parts.append(os.pread(self._file.fd, min(size - got, _AT_ONCE), start + got))
            got += len(parts[-1])
        if got < size:  # the client has shrunk it
            raise self._beyond()
        return b"".join(parts)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """`check` has passed for at least as many bytes."""
        view = memoryview(data)
        if view.itemsize != 1:
            view = view.cast("B")
        start = self.offset + offset
        fd = self._file.fd
        if os.fstat(fd).st_size < start + len(view):  # writing would make it larger again, with the server's memory
            raise self._beyond()
        try:
            while len(view):
                done = os.pwrite(fd, view[:_AT_ONCE], start)
                start += done
                view = view[done:]
        except OSError as error:  # /dev/shm is full, and the region was never touched here
            raise Internal(
                f"Unable to write to shared memory region '{self.name}': {os.strerror(error.errno or 0)}"
            ) from None

    def _beyond(self) -> DoorstepError:
        return InvalidArgument(f"Invalid offset + byte size for shared memory region: '{self.name}'")

    def __repr__(self) -> str:
        return f"<Region {self.name} {self.key} [{self.offset}, +{self.byte_size}] {self.users} users>"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an output is to be written."""

    loan: Loan
    region: Region
    offset: int
    byte_size: int

    def put(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Writes the output `name`. Raises Internal where it does not fit."""
        size = len(data)
        if size > self.byte_size:
            raise Internal(
                f"shared memory size specified with the request for output '{name}' ({self.byte_size} bytes) should be "
                f"at least {size} bytes to hold the results"
            )
        if size and self.loan.used:  # else the request has been given up, and the region may be gone
            self.region.write(self.offset, data)


class Loan:
    """The regions that one request uses, from its decoding to its last answer. Belongs to the request's sender."""

    __slots__ = ("_held", "_on_loop", "_regions", "_to_read", "writes")

    def __init__(self, regions: Regions, *, on_loop: bool = True) -> None:
        self._regions = regions
        self._held: list[Region] = []
        self._to_read = 0
        self._on_loop = on_loop  # a long read raises LongRead
        self.writes = False  # an output goes to a region

    @property
    def used(self) -> bool:
        return bool(self._held)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """The bytes of an input. Raises NotFound or InvalidArgument."""
        region = self._hold(name)
        region.check(offset, size)
        self._to_read += size
        if self._on_loop and self._to_read > LONG_BYTES:
            raise LongRead
        return region.read(offset, size)

    def place(self, name: str, offset: int, size: int) -> Place:
        """Where to write an output. Raises NotFound or InvalidArgument."""
        region = self._hold(name)
        region.check(offset, size)
        self.writes = True
        return Place(self, region, offset, size)

    def begin_again(self) -> None:
        """After LongRead: what follows runs in a thread."""
        self.end()
        self._to_read = 0
        self._on_loop = False

    def end(self) -> None:
        """The request has been answered. May be called again."""
        if self._held:
            held, self._held = self._held, []
            self._regions._give_back(held)

    def _hold(self, name: str) -> Region:
        region = self._regions._take(name)
        self._held.append(region)
        return region


class Regions:
    """All regions of a server. Touched from the event loop and by threads that decode: whatever changes, under a lock.

    `allowed` False: nothing can be registered, so there is nothing to find.
    """

    def __init__(self, *, allowed: bool = False) -> None:
        self.allowed = allowed
        self._lock = threading.Lock()
        self._regions: dict[str, Region] = {}
        self._files: dict[tuple[int, int], _File] = {}  # by device and inode

    def loan(self, *, on_loop: bool = True) -> Loan:
        """For one request. Only where `allowed`; nobody needs one otherwise."""
        return Loan(self, on_loop=on_loop)

    def status(self, name: str = "") -> Sequence[Region]:
        """The region `name`, or all. Raises NotFound."""
        if not name:
            return sorted(self._regions.values(), key=lambda region: region.name)
        region = self._regions.get(name)
        if region is None:
            raise NotFound(f"Unable to find system shared memory region: '{name}'")
        return [region]

    def cuda_status(self, name: str = "") -> None:
        """There is never one. Raises NotFound for one that is asked for by name."""
        if not name:
            return
        if name in self._regions:
            raise NotFound(f"The region named '{name}' is registered as system shared memory, not CUDA shared memory")
        raise NotFound(f"Unable to find cuda shared memory region: '{name}'")

    def refuse_if_disabled(self) -> None:
        if not self.allowed:
            raise Unsupported(DISABLED)

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Raises Unsupported, AlreadyExists, InvalidArgument, or Internal for a key that does not open."""
        self.refuse_if_disabled()
        _check_key(name, key)
        failed = f"failed to register shared memory region '{name}': "
        with self._lock:
            if name in self._regions:
                raise AlreadyExists(f"shared memory region '{name}' already in manager")
            if len(self._regions) >= MOST_REGIONS:
                raise InvalidArgument(f"{failed}there are {MOST_REGIONS} already; unregister some")
            file, size = self._open(key)
            try:
                if offset + byte_size > size:
                    raise InvalidArgument(f"{failed}invalid args")
                if byte_size == 0 or offset % _PAGE:  # what mmap, with which Triton reaches it, does not take
                    raise InvalidArgument(f"{failed}unable to process address space{os.strerror(errno.EINVAL)}")
            except DoorstepError:
                self._close_if_unused(file)
                raise
            file.users += 1
            self._regions = {**self._regions, name: Region(name, key, offset, byte_size, file)}

    def register_cuda(self, name: str) -> None:
        """Refuses: there is no device such memory could be on."""
        self.refuse_if_disabled()
        raise InvalidArgument(
            f"failed to register CUDA shared memory region: '{name}', GPUs not supported: there is no CUDA device"
        )

    def unregister(self, name: str = "") -> None:
        """The region `name`, or all; it need not be there. One in use goes when its requests are answered."""
        self.refuse_if_disabled()
        with self._lock:
            for region in [self._regions[name]] if name in self._regions else [] if name else [*self._regions.values()]:
                region.leaving = True
                self._forget_if_unused(region)

    def unregister_cuda(self) -> None:
        self.refuse_if_disabled()

    # What loans ask for

    def _take(self, name: str) -> Region:
        with self._lock:
            region = self._regions.get(name)
            if region is None:
                raise NotFound(f"Unable to find shared memory region: '{name}'")
            region.users += 1
            return region

    def _give_back(self, regions: Sequence[Region]) -> None:
        with self._lock:
            for region in regions:
                region.users -= 1
                if region.leaving:
                    self._forget_if_unused(region)

    # Files. All under the lock.

    def _forget_if_unused(self, region: Region) -> None:
        if not region.users and self._regions.get(region.name) is region:
            self._regions = {name: other for name, other in self._regions.items() if other is not region}
            region._file.users -= 1
            self._close_if_unused(region._file)

    def _close_if_unused(self, file: _File) -> None:
        if not file.users:
            self._files.pop(file.identity, None)
            os.close(file.fd)

    def _open(self, key: str) -> tuple[_File, int]:
        """The file that `key` names in /dev/shm, and its size. Regions of one file share a descriptor."""
        unable = Internal(f"Unable to open shared memory region: '{key}'")
        name = key.lstrip("/")
        if "/" in name or "\0" in name or name in (".", "..") or len(os.fsencode(name)) > _LARGEST_NAME:
            raise unable
        try:
            # No link leads out of the folder, and whatever is not a plain file is not waited for.
            fd = os.open(f"{_FOLDER}/{name}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError):
            raise unable from None
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise unable
        identity = (found.st_dev, found.st_ino)
        known = self._files.get(identity)
        if known is not None:
            os.close(fd)
            return known, found.st_size
        file = self._files[identity] = _File(fd, identity)
        return file, found.st_size


def _check_key(name: str, key: str) -> None:
    """Whether a client may name it (server, common.cc: ValidateSharedMemoryKey)."""
    plain = key.lstrip("/")
    if not plain:
        raise InvalidArgument(f"cannot register shared memory region '{name}' - invalid shm key '{key}'")
    if plain.startswith(RESERVED_PREFIX):
        raise InvalidArgument(
            f"cannot register shared memory region '{name}' with key '{key}' as the key contains the reserved prefix "
            f"'{RESERVED_PREFIX}'"
        )
