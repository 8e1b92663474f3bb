"""The Kubernetes manifest: valid by the schema, and true of the image and of the routes."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.system.lab import ROOT

DOCUMENTS: list[dict[str, Any]] = list(yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text()))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
@pytest.mark.parametrize("version", ["1.29", "1.34"])
def test_it_is_valid(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_a_wrong_one_is_not() -> None:
    deployment = next(document for document in DOCUMENTS if document["kind"] == "Deployment")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**deployment, "spec": {**deployment["spec"], "replica": 1}}, "1.34", strict=True)


def test_its_probes_ask_routes_that_need_no_token() -> None:
    deployment = next(document for document in DOCUMENTS if document["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    paths = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"/health", "/ready"}
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
