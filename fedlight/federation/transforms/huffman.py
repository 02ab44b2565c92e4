"""Entropy coding of bytes by the Huffman codes of deflate (RFC 1951), through zlib."""

import zlib

from fedlight.runtime.errors import Damaged


class Huffman:
    """The last stage of a chain: lossless compression of the bytes of the previous stages' output.

    It does not search for repeated strings: packed codes have none, and the search costs time and bytes.
    """

    def compress(self, content: bytes) -> bytes:
        deflate = zlib.compressobj(level=9, wbits=-zlib.MAX_WBITS, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
        return deflate.compress(content) + deflate.flush()

    def decompress(self, content: bytes, size: int) -> bytes:
        """The inverse of `compress`.

        Args:
            content: compressed bytes.
            size: number of bytes of the result.

        Raises:
            Damaged: `content` does not decompress to `size` bytes.
        """
        inflate = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        try:
            decompressed = inflate.decompress(content, size + 1)
        except zlib.error as error:
            raise Damaged(f"an encoded payload cannot be decompressed ({error})") from error
        if len(decompressed) != size or not inflate.eof or inflate.unused_data:
            raise Damaged(f"an encoded payload does not decompress to {size} bytes")
        return decompressed
