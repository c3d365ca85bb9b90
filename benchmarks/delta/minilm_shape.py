"""The shape of MiniLM-L6 (Wang et al., "MiniLM", 2020): what its torch form and its ONNX form must agree on."""

HEADS = 12
LAYERS = 6
HIDDEN = 384
LAYER_NORM_EPSILON = 1e-12
