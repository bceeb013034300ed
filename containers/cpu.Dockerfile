# trt-kd with all that the quickstart needs, on the CPU build of torch.
# Build from the repository's root: docker build -f containers/cpu.Dockerfile -t trt-kd:cpu .
# pip's default index brings torch with several GB of CUDA libraries on x86-64; where you have an
# index of CPU builds, name it: --build-arg TORCH_INDEX=URL
FROM python:3.12-slim

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1

# OpenMP for torch and onnxruntime; gcc for the one dependency that is built from source
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential libgomp1 make \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/trt-kd
COPY containers/constraints.txt containers/teacher-requirements.txt containers/
ARG TORCH_INDEX=""
RUN pip install --no-deps --require-hashes -r containers/teacher-requirements.txt \
 && pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
      -c containers/constraints.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY trt_kd trt_kd
COPY workflows workflows
RUN pip install -c containers/constraints.txt '.[quickstart]'

# Runs, caches and models lie under the mounted working folder, whoever the user is
ENV HF_HOME=/workspace/.cache/huggingface HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
WORKDIR /workspace
CMD ["trt-kd", "--help"]
