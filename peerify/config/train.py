"""The `train:` section of a recipe. Imports neither torch nor transformers, so that recipes are read at once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from peerify.config.peer import Section


class SourceConfig(Section):
    """One text to train on."""

    path: str = Field(min_length=1)
    """A .txt, .jsonl or .parquet file or a Hub dataset (name, name:config or name:config:split)."""

    weight: float = Field(default=1.0, gt=0)
    """Its share of the windows, relative to the other texts' weights."""

    streaming: bool | None = None
    """Read as training goes on instead of all at the start; by default Hub datasets are streamed, files are not."""


class DataConfig(Section):
    """What is read, and in which order."""

    sources: list[SourceConfig] = Field(default_factory=list)
    """The texts."""

    context: int = Field(default=512, ge=2)
    """Tokens in a window."""

    cross_documents: bool = True
    """Fill windows with one document after another; otherwise a window holds tokens of one document, and padding."""

    shuffle: bool = True
    """Take windows in a random order, the same for the same seed; of streamed texts, within the buffer."""

    buffer: int = Field(default=1000, ge=1)
    """Windows of a streamed text among which the next one is drawn."""

    selection: Literal["all", "entropy"] = "all"
    """entropy keeps the windows that compress worst together (ZIP, 2407.06645)."""

    keep: float = Field(default=0.5, gt=0, le=1)
    """Share of the windows that selection keeps."""

    @field_validator("sources", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """`sources: a.txt` and `sources: [a.txt, {path: b.txt}]` mean what they seem to."""
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        return [{"path": item} if isinstance(item, str) else item for item in values]


class ObjectiveConfig(Section):
    """Weights of the losses; a weight of 0 leaves a loss out."""

    next_token: float = Field(default=0.0, ge=0)
    """Cross entropy of the next token."""

    kl: float = Field(default=0.0, ge=0)
    """KL divergence from the dense teacher's predictions."""

    kl_topk: int | None = Field(default=None, ge=1)
    """Compare only so many of the teacher's largest logits, and the rest as one; by default all of them."""

    layerwise: float = Field(default=0.0, ge=0)
    """Distance of every block's output from the teacher's."""

    load_balance: float = Field(default=0.0, ge=0)
    """Evens out how often experts are retrieved (Switch Transformer, 2101.03961, eq. 4)."""

    z_loss: float = Field(default=0.0, ge=0)
    """Keeps the router's scores small (ST-MoE, 2202.08906, eq. 5)."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the dense model runs beside the one in training."""
        return self.kl > 0 or self.layerwise > 0

    @model_validator(mode="after")
    def _something(self) -> ObjectiveConfig:
        if not (self.next_token or self.kl or self.layerwise):
            raise ValueError("all of next_token, kl and layerwise are 0: give one of them a weight, such as kl: 1")
        if self.kl_topk is not None and not self.kl:
            raise ValueError("kl_topk is about kl, which is 0: give kl a weight, or leave kl_topk out")
        return self


class OptimizerConfig(Section):
    """How parameters move."""

    name: Literal["adamw", "adafactor", "adamw8bit", "galore"] = "adamw"
    """adamw8bit needs bitsandbytes and a GPU; galore keeps the states of linear layers in a low rank (2403.03507)."""

    lr: float = Field(default=2e-4, gt=0)
    """Learning rate, at its highest."""

    experts_scale: float = Field(default=1.0, ge=0)
    """Times the learning rate, for the expert tables."""

    router_scale: float = Field(default=0.1, ge=0)
    """Times the learning rate, for queries and sub-keys, which the conversion has trained already; 0 leaves them."""

    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the moments of adamw."""

    weight_decay: float = Field(default=0.0, ge=0)
    """For the matrices of the rest of the model; expert tables, router, norms and biases are not decayed."""

    rank: int = Field(default=128, ge=1)
    """Rank of galore."""

    tables: Literal["same", "rowwise_adagrad", "sgd"] = "same"
    """For the tables of memories: the optimizer of all else, which takes time and memory by all of their rows; or one
    that takes them by the rows that a step retrieved, with one number of state for each row, or none."""

    tables_scale: float = Field(default=1.0, gt=0)
    """Times the learning rate, for tables with an optimizer of their own; experts_scale is then not about them."""

    update_every: int = Field(default=200, ge=1)
    """Steps between new subspaces of galore."""

    @property
    def by_rows(self) -> bool:
        """Whether tables of memories have an optimizer of their own."""
        return self.tables != "same"

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each beta is at least 0 and below 1")
        return betas


class LoraConfig(Section):
    """Low-rank adapters on the linear layers outside PEER (r 8, alpha 32: CMoE, 2502.04416)."""

    rank: int = Field(default=8, ge=1)
    """r."""

    alpha: int = Field(default=32, ge=1)
    """Adapters are scaled by alpha / rank."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""

    merge: bool = True
    """Add the adapters to the weights at the end of the stage; otherwise they lie beside them, in adapter/."""


class LisaConfig(Section):
    """LISA (2403.17919): PEER layers, embeddings and head always train, of the rest a few random blocks at a time."""

    blocks: int = Field(default=2, ge=1)
    """Blocks whose other parameters train at a time."""

    every: int = Field(default=20, ge=1)
    """Steps between two draws; what the optimizer knew of the blocks before is dropped."""


class MemoryConfig(Section):
    """Which experts learn: those that the new text uses much more than other text (2510.15103). Of models that were
    grown, these are experts of memories."""

    background: list[str] = Field(default=[], max_length=1000)
    """Texts of the kinds that the model is not to forget; use of experts is counted against theirs."""

    experts: float = Field(default=0.05, gt=0)
    """How many of each layer's experts learn: a share up to 1, or a number."""

    tokens: int = Field(default=16384, ge=1)
    """Of the new text and of the background, on which use is counted at the start of the stage."""

    @field_validator("background", mode="before")
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [] if value is None else [value]

    @field_validator("experts")
    @classmethod
    def _share_or_number(cls, experts: float) -> float:
        if experts > 1 and experts != int(experts):
            raise ValueError(f"{experts:g} is no share of the experts, which is at most 1, and no whole number of them")
        return experts


class StageConfig(Section):
    """A part of the training with its own objectives, trainable parts and optimizer."""

    share: float = Field(default=1.0, gt=0)
    """Its part of the tokens, relative to the other stages' shares."""

    train: Literal["peer", "peer+lora", "full", "lisa", "memory"] = "peer"
    """What trains: the PEER layers, these and adapters on the rest, everything, everything by turns, or those experts
    that new text uses more than other text does."""

    objectives: ObjectiveConfig = ObjectiveConfig(kl=1.0)
    """The losses."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""

    lora: LoraConfig = LoraConfig()
    """For train: peer+lora."""

    lisa: LisaConfig = LisaConfig()
    """For train: lisa."""

    memory: MemoryConfig = MemoryConfig()
    """For train: memory."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""

    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps in which the learning rate rises."""

    final_lr: float = Field(default=0.05, ge=0, le=1)
    """Learning rate at the end, as a share of the highest."""

    temperature: float = Field(default=0.3, gt=0)
    """Unit gates: width of the sigmoid through which gradients reach the selection, in spreads of a token's scores."""

    router_every: int = Field(default=4, ge=1)
    """Unit gates: one token in so many teaches the router, whose own gradient costs as much less; with load_balance or
    z_loss all of them do."""

    balance_rate: float = Field(default=0.0, ge=0)
    """Step of the bias that evens out retrieval without a loss (2408.15664), in spreads of the scores; 0: none."""

    reseed: bool = False
    """At each count of use (usage_tokens): sub-keys of memories that found nothing move beside the busiest ones, and
    their experts become copies of those that these find. What the model computes is not quite the same after."""

    @field_validator("objectives", "optimizer", "lora", "lisa", "memory", mode="before")
    @classmethod
    def _empty(cls, value: Any, info: Any) -> Any:
        return {"kl": 1.0} if value is None and info.field_name == "objectives" else {} if value is None else value


class EvaluationConfig(Section):
    """Perplexity while training; the model with the smallest is kept."""

    data: str | None = None
    """Text to measure on, not one of those trained on."""

    test: str | None = None
    """Text on which `peerify run` measures the result at the end; by default the same."""

    tokens: int = Field(default=16384, ge=1)
    """At most so many of its first tokens."""

    every: int = Field(default=50, ge=1)
    """Steps between two measurements."""

    keep_best: bool = True
    """Write the best model measured instead of the last one."""


class CheckpointConfig(Section):
    """From what a run goes on after it was stopped."""

    every: int = Field(default=50, ge=1)
    """Steps between two checkpoints."""

    keep: int = Field(default=2, ge=1)
    """Checkpoints kept; the oldest go."""


class TrainConfig(Section):
    """Continued training of the converted model that `output` names, towards the dense one that `model` names."""

    output: str | None = Field(default=None, min_length=1)
    """Folder of the trained model; by default the converted model's with -healed."""

    tokens: int = Field(default=200_000, ge=1)
    """Tokens of all stages together."""

    data: DataConfig = DataConfig()
    """What is read."""

    stages: list[StageConfig] = Field(default=[StageConfig()], min_length=1)
    """What is done, one after the other."""

    batch_size: int = Field(default=4, ge=1)
    """Windows in one step, over all processes."""

    micro_batch_size: int | None = Field(default=None, ge=1)
    """Windows that one process runs at once; gradients are accumulated over the rest. By default all of its share."""

    precision: Literal["no", "bf16", "fp16", "auto"] = "no"
    """Mixed precision; weights and optimizer stay in float32. auto: bf16 where the device is fast with it, or no."""

    clip: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient; 0: any."""

    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""

    compile: bool = False
    """torch.compile the model."""

    spike: float = Field(default=2.0, ge=0)
    """Stop when the loss of three steps in a row is so many times the mean of the 20 before; 0: never."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the order of windows, dropout, adapters and LISA's blocks."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """Measurements on the way."""

    checkpoints: CheckpointConfig = CheckpointConfig()
    """Checkpoints on the way."""

    loggers: list[Literal["tensorboard", "wandb", "trackio"]] | None = None
    """Where curves go; by default tensorboard where it is installed. A log.jsonl is always written."""

    log_every: int = Field(default=5, ge=1)
    """Steps between two lines of the log."""

    usage_tokens: int = Field(default=100_000, ge=1)
    """Tokens on which use of retrieved experts is counted, from one line of the log about it to the next; experts that
    none of them finds are dead."""

    @field_validator("data", "evaluation", "checkpoints", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("stages", mode="before")
    @classmethod
    def _one_stage(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
        for number, stage in enumerate(self.stages):
            fault = self._stage_fault(number, stage)
            if fault:
                raise ValueError(f"train.stages.{number}: {fault}")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.batch_size {self.batch_size} cannot be run {self.micro_batch_size} at a time: "
                "make it a multiple of train.micro_batch_size"
            )
        return self

    def _stage_fault(self, number: int, stage: StageConfig) -> str | None:
        objectives, optimizer = stage.objectives, stage.optimizer
        if stage.train == "peer+lora" and not stage.lora.merge and number < len(self.stages) - 1:
            return "adapters can be kept beside the weights in the last stage only: set lora.merge true"
        if stage.train != "peer+lora" and "lora" in stage.model_fields_set:
            return f"lora has no effect with train {stage.train}: set train peer+lora, or leave lora out"
        if stage.train != "lisa" and "lisa" in stage.model_fields_set:
            return f"lisa has no effect with train {stage.train}: set train lisa, or leave lisa out"
        if stage.train != "memory" and "memory" in stage.model_fields_set:
            return f"memory has no effect with train {stage.train}: set train memory, or leave memory out"
        if optimizer.by_rows:
            fault = self._tables_fault(stage)
            if fault:
                return fault
        elif "tables_scale" in optimizer.model_fields_set:
            return "optimizer.tables_scale has no effect with tables same: set tables rowwise_adagrad or sgd"
        if stage.reseed and (stage.train == "memory" or optimizer.router_scale == 0):
            return "reseed moves sub-keys, and these stay as they are: set reseed false"
        if stage.reseed and self.compile:
            return "reseed goes by counts of use, and what is compiled is not counted: set train.compile false"
        if stage.train == "memory":
            return self._memory_fault(number, stage)
        if stage.train == "lisa" and optimizer.name == "galore":
            return "galore's subspaces outlive lisa's blocks: take adamw"
        if self.compile and stage.train == "lisa":
            return "lisa changes what trains, and compile cannot follow: set train.compile false"
        if objectives.layerwise and self.compile:
            return "layerwise reads the blocks' outputs, which compile hides: set train.compile false"
        if optimizer.router_scale == 0 and (objectives.load_balance or objectives.z_loss):
            return "load_balance and z_loss train the router, whose rate is 0: set optimizer.router_scale"
        return None

    def _tables_fault(self, stage: StageConfig) -> str | None:
        tables = f"optimizer.tables {stage.optimizer.tables}"
        if stage.train == "memory":
            return f"{tables} has no effect with train memory, whose optimizer knows few rows: leave tables out"
        if stage.optimizer.name == "adamw8bit":
            return f"{tables} was never tried beside adamw8bit: take adamw or adafactor"
        if self.compile:
            return f"{tables} takes gradients of rows alone, which compile cannot make: set train.compile false"
        return None

    def _memory_fault(self, number: int, stage: StageConfig) -> str | None:
        background, objectives = stage.memory.background, stage.objectives
        if not background:
            return (
                f"memory.background is empty, and use of experts is counted against it: set "
                f"stages.{number}.memory.background to text of the kind that is not to be forgotten"
            )
        for source in self.data.sources:
            if source.path in background:
                return f"memory.background names {source.path}, which is learned: name text of other kinds"
        if objectives.load_balance or objectives.z_loss or stage.balance_rate:
            return "load_balance, z_loss and balance_rate move the router, which stays as it is: drop them"
        if objectives.layerwise and self.compile:
            return "layerwise reads the blocks' outputs, which compile hides: set train.compile false"
        return None

    def steps_of_stages(self) -> list[int]:
        """Optimizer steps of each stage; at least one each, together as many as `tokens` pay for."""
        total = max(len(self.stages), self.tokens // (self.batch_size * self.data.context))
        shares = [stage.share for stage in self.stages]
        ends = [round(total * sum(shares[: i + 1]) / sum(shares)) for i in range(len(shares))]
        for i in range(len(ends)):  # a stage whose share rounds to nothing takes a step from its neighbours
            ends[i] = min(max(ends[i], i + 1, (ends[i - 1] if i else 0) + 1), total - (len(ends) - 1 - i))
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
