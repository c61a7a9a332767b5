"""Classify pictures with an exported network, without this project: python use_onnx.py NETWORK.onnx PICTURE..."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1])
known = session.get_modelmeta().custom_metadata_map
classes, (channels, height, width) = json.loads(known["classes"]), json.loads(known["image_shape"])
for path in sys.argv[2:]:
    picture = ImageOps.exif_transpose(Image.open(path)).convert("L" if channels == 1 else "RGB")
    picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)  # as `prepare` resizes
    pixels = np.asarray(picture, np.float32).reshape(height, width, channels).transpose(2, 0, 1) / 255
    logits = session.run(["logits"], {"pixels": pixels[None]})[0][0]
    probability = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    print(f"{path}: {classes[logits.argmax()]} ({probability.max():.0%})")
