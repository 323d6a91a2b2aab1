"""Batch norms in other libraries and formats: ONNX, Keras, Flax, exporters."""
