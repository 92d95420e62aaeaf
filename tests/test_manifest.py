"""Manifests and their discovery."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snap.dataplane.errors import ManifestError
from snap.ipc import discovery, manifest, tomlfile

GOOD = """
[module]
name = "{name}"
version = "1.2"
[provides.{name}]
engine = "main"
[engines.main]
class = "engine:Main"
"""


def make(directory: Path, name: str, text: str | None = None) -> Path:
    home = directory / name
    home.mkdir(parents=True)
    (home / "module.toml").write_text(GOOD.format(name=name) if text is None else text)
    return home


def data(**changes: object) -> dict[str, object]:
    return {
        "module": {"name": "x", "version": "1"},
        "engines": {"a": {"class": "native:echo"}},
        **changes,
    }


def test_defaults_are_filled_in_and_survive_a_round_trip(tmp_path: Path) -> None:
    loaded = manifest.load(make(tmp_path, "good"))
    assert loaded.name == "good"
    assert (loaded.restart.policy, loaded.module.state_version) == ("always", 1)
    assert (loaded.engines["main"].wait, loaded.engines["main"].budget) == ("adaptive", 64)
    assert loaded.to_builtins()["engines"]["main"]["class"] == "engine:Main"
    assert manifest.from_builtins(loaded.to_builtins()) == loaded


def test_every_key_of_a_full_manifest_is_read() -> None:
    loaded = manifest.from_builtins(
        {
            "module": {
                "name": "x",
                "version": "1",
                "description": "d",
                "state_version": 3,
                "entry": "engine:X",
            },
            "provides": {"s": {"engine": "a"}},
            "requires": {"services": ["other"]},
            "engines": {"a": {"class": "native:echo", "wait": "spin", "budget": 8}},
            "restart": {"policy": "never"},
            "resources": {"memory": "2MiB", "descriptors": 64},
        }
    )
    assert loaded.module.entry == "engine:X"
    assert loaded.provides["s"].engine == "a"
    assert loaded.requires.services == ["other"]
    assert loaded.engines["a"].native == "echo"
    assert loaded.resources.memory_bytes == 2 * 1024 * 1024
    assert loaded.restart.policy == "never"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"module": {"name": "Bad Name", "version": "1"}}, "module.name"),
        ({"module": {"name": "x\n", "version": "1"}}, "module.name"),
        ({"module": {"name": "x", "version": 1}}, "module.version"),
        ({"module": {"name": "x", "version": "1", "entry": "engine"}}, "module.entry"),
        ({"module": {"name": "x", "version": "1", "state_version": True}}, "module.state_version"),
        ({"module": {"name": "x"}}, "`version`"),
        ({"engines": {}}, "engines"),
        ({"engines": {"a": {"class": "native:e"}, "b": {"class": 3}}}, "engines.b.class"),
        ({"engines": {"a": {"class": "native:e"}, "b": {"class": "nothing"}}}, "engines.b.class"),
        ({"engines": {"a": {"class": "../evil:E"}}}, "engines.a.class"),
        ({"engines": {"a": {"class": "native:"}}}, "engines.a.class"),
        ({"engines": {"a": {"class": "native:e"}, "B": {"class": "native:e"}}}, "engines.B"),
        ({"engines": {"a": {"class": "native:e", "wait": "sleep"}}}, "engines.a.wait"),
        ({"engines": {"a": {"class": "native:e", "budget": 0}}}, "engines.a.budget"),
        ({"engines": {"a": {"class": "native:e", "clas": 1}}}, "`clas`"),
        ({"provides": {"s": {"engine": "missing"}}}, "provides.s.engine"),
        ({"requires": {"services": ["ok", 3]}}, "requires.services[1]"),
        ({"requires": {"services": ["twice", "twice"]}}, "requires.services"),
        ({"restart": {"policy": "sometimes"}}, "restart.policy"),
        ({"resources": {"memory": "much"}}, "resources.memory"),
        ({"resources": {"descriptors": 3}}, "resources.descriptors"),
        ({"surprise": 1}, "`surprise`"),
    ],
)
def test_a_wrong_manifest_is_refused_with_file_and_key(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ManifestError) as caught:
        manifest.from_builtins(data(**changes), "here/module.toml")
    assert caught.value.message.startswith("here/module.toml: ")
    assert key in caught.value.message


def test_a_name_that_differs_from_the_directory_is_refused(tmp_path: Path) -> None:
    home = make(tmp_path, "one", GOOD.format(name="two"))
    with pytest.raises(ManifestError, match=r"module\.name: 'two', but its directory is named 'one'"):
        manifest.load(home / "module.toml")


@pytest.mark.parametrize("text", ["[module", 'a = "\\ud800"', "a = " + "[" * 5000, "\0"])
def test_what_is_no_toml_is_refused_by_name(tmp_path: Path, text: str) -> None:
    home = make(tmp_path, "bad", text)
    with pytest.raises(ManifestError, match=r"bad/module\.toml: not valid TOML"):
        manifest.load(home)


def test_a_pipe_a_huge_file_and_a_missing_one_are_refused_without_being_read(tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "module.toml")
    huge = make(tmp_path, "huge", "#" * (tomlfile.MAX_BYTES + 1))
    with pytest.raises(ManifestError, match="not a regular file"):
        manifest.load(tmp_path / "pipe")
    with pytest.raises(ManifestError, match="more than"):
        manifest.load(huge)
    with pytest.raises(ManifestError, match="No such file"):
        manifest.load(tmp_path / "nowhere")


# A small alphabet: the point is the shape, and the first draw of one from all of Unicode is slow.
text = st.text("aX-.\n", max_size=8)
json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["module", "engines", "provides", "requires", "restart", "resources"])


@given(st.dictionaries(keys, json_like))
def test_no_table_however_odd_gets_past_the_named_error(changes: dict[str, object]) -> None:
    try:
        loaded = manifest.from_builtins(data(**changes))
    except ManifestError as error:
        assert error.message.startswith("module.toml: ")
    else:
        assert manifest.from_builtins(loaded.to_builtins()) == loaded


@given(st.integers(0, 10**9), st.sampled_from(["", "B", "KiB", "MiB", "GiB"]))
def test_a_size_is_its_number_times_its_unit(number: int, unit: str) -> None:
    factor = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]
    assert tomlfile.size_bytes(f"{number}{unit}") == number * factor


def test_one_broken_manifest_does_not_hide_the_others(tmp_path: Path) -> None:
    make(tmp_path, "good")
    make(tmp_path, "broken", "[module]\nname = 3\n")
    (tmp_path / "no-module").mkdir()
    result = discovery.discover([tmp_path])
    assert result.found["good"].path == tmp_path / "good"
    assert result.found["good"].source == "path"
    assert [problem.path.name for problem in result.problems] == ["broken"]
    assert "module.name" in result.problems[0].message


def test_the_first_of_two_modules_of_one_name_wins_and_the_other_is_reported(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a", "same"), make(tmp_path / "b", "same")
    result = discovery.discover([tmp_path / "a", tmp_path / "b"])
    assert result.found["same"].path == first
    assert [problem.path for problem in result.problems] == [second]
    assert str(first) in result.problems[0].message


def test_a_directory_named_twice_is_no_problem(tmp_path: Path) -> None:
    make(tmp_path, "good")
    assert discovery.discover([tmp_path, tmp_path]).problems == []


def test_a_missing_directory_is_reported(tmp_path: Path) -> None:
    result = discovery.discover([tmp_path / "nowhere"])
    assert [problem.path for problem in result.problems] == [tmp_path / "nowhere"]


def test_the_variable_comes_before_the_directories_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_variable, given_path = make(tmp_path / "a", "same"), make(tmp_path / "b", "same")
    monkeypatch.setenv("SNAP_MODULE_PATH", f"{by_variable.parent}:")
    assert discovery.discover([given_path.parent]).found["same"].path == by_variable


def test_the_shipped_echo_is_found_with_both_its_services() -> None:
    echo = discovery.discover().found["echo"]
    assert echo.source == "shipped"
    assert set(echo.manifest.provides) == {"echo", "echo-py"}
    assert echo.manifest.engines["echo"].native == "echo"
    assert echo.manifest.engines["echo-py"].class_ == "engine:PyEcho"


def test_an_entry_point_is_followed_without_importing_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "plugged_outer"
    make(package, "plugged")
    for directory in (package, package / "plugged"):
        (directory / "__init__.py").write_text("raise SystemExit('imported')")
    info = tmp_path / "plugged-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[snap.modules]\nlost = not_installed_anywhere\nplugged = plugged_outer.plugged\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    result = discovery.discover()
    assert result.found["plugged"].path == package / "plugged"
    assert result.found["plugged"].source == "entry point plugged"
    assert [problem.source for problem in result.problems] == ["entry point lost"]
    assert not any(name.startswith("plugged_outer") for name in sys.modules)
