"""The keys of training files and documents files; cpt/README.md explains each. Imported only when one is read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cpt_utils.base.keys import OF_TEXT, Keys, group
from cpt_utils.base.training_keys import Lora, Part

FILE = "it becomes a file name; leave out the slash"
MORE = "it must map languages to texts: {ga: more.txt}"
RATE = "it must be a number above 0, e.g. 2.0e-3"
NUMBER = "it must be a number, 0 or more"
STEPS = "it must be a list of steps, whole numbers above 0"
TEXTS = "it needs two or more languages with a text each: {en: a.txt, ga: b.txt}"
TWO = "two of the parallel languages"

Count = Annotated[int, Field(ge=1, description="it must be a whole number above 0")]
Lines = Annotated[int | None, Field(ge=0, description="it must be a number of lines")]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False, description=NUMBER), OF_TEXT]
Name = Annotated[str, Field(strict=False, coerce_numbers_to_str=True, min_length=1, description="it must be a name")]
Folder = Annotated[str, Field(min_length=1, description="give --output-dir, or output in the file")]
Seed = Annotated[int, Field(ge=0, description="it must be a whole number, 0 or more")]


class Hub(Keys):
    """Arguments of load_dataset; data_files with the id `text` or `json` reads files from any address."""

    id: str
    config: Any = None
    split: Any = None
    revision: Any = None
    data_files: Any = None
    streaming: Any = None


class Source(Keys):
    name: Name
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False, description="it must be a number above 0")]
    files: Annotated[str | list[str], Field(description="it must be a file or a list of files")] = ""
    hub: Hub | str = ""
    column: Name = "text"
    limit: Annotated[int | None, Field(ge=1, description="it must be a number of documents above 0")] = None

    @model_validator(mode="after")
    def _one_place(self):
        if len({"files", "hub"} & self.model_fields_set) != 1:
            raise ValueError(f"source {self.name} needs either files or hub")
        return self


class Tokenizer(Keys):
    start: str | None = Field(None, alias="from")
    vocab_size: int | None = None
    special: group("eos pad bos unk", str, "") | None = None
    whole: list[str] | None = None
    resize: Any = None


class Training(Keys):
    output: Folder
    start: Annotated[str | None, Field(alias="from", description="it must be a text")] = None
    model: Annotated[dict | None, Field(description="it must be a mapping")] = None
    tokenizer: Tokenizer | None = None
    sources: Annotated[list[Source], Field(min_length=1, description="it must be a list")]
    block_size: Annotated[int, Field(ge=2, description="it must be a whole number of tokens, 2 or more")]
    batch_size: Count = 8
    gradient_accumulation: Count = 1
    steps: Count
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False, description=RATE), OF_TEXT]
    schedule: Any = "cosine"
    warmup_steps: Number = 0.0
    weight_decay: Number = 0.01
    max_grad_norm: Number = 1.0
    optimizer: Any = "adamw_torch"
    save_steps: Annotated[list[Count] | None, Field(default_factory=list, description=STEPS)]
    state_every: Count = 200
    dtype_on_disk: Literal["float32", "bfloat16", "float16", "float64"] = "bfloat16"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: Any = False
    torch_compile: bool = False
    freeze: Part = None
    train_only: Part = None
    lora: Lora | None = None
    io: Literal["trained", "frozen"] | None = None
    seed: Seed

    @model_validator(mode="after")
    def _fit_together(self):
        tokenizer = self.tokenizer or Tokenizer()
        if (self.model is None) == (self.start is None):
            raise ValueError("give either model (a configuration) or from (a model to train further)")
        parts = [part for part in (self.freeze, self.train_only, self.lora) if part is not None]
        if len(parts) > 1:
            raise ValueError("give one of freeze, train_only and lora")
        if parts and not self.start:
            raise ValueError("freeze, train_only and lora need a model that is trained further (from)")
        if self.io and (self.lora or not parts):
            raise ValueError("io goes with freeze or train_only")
        if self.lora and tokenizer.resize is not None:
            raise ValueError("lora trains no embeddings and so no new tokens; leave out tokenizer.resize")
        if beyond := [step for step in self.save_steps or [] if step > self.steps]:
            raise ValueError(f"save_steps holds {beyond[0]}, but the run ends at step {self.steps}")
        if self.start and tokenizer.vocab_size:
            raise ValueError("a model that is trained further keeps its tokens; leave out tokenizer.vocab_size")
        if not self.start and bool(tokenizer.start) == bool(tokenizer.vocab_size):
            raise ValueError("give tokenizer: {vocab_size: N} to train one, or tokenizer: {from: MODEL}")
        if len({source.name for source in self.sources}) < len(self.sources):
            raise ValueError("two sources have the same name; names must differ")
        return self


class Lexicon(Keys):
    iterations: int = 10
    min_count: float = 2
    min_probability: float = 0.2


class Plan(Keys):
    """What every entry of `documents` has besides the keys of its kind."""

    name: Annotated[str, Field(strict=False, coerce_numbers_to_str=True, pattern="^[^/]+$", description=FILE)] = ""
    passes: Count = 1

    @property
    def called(self) -> str:
        languages = [self.language] if self.kind == "monolingual" else self.languages
        return self.name or f"{self.kind}.{'-'.join(languages)}"


class Monolingual(Plan):
    kind: Literal["monolingual"]
    language: str
    lines: Count = 4


class Pairs(Plan):
    kind: Literal["pairs"]
    languages: Annotated[list[str], Field(description=f"it must be {TWO}")]
    pairs: Count = 2


class Mixed(Plan):
    kind: Literal["mixed"]
    languages: Annotated[list[str], Field(description=f"it must be {TWO}")]
    lines: Count = 4
    probability: Annotated[float, Field(gt=0, le=1, description="it must be above 0 and at most 1")] = 0.4


class Documents(Keys):
    output: Folder
    parallel: Annotated[dict[str, Any], Field(min_length=2, description=TEXTS)]
    monolingual: Annotated[dict[str, Any] | None, Field(description=MORE)] = None
    parallel_lines: Lines = None
    monolingual_lines: Lines = None
    lexicon: Lexicon | None = None
    documents: list[Annotated[Monolingual | Pairs | Mixed, Field(discriminator="kind")]] | None = None
    seed: Seed

    @model_validator(mode="after")
    def _texts_are_there(self):
        for plan in self.documents or []:
            if plan.kind == "monolingual":
                if plan.language not in (texts := {*self.parallel, *(self.monolingual or {})}):
                    lacking = f"no text in language {plan.language!r}; there is text in {', '.join(sorted(texts))}"
                    raise ValueError(f"documents[{plan.called}]: {lacking}")
            elif len(plan.languages) != 2 or len({*plan.languages} & {*self.parallel}) != 2:
                raise ValueError(f"documents[{plan.called}]: {', '.join(plan.languages)} are not {TWO}")
        names = [plan.called for plan in self.documents or []]
        if len(set(names)) < len(names):
            raise ValueError("two entries of documents have the same name; names must differ")
        return self
