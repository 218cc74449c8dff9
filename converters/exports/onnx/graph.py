"""An ONNX graph as it is built: one method call adds one operator, arrays become initializers.

Letters in this folder: B images or objects, H W space, C channels, N tokens; activations are channels last.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

OPSET, IR_VERSION = 21, 10
MICROSOFT = "com.microsoft"  # the domain of the operators that ONNX Runtime and OpenVINO have beside the standard
DTYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64}
Value = str | np.ndarray | int | float  # the name of a tensor, or a constant


class Graph:
    """A graph with inputs {name: (dtype, shape)}; names in a shape are sizes that each call may choose."""

    def __init__(self, inputs: Mapping[str, tuple[str, Iterable[int | str]]]):
        self.inputs = [helper.make_tensor_value_info(k, DTYPES[d], list(shape)) for k, (d, shape) in inputs.items()]
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple, onnx.TensorProto] = {}  # by content: equal arrays are stored once

    def __getattr__(self, operator: str):
        """The method that adds an `operator` of ONNX, `graph.Add(a, b)`, and returns the name of its output."""
        if operator.startswith("_"):
            raise AttributeError(operator)
        return lambda *inputs, **attributes: self.add(operator, *inputs, **attributes)[0]

    def add(self, operator: str, *inputs: Value, outputs: int = 1, domain: str = "", **attributes) -> list[str]:
        """The names of the outputs of a new operator; "" is an input that is left out."""
        names = [f"{operator}_{len(self.nodes)}_{i}" for i in range(outputs)]
        inputs = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        self.nodes.append(helper.make_node(operator, inputs, names, names[0], domain=domain, **attributes))
        return names

    def constant(self, value: np.ndarray | int | float, dtype: int | None = None) -> str:
        """The name of an initializer. Python numbers are int64 or float32; dtype: one of TensorProto for arrays whose
        type numpy lacks, UINT4 and INT4, given as their codes."""
        array = np.asarray(value)
        if isinstance(value, float):
            array = array.astype(np.float32)
        kind = dtype or helper.np_dtype_to_tensor_dtype(array.dtype)
        key = kind, array.shape, array.tobytes()
        if key not in self.constants:
            name = f"constant_{len(self.constants)}"
            content = pack4(array) if dtype in (TensorProto.UINT4, TensorProto.INT4) else array.tobytes()
            self.constants[key] = helper.make_tensor(name, kind, array.shape, content, raw=True)
        return self.constants[key].name

    def reshape(self, x: str, *shape: int) -> str:
        """x in a new shape; 0: the size as in x at the same place, -1: the rest."""
        return self.Reshape(x, np.array(shape))

    def transpose(self, x: str, *order: int) -> str:
        return self.Transpose(x, perm=order)

    def size(self, x: str, axis: int) -> str:
        """int64 [1]: the size of an axis that is known when the graph runs."""
        return self.Shape(x, start=axis, end=axis + 1)

    def slice(self, x: str, start: Value, end: Value, axis: int) -> str:
        """x[start:end] along an axis; start and end are whole numbers or int64 [1]."""
        ends = [x if isinstance(x, str) else np.array([x]) for x in (start, end)]
        return self.Slice(x, *ends, np.array([axis]))

    def write(self, path: Path, name: str, outputs: Mapping[str, str]) -> None:
        """Writes the graph as a file; outputs: {name of an output: the float32 tensor that it is}."""
        named = [helper.make_node("Identity", [tensor], [output]) for output, tensor in outputs.items()]
        results = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in outputs]
        graph = helper.make_graph(self.nodes + named, name, self.inputs, results, list(self.constants.values()))
        domains = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        onnx.save_model(helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSION), path)


def pack4(codes: np.ndarray) -> bytes:
    """Two codes of 4 bits a byte, the first in the low bits, as ONNX stores UINT4 and INT4."""
    flat = codes.reshape(-1).view(np.uint8) & 15
    flat = np.pad(flat, (0, len(flat) % 2))
    return (flat[::2] | flat[1::2] << 4).tobytes()
