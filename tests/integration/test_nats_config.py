"""``tidings topology nats-config``: what it writes, what it keeps, and what it refuses."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from support.command import run_here
from tidings.stream.roles import Publisher
from tidings.stream.server import find_binary
from tidings.wire.errors import BadSettings


def configure(folder: Path, *options: str) -> int:
    return run_here("topology", "nats-config", folder, *options)


def seeds(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.glob("*.nk")}


@pytest.mark.parametrize("partitions", ["1", "64", "1024"])
def test_a_server_takes_it(tmp_path: Path, partitions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real nats-server finds no mistake in it, whatever is in the names of users and topics."""
    monkeypatch.setenv("TIDINGS_PARTITIONS", partitions)
    file = tmp_path / "publishers.toml"
    file.write_text('[odd]\nusers = ["*", "o\'né, \\"x\\" $HOME # \\\\ \\n.*", "{{wildcard(1)}}"]\ntopics = [">"]\n')
    assert configure(tmp_path / "nats", "--publisher", "shop:user:*,topic:shop.>", "--publishers", str(file)) == 0
    command = [str(find_binary()), "-t", "-c", str(tmp_path / "nats" / "nats-server.conf")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "is valid" in checked.stdout + checked.stderr


def test_seeds_are_for_their_owner(tmp_path: Path) -> None:
    """Nobody else of the machine reads a seed, and none is in what the server reads."""
    folder = tmp_path / "nats"
    configure(folder, "--publisher", "shop:user:*")
    found = seeds(folder)
    roles = {"gateway.nk", "inbox.nk", "fanout.nk", "api.nk", "operator.nk", "system.nk"}
    assert found.keys() == roles | {"publisher-shop.nk"}
    assert len(set(found.values())) == len(found)
    for name, seed in found.items():
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
        for config in folder.glob("*.conf"):
            assert seed.strip() not in config.read_text()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_second_run_keeps_what_is_there(tmp_path: Path) -> None:
    """Keys stay, and so does the server's configuration that the operator has changed."""
    configure(tmp_path, "--publisher", "shop:user:*")
    before = seeds(tmp_path)
    (tmp_path / "nats-server.conf").write_text("# mine\n")
    assert configure(tmp_path, "--publisher", "shop:topic:shop.>", "--publisher", "bank:user:alice") == 0
    after = seeds(tmp_path)
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {"publisher-bank.nk"}
    assert (tmp_path / "nats-server.conf").read_text() == "# mine\n"
    accounts = (tmp_path / "accounts.conf").read_text()
    assert '"notify.topic.shop.>"' in accounts
    assert '"notify.user.*"  # user *' not in accounts


def test_a_publisher_is_not_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever leaves an option out does not lock a service out; removing one is said."""
    configure(tmp_path, "--publisher", "shop:user:*")
    before = (tmp_path / "accounts.conf").read_text()
    assert configure(tmp_path, "--rotate", "gateway") == 1
    assert "the publisher shop has a key" in capsys.readouterr().err
    assert (tmp_path / "accounts.conf").read_text() == before
    assert not (tmp_path / "gateway.previous.nk").exists()
    assert configure(tmp_path, "--remove", "shop") == 0
    assert "shop" not in (tmp_path / "accounts.conf").read_text()
    assert not (tmp_path / "publisher-shop.nk").exists()


def test_a_key_is_exchanged_in_two_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The new key and the one before are let in, until that one is retired; not two of them."""
    configure(tmp_path)
    users = (tmp_path / "accounts.conf").read_text().count("nkey:")
    old = seeds(tmp_path)["gateway.nk"]
    assert configure(tmp_path, "--rotate", "gateway") == 0
    found = seeds(tmp_path)
    assert found["gateway.previous.nk"] == old != found["gateway.nk"]
    assert (tmp_path / "accounts.conf").read_text().count("nkey:") == users + 1
    assert configure(tmp_path, "--rotate", "gateway") == 1
    assert "--retire gateway" in capsys.readouterr().err
    assert configure(tmp_path, "--retire", "gateway") == 0
    assert (tmp_path / "accounts.conf").read_text().count("nkey:") == users
    assert configure(tmp_path, "--rotate", "gateway", "--retire", "gateway") == 0
    assert seeds(tmp_path)["gateway.nk"] != found["gateway.nk"]


def test_a_stolen_key_is_replaced_at_once(tmp_path: Path) -> None:
    """Also in the middle of an exchange: neither of its keys is let in any more, and the new one is."""
    configure(tmp_path)
    users = (tmp_path / "accounts.conf").read_text().count("nkey:")
    assert configure(tmp_path, "--rotate", "gateway") == 0
    before = seeds(tmp_path)
    assert configure(tmp_path, "--rotate", "gateway", "--retire", "gateway") == 0
    found = seeds(tmp_path)
    assert found["gateway.nk"] not in {before["gateway.nk"], before["gateway.previous.nk"]}
    assert found.keys() == before.keys() - {"gateway.previous.nk"}
    assert (tmp_path / "accounts.conf").read_text().count("nkey:") == users


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--publisher", "shop"), "'shop' is no publisher"),
        (("--publisher", "shop:people:*"), "is no publisher"),
        (("--publisher", "Shop:user:*"), "is no name of a publisher"),
        (("--publisher", "gateway:user:*"), "that is a role of the mesh's own"),
        (("--publisher", "shop:topic:a..b"), "the publisher shop: 'a..b' has an empty level"),
        (("--publisher", "shop:topic:a.*"), "only a subscription may end in"),
        (("--publisher", "shop:user:"), "the publisher shop: user id is empty"),
        (("--publisher", "shop:user:*", "--publisher", "shop:user:a"), "the publisher shop is there twice"),
        (("--publishers", "missing.toml"), "cannot be read: No such file or directory"),
        (("--rotate", "nobody"), "there is no key of 'nobody'"),
        (("--retire", "gateway"), "there is no earlier key of 'gateway'"),
        (("--remove", "gateway"), "it cannot be removed"),
        (("--remove", "nobody"), "there is no key of 'publisher-nobody'"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    options: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is said what is wrong, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "nats"
    assert configure(folder, *options) == 1
    assert said in capsys.readouterr().err
    assert not (folder / "accounts.conf").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("shop", "is not TOML"),
        ("shop = 1", "shop must be a table"),
        ("[shop]\npeople = []", "shop must be a table with users and topics alone"),
        ("[shop]\nusers = 'alice'", "users of shop must be a list of texts"),
        ("[shop]\nusers = [1]", "users of shop must be a list of texts"),
        ("[shop]\nusers = []", "the publisher shop may publish to nobody"),
    ],
)
def test_bad_file(tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same of the file of publishers."""
    file = tmp_path / "publishers.toml"
    file.write_text(text)
    assert configure(tmp_path / "nats", "--publishers", str(file)) == 1
    assert said in capsys.readouterr().err


def test_a_seed_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that was damaged is named, and left as it is."""
    configure(tmp_path)
    (tmp_path / "api.nk").write_text("garbage")
    assert configure(tmp_path) == 1
    assert f"the file {tmp_path / 'api.nk'} has no seed" in capsys.readouterr().err
    assert (tmp_path / "api.nk").read_text() == "garbage"


def test_without_what_makes_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the extra is not installed, it is named."""
    monkeypatch.setitem(sys.modules, "nkeys", None)
    assert configure(tmp_path) == 1
    assert "pip install 'tidings[nkeys]'" in capsys.readouterr().err


def test_subjects_of_a_publisher() -> None:
    """Users and topics become the subjects that services publish to, each level escaped by itself."""
    publisher = Publisher("shop", ("*", "a.b"), (">", "x.y", "x y.>"))
    assert [line.subject for line in publisher.subjects()] == [
        *("notify.user.*", "notify.user.a%2Eb", "notify.topic.>", "notify.topic.x.y", "notify.topic.x%20y.>")
    ]
    with pytest.raises(BadSettings):
        Publisher("shop", ("",))
