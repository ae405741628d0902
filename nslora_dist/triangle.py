"""Half of a symmetric matrix as one run of numbers, for the wire and the disk, and back."""

from math import isqrt

from torch import Tensor


def pack_triangle(gram: Tensor) -> Tensor:
    """The lower triangle of a symmetric matrix as d(d+1)/2 numbers: half the bytes on the wire or on disk.

    Layout (ours to change, use `unpack_triangle`): the left half of the columns, below the diagonal, with the last
    diagonal block turned up into the gap above it, as in LAPACK's rectangular full packed format. No index tensors:
    beyond the result it needs two quarters of the matrix.

    Args:
        gram: (d, d) symmetric, any dtype; the upper triangle of the upper left quarter is not read.

    Returns:
        (d(d+1)/2,) contiguous, same dtype and device. Sums of packed matrices unpack to sums of matrices.

    Raises:
        ValueError: If the matrix is not square.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram {tuple(gram.shape)} is not square.")
    d = gram.shape[0]
    left, odd = (d + 1) // 2, d % 2  # columns kept; the corner is (d - left) square
    packed = gram.new_empty(d + 1 - odd, left)
    packed[1 - odd :] = gram[:, :left]
    corner = packed[: d - left, odd:]
    corner.copy_(corner.tril(-1) + gram[left:, left:].triu())
    return packed.view(-1)


def unpack_triangle(packed: Tensor) -> Tensor:
    """The symmetric matrix that `pack_triangle` packed, bit for bit where the matrix was symmetric.

    Args:
        packed: (d(d+1)/2,).

    Returns:
        (d, d), same dtype and device.

    Raises:
        ValueError: If the length is not d(d+1)/2 for any d.
    """
    d = (isqrt(8 * packed.numel() + 1) - 1) // 2
    if packed.ndim != 1 or d * (d + 1) // 2 != packed.numel():
        raise ValueError(f"packed {tuple(packed.shape)} is no packed triangle: its length must be d(d+1)/2.")
    left, odd = (d + 1) // 2, d % 2
    rectangle = packed.view(d + 1 - odd, left) if d else packed.view(0, 0)
    gram = packed.new_empty(d, d)
    gram[:, :left] = rectangle[1 - odd :]
    head = gram[:left, :left]
    head.copy_(head.tril() + head.tril(-1).mT)
    corner = rectangle[: d - left, odd:]
    gram[left:, left:] = corner.triu() + corner.triu(1).mT
    gram[:left, left:] = gram[left:, :left].mT
    return gram
