"""The KubeRay manifest, checked without a cluster against the RayJob schema and Kubernetes' own."""

import copy
import json
import re
import runpy
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
KUBERNETES_VERSIONS = ["1.30", "1.37"]
JOB_FIELDS = {
    "model": str,
    "tokens": str,
    "hooks": list,
    "context_length": int,
    "out": str,
    "dtype": str,
    "batch_size": int,
    "max_tokens": int,
    "seed": int,
}

Manifest = dict[str, Any]
Edit = Callable[[Manifest], object]

SCHEMA = json.loads((KUBERAY / "rayjob.schema.json").read_text())
SERVICE_ACCOUNT, RAYJOB = yaml.safe_load_all((KUBERAY / "rayjob.yaml").read_text())


def cluster(rayjob: Manifest) -> Manifest:
    spec: Manifest = rayjob["spec"]["rayClusterSpec"]
    return spec


def worker(rayjob: Manifest, index: int = 0) -> Manifest:
    group: Manifest = cluster(rayjob)["workerGroupSpecs"][index]
    return group


def templates(rayjob: Manifest) -> dict[str, Manifest]:
    groups = {group["groupName"]: group["template"] for group in cluster(rayjob)["workerGroupSpecs"]}
    head = cluster(rayjob)["headGroupSpec"]["template"]
    return {"submitter": rayjob["spec"]["submitterPodTemplate"], "head": head, **groups}


def edited(edit: Edit) -> Manifest:
    """A copy of the manifest with one change; YAML aliases are resolved, so it changes in one place only."""
    rayjob: Manifest = json.loads(json.dumps(RAYJOB))
    edit(rayjob)
    return rayjob


def complaints(rayjob: Manifest) -> list[str]:
    errors = Draft202012Validator(SCHEMA).iter_errors(rayjob)
    return [f"{error.json_path}: {error.message}" for error in errors]


def pod(template: Manifest) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pod", **template.get("metadata", {})},
        "spec": template["spec"],
    }


def ray_pin() -> str:
    pins = (ROOT / "deploy" / "constraints.txt").read_text()
    pinned = re.search(r"^ray==(\S+)$", pins, flags=re.MULTILINE)
    assert pinned, "deploy/constraints.txt pins no ray"
    return pinned[1]


def test_schema_is_a_json_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def test_manifest_fits_the_schema() -> None:
    assert complaints(RAYJOB) == []


def rename_min_replicas(rayjob: Manifest) -> None:
    group = worker(rayjob)
    group["minReplica"] = group.pop("minReplicas")


def delete_by_rules(rayjob: Manifest, **legacy: Any) -> None:
    """Switch to deletionRules, which is valid by itself: no shutdown, no global TTL."""
    spec = rayjob["spec"]
    del spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"]
    rule = {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 300}}
    spec["deletionStrategy"] = {"deletionRules": [rule], **legacy}


def delete_by_rules_and_shutdown(rayjob: Manifest) -> None:
    delete_by_rules(rayjob)
    rayjob["spec"]["shutdownAfterJobFinishes"] = True


def delete_by_rules_and_legacy(rayjob: Manifest) -> None:
    policy = {"policy": "DeleteCluster"}
    delete_by_rules(rayjob, onSuccess=policy, onFailure=policy)


def delete_on_two_conditions(rayjob: Manifest) -> None:
    delete_by_rules(rayjob)
    rule = rayjob["spec"]["deletionStrategy"]["deletionRules"][0]
    rule["condition"]["jobDeploymentStatus"] = "Failed"


def delete_workers_under_autoscaling(rayjob: Manifest) -> None:
    delete_by_rules(rayjob)
    rayjob["spec"]["deletionStrategy"]["deletionRules"][0]["policy"] = "DeleteWorkers"


def unquote_num_cpus(rayjob: Manifest) -> None:
    cluster(rayjob)["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def move_field_up(rayjob: Manifest) -> None:
    rayjob["spec"]["authOptions"] = cluster(rayjob).pop("authOptions")


REJECTED: dict[str, tuple[Edit, str]] = {
    "misspelt-field": (rename_min_replicas, "'minReplica' was unexpected"),
    "missing-field": (rename_min_replicas, "'minReplicas' is a required property"),
    "field-of-another-type": (move_field_up, "'authOptions' was unexpected"),
    "unknown-upscaling-mode": (
        lambda rayjob: cluster(rayjob)["autoscalerOptions"].update(upscalingMode="Fast"),
        "'Fast' is not one of",
    ),
    "unknown-submission-mode": (
        lambda rayjob: rayjob["spec"].update(submissionMode="SSHMode"),
        "'SSHMode' is not one of",
    ),
    "unquoted-start-parameter": (unquote_num_cpus, "0 is not of type 'string'"),
    "rules-and-shutdown": (delete_by_rules_and_shutdown, "shutdownAfterJobFinishes: False was expected"),
    "rules-and-legacy-policies": (delete_by_rules_and_legacy, "is not valid under any of the given schemas"),
    "two-conditions-in-a-rule": (delete_on_two_conditions, "is valid under each of"),
    "delete-workers-under-autoscaling": (delete_workers_under_autoscaling, "should not be valid under"),
    "ttl-without-shutdown": (
        lambda rayjob: rayjob["spec"].pop("shutdownAfterJobFinishes"),
        "'shutdownAfterJobFinishes' is a required property",
    ),
    "restarted-pod-under-autoscaler-v2": (
        lambda rayjob: worker(rayjob)["template"]["spec"].update(restartPolicy="Always"),
        "'Never' was expected",
    ),
    "no-cluster": (lambda rayjob: rayjob["spec"].pop("rayClusterSpec"), "is not valid under any of"),
}


@pytest.mark.parametrize(("edit", "complaint"), REJECTED.values(), ids=REJECTED.keys())
def test_schema_rejects(edit: Edit, complaint: str) -> None:
    assert complaint in "\n".join(complaints(edited(edit)))


def test_schema_accepts_deletion_rules_alone() -> None:
    assert complaints(edited(delete_by_rules)) == []


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("name", templates(RAYJOB))
def test_pod_template_is_a_pod(name: str, version: str) -> None:
    kubernetes_validate.validate(pod(templates(RAYJOB)[name]), version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_service_account_is_one(version: str) -> None:
    kubernetes_validate.validate(SERVICE_ACCOUNT, version, strict=True)


def test_strict_validation_rejects_a_misspelt_pod_field() -> None:
    template = copy.deepcopy(templates(RAYJOB)["head"])
    template["spec"]["toleration"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="toleration"):
        kubernetes_validate.validate(pod(template), KUBERNETES_VERSIONS[-1], strict=True)


def test_ray_version_is_the_pin() -> None:
    assert cluster(RAYJOB)["rayVersion"] == ray_pin()


def test_one_image_everywhere() -> None:
    """Ray refuses nodes that differ in the patch version of Ray or Python."""
    images = {
        container["image"]
        for template in templates(RAYJOB).values()
        for container in template["spec"]["containers"]
    }
    version = runpy.run_path(str(ROOT / "actstore" / "_version.py"))["__version__"]
    assert images == {f"registry.example.com/actstore:{version}-gpu"}


def test_head_runs_the_driver_and_nothing_else() -> None:
    head = cluster(RAYJOB)["headGroupSpec"]
    limits = head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in limits
    # Any of these would make Ray look for a node to run the driver on, and the head offers no resources.
    assert not {"entrypointNumCpus", "entrypointNumGpus", "entrypointResources"} & RAYJOB["spec"].keys()


def test_spot_is_preferred_and_backed_by_on_demand() -> None:
    spot, on_demand = worker(RAYJOB, 0), worker(RAYJOB, 1)
    node_selectors = [group["template"]["spec"]["nodeSelector"] for group in (spot, on_demand)]
    assert [selector["karpenter.sh/capacity-type"] for selector in node_selectors] == ["spot", "on-demand"]
    assert spot["priority"] > on_demand["priority"]
    assert spot["maxReplicas"] > on_demand["maxReplicas"]
    # The autoscaler compares priorities only where both groups fit a request equally well.
    resources = [group["template"]["spec"]["containers"][0]["resources"] for group in (spot, on_demand)]
    assert resources[0] == resources[1]
    assert spot["rayStartParams"] == on_demand["rayStartParams"]


def test_gpus_come_for_the_workers_that_ask_and_go_afterwards() -> None:
    for group in cluster(RAYJOB)["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
    assert RAYJOB["spec"]["shutdownAfterJobFinishes"]
    # The default is one worker for each GPU in the cluster, which has none yet.
    options = RAYJOB["spec"]["entrypoint"].split()[4:]
    assert options == ["--num-workers", str(worker(RAYJOB)["maxReplicas"]), "--device", "cuda"]


@pytest.mark.parametrize("name", ["head", "gpu-spot", "gpu-on-demand"])
def test_ray_pod(name: str) -> None:
    spec = templates(RAYJOB)[name]["spec"]
    (container,) = spec["containers"]
    env = {variable["name"]: variable.get("value") for variable in container["env"]}
    (shm,) = (volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shm")

    assert spec["serviceAccountName"] == SERVICE_ACCOUNT["metadata"]["name"]
    assert float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < spec["terminationGracePeriodSeconds"]
    assert shm["medium"] == "Memory"
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert spec["securityContext"]["runAsNonRoot"]


def test_manifest_holds_no_credentials() -> None:
    text = (KUBERAY / "rayjob.yaml").read_text()
    assert not re.search(r"AWS_(ACCESS_KEY_ID|SECRET_ACCESS_KEY|SESSION_TOKEN)|kind: Secret", text)


def test_entrypoint_is_a_module_of_this_distribution() -> None:
    interpreter, flag, module, job, *_ = RAYJOB["spec"]["entrypoint"].split()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    assert (interpreter, flag) == ("python", "-m")
    assert module.split(".")[0] in {Path(package).name for package in packages["packages"]}
    assert job == "s3://BUCKET/jobs/job.yaml"


def test_job_has_exactly_the_known_fields() -> None:
    job = yaml.safe_load((KUBERAY / "job.yaml").read_text())
    assert {name: type(value) for name, value in job.items()} == JOB_FIELDS
    assert job["hooks"]
    assert all(isinstance(hook, str) for hook in job["hooks"])
    assert job["out"].startswith("s3://")
