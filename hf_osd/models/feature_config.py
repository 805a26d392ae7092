"""`FeatureDraftConfig`: the shape of a feature-level draft."""

from __future__ import annotations

from transformers import PreTrainedConfig

# Rotary embeddings whose frequencies are the same at every length of text.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class FeatureDraftConfig(PreTrainedConfig):
    """The shape of a [`FeatureDraft`].

    Args:
        aux_layers (`list[int]`): the target's layers whose states it reads, counted as its `output_hidden_states` are: i is after i layers, 0 the embeddings.
        target_hidden_size (`int`): the width H_t of these states; `hidden_size` if left out.
        fc_norm (`bool`): each layer's state is normalised before `fc`.
        norm_before_fc (`bool`): all states are normalised before `fc`, as one vector.
        norm_before_residual (`bool`): the residual stream is the normalised feature.
        norm_output (`bool`): what is fed back is the state after the last norm.
        embed_scale (`float`): what embeddings are multiplied by.
        head_bias (`bool`): the LM head has one.
        draft_vocab_size (`int`, *optional*): how many tokens an LM head of the draft's own has rows for; it has the target's whole head if left out.
        target_num_hidden_layers, target_name_or_path, target_architectures (*optional*): of the target that it was made for: how many layers it has, its name on
            the Hub, and the names of its classes.

    Raises:
        ValueError: if they contradict each other.
    """

    model_type = "osd_feature_draft"
    keys_to_ignore_at_inference = ("past_key_values", "states", "head_states")

    vocab_size: int = 32000
    hidden_size: int = 576
    target_hidden_size: int | None = None
    aux_layers: list[int] | tuple[int, ...] = (2, 15, 27)
    intermediate_size: int = 1536
    num_hidden_layers: int = 1
    num_attention_heads: int = 9
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    rope_parameters: dict | None = None
    fc_norm: bool = True
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    embed_scale: float = 1.0
    head_bias: bool = False
    draft_vocab_size: int | None = None
    target_num_hidden_layers: int | None = None
    target_name_or_path: str | None = None
    target_architectures: list[str] | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.aux_layers = list(self.aux_layers)
        self.target_hidden_size = self.target_hidden_size or self.hidden_size
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        self._check()

    @property
    def states_size(self) -> int:
        """F, the width of the target's states, joined."""
        return len(self.aux_layers) * self.target_hidden_size

    @property
    def recorded_layers(self) -> list[int]:
        """The layers of the target whose states are recorded for learning: those that the draft reads, and the last, which its own are compared with where the LM
        head is the target's. Counted as `aux_layers` are."""
        last = self._last_layer
        return list(self.aux_layers) if last in (None, *self.aux_layers) else [*self.aux_layers, last]

    @property
    def last_state(self) -> slice | None:
        """Where the state after the target's last layer lies among the recorded ones, joined; `None` if the draft does not learn from it."""
        if self._last_layer is None:
            return None
        at, size = self.recorded_layers.index(self._last_layer), self.target_hidden_size
        return slice(at * size, (at + 1) * size)

    @property
    def _last_layer(self) -> int | None:
        """The target's last layer, if it is known and the LM head, which reads its state, is the target's."""
        shares_head = self.draft_vocab_size is None and self.hidden_size == self.target_hidden_size
        return self.target_num_hidden_layers if shares_head else None

    def _check(self):
        if self.num_hidden_layers != 1:
            raise ValueError(
                f"`num_hidden_layers` is {self.num_hidden_layers}; a feature-level draft has 1 layer. Choose a checkpoint of one."
            )
        if not self.aux_layers or min(self.aux_layers) < 0 or len(set(self.aux_layers)) < len(self.aux_layers):
            raise ValueError(
                f"`aux_layers` is {self.aux_layers}; give different layers of the target, such as [2, 15, 27]."
            )
        if self.states_size == self.hidden_size:
            raise ValueError(
                f"`aux_layers` is {self.aux_layers}: states of width {self.states_size} could not be told from the draft's own. Give two layers or more."
            )
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                f"{self.num_attention_heads} heads of width {self.head_dim} for {self.num_key_value_heads} key-value heads do not work; choose "
                "an even `head_dim`, and `num_attention_heads` that `num_key_value_heads` divides."
            )
        if self.fc_norm and self.norm_before_fc:
            raise ValueError("`fc_norm` and `norm_before_fc` exclude each other; set one of them.")
        kind = self.rope_parameters["rope_type"]
        if kind not in ROPE_TYPES or self.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"`rope_parameters` is {self.rope_parameters}; a feature-level draft rotates whole heads, by one of {', '.join(ROPE_TYPES)}. Choose one of these."
            )
