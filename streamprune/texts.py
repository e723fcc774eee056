"""The tokens of a run: what the method, the repair and the evaluation compute on."""

from __future__ import annotations

from torch import Tensor

from streamprune import calibration, evaluate
from streamprune.config import PruneConfig
from streamprune.errors import CalibrationError, CheckpointError, UsageError
from streamprune.footprint import Work
from streamprune.methods import METHODS
from streamprune.skeleton import Skeleton

EVALUATION_SEQ_LEN = 128
EVALUATION_SEGMENTS = 100  # at most
EMBEDDED_CALIBRATION = (10, 128)  # samples and tokens of each; the text is short
EMBEDDED_TOKENS = 5000  # of it: 4,600 by the tokenizer of SmolLM2
REPAIR_SEQ_LEN = 512


def expected_work(config: PruneConfig, skeleton: Skeleton) -> Work:
    """Sequences of each part of a run, as far as they are known without reading texts."""
    method = METHODS[config.method]
    limit = getattr(skeleton.config, "max_position_embeddings", None) or 10**9
    samples, seq_len = method.calibration if config.calibration else EMBEDDED_CALIBRATION
    given = (config.samples or samples, config.seq_len or min(seq_len, limit))
    repair_tokens = min(config.compensate_tokens, 10**9 if config.calibration else EMBEDDED_TOKENS)
    repair_len = min(REPAIR_SEQ_LEN, limit, repair_tokens)
    return Work(
        given if method.needs_text else None,
        (repair_tokens // repair_len, repair_len) if config.compensate else None,
        None if config.evaluate is False else (EVALUATION_SEGMENTS, min(EVALUATION_SEQ_LEN, limit)),
    )


def calibration_tokens(config: PruneConfig, skeleton: Skeleton) -> Tensor:
    """All tokens of the calibration text."""
    if config.calibration is None:
        text = calibration.embedded_text("calibration")
    else:
        text = calibration.read_text(config.calibration, config.field)
    path = skeleton.checkpoint.path
    tokenizer = calibration.load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    return calibration.tokenize(tokenizer, text)


def calibration_ids(config: PruneConfig, skeleton: Skeleton, tokens: Tensor) -> Tensor:
    """What the method's scores are taken on: as asked, or as its paper has it where a text is given."""
    samples, seq_len = METHODS[config.method].calibration if config.calibration else EMBEDDED_CALIBRATION
    limit = getattr(skeleton.config, "max_position_embeddings", None) or seq_len
    samples, seq_len = config.samples or samples, config.seq_len or min(seq_len, limit)
    check_tokens(tokens, seq_len, skeleton)
    return calibration.sample_sequences(tokens, samples, seq_len, config.sampling, config.seed)


def repair_ids(config: PruneConfig, skeleton: Skeleton, tokens: Tensor) -> Tensor:
    """`compensate_tokens` tokens for the least squares, or as many as the text has."""
    limit = getattr(skeleton.config, "max_position_embeddings", None) or REPAIR_SEQ_LEN
    count = min(config.compensate_tokens, len(tokens))
    if count < 1:
        raise CalibrationError(f"--calibration {config.calibration}: the text has no tokens; give a longer one")
    seq_len = min(REPAIR_SEQ_LEN, limit, count)
    check_tokens(tokens, seq_len, skeleton)
    return calibration.sample_sequences(tokens, count // seq_len, seq_len, config.sampling, config.seed)


def check_tokens(tokens: Tensor, seq_len: int, skeleton: Skeleton) -> None:
    """Refuse sequences longer than the model's positions, and the tokens of another model's tokenizer."""
    limit = getattr(skeleton.config, "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise UsageError(f"--seq-len {seq_len}: the model takes at most {limit} positions; lower it")
    vocabulary = skeleton.config.vocab_size
    if len(tokens) and int(tokens.max()) >= vocabulary:
        raise CheckpointError(
            f"{skeleton.checkpoint.path}: its tokenizer gives token {int(tokens.max())}, the model knows {vocabulary}; "
            "copy the tokenizer files of this model there"
        )


def evaluation_segments(config: PruneConfig, skeleton: Skeleton) -> Tensor | None:
    """What perplexity is measured on [n, seq], before and after; None for none."""
    if config.evaluate is False:
        return None
    text = (
        calibration.embedded_text("heldout")
        if config.evaluate is None
        else calibration.read_text(config.evaluate, config.field)
    )
    tokenizer = calibration.load_tokenizer(skeleton.checkpoint.path, trust_remote_code=config.trust_remote_code)
    limit = getattr(skeleton.config, "max_position_embeddings", None) or EVALUATION_SEQ_LEN
    tokens = calibration.tokenize(tokenizer, text)
    seq_len = min(EVALUATION_SEQ_LEN, limit)
    check_tokens(tokens, seq_len, skeleton)
    return evaluate.segment(tokens, seq_len)[:EVALUATION_SEGMENTS]
