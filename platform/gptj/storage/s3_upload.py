"""Bytes written one after the other in, an object of S3 out: the parts of a multipart upload."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from gptj.addresses import split_s3
from gptj.storage.parallel import PARALLEL
from gptj.storage.s3_client import client, explaining

WRITE_PART_BYTES = 8 * 2**20  # some are in memory
MAX_PARTS = 10_000  # S3's limit


class MultipartUpload:
    """Bytes written one after the other, sent in parts by threads while more are written."""

    def __init__(self, address: str, part_bytes: int) -> None:
        self._address = address
        self._bucket, self._key = split_s3(address)
        self._part_bytes = part_bytes
        self._buffer = bytearray()
        self._upload_id: str | None = None
        self._parts: list[Future[dict[str, Any]]] = []
        self._pool = ThreadPoolExecutor(PARALLEL // 4)

    def write(self, content: bytes | bytearray | memoryview) -> int:
        view = memoryview(content).cast("B")
        for start in range(0, len(view), self._part_bytes):
            self._buffer += view[start : start + self._part_bytes]
            while len(self._buffer) >= self._part_bytes:
                with memoryview(self._buffer) as filled:
                    part = bytes(filled[: self._part_bytes])
                self._send(part)
                del self._buffer[: self._part_bytes]
        return len(view)

    def finish(self) -> None:
        try:
            with explaining(self._bucket, self._key):
                if self._upload_id is None:  # it fits one request
                    client().put_object(
                        Bucket=self._bucket, Key=self._key, Body=bytes(self._buffer)
                    )
                    return
                if self._buffer:
                    self._send(bytes(self._buffer))
                parts = [future.result() for future in self._parts]
                client().complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=self._key,
                    UploadId=self._upload_id,
                    MultipartUpload={"Parts": parts},  # type: ignore[typeddict-item]
                )
        except BaseException:
            self.abort()
            raise
        finally:
            self._pool.shutdown()

    def abort(self) -> None:
        """Forget what was sent: the server would keep, and bill, the parts."""
        self._pool.shutdown(cancel_futures=True)
        if self._upload_id is not None:
            upload_id, self._upload_id = self._upload_id, None
            with explaining(self._bucket, self._key):
                client().abort_multipart_upload(
                    Bucket=self._bucket, Key=self._key, UploadId=upload_id
                )

    def _send(self, part: bytes) -> None:
        if self._upload_id is None:
            with explaining(self._bucket, self._key):
                self._upload_id = client().create_multipart_upload(
                    Bucket=self._bucket, Key=self._key, ChecksumAlgorithm="CRC32"
                )["UploadId"]
        waiting = [future for future in self._parts if not future.done()]
        if len(waiting) >= PARALLEL // 4:  # bound the memory
            wait(waiting, return_when=FIRST_COMPLETED)
        for future in self._parts:
            if future.done():
                future.result()  # a part that failed ends the upload now
        self._parts.append(self._pool.submit(self._send_part, len(self._parts) + 1, part))

    def _send_part(self, number: int, part: bytes) -> dict[str, Any]:
        with explaining(self._bucket, self._key):
            reply = client().upload_part(
                Bucket=self._bucket,
                Key=self._key,
                UploadId=self._upload_id or "",
                PartNumber=number,
                Body=part,
                ChecksumAlgorithm="CRC32",
            )
        sent: dict[str, Any] = {"ETag": reply["ETag"], "PartNumber": number}
        if "ChecksumCRC32" in reply:
            sent["ChecksumCRC32"] = reply["ChecksumCRC32"]
        return sent
