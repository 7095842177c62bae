"""Signatures of learnwares: who vouches for what lies in a dock of strangers.

    DOCK/learnwares/ID/signature.json       schema, public key, Ed25519 signature (RFC 8032)

What is signed is the id and the SHA-256 of the bytes of the card and of the specification. The card
holds the hashes of the adapter's files, which `store.read_adapter` compares, and the header of the
specification its kind and space: so a signature covers the whole learnware. It says nothing of
when: an older learnware of the same id comes with a signature that was good, and still is.

Keys are in the formats of OpenSSH and PEM. Wants the package cryptography (the extra "sign").
"""

import base64
import binascii
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learnware_jax.dock import store
from learnware_jax.dock.store import MAX_JSON_BYTES, MAX_SPEC_BYTES, Learnware, StrPath
from learnware_jax.specification.header import (
    check_same_space,
    dump_json,
    parse_json,
    printable,
)

SCHEMA = 1
FILE = "signature.json"
MAX_KEY_BYTES = 2**16
_MESSAGE = "learnware_jax: a learnware, signed\n"  # no signature of anything else begins so


def new_key() -> bytes:
    """A new private key, of the system's entropy, in PEM (PKCS 8) without a password."""
    _, serialization, ed25519 = _library("new_key")
    return ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def public_text(private: bytes, *, where: str = "public_text") -> str:
    """The public key of a private one, as a line of OpenSSH without a name: "ssh-ed25519 AAAA...".

    `private` is PEM or OpenSSH's format. ValueError if it is neither, has a password, or is of
    another kind than Ed25519.
    """
    return _text_of(_private(private, where=where).public_key())


def read_keys(file: StrPath) -> dict[str, str]:
    """Public keys, as `public_text` gives them, and their names (empty where they have none).

    The file has lines "ssh-ed25519 AAAA... name"; empty ones and those that begin with # are left
    out. ValueError for any other line, or if there is no key; FileNotFoundError if it is absent.
    """
    where = f"read_keys: {file}"
    data = store.read_bytes(Path(file), MAX_JSON_BYTES, links=True, where="read_keys")
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text in UTF-8; want public keys, one a line.") from error
    keys = {}
    for number, line in enumerate(lines, 1):
        words = line.split(maxsplit=2)
        if words and not words[0].startswith("#"):
            key = _text_of(_public(" ".join(words[:2]), where=f"{where}, line {number}"))
            keys[key] = " ".join(words[2:])
    if not keys:
        raise ValueError(f"{where} has no key; want lines 'ssh-ed25519 AAAA... name'.")
    return keys


def sign(path: StrPath, id: str, private: bytes) -> None:
    """Sign a learnware of a dock, durably; a signature that is there is replaced.

    Errors are those of `store.read_learnware`, `store.read_adapter` and `public_text`: what is
    unsound is not signed.
    """
    key = _private(private, where="sign")
    learnware = store.read_learnware(path, id)
    if "adapter" in learnware.card:
        store.read_adapter(path, id)
    doing = f"has been writing to {path} for {store.LOCK_SECONDS:g} s"
    with store.locked(Path(path) / ".lock", where="sign", doing=doing, seconds=store.LOCK_SECONDS):
        folder, card, spec, _ = _read(path, id, learnware.header.kind, where="sign")
        content = {
            "schema": SCHEMA,
            "key": _text_of(key.public_key()),
            "signature": base64.b64encode(key.sign(_message(id, card, spec))).decode(),
        }
        for stray in folder.glob(f".{FILE}.*"):  # of a writer that was killed
            stray.unlink()
        text = dump_json(content, where="sign", indent=1)
        store.write_file(folder / FILE, text.encode(), where="sign")


def read_signed(path: StrPath, id: str, keys: Mapping[str, str]) -> Learnware:
    """A learnware that one of the `keys` (see `read_keys`) has signed as it is.

    What is compared with the signature is what is returned. ValueError if it is not signed, by
    none of these, or changed since; otherwise as `store.read_learnware`.
    """
    dock = store.read_header(path)
    folder, card, spec, signature = _read(path, id, dock.kind, where="read_signed")
    where = f"read_signed: {folder}"
    if signature is None:
        raise ValueError(f"{where} is not signed; sign it, or do without trust.")
    key = _check(_message(id, card, spec), signature, where=f"{where}/{FILE}")
    if key not in keys:
        raise ValueError(f"{where} is signed by {key}, which is none of the {len(keys)} keys.")
    found, header = store.parse_spec(spec, where=f"{where}/{store.spec_name(dock.kind)}")
    check_same_space(header, dock, what=f"{where} and the dock {path}")
    return Learnware(id, store.parse_card(card, where=f"{where}/card.json"), found, header)


def load(path: StrPath, keys: Mapping[str, str]) -> list[Learnware]:
    """The learnwares that one of the keys has signed, sorted by id; warnings say why not others."""
    learnwares = []
    for id in store.list_ids(path):
        try:
            learnwares.append(read_signed(path, id, keys))
        except (ValueError, OSError) as error:
            warnings.warn(f"load: skipped {id!r} of {path}: {error}", stacklevel=2)
    return learnwares


def _message(id: str, card: bytes, spec: bytes) -> bytes:
    hashes = {
        "id": id,
        "card": hashlib.sha256(card).hexdigest(),
        "specification": hashlib.sha256(spec).hexdigest(),
    }
    return (_MESSAGE + dump_json(hashes, where="signature")).encode()


def _read(
    path: StrPath, id: str, kind: str, *, where: str
) -> tuple[Path, bytes, bytes, bytes | None]:
    """Folder, card, specification and signature of one version of a learnware."""

    def read(folder):
        card = store.read_bytes(folder / "card.json", MAX_JSON_BYTES, where=where)
        spec = store.read_bytes(folder / store.spec_name(kind), MAX_SPEC_BYTES, where=where)
        try:
            signature = store.read_bytes(folder / FILE, MAX_KEY_BYTES, where=where)
        except FileNotFoundError:
            signature = None
        return folder, card, spec, signature

    return store.read_whole(path, id, read, where=where)


def _check(message: bytes, signature: bytes, *, where: str) -> str:
    """The public key that signed the message; ValueError if none did."""
    exceptions, _, _ = _library(where)
    fields = parse_json(signature, where=where)
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
        raise ValueError(f"{where} is no signature of schema {SCHEMA}; sign it again.")
    if fields.keys() != {"schema", "key", "signature"}:
        raise ValueError(f"{where} has other fields than schema, key and signature; sign it again.")
    public = _public(fields["key"], where=where)
    try:
        public.verify(base64.b64decode(fields["signature"], validate=True), message)
    except (exceptions.InvalidSignature, binascii.Error, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} is not of the card and specification beside it: one of them was damaged or "
            "changed. Restore it, or look at it and sign it again."
        ) from error
    return _text_of(public)


def _library(where: str) -> tuple[Any, Any, Any]:
    try:
        from cryptography import exceptions
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ValueError(
            f"{where}: signatures want the package cryptography, which is not installed; "
            "pip install 'learnware_jax[sign]'."
        ) from error
    return exceptions, serialization, ed25519


def _private(data: bytes, *, where: str) -> Any:
    exceptions, serialization, ed25519 = _library(where)
    ssh = data.lstrip().startswith(b"-----BEGIN OPENSSH")
    load = serialization.load_ssh_private_key if ssh else serialization.load_pem_private_key
    try:
        key = load(data, password=None)
    except TypeError as error:  # so the library asks for a password
        raise ValueError(
            f"{where}: the private key has a password; give a copy without one, as "
            "`ssh-keygen -p -N '' -f COPY` makes it."
        ) from error
    except (ValueError, exceptions.UnsupportedAlgorithm) as error:
        raise ValueError(
            f"{where}: no private key in PEM or OpenSSH's format; make one with "
            "`experiments.dock --new_key=FILE`."
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ValueError(f"{where}: a private key of another kind than Ed25519; make one of it.")
    return key


def _public(text: Any, *, where: str) -> Any:
    exceptions, serialization, ed25519 = _library(where)
    try:
        key = serialization.load_ssh_public_key(text.encode())
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise ValueError("another kind of key")
    except (AttributeError, ValueError, exceptions.UnsupportedAlgorithm) as error:
        raise ValueError(
            f"{where}: {printable(str(text), 50)!r} is no public key; want 'ssh-ed25519 AAAA...'."
        ) from error
    return key


def _text_of(public: Any) -> str:
    _, serialization, _ = _library("signature")
    return public.public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ).decode()
