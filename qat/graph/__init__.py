"""ONNX to ONNX, without PyTorch: read a graph, look along its edges, run it, check it, change its types, simplify it."""
