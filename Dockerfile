# Two images from one file:
#   docker build --target cpu --build-arg TORCH_INDEX=URL -t pennyweight:cpu .   # URL: PyTorch's index of CPU builds
#   docker build --target gpu -t pennyweight:gpu .
# They need the base image, Debian's packages and Python packages, and no other download.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
WORKDIR /
# Slim images have no compiled standard library, and no container could store one: each start would take 0.7 s longer.
RUN python3 -m compileall -q "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"


# All Python dependencies, from pyproject.toml alone: a change of the sources leaves this layer as it is.
FROM base AS dependencies
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/venv
WORKDIR /build
COPY pyproject.toml deploy/requirements.py ./
RUN python requirements.py pyproject.toml torch > torch.txt \
    && python requirements.py pyproject.toml all > requirements.txt \
    && python requirements.py pyproject.toml grammar > requirements-grammar.txt \
    && python requirements.py pyproject.toml gpu > requirements-gpu.txt
# Where torch comes from: empty for pip's own index, whose Linux build carries CUDA and takes gigabytes.
ARG TORCH_INDEX=
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --requirement torch.txt
RUN pip install --requirement requirements.txt --requirement requirements-grammar.txt


# The package, with what is compiled for it. Compilers stay in this stage.
FROM dependencies AS builder
COPY . .
RUN pip install --no-deps .


FROM builder AS builder-gpu
RUN pip install --requirement requirements-gpu.txt


# What both images share. All that is ever written lies in two volumes, which may be shared: models of the hub, and what
# is made of them. They exist in the image, so that new volumes belong to its user.
FROM base AS runtime
RUN groupadd --gid 10001 pennyweight \
    && useradd --uid 10001 --gid 10001 --home-dir /data/cache --no-create-home --shell /usr/sbin/nologin pennyweight \
    && install --directory --owner=10001 --group=10001 /data/huggingface /data/cache
ENV HOME=/data/cache \
    HF_HOME=/data/huggingface \
    XDG_CACHE_HOME=/data/cache \
    PYTHONDONTWRITEBYTECODE=1 \
    PENNYWEIGHT_HOST=0.0.0.0
VOLUME /data/huggingface /data/cache
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# A model may take a quarter of an hour to arrive and load; until then a failed check counts for nothing.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ.get('PENNYWEIGHT_PORT', '8000') + '/readyz', timeout=4)"]
ENTRYPOINT ["pennyweight", "serve"]


FROM runtime AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=builder-gpu /opt/venv /opt/venv


# Last, so that it is what a build without --target makes.
FROM runtime AS cpu
COPY --from=builder /opt/venv /opt/venv
