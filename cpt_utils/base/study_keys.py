"""The keys of a study file. None is as good as no value, but where a key says something of the whole study."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from cpt_utils.base.keys import OF_TEXT, Keys, group

QUOTES = "put the code in quotes (no is false in YAML)"
Text = Annotated[str, Field(description="it must be a text")]
MaybeText = Annotated[str | None, Field(description="it must be a text")]
Code = Annotated[str | None, Field(description=QUOTES)]
Files = Annotated[dict[str, str | None] | None, Field(description="it must map language codes, as texts, to files")]
Part = Annotated[
    int | str | list[int] | None,
    Field(description="it must say a part of the model: hub, outer:0.25, [0, 1] (cpt/README.md)"),
]
ArmName = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$", description="it becomes a folder: letters, digits, _ . -")]
Count = Annotated[int | None, Field(ge=1, description="it must be a whole number above 0")]


class Languages(Keys):
    base: Code = None
    target: Code = None
    lsn: Annotated[list[str] | str | None, Field(description=QUOTES)] = None


class Data(Keys):
    source: MaybeText = None
    dir: MaybeText = None
    base_file: MaybeText = None
    target_file: MaybeText = None
    split: MaybeText = None
    drop_empty: Any = None
    heldout: Files = None
    heldout_lines: Annotated[int | None, Field(strict=False, ge=0, description="it must be a whole number")] = None
    task: group("name dir", list[str] | MaybeText) | None = None
    lsn_text: Files = None


class Lsn(Keys):
    rate: Annotated[float | None, Field(gt=0, le=1, description="give a share above 0 and at most 1")] = None
    layers: Count = None
    tokens: Count = None
    block_size: Count = None


class Ablation(Keys):
    """The defaults of layer-ablation/ablation_sweep.py; that the key is there asks the workflow for it."""

    sweeps: Annotated[list[str] | None, Field(description="it must be a list of sweeps (layer-ablation/README.md)")] = (
        None
    )
    stride: Count = None
    shots: Count = None
    sentences: Count = None
    prompt: Literal["pairs", "lines"] | None = None


Share = Annotated[float, Field(gt=0, lt=1, description="it must be a number between 0 and 1")]
Coefficient = Annotated[float, Field(strict=False, ge=-1, le=2, description="it must be a number from -1 to 2")]


class Rewind(Keys):
    orders: list[Literal["importance", "most", "contrast", "greedy", "random", "random_layer"]] | None = None
    stride: Count = None
    draws: Count = None


class Truncate(Keys):
    shares: list[Share] | None = None
    curves: list[Literal["svd", "as_random", "magnitude", "dare"]] | None = None
    draws: Count = None


class Connect(Keys):
    at: list[Coefficient] | None = None


class Spectral(Keys):
    """The defaults of spectral/; that the key is there asks the workflow for it."""

    measures: list[Literal["retrieval", "nll", "task"]] | None = None
    rewind: Rewind | None = None
    truncate: Truncate | None = None
    connect: Connect | None = None


class Lora(Keys):
    """LoRA beside the weights of some layers; `parameters_of` layers whose number of parameters it is to have."""

    r: Annotated[int, Field(ge=1, description="it must be a rank, a whole number above 0")]
    alpha: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="it must be a number above 0"), OF_TEXT
    ] = None
    dropout: Annotated[float, Field(ge=0, lt=1, description="it must be 0 or more, and below 1"), OF_TEXT] = 0.0
    targets: Annotated[
        str | list[str], Field(min_length=1, description="it must be all, attention, ffn, or like [q_proj, v_proj]")
    ] = "all"
    layers: Part = "all"
    parameters_of: Part = None
    merge: Annotated[bool, Field(description="it must be true or false")] = False


class Arm(Keys):
    """What an arm's training leaves as it is, or trains alone; a training file has the same keys."""

    freeze: Part = None
    train_only: Part = None
    lora: Lora | None = None
    io: Literal["trained", "frozen"] | None = None

    @model_validator(mode="after")
    def _one_part(self):
        if (self.freeze, self.train_only, self.lora).count(None) != 2:
            raise ValueError("give one of freeze, train_only and lora")
        if self.lora and self.io:
            raise ValueError("io goes with freeze or train_only")
        return self


class Train(group("world documents base cpt task", MaybeText)):
    """Training files; of `runs` one for each of the study's `runs` that is trained here."""

    runs: dict[ArmName, str] | None = None


class Study(Keys):
    name: Text = ""
    base: Text = ""
    run: Annotated[str | list[str] | None, Field(description="it must be a folder or name, or a list of them")] = None
    languages: Languages | None = None
    data: Data | None = None
    tokens: MaybeText = None
    lsn: Lsn | None = None
    results: Text = ""
    seed: Annotated[int, Field(description="it must be a whole number")] = 42
    dtype: Text = ""
    controls: Annotated[Literal["all"] | PositiveInt, Field(description="it is all, or the number of random sets")] = (
        "all"
    )
    measure: Annotated[
        Literal["published", "unit", "centred", "unit_centred", "mexa_weighted", "mexa_last"] | None,
        Field(description="it is the retrieval curve that layers are split by, published unless said"),
    ] = None
    sentences: Annotated[
        Literal["all", "half"] | None,
        Field(description="layers are split by retrieval of all sentences, or half of them"),
    ] = None
    runs: Annotated[dict[ArmName, str] | None, Field(description="it must map names to other runs of the base")] = None
    train: Train | None = None
    arms: dict[ArmName, Arm] | None = None
    ablation: Ablation | None = None
    spectral: Spectral | None = None

    @model_validator(mode="after")
    def _arms_and_runs_have_names_of_their_own(self):
        arms, runs = {*(self.arms or {})}, {*(self.runs or {})}
        if taken := {"base", "plain"} & (arms | runs):
            key = "arms" if taken & arms else "runs"
            raise ValueError(
                f"{key}: {min(taken)} is what the other models are called; give the {key[:-1]} another name"
            )
        if arms & runs:
            raise ValueError(f"{min(arms & runs)} is an arm and one of the runs; give one of them another name")
        return self

    @model_validator(mode="after")
    def _trained_runs_have_places(self):
        for name in (self.train and self.train.runs) or {}:
            if name not in (self.runs or {}):
                raise ValueError(f"train.runs.{name}: runs does not say where {name} lies")
        return self
