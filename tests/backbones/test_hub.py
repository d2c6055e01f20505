"""Pretrained weights, over real HTTP from a hub in this process."""

import http.server
import io
import threading

import huggingface_hub.constants
import pytest
import torch

from pipeline.backbones import create_backbone, encode_weights, load_weights, weights_digest
from pipeline.errors import WeightsError

NAME = "fbnetv3_b.ra2_in1k"
REVISION = "a" * 40


class Hub(http.server.ThreadingHTTPServer):
    """As much of the hub as a download needs: files of one revision, over real HTTP."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files


class HubHandler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, *, with_body):
        data = self.server.files.get(self.path)
        self.send_response(200 if data is not None else 404)
        if data is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("ETag", f'"{hash(data):x}"')
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        if with_body and data is not None:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def point_client_at(tmp_path, monkeypatch):
    """Make the hub's client ask another address, with an empty cache."""

    def point(port):
        template = f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    return point


@pytest.fixture
def hub(point_client_at):
    """A hub in this process; what is put in ``files`` by path can be downloaded."""
    server = Hub({})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    point_client_at(server.server_port)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("filename", ["model.safetensors", "pytorch_model.bin"])
def test_pretrained_weights_come_from_the_hub_and_then_from_its_cache(hub, filename, state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    data = encode_weights(state_dict) if filename.endswith("safetensors") else buffer.getvalue()
    hub.files[f"/timm/{NAME}/resolve/main/{filename}"] = data
    loaded = load_weights(NAME, "pretrained")
    assert weights_digest(loaded.state_dict) == weights_digest(state_dict)
    assert loaded.revision == REVISION
    assert loaded.source == f"hf://timm/{NAME}/{filename}"
    hub.shutdown()
    hub.server_close()
    assert load_weights(NAME, "pretrained").revision == REVISION


def test_without_the_hub_the_error_says_how_to_give_weights(point_client_at):
    with Hub({}) as closed:
        point_client_at(closed.server_port)
    with pytest.raises(WeightsError) as caught:
        create_backbone(NAME)
    assert (
        f"cannot fetch the pretrained weights of {NAME} from the hub repository timm/{NAME}: "
    ) in str(caught.value)
    assert str(caught.value).endswith(
        "; give weights as a path or URI of a .safetensors file or torch checkpoint, "
        "or as random:<seed> for untrained ones"
    )


def test_a_hub_checkpoint_that_does_not_fit_is_refused(hub, state_dict):
    del state_dict["bn1.bias"]
    hub.files[f"/timm/{NAME}/resolve/main/model.safetensors"] = encode_weights(state_dict)
    with pytest.raises(WeightsError, match=r"'hf://timm/.*/model.safetensors' do not fit"):
        load_weights(NAME, "pretrained")
