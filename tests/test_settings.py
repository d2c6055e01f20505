"""Every field of every settings class: one reading of a value, whichever way it comes in."""

import json
import string
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as configure
from hypothesis import strategies as st

from pipeline import config
from pipeline.cli import parse_settings
from pipeline.errors import SettingsError
from pipeline.settings import FailureLimit, Size, list_kinds, split_kind

NEEDED: dict[type, dict[str, Any]] = {
    config.StorageOptions: {},
    config.EmbedConfig: {"input": ["in"], "output": "out", "model": "m"},
    config.ServeConfig: {"index": "i"},
    config.IndexConfig: {"index": "i"},
    config.SearchConfig: {"index": "i", "key": "k"},
    config.NightlyOptions: {},
    config.BenchmarkConfig: {},
}
FIELDS = [(cls, item.name) for cls in NEEDED for item in fields(cls)]
WRITES_NUMBERS = {"image_size", "max_failures"}  # text, but a number is a way to write it

words = st.text(string.ascii_letters + "_ ", min_size=1).filter(
    lambda text: text.strip().lower() not in {"none", "nan", "inf", "infinity"}
)
tables = st.dictionaries(words, st.integers(), max_size=2)
PYTHON_ONLY = st.one_of(st.binary(), st.builds(object), st.sets(st.integers(), min_size=1))


def draw_wrong(kind: Any, name: str) -> st.SearchStrategy[Any]:
    """Values that a TOML file can hold and that cannot mean ``kind``."""
    lists = st.lists(words, min_size=1, max_size=3)
    if get_origin(kind) is Literal:
        return st.one_of(words.filter(lambda w: w not in get_args(kind)), st.integers(), tables)
    if kind is bool:
        truths = {"true", "false", "yes", "no", "on", "off", "t", "f", "y", "n"}
        texts = words.filter(lambda w: w.strip().lower() not in truths)
        return st.one_of(texts, st.integers(2), st.floats(0.1, 0.9), lists, tables)
    if kind in (int, float):
        halves = st.just(1.5) if kind is int else st.just(float("nan"))
        return st.one_of(words, st.booleans(), halves, lists, tables)
    if kind in (Size, FailureLimit):
        return st.one_of(st.just("-1"), st.just("1 apple"), st.booleans(), lists, tables)
    if is_dataclass(kind):
        return st.one_of(words, st.integers(), lists)
    numbers = st.just(-1.5) if name in WRITES_NUMBERS else st.floats(-9, 9)
    return st.one_of(numbers, st.booleans(), tables)


@cache
def draw_for(cls: type, name: str) -> st.SearchStrategy[Any]:
    kind, is_list, _ = split_kind(list_kinds(cls)[name])
    wrong = draw_wrong(kind, name)
    if not is_list:
        return wrong
    texts = st.lists(st.one_of(st.booleans(), tables), min_size=1, max_size=2)
    return texts if kind is str else wrong.filter(lambda value: not isinstance(value, list))


def refuse(make: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        make()
    return str(caught.value)


def write_toml(values: dict[str, Any]) -> str:
    def show(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {show(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(show, value)) + "]"
        return "nan" if value != value else json.dumps(value)

    return "".join(f"{key} = {show(value)}\n" for key, value in values.items())


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=[f"{c.__name__}.{n}" for c, n in FIELDS])
@configure(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_wrong_value_is_refused_in_the_same_words_everywhere(
    cls: type, name: str, data: st.DataObject, tmp_path: Path
) -> None:
    """From Python, by ``replace``, in a TOML file, and, where it is text, as a flag."""
    value = data.draw(draw_for(cls, name))
    needed, path = NEEDED[cls], tmp_path / "job.toml"
    words = refuse(lambda: cls(**needed | {name: value}))
    assert words.startswith(f"{name} is ")
    assert "; " in words
    assert refuse(lambda: replace(cls(**needed), **{name: value})) == words
    path.write_text(write_toml(needed | {name: value}), encoding="utf-8")
    told = refuse(lambda: parse_settings(cls, ["--config", str(path)]))
    if name != "storage":  # a table, which a file calls so
        assert told == words
    if isinstance(value, str) and name != "storage":
        flags = [f"--{key.replace('_', '-')}={v}" for key, (v,) in _list_texts(needed, name)]
        assert refuse(lambda: parse_settings(cls, [*flags, f"--{name}={value}"])) == words


def _list_texts(needed: dict[str, Any], but: str) -> list[tuple[str, tuple[str]]]:
    texts = {key: v[0] if isinstance(v, list) else v for key, v in needed.items() if key != but}
    return [(key, (text,)) for key, text in texts.items()]


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=[f"{c.__name__}.{n}" for c, n in FIELDS])
@configure(max_examples=5, deadline=None)
@given(value=PYTHON_ONLY)
def test_what_only_python_can_give_is_refused(cls: type, name: str, value: object) -> None:
    assert refuse(lambda: cls(**NEEDED[cls] | {name: value})).startswith(f"{name} is ")


@pytest.mark.parametrize("cls", NEEDED, ids=lambda cls: cls.__name__)
def test_every_default_is_a_value_that_is_accepted(cls: type) -> None:
    made = cls(**NEEDED[cls])
    assert replace(made, **{item.name: getattr(made, item.name) for item in fields(cls)}) == made


def make(**changes: object) -> config.EmbedConfig:
    return config.EmbedConfig(**{"input": ("in",), "output": "out", "model": "m"} | changes)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"input": "s3://b/in"}, {"input": ("s3://b/in",)}),
        ({"input": Path("/in")}, {"input": ("/in",)}),
        ({"input": [Path("/in"), "there"]}, {"input": ("/in", "there")}),
        ({"output": Path("/out"), "weights": Path("w")}, {"output": "/out", "weights": "w"}),
        ({"carry": "cls"}, {"carry": ("cls",)}),
        ({"retry_failed": "no", "prune": "false"}, {"retry_failed": False, "prune": False}),
        ({"image_size": 224, "max_failures": 10}, {"image_size": "224", "max_failures": "10"}),
        ({"max_failures": 0.01}, {"max_failures": "0.01"}),
        ({"chunk_bytes": 1000}, {"chunk_bytes": "1000"}),
        ({"batch_size": np.int64(4)}, {"batch_size": 4}),
        ({"max_removed": np.float32(0.5)}, {"max_removed": 0.5}),
        ({"batch_size": "4", "max_removed": "0.5"}, {"batch_size": 4, "max_removed": 0.5}),
        ({"storage": {"anonymous": True}}, {"storage": config.StorageOptions(anonymous=True)}),
    ],
)
def test_a_value_that_is_clear_is_taken_for_what_it_means(
    given: dict[str, object], meant: dict[str, object]
) -> None:
    made = make(**given)
    assert made == make(**meant)
    for name, value in meant.items():
        assert getattr(made, name) == value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exif": "Apply"}, "exif is 'Apply'; use apply or ignore; did you mean apply?"),
        ({"decode": "Fast"}, "decode is 'Fast'; use exact, fast or gpu; did you mean fast?"),
        (
            {"embedding_dtype": "float"},
            "embedding_dtype is 'float'; use float32 or float16; did you mean float32?",
        ),
        ({"modle": "x"}, "there is no setting modle; did you mean model?"),
        ({"storage": {"profil": "x"}}, "there is no setting profil; did you mean profile?"),
        ({"storage": {"anonymous": "maybe"}}, "anonymous is 'maybe'; write true or false"),
        ({"storage": 5}, "storage is 5; give a table of its settings"),
        ({"batch_size": True}, "batch_size is True; write a whole number"),
        ({"max_removed": float("nan")}, "max_removed is nan; write a number"),
    ],
)
def test_a_refusal_names_field_value_what_is_allowed_and_the_nearest_word(
    changes: dict[str, object], words: str
) -> None:
    assert refuse(lambda: make(**changes)) == words


def test_what_is_lacking_or_too_much_is_said() -> None:
    assert refuse(lambda: config.EmbedConfig(input="in", output="out")) == (
        "model is not given, and it has no default"
    )
    assert "storage_attempts" in repr(config.StorageOptions())
    assert refuse(lambda: config.StorageOptions(None, None, False, False, 1, 1.0, 7)) == (
        "StorageOptions has 6 settings, and is given more; name them"
    )


def test_a_night_reads_the_tables_of_its_jobs() -> None:
    night = config.NightlyConfig(
        embed={"input": "in", "output": "out", "model": "m"}, index={"index": Path("i")}, nightly={}
    )
    assert night.embed == make()
    assert night.index.index == "i"
    assert refuse(lambda: replace(night, index={"index": "i", "knn": "few"})) == (
        "knn is 'few'; write a whole number"
    )
