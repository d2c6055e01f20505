"""Command lines and TOML files: one definition of the settings, clear refusals, exit codes."""

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from pipeline.cli import parse_settings, run_job
from pipeline.config import (
    EmbedConfig,
    IndexConfig,
    NightlyConfig,
    NightlyOptions,
    StorageOptions,
)
from pipeline.errors import LeaseError, NoShardsError, SettingsError, TooManyFailuresError

BASE = ["--input", "a", "b c", "--output", "out", "--model", "resnetv2_50.a1h_in1k"]


def parse(*arguments: str) -> EmbedConfig:
    return parse_settings(EmbedConfig, [*BASE, *arguments])


def write_toml(folder: Path, text: str) -> str:
    path = folder / "job.toml"
    path.write_text(text)
    return str(path)


def test_flags_become_settings_of_their_types():
    config = parse(
        "--chunk-images=7", "--carry", "json", "txt", "--image-timeout-s", "2.5", "--prune"
    )
    assert config.input == ("a", "b c")
    assert (config.chunk_images, config.carry, config.image_timeout_s) == (7, ("json", "txt"), 2.5)
    assert config.prune is True
    assert config.storage == StorageOptions()


def test_underscores_do_as_well_as_hyphens():
    assert parse("--chunk_images=7", "--retry_failed") == parse(
        "--chunk-images=7", "--retry-failed"
    )


def test_storage_options_are_plain_flags():
    config = parse("--endpoint-url", "http://localhost:1", "--storage-attempts", "2")
    assert config.storage == StorageOptions(endpoint_url="http://localhost:1", storage_attempts=2)


def test_a_toml_file_sets_what_flags_do_not(tmp_path: Path):
    path = write_toml(
        tmp_path,
        'input = ["x", "y"]\noutput = "there"\nmodel = "m"\nchunk-images = 9\nprune = true\n'
        'carry = []\nimage_timeout_s = 1.5\n[storage]\nendpoint_url = "http://e"\n',
    )
    config = parse_settings(EmbedConfig, ["--config", path, "--output", "here", "--no-prune"])
    assert (config.input, config.output) == (("x", "y"), "here")
    assert (config.chunk_images, config.prune, config.image_timeout_s) == (9, False, 1.5)
    assert config.storage.endpoint_url == "http://e"
    assert parse_settings(EmbedConfig, [f"--config={path}"]).prune is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--modle", "x"], "unknown flag --modle; did you mean --model?"),
        (["--retry-faild"], "unknown flag --retry-faild; did you mean --retry-failed?"),
        (["--zzzz"], "unknown flag --zzzz; --help lists them all"),
        (["--config"], "argument --config: expected one argument; --help"),
        (["--config", "/nope.toml"], "cannot read --config /nope.toml: No such file"),
    ],
)
def test_unknown_flags_name_the_nearest(arguments: list[str], words: str):
    with pytest.raises(SettingsError) as caught:
        parse(*arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("chunk_imagse = 1", "unknown key 'chunk_imagse' in "),
        ("chunk_imagse = 1", "did you mean chunk_images?"),
        ('[storage]\nendpoint = "x"', "unknown key 'endpoint' in [storage] of "),
        ('storage = "x"', "'storage' in"),
        ("prune = [", "is not TOML: "),
    ],
)
def test_unknown_keys_of_a_toml_file_name_the_nearest(tmp_path: Path, text: str, words: str):
    with pytest.raises(SettingsError) as caught:
        parse("--config", write_toml(tmp_path, text))
    assert words in str(caught.value)


def test_a_value_of_the_wrong_type_is_bad_usage(capsys):
    assert run(lambda _: Done(0), "--chunk-images", "many") == 2
    assert capsys.readouterr().err == "error: chunk_images is 'many'; write a whole number\n"


@pytest.mark.parametrize("arguments", [["stray"], ["--model"], ["--prune", "a", "b"]])
def test_what_is_no_command_line_is_bad_usage(arguments: list[str]):
    with pytest.raises(SettingsError, match="--help lists all flags"):
        parse(*arguments)


def test_a_flag_given_twice_adds_to_a_list_and_elsewhere_the_last_counts_with_a_word(capsys):
    config = parse("--input", "d", "--carry", "txt", "--carry=json", "--exif=ignore")
    assert (config.input, config.carry) == (("a", "b c", "d"), ("txt", "json"))
    assert parse("--model", config.model) == parse()
    assert capsys.readouterr().err == ""
    assert parse("--exif", "apply", "--exif", "ignore").exif == "ignore"
    assert capsys.readouterr().err == "note: --exif is given twice; 'ignore' counts, not 'apply'\n"
    assert parse("--prune", "--no-prune").prune is False
    assert capsys.readouterr().err == "note: --prune is given twice; False counts, not True\n"


@pytest.mark.parametrize(
    ("settings_class", "words"),
    [
        (EmbedConfig, "not given: --input, --output, --model; pass them as flags, or write them"),
        (IndexConfig, "not given: --index; pass"),
        (NightlyConfig, "not given: --input, --output, --model, --index; pass"),
    ],
)
def test_what_is_lacking_is_named_with_its_flags_which_suffice(
    settings_class: type, words: str, tmp_path: Path
):
    with pytest.raises(SettingsError, match=words) as caught:
        parse_settings(settings_class, [], prog="x")
    flags = re.findall(r"--([a-z-]+)", str(caught.value).partition(";")[0])
    given = [text for flag in flags for text in (f"--{flag}", "somewhere")]
    settings = parse_settings(settings_class, given, prog="x")
    with pytest.raises(SettingsError, match=f"not given: --{flags[-1]};"):
        parse_settings(settings_class, given[:-2], prog="x")
    if settings_class is not NightlyConfig:
        file = tmp_path / "settings.toml"
        file.write_text("".join(f'{flag} = "somewhere"\n' for flag in flags))
        assert parse_settings(settings_class, ["--config", str(file)], prog="x") == settings


def test_none_unsets_what_a_file_sets(tmp_path: Path):
    path = write_toml(tmp_path, 'max_failures = "1%"\nbatch_size = 8\n')
    config = parse("--config", path, "--max-failures", "None")
    assert (config.max_failures, config.batch_size) == (None, 8)


def test_truth_values_are_read_as_words_too():
    assert parse("--prune", "no", "--verify=yes") == parse("--verify", "--no-prune")


def test_help_shows_every_flag_and_exits_with_zero(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_settings(EmbedConfig, ["--help"], prog="embed")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for item in fields(EmbedConfig):
        if item.name != "storage":
            assert f"--{item.name.replace('_', '-')}" in text
    assert "--endpoint-url" in text


def test_help_of_a_night_shows_the_flags_of_all_its_jobs_once(capsys):
    with pytest.raises(SystemExit):
        parse_settings(NightlyConfig, ["--help"], prog="nightly")
    text = capsys.readouterr().out
    for section in (EmbedConfig, IndexConfig, NightlyOptions, StorageOptions):
        for item in fields(section):
            if item.name != "storage":
                flag = item.name.replace("_", "-")
                assert len(re.findall(rf"(?m)^  --{flag}(?: |$)", text)) == 1, flag


@dataclass(frozen=True)
class Done:
    rows: int

    def to_dict(self) -> dict[str, int]:
        return {"rows": self.rows}


def run(action, *arguments: str) -> int:
    return run_job("embed", EmbedConfig, action, [*BASE, *arguments])


def test_the_last_line_of_standard_output_is_the_report(capsys):
    assert run(lambda _: Done(3)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"rows": 3}


def raise_with_report(error: Exception, report: Done | None = None):
    def action(_: EmbedConfig) -> Done:
        error.report = report
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LeaseError("held"), 1),
        (SettingsError("wrong"), 2),
        (NoShardsError("none"), 2),
        (TooManyFailuresError("too many"), 3),
    ],
)
def test_exit_codes_tell_the_kinds_of_failure_apart(error: Exception, code: int, capsys):
    assert run(raise_with_report(error)) == code
    captured = capsys.readouterr()
    assert captured.err == f"error: {error}\n"
    assert captured.out == ""


def test_a_failed_run_still_prints_the_report_it_has(capsys):
    assert run(raise_with_report(TooManyFailuresError("too many"), Done(7))) == 3
    assert json.loads(capsys.readouterr().out) == {"rows": 7}


def test_an_interrupted_run_says_how_to_go_on(capsys):
    assert run(raise_with_report(KeyboardInterrupt())) == 130
    assert "the same command goes on from the committed shards" in capsys.readouterr().err


def test_bad_usage_of_a_job_exits_with_two(capsys):
    assert run(lambda _: Done(0), "--modle", "x") == 2
    assert "did you mean --model?" in capsys.readouterr().err
