# Onset's image: the service, its shipped detectors and an embedded valkey-server for when no ONSET_REDIS_URL is given. No torch, no compiler.
#
#   docker build -t onset:0.1.0 .                              ONNX Runtime for the CPU (the default)
#   docker build -t onset:0.1.0-gpu --build-arg RUNTIME=gpu .  ONNX Runtime with CUDA (x86-64, 2.9 GB), which ONSET_PROVIDER=cuda scores with
#
# Without a network: put every wheel into wheelhouse/ beside this file (docs/deploy.md); then pip asks no index.
# Written for the classic builder and for BuildKit alike. `make image-test` builds it and runs the result.

ARG BASE=python:3.11-slim-bookworm
ARG NODE=node:22-bookworm-slim

# The page at /. What `make console` built is taken as it is; then NODE may be any image with a shell (docs/deploy.md, without a network).
FROM ${NODE} AS console
WORKDIR /source/console
COPY console .
COPY service/console ../service/console
RUN if [ ! -e ../service/console/dist/index.html ]; then npm ci --no-audit --no-fund && npm run build; fi

FROM ${BASE} AS build
ARG RUNTIME=cpu
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
# The glob matches nothing where there is no wheelhouse, and COPY accepts that because the other files exist.
COPY pyproject.toml scripts/image_requirements.py wheel[h]ouse wheels/
# Dependencies first: this layer lives until pyproject.toml changes. The virtual environment has no pip: nothing at run time needs one.
RUN python -m venv --without-pip /opt/onset \
 && python wheels/image_requirements.py "${RUNTIME}" wheels/pyproject.toml > requirements.txt \
 && if ls wheels/*.whl > /dev/null 2>&1; then printf '[global]\nno-index = true\nfind-links = /build/wheels\n' > /etc/pip.conf; fi \
 && pip --python /opt/onset/bin/python install -r requirements.txt
COPY pyproject.toml hatch_build.py README.md LICENSE source/
COPY service source/service
COPY --from=console /source/service/console/dist source/service/console/dist
# pip compiles to bytecode here, once; at run time the file system is read-only.
RUN pip --python /opt/onset/bin/python install --no-deps ./source

FROM ${BASE}
RUN groupadd --gid 10001 onset \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin onset \
 && install -d -o onset -g onset -m 0750 /data
COPY --from=build /opt/onset /opt/onset
COPY scripts/healthcheck.py /opt/onset/healthcheck.py
# PYTHONSAFEPATH: the working directory is a data volume and must never be importable.
ENV PATH=/opt/onset/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONFAULTHANDLER=1 \
    PYTHONSAFEPATH=1 \
    ONSET_HOST=0.0.0.0 \
    ONSET_PORT=8080 \
    ONSET_DATA_DIR=/data
# Only the embedded store writes here: with ONSET_REDIS_URL the container holds nothing and its root may be read-only.
VOLUME /data
WORKDIR /data
# Numeric, so that Kubernetes can see that it is not root.
USER 10001:10001
EXPOSE 8080
# Uvicorn's own signal: readiness goes off, the doors close, what was accepted is scored and answered (ONSET_DRAIN_SECONDS).
STOPSIGNAL SIGTERM
# Ready, not live: Docker itself does nothing about an unhealthy container, but Compose starts dependants and proxies route by this state, and
# that is what readiness says. Swarm kills unhealthy tasks: there, override it with /health/live. Kubernetes ignores it and has its own probes.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 CMD ["python", "-I", "/opt/onset/healthcheck.py"]
ENTRYPOINT ["python", "-m", "service"]
CMD ["serve"]

# Last, so that a new revision rebuilds no layer above.
ARG RUNTIME=cpu
ARG VERSION=0.1.0
ARG REVISION=""
LABEL org.opencontainers.image.title="onset" \
      org.opencontainers.image.description="Real-time anomaly detection: an LSTM autoencoder in ONNX, its recurrent state in Redis, a p-value for every event." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      onset.runtime="${RUNTIME}"
