# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The GEODE authors.
"""Configurations of GEODE. The defaults are geode-1.5b: Qwen2.5-1.5B, InternViT-300M, Sonata and VGGT-1B."""

import difflib
import math
from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto import AutoConfig


SPACE_FILLING_ORDERS = ("z", "z-trans", "hilbert", "hilbert-trans")
SCALAR_TRANSFORMS = ("identity", "log", "log1p", "symlog")
CONTROL_TOKEN_KINDS = ("scalar", "box3d", "vector")
REGRESSION_LOSSES = ("l2", "huber", "l1")
HIDDEN_POSITIONS = ("token", "previous")


class _CheckedConfig(PreTrainedConfig):
    """
    A configuration that refuses a misspelt field.

    Unknown keywords pass, because a newer checkpoint may carry fields that this version does not know; a keyword that
    is close to a field's name is a typing error, and raises.
    """

    def __post_init__(self, **kwargs):
        fields = [name for name in type(self).__dataclass_fields__ if not name.startswith("_")]
        for name in kwargs:
            close = difflib.get_close_matches(name, fields, n=1, cutoff=0.85)
            if close and close[0] != name:
                raise ValueError(f"`{type(self).__name__}` has no field `{name}`. Did you mean `{close[0]}`?")
        super().__post_init__(**kwargs)


def _check_choice(owner: PreTrainedConfig, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if value not in choices:
        raise ValueError(f"`{type(owner).__name__}.{name}` must be one of {choices}, got {value!r}.")


def _check_positive(owner: PreTrainedConfig, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{type(owner).__name__}.{name}` must be positive, got {value}.")


def _check_not_negative(owner: PreTrainedConfig, *names: str) -> None:
    for name in names:
        if getattr(owner, name) < 0:
            raise ValueError(f"`{type(owner).__name__}.{name}` must not be negative, got {getattr(owner, name)}.")


def _check_divisible(owner: PreTrainedConfig, name: str, by: str) -> None:
    value, divisor = getattr(owner, name), getattr(owner, by)
    if divisor < 1 or value % divisor:
        raise ValueError(f"`{type(owner).__name__}.{name}` must be divisible by `{by}`, got {value} and {divisor}.")


@strict
class SonataConfig(_CheckedConfig):
    """
    The Sonata point encoder (a Point Transformer V3 encoder). The defaults are the released 108M model.

    > Parameters that control the architecture (one entry per stage, finest first)

    Args:
        in_channels (`int`, defaults to 9): Input features per point: x y z in metres, r g b in [0, 1], unit normal.
        order (`list[str]`): Space-filling curves; block `i` of a stage uses curve `i` modulo their number.
        stride (`list[int]`): Voxel edge ratio between a stage and the next; one entry less than there are stages.
        enc_depths (`list[int]`): Blocks per stage.
        enc_channels (`list[int]`): Width per stage.
        enc_num_head (`list[int]`): Attention heads per stage.
        enc_patch_size (`list[int]`): Points per attention window per stage.
        mlp_ratio (`float`, defaults to 4): Hidden width of the MLP over the width of its stage.
        qkv_bias (`bool`, defaults to `True`): Bias on the fused query, key and value projection.
        qk_scale (`float`, *optional*): Attention scale; `None` is `head_dim ** -0.5`.
        attn_drop (`float`, defaults to 0): Dropout of attention probabilities in training.
        proj_drop (`float`, defaults to 0): Dropout after attention and MLP projections in training.
        drop_path (`float`, defaults to 0.3): Largest stochastic-depth rate in training.
        layer_scale (`float`, *optional*): Initial per-channel residual gain; `None` has no gain.
        pre_norm (`bool`, defaults to `True`): Normalise before attention and MLP rather than after the sum.
        mask_token (`bool`, defaults to `True`): The embedding has a learned token for masked points.

    > Parameters that control the clouds

    Args:
        grid_size (`float`, defaults to 0.02): Voxel edge in metres of the finest stage.
        window_rule (`str`, defaults to `"cloud"`): `"cloud"` windows each cloud on its own; `"batch"` uses one window
            size for all clouds, at most the smallest cloud of the batch.
        shuffle_orders (`bool`, defaults to `False`): Permute the curves at each stage during training. Inference never does.
    """

    model_type = "geode_sonata"
    base_config_key = "point_config"

    in_channels: int = 9
    order: list[str] | tuple[str, ...] = SPACE_FILLING_ORDERS
    stride: list[int] | tuple[int, ...] = (2, 2, 2, 2)
    enc_depths: list[int] | tuple[int, ...] = (3, 3, 3, 12, 3)
    enc_channels: list[int] | tuple[int, ...] = (48, 96, 192, 384, 512)
    enc_num_head: list[int] | tuple[int, ...] = (3, 6, 12, 24, 32)
    enc_patch_size: list[int] | tuple[int, ...] = (1024, 1024, 1024, 1024, 1024)
    mlp_ratio: float | int = 4
    qkv_bias: bool = True
    qk_scale: float | None = None
    attn_drop: float | int = 0.0
    proj_drop: float | int = 0.0
    drop_path: float | int = 0.3
    layer_scale: float | None = None
    pre_norm: bool = True
    mask_token: bool = True
    grid_size: float = 0.02
    window_rule: str = "cloud"
    shuffle_orders: bool = False
    initializer_range: float = 0.02

    @property
    def hidden_size(self) -> int:
        """Width of the coarsest stage, the one the DRM reads."""
        return self.enc_channels[-1]

    @property
    def num_stages(self) -> int:
        """Number of resolutions, the input's included."""
        return len(self.enc_depths)

    def validate_stages(self):
        """Every per-stage list has one entry per stage, of whole numbers above 0."""
        for name in ("enc_depths", "enc_channels", "enc_num_head", "enc_patch_size", "stride"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(
                    f"`SonataConfig.{name}` must hold numbers of at least 1, got {list(getattr(self, name))}."
                )
        for name, offset in (("enc_channels", 0), ("enc_num_head", 0), ("enc_patch_size", 0), ("stride", 1)):
            values, expected = getattr(self, name), self.num_stages - offset
            if len(values) != expected:
                raise ValueError(
                    f"`SonataConfig.{name}` needs {expected} entries for {self.num_stages} stages, got {list(values)}."
                )
        for channels, heads in zip(self.enc_channels, self.enc_num_head, strict=True):
            if heads < 1 or channels % heads:
                raise ValueError(f"`enc_channels` {channels} must be divisible by `enc_num_head` {heads}.")

    def validate_options(self):
        """Options take the values that exist."""
        _check_choice(self, "window_rule", ("cloud", "batch"))
        _check_positive(self, "grid_size", "in_channels")
        unknown = [name for name in self.order if name not in SPACE_FILLING_ORDERS]
        if unknown or not self.order:
            raise ValueError(f"`SonataConfig.order` takes {SPACE_FILLING_ORDERS}, got {list(self.order)}.")


@strict
class VggtConfig(_CheckedConfig):
    """
    The VGGT reconstructor: frames in, cameras, depth and world points out. The defaults are VGGT-1B.

    Args:
        image_size (`int`, defaults to 518): Side in pixels that the native position-embedding grid stands for.
        patch_size (`int`, defaults to 14): Patch side in pixels; frame sizes must be multiples of it.
        hidden_size (`int`, defaults to 1024): Width of the trunk and of the aggregator.
        num_hidden_layers (`int`, defaults to 24): Alternating layers; each has one frame and one global block.
        num_attention_heads (`int`, defaults to 16): Heads of the aggregator's blocks.
        mlp_ratio (`float`, defaults to 4): Hidden width of every MLP over the width of its block; a whole number.
        num_register_tokens (`int`, defaults to 4): Register tokens per frame.
        rope_theta (`float`, defaults to 100): Base of the 2-D rotary embedding.
        trunk_num_hidden_layers (`int`, defaults to 24): Blocks of the DINOv2 trunk.
        trunk_num_attention_heads (`int`, defaults to 16): Heads of the trunk.
        camera_num_hidden_layers (`int`, defaults to 4): Blocks of the camera head.
        camera_num_attention_heads (`int`, defaults to 16): Heads of the camera head.
        camera_num_iterations (`int`, defaults to 4): Refinement rounds of the camera head.
        dense_hidden_size (`int`, defaults to 256): Width of the depth and point heads.
        dense_projection_sizes (`list[int]`): Widths of the four projections of a dense head.
        tapped_layers (`list[int]`): The four aggregator layers that the dense heads read. May repeat; the last entry
            is the last layer, which also feeds the cameras.
        frames_chunk_size (`int`, defaults to 8): Frames that the trunk, the frame blocks, the MLPs and the dense heads
            handle at a time. Bounds memory; results change by rounding at most.
    """

    model_type = "geode_vggt"
    base_config_key = "reconstructor_config"

    image_size: int = 518
    patch_size: int = 14
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_ratio: float | int = 4
    num_register_tokens: int = 4
    rope_theta: float | int = 100
    trunk_num_hidden_layers: int = 24
    trunk_num_attention_heads: int = 16
    camera_num_hidden_layers: int = 4
    camera_num_attention_heads: int = 16
    camera_num_iterations: int = 4
    dense_hidden_size: int = 256
    dense_projection_sizes: list[int] | tuple[int, ...] = (256, 512, 1024, 1024)
    tapped_layers: list[int] | tuple[int, ...] = (4, 11, 17, 23)
    frames_chunk_size: int = 8
    initializer_range: float = 0.02

    def validate_architecture(self):
        """Widths divide into heads and rotary quarters, and the tapped layers exist."""
        _check_positive(self, "hidden_size", "patch_size", "image_size", "num_hidden_layers")
        _check_divisible(self, "hidden_size", "num_attention_heads")
        _check_divisible(self, "hidden_size", "trunk_num_attention_heads")
        _check_divisible(self, "image_size", "patch_size")
        _check_positive(self, "frames_chunk_size", "camera_num_iterations", "camera_num_hidden_layers", "mlp_ratio")
        if 2 * self.hidden_size % self.camera_num_attention_heads:
            raise ValueError(
                f"`VggtConfig.camera_num_attention_heads` must divide twice the `hidden_size` {self.hidden_size}, "
                f"got {self.camera_num_attention_heads}."
            )
        if self.hidden_size // self.num_attention_heads % 4:
            raise ValueError(
                "`VggtConfig` needs a `hidden_size` per head that is a multiple of 4 for the 2-D rotary embedding, got "
                f"{self.hidden_size} for {self.num_attention_heads} heads."
            )
        if self.mlp_ratio != int(self.mlp_ratio):
            raise ValueError(f"`VggtConfig.mlp_ratio` must be a whole number, as the trunk's, got {self.mlp_ratio}.")

    def validate_dense_heads(self):
        """Four tapped layers exist, and widths divide into the quarters of a position map."""
        layers = list(self.tapped_layers)
        if len(layers) != 4 or sorted(layers) != layers or layers[0] < 0 or layers[-1] != self.num_hidden_layers - 1:
            raise ValueError(
                "`VggtConfig.tapped_layers` must be four layers in order, the last of them the last layer "
                f"({self.num_hidden_layers - 1}), got {layers}."
            )
        widths = list(self.dense_projection_sizes)
        if len(widths) != 4 or any(width % 4 for width in widths) or self.dense_hidden_size % 8:
            raise ValueError(
                "`VggtConfig` needs four `dense_projection_sizes` that are multiples of 4 and a `dense_hidden_size` that "
                f"is a multiple of 8, got {widths} and {self.dense_hidden_size}."
            )


@strict
class GeodeDrmConfig(_CheckedConfig):
    """
    The Decoupled Rationale Module (paper, section 2.1).

    > Parameters that control the size

    Args:
        hidden_size (`int`, defaults to 1024): Width of the cross-attention and of the Mamba layers.
        num_cross_attention_layers (`int`, defaults to 2): Layers in which 2D features query the 3D context.
        num_attention_heads (`int`, defaults to 16): Heads of the cross-attention.
        mlp_ratio (`float`, defaults to 4): Hidden width of the MLPs over `hidden_size`.
        num_mamba_layers (`int`, defaults to 1): Mamba layers over the fused features and the queries.
        mamba_state_size (`int`, defaults to 16): State size N of the selective scan.
        mamba_conv_kernel (`int`, defaults to 4): Width of the causal convolution.
        mamba_expand (`int`, defaults to 2): Inner width of a Mamba layer over `hidden_size`.
        num_rationale_tokens (`int`, defaults to 16): Learned queries, so the largest number M of `<spatio>` tokens.
        spatial_pooling (`int`, defaults to 2): Side of the patch blocks averaged before the Mamba layers.

    > Parameters that control the 3D context

    Args:
        max_context_tokens (`int`, defaults to 1024): Largest number K of points that are attended to; a larger cloud is
            thinned by farthest-point sampling.
        num_position_frequencies (`int`, defaults to 8): Octaves of the Fourier features of metric positions.
        max_position_m (`float`, defaults to 16): Longest wavelength of those features, in metres.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of the layer norms.

    > Parameters that control novel behaviour (off by default)

    Args:
        question_conditioned (`bool`, defaults to `False`): The Mamba sequence also holds the question, so the rationale
            depends on it and cannot be reused for another question.
        inject_features (`bool`, defaults to `False`): Fused features are also added to the visual tokens through a gate
            that starts at zero.
        camera_queries (`bool`, defaults to `False`): The 2D features, which are the queries of the cross-attention, also hold
            the camera that took their frame, and so the rays of their patches (docs/decisions/0008).
        point_queries (`bool`, defaults to `False`): With `camera_queries`, they also hold the position where the ray of their
            patch meets the cloud (docs/decisions/0012).
    """

    model_type = "geode_drm"
    base_config_key = "drm_config"

    hidden_size: int = 1024
    num_cross_attention_layers: int = 2
    num_attention_heads: int = 16
    mlp_ratio: float | int = 4
    num_mamba_layers: int = 1
    mamba_state_size: int = 16
    mamba_conv_kernel: int = 4
    mamba_expand: int = 2
    num_rationale_tokens: int = 16
    spatial_pooling: int = 2
    max_context_tokens: int = 1024
    num_position_frequencies: int = 8
    max_position_m: float | int = 16.0
    question_conditioned: bool = False
    inject_features: bool = False
    camera_queries: bool = False
    point_queries: bool = False
    layer_norm_eps: float = 1e-6

    def validate_architecture(self):
        """Sizes are positive, widths divide into heads, and rays come from cameras."""
        _check_divisible(self, "hidden_size", "num_attention_heads")
        if self.point_queries and not self.camera_queries:
            raise ValueError("`point_queries` needs `camera_queries`, got false. Set both, or neither.")
        _check_positive(
            self,
            "num_cross_attention_layers",
            "num_mamba_layers",
            "mamba_state_size",
            "mamba_conv_kernel",
            "num_rationale_tokens",
            "spatial_pooling",
            "max_context_tokens",
            "num_position_frequencies",
            "max_position_m",
            "hidden_size",
            "mlp_ratio",
        )


@strict
class GeodeDrhConfig(_CheckedConfig):
    """
    The Direct Regression Head (paper, section 2.2): one small MLP per control token, computed in float32.

    Args:
        hidden_size (`int`, *optional*): Hidden width of the MLPs; `None` is the width of the language model.
        num_hidden_layers (`int`, defaults to 1): Hidden layers of each MLP.
        hidden_position (`str`, defaults to `"token"`): The state that is regressed from: the control token's own
            (`"token"`) or that of the token before it, which predicted it (`"previous"`).
        loss (`str`, defaults to `"l2"`): `"l2"` (Eq. 6), `"huber"` or `"l1"`, in the codec's space.
        huber_delta (`float`, defaults to 1): Where the Huber loss turns linear.
        loss_weight (`float`, defaults to 1): The weight lambda of Eq. 7.
        value_feedback (`bool`, defaults to `False`): A value's embedding is added to the next input embedding, so that
            later text can agree with it.
        uncertainty (`bool`, defaults to `False`): Each number and vector comes with an interval. A layer on the MLP's last
            hidden state, through which no gradient flows back, gives the spread of a Gaussian in the codec's space.
        interval_coverage (`float`, defaults to 0.9): How often an interval shall hold the true value.
        interval_scales (`dict[str, float]`, defaults to `{}`): Factor of the intervals of a control token, which
            `geode calibrate` measures on scenes that were not trained on. Without one they are the Gaussian's own.
    """

    model_type = "geode_drh"
    base_config_key = "drh_config"

    hidden_size: int | None = None
    num_hidden_layers: int = 1
    hidden_position: str = "token"
    loss: str = "l2"
    huber_delta: float | int = 1.0
    loss_weight: float | int = 1.0
    value_feedback: bool = False
    uncertainty: bool = False
    interval_coverage: float = 0.9
    interval_scales: dict = field(default_factory=dict)

    def validate_options(self):
        """Options take the values that exist."""
        _check_choice(self, "hidden_position", HIDDEN_POSITIONS)
        _check_choice(self, "loss", REGRESSION_LOSSES)
        _check_positive(self, "huber_delta")
        if not 0.0 < self.interval_coverage < 1.0:
            raise ValueError(
                f"`GeodeDrhConfig.interval_coverage` must lie between 0 and 1, got {self.interval_coverage}."
            )
        for token, scale in self.interval_scales.items():
            if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
                raise ValueError(
                    f"`GeodeDrhConfig.interval_scales` must hold positive numbers, got {scale!r} for {token}."
                )
        if not (math.isfinite(self.loss_weight) and self.loss_weight >= 0):
            raise ValueError(f"`GeodeDrhConfig.loss_weight` must not be negative, got {self.loss_weight}.")


def default_control_tokens() -> dict[str, dict]:
    """
    The paper's two control tokens.

    The identifiers are those of geode-1.5b's tokenizer. The statistics are those of standardised targets until
    training measures its own; see [`GeodeConfig`].
    """
    return {
        "<REG>": {
            "token_id": 151669,
            "dim": 1,
            "kind": "scalar",
            "codec": {"transform": "log1p", "mean": [0.0], "std": [1.0]},
        },
        "<3DBBOX>": {
            "token_id": 151670,
            "dim": 7,
            "kind": "box3d",
            "codec": {"mean": [0.0] * 6, "std": [1.0] * 6},
        },
    }


@strict
class GeodeConfig(_CheckedConfig):
    """
    A GEODE model: vision tower and projector, rationale module, language model, regression head.

    > Parameters of the parts

    Args:
        vision_config (`dict` or `PreTrainedConfig`): The vision tower; default InternViT-300M at 448 pixels.
        text_config (`dict` or `PreTrainedConfig`): Any decoder that `AutoModel` builds; default Qwen2.5-1.5B.
        drm_config (`dict` or [`GeodeDrmConfig`]): The Decoupled Rationale Module.
        drh_config (`dict` or [`GeodeDrhConfig`]): The Direct Regression Head.
        point_config (`dict` or [`SonataConfig`]): The point encoder.
        reconstructor_config (`dict` or [`VggtConfig`], *optional*): The reconstructor; `None` leaves it out of the
            checkpoint, and geometry must then come with the inputs.

    > Parameters of the tokens

    Args:
        image_token_id (`int`): Placeholder of one visual token, of images and of video frames alike.
        rationale_token_id (`int`): Placeholder of one rationale token, `<spatio>`.
        control_tokens (`dict[str, dict]`): What each control token stands for. An entry has `token_id` (`int`), `dim`
            (`int`, size of the value), `kind` (`"scalar"`, `"box3d"` for cx cy cz dx dy dz yaw, or `"vector"`) and
            `codec`: `mean` and `std` (lists) standardise the target, and `transform` (`"identity"`, `"log"`, `"log1p"`,
            `"symlog"`) precedes them for scalars and vectors. A box's statistics are of its centre and of the logarithms
            of its sizes; its yaw is encoded as sine and cosine of twice the angle. Values are in SI units.

    > Parameters of the visual path (as in InternVL)

    Args:
        downsample_ratio (`float`, defaults to 0.5): Side ratio of the pixel shuffle.
        projector_hidden_act (`str`, defaults to `"gelu"`): Activation of the projector.
        vision_feature_layer (`int`, defaults to -1): Layer of the vision tower that is read.
        vision_feature_select_strategy (`str`, defaults to `"default"`): `"default"` drops the class token.
        tie_word_embeddings (`bool`, defaults to `True`): The output layer shares the input embedding.

    > Other parameters

    Args:
        max_points (`int`, defaults to 65536): Largest cloud that the reconstructor hands to the point encoder.
        initializer_range (`float`, defaults to 0.02): Standard deviation of new weights outside the sub-models.
        parts (`list[dict]`, *optional*): The public checkpoints that the model was assembled from, with their commits, files and
            licences. It changes nothing, and is passed on to what is trained from the model.
    """

    model_type = "geode"
    sub_configs_defaults = {  # noqa: RUF012 - the library's class attribute
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="internvl_vision", init_kwargs={"attention_bias": True}
        ),
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="qwen2",
            init_kwargs={
                "vocab_size": 151936,
                "hidden_size": 1536,
                "intermediate_size": 8960,
                "num_hidden_layers": 28,
                "num_attention_heads": 12,
                "num_key_value_heads": 2,
                "max_position_embeddings": 32768,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
                "tie_word_embeddings": True,
            },
        ),
        "drm_config": GeodeDrmConfig,
        "drh_config": GeodeDrhConfig,
        "point_config": SonataConfig,
        "reconstructor_config": SubConfigSpec(config_class=VggtConfig, optional=True),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    drm_config: dict | PreTrainedConfig | None = None
    drh_config: dict | PreTrainedConfig | None = None
    point_config: dict | PreTrainedConfig | None = None
    # An empty dict is VGGT-1B; None is a checkpoint without a reconstructor, and must stay None.
    reconstructor_config: dict | PreTrainedConfig | None = field(default_factory=dict)

    image_token_id: int = 151667
    rationale_token_id: int = 151668
    control_tokens: dict[str, dict] = field(default_factory=default_control_tokens)
    downsample_ratio: float = 0.5
    projector_hidden_act: str = "gelu"
    vision_feature_layer: int = -1
    vision_feature_select_strategy: str = "default"
    tie_word_embeddings: bool = True
    max_points: int = 65536
    initializer_range: float = 0.02
    parts: list[dict] | None = None

    @property
    def image_seq_length(self) -> int:
        """Visual tokens of one image or video frame."""
        height, width = self.patch_grid
        return int(height * self.downsample_ratio) * int(width * self.downsample_ratio)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches of one image."""
        sizes = zip(self.vision_config.image_size, self.vision_config.patch_size, strict=True)
        height, width = (size // patch for size, patch in sizes)
        return height, width

    @property
    def max_value_dim(self) -> int:
        """Size of the largest value, the last dimension of `regression_targets`."""
        return max((entry["dim"] for entry in self.control_tokens.values()), default=1)

    def validate_visual_path(self):
        """The pixel shuffle divides the patch grid."""
        _check_choice(self, "vision_feature_select_strategy", ("default", "full"))
        if not 0.0 < self.downsample_ratio <= 1.0:
            raise ValueError(f"`downsample_ratio` must lie in (0, 1], got {self.downsample_ratio}.")
        factor = round(1 / self.downsample_ratio)
        if any(side % factor for side in self.patch_grid):
            raise ValueError(
                f"`downsample_ratio` {self.downsample_ratio} does not divide the patch grid {self.patch_grid}."
            )
        pooling = self.drm_config.spatial_pooling
        if any(side % pooling for side in self.patch_grid):
            raise ValueError(
                f"`drm_config.spatial_pooling` {pooling} does not divide the patch grid {self.patch_grid}."
            )
        if self.drm_config.inject_features and factor % pooling:
            raise ValueError(
                "`drm_config.inject_features` adds fused features to visual tokens, so the pixel-shuffle factor "
                f"({factor}) must be a multiple of `drm_config.spatial_pooling` ({pooling})."
            )

    def validate_control_tokens(self):
        """Each control token says completely what it regresses."""
        _check_not_negative(self, "image_token_id", "rationale_token_id")
        ids = [self.image_token_id, self.rationale_token_id]
        for token, entry in self.control_tokens.items():
            _check_control_token(token, entry)
            ids.append(entry["token_id"])
        unknown = self.drh_config.interval_scales.keys() - self.control_tokens.keys()
        if unknown:
            raise ValueError(
                f"`drh_config.interval_scales` names {sorted(unknown)}, and `control_tokens` has {sorted(self.control_tokens)}."
            )
        if len(set(ids)) != len(ids):
            raise ValueError(f"Placeholders and control tokens need distinct ids, got {ids}.")


def _check_control_token(token: str, entry: dict) -> None:
    missing = {"token_id", "dim", "kind", "codec"} - entry.keys()
    unknown = entry.keys() - {"token_id", "dim", "kind", "codec"}
    if missing or unknown:
        raise ValueError(f"`control_tokens[{token!r}]` lacks {sorted(missing)} and has unknown {sorted(unknown)}.")
    kind, dim, codec = entry["kind"], entry["dim"], entry["codec"]
    if kind not in CONTROL_TOKEN_KINDS:
        raise ValueError(f"`control_tokens[{token!r}]['kind']` must be one of {CONTROL_TOKEN_KINDS}, got {kind!r}.")
    if not isinstance(entry["token_id"], int) or not isinstance(dim, int) or dim < 1:
        raise ValueError(
            f"`control_tokens[{token!r}]` needs an integer `token_id` and a `dim` of at least 1, got {entry}."
        )
    if (kind == "scalar" and dim != 1) or (kind == "box3d" and dim != 7):
        raise ValueError(f"`control_tokens[{token!r}]` of kind {kind!r} cannot have `dim` {dim}.")
    if not isinstance(codec, dict):
        raise ValueError(f"`control_tokens[{token!r}]['codec']` must be a dict, got {codec!r:.80}.")
    allowed = {"mean", "std"} if kind == "box3d" else {"mean", "std", "transform"}
    if codec.keys() != allowed:
        raise ValueError(
            f"`control_tokens[{token!r}]['codec']` must have the keys {sorted(allowed)}, got {sorted(codec)}."
        )
    if kind != "box3d" and codec["transform"] not in SCALAR_TRANSFORMS:
        raise ValueError(
            f"`control_tokens[{token!r}]['codec']['transform']` must be one of {SCALAR_TRANSFORMS}, "
            f"got {codec['transform']!r}."
        )
    size = 6 if kind == "box3d" else dim
    are_lists = all(_are_numbers(codec[name], size) for name in ("mean", "std"))
    if not are_lists or not all(std > 0 for std in codec["std"]):
        raise ValueError(
            f"`control_tokens[{token!r}]['codec']` needs {size} means and {size} positive stds, got {codec}."
        )


def _are_numbers(values, size: int) -> bool:
    """Whether these are `size` finite numbers."""
    if not isinstance(values, list | tuple) or len(values) != size:
        return False
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


__all__ = ["GeodeConfig", "GeodeDrhConfig", "GeodeDrmConfig", "SonataConfig", "VggtConfig"]
