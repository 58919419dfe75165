"""Configs: every file loads, every key is used, every mistake gives one clear error."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import alexnet_dist
from hypothesis import given, settings
from hypothesis import strategies as st

from alexnet_dist.config import load
from alexnet_dist.config.load import configs_folder, load_config
from alexnet_dist.config.schema import Config, fingerprint, flat, keys
from alexnet_dist.errors import ConfigError

YAMLS = sorted(p for p in configs_folder().rglob("*.yaml") if p.parent.name != "cluster")


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(configs_folder())))
def test_every_shipped_file_loads(path: Path) -> None:
    assert isinstance(load_config([path]), Config)


def test_what_is_typed_is_taken_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    typed = ["output_dir=/x/run #3", "name=010", "seed=010", "data.path=~/packed: a",
             "model.init_std=1e-2", "train.epochs=1_0", "data.flip=off",
             "model.lrn={size: 3, layers: [conv1]}"]  # fmt: skip
    config = load_config(typed)
    assert (config.output_dir, config.name, config.seed) == ("/x/run #3", "010", 10)
    assert config.data.path == "/home/me/packed: a"
    assert (config.model.init_std, config.train.epochs, config.data.flip) == ((0.01,), 10, False)
    assert (config.model.lrn.size, config.model.lrn.layers) == (3, ("conv1",))


@pytest.mark.parametrize("typed", [True, False])
def test_no_config_copies_the_environment(
    typed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "theirs.yaml").write_text("data: {path: '${oc.env:SECRET}'}\n")
    source = "data.path=${oc.env:SECRET}" if typed else tmp_path / "theirs.yaml"
    said = r"data\.path='\$\{oc\.env:SECRET\}': \$\{…\} is not filled in: write the value itself"
    with pytest.raises(ConfigError, match=said):
        load_config([source])


def test_every_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("name: mine\ndata: {path: ~/data}\n")
    found = load_config("~/mine.yaml")
    assert (found.name, found.data.path) == ("mine", f"{tmp_path}/data")
    named = [key for key, _, about in keys() if re.search("packed data set,|run folders|npy|JSON|we"
             "ights to start", about.doc)]  # fmt: skip
    assert sorted(named) == sorted(key for key, _, about in keys() if about.path)
    for key in named:
        assert flat(load_config([f"{key}=~/a"]))[key] == f"{tmp_path}/a"


def test_shipped_files_are_found_by_name() -> None:
    assert load_config(["demo"]) == load_config([configs_folder() / "demo.yaml"])
    assert load_config(["paper/alexnet-2012"]).name == "alexnet-2012"


def test_every_key_is_read_by_code() -> None:
    package = Path(__file__).parent.parent / "alexnet_dist"
    code = "\n".join(p.read_text() for p in package.rglob("*.py") if p.parent.name != "config")
    for dotted, _, _ in keys():
        last = dotted.rpartition(".")[2]
        assert re.search(rf"\.{last}\b", code), f"{dotted} is read nowhere"


def test_later_sources_win_and_lists_are_replaced(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("train: {batch: 64}\nschedule: {kind: steps, at_epochs: [1, 2, 3]}\n")
    second.write_text("train: {batch: 32, epochs: 5}\nschedule: {at_epochs: [4]}\n")
    config = load_config([first, second, "train.epochs=6", "schedule.rate=1e-2"])
    assert (config.train.batch, config.train.epochs) == (32, 6.0)
    assert config.schedule.at_epochs == (4.0,)
    assert config.schedule.rate == 0.01


@pytest.mark.parametrize(
    ("holds", "message"),
    [
        ("config.json", r"'{0}' is a run folder; its config is {0}/config\.json$"),
        ("dataset.json", r"'{0}' is a packed data set: write data\.path={0}$"),
    ],
)
def test_a_folder_in_place_of_a_config_is_told_by_what_it_holds(
    tmp_path: Path, holds: str, message: str
) -> None:
    (tmp_path / holds).touch()
    with pytest.raises(ConfigError, match=message.format(re.escape(str(tmp_path)))):
        load_config([tmp_path])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("train.bach=3", r"command line: unknown key train\.bach; did you mean train\.batch\?"),
        ("batch=3", r"unknown key batch; did you mean train\.batch\?"),
        ("nonsense.xyzzy=3", r"unknown key nonsense"),
        ("a.b", r"'a\.b' is neither a config file nor key=value; `alexnet-dist configs` lists"),
        ("demoo", r"neither .* did you mean demo\?"),
        ("train.batch", r"a key without a value: write train\.batch=VALUE"),
        ("=3", r"'' is not a key"),
        ("train.batch={", r"train\.batch=\{: must be a whole number"),
        ("train.batch=1.5", r"train\.batch=1\.5: must be a whole number"),
        ("train.batch=true", r"train\.batch=true: must be a whole number"),
        ("train.batch=", r"train\.batch=.*: must be a whole number"),
        ("train.epochs=long", r"train\.epochs=long: must be a number"),
        ("data.divide_by=[]", r"data\.divide_by=\[\]"),
        ("evaluate.views=1.0", r"evaluate\.views=1\.0: must be one of 1, 10"),
        ("data.flip=1", r"data\.flip=1: must be true or false"),
        ("output_dir=", r"output_dir='': must be a path"),
        ("model.conv={", r"model\.conv=\{: '\{' is not valid YAML"),
        (
            "model.fc=[010,1:20]",
            r"model\.fc=.*YAML would read 010 as another number: write it in decimal",
        ),
        ("train.batch=1:20", r"train\.batch=1:20: must be a whole number"),
        ("train.epochs=1:20", r"train\.epochs=1:20: must be a number"),
        ("train.batch=0x10", r"train\.batch=0x10: must be a whole number"),
        ("model.lrn={size: 1.5}", r"model\.lrn\.size=1\.5: must be a whole number"),
        ("model.fc=&a [*a]", r"not valid YAML: has aliases"),
        ("lr=0.1", r"unknown key lr; did you mean schedule\.rate\?"),
        ("batch_size=8", r"did you mean train\.batch\?"),
        ("train.fp16=true", r"did you mean train\.precision\?"),
        ("epochs=3", r"did you mean train\.epochs\?"),
        ("momentum=0.5", r"did you mean optimizer\.momentum\?"),
        ("optimizer.wd=0", r"did you mean optimizer\.weight_decay\?"),
        ("gpus=2", r"did you mean layout\.ranks\?"),
        ("train.batch=0", r"train\.batch=0: must be at least 1 \(samples in a step"),
        ("model.dropout=1", r"must be less than 1"),
        ("model.columns=3", r"must be at most 2"),
        ("schedule.factor=0", r"must be more than 0"),
        ("train.epochs=inf", r"train\.epochs=inf: must be finite"),
        ("train.epochs=.nan", r"must be"),
        ("train.epochs=nan", r"train\.epochs=nan: must be finite"),
        ("train.epochs=1e308", r"train\.epochs=1e\+308: must be at most 1e\+09"),
        ("layout.kind=colums", r"one of one, columns, replicas, .*; did you mean columns\?"),
        ("layout.device=gpu", r"one of auto, cpu, cuda.*; did you mean cuda\?"),
        ("model.conv=96", r"must be a list, as in \[96\] \("),
        ("model.lrn.layers=conv9", r"must be a list, as in \[conv1\] \("),
        ("model.lrn.layers=conv2", r"must be a list, as in \[conv2\] \("),
        ("model.lrn.layers=none", r"must be a list, as in \[\] \("),
        ("model.lrn.layers=", r"model\.lrn\.layers=: must be a list, as in \[\] \("),
        ("model.lrn.layers=[conv9]", r"must be one of conv1, conv2, .*; did you mean conv"),
        ("model=3", r"model is a section: set one of its keys, model\.columns"),
        ("model.lrn=off", r"model\.lrn\.alpha_over_size; model\.lrn\.layers=\[\] switches it off$"),
        ("model.pol_after=[]", r"unknown key model\.pol_after; did you mean model\.pool_after\?"),
        ("model.conv=[96,256]", r"model\.kernel=.*: needs 2 numbers, as model\.conv=\[96, 256\]"),
        ("model.conv=[]", r"model\.conv=.*: a network has at least one convolution"),
        ("model.fc=[8,8,8,8]", r"at most nine layers"),
        ("model.init_std=[1,2]", r"needs one number for all layers, or 8"),
        (
            "model.fc=[64]",
            r"model\.exchange=.*: name others than fc8 in model\.exchange: "
            r"the layers of .* are conv1, .*, conv5, fc6, fc7$",
        ),
        ("model.pool_average=[conv3]", r"only the layers of .* pool"),
        ("train.init_new=[fc8]", r"with train\.init_from=none every layer is new"),
        ("model.conv=[95,256,384,384,256]", r"95 is not divisible by model\.columns=2"),
        ("data.canvas=200", r"data\.canvas=200: must hold a window of model\.crop=227"),
        ("model.lrn.size=4", r"model\.lrn\.size=4: must be odd"),
        (
            "model.columns=1",
            r"line: model\.columns=1, with layout\.kind='columns' of /.*base\.yaml: "
            r"a network of model\.columns=1 cannot be split",
        ),
        ("train.micro_batches=3", r"must be divisible by train\.micro_batches=3"),
        ("schedule.at_epochs=[3,2]", r"must increase"),
        ("data.divide_by=[58,57,57]", r"model\.init='paper'.*the loss stays flat.*model\.init=he"),
        ("data.subtract=nothing", r"expect pixels with the mean subtracted"),
        ("name=../elsewhere", r"name='\.\./elsewhere': must be at most 100 letters, digits"),
        ("seed=-1", r"seed=-1: must be at least 0"),
    ],
)
def test_a_mistake_is_one_clear_error(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config([source])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  batch: 0\n", r"mine\.yaml: train\.batch=0: must be at least 1"),
        ("trian: {batch: 1}\n", r"mine\.yaml: unknown key trian; did you mean train\?"),
        ("train: {batch: 1\n", r"mine\.yaml: not a YAML file"),
        ("- 1\n", r"mine\.yaml: holds a list"),
        (
            "seed: 010\n",
            r"mine\.yaml: .*: YAML would read 010 as another number: write it in decimal",
        ),
        (f"train: {{epochs: 1{'0' * 400}}}\n", r"mine\.yaml: train\.epochs=inf: must be finite"),
        ("train: {epochs: 1:20}\n", r"would read 1:20 as another number"),
        ("train: {batch: 1, batch: 2}\n", r"mine\.yaml: not a YAML file.*duplicate"),
        ("model: {columns: 1}\nlayout: {kind: columns}\n", r"mine\.yaml: layout\.kind='columns'"),
    ],
)
def test_an_error_names_its_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config([path])


def test_a_config_file_that_is_not_there_is_said_with_the_folder_and_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lesson.yaml").write_text("seed: 1\n")
    for typed, where in (("lesson.yml", rf" \(looked in {tmp_path}\)"), ("lesson", "")):
        said = rf"'{typed}' is neither .* key=value{where}; .*; did you mean lesson\.yaml\?$"
        with pytest.raises(ConfigError, match=said):
            load_config(["demo", typed])
    with pytest.raises(ConfigError, match=r"'no/lesson\.yaml' is neither .*looked in"):
        load_config(["demo", "no/lesson.yaml"])


def test_the_command_line_says_it_in_one_line_and_exits_with_2() -> None:
    result = alexnet_dist("train", "demo", "train.bach=3")
    assert result.returncode == 2
    assert result.stderr == (
        "alexnet-dist: the command line: unknown key train.bach; did you mean train.batch?\n"
    )


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        (
            "train: {batch: 33}",
            ["layout.kind=replicas"],
            "mine.yaml: train.batch=33: must be divis",
        ),
        ("layout: {ranks: 3}", ["name=a"], "mine.yaml: layout.ranks=3: layout.kind=columns takes"),
        ("model: {classes: 3}", ["name=a"], "mine.yaml: model.classes=3: "),
        ("seed: 1", ["layout.ranks=3"], "alexnet-dist: the command line: layout.ranks=3: layout"),
        ("model: {columns: 1}", [], "mine.yaml: model.columns=1, with layout.kind='columns' of /"),
    ],
)
def test_an_error_between_keys_names_the_source_of_the_one_given_last(
    text: str, more: list[str], message: str, packed: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    sources = ["demo", f"data.path={packed}", str(tmp_path / "mine.yaml"), *more]
    result = alexnet_dist("train", *sources)
    assert result.returncode
    assert message in result.stderr


def test_a_saved_config_is_the_config(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny("schedule.at_epochs=[1,2.5]", "model.exchange=[]", "output_dir=/tmp/\U0001f41f")
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(dataclasses.asdict(config)))
    assert load_config([saved]) == config
    assert load_config([flat(config)]) == config


def test_the_fingerprint_holds_what_defines_the_run(tiny: Callable[..., Config]) -> None:
    base = fingerprint(tiny("schedule.kind=steps"))
    free = ["layout.kind=one", "data.workers=7", "log.every_steps=3", "name=other",
            "train.epochs=200", "train.micro_batches=4", "evaluate.batch=3"]  # fmt: skip
    assert fingerprint(tiny("schedule.kind=steps", *free)) == base
    for defining in ("seed=1", "train.batch=16", "schedule.rate=0.5", "model.dropout=0.1",
                     "data.lighting=0", "train.precision=fp32", "train.precision=tf32",
                     "evaluate.views=10"):  # fmt: skip
        assert fingerprint(tiny("schedule.kind=steps", defining)) != base
    longer = fingerprint(tiny("schedule.kind=polynomial", "train.epochs=200"))
    assert longer != fingerprint(tiny("schedule.kind=polynomial"))
    config = tiny("schedule.kind=steps")
    schedule = dataclasses.replace(config.schedule, kind="cosine")  # type: ignore[arg-type]
    own = dataclasses.replace(config, schedule=schedule)
    assert fingerprint(own)["train.epochs"] == config.train.epochs


VALUES = st.text(max_size=300) | st.builds(repr, st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=9), inner),
))  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(VALUES | st.builds("{}={}".format, st.sampled_from([k for k, _, _ in keys()]), VALUES))
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(load_config([text]), Config)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["layout.kind=columns_x_replicas", "model.columns=1"], "cannot be split into columns"),
        (["model.exchange=[conv1]"], r"conv1 sees the whole image"),
        (["layout.kind=sharded_fc", "model.exchange=[fc8]"], r"add fc6, fc7, fc8, or set layout"),
        (
            ["train.compile=inductor"],
            r"train\.compile is no longer a key: leave it out; train\.execution",
        ),
        (["layout.kind=zero1", "optimizer.kind=lars"], r"flat partitions .* set layout.kind=repl"),
        (
            ["layout.kind=zero2", "train.precision=fp64"],
            r"DeepSpeed has no weights in fp64, .* set train.prec",
        ),
        (["layout.kind=zero1", "train.precision=fp16"], "no scaled gradients, which train.precis"),
    ],
)
def test_layouts_that_cannot_be_say_what_can(sources: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(sources)


def test_a_key_without_a_default_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after adding it to schema.py alone."""
    added = ("model.own", bool, next(keys())[2])
    monkeypatch.setattr(load, "keys", lambda *of: [*keys(*of), added])
    with pytest.raises(ConfigError, match=r"model\.own: configs/base\.yaml has no value for this"):
        load_config([])
