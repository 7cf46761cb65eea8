"LitServe, with images as base64 in JSON as in its examples."
import sys

import litserve
from engine import Engine


class Plain(litserve.LitAPI):
    def setup(self, device): self.engine = Engine()
    def decode_request(self, request): return request["image"]
    def predict(self, text): return self.engine.predict_base64(text)
    def encode_response(self, output): return output


if __name__ == "__main__": litserve.LitServer(Plain(), accelerator="cpu", workers_per_device=1, timeout=60).run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
