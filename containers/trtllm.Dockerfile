# The deployment stages of trt-kd (plan, export to TensorRT-LLM, benchmark, report) on NVIDIA's
# TensorRT-LLM release image, whose torch, transformers, ModelOpt and TensorRT stay as they are.
# Build from the repository's root: docker build -f containers/trtllm.Dockerfile -t trt-kd:trtllm .
ARG TAG=1.2.1
FROM nvcr.io/nvidia/tensorrt-llm/release:${TAG}

ENV PIP_DISABLE_PIP_VERSION_CHECK=1

# What the image holds becomes the constraint: pip may add packages, never replace one.
# Lines that name a local file or a repository cannot be constraints.
RUN mkdir -p /opt/trt-kd \
 && pip freeze --all | grep -E '^[A-Za-z0-9._-]+==' > /opt/trt-kd/image-constraints.txt

WORKDIR /opt/trt-kd
COPY pyproject.toml README.md LICENSE ./
COPY trt_kd trt_kd
COPY workflows workflows
RUN set -eu; \
    pip install --no-cache-dir -c image-constraints.txt .; \
    pip freeze --all | grep -E '^[A-Za-z0-9._-]+==' > installed.txt; \
    if grep -v -x -F -f installed.txt image-constraints.txt; then \
      echo "the lines above are packages of the image that were replaced" >&2; exit 1; \
    fi

ENV HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
WORKDIR /workspace
