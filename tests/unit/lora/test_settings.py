"""Options: the same limits for flags, YAML and Python; mlx-lm's files work unchanged; every mistake is one line."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from phi4_mlx.errors import RequestError
from phi4_mlx.lora.__main__ import _parser, _settings
from phi4_mlx.lora.config_file import read_config_file
from phi4_mlx.lora.settings import FLAGS, OPTIONS, LoraParameters, Schedule, Settings
from phi4_mlx.lora.training.optimizer import make_optimizer

BOMB = f"data: {'[&a0 [1], ' + ', '.join(f'&a{n} [*a{n - 1}, *a{n - 1}]' for n in range(1, 40))}]"


def from_yaml(folder: Path, text: str, *flags: str) -> Settings:
    (folder / "c.yaml").write_text(text)
    return _settings(_parser().parse_args(["-c", str(folder / "c.yaml"), *flags]))[0]


def test_each_option_is_a_flag_with_the_same_limits(capsys: pytest.CaptureFixture[str]) -> None:
    for name, option in FLAGS.items():
        flag = f"--{name.replace('_', '-')}"
        if option.kind in (int, float):
            for value in (option.low - 1, option.high * 2, 0 if option.may_be_all else "x", "1_0", "nan"):
                with pytest.raises(SystemExit):
                    _parser().parse_args([f"{flag}={value}"])
                assert f"argument {flag}: '{value}' is not {option.limits}" in capsys.readouterr().err
                with pytest.raises(RequestError, match=re.escape(f"{name} must be {option.limits}, not ")):
                    Settings.from_mapping({name: value}, "here")
            low = -1 if option.may_be_all else option.low
            args = _parser().parse_args([f"{flag}={low}"])
            settings = Settings.from_mapping({name: low}, "here")
            place = settings if name in OPTIONS else settings.lora_parameters
            assert getattr(place, name) == getattr(args, name) == low
        elif option.known:
            with pytest.raises(RequestError, match=f"{name} must be one of .*, not 'magic'"):
                Settings(**{name: "magic"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold names and values, not [1, 2]"),
        ("5", "must hold names and values, not 5"),
        ("a: [", "is not YAML"),
        ("data: 5", "data must be a text that is not empty, not 5"),
        ("data: ''", "data must be a text that is not empty, not ''"),
        ("model: [a]", "model must be a text that is not empty, not ['a']"),
        ("mask_prompt: 'no'", "mask_prompt must be true or false, not 'no'"),
        ("mask_prompt: 1", "mask_prompt must be true or false, not 1"),
        ("iters: true", "iters must be a whole number from 1 to 1,000,000,000, not True"),
        ("iters: 1.5", "iters must be a whole number"),
        ("iters: '8'", "iters must be a whole number"),
        ("iters: 600\nepochs: 2", "iters 600 and epochs 2 are both given; leave one of them out"),
        ("epochs: 0", "epochs must be a whole number from 1"),
        ("epochs: 1.5", "epochs must be a whole number"),
        ("learning_rate: .nan", "learning_rate must be a number from 0 to 10, not nan"),
        ("learning_rate: 1e-5x", "learning_rate must be a number from 0 to 10, not '1e-5x'"),
        ("num_layers: 0", "num_layers must be -1 for all, or a whole number from 1"),
        ("lora_parameters: {rank: '8'}", "rank must be a whole number from 1 to 1,000,000,000, not '8'"),
        ("lora_parameters: {scale: ten}", "scale must be a number"),
        ("lora_parameters: {dropout: null}", "dropout must be a number"),
        ("lora_parameters: {keys: mlp.down_proj}", "keys must be a list of names of layers"),
        ("lora_parameters: {keys: [1]}", "keys must be a list of names of layers"),
        ("lora_parameters: {alpha: 16}", "write scale, which is alpha / rank"),
        ("lora_parameters: {ranks: 8}", "lora_parameters: 'ranks' is not known; did you mean rank?"),
        ("lora_parameters: 8", "lora_parameters must be an object of names and values, not 8"),
        ("iter: 8", "'iter' is not known; did you mean iters?"),
        ("lora_parameter: {rank: 8}", "'lora_parameter' is not known; did you mean lora_parameters?"),
        ("rank: 8\nlora_parameters: {rank: 8}", "rank is given twice, also in lora_parameters; leave one of them out"),
        ("rank: 0", "rank must be a whole number from 1"),
        ("scale: 0", "scale must be a number from 1e-06 to 1e+06, not 0"),
        ("lora_parameters: {scale: -1}", "scale must be a number from 1e-06 to 1e+06, not -1"),
        ("dropout: 0.1", "dropout is not known here; write it in lora_parameters"),
        ("xyzzy: 1", "'xyzzy' is not known; known are adapter_path, "),
        ("1: 8", "1 is not known"),
        ("given: [iters]", "'given' is not known"),
        ("train: 'yes'", "train must be true or false, not 'yes'"),
        ("optimizer: lion", "optimizer must be one of adamw, adam, adafactor, muon, sgd, not 'lion'"),
        ("optimizer: muon\noptimizer_config: {muon: {betas: [0.9, 0.9]}}", "of muon: 'betas' is not known"),
        ("optimizer: muon\noptimizer_config: {muon: {ns_steps: 0}}", "optimizer_config: ns_steps must be a whole"),
        ("optimizer: sgd\noptimizer_config: {sgd: {nesterov: true}}", "nesterov needs a momentum above 0"),
        ("task: dop", "task must be one of sft, dpo, orpo, not 'dop'; did you mean dpo?"),
        ("fine_tune_type: [lora]", "fine_tune_type must be one of lora, dora, full, not ['lora']"),
        ("fine_tune_type: {a: 1}", "fine_tune_type must be one of lora, dora, full, not {'a': 1}"),
        ("prompt_feature: question", "prompt_feature is not known here; name the field prompt in the data"),
        ("bogus: null", "'bogus' is not known"),
        (f"iters: {'1' * 6000}", "is not YAML: Exceeds the limit"),
        (f"iters: 0x{'1' * 6000}", "iters must be a whole number from 1 to 1,000,000,000, not a number of thousands"),
        (f"? 0x{'1' * 6000}\n: 1", "a number of thousands of digits is not known"),
        (f"lora_parameters: {{scale: 0x{'1' * 6000}}}", "scale must be a number from"),
        (f"optimizer_config: {{adamw: {{eps: 0x{'1' * 6000}}}}}", "eps must be a number from"),
        (BOMB, "data must be a text that is not empty, not [[1], "),
        ("optimizer: [adam]", "optimizer must be one of"),
        ("optimizer_config: {adamw: {momentum: 1}}", "optimizer_config of adamw: 'momentum' is not known; known are"),
        ("optimizer_config: {adamw: {betas: 0.9}}", "optimizer_config: betas must be a list of two numbers"),
        ("optimizer_config: {adamw: {betas: [0.9, 1]}}", "optimizer_config: betas must be a list of two numbers"),
        ("optimizer_config: 5", "optimizer_config of adamw must be an object"),
        ("lr_schedule: linear", "lr_schedule must be one of cosine, constant"),
        ("lr_schedule: {name: triangle, arguments: [1]}", "name must be one of cosine_decay"),
        ("lr_schedule: {name: cosine_decay}", "arguments of cosine_decay must be 2 or 3 numbers in a list, not None"),
        ("lr_schedule: {name: cosine_decay, arguments: [1e-5]}", "must be 2 or 3 numbers"),
        ("lr_schedule: {name: cosine_decay, arguments: [1e-5, 0]}", "argument 2 of cosine_decay must be a whole"),
        ("lr_schedule: {name: cosine_decay, arguments: [x, 5]}", "argument 1 of cosine_decay must be a number"),
        ("lr_schedule: {name: cosine_decay, arguments: [1e-5, 5], cycles: 2}", "'cycles' is not known"),
        ("hf_dataset: {path: a/b, train_split: x}", "hf_dataset is not known here; write data: owner/name"),
        ("use_dora: true", "write fine_tune_type: dora"),
        ("lora_layers: 4", "write num_layers"),
        ("wandb: project", "write report_to: wandb"),
        ("report_to: swanlab", "report_to must be one of wandb, tensorboard"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        from_yaml(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'c.yaml'}") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("2E3", 2000.0), ("+.5e1", 5.0), ("1.e-2", 0.01)])
def test_numbers_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: float) -> None:
    assert from_yaml(tmp_path, f"lora_parameters: {{scale: {text}}}").lora_parameters.scale == value
    assert from_yaml(tmp_path, "iters: 10\nclip: 1.5\nmodel: 1e5x").iters == 10


def test_a_file_of_mlx_lm_is_taken_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """mlx-lm's example, except for the model's keys; options without effect are reported in one line."""
    settings = from_yaml(
        tmp_path,
        """
        model: demo
        train: true
        fine_tune_type: lora
        optimizer: adamw
        optimizer_config:
          adam: {}
          adamw: {betas: [0.8, 0.98], eps: 1e-6, bias_correction: true}
          sgd: {momentum: 0.9}
        data: mlx-community/WikiSQL
        seed: 0
        num_layers: 16
        batch_size: 4
        iters: 1000
        val_batches: 25
        learning_rate: 1e-5
        steps_per_report: 10
        steps_per_eval: 200
        resume_adapter_file: null
        adapter_path: adapters
        save_every: 100
        test: false
        test_batches: 100
        max_seq_length: 2048
        grad_checkpoint: false
        wandb: null
        project_name: mine
        clear_cache_threshold: 1000000
        trust_remote_code: false
        report_to: null
        lora_parameters: {keys: [self_attn.qkv_proj], rank: 8, scale: 20.0, dropout: 0.0}
        lr_schedule: {name: cosine_decay, warmup: 100, warmup_init: 1e-7, arguments: [1e-5, 1000, 1e-7]}
        """,
    )
    assert settings.lora_parameters == LoraParameters(8, 20.0, 0.0, ("self_attn.qkv_proj",))
    assert settings.lr_schedule == Schedule("cosine_decay", (1e-5, 1000, 1e-7), 100, 1e-7)
    assert settings.optimizer_config == {"betas": [0.8, 0.98], "eps": 1e-6, "bias_correction": True}
    told = capsys.readouterr().err.splitlines()
    assert told == [f"{tmp_path / 'c.yaml'}: clear_cache_threshold, project_name has no effect here"]


def test_flags_win_over_the_file_also_where_the_file_speaks_of_several_optimizers(tmp_path: Path) -> None:
    text = "iters: 5\noptimizer_config: {adamw: {weight_decay: 0.1}, adafactor: {decay_rate: -0.7}}"
    assert from_yaml(tmp_path, text).optimizer_config == {"weight_decay": 0.1}
    settings = from_yaml(tmp_path, text, "--optimizer", "adafactor", "--iters", "7")
    assert settings.optimizer_config == {"decay_rate": -0.7} and settings.iters == 7
    assert from_yaml(tmp_path, text, "--optimizer", "adam").optimizer_config == {}
    assert {"iters", "optimizer", "optimizer_config"} == settings.given


def test_rank_and_scale_are_options_and_win_over_the_file(tmp_path: Path) -> None:
    text = "lora_parameters: {rank: 2, scale: 3.0, dropout: 0.1, keys: [mlp.down_proj]}"
    settings = from_yaml(tmp_path, text, "--rank", "6")
    assert settings.lora_parameters == LoraParameters(6, 3.0, 0.1, ("mlp.down_proj",))
    assert settings.named("rank") and settings.named("scale") and settings.named("dropout")
    assert from_yaml(tmp_path, text, "--rank", "6", "--scale", "4").lora_parameters.scale == 4
    assert from_yaml(tmp_path, "rank: 6\nscale: null", "--scale", "4").lora_parameters == LoraParameters(6, 4.0)
    assert from_yaml(tmp_path, "rank: 6", "--rank", "5").lora_parameters == LoraParameters(5)
    assert Settings.from_mapping({"rank": 5}, "settings").lora_parameters == LoraParameters(5)
    assert not from_yaml(tmp_path, "", "--scale", "4").named("rank")


def test_a_run_has_iters_or_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert from_yaml(tmp_path, "epochs: 3").total_iters(50) == 150
    assert from_yaml(tmp_path, "").total_iters(50) == from_yaml(tmp_path, "iters: null").total_iters(50) == 1000
    assert from_yaml(tmp_path, "iters: 60").total_iters(50) == 60
    for text, flags in (("iters: 60", ["--epochs", "3"]), ("", ["--iters", "60", "--epochs", "3"])):
        with pytest.raises(RequestError, match="iters 60 and epochs 3 are both given"):
            from_yaml(tmp_path, text, *flags)
    with pytest.raises(RequestError, match="both given"):
        Settings(iters=1000, epochs=3)


def test_null_is_the_default_and_no_schedule(tmp_path: Path) -> None:
    names = [name for name in OPTIONS if name != "lr_schedule"] + ["lora_parameters", "optimizer_config", "train"]
    text = "\n".join(f"{name}: null" for name in [*names, "project_name", "hf_dataset", "use_dora", "wandb"])
    settings = from_yaml(tmp_path, text)
    assert settings == Settings() and not settings.given
    assert from_yaml(tmp_path, "lr_schedule: null").lr_schedule == "constant"


def test_a_dataset_in_mlx_lms_words_is_our_data(tmp_path: Path) -> None:
    assert from_yaml(tmp_path, "hf_dataset: {path: owner/name}").data == "owner/name"
    assert from_yaml(tmp_path, "hf_dataset: [{path: owner/name}]").data == "owner/name"
    for nothing in ("null", "false", "[]", "{}"):
        assert from_yaml(tmp_path, f"hf_dataset: {nothing}").data == "data"
    assert from_yaml(tmp_path, "").iters == Settings().iters


def test_mlx_lms_flags_without_effect_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    args = _parser().parse_args(["--project-name", "x", "--clear-cache-threshold", "1GB", "--trust-remote-code"])
    _settings(args)
    assert capsys.readouterr().err.count("has no effect here") == 3
    assert "--project-name" not in _parser().format_help()


def test_what_was_named_is_known() -> None:
    settings = Settings.from_mapping({"num_layers": -1, "lora_parameters": {"rank": 8}}, "here")
    assert settings.named("num_layers") and settings.named("rank")
    assert not settings.named("scale") and not settings.named("iters")
    direct = Settings(lora_parameters=LoraParameters(scale=2.0), num_layers=3)
    assert direct.named("scale") and direct.named("num_layers") and not direct.named("rank")


def rates(settings: Settings, steps: int) -> list[float]:
    """The learning rate of each of the first steps."""
    optimizer, found = make_optimizer(settings), []
    weights = {"w": mx.zeros(2)}
    optimizer.init(weights)
    for _ in range(steps):
        weights = optimizer.apply_gradients({"w": mx.ones(2)}, weights)
        found.append(optimizer.learning_rate.item())
    return found


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "cosine_decay", "warmup": 4, "warmup_init": 1e-7, "arguments": [1e-5, 10, 1e-7]},
        {"name": "cosine_decay", "arguments": [1e-5, 10]},
        {"name": "linear_schedule", "warmup": 2, "arguments": [1e-4, 1e-6, 8]},
        {"name": "step_decay", "arguments": [1e-3, 0.5, 3]},
        {"name": "exponential_decay", "warmup": 1, "arguments": [1e-3, 0.9]},
    ],
)
def test_mlx_lms_schedules_are_its_own_to_the_step(schedule: dict[str, Any]) -> None:
    from mlx_lm.tuner.utils import build_schedule

    theirs = build_schedule(schedule)
    settings = Settings.from_mapping({"lr_schedule": schedule}, "here")
    expected = [float(theirs(mx.array(step))) for step in range(14)]
    assert rates(settings, 14) == pytest.approx(expected, rel=1e-5)
    assert not settings.rate_depends_on_iters


def test_optimizers_are_what_they_are_told() -> None:
    adam = make_optimizer(Settings(optimizer="adam", weight_decay=0.5))
    assert type(adam) is optim.Adam and adam.bias_correction
    adamw = make_optimizer(Settings(optimizer_config={"betas": [0.8, 0.98], "eps": 1e-6}))
    assert (adamw.betas, adamw.eps, adamw.weight_decay) == ([0.8, 0.98], 1e-6, 0.01)
    assert make_optimizer(Settings(optimizer="adafactor", optimizer_config={"decay_rate": -0.7})).decay_rate == -0.7
    assert rates(Settings(lr_schedule="constant", learning_rate=1e-3, warmup=1), 3) == pytest.approx([5e-4, 1e-3, 1e-3])


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("muon", {}), ("muon", {"momentum": 0.9, "nesterov": False, "ns_steps": 3, "weight_decay": 0.1}),
        ("Muon", {}), ("sgd", {}), ("sgd", {"momentum": 0.9, "nesterov": True}),
        ("sgd", {"momentum": 0.9, "dampening": 0.5}),
    ],
)  # fmt: skip
def test_muon_and_sgd_are_those_of_mlx_lm(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    """mlx-lm makes them with the learning rate and the file's options."""
    text = f"optimizer: {name}\nlearning_rate: 0.01\nlr_schedule: null\noptimizer_config: {{{name.lower()}: {config}}}"
    ours = make_optimizer(from_yaml(tmp_path, text))
    theirs = {"muon": optim.Muon, "sgd": optim.SGD}[name.lower()](learning_rate=0.01, **config)
    weights = [{"w": mx.random.normal((4, 3), key=mx.random.key(1)), "m": mx.ones(3)} for _ in range(2)]
    for _ in range(3):
        grads = {"w": mx.random.normal((4, 3), key=mx.random.key(2)), "m": mx.ones(3)}
        weights = [each.apply_gradients(grads, w) for each, w in zip((ours, theirs), weights, strict=True)]
    assert type(ours) is type(theirs)
    assert all(mx.array_equal(weights[0][name], weights[1][name]) for name in ("w", "m"))


def test_a_file_that_is_not_there_is_no_traceback() -> None:
    with pytest.raises(RequestError, match=r"/nowhere/c\.yaml cannot be read: No such file"):
        read_config_file("/nowhere/c.yaml")
    assert isinstance(_parser(), argparse.ArgumentParser)
