"""Weights are found where `weights.yaml` says, verified before use and never downloaded by accident."""

import hashlib
import re
import urllib.request

import pytest
import torch
from typer.testing import CliRunner

from dmd2.core.errors import UserError
from eval.detectors.detectors import load_detector
from eval.detectors.networks import NETWORKS
from eval.detectors.weights import fetch, fid_checksums, load_state, locate, registry

INCEPTION = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a download was attempted")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def test_lite0_weights_of_the_package_have_the_listed_checksum() -> None:
    weights = locate("efficientnet-lite0")
    assert weights.verified and weights.sha256 == LITE0
    assert hashlib.sha256(weights.path.read_bytes()).hexdigest() == LITE0


def test_missing_weights_are_named_with_checksum_place_and_command(tmp_path, offline) -> None:
    place, command = (
        re.escape(f"{tmp_path}/inception-2015-12-05/"),
        "dmd2 eval weights inception-2015-12-05",
    )
    with pytest.raises(UserError, match=rf"inception-2015-12-05\.pt \(SHA-256 {INCEPTION}\) .*{place} .*{command}$"):
        load_detector("inception-2015-12-05", tmp_path)


@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.startswith("lite0")])
def test_no_network_downloads_its_weights_or_runs_without_them(tmp_path, offline, name) -> None:
    with pytest.raises(UserError, match="is missing; put it into"):
        load_detector(name, tmp_path)


def test_wrong_checksum_is_refused_before_the_file_is_opened(tmp_path, offline) -> None:
    path = tmp_path / "inception-2015-12-05/inception-2015-12-05.pt"
    path.parent.mkdir()
    path.write_bytes(b"not a network")
    found = hashlib.sha256(b"not a network").hexdigest()
    with pytest.raises(
        UserError, match=f"has SHA-256 {found} instead of {INCEPTION}.*dmd2 eval weights inception-2015"
    ):
        load_detector("inception-2015-12-05-clean", tmp_path)


def test_weights_without_a_listed_checksum_are_not_verified(tmp_path) -> None:
    path = tmp_path / "clip-ViT-g-14" / registry()["clip-ViT-g-14"].files[0].file
    path.parent.mkdir()
    path.write_bytes(b"unknown")
    assert not locate("clip-ViT-g-14", tmp_path).verified


def test_only_the_two_canonical_inceptions_may_be_called_fid() -> None:
    assert {name for name, entry in registry().items() if entry.fid} == {"inception-2015-12-05", "inception-pt"}
    assert LITE0 not in fid_checksums() and INCEPTION in fid_checksums()


def test_every_listed_file_has_a_source_and_a_licence() -> None:
    for entry in registry().values():
        assert entry.licence
        assert entry.package or all(file.url and file.url.startswith("https://") for file in entry.files)
        assert all(file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256) for file in entry.files)


def test_fetch_verifies_what_it_downloaded(tmp_path, monkeypatch) -> None:
    asked = []

    def download(url, path, hash_prefix):
        asked.append((url, hash_prefix))
        raise RuntimeError('invalid hash value (expected "f58c", got "0000")')

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(UserError, match="does not have the expected checksum"):
        fetch("inception-2015-12-05", tmp_path)
    assert asked == [(registry()["inception-2015-12-05"].files[0].url, INCEPTION)]


def test_fetch_of_a_complete_folder_downloads_nothing(tmp_path, offline) -> None:
    entry = registry()["clip-ViT-g-14"]
    (tmp_path / entry.name).mkdir()
    for file in entry.files:
        (tmp_path / entry.name / file.file).write_bytes(b"x")
    assert [path.name for path in fetch(entry.name, tmp_path)] == [file.file for file in entry.files]


@pytest.mark.parametrize(("name", "sentence"), [("nothing", "choose one of inception"), ("efficientnet-lite0", "pip")])
def test_command_says_what_cannot_be_downloaded(tmp_path, offline, name, sentence) -> None:
    import typer

    from eval.detectors.weights import main

    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [name, "--folder", str(tmp_path)])
    assert result.exit_code != 0 and sentence in str(result.exception)


def test_state_that_is_not_one_is_named(tmp_path) -> None:
    (tmp_path / "broken.pth").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"broken\.pth is not a readable state dict"):
        load_state(tmp_path / "broken.pth")


def test_state_that_would_execute_code_is_refused(tmp_path) -> None:
    torch.save({"net": torch.nn.Linear(1, 1)}, tmp_path / "module.pth")
    with pytest.raises(UserError, match=r"module\.pth is not a readable state dict"):
        load_state(tmp_path / "module.pth")
