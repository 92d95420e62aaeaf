"""Who a host is: a key pair of its own, and the certificates of its peers, each pinned by its SHA-256.

Certificates are signed by themselves: nobody vouches for anybody, an operator carries them from host to host.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from snap.dataplane.errors import BusyError, ResourceError, UsageError

KEY: Final = "pony.key"
CERTIFICATE: Final = "pony.pem"
PEERS: Final = "peers"
_MOST: Final = 32 * 1024
"""Bytes of the largest certificate file that is read."""


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a certificate in DER, in hexadecimal."""
    return hashlib.sha256(certificate).hexdigest()


@dataclass(frozen=True)
class Identity:
    """The files of this host, and its peers' certificates in PEM by their names."""

    key: Path
    certificate: Path
    peers: dict[str, str] = field(default_factory=dict)

    @property
    def own(self) -> str:
        """Fingerprint of the own certificate."""
        return _of_pem(_read(self.certificate), self.certificate)

    @property
    def pins(self) -> dict[str, str]:
        """Fingerprints of the peers, by their names."""
        return {name: fingerprint(ssl.PEM_cert_to_DER_cert(pem)) for name, pem in self.peers.items()}

    def listening(self) -> ssl.SSLContext:
        """For connections from any of the peers."""
        return self._context(ssl.PROTOCOL_TLS_SERVER, "".join(self.peers.values()))

    def dialing(self, host: str) -> ssl.SSLContext:
        """For a connection to `host` alone."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT, self.peers[host])

    def _context(self, protocol: int, trusted: str) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # The whole certificate is compared; a name in it says nothing.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self.certificate, self.key)
        if protocol == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0  # who comes again shows its certificate again
        if trusted:
            context.load_verify_locations(cadata=trusted)
        return context


def load(directory: Path) -> Identity:
    """What is in `directory`. Raises UsageError for a missing or broken file, and for two names of one certificate."""
    made = Identity(
        directory / KEY,
        directory / CERTIFICATE,
        {path.stem: _read(path) for path in sorted((directory / PEERS).glob("*.pem"))},
    )
    if not made.key.exists():
        raise UsageError(f"{made.key}: there is none", "make it with `snapctl pony key`")
    if made.key.stat().st_mode & 0o077:
        raise UsageError(f"{made.key}: others may read it", f"chmod 600 {made.key}")
    names: dict[str, str] = {made.own: "this host itself"}
    for name, pem in made.peers.items():
        pin = _of_pem(pem, directory / PEERS / f"{name}.pem")
        if pin in names:
            raise UsageError(f"{directory / PEERS / name}.pem: it is the certificate of {names[pin]} as well")
        names[pin] = name
    try:
        made.listening()
    except (ssl.SSLError, OSError) as error:
        raise UsageError(f"{made.key}: {error}", "make a new pair with `snapctl pony key --force`") from error
    return made


def make(directory: Path, name: str, force: bool = False) -> Identity:
    """Make the key pair of this host, called `name`. Raises BusyError when there is one, unless `force`; ResourceError
    when it cannot be written."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    made = Identity(directory / KEY, directory / CERTIFICATE)
    if not force and (made.key.exists() or made.certificate.exists()):
        raise BusyError(
            f"{made.key}: this host has a key already",
            "with --force it gets a new one, and every peer needs its new certificate",
        )
    key = Ed25519PrivateKey.generate()
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # It is good as long as peers have it, whatever their clocks say.
        .not_valid_before(datetime.datetime(2020, 1, 1))
        .not_valid_after(datetime.datetime(9999, 12, 31))
        .sign(key, None)
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        _write(made.key, secret, 0o600)
        _write(made.certificate, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    except OSError as error:
        raise ResourceError(f"{error.filename}: {error.strerror}", "run it as who may write there") from error
    return made


def _write(path: Path, data: bytes, mode: int) -> None:
    """In one step, and readable by nobody else at any time."""
    new = path.with_suffix(path.suffix + ".new")
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        os.fsync(fd)
    new.rename(path)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST:
            raise UsageError(f"{path}: too large for a certificate")
        return path.read_text("ascii")
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}", "`snapctl pony key` makes this host's, peers have theirs"
        ) from error
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a certificate in PEM") from None


def _of_pem(text: str, path: Path) -> str:
    """Raises UsageError naming `path`."""
    try:
        return fingerprint(ssl.PEM_cert_to_DER_cert(text))
    except ValueError as error:
        raise UsageError(f"{path}: not a certificate in PEM: {error}") from error
