"""The keys of a study file. null counts as no value, except for keys about the study as a whole.

A field's title says what the key means, `usual` what holds without it; `docs/study.py` makes docs/study.md from them.
Its description is the end of an error message.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from cpt_utils.base.keys import Keys, key
from cpt_utils.base.training_keys import Lora, Part

QUOTES = "put the code in quotes (no is false in YAML)"
Text = Annotated[str, Field(description="it must be a text")]
MaybeText = Annotated[str | None, Field(description="it must be a text")]
Code = Annotated[str | None, Field(description=QUOTES)]
Files = Annotated[dict[str, str | None] | None, Field(description="it must map language codes, as texts, to files")]
ArmName = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$", description="it becomes a folder: letters, digits, _ . -")]
Count = Annotated[int | None, Field(ge=1, description="it must be a whole number above 0")]


class Languages(Keys):
    base: Code = key("the language that the base model knew; retrieval queries are in it", "eng_Latn", "needed")
    target: Code = key("the language of the continued pre-training", "eus_Latn", "needed")
    lsn: Annotated[list[str] | str | None, Field(description=QUOTES)] = key(
        "languages whose neurons Part II compares, including base and target", ["eng_Latn", "spa_Latn", "eus_Latn"],
        "no neurons",
    )  # fmt: skip


class Task(Keys):
    name: list[str] | MaybeText = key("lm_eval's name of the task, or a list of names", "sib200_eus_Latn", "needed")
    dir: MaybeText = key(
        "local data: SIB-200 (`<code>/test.tsv`), continuations, or your own tasks",
        "my-texts/sib200",
        "from the hub",
    )
    rows: Count = key("measure changed models (swaps, arms) on the first so many rows", 300, "all")


class Data(Keys):
    source: MaybeText = key("source of the parallel sentences: `flores`, `sib200`, `text`, `tsv`", "text", "flores")
    dir: MaybeText = key("a local copy of `flores` or `sib200`; the folder of the files below", "my-texts")
    base_file: MaybeText = key(
        "`text`: sentences of the base language; `tsv`: TABLE or TABLE:COLUMN", "my-texts/en.txt"
    )
    target_file: MaybeText = key("the same for the target language; for `tsv` the same table", "my-texts/eu.txt")
    split: MaybeText = key("part of `flores` (dev, devtest) or `sib200` (train, dev, test, all)", "devtest", "dev; all")
    drop_empty: Any = key("leave out pairs with an empty side instead of refusing them", True, "false")
    heldout: Files = key(
        "held-out text by language, one document per line, for losses and samples",
        {"eng_Latn": "my-texts/en.held.txt", "eus_Latn": "my-texts/eu.held.txt"},
        "no losses, no deactivation",
    )
    heldout_lines: Annotated[int | None, Field(strict=False, ge=0, description="it must be a whole number")] = key(
        "lines per document; the first is context and is not scored", 4, "1, scored whole"
    )
    task: Task | None = key("a downstream task for lm_eval", {"name": "sib200_eus_Latn"}, "no task")
    lsn_text: Files = key(
        "text for counting active neurons, by language; null: mOSCAR, from the hub",
        {"eng_Latn": "my-texts/en.txt.gz", "eus_Latn": None}, "mOSCAR",
    )  # fmt: skip


class Lsn(Keys):
    rate: Annotated[float | None, Field(gt=0, le=1, description="give a share above 0 and at most 1")] = key(
        "share of all neurons to select", 0.05, "0.01"
    )
    layers: Count = key("number of layers that count as rich in neurons", 8, "that of interface layers")
    tokens: Count = key("tokens per language", 10_000_000, "100,000,000")
    methods: list[Literal["ternary", "ap", "gradient"]] | None = key(
        "other methods of finding neurons, compared with LAPE (lsn/README.md)", ["ternary", "ap"], "LAPE alone"
    )
    texts: Count = key("texts per language, for `ap` and `gradient`", 200, "500")
    block_size: Count = key("tokens per block (one forward pass)", 1024, "4096, or 2048 (Qwen)")


class Ablation(Keys):
    """The defaults of layer-ablation/ablation_sweep.py; if the key is present, the workflow runs it."""

    sweeps: Annotated[list[str] | None, Field(description="it must be a list of sweeps (layer-ablation/README.md)")] = (
        key("which blocks are restored, and from which model", ["insert_in", "window:2"], "all named ones")
    )
    stride: Count = key("measure every so many layers", 2, "1")
    shots: Count = key("translated pairs at the start of a prompt", 1, "4")
    sentences: Count = key("pairs to score", 150, "all but the shots")
    prompt: Literal["pairs", "lines"] | None = key(
        "form of the prompt", "lines", "`pairs` with `train.base`, else `lines`"
    )


Share = Annotated[float, Field(gt=0, lt=1, description="it must be a number between 0 and 1")]
Coefficient = Annotated[float, Field(strict=False, ge=-1, le=2, description="it must be a number from -1 to 2")]
Strength = Annotated[float, Field(strict=False, ge=0, description="it must be a number, 0 or more")]


class Rewind(Keys):
    orders: list[Literal["importance", "most", "contrast", "greedy", "random", "random_layer"]] | None = key(
        "orders in which heads are restored", ["importance", "random"], "all"
    )
    stride: Count = key("step between measurements, in percent of the heads", 10, "5")
    draws: Count = key("draws of each random order", 2, "5")


class Truncate(Keys):
    shares: list[Share] | None = key("shares of the update to cut off", [0.5, 0.9], "0.1 to 0.9, 0.95")
    curves: list[Literal["svd", "as_random", "magnitude", "dare"]] | None = key("ways to cut", ["svd", "dare"], "all")
    draws: Count = key("draws of each random way", 1, "2")


class Connect(Keys):
    at: list[Coefficient] | None = key("points on the line between two runs", [0.25, 0.5, 0.75], "0, 0.1, .., 1")


class Spectral(Keys):
    """The defaults of spectral/; if the key is present, the workflow runs it."""

    measures: list[Literal["retrieval", "nll", "task"]] | None = key(
        "measures of a changed model", ["nll"], "all with data"
    )
    rewind: Rewind | None = key("restore heads of the base", {"stride": 10}, "its defaults")
    truncate: Truncate | None = key("cut the update", {"shares": [0.5, 0.9]}, "its defaults")
    connect: Connect | None = key("the line between two runs; needs `runs`", {"at": [0.5]}, "its defaults")


class Gradients(Keys):
    pairs: Count = key("pairs of sentences whose gradients are compared", 40, "100")


class Bigram(Keys):
    text: Files = key(
        "text for counting bigrams, by language, like that of the training",
        {"eng_Latn": "my-texts/en.txt", "eus_Latn": "my-texts/eu.txt"}, "`data.lsn_text`",
    )  # fmt: skip
    tokens: Count = key("most tokens to count per language", 100_000, "1,000,000")


class Alignment(Keys):
    """The defaults of alignment/; if the key is present, the workflow runs it."""

    gradients: Gradients | None = key("cosines between gradients of translations", {"pairs": 40}, "its defaults")
    bigram: Bigram | None = key("correlation of surprisal with bigrams", {"tokens": 100_000}, "its defaults")


class Routing(Keys):
    """The defaults of moe-routing/steering.py; if the key is present, the workflow runs both scripts."""

    strengths: list[Strength] | None = key(
        "strengths of soft steering, in standard deviations of a router's logits", [0.5, 1.0], "1.0"
    )
    random: Count = key("random sets of experts; also the most shifts to other layers", 10, "5")


class Steering(Keys):
    """The defaults of steering/steer.py; if the key is present, the workflow runs it."""

    alphas: Annotated[
        list[Annotated[float, Field(strict=False, description="it must be a number")]] | None,
        Field(min_length=1, description="it must be a list of numbers"),
    ] = key("multiples of the difference between the languages' means", [1, 2], "0.5, 1, 1.5, 2")
    layers: Annotated[list[int] | None, Field(min_length=1, description="it must be a list of layers")] = key(
        "layers to steer, one at a time", [0, 4, 8], "all"
    )
    draws: Count = key("draws of random directions and of random neurons", 2, "3")
    sentences: Count = key("sentences to continue; directions come from the others", 60, "100, at most half")


class Arm(Keys):
    """The part that an arm's training freezes, or trains alone; a training file has the same keys."""

    freeze: Part = key("part of the model that stays frozen", "hub", "one of the three")
    train_only: Part = key("the only part of the model to train", "outer:0.25", "one of the three")
    lora: Lora | None = key("LoRA", {"r": 8}, "one of the three")
    io: Literal["trained", "frozen"] | None = key(
        "embeddings, final norm and head", "trained", "`trained` with `freeze`, else `frozen`"
    )

    @model_validator(mode="after")
    def _one_part(self):
        if (self.freeze, self.train_only, self.lora).count(None) != 2:
            raise ValueError("give one of freeze, train_only and lora")
        if self.lora and self.io:
            raise ValueError("io goes with freeze or train_only")
        return self


class Train(Keys):
    """Training files; `runs` has one for each of the study's `runs` that is trained here."""

    world: MaybeText = key("file that generates the demo's texts (demo/README.md)", "demo/world.yaml", "none are made")
    documents: MaybeText = key(
        "file of training documents (cpt/README.md)", "studies/multi30k/documents.yaml", "none are made"
    )
    base: MaybeText = key("training file of the base (cpt/README.md)", "demo/base.yaml", "`base` exists")
    cpt: MaybeText = key("training file of the run", "demo/cpt.yaml", "`run` exists")
    task: MaybeText = key("`continuations`: make the task from held-out text", "continuations", "the task exists")
    runs: dict[ArmName, str] | None = key(
        "training files of `runs` that are trained here", {"second": "demo/cpt_second.yaml"}, "`runs` exist"
    )


class Study(Keys):
    name: Text = key("the study's name in files and figures", "basque", "the file's name", "")
    base: Text = key("the model before CPT: a folder, `org/name`, `org/name@revision`", "my-models/base", "needed", "")
    run: Annotated[str | list[str] | None, Field(description="it must be a folder or name, or a list of them")] = key(
        "CPT checkpoints: a folder of them, `org/name@step*`, or a list", "my-models/cpt", "needed"
    )
    languages: Languages | None = key(
        "codes of FLORES+ or ISO, or your own", {"base": "eng_Latn", "target": "eus_Latn"}, "needed"
    )
    data: Data | None = key("texts", {"source": "sib200", "dir": "my-texts/sib200"}, "FLORES+ alone, from the hub")
    tokens: MaybeText = key("folder for the token ids of Part II, which are made there", "my-tokens", "no neurons")
    lsn: Lsn | None = key("neurons", {"tokens": 10_000_000}, "its defaults")
    results: Text = key("folder of all results", "results/basque", "`results/<name>`", "")
    seed: Annotated[int, Field(description="it must be a whole number")] = key("seed of all draws", 0, default=42)
    dtype: Text = key(
        "of computations: float32, bfloat16, float16, float64", "float32", "bfloat16 on a GPU, else float32", ""
    )
    controls: Annotated[Literal["all"] | PositiveInt, Field(description="it is all, or the number of random sets")] = (
        key("random sets to compare a swap with; `all`: all of its size, or 300 random ones", 100, default="all")
    )
    measure: Annotated[
        Literal["published", "unit", "centred", "unit_centred", "mexa_weighted", "mexa_last"] | None,
        Field(description="it is the retrieval curve that layers are split by; default: published"),
    ] = key("the retrieval curve that layers are split by (sentence-retrieval/README.md)", "unit_centred", "published")
    sentences: Annotated[
        Literal["all", "half"] | None,
        Field(description="layers are split by retrieval of all sentences, or half of them"),
    ] = key("sentences that layers are split by; `half`: swaps are tested on the others", "half", "all")
    runs: Annotated[dict[ArmName, str] | None, Field(description="it must map names to other runs of the base")] = key(
        "other runs of the base, by name", {"second": "my-models/cpt-2"}, "none"
    )
    train: Train | None = key("training files of models that are trained here", {"cpt": "demo/cpt.yaml"}, "all exist")
    arms: dict[ArmName, Arm] | None = key(
        "repeats of the run with a part frozen, by name (cpt/README.md)", {"hub_frozen": {"freeze": "hub"}}, "none"
    )
    ablation: Ablation | None = key("run layer ablation; `{}` will do (layer-ablation/README.md)", {}, "left out")
    spectral: Spectral | None = key("run Part IV; `{}` will do (spectral/README.md)", {}, "left out")
    alignment: Alignment | None = key("run gradients and bigrams; `{}` will do (alignment/README.md)", {}, "left out")
    routing: Routing | None = key(
        "for a mixture of experts, measure routing; `{}` will do (moe-routing/README.md)", {}, "left out"
    )
    steering: Steering | None = key("run steering; `{}` will do (steering/README.md)", {}, "left out")

    @model_validator(mode="after")
    def _arms_and_runs_have_names_of_their_own(self):
        arms, runs = {*(self.arms or {})}, {*(self.runs or {})}
        if taken := {"base", "plain"} & (arms | runs):
            key = "arms" if taken & arms else "runs"
            raise ValueError(f"{key}: {min(taken)} is the name of another model; give the {key[:-1]} another name")
        if arms & runs:
            raise ValueError(f"{min(arms & runs)} is an arm and one of the runs; give one of them another name")
        return self

    @model_validator(mode="after")
    def _trained_runs_have_places(self):
        for name in (self.train and self.train.runs) or {}:
            if name not in (self.runs or {}):
                raise ValueError(f"train.runs.{name}: runs does not say where {name} is")
        return self
