"""A quantized embedding, and the head that shares its storage."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from service.layers.buffers import QuantizedModule
from service.numerics.encode import decode_rows
from service.numerics.schemes import QuantScheme


class QuantizedEmbedding(QuantizedModule):
    """Decodes the rows that it is asked for; float32 products, rounded to `dtype` once.

    Args:
        dtype: of the result; unlike the dtype of an unquantized embedding it does not follow `.to(dtype)`.
        padding_idx: kept for callers that read it; its row is stored like the others.
        multiplier: of the rows, after their rounding; a tied head does not see it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: QuantScheme,
        *,
        dtype: torch.dtype,
        padding_idx: int | None = None,
        multiplier: float = 1.0,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, scheme)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.dtype = dtype
        self.padding_idx = padding_idx
        self.multiplier = multiplier

    def forward(self, token_ids: Tensor) -> Tensor:
        """int[...] -> float[..., embedding_dim].

        Raises:
            IndexError: an id outside of the vocabulary, on the CPU; elsewhere that would have to wait for the device.
        """
        ids = token_ids.reshape(-1)
        if ids.is_cpu and len(ids):
            for extreme in map(int, ids.aminmax()):
                if not 0 <= extreme < self.num_embeddings:
                    raise IndexError(f"index {extreme} is out of bounds for {self.num_embeddings} embeddings")
        rows = decode_rows(
            self.qweight, self.scales, self.zero_points, ids, scheme=self.scheme, in_features=self.embedding_dim
        )
        rounded = rows.to(self.dtype).view(*token_ids.shape, self.embedding_dim)
        return rounded if self.multiplier == 1 else rounded * self.multiplier

    def extra_repr(self) -> str:
        """Sizes and scheme, for `repr`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme.name}"


class TiedHead(nn.Module):
    """The output layer of a model with tied embeddings: y = x E.T + bias.

    It holds no weight: the embedding is referred to without being a submodule, so that its buffers have
    one name and one storage, and follow it to other devices.

    Args:
        bias: give the head its own bias, of the embedding's dtype.

    Attributes:
        weight: on meta, for models that ask it for its dtype.
    """

    bias: nn.Parameter | None

    def __init__(self, embedding: QuantizedEmbedding, bias: bool) -> None:
        super().__init__()
        self._embedding = (embedding,)  # the tuple hides it from nn.Module's registration
        self.scheme = embedding.scheme
        self.in_features = embedding.embedding_dim
        self.out_features = embedding.num_embeddings
        empty_bias = nn.Parameter(torch.empty(self.out_features, dtype=embedding.dtype), requires_grad=False)
        self.register_parameter("bias", empty_bias if bias else None)
        self.weight = torch.empty(self.out_features, self.in_features, dtype=embedding.dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """float[..., embedding_dim] -> float[..., num_embeddings]."""
        return self._embedding[0].multiply(x, self.bias)

    def extra_repr(self) -> str:
        """Sizes and scheme, for `repr`."""
        return f"{self.in_features}, {self.out_features}, scheme={self.scheme.name}, bias={self.bias is not None}"
