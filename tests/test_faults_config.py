"""What is wrong with a config, its argument or an override is one message that names the field, and no traceback."""

import contextlib
import io
import json
import random
import re
import signal
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from configs import fashion_mnist, imagenet, quickstart
from levattn.training import cli
from levattn.training.config import EvalConfig, TrainConfig, from_config_dict, to_dict
from levattn.training.config_dict import _dotted_names
from levattn.training.loop import _check_memory

# Of the loader of config files.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ARGUMENTS = ("source", "attention", "k", "eps", "keep_prefix", "local_window", "centre")
FIELDS = sorted(set(_dotted_names(TrainConfig)))
VALUES = [
    "",
    "abc",
    "None",
    "-1",
    "0",
    "1.5",
    "1e400",
    "nan",
    "inf",
    "[",
    "(1,",
    "{}",
    "[1,2]",
    "True",
    "'x'",
    "é\n",
    "9" * 40,
]


def refusal(*arguments, config="configs/quickstart.py", monkeypatch):
    """What `train.py` says of these arguments: the text behind "error:", or None if it takes them."""
    argv = ["train.py", f"--config={config}", *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=False, accept_new_attributes=True, flag_values=values)
    with monkeypatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as err:
        patch.setattr(cli.flags, "FLAGS", values)
        patch.setattr(sys, "argv", argv)  # where overrides are looked for
        try:
            cli._parse_flags(argv)
            from_config_dict(TrainConfig, values.config)
        except (SystemExit, OSError, ValueError) as error:
            stopped = error
        else:
            return None
    if isinstance(stopped, SystemExit):
        assert stopped.code == 2
        assert err.getvalue().startswith("error: ")
        return err.getvalue()
    # `run` makes the same of these.
    assert isinstance(stopped, OSError) or cli._raised_by_this_package(stopped)
    return f"error: {stopped}"


def misspell(name, rng):
    """One letter of the last part left out, doubled, or swapped with the next."""
    section, _, leaf = name.rpartition(".")
    at = rng.randrange(len(leaf) - 1)
    leaf = rng.choice(
        [leaf[:at] + leaf[at + 1 :], leaf[: at + 1] + leaf[at:], leaf[:at] + leaf[at + 1] + leaf[at] + leaf[at + 2 :]]
    )
    return f"{section}.{leaf}" if section else leaf


@pytest.mark.parametrize(
    "override, message",
    [
        ("batch_sise=3", "batch_sise: there is no such field; did you mean 'batch_size'?"),
        (
            "optimzer.learning_rate=1",
            "optimzer.learning_rate: there is no such field; did you mean 'optimizer.learning_rate'?",
        ),
        ("model.atention.k=3", "did you mean 'model.attention.k'?"),
        ("batch_size.x=3", "batch_size.x: there is no such field"),
        ("data.mean[5]=3", "did you mean 'data.mean'?"),
        ("a.b.c=3", "a.b.c: there is no such field"),
        ("batch_size=abc", "config.batch_size=abc"),
        ("optimizer=3", "config.optimizer=3"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate: expected float, not inf"),
        ("seed=99999999999999999999", "seed=99999999999999999999 must be at least 0 and below 2**63"),
        ("loss.kind=softmx", "did you mean 'softmax'?"),
        ("data.source=digitz", "did you mean 'digits'?"),
        ("data.max_damaged=2", "data.max_damaged=2.0 must be a share of the training images"),
        ("data.std=(0.5,0.5)", "data.mean=(0.5,) and std=(0.5, 0.5) need the same length"),
        ("model[0]=3", "names of fields must be text"),
        ("model.variant=Q/16", "model.variant='Q/16' is of unknown size 'Q'"),
        ("distill.head=x", "distill"),
    ],
)
def test_an_override_that_cannot_be_used_is_refused_by_its_field(override, message, monkeypatch):
    assert message in refusal(f"--config.{override}", monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    "config, message",
    [
        ("configs/quickstart.py:kk=3", "no argument 'kk' (did you mean 'k'?)"),
        ("configs/quickstart.py:k=x", "model.attention.k: expected int or None, not 'x'"),
        ("configs/quickstart.py:=3", "no argument ''"),
        ("configs/quickstart.py:attention=levrage", "did you mean 'leverage'?"),
        ("configs/quickstart.py:keep_prefix=a", "keep_prefix='a' must be of type int"),
        ("configs/nothing.py", "No such file or directory: 'configs/nothing.py'"),
        ("configs", "Is a directory: 'configs'"),
        ("README.md", "the config file is no Python"),
        ("configs/retrofit.py", "init_from is needed"),
        ("configs/retrofit.py:init_from=/nowhere", "'/nowhere' does not exist"),
    ],
)
def test_a_config_file_or_argument_that_cannot_be_used_is_refused_by_its_name(config, message, monkeypatch):
    assert message in refusal(config=config, monkeypatch=monkeypatch)


def test_a_flag_of_a_section_that_the_file_leaves_out_is_named_alone(monkeypatch, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({'model': {}})\n"
    )
    said = refusal("--config.total_steps=3", "--config.model.attention.k=4", config=str(path), monkeypatch=monkeypatch)
    assert said.startswith("error: model.attention.k: no flag can set that, as the config file has no section 'attent")


@pytest.mark.parametrize(
    "override",
    [
        "model.rep_size=-5",
        "model.layer_norm_eps=0.0",
        "model.layer_scale=-1.0",
        "model.mlp_dim=4194304",
        "model.num_registers=4194304",
        "model.attention.seed=-1",
        "optimizer.eps=-1.0",
        "mesh.fsdp_min_size=-1",
        "total_steps=2147483648",
        "hang_timeout=1e8",
    ],
)
def test_numbers_out_of_range_are_refused_by_their_field(override, monkeypatch, tmp_path):
    section = {name: {} for name in ("optimizer", "mesh")} | {"model": {"num_classes": 10, "attention": {}}}
    path = tmp_path / "config.py"
    path.write_text(f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({section})\n")
    needed = ("--config.data={}", "--config.total_steps=5") if "total_steps" not in override else ("--config.data={}",)
    assert f"{override.partition('=')[0]}=" in (
        refusal(*needed, f"--config.{override}", config=str(path), monkeypatch=monkeypatch) or ""
    )


def test_more_epochs_than_steps_can_be_counted_are_refused():
    config = from_config_dict(TrainConfig, {"data": {}, "model": {"num_classes": 10}, "total_epochs": 1e30})
    with pytest.raises(ValueError, match=r"total_epochs=1e\+30"):
        config.num_steps(1000)


def test_a_batch_larger_than_memory_is_refused():
    with pytest.raises(ValueError, match=r"batch_size=1000000000 of \(224, 224, 3\) images .* take a smaller one"):
        _check_memory(10**9, (224, 224, 3))


def test_control_c_is_one_line_and_exit_code_130(capsys, monkeypatch):
    monkeypatch.setattr(cli.app, "run", lambda main, **_: main(["train.py"]))
    monkeypatch.setattr(cli.flags, "FLAGS", {"verbosity": cli.flags.FLAGS["verbosity"]})
    monkeypatch.setattr(cli.warnings, "showwarning", cli.warnings.showwarning)  # put back at the end
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: signal.raise_signal(signal.SIGINT))
    assert stopped.value.code == cli.EXIT_INTERRUPTED == 130
    assert capsys.readouterr().err.startswith("interrupted; ")


def test_every_misspelt_field_is_answered_with_the_right_one(monkeypatch):
    rng, right, num = random.Random(0), 0, 0
    for field in FIELDS:
        leaf = field.rpartition(".")[2]
        if len(leaf) < 4:
            continue
        wrong = misspell(field, rng)
        if wrong in FIELDS:
            continue
        said = refusal(f"--config.{wrong}=1", monkeypatch=monkeypatch)
        assert said is not None
        assert f"{wrong}: there is no such field; did you mean '" in said, (wrong, said)
        num, right = num + 1, right + (f"did you mean '{field}'?" in said)
    assert num > 60
    assert right > 0.95 * num


def test_every_field_takes_or_refuses_every_kind_of_value_by_its_name(monkeypatch):
    """Hundreds of overrides of real fields by values of other types."""
    rng, outcomes = random.Random(0), []
    for field in FIELDS:
        for value in rng.sample(VALUES, 3):
            said = refusal(f"--config.{field}={value}", monkeypatch=monkeypatch)
            outcomes.append(said is None)
            leaf = field.rpartition(".")[2]
            # A value can be right by itself and wrong beside that of another field, which is then named as well.
            assert said is None or leaf in said or field.partition(".")[0] in said, (field, value, said)
    assert len(outcomes) > 250
    assert 0.05 < sum(outcomes) / len(outcomes) < 0.8


@pytest.mark.parametrize("get_config", [quickstart.get_config, fashion_mnist.get_config, imagenet.get_config])
def test_arguments_of_any_form_are_taken_or_refused_with_what_there_is(get_config):
    rng = random.Random(0)
    for _ in range(400):
        names = [rng.choice([*ARGUMENTS, "K", "atention", "kep_prefix", "", "é", "a.b", "__class__"]) for _ in range(3)]
        items = [f"{name}{rng.choice(['=', '', '=='])}{rng.choice(VALUES)}" for name in names[: rng.randrange(1, 4)]]
        try:
            from_config_dict(TrainConfig, get_config(",".join(items)))
        except ValueError as error:
            said = str(error)
            named = [re.split("[=,]", item)[0] for item in items] + ["attention", "model", "source", "argument"]
            assert any(name and name in said for name in named), (items, said)
            if "no argument" in said:
                assert "It takes " in said


@pytest.mark.parametrize("cls", [TrainConfig, EvalConfig])
@pytest.mark.parametrize("mapping", [None, 3, "x", [], [1], {"a": 1}, {"": {}}, {"data": []}, {"checkpoint": {}}])
def test_what_is_no_record_of_these_fields_is_refused(cls, mapping):
    with pytest.raises(ValueError, match=r"must be a record of fields|has fields that cannot be used"):
        from_config_dict(cls, mapping)


def test_damaged_config_files_are_taken_or_refused_by_name():
    """Of a workdir's config.json: each value in turn by some of other types."""
    config = to_dict(from_config_dict(TrainConfig, quickstart.get_config()))
    text = json.dumps(config)

    def places(node, path=()):
        for key, value in node.items():
            yield (*path, key)
            if isinstance(value, dict):
                yield from places(value, (*path, key))

    rng, values = random.Random(0), (None, True, -1, 1e308, float("nan"), "x", [], [1, "a", None], {}, {"a": {}})
    for path in places(config):
        for value in (10**400, *rng.sample(values, 4)):
            damaged = json.loads(text)
            node = damaged
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
            try:
                from_config_dict(TrainConfig, damaged)
            except ValueError as error:
                said = str(error)
            else:
                continue
            assert path[-1] in said or path[0] in said, (path, value, said)
