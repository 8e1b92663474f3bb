"""A stand-in for the cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import kubernetes.config
import kubernetes_asyncio.config
import pytest

from tests.agent_sandbox.cluster import Cluster, cluster


@pytest.fixture
def api_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cluster]:
    """What the client takes for its cluster."""
    with cluster() as found:
        found.write_config(tmp_path / "kubeconfig")
        for config in (kubernetes.config.kube_config, kubernetes_asyncio.config.kube_config):
            # Set from KUBECONFIG when it is imported.
            monkeypatch.setattr(config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        yield found
