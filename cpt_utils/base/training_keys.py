"""Keys for the trained part of a model, shared by a study's arms and training files. Their defaults affect training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cpt_utils.base.keys import OF_TEXT, REQUIRED, Keys, key

Part = Annotated[
    int | str | list[int] | None,
    Field(description="it must name a part of the model: hub, outer:0.25, [0, 1] (cpt/README.md)"),
]


class Lora(Keys):
    """LoRA on the weights of some layers, perhaps with as many parameters as `r` has in others (`parameters_of`)."""

    r: Annotated[int, Field(ge=1, description="it must be a rank, a whole number above 0")] = key(
        "rank", 8, "needed", REQUIRED
    )
    alpha: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="it must be a number above 0"), OF_TEXT
    ] = key("the product B A is scaled by alpha / r", 16, "2 r")
    dropout: Annotated[float, Field(ge=0, lt=1, description="it must be 0 or more, and below 1"), OF_TEXT] = key(
        "dropout on the input of the product", 0.05, default=0.0
    )
    targets: Annotated[
        str | list[str], Field(min_length=1, description="it must be all, attention, ffn, or like [q_proj, v_proj]")
    ] = key("`all`, `attention`, `ffn` or projections", ["q_proj", "v_proj"], default="all")
    layers: Part = key("layers with LoRA", "outer:0.25", default="all")
    parameters_of: Part = key("match the number of parameters of rank `r` in these layers", "all", "every rank is `r`")
    merge: Annotated[bool, Field(description="it must be true or false")] = key(
        "checkpoints are merged models instead of adapters", True, default=False
    )
