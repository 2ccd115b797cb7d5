"""The catalogue as data, and as a registry that other packages can extend."""

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from shared.errors import BadInput, UnknownName
from shared.weights import catalogue as module
from shared.weights.catalogue import HubSource, IndexSource, catalogue, find_artefact, read_catalogue

OWN = Path(module.__file__).with_name("catalogue.toml")

ARTEFACT = """
[[artefact]]
name = "other"
kind = "llm"
summary = "A model of another package"
licence = "MIT"
installs = ["model.bin"]
"""
SOURCE = """
[[artefact.source]]
kind = "package"
files = [{ name = "model.bin", size = 3, sha256 = "00" }]
"""


@pytest.fixture(autouse=True)
def _no_cache():
    catalogue.cache_clear()
    yield
    catalogue.cache_clear()


def test_every_artefact_is_pinned_licensed_and_has_a_source():
    artefacts = read_catalogue(OWN)
    assert {"clip-vit-b-16", "smollm2-135m-instruct"} <= {artefact.name for artefact in artefacts}
    for artefact in artefacts:
        assert all([artefact.licence, artefact.summary, artefact.installs])
        assert artefact.sources or artefact.shipped
        files = [file for source in artefact.sources for file in source.files]
        files += [artefact.shipped.file] if artefact.shipped else []
        for file in files:
            assert re.fullmatch("[0-9a-f]{64}", file.sha256), file
            assert file.size > 0
        for source in artefact.sources:
            if isinstance(source, HubSource):
                assert re.fullmatch("[0-9a-f]{40}", source.revision), "a branch would move"
            if isinstance(source, IndexSource):
                assert re.fullmatch(r"[\w-]+==[\w.]+", source.requirement)


def test_every_converter_of_the_catalogue_exists():
    from importlib import import_module

    converters = {source.convert for artefact in read_catalogue(OWN) for source in artefact.sources if source.convert}
    assert converters
    for converter in converters:
        name, function = converter.split(":")
        assert callable(getattr(import_module(name), function))


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(UnknownName, match=r"'clip'; there are: .*clip-vit-b-16, smollm2-135m-instruct"):
        find_artefact("clip", catalogue())


@pytest.mark.parametrize("how", ["path", "function"])
def test_another_package_adds_artefacts_by_entry_point(tmp_path: Path, monkeypatch, how: str):
    path = write(tmp_path, ARTEFACT + SOURCE)
    extend(monkeypatch, path if how == "path" else lambda: path)
    artefact = catalogue()["other"]
    assert artefact.shipped is not None
    assert artefact.shipped.path == tmp_path / "model.bin"
    assert "clip-vit-b-16" in catalogue()


def test_a_name_that_is_taken_is_refused(tmp_path: Path, monkeypatch):
    extend(monkeypatch, write(tmp_path, ARTEFACT.replace("other", "clip-vit-b-16") + SOURCE))
    with pytest.raises(BadInput, match=r"their:CATALOGUE: the name clip-vit-b-16 is taken"):
        catalogue()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[[artefact", "cannot be read"),
        (ARTEFACT, "source"),
        (ARTEFACT.replace('"llm"', '"lllm"') + SOURCE, "'lllm' is none of"),
        (ARTEFACT + SOURCE.replace("package", "ftp"), "'ftp' is none of hub, index, package"),
        (ARTEFACT + SOURCE.replace("sha256", "md5"), "md5"),
        (ARTEFACT.replace("licence", "license") + SOURCE, "license"),
        (ARTEFACT + SOURCE + SOURCE, "one package, import or folder source"),
    ],
)
def test_a_catalogue_that_makes_no_sense_is_refused_with_the_place(tmp_path: Path, text: str, reason: str):
    with pytest.raises(BadInput, match=f"(?s)catalogue {re.escape(str(tmp_path))}.*{re.escape(reason)}"):
        read_catalogue(write(tmp_path, text))


def write(folder: Path, text: str) -> Path:
    path = folder / "catalogue.toml"
    path.write_text(text, encoding="utf-8")
    return path


def extend(monkeypatch, value: object) -> None:
    entry = EntryPoint("mine", "their:CATALOGUE", "comneck.catalogues")
    monkeypatch.setattr(EntryPoint, "load", lambda self: value)
    monkeypatch.setattr(module, "entry_points", lambda group: [entry] if group == "comneck.catalogues" else [])
