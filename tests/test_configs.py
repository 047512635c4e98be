"""Every config file builds into a valid run, says how to launch it, and refuses what it does not take."""

import ast
import dataclasses
import importlib
import pathlib

import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image

from configs import common, quickstart, retrofit
from levattn.attention import METHODS
from levattn.models import attention_specs, patch_grid
from levattn.training.config import DistillConfig, EvalConfig, ProbeConfig, TrainConfig, from_config_dict, to_dict
from levattn.training.export import export_params
from tests.retrofits import CONFIG, MODEL, tiny_model

FOLDER = pathlib.Path(common.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("common", "__init__"))


def build(name, arg=None):
    return from_config_dict(TrainConfig, importlib.import_module(f"configs.{name}").get_config(arg))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "retrofit"])  # that one starts from a checkpoint
def test_a_config_builds_for_any_attention_and_size(name):
    assert all(spec.method == "dense" for spec in attention_specs(build(name).model))
    spec = build(name, "attention=leverage,k=16,keep_prefix=1,local_window=3x3").model.attention
    assert (spec.method, spec.k, spec.keep_prefix, spec.local_window) == ("leverage", 16, 1, (3, 3))
    for arg, size in [
        ("eps=0.1", (None, 0.1)),  # a threshold by itself is not capped
        ("k=None,eps=0.1", (None, 0.1)),
        ("k=8,eps=0.1", (8, 0.1)),
        ("centre", (32, None)),
    ]:
        spec = build(name, f"attention=leverage,{arg}").model.attention
        assert (spec.k, spec.eps) == size


@pytest.mark.parametrize("name", NAMES)
def test_a_config_s_docstring_has_its_command_hardware_and_accuracy(name):
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    assert f"python train.py --config configs/{name}.py" in docstring
    for word in ("Hardware", "all time", "accuracy"):
        assert word in docstring


@pytest.mark.parametrize(
    "name, arg, size, tokens",
    [
        ("quickstart", None, 8, 65),
        ("quickstart", "source=fashion_mnist", 28, 50),
        ("fashion_mnist", None, 28, 197),
        ("fashion_mnist", "patch=1", 28, 785),
        ("imagenet", "variant=S/16", 224, 197),
        ("imagenet", "variant=L/16", 224, 197),
        ("imagenet", "variant=L/8", 224, 785),
    ],
)
def test_token_counts_are_those_of_the_paper(name, arg, size, tokens):
    model = build(name, arg).model
    rows, columns = patch_grid(model, (size, size, 3))
    assert rows * columns + model.num_prefix_tokens == tokens


@pytest.mark.parametrize(
    "arg, message",
    [
        ("attenton=dense", r"did you mean 'attention'\?\). It takes source,"),
        ("foo", "no argument 'foo'. It takes"),
        ("source=fake:num_classes=10,size=8", "comma .* --config.data.source="),
        ("k=many", "model.attention.k: expected int or None, not 'many'"),
        ("local_window=wide", "model.attention.local_window: expected int or .*, not 'wide'"),
        ("centre=2", "centre='2' must be of type bool"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(arg, message):
    with pytest.raises(ValueError, match=message):
        build("quickstart", arg)


def test_a_retrofit_without_a_checkpoint_says_what_it_needs():
    with pytest.raises(ValueError, match="init_from=WORKDIR"):
        build("retrofit")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Files of a classifier of the digits and of the same without a head."""
    folder = tmp_path_factory.mktemp("exported")
    for name, model in (("digits", MODEL), ("headless", dataclasses.replace(MODEL, num_classes=0))):
        config = dataclasses.replace(CONFIG, model=model, ema_decay=0.99)
        export_params(folder / f"{name}.npz", tiny_model(model).params, to_dict(config))
    return folder


def test_a_probe_asks_for_every_method_unless_one_is_named(exported):
    def config(arg):
        return from_config_dict(EvalConfig, retrofit.get_config(f"probe={exported}/digits.npz{arg}"))

    assert config("").attention == tuple(METHODS)
    assert (config("").checkpoint, config("").probe) == (f"{exported}/digits.npz", ProbeConfig())
    named = config(",source=stamps,attention=leverage,k=16,keep_prefix=1,folds=3,seeds=2")
    assert (named.attention, named.k, named.option) == (("leverage",), (16,), {"keep_prefix": 1})
    assert (named.source, named.probe.folds, named.probe.seeds) == ("stamps", 3, 2)
    by_threshold = config(",attention=leverage,eps=0.5")
    assert (by_threshold.k, by_threshold.option) == ((), {"eps": 0.5})


def test_an_adaptation_learns_from_labels_or_from_the_model_itself(exported):
    def config(name, arg=""):
        return build("retrofit", f"init_from={exported}/{name}.npz,k=4{arg}")

    plain, distilled = config("digits"), config("digits", ",finetune")
    assert (plain.distill, distilled.distill) == (None, DistillConfig())
    assert dataclasses.replace(distilled, distill=None) == plain
    assert (plain.model.attention.method, plain.model.attention.k) == ("leverage", 4)
    assert plain.ema_decay is None  # over one epoch, the average would be the model before it
    headless = config("headless", ",finetune")
    assert (headless.distill.head, headless.distill.weight_features, headless.checkpoint.metric) == (
        "embedding",
        1.0,
        "loss",
    )
    other_classes = config("digits", ",finetune,source=fake:")
    assert other_classes.distill.head == "classifier"  # ten, by chance the same


def test_a_source_with_one_split_is_divided_for_adaptation(exported, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("L", (8, 8), i).save(tmp_path / name / f"{i}.png")
    config = build("retrofit", f"finetune,init_from={exported}/digits.npz,source=folder:{tmp_path}")
    assert (config.data.train_split, config.data.eval_split) == ("train[:80%]", "train[80%:]")
    assert config.data.image_size == 8
    assert config.distill.head == "embedding"  # two classes, where the model knows ten


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'leverage'"):
        build("quickstart", "attention=levrage")


def test_arguments_are_read_as_the_types_of_their_defaults():
    arg = common.parse_arg("a=3,b=2,c,d=3x5,e=text,f=0.5", a=1, b=1.0, c=False, d=None, e="", f=None, g=7)
    assert (arg.a, arg.b, arg.c, arg.d, arg.e, arg.f, arg.g) == (3, 2.0, True, "3x5", "text", 0.5, 7)
    assert isinstance(arg.b, float)


def from_flags(*overrides):
    """The run that train.py would start from the quickstart, given these flags behind `--config`."""
    values, argv = flags.FlagValues(), ["train.py", *overrides]
    config = quickstart.get_config("attention=leverage")
    kwargs = {"lock_config": False, "accept_new_attributes": True}  # as in train.py
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv, **kwargs)
    values(argv)
    return from_config_dict(TrainConfig, holder.value)


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("model.attention.eps", "0.1", 0.1),
        ("model.attention.k", "8", 8),
        ("model.attention.local_window", "3x5", (3, 5)),
        ("model.attention.local_window", "(3, 5)", (3, 5)),
        ("model.attention.local_window", "7", 7),
        ("model.width", "None", None),  # a number in the file
        ("model.rep_size", "true", True),
        ("model.rep_size", "32", 32),
        ("data.mean", "(0.25,)", (0.25,)),
        ("ema_decay", "None", None),
        ("ema_decay", "0.5", 0.5),
        ("optimizer.grad_clip_norm", "None", None),
        ("checkpoint.every_steps", "10", 10),
        ("total_steps", "10", 10),
        ("batch_size", "16", 16),
        ("init_from", "runs/a", "runs/a"),
    ],
)
def test_any_field_can_be_set_on_the_command_line_to_any_value_it_may_have(name, text, value):
    config = from_flags(f"--config.{name}={text}")
    for part in name.split("."):
        config = getattr(config, part)
    assert config == value
    assert type(config) is type(value)


def test_a_threshold_can_take_the_place_of_k_on_the_command_line():
    spec = from_flags("--config.model.attention.k=None", "--config.model.attention.eps=0.1").model.attention
    assert (spec.method, spec.k, spec.eps) == ("leverage", None, 0.1)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.model.attention.esp=0.1", "did you mean 'model.attention.eps'"),
        ("--config.model.attention.eps=big", "eps: expected float or None, not 'big'"),
        ("--config.model.attention.local_window=3x3x3", "local_window: expected int or .*, not '3x3x3'"),
        ("--config.ema_decay=true", "ema_decay: expected float or None, not True"),
    ],
)
def test_flags_that_cannot_be_used_are_named(flag, message):
    with pytest.raises(ValueError, match=message):
        from_flags(flag)
