"""The config of Phi-4-multimodal: a phi3 decoder, a tower each for pictures and sound, and two LoRAs.

Two layouts are read: the original one (`model_type` phi4mm) with `embd_layer`, `audio_processor`, `vision_lora` and
`speech_lora`, where `img_processor` null stands for SigLIP's sizes; and that of transformers (phi4_multimodal), with
`vision_config` and `audio_config`, whose defaults differ. `to_dict` writes the second with every field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from phi4_mlx.config.fields import MAX_COUNT, brief, check_unused, count, number
from phi4_mlx.config.text import ModelConfig
from phi4_mlx.errors import ConfigError

ORIGINAL = "phi4mm"  # the model_type of the original layout

# Defaults of `Phi4MultimodalConfig` in transformers. The checkpoint of the original layout states each of these.
_TEXT_DEFAULTS = {
    "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip

# Maths that this model does not implement: each field, and the values that leave it unused.
_UNUSED_TEXT: dict[str, tuple[Any, ...]] = {"full_attn_mod": (1, None), "interpolate_factor": (1, None)}
_UNUSED_VISION: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "num_channels": (3, None),
    "image_token_compression_cls": ("avg_pool_2d",),
    "projection_cls": ("mlp", None),
    "use_hd_transform": (True, None),
    "with_learnable_separator": (True, None),
    "hd_transform_order": ("sub_glb", None),
}
_UNUSED_AUDIO: dict[str, tuple[Any, ...]] = {
    "activation": ("swish", "silu"),
    "conv_activation": ("swish", "silu"),
    "conv_glu_type": ("swish", "silu"),
    "nemo_activation": ("relu",),
    "bias_symmetric": (False, None),
    "chunk_size": (-1, None),
    "downsample_rate": (1, None),
    "compression_rate": (8, None),
    "time_reduction": (8, None),  # tokens of a clip are counted with it
    "input_size": (80, None),  # log-mel bands
    "depthwise_multiplier": (1, None),
    "projection_cls": ("mlp", None),
    "use_qformer": (False, None),
    "use_conv_downsample": (False, None),
    "batch_norm": (False, None),
    "bias_in_glu": (True, None),
    "causal": (True, None),
    "ext_pw_kernel_size": (1, None),
    "input_layer": ("nemo_conv", None),
}
_UNUSED_FRONT_END: dict[str, tuple[Any, ...]] = {
    "subsampling": ("dw_striding", None),
    "subsampling_factor": (8, None),
    "is_causal": (False, None),
    "activation": ("relu", None),
}

# Names of `audio_processor` -> those of `audio_config`.
_AUDIO_NAMES = {
    "attention_dim": "hidden_size",
    "attention_heads": "num_attention_heads",
    "linear_units": "intermediate_size",
    "depthwise_seperable_out_channel": "depthwise_separable_out_channel",
}
_ORIGINAL_BIAS_DISTANCE = 500  # transformers' default is 1000


@dataclass(frozen=True)
class VisionConfig:
    """The shapes of the SigLIP tower, under the names of `vision_config`. The defaults are those of the real model.

    Attributes:
        crop_size: pixels of a crop's side.
        patch_size: pixels of a patch's side.
        image_token_id: the id that holds the place of a picture's rows in a prompt.
        feature_layer: index of the hidden states that are used, of the embeddings and each layer's output.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    crop_size: int = 448
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    image_token_id: int = 200010
    feature_layer: int = -2

    @property
    def grid(self) -> int:
        """Patches of a crop's side."""
        return self.crop_size // self.patch_size

    @property
    def used_layers(self) -> int:
        """Encoder layers that are computed: the first ones, up to the features."""
        return self.feature_layer % (self.num_hidden_layers + 1)


@dataclass(frozen=True)
class AudioConfig:
    """The shapes of the conformer tower, under the names of `audio_config`. The defaults are those of the real model.

    Attributes:
        kernel_size: taps of the depthwise convolution in time.
        nemo_conv_channels: channels of the convolutions of the front end.
        bias_max_distance: tokens beyond which the relative bias of the attention is constant.
        input_size: log-mel bands.
        time_reduction: frames of a token.
        audio_token_id: the id that holds the place of a clip's rows in a prompt.
    """

    hidden_size: int = 1024
    intermediate_size: int = 1536
    num_blocks: int = 24
    num_attention_heads: int = 16
    kernel_size: int = 3
    nemo_conv_channels: int = 1024
    bias_max_distance: int = 1000
    input_size: int = 80
    time_reduction: int = 8
    audio_token_id: int = 200011

    @property
    def reductions(self) -> int:
        """Convolutions of the front end, each of which halves time and bands."""
        return self.time_reduction.bit_length() - 1

    @property
    def reduced_bands(self) -> int:
        """Bands behind the front end."""
        return -(-self.input_size // self.time_reduction)


@dataclass(frozen=True)
class LoRAConfig:
    """The rank of a LoRA of the checkpoint, and alpha, which is its scale times the rank."""

    r: int
    lora_alpha: float


@dataclass(frozen=True)
class MultimodalConfig(ModelConfig):
    """The shapes of the decoder, as `ModelConfig` has them, of both towers and of the LoRAs in the checkpoint.

    Attributes:
        vision_lora: None where config.json does not describe it; then its own folder does.
        speech_lora: likewise.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    vision_lora: LoRAConfig | None = None
    speech_lora: LoRAConfig | None = None

    @property
    def loras(self) -> dict[str, tuple[int, float] | None]:
        """Name of an adapter -> its rank and alpha; None where config.json does not say."""
        given = {"vision": self.vision_lora, "speech": self.speech_lora}
        return {name: (lora.r, lora.lora_alpha) if lora else None for name, lora in given.items()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> MultimodalConfig:
        """Builds the config from a parsed config.json in either layout.

        Raises:
            ConfigError: a field is missing, out of range, or needs maths that is not implemented.
        """
        check_unused(raw, _UNUSED_TEXT)
        original = raw.get("model_type") == ORIGINAL
        given = {} if original else {name: value for name, value in _TEXT_DEFAULTS.items() if raw.get(name) is None}
        text = ModelConfig.from_dict({**raw, **given, "model_type": "phi3"})
        found = {each.name: getattr(text, each.name) for each in fields(text)}
        vision, audio = _vision(_vision_fields(raw)), _audio(_audio_fields(raw))
        _check_slots(vision.image_token_id, audio.audio_token_id, text.vocab_size)
        return cls(
            **{**found, "model_type": raw["model_type"]},
            vision=vision,
            audio=audio,
            vision_lora=_lora(raw, "vision_lora"),
            speech_lora=_lora(raw, "speech_lora"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The config as a config.json with `vision_config` and `audio_config`, every field given."""
        raw = super().to_dict()
        name = "Phi4MMForCausalLM" if self.model_type == ORIGINAL else "Phi4MultimodalForCausalLM"
        loras = {"vision_lora": self.vision_lora, "speech_lora": self.speech_lora}
        return {
            **raw,
            "architectures": [name],
            "vision_config": {**asdict(self.vision), "image_size": self.vision.crop_size},
            "audio_config": asdict(self.audio),
            **{name: asdict(lora) for name, lora in loras.items() if lora},
        }


def _check_slots(image: int, audio: int, vocab_size: int) -> None:
    if image == audio or max(image, audio) >= vocab_size:
        raise ConfigError(
            f"config.json: image_token_id {image} and audio_token_id {audio} must be two different ids below "
            f"vocab_size {vocab_size}"
        )


def _object(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A field that must be an object; null and absence are an empty one."""
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {name} must be an object, not {brief(value)}")
    return dict(value)


def _vision_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the vision tower from either layout, under the names of `vision_config`."""
    layer = _object(_object(raw, "embd_layer"), "image_embd_layer")
    own = {**_object(raw, "img_processor"), **_object(raw, "vision_config")}
    if "crop_size" in layer and own.get("image_size") is None:
        own = {"crop_size": layer["crop_size"], **own}
    own = {"image_token_id": raw.get("image_token_id"), **own}  # some tools write the ids beside the text's fields
    return {**{name: value for name, value in layer.items() if name in _UNUSED_VISION}, **own}


def _vision(raw: Mapping[str, Any]) -> VisionConfig:
    check_unused(_without_null(raw), _UNUSED_VISION)
    default = VisionConfig()
    hidden_size = count(raw, "hidden_size", default.hidden_size)
    heads = count(raw, "num_attention_heads", default.num_attention_heads)
    _check_heads("vision_config", hidden_size, heads)
    crop_size = _side(raw, "crop_size", _side(raw, "image_size", default.crop_size))
    patch_size = _side(raw, "patch_size", default.patch_size)
    if _side(raw, "image_size", crop_size) != crop_size:
        raise ConfigError(
            f"config.json: image_size {brief(raw['image_size'])} of vision_config must be its crop_size {crop_size}: "
            "the tower sees crops"
        )
    if crop_size % (2 * patch_size):
        raise ConfigError(
            f"config.json: crop_size {crop_size} must be a multiple of twice the patch_size {patch_size}: patches are "
            "pooled 2 by 2"
        )
    layers = count(raw, "num_hidden_layers", default.num_hidden_layers, most=1000)
    feature_layer = default.feature_layer if raw.get("feature_layer") is None else raw["feature_layer"]
    if type(feature_layer) is not int or not -layers - 1 <= feature_layer <= layers:
        raise ConfigError(
            f"config.json: feature_layer of vision_config must be a whole number from {-layers - 1} to {layers}, not "
            f"{brief(feature_layer)}"
        )
    return VisionConfig(
        hidden_size=hidden_size,
        intermediate_size=count(raw, "intermediate_size", default.intermediate_size),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        crop_size=crop_size,
        patch_size=patch_size,
        layer_norm_eps=number(raw, "layer_norm_eps", default.layer_norm_eps),
        image_token_id=_token_id(raw, "image_token_id", default.image_token_id),
        feature_layer=feature_layer,
    )


def _audio_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the audio tower from either layout, under the names of `audio_config`."""
    layer = _object(_object(raw, "embd_layer"), "audio_embd_layer")
    processor = _object(raw, "audio_processor")
    if processor.get("name") not in ("cascades", None):
        raise ConfigError(
            f"config.json: name of audio_processor = {brief(processor['name'])} is not supported; only 'cascades' is"
        )
    given = {**_object(processor, "config"), **_object(raw, "audio_config")}
    own = {_AUDIO_NAMES.get(name, name): value for name, value in given.items()}
    front, bias = _object(own, "nemo_conv_settings"), _object(own, "relative_attention_bias_args")
    check_unused(front, _UNUSED_FRONT_END)
    check_unused(bias, {"type": ("t5", None), "t5_bias_symmetric": (False, None)})
    if "conv_channels" in front:
        own = {"nemo_conv_channels": front["conv_channels"], **own}
    if bias:
        own = {"bias_max_distance": bias.get("t5_bias_max_distance"), **own}
    if raw.get("model_type") == ORIGINAL and "audio_config" not in raw and own.get("bias_max_distance") is None:
        own["bias_max_distance"] = _ORIGINAL_BIAS_DISTANCE
    own = {"audio_token_id": raw.get("audio_token_id"), **own}
    return {**{name: value for name, value in layer.items() if name in _UNUSED_AUDIO}, **own}


def _audio(raw: Mapping[str, Any]) -> AudioConfig:
    check_unused(_without_null(raw), _UNUSED_AUDIO)
    default = AudioConfig()
    hidden_size = count(raw, "hidden_size", default.hidden_size)
    heads = count(raw, "num_attention_heads", default.num_attention_heads)
    _check_heads("audio_config", hidden_size, heads)
    for name in ("ext_pw_out_channel", "depthwise_separable_out_channel"):
        if count(raw, name, hidden_size) != hidden_size:
            raise ConfigError(
                f"config.json: {name} {brief(raw[name])} of audio_config must be its hidden_size {hidden_size}"
            )
    return AudioConfig(
        hidden_size=hidden_size,
        intermediate_size=count(raw, "intermediate_size", default.intermediate_size),
        num_blocks=count(raw, "num_blocks", default.num_blocks, most=1000),
        num_attention_heads=heads,
        kernel_size=count(raw, "kernel_size", default.kernel_size, most=1000),
        nemo_conv_channels=count(raw, "nemo_conv_channels", default.nemo_conv_channels),
        bias_max_distance=count(raw, "bias_max_distance", default.bias_max_distance),
        audio_token_id=_token_id(raw, "audio_token_id", default.audio_token_id),
    )


def _without_null(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if value is not None}


def _check_heads(where: str, hidden_size: int, heads: int) -> None:
    if hidden_size % heads:
        raise ConfigError(
            f"config.json: hidden_size {hidden_size} of {where} is not a multiple of num_attention_heads {heads}"
        )


def _side(raw: Mapping[str, Any], name: str, default: int) -> int:
    """The side of a square, given as a number or as two equal ones."""
    value = raw.get(name)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return count({name: value}, name, default)


def _token_id(raw: Mapping[str, Any], name: str, default: int) -> int:
    value = default if raw.get(name) is None else raw[name]
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        raise ConfigError(f"config.json: {name} must be a token id from 0, not {brief(value)}")
    return value


def _lora(raw: Mapping[str, Any], name: str) -> LoRAConfig | None:
    given = _object(raw, name)
    if not given:
        return None
    check_unused(given, {"use_rslora": (False, None), "use_dora": (False, None)})
    alpha = given.get("lora_alpha", given.get("alpha"))
    r = count(given, "r")
    return LoRAConfig(r, number({f"lora_alpha of {name}": alpha}, f"lora_alpha of {name}", 2.0 * r))
