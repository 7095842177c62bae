"""Signatures: made and checked by hand, every change found, keys of every form, and `trust`."""

import base64
import hashlib
import json
import os
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from configs import search as search_config
from configs import select as select_config
from experiments import dock as dock_command
from experiments import ranking, search, select
from learnware_jax.dock import index, signature, store
from learnware_jax.specification.header import Header
from learnware_jax.specification.rkme import RKME

SPACE = {"encoder": "mini", "dimension": 2, "kernel": {"name": "gaussian", "gamma": 0.5}}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
RAW = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PEM, OPENSSH = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
PKCS8, PLAIN = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
KEY = RAW.private_bytes(PEM, PKCS8, PLAIN)
# 4 + 11 + 4 + 32 bytes: the lengths and values of the name and the key (RFC 8709).
PUBLIC = "ssh-ed25519 " + (
    base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0 " + RAW.public_key().public_bytes_raw()).decode()
)
KEYS = {PUBLIC: "anna"}


def learnware(id: str, number: int = 0) -> store.Learnware:
    z = np.array([[number, 1], [2, 3]], np.float32)
    header = Header(1, "rkme", SPACE, {"points": 2, "n": 9, "residual": 0.0})
    return store.Learnware(id, {"name": id, "domain": "x"}, RKME(z, np.array([0.25, 0.75])), header)


@pytest.fixture
def dock(tmp_path) -> Path:
    store.create_dock(tmp_path / "dock", SPACE)
    for number, id in enumerate("abc"):
        store.add(tmp_path / "dock", learnware(id, number), adapter=ADAPTER if id == "a" else None)
    return tmp_path / "dock"


def files(dock: Path, id: str) -> tuple[Path, Path, Path]:
    home = dock / "learnwares" / id
    return home / "card.json", home / "rkme.safetensors", home / "signature.json"


def by_hand(dock: Path, id: str, key=RAW) -> dict:
    """What the docstring of the module says, without it."""
    card, spec = (hashlib.sha256(file.read_bytes()).hexdigest() for file in files(dock, id)[:2])
    message = "learnware_jax: a learnware, signed\n"
    message += f'{{"card": "{card}", "id": "{id}", "specification": "{spec}"}}'
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    signed = base64.b64encode(key.sign(message.encode())).decode()
    return {"schema": 1, "key": public.decode(), "signature": signed}


def test_a_signature_is_what_is_said(dock):
    signature.sign(dock, "a", KEY)
    assert json.loads(files(dock, "a")[2].read_text()) == by_hand(dock, "a")
    assert signature.public_text(KEY) == PUBLIC
    files(dock, "b")[2].write_text(json.dumps(by_hand(dock, "b")))
    for id in "ab":
        found, held = signature.read_signed(dock, id, KEYS), store.read_learnware(dock, id)
        assert (found.id, found.card, found.header) == (id, held.card, held.header)
        np.testing.assert_array_equal(found.spec.z, held.spec.z)
        np.testing.assert_array_equal(found.spec.beta, held.spec.beta)


def test_only_what_is_signed_by_the_trusted_is_loaded(dock):
    signature.sign(dock, "a", KEY)
    signature.sign(dock, "b", signature.new_key())
    with pytest.warns(UserWarning) as warned:
        assert [one.id for one in signature.load(dock, KEYS)] == ["a"]
    said = [str(warning.message) for warning in warned]
    assert len(said) == 2
    assert "skipped 'b'" in said[0] and "which is none of the 1 keys" in said[0]
    assert "skipped 'c'" in said[1] and "is not signed; sign it" in said[1]


def test_every_changed_byte_is_found(dock):
    signature.sign(dock, "b", KEY)
    card, spec, _ = files(dock, "b")
    for file in (card, spec):
        sound = file.read_bytes()
        for at in range(len(sound)):
            changed = bytearray(sound)
            changed[at] ^= 1
            file.write_bytes(changed)
            with pytest.raises(ValueError, match=r"is not of the card and specification beside it"):
                signature.read_signed(dock, "b", KEYS)
        file.write_bytes(sound)
    assert signature.read_signed(dock, "b", KEYS).id == "b"


def test_a_signed_adapter_is_held_by_the_card(dock):
    signature.sign(dock, "a", KEY)
    home, other = dock / "learnwares/a/adapter/adapter_model.safetensors", b"others!"
    home.write_bytes(other)
    with pytest.raises(ValueError, match="does not match its hash on the card"):
        store.read_adapter(dock, "a")
    with pytest.raises(ValueError, match="does not match its hash on the card"):
        signature.sign(dock, "a", KEY)
    card = files(dock, "a")[0]
    content = json.loads(card.read_text())
    content["adapter"][home.name] = hashlib.sha256(other).hexdigest()
    card.write_text(json.dumps(content))
    assert store.read_adapter(dock, "a")[home.name] == other
    with pytest.raises(ValueError, match="is not of the card"):
        signature.read_signed(dock, "a", KEYS)


def test_a_signature_is_of_one_id(dock):
    signature.sign(dock, "b", KEY)
    shutil.copytree(dock / "learnwares/b", dock / "learnwares/other")
    with pytest.raises(ValueError, match="is not of the card"):
        signature.read_signed(dock, "other", KEYS)


def test_a_replacement_has_no_signature(dock):
    signature.sign(dock, "b", KEY)
    store.add(dock, learnware("b", 7), replace=True)
    with pytest.raises(ValueError, match="is not signed"):
        signature.read_signed(dock, "b", KEYS)


BAD = {
    "no json": ("{", "not a JSON text"),
    "list": ("[]", "is no signature of schema 1"),
    "schema": ('{"schema": 2}', "is no signature of schema 1"),
    "fields": ('{"schema": 1, "key": ""}', "has other fields than schema, key and signature"),
    "key": ('{"schema": 1, "key": 3, "signature": ""}', "'3' is no public key"),
    "escape": ('{"schema": 1, "key": "\\u001b[2J", "signature": ""}', r"x1b\[2J' is no public"),
    "type": ('{"schema": 1, "key": "@", "signature": 5}', "is not of the card"),
    "base64": ('{"schema": 1, "key": "@", "signature": "??"}', "is not of the card"),
    "short": ('{"schema": 1, "key": "@", "signature": "AAAA"}', "is not of the card"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_what_is_no_signature_is_refused(dock, text, message):
    files(dock, "b")[2].write_text(text.replace("@", PUBLIC))
    with pytest.raises(ValueError, match=rf"^read_signed: .*{message}"):
        signature.read_signed(dock, "b", KEYS)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_links_are_not_followed(dock, tmp_path, part):
    signature.sign(dock, "b", KEY)
    file = files(dock, "b")[part]
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"^read_signed: .* is a symbolic link"):
        signature.read_signed(dock, "b", KEYS)


def test_a_failed_write_leaves_the_old_signature(dock, monkeypatch):
    signature.sign(dock, "b", KEY)
    (dock / "learnwares/b/.signature.json.0123").touch()  # a writer was killed here

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"sign: could not write"):
            signature.sign(dock, "b", signature.new_key())
    assert signature.read_signed(dock, "b", KEYS).id == "b"
    signature.sign(dock, "b", KEY)
    assert not list((dock / "learnwares/b").glob(".*"))


# Keys


def test_keys_of_openssh_are_read(tmp_path):
    other = signature.public_text(signature.new_key())
    file = tmp_path / "KEYS"
    file.write_text(f"# whom we know\n\n  {PUBLIC} anna of law\n{other}\n{PUBLIC} anna of law\n")
    assert signature.read_keys(file) == {PUBLIC: "anna of law", other: ""}


RSA = "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAIQCv"
CURVE = ec.generate_private_key(ec.SECP256R1())
CURVE_PUBLIC = CURVE.public_key().public_bytes(
    serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no key; want lines"),
        (b"# none\n", "has no key; want lines"),
        (PUBLIC.encode()[:-8], "line 1: 'ssh-ed25519 .* is no public key; want"),
        (f"\n{PUBLIC}\n{RSA} me\n".encode(), "line 3: 'ssh-rsa .* is no public key"),
        (CURVE_PUBLIC, "line 1: 'ecdsa-sha2-nistp256 .* is no public key"),
        (KEY, "line 1: '-----BEGIN PRIVATE' is no public key"),
        (b"\xff\xfe", "is no text in UTF-8"),
        (b"ssh-ed25519\n", "line 1: 'ssh-ed25519' is no public key"),
        (b"\x1b[2J x\n", r"line 1: '\\\\x1b\[2J x' is no public key"),
    ],
)
def test_what_holds_no_keys_is_refused(tmp_path, content, message):
    (tmp_path / "KEYS").write_bytes(content)
    with pytest.raises(ValueError, match=f"^read_keys: .*KEYS.*{message}"):
        signature.read_keys(tmp_path / "KEYS")


def test_absent_keys_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^read_keys: there is no .*/KEYS"):
        signature.read_keys(tmp_path / "KEYS")


def test_private_keys_of_openssh_sign_as_those_of_pem(dock):
    signature.sign(dock, "b", RAW.private_bytes(PEM, OPENSSH, PLAIN))
    assert json.loads(files(dock, "b")[2].read_text()) == by_hand(dock, "b")


LOCKED = serialization.BestAvailableEncryption(b"secret")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (RAW.private_bytes(PEM, PKCS8, LOCKED), "has a password; give a copy without one"),
        (CURVE.private_bytes(PEM, PKCS8, PLAIN), "of another kind than Ed25519"),
        (PUBLIC.encode(), "no private key in PEM or OpenSSH's format"),
        (KEY[:-40], "no private key in PEM"),
        (b"", "no private key in PEM"),
        (RAW.private_bytes(PEM, OPENSSH, PLAIN)[:99], "no private key in PEM"),
    ],
)
def test_what_is_no_private_key_is_refused(dock, key, message):
    with pytest.raises(ValueError, match=f"^sign: .*{message}"):
        signature.sign(dock, "b", key)
    assert not files(dock, "b")[2].exists()


def test_a_password_on_a_key_of_openssh_is_named():
    # The head of such a key says so: it names a cipher (the rest is not needed to see it).
    head = b"openssh-key-v1\0" + b"".join(
        len(part).to_bytes(4, "big") + part
        for part in (b"aes256-ctr", b"bcrypt", b"\0\0\0\x10" + bytes(16) + b"\0\0\0\x10")
    )
    public = base64.b64decode(PUBLIC.split()[1])
    body = head + (1).to_bytes(4, "big") + len(public).to_bytes(4, "big") + public
    body += (96).to_bytes(4, "big") + bytes(96)
    text = b"-----BEGIN OPENSSH PRIVATE KEY-----\n" + base64.encodebytes(body)
    with pytest.raises(ValueError, match="has a password; give a copy without one"):
        signature.public_text(text + b"-----END OPENSSH PRIVATE KEY-----\n")


def test_a_missing_library_is_named_with_its_extra(dock, monkeypatch):
    signature.sign(dock, "b", KEY)
    for name in [*sys.modules]:
        if name.startswith("cryptography"):
            monkeypatch.setitem(sys.modules, name, None)
    for use in (
        signature.new_key,
        lambda: signature.sign(dock, "b", KEY),
        lambda: signature.read_signed(dock, "b", KEYS),
    ):
        with pytest.raises(ValueError, match=r"not installed; pip install 'learnware_jax\[sign\]'"):
            use()


# The command line


def call(*options: str) -> int:
    with flagsaver.flagsaver():
        flags.FLAGS(["dock", *options])
        try:
            dock_command.main(["dock"])
        except SystemExit as stopped:
            return stopped.code
    return 0


def test_the_command_makes_keys_and_signs(dock, tmp_path, capsys):
    file = tmp_path / "mine"
    assert call(f"--new_key={file}") == 0
    public, said = capsys.readouterr().out.split("\n")[0], file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert public == signature.public_text(said)
    assert call(f"--new_key={file}") == 2
    assert file.read_bytes() == said
    assert "there is a file" in capsys.readouterr().err
    assert call(f"--dock={dock}", f"--sign={file}", "--id=b") == 0
    assert signature.read_signed(dock, "b", {public: ""}).id == "b"
    assert not files(dock, "a")[2].exists()
    files(dock, "c")[0].write_text("{")
    capsys.readouterr()
    assert call(f"--dock={dock}", f"--sign={file}") == 1
    said = capsys.readouterr().out
    assert "signed 2 learnwares of 3 with ssh-ed25519" in said and "c: read_learnware: " in said
    assert [signature.read_signed(dock, id, {public: ""}).id for id in "ab"] == ["a", "b"]
    assert call(f"--dock={dock}", f"--sign={dock}/dock.json") == 2
    assert "error: --sign: " in capsys.readouterr().err


# Trust


@pytest.fixture
def trusted(dock, tmp_path):
    """A dock of three, of which two are signed, and the file of the key."""
    for id in "ac":
        signature.sign(dock, id, KEY)
    (tmp_path / "KEYS").write_text(f"{PUBLIC} anna\n")
    (tmp_path / "none").write_text(signature.public_text(signature.new_key()))
    return dock, tmp_path / "KEYS", tmp_path / "none"


def searching(dock: Path, tmp_path: Path, keys: Path):
    store.write_spec(tmp_path / "user.rkme.safetensors", *learnware("u")[2:])
    config = search_config.get_config("smoke")
    config.dock, config.workdir, config.trust = str(dock), str(tmp_path / "work"), str(keys)
    config.users = (str(tmp_path / "user.rkme.safetensors"),)
    return config


def test_a_search_finds_what_is_trusted_alone(trusted, tmp_path):
    dock, keys, none = trusted
    with pytest.warns(UserWarning, match=r"skipped 'b' of .*is not signed"):
        found = search.run(searching(dock, tmp_path, keys))
    assert found["learnwares"] == 2
    assert [entry["id"] for entry in found["users"][0]["ranking"]] == ["a", "c"]
    with (
        pytest.warns(UserWarning, match="which is none of the 1 keys"),
        pytest.raises(ValueError, match=r"no learnware that one of 1 keys has signed"),
    ):
        search.run(searching(dock, tmp_path, none))


def test_a_search_does_not_trust_an_index(trusted, tmp_path):
    """Rows that a stranger wrote are not those of the files that were signed."""
    dock, keys, _ = trusted
    config = searching(dock, tmp_path, keys)
    with pytest.warns(UserWarning, match="is not signed"):
        search.run(config)
    with index._writable(dock, index._read_state(dock, where=""), "points", where="") as stream:
        stream.seek(16)  # beta is 16 bytes: the first number of z
        stream.write(np.float32(9).tobytes())
    assert not index.is_behind(dock)
    with pytest.raises(ValueError, match=r"is not of its files \(1 rows .* first is a\); delete"):
        search.run(config)


def test_keys_are_read_before_any_work(trusted, tmp_path):
    dock, _, _ = trusted
    config = searching(dock, tmp_path, tmp_path / "absent")
    choice = select_config.get_config("smoke")
    choice.workdir, choice.trust = config.workdir, config.trust
    choice.build.dock = str(tmp_path / "made")  # for want of a dock
    for run, settings in ((search.run, config), (select.run, choice)):
        with pytest.raises(FileNotFoundError, match=r"^read_keys: there is no .*absent"):
            run(settings)
    assert not (tmp_path / "made").exists() and not (tmp_path / "work").exists()
    assert not (dock / "index").exists()


def test_a_dock_opens_with_what_is_trusted(trusted, monkeypatch):
    dock, keys, none = trusted
    monkeypatch.setattr(ranking, "dock_space", lambda path, _: (store.read_space(path), None))
    settings = select_config.get_config("smoke").specification
    opened = ranking.open_dock(str(dock), settings, trust=ranking.trusted_keys(""))
    assert list(opened.pool.ids) == ["a", "b", "c"]
    with pytest.warns(UserWarning, match=r"skipped 'b' of .*is not signed"):
        opened = ranking.open_dock(str(dock), settings, trust=ranking.trusted_keys(str(keys)))
    assert list(opened.pool.ids) == ["a", "c"]
    with (
        pytest.warns(UserWarning, match="none of the 1 keys"),
        pytest.raises(ValueError, match=r"no sound learnware, signed by one of 1 keys"),
    ):
        ranking.open_dock(str(dock), settings, trust=ranking.trusted_keys(str(none)))
