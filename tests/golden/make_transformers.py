"""Writes transformers_vit.json: what the transformers library makes of small models with weights that NumPy draws.

    python tests/golden/make_transformers.py        # needs torch and transformers

Run it again, and look at what changed, only if a family is added or a case is changed.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy

sys.path.insert(0, str(Path(__file__).parents[1]))
from peers import import_transformers
from reference_vit import golden_arrays, golden_images

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
MLP = SIZES | {"intermediate_size": 48}
DINO = SIZES | {"mlp_ratio": 2}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 3}
TEXT |= {"max_position_embeddings": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
# Class of the model, fields of its config, and what is looked at.
CASES = [
    ("ViTForImageClassification", MLP | {"num_labels": 5}, "logits"),
    ("ViTForImageClassification", MLP | {"qkv_bias": False, "hidden_act": "gelu_new"}, "logits"),
    ("ViTModel", MLP, "pooler_output"),
    ("DeiTForImageClassification", MLP, "logits"),
    ("DeiTForImageClassificationWithTeacher", MLP | {"num_labels": 3}, "logits"),
    ("Dinov2Model", DINO, "pooler_output"),
    ("Dinov2Model", DINO | {"use_swiglu_ffn": True}, "pooler_output"),
    ("Dinov2ForImageClassification", DINO, "logits"),
    ("Dinov2WithRegistersModel", DINO, "pooler_output"),
    ("Dinov2WithRegistersForImageClassification", DINO, "logits"),
    ("CLIPModel", {"vision_config": MLP, "text_config": TEXT, "projection_dim": 6}, "image_features"),
    ("CLIPVisionModel", MLP, "pooler_output"),
    ("CLIPVisionModelWithProjection", MLP | {"projection_dim": 6, "hidden_act": "gelu"}, "image_embeds"),
    ("SiglipVisionModel", MLP, "pooler_output"),
    ("SiglipModel", {"vision_config": MLP, "text_config": TEXT}, "image_features"),
]


def make_case(transformers, name: str, fields: dict, output: str) -> dict:
    import torch

    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model_class(model_class.config_class(**fields)).save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        shapes = {key: list(array.shape) for key, array in safetensors.numpy.load_file(file).items()}
        safetensors.numpy.save_file(golden_arrays(shapes), file, {"format": "pt"})
        model = model_class.from_pretrained(folder).eval().double()
        config = json.loads((Path(folder) / "config.json").read_text())
    outputs = {}
    for size in (16, 24):
        images = torch.from_numpy(golden_images(size).transpose(0, 3, 1, 2))
        kwargs = {} if "Dinov2" in name or size == 16 else {"interpolate_pos_encoding": True}
        with torch.no_grad():
            if output == "image_features":
                found = model.get_image_features(images, **kwargs)
                found = found if torch.is_tensor(found) else found.pooler_output
            else:
                found = getattr(model(images, **kwargs), output)
        outputs[size] = np.round(found.numpy(), 7).tolist()
    return {"model": name, "config": config, "shapes": shapes, "outputs": outputs}


def main() -> None:
    transformers = import_transformers()
    cases = [make_case(transformers, *case) for case in CASES]
    lines = ",\n".join(json.dumps(case) for case in cases)
    source = f"transformers {transformers.__version__}, in float64"
    file = Path(__file__).with_name("transformers_vit.json")
    file.write_text(
        f'{{"source": "{source}", "made_by": "tests/golden/make_transformers.py", "cases": [\n{lines}\n]}}\n'
    )


if __name__ == "__main__":
    main()
