"""Brace ranges and wildcards against bash and Python's glob."""

import glob
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import NoShardsError, SettingsError
from pipeline.input.patterns import expand_braces, survey_pattern
from pipeline.storage import Storage

STORAGE = Storage()
PARTS = st.sampled_from(
    ["a", "x-", "{1..3}", "{08..11}", "{5..1..2}", "{a..d}", "{u,v}", "{u,{v,w}}", "{}", "{a}"]
)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is the truth here")
@settings(max_examples=40, deadline=None)
@given(parts=st.lists(PARTS, min_size=1, max_size=3))
def test_braces_name_what_bash_says(parts: list[str]):
    text = "".join(parts)
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {text}"], capture_output=True, text=True, check=True
    ).stdout.split("\n")[:-1]
    assert sorted(expand_braces(text)) == sorted(set(printed))


def test_a_range_keeps_its_zeros():
    assert expand_braces("s3://b/{000..002}.tar") == [f"s3://b/00{i}.tar" for i in range(3)]
    assert expand_braces("plain.tar") == ["plain.tar"]


@pytest.mark.parametrize("text", ["{0..9999999}", "{1..2000}{1..2000}"])
def test_a_pattern_of_too_many_names_is_refused(text: str):
    with pytest.raises(SettingsError, match="more than a million objects; give their folder"):
        expand_braces(text)


def write_files(folder: Path) -> None:
    for name in (
        "0.tar",
        "1.tar",
        "10.tar",
        "a/0.tar",
        "a/b/0.tar",
        "b/1.tar",
        "b/x.jpg",
        "[1].tar",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


@pytest.mark.parametrize(
    "pattern",
    [
        *("*.tar", "?.tar", "[0-9].tar", "[!0].tar", "*/*.tar", "**/*.tar", "a/**", "{a,b}/*.tar"),
        *("{0,1}.tar", "b/*", "a*/b/0.tar", "[[]1].tar", "**"),
    ],
)
def test_wildcards_find_what_glob_finds(tmp_path: Path, pattern: str):
    write_files(tmp_path)
    expected = {
        path
        for one in expand_braces(pattern)
        for path in glob.glob(f"{tmp_path}/{one}", recursive=True)  # noqa: PTH207
        if Path(path).is_file()
    }
    found = survey_pattern(f"{tmp_path}/{pattern}", STORAGE)
    assert found is not None
    assert {info.uri for info in found[1]} >= expected
    extra = {info.uri for info in found[1]} - expected
    assert all("*" in pattern and Path(path).parent != tmp_path for path in extra)


def test_names_are_those_under_the_folder_before_the_pattern(tmp_path: Path):
    write_files(tmp_path)
    assert survey_pattern(f"{tmp_path}/{{a,b}}/*.tar", STORAGE)[0] == str(tmp_path)
    assert survey_pattern(f"{tmp_path}/a/[0-9].tar", STORAGE)[0] == f"{tmp_path}/a"
    assert survey_pattern(f"{tmp_path}/0.tar", STORAGE) is None


def test_a_folder_that_matches_means_what_is_in_it(tmp_path: Path):
    write_files(tmp_path)
    _, objects, failed = survey_pattern(f"{tmp_path}/[ab]", STORAGE)
    names = {info.uri.removeprefix(f"{tmp_path}/") for info in objects}
    assert (names, failed) == ({"a/0.tar", "a/b/0.tar", "b/1.tar", "b/x.jpg"}, [])


def test_a_missing_alternative_is_named(tmp_path: Path):
    write_files(tmp_path)
    with pytest.raises(NoShardsError, match=r"there is no '.*/2\.tar', which .* correct the range"):
        survey_pattern(f"{tmp_path}/{{0..2}}.tar", STORAGE)


def test_a_wildcard_in_a_bucket_is_refused_and_a_query_is_none():
    with pytest.raises(SettingsError, match="wildcard in the bucket's name; name the bucket"):
        survey_pattern("s3://bucket-*/x.tar", STORAGE)
    assert survey_pattern("https://host/x.tar?sig=1", STORAGE) is None
