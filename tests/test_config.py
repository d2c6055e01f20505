"""Settings: what is refused, and with which words."""

import pytest

from pipeline.config import EmbedConfig, StorageOptions
from pipeline.errors import SettingsError
from pipeline.settings import Size


def make(**changes: object) -> EmbedConfig:
    return EmbedConfig(**{"input": ("in",), "output": "out", "model": "m"} | changes)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1000", 1000),
        ("64MiB", 64 * 2**20),
        ("8GB", 8 * 10**9),
        ("1.5 kib", 1536),
        ("0", 0),
        ("2tb", 2 * 10**12),
    ],
)
def test_sizes_are_read_with_their_units(text: str, size_bytes: int):
    size = Size(text)
    assert (size.nbytes, size) == (size_bytes, text)


@pytest.mark.parametrize("text", ["", "x", "64 apples", "-1", "1e9", "MiB"])
def test_what_is_no_size_is_refused_with_an_example(text: str):
    with pytest.raises(SettingsError, match=r"chunk_bytes is .*; write a size such as 64MiB"):
        make(chunk_bytes=text)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("0", (0, None)),
        ("100", (100, None)),
        ("1%", (None, 0.01)),
        ("2.5%", (None, 0.025)),
        ("0.5", (None, 0.5)),
        ("1.0", (None, 1.0)),
    ],
)
def test_failure_limits_are_counts_or_shares(text: str, limit: tuple[object, object]):
    parsed = make(max_failures=text).max_failures
    assert (parsed.images, parsed.share, parsed) == (*limit, text)


@pytest.mark.parametrize("text", ["", "-1", "many", "101%", "1.5", "nan", "1 %"])
def test_what_is_no_limit_is_refused(text: str):
    with pytest.raises(SettingsError, match=r"max_failures is .*; use a count such as 100 or a sh"):
        make(max_failures=text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input": ()}, "no input given; pass --input"),
        ({"image_size": "big"}, "image_size is 'big'; use train, test, or a number of pixels"),
        ({"image_size": "0"}, "image_size is '0'; use train, test, or a number of pixels"),
        ({"chunk_images": 0}, "chunk_images is 0; it must be at least 1"),
        ({"max_pixels": 0}, "max_pixels is 0; it must be at least 1"),
        ({"batch_size": -1}, "batch_size is -1; it must be at least 1"),
        ({"actors": 0}, "actors is 0; it must be at least 1"),
        ({"top_k_classes": 1001}, "top_k_classes is 1001; use 0 to 1000"),
        ({"chunk_bytes": "big"}, "chunk_bytes is 'big'; write a size"),
        ({"max_image_bytes": "big"}, "max_image_bytes is 'big'; write a size"),
        ({"chunk_bytes": "0"}, "chunk_bytes is '0'; it must be at least 1"),
        ({"max_image_bytes": "0"}, "max_image_bytes is '0'; it must be at least 1"),
        ({"image_timeout_s": 0.0}, "image_timeout_s is 0.0; it must be positive"),
        ({"cpus_per_actor": 0.0}, "cpus_per_actor is 0.0; it must be positive"),
        ({"gpus_per_actor": -1.0}, "gpus_per_actor is -1.0; it must not be negative"),
        ({"carry": ("txt", "json", "txt")}, "carry names txt more than once"),
        ({"carry": ("key",)}, "carry names key, which every output has a column of its own for"),
    ],
)
def test_wrong_settings_are_refused_by_name_and_value(changes: dict[str, object], words: str):
    with pytest.raises(SettingsError) as caught:
        make(**changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"storage_attempts": 0}, "storage_attempts is 0; it must be at least 1"),
        ({"storage_timeout_s": 0.0}, "storage_timeout_s is 0.0; it must be positive"),
    ],
)
def test_wrong_storage_options_are_refused_too(changes: dict[str, float], words: str):
    with pytest.raises(SettingsError, match=words):
        StorageOptions(**changes)
