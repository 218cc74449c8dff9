"""A quantized SAM 2 as ONNX files, built operator by operator from the params tree."""
