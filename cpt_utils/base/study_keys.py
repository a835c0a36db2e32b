"""The keys of a study file. None is as good as no value, but where a key says something of the whole study.

The title of a field says what it means, `usual` what holds without it; `docs/study.py` makes docs/study.md of them.
The description is the end of an error message.
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
    base: Code = key("the language that the model knew; sentences are looked up from it", "eng_Latn", "needed")
    target: Code = key("the language of the continued pre-training", "eus_Latn", "needed")
    lsn: Annotated[list[str] | str | None, Field(description=QUOTES)] = key(
        "languages whose neurons Part II tells apart, base and target among them", ["eng_Latn", "spa_Latn", "eus_Latn"],
        "no neurons",
    )  # fmt: skip


class Task(Keys):
    name: list[str] | MaybeText = key("lm_eval's name of the task; of several, a list", "sib200_eus_Latn", "needed")
    dir: MaybeText = key(
        "local data: SIB-200 (`<code>/test.tsv`), continuations, or tasks of one's own",
        "my-texts/sib200",
        "from the hub",
    )
    rows: Count = key("rows that changed models (swaps, arms) are measured on, the first", 300, "all")


class Data(Keys):
    source: MaybeText = key("where parallel sentences come from: `flores`, `sib200`, `text`, `tsv`", "text", "flores")
    dir: MaybeText = key("a local copy of `flores` or `sib200`; the folder of the files below", "my-texts")
    base_file: MaybeText = key(
        "`text`: sentences of the base language; `tsv`: TABLE or TABLE:COLUMN", "my-texts/en.txt"
    )
    target_file: MaybeText = key("the same of the target language; of `tsv` the same table", "my-texts/eu.txt")
    split: MaybeText = key("part of `flores` (dev, devtest) or `sib200` (train, dev, test, all)", "devtest", "dev; all")
    drop_empty: Any = key("leave pairs with an empty side out instead of refusing them", True, "false")
    heldout: Files = key(
        "text that nobody trained on, a document a line, by language: for the loss and for samples",
        {"eng_Latn": "my-texts/en.held.txt", "eus_Latn": "my-texts/eu.held.txt"},
        "no losses, no deactivation",
    )
    heldout_lines: Annotated[int | None, Field(strict=False, ge=0, description="it must be a whole number")] = key(
        "lines that make a document, of which the first is context and not scored", 4, "1, scored whole"
    )
    task: Task | None = key("a downstream task for lm_eval", {"name": "sib200_eus_Latn"}, "no task")
    lsn_text: Files = key(
        "text in which neurons are counted, by language; null: mOSCAR, from the hub",
        {"eng_Latn": "my-texts/en.txt.gz", "eus_Latn": None}, "mOSCAR",
    )  # fmt: skip


class Lsn(Keys):
    rate: Annotated[float | None, Field(gt=0, le=1, description="give a share above 0 and at most 1")] = key(
        "share of all neurons that are selected", 0.05, "0.01"
    )
    layers: Count = key("layers that count as rich in neurons", 8, "as many as are interface")
    tokens: Count = key("tokens of a language", 10_000_000, "100,000,000")
    methods: list[Literal["ternary", "ap", "gradient"]] | None = key(
        "other methods to find neurons, compared with LAPE (lsn/README.md)", ["ternary", "ap"], "LAPE alone"
    )
    texts: Count = key("texts of a language, for `ap` and `gradient`", 200, "500")
    block_size: Count = key("tokens of a block that is one forward pass", 1024, "4096, or 2048 (Qwen)")


class Ablation(Keys):
    """The defaults of layer-ablation/ablation_sweep.py; that the key is there asks the workflow for it."""

    sweeps: Annotated[list[str] | None, Field(description="it must be a list of sweeps (layer-ablation/README.md)")] = (
        key("which blocks are put back, and from where", ["insert_in", "window:2"], "all with a name")
    )
    stride: Count = key("every so many layers a measurement", 2, "1")
    shots: Count = key("translated pairs in front of a prompt", 1, "4")
    sentences: Count = key("pairs that are scored", 150, "all but the shots")
    prompt: Literal["pairs", "lines"] | None = key(
        "form of a prompt", "lines", "`pairs` where `train.base` is there, else `lines`"
    )


Share = Annotated[float, Field(gt=0, lt=1, description="it must be a number between 0 and 1")]
Coefficient = Annotated[float, Field(strict=False, ge=-1, le=2, description="it must be a number from -1 to 2")]
Strength = Annotated[float, Field(strict=False, ge=0, description="it must be a number, 0 or more")]


class Rewind(Keys):
    orders: list[Literal["importance", "most", "contrast", "greedy", "random", "random_layer"]] | None = key(
        "orders in which heads are put back", ["importance", "random"], "all"
    )
    stride: Count = key("percent of the heads from one measurement to the next", 10, "5")
    draws: Count = key("of each random order", 2, "5")


class Truncate(Keys):
    shares: list[Share] | None = key("of the update that are cut off", [0.5, 0.9], "0.1 to 0.9, 0.95")
    curves: list[Literal["svd", "as_random", "magnitude", "dare"]] | None = key("ways to cut", ["svd", "dare"], "all")
    draws: Count = key("of each random way", 1, "2")


class Connect(Keys):
    at: list[Coefficient] | None = key("points of the line between two runs", [0.25, 0.5, 0.75], "0, 0.1, .., 1")


class Spectral(Keys):
    """The defaults of spectral/; that the key is there asks the workflow for it."""

    measures: list[Literal["retrieval", "nll", "task"]] | None = key(
        "by what a changed model is measured", ["nll"], "all that there is data for"
    )
    rewind: Rewind | None = key("heads put back to the base's", {"stride": 10}, "its defaults")
    truncate: Truncate | None = key("the update cut", {"shares": [0.5, 0.9]}, "its defaults")
    connect: Connect | None = key("the line between two runs; needs `runs`", {"at": [0.5]}, "its defaults")


class Gradients(Keys):
    pairs: Count = key("pairs of sentences whose gradients are compared", 40, "100")


class Bigram(Keys):
    text: Files = key(
        "text that bigrams are counted in, by language, as that of the training",
        {"eng_Latn": "my-texts/en.txt", "eus_Latn": "my-texts/eu.txt"}, "`data.lsn_text`",
    )  # fmt: skip
    tokens: Count = key("tokens of a language that are counted, at most", 100_000, "1,000,000")


class Alignment(Keys):
    """The defaults of alignment/; that the key is there asks the workflow for it."""

    gradients: Gradients | None = key("cosines of the gradients of translations", {"pairs": 40}, "its defaults")
    bigram: Bigram | None = key("correlation of surprisal with bigrams", {"tokens": 100_000}, "its defaults")


class Routing(Keys):
    """The defaults of moe-routing/steering.py; that the key is there asks the workflow for both scripts."""

    strengths: list[Strength] | None = key(
        "by how many standard deviations of the logits routers are steered softly", [0.5, 1.0], "1.0"
    )
    random: Count = key("random sets of experts, and at most as many shifts to other layers", 10, "5")


class Steering(Keys):
    """The defaults of steering/steer.py; that the key is there asks the workflow for it."""

    alphas: Annotated[
        list[Annotated[float, Field(strict=False, description="it must be a number")]] | None,
        Field(min_length=1, description="it must be a list of numbers"),
    ] = key("multiples of the difference between the languages' means", [1, 2], "0.5, 1, 1.5, 2")
    layers: Annotated[list[int] | None, Field(min_length=1, description="it must be a list of layers")] = key(
        "layers that are steered, one at a time", [0, 4, 8], "all"
    )
    draws: Count = key("random directions, and random neurons", 2, "3")
    sentences: Count = key("sentences to go on from; directions come from the others", 60, "100, at most half")


class Arm(Keys):
    """What an arm's training leaves as it is, or trains alone; a training file has the same keys."""

    freeze: Part = key("a part that stays as it is", "hub", "one of the three")
    train_only: Part = key("a part that alone is trained", "outer:0.25", "one of the three")
    lora: Lora | None = key("LoRA", {"r": 8}, "one of the three")
    io: Literal["trained", "frozen"] | None = key(
        "embeddings, last norm and head", "trained", "`trained` with `freeze`, else `frozen`"
    )

    @model_validator(mode="after")
    def _one_part(self):
        if (self.freeze, self.train_only, self.lora).count(None) != 2:
            raise ValueError("give one of freeze, train_only and lora")
        if self.lora and self.io:
            raise ValueError("io goes with freeze or train_only")
        return self


class Train(Keys):
    """Training files; of `runs` one for each of the study's `runs` that is trained here."""

    world: MaybeText = key("of the demo's texts (demo/README.md)", "demo/world.yaml", "nothing is made")
    documents: MaybeText = key(
        "of training documents (cpt/README.md)", "studies/multi30k/documents.yaml", "nothing is made"
    )
    base: MaybeText = key("of the base (cpt/README.md)", "demo/base.yaml", "`base` is there")
    cpt: MaybeText = key("of the run", "demo/cpt.yaml", "`run` is there")
    task: MaybeText = key("`continuations`: the task is made of held-out text", "continuations", "the task is there")
    runs: dict[ArmName, str] | None = key(
        "of those of `runs` that are trained here", {"second": "demo/cpt_second.yaml"}, "`runs` are there"
    )


class Study(Keys):
    name: Text = key("what files and figures call it", "basque", "the file's name", "")
    base: Text = key("the model before: a folder, `org/name`, `org/name@revision`", "my-models/base", "needed", "")
    run: Annotated[str | list[str] | None, Field(description="it must be a folder or name, or a list of them")] = key(
        "its checkpoints: a folder of them, `org/name@step*`, or a list", "my-models/cpt", "needed"
    )
    languages: Languages | None = key(
        "codes of FLORES+, ISO or one's own", {"base": "eng_Latn", "target": "eus_Latn"}, "needed"
    )
    data: Data | None = key("texts", {"source": "sib200", "dir": "my-texts/sib200"}, "FLORES+ alone, from the hub")
    tokens: MaybeText = key("folder for token ids of Part II, made there", "my-tokens", "no neurons")
    lsn: Lsn | None = key("neurons", {"tokens": 10_000_000}, "its defaults")
    results: Text = key("folder of everything that is written", "results/basque", "`results/<name>`", "")
    seed: Annotated[int, Field(description="it must be a whole number")] = key("of every draw", 0, default=42)
    dtype: Text = key(
        "of arithmetic: float32, bfloat16, float16, float64", "float32", "bfloat16 on a GPU, else float32", ""
    )
    controls: Annotated[Literal["all"] | PositiveInt, Field(description="it is all, or the number of random sets")] = (
        key("random sets that a swap is compared with; `all`: all of its size, or 300 drawn ones", 100, default="all")
    )
    measure: Annotated[
        Literal["published", "unit", "centred", "unit_centred", "mexa_weighted", "mexa_last"] | None,
        Field(description="it is the retrieval curve that layers are split by, published unless said"),
    ] = key("the retrieval curve that layers are split by (sentence-retrieval/README.md)", "unit_centred", "published")
    sentences: Annotated[
        Literal["all", "half"] | None,
        Field(description="layers are split by retrieval of all sentences, or half of them"),
    ] = key("sentences that layers are split by; `half`: swaps are tested on the others", "half", "all")
    runs: Annotated[dict[ArmName, str] | None, Field(description="it must map names to other runs of the base")] = key(
        "other runs of the base, by name", {"second": "my-models/cpt-2"}, "none"
    )
    train: Train | None = key("training files of what is trained here", {"cpt": "demo/cpt.yaml"}, "all is there")
    arms: dict[ArmName, Arm] | None = key(
        "the run once more with a part frozen, by name (cpt/README.md)", {"hub_frozen": {"freeze": "hub"}}, "none"
    )
    ablation: Ablation | None = key("asks for layer ablation; `{}` will do (layer-ablation/README.md)", {}, "left out")
    spectral: Spectral | None = key("asks for Part IV; `{}` will do (spectral/README.md)", {}, "left out")
    alignment: Alignment | None = key(
        "asks for gradients and bigrams; `{}` will do (alignment/README.md)", {}, "left out"
    )
    routing: Routing | None = key(
        "of a mixture of experts: asks where tokens are routed; `{}` will do (moe-routing/README.md)", {}, "left out"
    )
    steering: Steering | None = key("asks for steering; `{}` will do (steering/README.md)", {}, "left out")

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
