"""Exchanging batch norms with other libraries and formats: ONNX, Keras, Flax, exporters."""
