"""Libraries that round weights and inputs of ONNX files on fixed grids: NNCF and ONNX Runtime."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from converters.exports.onnx.write import save_onnx
from experiments.measured import ABOUT
from experiments.peers.libraries import SCALE_BITS
from sam2jq.data.labeled import LabeledImage
from sam2jq.deploy.engines import open_graph
from sam2jq.deploy.image import OnnxImagePredictor
from sam2jq.eval.image_benchmark import segment_objects
from sam2jq.models.sam2 import SAM2

GRAPHS = ("image_encoder", "prompt_mask_decoder")
Feeds = list[dict[str, np.ndarray]]


def quantized_predictor(
    model: SAM2, params: dict, samples: Sequence[LabeledImage], quantize: Callable, folder: Path
) -> tuple[OnnxImagePredictor, float]:
    """(predictor of both graphs after quantize(file, feeds, quantized file), bits a weight).

    The feeds are the inputs of each graph while the benchmark's prompts are given on `samples`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_onnx(folder, model, params, {"model": ABOUT["model"], "random_weights": False})
    predictor = OnnxImagePredictor(folder, "onnxruntime")
    feeds = record_inputs(predictor, samples)
    paths = [folder / f"quantized_{name}.onnx" for name in GRAPHS]
    for name, path in zip(GRAPHS, paths):
        quantize(folder / f"{name}.onnx", feeds[name], path)
    predictor._encoder, predictor._decoder = (open_graph(path, "onnxruntime") for path in paths)
    return predictor, weight_bits(paths)


def record_inputs(predictor: OnnxImagePredictor, samples: Sequence[LabeledImage]) -> dict[str, Feeds]:
    """{graph: its inputs, call by call} while the benchmark's prompts are given on `samples`."""
    feeds: dict[str, Feeds] = {name: [] for name in GRAPHS}

    def recorded(name: str, run: Callable) -> Callable:
        return lambda inputs: (feeds[name].append(dict(inputs)), run(inputs))[1]

    predictor._encoder = recorded(GRAPHS[0], predictor._encoder)
    predictor._decoder = recorded(GRAPHS[1], predictor._decoder)
    for sample in samples:
        segment_objects(predictor, *sample.read())
    return feeds


def prepared(path: Path) -> Path:
    """The file of a graph after the preparation that both libraries advise, which folds constants and infers shapes.

    The symbolic part of the latter is left out, since it fails on these graphs.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    result = path.with_name(f"prepared_{path.name}")
    quant_pre_process(path, result, skip_symbolic_shape=True)
    return result


def nncf(path: Path, feeds: Feeds, quantized: Path) -> None:
    """`nncf.quantize` with its settings for transformers.

    Its smoothing and its bias correction are left out. They fail on these graphs: "Node MatMul_21_0/MatMulAddFusion
    does not contain input edge connected to 0 port ID", and "list index out of range".
    """
    import nncf
    import onnx
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters

    unsmoothed = AdvancedSmoothQuantParameters(matmul=-1)
    advanced = AdvancedQuantizationParameters(smooth_quant_alphas=unsmoothed, disable_bias_correction=True)
    settings = {"model_type": nncf.ModelType.TRANSFORMER, "advanced_parameters": advanced, "subset_size": len(feeds)}
    onnx.save(nncf.quantize(onnx.load(prepared(path)), nncf.Dataset(feeds), **settings), quantized)


def onnxruntime(path: Path, feeds: Feeds, quantized: Path) -> None:
    """`quantize_static` with a scale for each output channel.

    Biases stay in float32: "Unable to get valid quantization scale for input 'gemm_input_reshape_arg_token_1' when
    quantizing bias".
    """
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.feeds: Iterator = iter(feeds)

        def get_next(self):
            return next(self.feeds, None)

    quantize_static(prepared(path), quantized, Reader(), per_channel=True, extra_options={"QuantizeBias": False})


def weight_bits(paths: Sequence[Path]) -> float:
    """Bits a weight, scales and zero points included, of the matrices in ONNX files that are stored as 8-bit codes."""
    import onnx
    from onnx.numpy_helper import to_array

    weights = stored = 0
    for path in paths:
        graph = onnx.load(path).graph
        arrays = {tensor.name: to_array(tensor) for tensor in graph.initializer}
        for node in graph.node:
            codes = arrays.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
            if codes is None or codes.ndim < 2 or codes.itemsize > 1:
                continue
            scale, *zeros = (arrays[name] for name in node.input[1:])
            zero_bits = sum(8 * zero.size for zero in zeros if np.any(zero))
            weights += codes.size
            stored += 8 * codes.size + SCALE_BITS * scale.size + zero_bits
    return stored / weights
