"MLflow's pyfunc, as code, for `mlflow models serve`."
import mlflow
from engine import Engine


class Plain(mlflow.pyfunc.PythonModel):
    def load_context(self, context): self.engine = Engine()
    def predict(self, context, model_input, params=None): return [self.engine.predict_base64(text) for text in model_input["image"]]


mlflow.models.set_model(Plain())
