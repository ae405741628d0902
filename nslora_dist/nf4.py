"""4-bit weights. ``bitsandbytes`` is imported here alone."""

from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64
"""Values that share a scale."""
PIECE = 2**18
"""Values of a weight that are packed at a time on a CPU: their working memory fits its caches."""


def pack_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of some rows of a weight, the same bits whatever rows are packed together.

    Blocks of 64 values do not know of each other, so ranks can share a weight's rows out. On a CPU bitsandbytes
    quantises through half a dozen float32 and int32 copies, 16 bytes a value where the result is half a byte: there it
    is given pieces of bounded working memory.

    Args:
        rows: (n, d_in), float32 or bfloat16, d_in a multiple of 64.

    Returns:
        (n, d_in / 2) uint8 codes, two a byte, and (n, d_in / 64) float32 largest magnitudes of the blocks.
    """
    import bitsandbytes.functional as bnb

    flat = rows.reshape(-1)
    codes = torch.empty(flat.numel() // 2, dtype=torch.uint8, device=rows.device)
    largest = torch.empty(flat.numel() // BLOCK, dtype=torch.float32, device=rows.device)
    step = PIECE if rows.device.type == "cpu" else max(1, flat.numel())
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step]
        bits, state = bnb.quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
        codes[start // 2 : start // 2 + bits.numel()] = bits.flatten()
        largest[start // BLOCK : start // BLOCK + state.absmax.numel()] = state.absmax
    count, width = rows.shape
    return codes.view(count, width // 2), largest.view(count, width // BLOCK)


def assemble(codes: Tensor, largest: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """All rows' codes and scales as bitsandbytes' NF4 with twice-quantised statistics, bit by bit.

    Args:
        codes: (d_out, d_in / 2) uint8.
        largest: (d_out, d_in / 64) float32.
        dtype: of the weight, float32 or bfloat16.

    Returns:
        (d_out · d_in / 2 bytes, 1) packed values in ``dtype`` as storage, and their ``QuantState``.
    """
    import bitsandbytes.functional as bnb

    scales = largest.reshape(-1)
    offset = scales.mean()
    absmax, second = bnb.quantize_blockwise(scales - offset, blocksize=256)
    state = bnb.QuantState(
        absmax=absmax,
        shape=torch.Size((codes.shape[0], 2 * codes.shape[1])),
        dtype=dtype,
        blocksize=BLOCK,
        code=bnb.get_4bit_type("nf4", device=codes.device),
        quant_type="nf4",
        offset=offset,
        state2=second,
    )
    return codes.reshape(-1).view(dtype).unsqueeze(1), state


def unpack(packed: Tensor, state: Any) -> Tensor:
    """The dense (d_out, d_in) weight in the dtype it was packed from."""
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(packed.view(-1, 1), state)


def quant_state(linear: nn.Linear) -> Any:
    """What a 4-bit linear is unpacked by, kept at its weight or, where that was sharded, at itself; None of others."""
    state = getattr(linear.weight, "quant_state", None)
    return getattr(linear, "quant_state", None) if state is None else state


def dense_weight(linear: nn.Linear) -> Tensor:
    """The (d_out, d_in) weight of a plain linear, or of bitsandbytes' 4-bit one unpacked."""
    weight, state = linear.weight.detach(), quant_state(linear)
    return weight if state is None else unpack(weight, state)
