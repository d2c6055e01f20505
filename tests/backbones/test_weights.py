"""Weights from files: what fits, what is refused, and with which words."""

import argparse
import io
import pickle

import pytest
import torch

from pipeline.backbones import (
    create_backbone,
    encode_weights,
    load_weights,
    save_weights,
    weights_digest,
)
from pipeline.errors import UnknownBackboneError, WeightsError

NAME = "fbnetv3_b.ra2_in1k"


@pytest.fixture
def write(tmp_path):
    """Write a torch checkpoint and return its path."""

    def write_checkpoint(value, name="checkpoint.pth"):
        path = tmp_path / name
        torch.save(value, path)
        return str(path)

    return write_checkpoint


def assert_same(loaded, state_dict):
    assert loaded.state_dict.keys() == state_dict.keys()
    for key, tensor in state_dict.items():
        assert torch.equal(loaded.state_dict[key], tensor), key


def refusal(weights):
    with pytest.raises(WeightsError) as caught:
        load_weights(NAME, weights)
    return str(caught.value)


def test_every_backbone_comes_back_from_safetensors_with_the_same_bits(
    name, seeded_weights, tmp_path
):
    weights = seeded_weights(name)
    uri = str(tmp_path / "weights.safetensors")
    save_weights(weights.state_dict, uri)
    loaded = load_weights(name, uri)
    assert_same(loaded, weights.state_dict)
    assert (loaded.backbone, loaded.source, loaded.revision) == (name, uri, None)
    assert weights_digest(loaded.state_dict) == weights_digest(weights.state_dict)


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [
        (None, ""),
        (None, "_orig_mod."),
        ("state_dict_ema", "module."),
        ("model_ema", "module._orig_mod."),
        ("state_dict", ""),
        ("model", "_orig_mod.module."),
        ("state_dict", "model."),  # Lightning
        ("state_dict", "model._orig_mod."),
        ("state_dict", "module.backbone.net."),
    ],
)
def test_a_torch_checkpoint_is_unwrapped(wrapper, prefix, state_dict, write):
    value = {prefix + key: tensor for key, tensor in state_dict.items()}
    path = write({wrapper: value, "epoch": 3} if wrapper else value)
    assert_same(load_weights(NAME, path), state_dict)


def test_weights_beside_others_are_found_under_their_parents_name_and_the_remedy_loads_them(
    state_dict, write
):
    both = {"criterion.weight": torch.ones(3)}
    both |= {f"lit.model.{key}": tensor for key, tensor in state_dict.items()}
    reason = refusal(write({"state_dict": both}))
    assert "all its keys are there under 'lit.model.': save that part alone" in reason
    part = {key[10:]: tensor for key, tensor in both.items() if key.startswith("lit.model.")}
    assert_same(load_weights(NAME, write(part)), state_dict)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_as_timm_saves_it_is_read(state_dict, tmp_path, name):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if name.endswith("bin"):
        torch.save(dict(state_dict), folder / name)
    else:
        save_weights(state_dict, str(folder / name))
    assert_same(load_weights(NAME, folder), state_dict)


def test_a_folder_of_other_checkpoints_names_one_to_give(state_dict, tmp_path):
    torch.save(dict(state_dict), tmp_path / "epoch=3.ckpt")
    reason = refusal(str(tmp_path))
    assert "is a folder without model.safetensors or pytorch_model.bin" in reason
    assert reason.endswith(f"such as {tmp_path}/epoch=3.ckpt")
    assert_same(load_weights(NAME, reason.rpartition(" ")[2]), state_dict)


def test_a_checkpoint_with_objects_says_how_to_save_its_tensors(state_dict, write):
    path = write({"state_dict": dict(state_dict), "hyper_parameters": Settings()})
    assert "load it yourself with weights_only=False and save its state_dict" in refusal(path)
    remedied = torch.load(path, weights_only=False)["state_dict"]
    assert_same(load_weights(NAME, write(remedied)), state_dict)


class Settings:
    """Stands for what training programs keep in their checkpoints."""


def test_averaged_weights_go_before_plain_ones(state_dict, write):
    plain = {key: torch.zeros_like(tensor) for key, tensor in state_dict.items()}
    path = write({"state_dict": plain, "state_dict_ema": state_dict})
    assert_same(load_weights(NAME, path), state_dict)


def test_an_empty_wrapper_is_passed_over(state_dict, write):
    path = write({"state_dict_ema": None, "state_dict": state_dict})
    assert_same(load_weights(NAME, path), state_dict)


def test_a_training_checkpoint_with_its_settings_and_optimizer_is_read(state_dict, write):
    settings = argparse.Namespace(lr=0.1, model=NAME)
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}
    path = write({"state_dict": state_dict, "args": settings, "optimizer": optimizer})
    assert_same(load_weights(NAME, path), state_dict)


def test_an_old_style_torch_file_is_read(state_dict, tmp_path):
    path = tmp_path / "old.pth"
    torch.save(state_dict, path, _use_new_zipfile_serialization=False)
    assert_same(load_weights(NAME, path), state_dict)


def test_missing_batch_counters_are_no_fault(state_dict, write):
    without = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    loaded = load_weights(NAME, write(without))
    assert loaded.state_dict.keys() == state_dict.keys()
    assert weights_digest(loaded.state_dict) == weights_digest(state_dict)


def test_half_precision_checkpoints_become_float32(state_dict, write):
    halved = {k: v.half() if v.is_floating_point() else v for k, v in state_dict.items()}
    loaded = load_weights(NAME, write(halved))
    assert_same(loaded, {k: v.to(state_dict[k].dtype) for k, v in halved.items()})


def test_a_file_url_is_read(state_dict, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(encode_weights(state_dict))
    assert_same(load_weights(NAME, f"file://{path}"), state_dict)


def test_weights_are_read_from_an_object_store(state_dict, s3_server):
    storage = s3_server.storage()
    uri = f"{s3_server.make_bucket()}/weights.safetensors"
    save_weights(state_dict, uri, storage=storage)
    assert_same(load_weights(NAME, uri, storage=storage), state_dict)


def test_missing_unexpected_and_misshaped_keys_are_named(state_dict, write):
    del state_dict["conv_stem.weight"]
    state_dict["head.extra"] = torch.zeros(1)
    state_dict["conv_head.weight"] = torch.zeros(3, 4)
    path = write(state_dict)
    message = refusal(path)
    assert message.startswith(f"the weights in {path!r} do not fit {NAME}; ")
    assert "missing: conv_stem.weight; " in message
    assert "unexpected: head.extra; " in message
    assert message.endswith("mis-shaped: conv_head.weight (3, 4) instead of (1984, 1344, 1, 1)")


def test_a_long_list_of_keys_is_cut_short(seeded_weights, write):
    other = dict(seeded_weights("ese_vovnet19b_dw.ra_in1k").state_dict)
    message = refusal(write(other))
    assert "missing: conv_stem.weight, bn1.weight, " in message
    assert " more; unexpected: stem.0.conv.weight, " in message


def test_integers_in_place_of_floats_are_refused(state_dict, write):
    state_dict["conv_stem.weight"] = state_dict["conv_stem.weight"].to(torch.int8)
    assert "not floating point: conv_stem.weight" in refusal(write(state_dict))


def test_a_classifier_of_half_its_entries_is_refused(state_dict, write):
    del state_dict["classifier.weight"]
    assert "unexpected: classifier.bias" in refusal(write(state_dict))


def test_a_path_with_nothing_there_is_refused_with_the_three_ways_to_give_weights(tmp_path):
    path = str(tmp_path / "nothing.pth")
    message = refusal(path)
    assert f"no weights at {path!r}; give weights as a path or URI of a .safetensors" in message
    assert "random:<seed> for untrained ones" in message


@pytest.mark.parametrize(
    "data", [b"", b"not a checkpoint at all", b"\x10\0\0\0\0\0\0\0{garbage", b"PK\x03\x04 cut"]
)
def test_a_file_of_another_kind_is_refused(data, tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(data)
    assert f"cannot read the weights in {str(path)!r}: " in refusal(path)


def test_a_cut_safetensors_file_is_refused(state_dict, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(encode_weights(state_dict)[:-1000])
    assert f"cannot read the weights in {str(path)!r}: " in refusal(path)


def test_a_cut_torch_file_is_refused(state_dict, tmp_path):
    path = tmp_path / "cut.pth"
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    path.write_bytes(buffer.getvalue()[: buffer.tell() // 2])
    assert f"cannot read the weights in {str(path)!r}: " in refusal(path)


class Dangerous:
    def __reduce__(self):
        return (print, ("code in a checkpoint was run",))


def test_code_in_a_checkpoint_is_never_run(tmp_path, capsys, write, state_dict):
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps({"model": Dangerous()}, protocol=2))
    assert "other objects than tensors" in refusal(path)
    assert "other objects than tensors" in refusal(write(state_dict | {"extra": Dangerous()}))
    assert capsys.readouterr().out == ""


def test_a_checkpoint_without_a_mapping_of_tensors_is_refused(write):
    assert "it holds no mapping of names to tensors" in refusal(write([torch.zeros(1)]))
    assert "epoch are not tensors" in refusal(write({"epoch": 3}))


@pytest.mark.parametrize("weights", ["random:", "random:one", "random:-1", f"random:{2**63}"])
def test_a_seed_that_is_no_number_is_refused(weights):
    expected = f"weights are {weights!r}; write random:<seed> with a whole number >= 0"
    assert refusal(weights) == expected


def test_weights_of_an_unknown_backbone_are_not_looked_for():
    with pytest.raises(UnknownBackboneError, match="unknown backbone 'resnet'"):
        load_weights("resnet", "pretrained")


def test_a_fresh_classifier_leaves_the_rest_of_the_weights(state_dict, write):
    path = write(state_dict)
    backbone = create_backbone(NAME, weights=path, num_classes=7)
    assert backbone.classifier.weight.shape == (7, 1984)
    assert 0 < backbone.classifier.weight.abs().max() < 1
    body = {k: v for k, v in backbone.state_dict().items() if not k.startswith("classifier.")}
    assert all(torch.equal(tensor, state_dict[key]) for key, tensor in body.items())


def test_a_classifier_of_the_asked_width_is_the_checkpoints(state_dict, write):
    tuned = state_dict | {
        "classifier.weight": torch.full((7, 1984), 0.5),
        "classifier.bias": torch.full((7,), 0.25),
    }
    backbone = create_backbone(NAME, weights=write(tuned), num_classes=7)
    assert torch.all(backbone.classifier.weight == 0.5)
    with pytest.raises(WeightsError, match=r"classifier.weight \(7, 1984\) instead of \(1000, "):
        create_backbone(NAME, weights=write(tuned))


def test_a_checkpoint_without_classifier_gives_embeddings_but_no_logits(state_dict, write):
    body = {k: v for k, v in state_dict.items() if not k.startswith("classifier.")}
    path = write(body)
    assert_same(load_weights(NAME, path), body)
    create_backbone(NAME, weights=path, num_classes=0)
    with pytest.raises(WeightsError, match=r"missing: classifier.weight, classifier.bias"):
        create_backbone(NAME, weights=path)


def test_feature_maps_need_the_full_checkpoint(state_dict, write):
    create_backbone(NAME, weights=write(state_dict), features_only=True)
    del state_dict["blocks.0.0.conv_dw.weight"]
    with pytest.raises(WeightsError, match=r"missing: blocks.0.0.conv_dw.weight"):
        create_backbone(NAME, weights=write(state_dict), features_only=True)


def test_the_digest_depends_on_keys_values_and_types_but_not_on_layout(state_dict):
    digest = weights_digest(state_dict)
    assert len(digest) == 64
    assert digest == weights_digest(dict(reversed(state_dict.items())))
    strided = {
        key: tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for key, tensor in state_dict.items()
    }
    assert digest == weights_digest(strided)
    key = "conv_stem.weight"
    nudged = state_dict[key].clone()
    nudged[0, 0, 0, 0] += 1e-3
    for change in ({key: nudged}, {key: state_dict[key].half()}, {"other": nudged}):
        assert digest != weights_digest(state_dict | change)
    assert digest != weights_digest(state_dict | {key: state_dict[key].flatten()})


def test_weights_loaded_for_one_backbone_do_not_fit_another(seeded_weights):
    loaded = seeded_weights("ese_vovnet19b_dw.ra_in1k")
    with pytest.raises(WeightsError, match=r"in 'random:7' do not fit fbnetv3_b.ra2_in1k; missing"):
        create_backbone(NAME, weights=loaded, num_classes=0)
