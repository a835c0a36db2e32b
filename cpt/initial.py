"""The float32 model that a training starts from: new with seeded weights, or loaded; with a row for every token."""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base import cli, keys
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import refs, tokenization
from cpt_utils.models import loading

runs = cli.sibling("cpt/runs.py")

# Keys of a model configuration that transformers still accepts though its configurations no longer list them.
OLD_KEYS = (
    "rope_theta",
    "rope_scaling",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "head_dim",
)


def model_config(config: dict, tokenizer, path: Path):
    """The configuration of a new model; vocabulary size and special ids default to the tokenizer's."""
    from transformers import AutoConfig

    values = dict(config["model"])
    kind = values.pop("model_type", None)
    if kind is None:
        raise InputError(f"{path}: model needs model_type, e.g. llama")
    values.setdefault("vocab_size", len(tokenizer))
    for role in ("bos", "eos", "pad"):
        values.setdefault(f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    try:
        plain = AutoConfig.for_model(kind)
        # transformers silently keeps a misspelt key, and the model gets the default.
        known = {*plain.to_dict(), *plain.attribute_map, *OLD_KEYS}
        keys.refuse_unknown(values, known, path, "model")
        return AutoConfig.for_model(kind, **values)
    except InputError:
        raise
    except Exception as error:  # transformers' checks raise several types
        raise InputError(f"{path}: model cannot be configured: {runs.first_line(error)}") from error


def prepare_model(config: dict, tokenizer, path: Path):
    """The float32 model to train: new with seeded weights, or loaded strictly from `from`."""
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(config["seed"])
    if config["from"]:
        model = loading.load_model(refs.model(config["from"]), torch.float32, torch.device("cpu"))
        model.requires_grad_(True)
    else:
        settings = model_config(config, tokenizer, path)
        try:
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="sdpa")
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            raise InputError(f"{path}: model cannot be built: {runs.first_line(error)}") from error
    fit_vocabulary(model, tokenizer, config, path)
    check_block(config, model.config, path)
    return model


def fit_vocabulary(model, tokenizer, config: dict, path: Path) -> None:
    """Give every token an embedding: more rows for a longer tokenizer, and initial values for the rows of new tokens.

    Models often have more rows than tokens. A padding row was never trained and may be zero. A token added to the
    tokenizer later takes such a row, and has to start like a token whose row is added.

    Raises:
        InputError: without `resize`, the tokenizer is longer than the embeddings, or has tokens that the base's lacks.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    wanted = config["tokenizer"] or {}
    if config["from"] and wanted.get("from"):
        old, new = vocabularies(refs.model(config["from"]), tokenizer, rows)
        if new and wanted.get("resize") is None:
            raise InputError(
                f"{path}: {len(new)} tokens of {wanted['from']}, such as {tokenizer.convert_ids_to_tokens(new[0])!r}, "
                f"are not in the base's tokenizer, though the model has {rows} embeddings and so a row for each; set "
                "tokenizer.resize: true to initialise these rows, or false to train them from their present values"
            )
        if new and wanted["resize"]:
            if not old:
                raise InputError(f"{path}: {wanted['from']} has no token of the base's tokenizer; use another one")
            initialise(model, old, new)
            cli.say(f"embeddings: {len(new)} of {rows} rows belong to new tokens; initialised from {len(old)} old ones")
    if len(tokenizer) > rows:
        if not (config["from"] and wanted.get("resize")):
            raise InputError(
                f"{path}: the model has {rows} embeddings, but the tokenizer has {len(tokenizer)} tokens; raise "
                "model.vocab_size, or, to train a model further with a longer tokenizer, set tokenizer.resize: true"
            )
        cli.say(f"embeddings: {rows} -> {len(tokenizer)} rows for the longer tokenizer")
        model.resize_token_embeddings(len(tokenizer))


def vocabularies(base: refs.ModelRef, tokenizer, rows: int) -> tuple[list[int], list[int]]:
    """Ids below `rows` of the tokens that the base's tokenizer has and of those that it lacks, both sorted.

    If the base has no tokenizer, all tokens count as old, with a warning.
    """
    now = tokenizer.get_vocab()
    try:
        before = tokenization.open_tokenizer(tokenization.tokenizer_folder(base)).get_vocab()
    except InputError as error:
        cli.warn(f"it is not known which tokens are new, so none is initialised: {error}")
        before = now
    moved = [token for token, i in before.items() if now.get(token, i) != i]
    if moved:
        cli.warn(
            f"{len(moved)} tokens of the base's tokenizer, such as {moved[0]!r}, have other ids in the new one: the "
            "embeddings at their new ids were trained for other tokens"
        )
    new = sorted(i for token, i in now.items() if token not in before and i < rows)
    return sorted({i for i in before.values() if i < rows} - set(new)), new


def initialise(model, old: list[int], new: list[int]) -> None:
    """Draw the rows `new` of both embeddings from a normal distribution with the mean of the rows `old` and 1e-9 times
    their covariance, as `resize_token_embeddings` of transformers does for the rows it adds (Hewitt 2021)."""
    head = model.get_output_embeddings()
    weights = [model.get_input_embeddings().weight]
    if head is not None and head.weight is not weights[0]:
        weights.append(head.weight)
    if getattr(head, "bias", None) is not None:
        weights.append(head.bias[:, None])
    with torch.no_grad():
        for weight in weights:
            rows = weight[old].float()
            mean = rows.mean(0)
            rows -= mean
            spread = rows.T @ rows / len(old) * 1e-9
            factor, failed = torch.linalg.cholesky_ex(spread)
            noise = torch.zeros(len(new), len(mean)) if failed else torch.randn(len(new), len(mean)) @ factor.T
            weight[new] = (mean + noise).to(weight.dtype)


def check_block(config: dict, settings, path: Path) -> None:
    """Refuse blocks longer than the model's number of positions."""
    limit = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if limit and config["block_size"] > limit:
        raise InputError(f"{path}: block_size {config['block_size']} is longer than the model's {limit} positions")
