"""The files in deploy/ agree with each other and with the server. Continuous integration lints them, and builds one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from dami.cli import app
from dami.version import __version__
from typer.main import get_command

from tests.test_docs import fault

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
IMAGES = {"dami-serve": "Dockerfile", "dami-vllm": "vllm.Dockerfile"}
MANIFESTS = ["kubernetes.yaml", "kubernetes-vllm.yaml"]


def instruction(image: str, name: str) -> str:
    """The last instruction of a name in an image's Dockerfile, with its continued lines."""
    text = (DEPLOY / IMAGES[image]).read_text(encoding="utf-8").replace("\\\n", "")
    return re.findall(rf"^{name} (.*)$", text, re.MULTILINE)[-1]


def entrypoint(image: str) -> list[str]:
    return json.loads(instruction(image, "ENTRYPOINT"))


def parts(manifest: str) -> dict[str, Any]:
    documents = yaml.safe_load_all((DEPLOY / manifest).read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


def containers() -> list[tuple[str, list[str]]]:
    """Image and arguments of everything that the examples start."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    found = [(service["image"], service["command"]) for service in services.values()]
    for manifest in MANIFESTS:
        (container,) = parts(manifest)["Deployment"]["spec"]["template"]["spec"]["containers"]
        found.append((container["image"], container["args"]))
    return found


@pytest.mark.parametrize(("image", "arguments"), containers())
def test_images_are_of_this_version_and_take_their_arguments(image: str, arguments: list[str]) -> None:
    name, _, version = image.partition(":")
    assert version == __version__
    command = entrypoint(name) + arguments
    if name == "dami-serve":
        assert fault(command) is None
    else:
        assert command[:2] == ["vllm", "serve"]
        assert json.loads(command[-1].partition("=")[2]).keys() == {"thinking", "format"}


@pytest.mark.parametrize("image", IMAGES)
def test_containers_are_checked_and_have_no_rights(image: str) -> None:
    assert instruction(image, "USER") == "10001"
    assert "http://127.0.0.1:8000/health" in instruction(image, "HEALTHCHECK")
    assert instruction(image, "EXPOSE") == "8000"
    assert instruction(image, "VOLUME") == "/models"


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_manifests_hang_together(manifest: str) -> None:
    documents = parts(manifest)
    pod = documents["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert documents["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (port,) = container["ports"]
    assert documents["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert port["containerPort"] == 8000
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["spec"]["volumes"]} == mounts.keys()
    assert mounts["models"] == "/models"
    (claim,) = [v["persistentVolumeClaim"] for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v]
    assert claim["claimName"] == documents["PersistentVolumeClaim"]["metadata"]["name"]
    assert pod["spec"]["securityContext"]["runAsUser"] == 10001
    assert pod["spec"]["securityContext"]["runAsNonRoot"]


def test_they_wait_longer_than_the_server_drains() -> None:
    (drain,) = [each.default for each in get_command(app).commands["serve"].params if each.name == "drain"]
    grace = parts("kubernetes.yaml")["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert min(grace, int(services["dami"]["stop_grace_period"].removesuffix("s"))) > drain


def test_the_image_of_vllm_is_of_a_version_that_the_plugin_takes() -> None:
    text = (DEPLOY / "vllm.Dockerfile").read_text(encoding="utf-8")
    version = re.search(r"^ARG VLLM=v(\d+\.\d+)\.", text, re.MULTILINE)
    assert version is not None
    assert version[1] in ("0.32", "0.33")  # as the extra "vllm" of pyproject.toml says
