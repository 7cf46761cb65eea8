"What every server of bench/serve.py does with an image: the same decode, the same ONNX file, the same options of ONNX Runtime."
import base64
import io
import os

import numpy as np
import onnxruntime as ort
from PIL import Image


class Engine:
    "A graph that takes uint8 (N, S, S, 3) and gives logits (N, K); one thread an image."

    def __init__(self, path=None):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with open(path or os.environ["BENCH_ONNX"], "rb") as file: self.session = ort.InferenceSession(file.read(), options, providers=["CPUExecutionProvider"])
        self.size = self.session.get_inputs()[0].shape[1]

    def predict(self, data: bytes) -> dict:
        "Label, confidence and all scores of one file."
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
        logits = self.session.run(["logits"], {"images": np.asarray(image)[None]})[0][0]
        powers = np.exp(logits - logits.max())
        scores = powers/powers.sum()
        best = int(scores.argmax())
        return {"label": f"class {best}", "confidence": float(scores[best]), "scores": scores.tolist()}

    def predict_base64(self, text: str) -> dict:
        "The same of a file as base64, for servers that take JSON."
        return self.predict(base64.b64decode(text))
