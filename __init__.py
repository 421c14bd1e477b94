"""onnxpress: PyTorch Transformers to verified ONNX artifacts, and a small runtime."""
