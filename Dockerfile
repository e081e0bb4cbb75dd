# syntax=docker/dockerfile:1
# An image that serves a model by the Open Inference Protocol. See docs/how-to/docker.md.
#   docker build --tag trtx-digits .                                       the mock, on any machine
#   docker build --build-arg EXTRAS=serve,rtx,nvml --tag trtx-digits:rtx .  a GPU, with NVIDIA's container toolkit
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY capi capi
COPY trtx_py trtx_py
COPY mock_backend mock_backend
COPY trtx_launch trtx_launch
RUN python -m venv /opt/trtx
ARG EXTRAS=serve,mock
ARG PIP_EXTRA_INDEX_URL=
RUN --mount=type=cache,target=/root/.cache/pip \
    PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL}" /opt/trtx/bin/pip install ".[${EXTRAS}]"

FROM python:${PYTHON}-slim
# The host's libcuda.so and NVML, which the container toolkit brings in
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/opt/trtx/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TRTX_CACHE_DIR=/var/cache/trtx_py
RUN useradd --system --uid 10001 --no-create-home trtx \
    && install --directory --owner=trtx --group=trtx --mode=0700 /var/cache/trtx_py
COPY --from=build /opt/trtx /opt/trtx
COPY examples/digits/digits.onnx /app/digits/digits.onnx
COPY examples/oip_server/server.py /app/oip_server/server.py
USER trtx
WORKDIR /app
VOLUME /var/cache/trtx_py
EXPOSE 8000
STOPSIGNAL SIGTERM
# Building a large model takes longer than the first checks: they count once the server has started.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/live', timeout=2)"]
ENTRYPOINT ["python", "/app/oip_server/server.py", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--drain-s", "30"]
