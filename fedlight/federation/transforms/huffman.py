"""Entropy coding: frequent bytes become few bits (the Huffman codes of deflate, RFC 1951, by zlib)."""

import zlib

from fedlight.runtime.errors import Damaged


class Huffman:
    """The last stage of a chain: compresses the bytes of all that the stages before it gave, without loss.

    Repeated strings are not looked for: packed codes have none, and looking costs time and bytes.
    """

    def compress(self, content: bytes) -> bytes:
        deflate = zlib.compressobj(level=9, wbits=-zlib.MAX_WBITS, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
        return deflate.compress(content) + deflate.flush()

    def decompress(self, content: bytes, size: int) -> bytes:
        """The inverse; `size` is how many bytes must come out.

        Raises:
            Damaged: these are no such bytes.
        """
        inflate = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        try:
            found = inflate.decompress(content, size + 1)
        except zlib.error as error:
            raise Damaged(f"an encoded payload cannot be decompressed ({error})") from error
        if len(found) != size or not inflate.eof or inflate.unused_data:
            raise Damaged(f"an encoded payload does not decompress to {size} bytes")
        return found
