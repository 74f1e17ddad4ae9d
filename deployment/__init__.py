"""A trained model where there is no torch: what ONNX can say of a SpikeLM, and whether it computes the same."""
