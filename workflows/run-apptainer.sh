#!/usr/bin/env bash
# Run a recipe in a container: workflows/run-apptainer.sh RECIPE [KEY=VALUE...]
#   IMAGE   image file to run in                         (default trt-kd.sif)
#   MODELS  folder of models, bound read-only at its own path
#   HF_HOME, HF_TOKEN, HF_HUB_OFFLINE are passed through the environment
set -euo pipefail
recipe=${1:?usage: run-apptainer.sh RECIPE [KEY=VALUE...]}
shift

options=(--nv --cleanenv --no-home --writable-tmpfs --bind "$PWD:$PWD" --pwd "$PWD")
if [[ -n ${MODELS-} ]]; then options+=(--bind "$MODELS:$MODELS:ro"); fi
if [[ -n ${HF_HOME-} ]]; then options+=(--bind "$HF_HOME:$HF_HOME"); fi

# The image is read-only: every cache lies in the working folder.
mkdir -p "$PWD/.cache"
export APPTAINERENV_HF_HOME="${HF_HOME-$PWD/.cache/huggingface}"
export APPTAINERENV_XDG_CACHE_HOME="$PWD/.cache"
export APPTAINERENV_TRITON_CACHE_DIR="$PWD/.cache/triton"
export APPTAINERENV_TORCHINDUCTOR_CACHE_DIR="$PWD/.cache/inductor"
export APPTAINERENV_FLASHINFER_WORKSPACE_BASE="$PWD/.cache/flashinfer"
for name in HF_TOKEN HF_HUB_OFFLINE CUDA_VISIBLE_DEVICES; do
  if [[ -n ${!name-} ]]; then export "APPTAINERENV_$name=${!name}"; fi
done

exec apptainer exec "${options[@]}" "${IMAGE-trt-kd.sif}" trt-kd run "$recipe" "$@"
