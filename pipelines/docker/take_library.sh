#!/bin/sh
# Moves the libraries out of a folder of Python packages, with the licenses they come under, to where lookalike finds them beside itself:
# onnxruntime/capi, and for CUDA nvidia/*/lib. What is for Python alone stays behind.
set -eu
packages=$1 library=$2
mkdir -p "$library/onnxruntime/capi"
mv "$packages"/onnxruntime/capi/libonnxruntime* "$library/onnxruntime/capi"
mv "$packages"/onnxruntime/LICENSE "$packages"/onnxruntime/ThirdPartyNotices.txt "$library/onnxruntime"
if [ -d "$packages/nvidia" ]; then
	find "$packages/nvidia" -type d \( -name include -o -name __pycache__ \) -prune -exec rm -r {} +
	mv "$packages/nvidia" "$library/nvidia"
	for license in "$packages"/nvidia_*.dist-info; do
		mv "$license" "$library"
	done
fi
rm -r "$packages"
