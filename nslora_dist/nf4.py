"""4-bit weights. ``bitsandbytes`` is imported here alone."""

from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Values that share a scale."""
PIECE = 2**18
"""Values of a weight that are packed at a time on a CPU: their working memory fits its caches."""


def pack(weight: Tensor) -> tuple[Tensor, Any]:
    """bitsandbytes' NF4 with twice-quantised statistics, bit by bit, in pieces of bounded working memory.

    On a CPU bitsandbytes quantises through half a dozen float32 and int32 copies of the whole weight: 16 bytes a value,
    where the result is half a byte. Blocks of 64 values do not know of each other, so pieces give the same bits.

    Args:
        weight: (d_out, d_in), float32 or bfloat16, d_in a multiple of 64.

    Returns:
        (d_out · d_in / 2 bytes, 1) packed values in the weight's dtype as storage, and their ``QuantState``.
    """
    import bitsandbytes.functional as bnb

    flat = weight.reshape(-1)
    packed = torch.empty(flat.numel() // 2, dtype=torch.uint8, device=weight.device)
    largest = torch.empty(flat.numel() // BLOCK, dtype=torch.float32, device=weight.device)
    step = PIECE if weight.device.type == "cpu" else flat.numel()
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step]
        bits, state = bnb.quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
        packed[start // 2 : start // 2 + bits.numel()] = bits.flatten()
        largest[start // BLOCK : start // BLOCK + state.absmax.numel()] = state.absmax
    offset = largest.mean()
    absmax, second = bnb.quantize_blockwise(largest.sub_(offset), blocksize=256)
    state = bnb.QuantState(
        absmax=absmax,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=bnb.get_4bit_type("nf4", device=weight.device),
        quant_type="nf4",
        offset=offset,
        state2=second,
    )
    return packed.view(weight.dtype).unsqueeze(1), state


def unpack(packed: Tensor, state: Any) -> Tensor:
    """The dense (d_out, d_in) weight in the dtype it was packed from."""
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(packed, state)
