"""Certificates for tests of TLS: an authority of one's own, and servers that it vouches for or not.

A server's certificate may have expired, be for another name, or be signed by nobody but itself.
Nothing here is ever trusted by the system's own store.
"""

from __future__ import annotations

import ssl
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from orbit.clock import SystemClock

_USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


class Authority:
    """An authority that signs certificates; its own is in `file`, and `trust` trusts it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        pem = self._signed(self._name, self._key, is_authority=True).public_bytes(Encoding.PEM)
        self.file = folder / "authority.pem"
        self.file.write_bytes(pem)
        self.trust = ssl.create_default_context(cadata=pem.decode())

    def server(self, name: str, days: int = 30, is_own: bool = False) -> ssl.SSLContext:
        """A server's context; its certificate may have expired, or be signed by itself."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._signed(subject, key, days, name, is_own=is_own)
        file = self._folder / "server.pem"
        own = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        file.write_bytes(own + certificate.public_bytes(Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        days: int = 30,
        host: str = "authority",
        is_own: bool = False,
        is_authority: bool = False,
    ) -> x509.Certificate:
        now = SystemClock().now()
        signer = key if is_own else self._key
        usage = dict.fromkeys(_USES, False) | {"key_cert_sign": is_authority}
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if is_own else self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=60))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            # What OpenSSL asks for where it is strict, as Python is from 3.13 on.
            .add_extension(x509.KeyUsage(**usage | {"digital_signature": True}), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
                critical=False,
            )
            .sign(signer, hashes.SHA256())
        )
