"""The parity probe: whether a runner computes what the model's own forward computes.

Three sequences of random token ids, one of a single token, are computed as the engine would: in
chunks, next to each other, with a few decodes. The logits of each piece are compared with those of
one forward of transformers over the whole sequences. The ids come from the middle half of the
vocabulary, because special tokens lie at its ends and some models treat them in a way of their own.

That forward computes every linear alone, and shows which share an input; runners find these fused.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from service.engine.allocator import BlockAllocator
from service.engine.attention import set_attention, stock_attention
from service.engine.batch import Batch, Outcome, Token
from service.engine.block_manager import BlockManager
from service.engine.blocks import BLOCK_SIZE
from service.engine.filters import max_positions, model_type
from service.engine.runner import ModelRunner
from service.engine.scheduler import Scheduler
from service.engine.sequence import SamplingParams, Sequence
from service.engine.stats import EnginePath
from service.errors import UnsupportedModel
from service.layers.fusion import fuse, watch_siblings
from service.loading.honesty import first_nonfinite, has_nonfinite
from service.loading.memory import tight_heap

_NUM_SEQUENCES = 3
_LARGE_MODEL_BYTES = 1 << 25
_THOROUGH_SIZES = (32, 3)
_QUICK_SIZES = (8, 1)
"""Tokens of the longest prompt, and decodes: four steps and two. Each step reads all weights."""

_FLOAT32_TOLERANCE = 1e-4
"""Of any row, as a share of the spread of its logits. Families whose packed path is right stay below 4e-6."""
_NUM_ROUNDINGS = 4
"""A 16-bit row may be so many roundings away, or ..."""
_NOISE_FACTOR = 2
"""... so many times as far as transformers is with embeddings that are rounded once more, ..."""
_MAX_TOLERANCE = 0.3
"""... and never further than this; a row that read the wrong tokens is about 1 away."""
_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
_LARGEST_LOGIT = 1e30
"""What lies above is a mask, not a logit."""
_TINY = 1e-30


class Probe:
    """Token ids, and the logits that the model's own forward gives for them.

    Make it before any runner, while the model attends in its own way. It leaves linears that share an
    input fused. Without `thorough` a large model is looked at more quickly.

    Raises:
        UnsupportedModel: the model's own forward fails, or gives NaN or infinity; then the layer is named.
    """

    def __init__(self, model: nn.Module, *, vocab_size: int, max_model_len: int, thorough: bool) -> None:
        self._model = model
        self._attention = stock_attention(model)
        dtypes = {torch.float32, *(parameter.dtype for parameter in model.parameters())}
        self._eps = max(torch.finfo(dtype).eps for dtype in dtypes & _DTYPES)
        num_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        is_quick = num_bytes >= _LARGE_MODEL_BYTES and not thorough
        longest, num_decodes = _QUICK_SIZES if is_quick else _THOROUGH_SIZES
        width = min(longest + num_decodes - 1, max_model_len, max_positions(model) or max_model_len)
        self._num_decodes = min(num_decodes, width - 1)
        generator = torch.Generator().manual_seed(0)
        low, high = vocab_size // 4, max(vocab_size // 4 + 1, vocab_size * 3 // 4)
        self._ids = torch.randint(low, high, (_NUM_SEQUENCES, width), generator=generator)
        try:
            with watch_siblings(model) as siblings:
                self._expected = self._stock_logits()
        except Exception as error:
            raise UnsupportedModel(
                f"model type {model_type(model)!r} raises {type(error).__name__} in its own forward ({error}); "
                "it must compute token ids without anything else; use another model"
            ) from error
        if has_nonfinite(self._expected):
            where = first_nonfinite(model, self._stock_logits) or "its forward, after all layers"
            raise UnsupportedModel(
                f"model type {model_type(model)!r} gives NaN or infinity in {next(model.parameters()).dtype}, first "
                f"out of {where}; its own forward must be finite; use another --dtype or checkpoint"
            )
        for layers in siblings:
            with tight_heap():  # gives back what each group leaves behind: on small models, as much as their weights
                fuse(layers)

    @torch.inference_mode()
    def error(self, runner: ModelRunner) -> float:
        """How far a runner is from the model's own forward, as a share of the tolerance: up to 1 is right."""
        width = self._ids.shape[1]
        later = max(0, self._num_decodes - 1)
        middle = min(max(2, width // 3), width - self._num_decodes)
        prompts = [(1, self._num_decodes), (middle, self._num_decodes), (width - later, later)]
        allocator = BlockAllocator(_NUM_SEQUENCES * (width // BLOCK_SIZE + 1))
        scheduler = Scheduler(
            BlockManager(allocator, block_size=BLOCK_SIZE, prefix_cache=False),
            max_num_seqs=1 if runner.path is EnginePath.SINGLE else _NUM_SEQUENCES,
            # Two steps hold all prompts, and in the second the last one goes on next to decodes.
            max_num_batched_tokens=sum(count for count, _ in prompts) // 2 + 2,
            chunked=runner.chunked,
        )
        for row, (num_prompt_tokens, num_decodes) in enumerate(prompts):
            scheduler.add(self._sequence(row, num_prompt_tokens, num_decodes))
        actual, expected = [], []
        while (batch := scheduler.schedule(0.0)) is not None:
            actual.append(runner.forward(batch.works))
            ends = [(int(work.sequence.request_id), work.position + work.count - 1) for work in batch.works]
            expected += [self._expected[end] for end in ends]
            scheduler.commit(batch, self._outcomes(batch), 0.0)
        for row in range(_NUM_SEQUENCES):
            runner.forget(str(row))
        return self._share_of_tolerance(row_errors(torch.cat(actual), torch.stack(expected)))

    def _sequence(self, row: int, num_prompt_tokens: int, num_decodes: int) -> Sequence:
        return Sequence(
            request_id=str(row),
            token_ids=self._ids[row, :num_prompt_tokens].tolist(),
            num_prompt_tokens=num_prompt_tokens,
            params=SamplingParams(max_tokens=num_decodes + 1),
            submitted_at=0.0,
        )

    def _outcomes(self, batch: Batch) -> dict[str, Outcome]:
        """The tokens that follow; the one behind the last is not looked at."""
        ids = {work.sequence.request_id: work.sequence for work in batch.works if work.samples}
        last = self._ids.shape[1] - 1
        return {name: Token(int(self._ids[int(name), min(len(s.token_ids), last)])) for name, s in ids.items()}

    def _share_of_tolerance(self, errors: Tensor) -> float:
        worst = float(errors.max())
        if self._eps <= torch.finfo(torch.float32).eps:
            return worst / _FLOAT32_TOLERANCE
        tolerance = _NUM_ROUNDINGS * self._eps
        if worst <= tolerance:
            return worst / tolerance
        noise = self._noise()  # costs forwards, so only now
        if noise.max() < _MAX_TOLERANCE:
            return worst / min(max(tolerance, _NOISE_FACTOR * float(noise.max())), _MAX_TOLERANCE)
        # Rounding alone changes some rows altogether, as where a router chooses another expert.
        typical = min(max(tolerance, _NOISE_FACTOR * float(noise.median())), _MAX_TOLERANCE)
        return float(errors.median()) / typical

    def _noise(self) -> Tensor:
        """Errors of transformers itself when the embeddings are off by one rounding."""

        def round_again(_module: nn.Module, _args: object, embeddings: Tensor) -> Tensor:
            share = torch.rand(embeddings.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
            return embeddings + embeddings * (share * self._eps).to(embeddings)

        hook = self._model.get_input_embeddings().register_forward_hook(round_again)  # type: ignore[operator]
        try:
            noisy = self._stock_logits()
        finally:
            hook.remove()
        return row_errors(noisy.flatten(0, 1), self._expected.flatten(0, 1))

    @torch.no_grad()
    def _stock_logits(self) -> Tensor:
        """Logits float32[sequences, tokens, vocab] by one forward of transformers."""
        ids = self._ids.to(next(self._model.parameters()).device)
        arguments = {"attention_mask": torch.ones_like(ids), "use_cache": False}
        known = inspect.signature(self._model.forward).parameters
        current = getattr(self._model.config, "_attn_implementation", None)
        set_attention(self._model, self._attention)
        try:
            output = self._model(input_ids=ids, **{name: arguments[name] for name in arguments if name in known})
        finally:
            set_attention(self._model, current)
        logits: Tensor = output.logits
        return logits.float()


def num_probed_tokens(max_model_len: int) -> int:
    """How many tokens a probe computes at least, by the model's own forward and by a runner together."""
    return 2 * _NUM_SEQUENCES * min(_QUICK_SIZES[0], max_model_len)


def row_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Distance of logits [rows, vocab] from expected ones, as a share of the spread of these; infinite for NaN."""
    is_logit = expected.abs() < _LARGEST_LOGIT
    differences = torch.where(is_logit, actual - expected, 0)
    kept = torch.where(is_logit, expected, 0)
    means = kept.sum(-1, keepdim=True) / is_logit.sum(-1, keepdim=True).clamp(min=1)
    spreads = torch.where(is_logit, expected - means, 0).norm(dim=-1)
    shares: Tensor = differences.norm(dim=-1) / spreads.clamp(min=_TINY)
    return shares.nan_to_num(torch.inf)
