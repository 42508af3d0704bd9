# The gateway: Debian's Python and what requirements/gateway.txt locks by hash; no compiler, no pip, no torch.
# docker build -f deploy/gateway.Dockerfile -t hybridgate-gateway:0.1.0 .
# For a build that can be repeated bit for bit give BASE with its digest, and DEBIAN=https://snapshot.debian.org/archive/debian/20250520T000000Z.
ARG BASE=debian:bookworm-20250520-slim

FROM ${BASE} AS build
ARG DEBIAN=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONHASHSEED=0
COPY deploy/debian.sh /usr/local/bin/
RUN debian.sh "${DEBIAN}" python3 python3-venv
WORKDIR /src
COPY requirements/gateway.txt requirements/build.txt requirements/
RUN python3 -m venv /opt/hybridgate
RUN /opt/hybridgate/bin/pip install --quiet --no-compile --only-binary :all: --require-hashes -r requirements/gateway.txt
RUN /opt/hybridgate/bin/pip install --quiet --no-compile --no-deps --require-hashes --target /opt/build -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
COPY local_engine local_engine
COPY policies policies
RUN PYTHONPATH=/opt/build /opt/hybridgate/bin/pip install --quiet --no-compile --no-deps --no-build-isolation .
COPY deploy/finish.sh /usr/local/bin/
RUN finish.sh /opt/hybridgate local_engine hybridgate-engine

FROM ${BASE}
ARG DEBIAN=
COPY deploy/debian.sh /tmp/
RUN /tmp/debian.sh "${DEBIAN}" python3 && groupadd --gid 10001 hybridgate \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin hybridgate \
 && rm /tmp/debian.sh /etc/passwd- /etc/group- /etc/shadow- /etc/gshadow-
COPY --from=build /opt/hybridgate /opt/hybridgate
ENV PATH=/opt/hybridgate/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8080 9090
CMD ["hybridgate", "serve"]
