# Targets: the last is the image that runs as root, as an agent's sandbox usually does; "nonroot" runs as user 1000;
# "slim" has nothing but /opt/sandboxd, to be copied into an image of your own. See docs/operating.md.
ARG BASE_IMAGE=ubuntu:22.04

# A virtual environment with the daemon in it; pip and the build tools stay behind in this stage.
FROM ${BASE_IMAGE} AS build
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv ca-certificates \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY deploy/lock deploy/lock
# Every input is pinned by its hash. The layer is built anew only if one of them changes.
RUN python3 -m venv /opt/sandboxd \
 && /opt/sandboxd/bin/pip install --no-cache-dir --require-hashes -r deploy/lock/runtime.txt \
 && python3 -m venv /tmp/build \
 && /tmp/build/bin/pip install --no-cache-dir --require-hashes -r deploy/lock/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY sandboxd ./sandboxd
COPY twisted ./twisted
COPY deploy/console deploy/console
# Not needed where `make console` has been called before: then the files are there.
RUN python3 deploy/console/fetch.py
# The plugin cache is written here, once: at run time the directory may be read-only. It must be newer than the plugins
# by a second at least, for a copied layer has whole seconds only. The venv keeps no pip.
RUN /tmp/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /tmp/wheel . \
 && /opt/sandboxd/bin/pip install --no-deps --no-index /tmp/wheel/*.whl \
 && /opt/sandboxd/bin/python -c "from twisted.plugin import IPlugin, getPlugins; list(getPlugins(IPlugin))" \
 && /opt/sandboxd/bin/twistd --help | grep -q sandboxd \
 && find /opt/sandboxd -name dropin.cache -exec touch -d '+2 seconds' {} + \
 && /opt/sandboxd/bin/pip uninstall -y pip setuptools \
 && find /opt/sandboxd -depth \( -name test -o -name tests \) -path '*/twisted/*' -exec rm -rf {} +

# The same with an interpreter and the libraries that it needs, so that it runs where there are none.
FROM build AS standalone
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends patchelf \
 && rm -rf /var/lib/apt/lists/*
COPY deploy/standalone.sh /src/deploy/standalone.sh
RUN sh deploy/standalone.sh /opt/sandboxd

FROM scratch AS slim
COPY --from=standalone /opt/sandboxd /opt/sandboxd
COPY LICENSE /opt/sandboxd/LICENSE

FROM ${BASE_IMAGE} AS base
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      ca-certificates curl wget git python3 jq \
 && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache
COPY LICENSE /licenses/LICENSE
COPY --from=build /opt/sandboxd /opt/sandboxd
ARG VERSION=unknown
ARG REVISION=unknown
ARG SOURCE=
LABEL org.opencontainers.image.title="sandboxd" \
      org.opencontainers.image.description="An HTTP API to a sandbox for agents" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
EXPOSE 3030 3031
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
  CMD curl -fsS "http://127.0.0.1:${PORT:-3030}/health" || exit 1
# The daemon is PID 1: it answers SIGTERM, reaps orphans, and exits with 0 when every process it started is gone.
# What follows the image's name is for it: options, and behind -- a command to run beside it.
ENTRYPOINT ["/opt/sandboxd/bin/twistd", "--nodaemon", "--pidfile=", "sandboxd"]

FROM base AS nonroot
RUN useradd --uid 1000 --create-home --shell /bin/bash sandbox \
 && install -d -o sandbox -g sandbox -m 0700 /var/lib/sandboxd
USER 1000
WORKDIR /home/sandbox

FROM base AS root
