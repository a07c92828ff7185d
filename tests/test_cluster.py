"""The files of cluster/: valid by KubeRay's own schema, true to the package, and their commands are commands."""

import copy
import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from packaging.specifiers import SpecifierSet

from mp3d.recipes import PRETRAIN

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
SHARED_DATA = Path(os.environ.get("MP3D_SHARED_DATA", ROOT.parent / "shared" / "data"))
CRDS = SHARED_DATA / "kuberay"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MANIFESTS = ("raycluster.yaml", "rayjob.yaml")

needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason=f"{CRDS} is absent")


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"] if manifest["kind"] == "RayCluster" else manifest["spec"]["rayClusterSpec"]


def groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster_spec(manifest)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


# --- KubeRay's schema


def strict(schema: Any) -> Any:
    """A custom resource's OpenAPI schema as JSON Schema that refuses unknown fields, as a strict API server does."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    plain = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if "properties" in plain:
        plain["properties"] = {name: strict(each) for name, each in plain["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            plain.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if key in plain:
            plain[key] = strict(plain[key])
    if plain.pop("nullable", False) and "type" in plain:
        plain["type"] = [plain["type"], "null"]
    return plain


@cache
def validator(api_version: str, kind: str) -> Draft202012Validator:
    resource = yaml.load((CRDS / f"crd_{kind.lower()}s.yaml").read_text(), Loader=yaml.CSafeLoader)
    group, _, version = api_version.partition("/")
    assert (resource["spec"]["group"], resource["spec"]["names"]["kind"]) == (group, kind)
    (schema,) = [
        each["schema"]["openAPIV3Schema"]
        for each in resource["spec"]["versions"]
        if each["name"] == version and each["served"]
    ]
    schema = strict(schema)
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return Draft202012Validator(schema)


def faults(manifest: dict[str, Any]) -> list[str]:
    errors = validator(manifest["apiVersion"], manifest["kind"]).iter_errors(manifest)
    return [f"{error.json_path}: {error.message[:200]}" for error in errors]


@needs_crds
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_pass_kuberays_schema(name: str):
    assert faults(load(name)) == []


@needs_crds
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "entryPoint"), "python jobs/pretrain.py", "'entryPoint' was unexpected"),
        (("spec", "backoffLimit"), "two", "'two' is not of type 'integer'"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens", "'tokens' is not one of"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "hostNetwrk"), True, "was unexpected"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template"), None, "None is not of type 'object'"),
    ],
)
def test_the_schema_catches_slips(path: tuple[str, ...], value: Any, message: str):
    manifest = copy.deepcopy(load("rayjob.yaml"))
    node = manifest
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert any(message in fault for fault in faults(manifest))


@needs_crds
def test_the_schema_wants_the_bounds_of_a_group():
    manifest = copy.deepcopy(load("raycluster.yaml"))
    del manifest["spec"]["workerGroupSpecs"][0]["minReplicas"]
    assert any("'minReplicas' is a required property" in fault for fault in faults(manifest))


# --- the manifests and the package


@pytest.mark.parametrize("name", MANIFESTS)
def test_ray_is_the_pinned_one(name: str):
    (pinned,) = [each for each in PROJECT["dependencies"] if each.startswith("ray[")]
    version = cluster_spec(load(name))["rayVersion"]
    assert SpecifierSet(pinned.partition("]")[2]).contains(version)
    assert f"ray=={version}" in (ROOT / "requirements.lock").read_text().splitlines()


@pytest.mark.parametrize("name", MANIFESTS)
def test_token_authentication_is_on_and_no_secret_is_written_down(name: str):
    assert cluster_spec(load(name))["authOptions"] == {"mode": "token"}
    for group in groups(load(name)):
        for variable in container(group).get("env", []):
            if re.search("KEY$|TOKEN|PASSWORD|SECRET", variable["name"]):
                assert "secretKeyRef" in variable["valueFrom"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_pod_runs_our_image_without_privileges(name: str):
    for group in groups(load(name)):
        assert container(group)["image"] == f"example.invalid/mp3d:{PROJECT['version']}"
        assert container(group)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
        assert f"--uid {group['template']['spec']['securityContext']['runAsUser']} " in dockerfile()


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_head_computes_nothing_and_every_pod_sees_the_volume(name: str):
    manifest = load(name)
    assert cluster_spec(manifest)["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    for group in groups(manifest):
        mounts = {mount["name"]: mount["mountPath"] for mount in container(group)["volumeMounts"]}
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert mounts["shared"] == "/mnt/shared"
        assert set(mounts) == volumes
    for group in cluster_spec(manifest)["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert "/dev/shm" in [mount["mountPath"] for mount in container(group)["volumeMounts"]]
        assert container(group)["resources"]["requests"] == container(group)["resources"]["limits"]


def test_the_standing_cluster_has_nodes_for_data_and_for_training():
    gpus = {
        group["groupName"]: container(group)["resources"]["limits"].get("nvidia.com/gpu", "0")
        for group in load("raycluster.yaml")["spec"]["workerGroupSpecs"]
    }
    assert gpus == {"data": "0", "train": "1"}


def test_the_job_runs_a_command_that_its_cluster_can_carry():
    manifest = load("rayjob.yaml")
    python, script, recipe, *options = shlex.split(manifest["spec"]["entrypoint"])
    assert python == "python"
    plan = subprocess.run(
        [sys.executable, script, recipe, *options, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert plan.returncode == 0, plan.stderr
    assert f"/mnt/shared/runs/{recipe}" in plan.stdout

    (config,) = [each() for each in PRETRAIN if each.__name__ == recipe]
    (group,) = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = container(group)["resources"]["limits"]
    assert config.launch.accelerator == "gpu"
    assert group["minReplicas"] == config.loop.num_workers
    assert float(limits["cpu"]) >= config.launch.cpus_per_worker
    assert limits["nvidia.com/gpu"] == "1"


# --- the image and the runtime environment


@cache
def dockerfile() -> str:
    return (CLUSTER / "Dockerfile").read_text()


def test_the_image_has_a_supported_python_and_everything_a_job_needs():
    (version,) = re.findall(r"^FROM python:([\d.]+)-slim$", dockerfile(), re.MULTILINE)
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    copied = {source for line in re.findall(r"^COPY (.+) \S+$", dockerfile(), re.MULTILINE) for source in line.split()}
    assert {"pyproject.toml", "requirements.lock", "README.md", "LICENSE", "mp3d", "jobs", "serve"} == copied
    allowed = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in allowed if line.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_names_no_host_and_no_version_of_its_own():
    commands = [line for line in dockerfile().splitlines() if not line.startswith("#")]
    assert not re.search(r"https?:|index-url|==", "\n".join(commands))
    assert "--constraint requirements.lock" in dockerfile()


def test_the_runtime_environment_is_one():
    from ray.runtime_env import RuntimeEnv

    given = load("runtime-env.yaml")
    RuntimeEnv(**given)  # raises on an unknown field or a wrong type
    assert not [name for name in given["env_vars"] if re.search("KEY$|TOKEN|PASSWORD|SECRET", name)]
