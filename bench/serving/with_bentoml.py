"Plain BentoML: raw bytes in (its cheapest way), eight threads."
import bentoml
from engine import Engine


@bentoml.service(threads=8, traffic={"timeout": 60})
class Plain:
    def __init__(self): self.engine = Engine()

    @bentoml.api
    def predict(self, data: bytes, /) -> dict: return self.engine.predict(data)
