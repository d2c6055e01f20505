"""The cluster launcher's file and the policies fit the jobs' settings and one another."""

import fnmatch
import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from infra.manifests import INFRA, kubernetes, split_command
from pipeline.cli import parse_settings
from pipeline.config import EmbedConfig, NightlyConfig, ServeConfig

AWS = INFRA / "aws"
CLUSTER = yaml.safe_load((AWS / "cluster.yaml").read_text())
BUCKET = "arn:aws:s3:::"


def read_policy(name: str) -> list[dict[str, Any]]:
    statements = json.loads((AWS / name).read_text())["Statement"]
    return [{k: [v] if isinstance(v, str) else v for k, v in s.items()} for s in statements]


def allows(policy: list[dict[str, Any]], action: str, uri: str) -> bool:
    """Whether the policy allows an S3 action on an object, or the listing of a prefix."""
    bucket, _, path = uri.removeprefix("s3://").partition("/")
    for statement in policy:
        if action not in statement["Action"]:
            continue
        if action == "s3:ListBucket":
            prefixes = statement["Condition"]["StringLike"]["s3:prefix"]
            if BUCKET + bucket in statement["Resource"] and any(
                fnmatch.fnmatchcase(path, prefix) for prefix in prefixes
            ):
                return True
        elif any(fnmatch.fnmatchcase(f"{BUCKET}{bucket}/{path}", r) for r in statement["Resource"]):
            return True
    return False


def nightly() -> NightlyConfig:
    return parse_settings(NightlyConfig, ["--config", str(INFRA / "nightly.toml")])


def run_once() -> EmbedConfig:
    _, flags = split_command(kubernetes()["RayJob/generated"]["spec"]["entrypoint"])
    return parse_settings(EmbedConfig, flags)


def lookups() -> ServeConfig:
    text = kubernetes()["RayService/image-lookups"]["spec"]["serveConfigV2"]
    (application,) = yaml.safe_load(text)["applications"]
    return parse_settings(ServeConfig, shlex.split(application["args"]["flags"]))


def test_the_launchers_file_fits_its_schema() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(CLUSTER, schema)
    validate_config(prepare_config(CLUSTER))


def test_workers_are_spot_and_the_head_is_not() -> None:
    types = CLUSTER["available_node_types"]
    head = types[CLUSTER["head_node_type"]]
    (worker,) = (node for name, node in types.items() if name != CLUSTER["head_node_type"])
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert worker["min_workers"] == 0
    assert head["resources"] == {"CPU": 0}


def test_instances_cannot_be_asked_for_credentials_without_a_session() -> None:
    for node in CLUSTER["available_node_types"].values():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


@pytest.mark.parametrize("config", [nightly().embed, run_once()], ids=["nightly", "run once"])
def test_the_jobs_policy_allows_what_an_embed_job_does(config: EmbedConfig) -> None:
    policy = read_policy("iam-policy.json")
    for uri in config.input:
        assert allows(policy, "s3:ListBucket", f"{uri}/")
        assert allows(policy, "s3:GetObject", f"{uri}/00000.tar")
        assert not allows(policy, "s3:PutObject", f"{uri}/00000.tar")
        assert not allows(policy, "s3:DeleteObject", f"{uri}/00000.tar")
    assert allows(policy, "s3:GetObject", config.weights)
    assert not allows(policy, "s3:PutObject", config.weights)
    for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"):
        assert allows(policy, action, f"{config.output}/commits/0.json")
    assert allows(policy, "s3:ListBucket", f"{config.output}/commits/")


def test_the_jobs_policy_allows_what_an_index_job_does() -> None:
    policy = read_policy("iam-policy.json")
    index = nightly().index.index
    for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
        assert allows(policy, action, f"{index}/CURRENT")
    assert allows(policy, "s3:ListBucket", f"{index}/generations/")


def test_the_lookups_policy_reads_and_never_writes() -> None:
    policy = read_policy("iam-policy-lookup.json")
    config = lookups()
    assert allows(policy, "s3:GetObject", f"{config.index}/CURRENT")
    assert allows(policy, "s3:GetObject", config.weights or "")
    assert allows(policy, "s3:GetObject", f"{nightly().embed.input[0]}/00000.tar")
    actions = {action for statement in policy for action in statement["Action"]}
    assert actions == {"s3:GetObject", "s3:ListBucket"}


@pytest.mark.parametrize("path", sorted(AWS.glob("*.json")), ids=lambda path: path.name)
def test_a_policy_names_its_actions_and_never_all_resources(path: Path) -> None:
    document = json.loads(path.read_text())
    assert document["Version"] == "2012-10-17"
    for statement in read_policy(path.name):
        assert statement["Effect"] == ["Allow"]
        assert not any("*" in action for action in statement["Action"])
        # EC2 offers no narrower resource for Describe actions.
        if not all(action.startswith("ec2:Describe") for action in statement["Action"]):
            assert "*" not in statement["Resource"]
            assert not any(r in (BUCKET + "*", "arn:aws:iam::*") for r in statement["Resource"])


def test_the_head_may_start_and_stop_only_this_clusters_workers_with_their_role() -> None:
    policy = read_policy("iam-policy-head.json")
    tag = CLUSTER["cluster_name"]
    for action in ("ec2:TerminateInstances", "ec2:RunInstances"):
        on_instances = [
            s for s in policy if action in s["Action"] and s["Resource"][0].endswith(":instance/*")
        ]
        assert on_instances
        for statement in on_instances:
            assert tag in statement["Condition"]["StringEquals"].values()
    (passing,) = (s for s in policy if "iam:PassRole" in s["Action"])
    worker = CLUSTER["available_node_types"]["gpu_spot"]["node_config"]
    profile = worker["IamInstanceProfile"]["Arn"]
    assert passing["Resource"] == [profile.replace(":instance-profile/", ":role/")]
    resources = [resource for statement in policy for resource in statement["Resource"]]
    regions = {arn.split(":")[3] for arn in resources if arn.startswith("arn:aws:ec2")}
    assert regions == {CLUSTER["provider"]["region"]}
