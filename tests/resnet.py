"ResNet-18 (He et al., 2016) as one ONNX graph with random weights, batch norm folded: what is measured is speed, so nobody needs torch or a download."
import numpy as np
from onnx import TensorProto, helper, numpy_helper


class Graph:
    "Nodes and weights as they come."

    def __init__(self): self.nodes, self.weights, self.rng, self.count = [], [], np.random.default_rng(0), 0

    def add(self, kind: str, *inputs: str, **options) -> str:
        self.count += 1
        self.nodes.append(helper.make_node(kind, list(inputs), [f"x{self.count}"], **options))
        return f"x{self.count}"

    def hold(self, value: np.ndarray) -> str:
        self.count += 1
        self.weights.append(numpy_helper.from_array(value.astype(np.float32), f"w{self.count}"))
        return f"w{self.count}"

    def conv(self, x: str, taken: int, given: int, side: int, stride: int = 1) -> str:
        "He's initialisation."
        weight = self.hold(self.rng.normal(0, (2/(taken*side**2))**.5, (given, taken, side, side)))
        return self.add("Conv", x, weight, self.hold(np.zeros(given)), kernel_shape=[side]*2, strides=[stride]*2, pads=[side//2]*4)

    def block(self, x: str, taken: int, given: int, stride: int) -> str:
        y = self.conv(self.add("Relu", self.conv(x, taken, given, 3, stride)), given, given, 3)
        y = self.add("Mul", y, self.hold(np.array(.5)))     # keeps the sums of random blocks small
        if stride != 1 or taken != given: x = self.conv(x, taken, given, 1, stride)
        return self.add("Relu", self.add("Add", x, y))


def make_resnet18(classes: int = 1000, size: int = 224):
    "Images uint8 (N, size, size, 3) → logits (N, classes), embedding (N, 512)."
    g = Graph()
    x = g.add("Mul", g.add("Sub", g.add("Cast", "images", to=TensorProto.FLOAT), g.hold(np.array([123.675, 116.28, 103.53]))), g.hold(1/np.array([58.395, 57.12, 57.375])))
    x = g.add("Relu", g.conv(g.add("Transpose", x, perm=[0, 3, 1, 2]), 3, 64, 7, 2))
    x = g.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1]*4)
    taken = 64
    for given, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)): x, taken = g.block(x, taken, given, stride), given
    g.nodes.append(helper.make_node("Flatten", [g.add("GlobalAveragePool", x)], ["embedding"]))
    g.nodes.append(helper.make_node("Gemm", ["embedding", g.hold(g.rng.normal(0, .02, (512, classes))), g.hold(np.zeros(classes))], ["logits"]))
    ends = [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", size, size, 3]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes]), helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 512])]
    return helper.make_model(helper.make_graph(g.nodes, "resnet18", ends[:1], ends[1:], g.weights), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
