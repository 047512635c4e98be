"""State dicts of timm's VisionTransformer, which DeiT, DINO, MAE and MoCo v3 name their parameters after too.

Names and shapes do not tell the number of heads, the activation and the normalisation of images. These come, the first
that there is, from the name of a published model that is given, from timm's `config.json` beside the file, from what a
training script left beside the weights, and from the name of the file, as timm's own definitions have them.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from levattn.models.config import ModelConfig
from levattn.models.pretrained.encoder import Names, attention, dense, layer_norm, mlp, read_encoder
from levattn.models.pretrained.hub_config import CLIP, IMAGENET
from levattn.models.pretrained.layout import Content, ImageSize, Layout, Preprocess, sides_of
from levattn.models.pretrained.tensors import Tensors

_PATCHES = "patch_embed.proj.weight"
# Of a model and its moving average in one file, the one that is evaluated.
_PREFERRED = ("base_encoder.", "teacher.")
# Names of which the patterns below tell all that is to be told: timm's, and those that the authors' files go by.
_PUBLISHED = re.compile(
    r"(vit|deit3?|eva)_\w*patch\d+|flexivit_(small|base|large)|test_vit|deit_3_|mae_(pretrain|finetuned)_vit|dino_(deit|vit)"
)
# Of models whose images are no squares the name has height and width: patch16_1024_128, patch16_128x512.
_RECTANGLE = re.compile(r"_(\d{2,4})[x_](\d{2,4})(?!\d)")
_WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024}
_OTHER_TASKS = ("mask_token", "decoder_*")

_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_NORMALISATIONS = (  # the first pattern that the name holds
    (r"miil|tips", {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
    (r"large_patch14_clip_\d+\.laion2b", _HALF),
    (r"clip|bamboo|eva_", CLIP),
    (r"dino|deit|mae\b|mae_|moco|ijepa|intern", IMAGENET),
    ("", _HALF),
)
# Share of the short side that is cut out, the first pattern that the name holds; None: by the size of images.
_CROPS = (
    (r"miil", 0.875),
    (r"so400m_patch14_siglip_gap_(378\.webli|384|448|896)|siglip_378\.webli_ft_in1k", 1.0),
    (r"siglip", 0.9),
    (r"so150m2", 1.0),
    (r"flexivit|test_vit|_gap_256\.(sbb|sw)|medium_patch16_gap_(240|384)", 0.95),
    (r"base_patch16_clip_224\.\w+_ft_in12k_in1k|base_patch\d+_clip_384\.openai_ft_in12k_in1k", 0.95),
    (r"base_patch16_clip_(quickgelu_)?224\.(openai|laion2b_ft_in12k$)|tinyclip", 0.9),
    (r"base_patch32_clip_(quickgelu_)?224\.(openai|laion)", 0.9),
    (r"clip_|deit3\w*\.fb_in22k_ft_in1k|dinov2|tips|bamboo|eva_large|radio", 1.0),
    (r"$", None),
)
_PROJECTIONS = (512, 640, 768, 896, 1024, 1152, 1280, 1664)  # Widths of what CLIP compares images and texts by.
# Weights that OpenAI, Meta and Apple trained with quick GELU, under names of timm whose models have the exact one.
_QUICK_GELU = (
    r"quickgelu|_clip_\d+\.(openai|metaclip_400m|metaclip_2pt5b|dfn5b)$|huge_patch14_clip_224\.metaclip2_worldwide$"
    r"|large_patch14_clip_224\.dfn2b$|base_patch32_clip_224\.laion400m_e32$"
)
_TANH_GELU = r"(patch32|so400m_patch16|giantopt_patch16)_siglip|large_patch16_siglip_(gap_)?512"
_ACTIVATIONS = {"gelu": "gelu_exact", "gelu_tanh": "gelu", "quick_gelu": "quick_gelu"}
_HEADS = ((r"giantopt|vit_base_patch16_gap_224", 16), (r"test_vit2?\b", 2), (r"test_vit3", 3))  # where not 64 wide
_POOLS = {"token": "cls", "avg": "gap", "map": "map"}

_REFUSED = {  # in the first block or outside of the blocks
    "patch_embed.backbone.*": "a convolutional stem",
    "patch_embed.norm.*": "a norm in its patch embedding",
    "blocks.0.attn.[qk]_norm.*": "normalised queries and keys",
    "blocks.0.attn.norm.*": "a norm inside its attention",
    "blocks.0.mlp.norm.*": "a norm inside its MLPs",
    "blocks.0.attn.lambda_q1": "differential attention",
    "blocks.0.attn.q_bias": "rotary or relative positions (EVA, BEiT)",
    "blocks.0.attn.q_proj.*": "rotary positions (EVA)",
    "*relative_position_bias_table": "relative positions",
    "blocks.0.attns.*": "parallel branches in a block",
    "blocks.0.in_proj.*": "attention and MLP in parallel",
    "blocks.0.mlp.fc1_g.*": "gated MLPs with two first layers",
    "blocks.0.0.*": "stages",
}


def convert(tensors: Tensors, content: Content) -> tuple[ModelConfig, dict[str, np.ndarray], Preprocess, str | None]:
    """See `Layout`. What lies beside the image encoder (a text tower, a projector, a momentum copy) is left out."""
    at = _prefix(content)
    config, name = _config(content)
    _check_arch(tensors, at, content)
    _refuse(tensors, at, content, config, name)
    tensors.ignore(*(at + pattern for pattern in _OTHER_TASKS))
    tensors.ignore(*(other for other in content.arrays if not other.startswith(at)))

    args = config.get("model_args", {})
    names, num_heads = _names(tensors, at), args.get("num_heads")
    num_heads = num_heads or next((heads for pattern, heads in _HEADS if re.search(pattern, name)), None)
    first, second = (tensors.shape(f"{at}blocks.0.{layer}.weight") for layer in names.mlp)
    swiglu = first[0] == 2 * second[1]
    is_published = _PUBLISHED.search(name)
    encoder = read_encoder(
        tensors,
        names,
        at=at,
        num_heads=num_heads,
        image_size=args.get("img_size"),
        possible_sizes=(_input_size(config), *_rectangles(name), None if is_published else content.options.rectangle),
        swiglu=swiglu,
    )
    if not is_published:
        tensors.guess(*_guesses(config, swiglu=swiglu, is_size_told=encoder.is_told))
    params, width = dict(encoder.params), encoder.width
    fields = encoder.fields | {
        "activation": "swiglu" if swiglu else _activation(config, name),
        "layer_norm_eps": 1e-5 if names.pre_norm else 1e-6,  # timm's models of CLIP have that of PyTorch
        "pool": _pool(tensors, at, config),
        "class_token": names.class_token is not None,
        "final_norm": "pooled" if names.last_norm == "fc_norm" else "tokens",
        "num_classes": 0,
    }
    if names.last_norm == "fc_norm":
        for part in ("scale", "bias"):
            params[f"fc_norm/{part}"] = params.pop(f"Transformer/encoder_norm/{part}")
    if "dist_token" in encoder.tokens:
        fields["distilled"], params["dist"] = True, encoder.tokens["dist_token"]
    if "reg_token" in encoder.tokens:
        params["registers"] = encoder.tokens["reg_token"]
        fields["num_registers"] = params["registers"].shape[1]
    if fields["pool"] == "map":
        params |= _attention_pool(tensors, f"{at}attn_pool.", width, encoder.num_heads, encoder.mlp_dim)
    if f"{at}pre_logits.fc.weight" in tensors:
        fields["rep_size"] = tensors.shape(f"{at}pre_logits.fc.weight")[0]
        params |= dense(tensors, f"{at}pre_logits.fc", "pre_logits", width, fields["rep_size"])
    head = None
    if f"{at}head.weight" in tensors:
        fields["num_classes"] = tensors.shape(f"{at}head.weight")[0]
        params |= dense(tensors, f"{at}head", "head", fields.get("rep_size", width), fields["num_classes"])
        # Towers of CLIP have their projection there, to which timm gives a bias of zeros; so may a classifier.
        head = "classifier"
        if names.pre_norm and not np.any(params["head/bias"]) and _projects(fields["num_classes"], name):
            head = "projection"
            if not _PUBLISHED.search(name):
                tensors.guess("head")
    if f"{at}head_dist.weight" in tensors:
        params |= dense(tensors, f"{at}head_dist", "head_dist", width, fields["num_classes"])
    return ModelConfig(**fields), params, _preprocess(encoder.image_size, config, name), head


def _names(tensors: Tensors, at: str) -> Names:
    deit3 = f"{at}blocks.0.gamma_1" in tensors  # as its authors name what timm calls ls1
    return Names(
        patches="patch_embed.proj",
        class_token="cls_token" if f"{at}cls_token" in tensors else None,
        more_tokens=("dist_token", "reg_token"),
        positions="pos_embed",
        layer="blocks.",
        norms=("norm1", "norm2"),
        qkv=("attn.qkv.",),
        out="attn.proj",
        mlp=("mlp.fc1", "mlp.fc2"),
        scales=("gamma_1", "gamma_2") if deit3 else ("ls1.gamma", "ls2.gamma"),
        pre_norm="norm_pre" if f"{at}norm_pre.weight" in tensors else None,
        class_position=False,
        last_norm="fc_norm" if f"{at}fc_norm.weight" in tensors else "norm",
    )


def _attention_pool(tensors: Tensors, at: str, width: int, num_heads: int, mlp_dim: int) -> dict[str, np.ndarray]:
    attention_target = "MAPHead_0/MultiHeadDotProductAttention_0"
    return {
        "MAPHead_0/probe": tensors.take(f"{at}latent", (1, 1, width)),
        **attention(tensors, (f"{at}q.", f"{at}kv."), f"{at}proj", attention_target, width, num_heads),
        **layer_norm(tensors, f"{at}norm", "MAPHead_0/LayerNorm_0", width),
        **mlp(tensors, (f"{at}mlp.fc1", f"{at}mlp.fc2"), "MAPHead_0/MlpBlock_0", width, mlp_dim),
    }


def _pool(tensors: Tensors, at: str, config: Mapping[str, Any]) -> str:
    if f"{at}attn_pool.latent" in tensors:
        return "map"
    averages = f"{at}cls_token" not in tensors or f"{at}fc_norm.weight" in tensors
    return _POOLS[_global_pool(config) or ("avg" if averages else "token")]


def _activation(config: Mapping[str, Any], name: str) -> str:
    if "act_layer" in config.get("model_args", {}):
        return _ACTIVATIONS[config["model_args"]["act_layer"]]
    if re.search(_QUICK_GELU, name):
        return "quick_gelu"
    return "gelu" if re.search(_TANH_GELU, name) else "gelu_exact"


def _input_size(config: Mapping[str, Any]) -> list[int] | None:
    """Height and width of the images in timm's config, if it has them."""
    size = config.get("pretrained_cfg", config).get("input_size")
    return size and size[1:]


def _rectangles(name: str) -> list[tuple[int, int]]:
    return [tuple(map(int, found.groups())) for found in _RECTANGLE.finditer(name)]


def _preprocess(image_size: ImageSize, config: Mapping[str, Any], name: str) -> Preprocess:
    trained = next(both for pattern, both in _NORMALISATIONS if re.search(pattern, name))
    trained = trained | config.get("pretrained_cfg", config)
    side = min(sides_of(image_size))
    input_side = min(_input_size(config) or (side,))
    by_name = next(share for pattern, share in _CROPS if re.search(pattern, name))
    crop_share = trained.get("crop_pct") or by_name or (0.9 if input_side < 256 else 1.0)
    bilinear = trained.get("interpolation", "bilinear" if "miil" in name else "bicubic") == "bilinear"
    return Preprocess(
        image_size=image_size,
        resize=max(side, math.floor(input_side / crop_share)),
        interpolation="bilinear" if bilinear else "bicubic",
        mean=tuple(map(float, trained["mean"])),
        std=tuple(map(float, trained["std"])),
    )


def _config(content: Content) -> tuple[Mapping[str, Any], str]:
    """timm's own config, and the model's name as "architecture.tag", or what the file is called."""
    if content.options.arch:
        return {}, content.options.arch.rpartition("/")[2]
    config = content.metadata.get("config", {})
    if "architecture" not in config and "model_args" not in config:
        return _left_by_training(content)
    tag = config.get("pretrained_cfg", config).get("tag")
    return config, ".".join(filter(None, (config.get("architecture", content.name), tag)))


def _left_by_training(content: Content) -> tuple[Mapping[str, Any], str]:
    """What a training script saved beside the weights, in the form of a `config.json`; the name that it says."""
    training = content.metadata.get("training", {})
    args = training.get("args", {})
    name = next(
        (name for name in (training.get("arch"), args.get("model")) if name and _PUBLISHED.search(str(name))),
        content.name,
    )
    cfg = {key: args[key] for key in ("mean", "std", "crop_pct", "interpolation", "input_size") if args.get(key)}
    if cfg.get("interpolation") == "random":  # of training alone
        del cfg["interpolation"]
    if not isinstance(cfg.get("input_size"), list):  # DeiT's own script has a number
        cfg.pop("input_size", None)
    config = {"model_args": args.get("model_kwargs") or {}, "pretrained_cfg": cfg} if args else {}
    return config, str(name).rpartition("/")[2]


def _guesses(config: Mapping[str, Any], *, swiglu: bool, is_size_told: bool) -> list[str]:
    """What no published name tells, and the config does not either."""
    if "architecture" in config:
        return []
    args, cfg = config.get("model_args", {}), config.get("pretrained_cfg", config)
    told = {
        "heads": "num_heads" in args,
        "activation": swiglu or "act_layer" in args,
        "shape of images": is_size_told,
        "mean and std": cfg.keys() >= {"mean", "std"},
        "resize": cfg.keys() >= {"crop_pct", "interpolation"},
    }
    return [what for what, is_told in told.items() if not is_told]


def _projects(num_outputs: int, name: str) -> bool:
    return num_outputs in _PROJECTIONS and not re.search(r"_ft_in\d", name)


def _check_arch(tensors: Tensors, at: str, content: Content) -> None:
    """Refuses the name of a model that is not that in the file, as far as the name tells."""
    arch = content.options.arch
    if not arch:
        return
    if not _PUBLISHED.search(arch):
        raise ValueError(f"{arch=} is no published model's name, such as 'deit_small_patch16_224.fb_in1k'")
    width, _, patch, _ = tensors.shape(at + _PATCHES)
    sizes = [(r"patch(\d+)", int, patch, "patches of {} pixels")]
    sizes.append((r"(?:vit|deit3?)_([a-z]+)_", lambda size: _WIDTHS.get(size, width), width, "tokens {} wide"))
    for pattern, number_of, found, what in sizes:
        told = re.search(pattern, arch)
        if told and number_of(told[1]) != found:
            raise ValueError(
                f"{arch=} has {what.format(number_of(told[1]))}, and {str(content.path)!r} has "
                f"{what.format(found)}: name the model that it was trained as"
            )


def _global_pool(config: Mapping[str, Any]) -> str | None:
    return config.get("model_args", {}).get("global_pool", config.get("global_pool"))


def _refuse(tensors: Tensors, at: str, content: Content, config: Mapping[str, Any], name: str) -> None:
    refused = [what for pattern, what in _REFUSED.items() if tensors.names(at + pattern)]
    args = config.get("model_args", {})
    if f"{at}blocks.0.norm1.weight" in tensors and f"{at}blocks.0.norm1.bias" not in tensors:
        refused.append("RMSNorm")
    if f"{at}pos_embed" not in tensors:
        refused.append("no learned positions")
    if not any(f"{at}{norm}.weight" in tensors for norm in ("norm", "fc_norm")):
        refused.append("no last LayerNorm")
    if "_rpn" in name:
        refused.append("its LayerNorms behind attention and MLP")
    if args.get("pool_include_prefix") or "test_vit3" in name:
        refused.append("pooling of the tokens before the patches too")
    if (pool := _global_pool(config)) and pool not in _POOLS:
        refused.append(f"pooling by {pool!r}")
    if (activation := args.get("act_layer", "gelu")) not in _ACTIVATIONS and "mlp_layer" not in args:
        refused.append(f"the activation {activation!r}")
    if refused:
        raise ValueError(f"{str(content.path)!r} has {' and '.join(refused)}, which this project's ViT does not")


def _prefix(content: Content) -> str | None:
    """What stands before every name of the image encoder; None: the file is of another family."""
    found = [name.removesuffix(_PATCHES) for name in content.arrays if name.endswith(_PATCHES)]
    found = [prefix for prefix in found if any(name.startswith(f"{prefix}blocks.0.") for name in content.arrays)]
    if len(found) > 1:
        preferred = [prefix for prefix in found if any(part in prefix for part in _PREFERRED)]
        if len(preferred) != 1:
            raise ValueError(
                f"{str(content.path)!r} holds several image encoders: {', '.join(found)}; keep one of them"
            )
        found = preferred
    return found[0] if found else None


LAYOUT = Layout("timm", lambda content: _prefix(content) is not None, convert, "bicubic_antialias", takes_arch=True)
