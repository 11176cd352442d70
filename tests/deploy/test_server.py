"""The manifest of the query server, checked without a cluster against Kubernetes' schemas and the real command."""

import re
import runpy
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from actstore.cli.main import cli
from actstore.query.server import run
from actstore.query.server.admission.gate import OPEN

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deploy" / "server" / "server.yaml").read_text()
README = (ROOT / "deploy" / "README.md").read_text().partition("## Serving stores\n")[2]
KUBERNETES_VERSIONS = ["1.30", "1.37"]
SUFFIXES = {"Mi": 2**20, "Gi": 2**30}

Manifest = dict[str, Any]

DOCUMENTS: list[Manifest] = list(yaml.safe_load_all(TEXT))
SERVICE_ACCOUNT, DEPLOYMENT, SERVICE, BUDGET, POLICY = DOCUMENTS
TEMPLATE: Manifest = DEPLOYMENT["spec"]["template"]
POD: Manifest = TEMPLATE["spec"]
(CONTAINER,) = POD["containers"]
MOUNTS: dict[str, Manifest] = {mount["name"]: mount for mount in CONTAINER["volumeMounts"]}
VOLUMES: dict[str, Manifest] = {volume["name"]: volume for volume in POD["volumes"]}


def nbytes(quantity: str) -> int:
    number, suffix = quantity[:-2], quantity[-2:]
    return int(number) * SUFFIXES[suffix]


def arguments() -> dict[str, str]:
    """Values by option, as in the manifest."""
    name, *options = CONTAINER["args"]
    assert name == "serve"
    return {option: value for option, _, value in (argument.partition("=") for argument in options)}


def example_ingress() -> Manifest:
    comment = TEXT[TEXT.index("# apiVersion: networking.k8s.io/v1\n# kind: Ingress\n") :]
    lines = [line.removeprefix("# ") for line in comment.splitlines()]
    ingress: Manifest = yaml.safe_load("\n".join(lines))
    return ingress


def monitor() -> Manifest:
    """The PodMonitor of the README."""
    (block,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    document: Manifest = yaml.safe_load(block)
    return document


def parsed(command_line: list[str]) -> dict[str, Any]:
    """The values that the real command parses from its arguments, by option."""
    with click.Context(cli) as parent:
        name, command, rest = cli.resolve_command(parent, command_line)
        assert command is not None
        context = command.make_context(name, rest, parent=parent)
    return {option: context.params.get(str(p.name)) for p in command.params for option in p.opts}


@pytest.fixture
def pod_files(tmp_path: Path) -> Path:
    """A folder with the files that the pod mounts."""
    for mount in MOUNTS.values():
        (tmp_path / mount["mountPath"][1:]).mkdir(parents=True)
    token_file = tmp_path / arguments()["--token-file"][1:]
    token_file.write_text("only-for-this-test-0123456789 run-a*\n")
    return tmp_path


def test_documents() -> None:
    kinds = [document["kind"] for document in DOCUMENTS]
    assert kinds == ["ServiceAccount", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"]
    assert {document["metadata"]["name"] for document in DOCUMENTS} == {"actstore-server"}


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
def test_document_fits_the_schema(document: Manifest, version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_example_of_an_ingress_fits_the_schema(version: str) -> None:
    ingress = example_ingress()
    kubernetes_validate.validate(ingress, version, strict=True)
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    assert path["backend"]["service"] == {"name": SERVICE["metadata"]["name"], "port": {"name": "http"}}


def test_command_parses_the_arguments(pod_files: Path) -> None:
    given = arguments()
    command_line = ["serve"]
    for option, value in given.items():
        is_path = any(value.startswith(mount["mountPath"]) for mount in MOUNTS.values())
        command_line.append(f"{option}={pod_files}{value}" if is_path else f"{option}={value}")

    values = parsed(command_line)

    assert given.pop("--memory") == "1GiB"
    assert values["--memory"] == 1 << 30
    assert {option: str(values[option]).removeprefix(str(pod_files)) for option in given} == given
    assert type(values["--port"]) is type(values["--workers"]) is type(values["--cache-limit"]) is int
    assert not values["--ssl-certfile"]  # the probes use plain HTTP


def test_command_of_this_test_rejects_what_it_does_not_know() -> None:
    with pytest.raises(click.UsageError, match="--cache-limits"):
        parsed(["serve", "--root=s3://BUCKET/runs", "--cache-limits=1"])


def test_image_is_the_cpu_target_of_the_repository_that_extraction_uses() -> None:
    version = runpy.run_path(str(ROOT / "actstore" / "_version.py"))["__version__"]
    rayjob = (ROOT / "deploy" / "kuberay" / "rayjob.yaml").read_text()
    image, tag = CONTAINER["image"].split(":")
    assert tag == f"{version}-cpu"
    assert f"{image}:{version}-gpu" in rayjob
    assert re.search(r"^FROM .* AS cpu$", (ROOT / "deploy" / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert CONTAINER["command"] == ["actstore"]


def test_selectors_match_the_pods() -> None:
    labels = TEMPLATE["metadata"]["labels"]
    selectors = [
        DEPLOYMENT["spec"]["selector"]["matchLabels"],
        SERVICE["spec"]["selector"],
        BUDGET["spec"]["selector"]["matchLabels"],
        POLICY["spec"]["podSelector"]["matchLabels"],
        monitor()["spec"]["selector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in POD["topologySpreadConstraints"]),
    ]
    assert len(selectors) == 7
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert selector, "an empty selector is all pods of the namespace"


def test_one_port_from_the_command_to_the_client() -> None:
    port = int(arguments()["--port"])
    (container_port,) = CONTAINER["ports"]
    (service_port,) = SERVICE["spec"]["ports"]
    (rule,) = POLICY["spec"]["ingress"]
    (endpoint,) = monitor()["spec"]["podMetricsEndpoints"]
    assert container_port == {"name": "http", "containerPort": port}
    assert service_port["targetPort"] == endpoint["port"] == "http"
    assert rule["ports"] == [{"protocol": "TCP", "port": port}]
    assert f'"http://{SERVICE["metadata"]["name"]}:{service_port["port"]}/v1/stores/run"' in README


def test_probes_ask_paths_of_the_server() -> None:
    probes = {name: CONTAINER[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["httpGet"] for name, probe in probes.items()} == {
        "startup": {"path": "/healthz", "port": "http"},
        # Not /readyz: trouble of S3 would restart every replica.
        "liveness": {"path": "/healthz", "port": "http"},
        "readiness": {"path": "/readyz", "port": "http"},
    }
    routes = ROOT / "actstore" / "query" / "server" / "routes"
    sources = "".join(path.read_text() for path in routes.glob("*.py"))
    for path in {probe["httpGet"]["path"] for probe in probes.values()}:
        assert path in OPEN  # probes have no token
        assert re.search(rf'(?i)(\.get|route)\(\s*"{path}"', sources), f"no handler of {path}"


def test_an_update_loses_no_request() -> None:
    rolling = DEPLOYMENT["spec"]["strategy"]["rollingUpdate"]
    sleep = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert DEPLOYMENT["spec"]["replicas"] > 1
    assert rolling["maxUnavailable"] == 0 < rolling["maxSurge"]
    assert sleep >= 5
    assert POD["terminationGracePeriodSeconds"] > sleep + run._DRAIN_S


def test_a_node_can_be_drained() -> None:
    budget = BUDGET["spec"]
    assert budget["maxUnavailable"] >= 1
    assert "minAvailable" not in budget


def test_rotated_tokens_reach_the_server() -> None:
    mount, volume = MOUNTS["tokens"], VOLUMES["tokens"]
    folder, _, key = arguments()["--token-file"].rpartition("/")
    assert mount == {
        "name": "tokens",
        "mountPath": folder,
        "readOnly": True,
    }  # no subPath, which would not be updated
    assert "items" not in volume["secret"]
    secret = volume["secret"]["secretName"]
    for text in (TEXT, README):
        assert f"kubectl create secret generic {secret} --from-file={key}=" in text


def test_tokens_are_readable_by_the_server_alone() -> None:
    assert VOLUMES["tokens"]["secret"]["defaultMode"] == 0o440
    assert POD["securityContext"]["fsGroup"] == POD["securityContext"]["runAsUser"]


def test_cache_stays_below_what_gets_the_pod_evicted() -> None:
    limit = int(arguments()["--cache-limit"])
    sizes = {name: nbytes(VOLUMES[name]["emptyDir"]["sizeLimit"]) for name in ("cache", "tmp")}
    resources = CONTAINER["resources"]
    assert limit <= 0.9 * sizes["cache"]  # it holds more than that for a moment
    assert MOUNTS["cache"]["mountPath"] == arguments()["--cache-dir"]
    for kind in ("requests", "limits"):
        assert nbytes(resources[kind]["ephemeral-storage"]) > sum(sizes.values())


def test_pod_has_no_rights_that_it_does_not_need() -> None:
    pod, container = POD["securityContext"], CONTAINER["securityContext"]
    assert pod["runAsNonRoot"]
    assert pod["runAsUser"] > 0
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["serviceAccountName"] == SERVICE_ACCOUNT["metadata"]["name"]
    assert POD["automountServiceAccountToken"] is SERVICE_ACCOUNT["automountServiceAccountToken"] is False


def test_all_that_is_written_is_on_volumes_of_limited_size() -> None:
    written = {name for name, mount in MOUNTS.items() if not mount.get("readOnly")}
    assert written == {"cache", "tmp"}
    assert MOUNTS["tmp"]["mountPath"] == "/tmp"
    assert all(VOLUMES[name]["emptyDir"].keys() == {"sizeLimit"} for name in written)


def test_environment_has_no_variables_of_services() -> None:
    """The Service would bring ACTSTORE_SERVER_PORT=tcp://... into every pod."""
    assert POD["enableServiceLinks"] is False
    assert not any(variable["name"].startswith("ACTSTORE_") for variable in CONTAINER["env"])


def test_only_pods_with_the_label_get_in() -> None:
    spec = POLICY["spec"]
    (rule,) = spec["ingress"]
    assert spec["policyTypes"] == ["Ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"actstore-client": "true"}}}]
    assert 'actstore-client: "true"' in README


def test_manifest_holds_no_secrets() -> None:
    assert not re.search(
        r"AWS_(ACCESS_KEY_ID|SECRET_ACCESS_KEY|SESSION_TOKEN)|kind: Secret|stringData|ACTSTORE_TOKEN|--from-literal",
        TEXT,
    )
    assert not re.search(r"[0-9a-zA-Z_-]{32,}", TEXT), "something as long as a token"
