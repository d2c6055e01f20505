import json

import numpy as np
import pytest

from jobs.search import main
from pipeline.config import SearchConfig
from pipeline.errors import SettingsError
from pipeline.service.access import read_api_keys
from service.gallery import make_image, make_vectors
from service.services import run_service

KEY = "photos/000.tar/00003.jpg"


def run_json(capsys, *flags):
    assert main([*flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_search_by_url_prints_what_a_search_by_index_does(service, gallery, capsys):
    flags = ("--key", KEY, "-k", "5", "--where", "price > 10")
    by_index = run_json(capsys, "--index", gallery.index, *flags)
    by_url = run_json(capsys, "--url", service.url, *flags)
    shown = [(n["key"], n["score"], n["colour"]) for n in by_url["neighbours"]]
    assert shown == [(n["key"], n["score"], n["colour"]) for n in by_index["neighbours"]]
    assert by_url["generation"] == by_index["generation"]
    assert main(["--url", service.url, *flags]) == 0
    assert f"neighbours of {KEY}" in capsys.readouterr().out


def test_pictures_and_files_of_vectors_are_sent_to_the_service(service, capsys, tmp_path):
    (tmp_path / "query.jpg").write_bytes(make_image(3))
    found = run_json(capsys, "--url", service.url, "--image", str(tmp_path / "query.jpg"))
    assert len(found["neighbours"]) == 10
    np.save(tmp_path / "v.npy", make_vectors(range(70)))
    results = run_json(capsys, "--url", service.url, "--vector", str(tmp_path / "v.npy"))["results"]
    assert len(results) == 70
    assert results[3]["neighbours"][0]["key"] == KEY


def test_a_vector_that_cannot_be_searched_with_is_named(service, capsys, tmp_path):
    vectors = make_vectors(range(70))
    vectors[67] = np.nan
    np.save(tmp_path / "v.npy", vectors)
    assert main(["--url", service.url, "--vector", str(tmp_path / "v.npy")]) == 2
    message = capsys.readouterr().err
    assert "not finite" in message
    assert f"(searches.3.query.vector_base64); searches.0 is {tmp_path}/v.npy[64]" in message


def test_the_service_s_key_comes_from_a_file(gallery, capsys, tmp_path):
    path = tmp_path / "keys"
    path.write_text("a-key-of-twenty-four-chars\n")
    with run_service(gallery.open(), keys=read_api_keys(str(path))) as service:
        flags = ["--url", service.url, "--key", KEY]
        assert main(flags) == 1
        assert "Authorization: Bearer" in capsys.readouterr().err
        assert main([*flags, "--api-key-file", str(path)]) == 0
    path.write_text("\n")
    assert main([*flags, "--api-key-file", str(path)]) == 2
    assert "is empty" in capsys.readouterr().err
    assert main([*flags, "--api-key-file", str(tmp_path / "no")]) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "either --index, or --url"),
        ({"index": "x", "url": "http://localhost"}, "either --index, or --url"),
        ({"url": "http://localhost", "html": "x.html"}, "--html needs --index"),
        ({"url": "http://localhost", "generation": "1"}, "--generation needs --index"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(SettingsError, match=words):
        SearchConfig(key="k", **settings)
