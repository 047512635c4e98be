"""Models of timm with random weights, saved as timm saves them and read from the file, give timm's outputs."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import random_params, to_old_naming
from peers import import_timm

from levattn.models import ModelConfig, ViT
from levattn.models.pretrained import Content, LoadOptions, read_pretrained
from levattn.models.pretrained.layouts.timm import LAYOUT, _preprocess
from levattn.models.pretrained.tensors import Tensors
from levattn.models.vit import EncoderBlock

pytestmark = pytest.mark.optin


@pytest.fixture(scope="module")
def timm():
    return import_timm()


def make_model(timm, name, **kwargs):
    """A model whose every parameter is random: where it starts at 0 or 1, a mistake would not show."""
    import torch

    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As large as this, the branches matter beside the residual stream, and the positions beside the patches.
            parameter += (0.5 if "gamma" in name or "pos_embed" in name else 0.05) * torch.randn_like(parameter)
    return model


def block_outputs(model, images):
    """The tokens after each of timm's blocks, and its logits."""
    import torch

    outputs = []
    hooks = [block.register_forward_hook(lambda _, __, out: outputs.append(out.numpy())) for block in model.blocks]
    with torch.no_grad():
        logits = model(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    for hook in hooks:
        hook.remove()
    return outputs, logits


def assert_same_outputs(pretrained, model, *, channels=3):
    """Logits equal those of timm's model; if not, says which block is the first to differ."""
    size = pretrained.preprocess.image_size
    images = np.random.default_rng(0).uniform(-1, 1, (1, size, size, channels)).astype(np.float32)
    expected, expected_logits = block_outputs(model, images)
    logits, state = jax.jit(
        lambda params: ViT(pretrained.model).apply(
            {"params": params},
            jnp.asarray(images),
            capture_intermediates=lambda module, _: isinstance(module, EncoderBlock),
            mutable=["intermediates"],
        )
    )(pretrained.params)
    blocks = state["intermediates"]["Transformer"]
    for layer, tokens in enumerate(expected):
        ours = np.asarray(blocks[f"encoderblock_{layer}"]["__call__"][0])
        scale = np.abs(tokens).max()
        error = np.abs(ours - tokens).max() / scale
        assert error < 1e-4, f"block {layer} is the first to differ: by {error:.1e} of {scale:.1e}"
    scale = max(1, np.abs(expected_logits).max())
    np.testing.assert_allclose(
        logits / scale, expected_logits / scale, atol=1e-4, err_msg="blocks agree, logits do not"
    )
    assert np.std(expected_logits) > 1e-2


def save(model, folder, kind):
    import safetensors.torch
    import torch

    if kind == "torch":
        path = folder / f"{model.pretrained_cfg['architecture']}.pth"
        torch.save({"model": model.state_dict(), "epoch": 3, "lr": 0.1}, path)
    else:  # as on the hub: the weights, and what they are of in a config beside them
        path = folder / "model.safetensors"
        safetensors.torch.save_file(model.state_dict(), path, metadata={"format": "pt"})
        cfg = {key: value for key, value in model.pretrained_cfg.items() if key in ("mean", "std", "crop_pct", "tag")}
        cfg["input_size"] = model.pretrained_cfg["input_size"]
        config = {"architecture": model.pretrained_cfg["architecture"], "pretrained_cfg": cfg}
        (folder / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    "name, kind",
    [
        ("vit_small_patch16_224", "torch"),
        ("vit_base_patch16_224", "safetensors"),
        ("vit_base_patch32_224", "torch"),
        ("vit_large_patch16_224", "safetensors"),
        ("vit_base_patch16_224_miil", "safetensors"),  # no biases for queries, keys and values
        ("deit_tiny_distilled_patch16_224", "torch"),
        ("deit3_small_patch16_224", "safetensors"),  # LayerScale, no position for the class token
        ("vit_little_patch16_reg4_gap_256", "safetensors"),  # registers and no class token, LayerNorm after pooling
        ("vit_so150m_patch16_reg4_gap_256", "torch"),  # registers with positions, LayerNorm before pooling
        ("vit_so150m_patch16_reg4_map_256", "safetensors"),  # attention pooling that leaves registers out
        ("vit_base_patch32_siglip_256", "safetensors"),
        ("vit_base_patch32_clip_224", "safetensors"),
        ("vit_base_patch32_clip_quickgelu_224", "torch"),
        ("vit_base_patch16_gap_224", "safetensors"),  # 16 heads of 48
        ("test_vit2", "safetensors"),
    ],
)
def test_logits_are_those_of_timm(timm, tmp_path, name, kind):
    model = make_model(timm, name)
    pretrained = read_pretrained(save(model, tmp_path, kind))
    assert pretrained.layout == "timm"
    assert pretrained.preprocess.image_size == model.pretrained_cfg["input_size"][1]
    assert_same_outputs(pretrained, model)


def test_features_of_registers_and_a_class_token(timm, tmp_path):
    model = make_model(timm, "vit_small_patch14_reg4_dinov2", img_size=56)
    pretrained = read_pretrained(save(model, tmp_path, "safetensors"))
    assert (pretrained.head, pretrained.model.num_registers, pretrained.model.pool) == (None, 4, "cls")
    assert_same_outputs(pretrained, model)


def test_what_timms_trainer_saves_is_read_with_what_it_says_beside_the_weights(timm, tmp_path):
    """The average of the weights, the options of the model and the name, from a file whose own name tells nothing."""
    import argparse

    import torch
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = make_model(timm, "deit_tiny_patch16_224", num_heads=6, num_classes=10)
    average = ModelEmaV3(model)
    args = argparse.Namespace(model="deit_tiny_patch16_224", model_kwargs={"num_heads": 6}, mean=None, opt_betas=[0.9])
    folders = {"checkpoint_dir": str(tmp_path), "recovery_dir": str(tmp_path)}
    saver = CheckpointSaver(model, torch.optim.AdamW(model.parameters()), args=args, model_ema=average, **folders)
    saver.save_checkpoint(0, 1.0)
    pretrained = read_pretrained(tmp_path / "model_best.pth.tar")
    assert (pretrained.guessed, pretrained.model.dims.num_heads) == ((), 6)
    assert np.allclose(pretrained.preprocess.mean, model.pretrained_cfg["mean"])
    assert "state_dict_ema are read" in pretrained.notes[0]
    assert_same_outputs(pretrained, average.module.eval())


@pytest.mark.parametrize("size", [160, 384])
def test_another_image_size_is_that_of_timm_after_its_own_resize(timm, tmp_path, size):
    """Down as well as up: the antialiased filter widens when the grid shrinks."""
    path = save(make_model(timm, "vit_small_patch32_224"), tmp_path, "torch")
    overlay = {"file": str(path)}
    other = timm.create_model("vit_small_patch32_224", True, pretrained_cfg_overlay=overlay, img_size=size).eval()
    pretrained = read_pretrained(path, LoadOptions(size))
    np.testing.assert_allclose(
        pretrained.params["pos_embedding"], other.pos_embed.detach().numpy()[:, 1:], rtol=1e-5, atol=1e-6
    )
    assert_same_outputs(pretrained, other)


def test_one_channel(timm, tmp_path):
    model = make_model(timm, "vit_tiny_patch16_224", in_chans=1, num_classes=10)
    assert_same_outputs(read_pretrained(save(model, tmp_path, "torch")), model, channels=1)


def test_class_token_with_pooling_by_average(timm, tmp_path):
    model = make_model(timm, "vit_tiny_patch16_224", global_pool="avg")
    assert_same_outputs(read_pretrained(save(model, tmp_path, "torch")), model)


def test_every_architecture_is_built_as_timm_builds_it_or_refused(timm, tmp_path):
    """Without weights: what is read from names, shapes and the model's name is what timm's modules say of themselves.

    Those refused are listed, so that none is by mistake.
    """
    import torch
    from timm.models._registry import _deprecated_models, _module_to_models

    names = sorted(_module_to_models["vision_transformer"] | _module_to_models["deit"])
    activations = {"GELU": "gelu_exact", "GELUTanh": "gelu", "QuickGELU": "quick_gelu", "SiLU": "swiglu"}
    pools = {"token": "cls", "avg": "gap", "map": "map"}
    refused, wrong = set(), []
    for name in names:
        if name in _deprecated_models:
            continue
        with torch.device("meta"):
            model = timm.create_model(name)
        # Zero strides: no memory.
        arrays = {key: np.broadcast_to(np.float32(0.1), x.shape) for key, x in model.state_dict().items()}
        content = Content(tmp_path / f"{name}.pth", arrays, {})
        tensors = Tensors(arrays)
        try:
            config, _, preprocess, _ = LAYOUT.convert(tensors, content)
            tensors.finish("timm")
        except ValueError as error:
            refused.add(name)
            if "which this project's ViT does not" not in str(error):
                wrong.append(f"{name}: {error}")
            continue
        block = model.blocks[0]
        told = (
            block.attn.num_heads,
            activations[type(block.mlp.act).__name__],
            block.norm1.eps,
            pools[model.global_pool],
            len(model.blocks),
            model.num_classes,
        )
        dims = config.dims
        ours = (
            dims.num_heads,
            config.activation,
            config.layer_norm_eps,
            config.pool,
            dims.depth,
            config.num_classes,
        )
        grid = model.patch_embed.grid_size[0]
        if told != ours or preprocess.image_size != grid * dims.patch:
            wrong.append(f"{name}: {ours} {preprocess.image_size}, timm {told} {grid * dims.patch}")
    assert not wrong, "\n".join(wrong)
    kinds = ("aimv2", "beit3", "_rpn_", "_xp_", "18x2", "radio", "intern", "dwee", "pwee", "dlittle", "test_vit")
    assert refused
    assert {name for name in refused if not any(kind in name for kind in kinds)} == set()


def test_published_models_are_normalised_as_timm_says_by_their_names_alone(timm, tmp_path):
    """Without config.json: the name of the file has to do."""
    from timm.models._registry import _model_pretrained_cfgs, _module_to_models

    names = _module_to_models["vision_transformer"] | _module_to_models["deit"]
    wrong = []
    for name, cfg in _model_pretrained_cfgs.items():
        refused = any(kind in name for kind in ("aimv2", "radio", "beit3"))
        if cfg.architecture not in names or refused or "." not in name or name.endswith(".untrained"):
            continue
        size = cfg.input_size[-1]
        found = _preprocess(size, {}, Content(tmp_path / f"{name}.pth", {}, {}).name)
        if found.resize != max(size, math.floor(size / cfg.crop_pct)):
            wrong.append(f"{name}: {found.resize}, timm {size} of {size / cfg.crop_pct}")
        if not (np.allclose(found.mean, cfg.mean) and np.allclose(found.std, cfg.std)):
            wrong.append(f"{name}: {found.mean}, timm {cfg.mean}")
        if found.interpolation != cfg.interpolation:
            wrong.append(f"{name}: {found.interpolation}, timm {cfg.interpolation}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "name, prefix, kwargs",
    [
        ("vit_tiny_patch16_224", None, {}),
        ("vit_tiny_patch16_224", "params/", {"no_embed_class": True}),
        ("vit_base_patch32_siglip_256", "params/img/", {"num_classes": 7, "embed_dim": 128, "num_heads": 2}),
    ],
    ids=["augreg", "big_vision", "siglip"],
)
def test_npz_files_mean_the_same_to_timms_own_reader(timm, tmp_path, name, prefix, kwargs):
    """An independent reader of the names of vision_transformer and big_vision; both of those have the tanh GELU."""
    model = timm.create_model(name, act_layer="gelu_tanh", **kwargs).eval()
    pool, size = ("map", 256) if "siglip" in name else ("cls", 224)
    sizes = {"width": model.embed_dim, "depth": len(model.blocks), "num_heads": model.blocks[0].attn.num_heads}
    patch, mlp_dim = model.patch_embed.patch_size[0], model.blocks[0].mlp.fc1.out_features
    config = ModelConfig(f"B/{patch}", model.num_classes, **sizes, mlp_dim=mlp_dim, pool=pool)
    params = {
        name: 0.3 * (x - 0.5) + (1 if name.endswith("scale") else 0) for name, x in random_params(config, size).items()
    }
    arrays = to_old_naming(params) if prefix is None else {prefix + name: x for name, x in params.items()}
    np.savez(tmp_path / "vit.npz", **arrays)
    model.load_pretrained(str(tmp_path / "vit.npz"))
    assert_same_outputs(read_pretrained(tmp_path / "vit.npz"), model)
