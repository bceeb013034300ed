#!/usr/bin/env bash
# Run a recipe in a container: workflows/run-docker.sh RECIPE [KEY=VALUE...]
#   IMAGE   image to run in                              (default trt-kd:trtllm)
#   GPUS    what docker's --gpus gets; empty for none    (default all)
#   MODELS  folder of models, mounted read-only at its own path
#   HF_HOME, HF_TOKEN, HF_HUB_OFFLINE are passed by name
set -euo pipefail
recipe=${1:?usage: run-docker.sh RECIPE [KEY=VALUE...]}
shift

options=(--rm --ipc=host --ulimit memlock=-1 --ulimit stack=67108864)
options+=(--user "$(id -u):$(id -g)" -v "$PWD:$PWD" -w "$PWD")
options+=(-e HF_HOME -e HF_TOKEN -e HF_HUB_OFFLINE)
if [[ -n ${GPUS-all} ]]; then options+=(--gpus "${GPUS-all}"); fi
if [[ -n ${MODELS-} ]]; then options+=(-v "$MODELS:$MODELS:ro"); fi
if [[ -n ${HF_HOME-} ]]; then options+=(-v "$HF_HOME:$HF_HOME"); fi

exec docker run "${options[@]}" "${IMAGE-trt-kd:trtllm}" trt-kd run "$recipe" "$@"
