# The engine, in two targets: `cpu` and `cuda`. Locked by hash; the CUDA libraries are those of torch's own wheels, the driver is the node's.
# docker build -f deploy/engine.Dockerfile --target cpu  -t hybridgate-engine:0.1.0-cpu .
# docker build -f deploy/engine.Dockerfile --target cuda -t hybridgate-engine:0.1.0-cuda .
ARG BASE=debian:bookworm-20250520-slim

FROM ${BASE} AS python
ARG DEBIAN=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONHASHSEED=0 KEEP_SETUPTOOLS=1
COPY deploy/debian.sh deploy/finish.sh /usr/local/bin/
RUN debian.sh "${DEBIAN}" python3 python3-venv
WORKDIR /src
RUN python3 -m venv /opt/hybridgate
COPY requirements/build.txt requirements/engine-cpu.txt requirements/engine-cuda.txt requirements/
RUN /opt/hybridgate/bin/pip install --quiet --no-compile --no-deps --require-hashes --target /opt/build -r requirements/build.txt

FROM python AS build-cpu
ARG TORCH=https://download.pytorch.org/whl/cpu
RUN /opt/hybridgate/bin/pip install --quiet --no-compile --only-binary :all: --extra-index-url "${TORCH}" --require-hashes -r requirements/engine-cpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
COPY local_engine local_engine
COPY policies policies
RUN PYTHONPATH=/opt/build /opt/hybridgate/bin/pip install --quiet --no-compile --no-deps --no-build-isolation . \
 && finish.sh /opt/hybridgate gateway hybridgate

FROM python AS build-cuda
RUN /opt/hybridgate/bin/pip install --quiet --no-compile --only-binary :all: --require-hashes -r requirements/engine-cuda.txt
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
COPY local_engine local_engine
COPY policies policies
RUN PYTHONPATH=/opt/build /opt/hybridgate/bin/pip install --quiet --no-compile --no-deps --no-build-isolation . \
 && finish.sh /opt/hybridgate gateway hybridgate

FROM ${BASE} AS runtime
ARG DEBIAN=
COPY deploy/debian.sh /tmp/
RUN /tmp/debian.sh "${DEBIAN}" python3 libgomp1 && groupadd --gid 10001 hybridgate \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin hybridgate \
 && rm /tmp/debian.sh /etc/passwd- /etc/group- /etc/shadow- /etc/gshadow-
ENV PATH=/opt/hybridgate/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp HF_HOME=/models PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
EXPOSE 8000
CMD ["hybridgate-engine", "serve", "--host", "0.0.0.0", "--port", "8000"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/hybridgate /opt/hybridgate
USER 10001:10001

FROM runtime AS cuda
ARG DEBIAN=
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY deploy/debian.sh /tmp/
# With the C compiler Triton builds what launches its kernels, at start, below HOME.
RUN /tmp/debian.sh "${DEBIAN}" gcc libc6-dev python3-dev && rm /tmp/debian.sh
COPY --from=build-cuda /opt/hybridgate /opt/hybridgate
USER 10001:10001
