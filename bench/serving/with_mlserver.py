"MLServer: a runtime of one's own, in the server's process, images as base64 strings of the Open Inference Protocol."
import json

from engine import Engine
from mlserver import MLModel
from mlserver.codecs import StringCodec


class Plain(MLModel):
    async def load(self) -> bool:
        self.engine = Engine()
        return True

    async def predict(self, payload):
        from asyncio import get_running_loop

        from mlserver.types import InferenceResponse
        text = payload.inputs[0].data.root[0]
        said = await get_running_loop().run_in_executor(None, self.engine.predict_base64, text)
        return InferenceResponse(model_name=self.name, outputs=[StringCodec.encode_output("said", [json.dumps(said)])])
