# The benchmark on any host with an NVIDIA GPU, and offline: the data are in the image.
#
#   docker build --build-arg REVISION="$(git rev-parse HEAD)" -t attention-benchmark .
#   docker run --rm --gpus all -v "$PWD/runs:/app/runs" -v "$PWD/results:/app/results" attention-benchmark
#
# It runs as user 1000; with another, add --user "$(id -u):$(id -g)" so that it may write there.
# torch 2.11 brings CUDA 13.0 and cuDNN itself, so the small `base` flavour is enough; the host's
# driver has to be 580 or newer. NVIDIA deletes superseded tags: take another with
# --build-arg BASE_IMAGE=...
ARG BASE_IMAGE=nvidia/cuda:13.0.3-base-ubuntu24.04@sha256:7c7413a56200486f71f181cad9310f6fd31b6bb21816ade15fc9c1e1e927a5c1
FROM ${BASE_IMAGE}

# The compilers and Python's headers are torch.compile's. Their versions are the distribution's:
# it keeps no older ones, so that pins would soon fail to build.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      ca-certificates g++ gcc python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

# Requirements before sources: editing a script does not install 5 GB again. Every package, also
# those that others need, is the very file that requirements.lock has the sha256 of.
ENV PATH=/opt/venv/bin:$PATH
COPY requirements.lock /opt/
RUN python3 -m venv /opt/venv \
 && pip install --no-cache-dir --require-hashes -r /opt/requirements.lock

# Data, verified, outside /app: they are still there when one's own checkout is mounted on it.
WORKDIR /app
COPY data.py ./
COPY kit/__init__.py kit/augment.py kit/command_line.py kit/datasets.py kit/decoding.py kit/files.py kit/image_folder.py kit/
RUN python data.py --data-dir /opt/data \
 && mkdir -p /usr/share/datasets \
 && ln -s /opt/data/FashionMNIST/raw /usr/share/datasets/fashion-mnist

COPY . .
RUN mkdir -p runs results && chmod 1777 runs results

# Whoever runs it (docker run --user) may have no home and no name: caches go to /tmp.
ENV HOME=/tmp \
    USER=user \
    MPLCONFIGDIR=/tmp/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    TRITON_CACHE_DIR=/tmp/triton \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# What every env.json says of the image that a run was made in, beside the sha256 of
# requirements.lock.
ARG REVISION=unknown SOURCE=unknown
ENV IMAGE_REVISION=$REVISION
LABEL org.opencontainers.image.title="attention-benchmark" \
      org.opencontainers.image.source="$SOURCE" \
      org.opencontainers.image.revision="$REVISION"
USER 1000:1000
CMD ["./run_all.sh"]
