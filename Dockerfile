# syntax=docker/dockerfile:1
ARG BASE_IMAGE=ubuntu:22.04

# A virtual environment with the daemon in it; pip and the build tools stay behind in this stage.
FROM ${BASE_IMAGE} AS build
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv ca-certificates \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY sandboxd ./sandboxd
COPY twisted ./twisted
# The plugin cache is written here, once: at run time the directory may be read-only. The venv keeps no pip.
RUN python3 -m venv /opt/sandboxd \
 && /opt/sandboxd/bin/pip install --no-cache-dir . \
 && /opt/sandboxd/bin/python -c "from twisted.plugin import IPlugin, getPlugins; list(getPlugins(IPlugin))" \
 && /opt/sandboxd/bin/twistd --help | grep -q sandboxd \
 && /opt/sandboxd/bin/pip uninstall -y pip setuptools

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="sandboxd" \
      org.opencontainers.image.description="An HTTP API to a sandbox for agents" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      ca-certificates curl wget git python3 jq \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/sandboxd /opt/sandboxd
COPY LICENSE /licenses/LICENSE
ENV PORT=3030 PROXY_PORT=3031
EXPOSE 3030 3031
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
  CMD curl -fsS "http://127.0.0.1:${PORT}/health" || exit 1
# The daemon is PID 1: it answers SIGTERM, reaps orphans, and exits with 0 when every process it started is gone.
ENTRYPOINT ["/opt/sandboxd/bin/twistd", "--nodaemon", "--pidfile=", "sandboxd"]
