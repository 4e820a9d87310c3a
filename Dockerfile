# The image of payload-logger. How it is built and what is proved of it: docs/image.md.
# A tag can be moved; a digest can't. `docker buildx imagetools inspect python:TAG` tells it, and
# `--build-arg PYTHON=TAG@sha256:…` builds on it.
ARG PYTHON=3.11.14-slim-bookworm

# Wheels of payload-logger, compiled, and of all that it needs.
FROM python:${PYTHON} AS build
# Debian's archive keeps no old versions: the tag above is what pins the compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY proxy proxy
RUN PAYLOAD_LOGGER_COMPILE=1 pip wheel --no-cache-dir --wheel-dir /wheels .

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="payload-logger" \
      org.opencontainers.image.description="A reverse proxy that records a model server's traffic as Azure ML data-collector events." \
      org.opencontainers.image.licenses="Apache-2.0"
# Nothing is written but below /var/lib/payload-logger. Temporary files, which a disk that is full must not prevent, are in memory.
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TMPDIR=/dev/shm
# pip compiles what it installs; then it goes too.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels /wheels/payload_logger-*.whl \
    && pip uninstall --yes pip setuptools wheel
# What is mounted at /etc/payload-logger takes the place of this file.
RUN install -d /etc/payload-logger \
    && printf 'admin: {}\nlogs: {format: json}\n' > /etc/payload-logger/config.yaml \
    && install -d -o 10001 -g 10001 -m 0750 /var/lib/payload-logger
WORKDIR /var/lib/payload-logger
VOLUME /var/lib/payload-logger
USER 10001:10001
EXPOSE 8080 8081
STOPSIGNAL SIGTERM
# Kubernetes has probes of its own, and does not look at this. It asks at the default of admin.listen.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=6 \
    CMD ["python", "-c", "import http.client as http; c = http.HTTPConnection('127.0.0.1', 8081, timeout=4); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["payload-logger"]
CMD ["run", "-c", "/etc/payload-logger/config.yaml"]
