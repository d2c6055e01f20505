"""S3: every request made once, with its etag and its length checked."""

import asyncio
import contextlib
import functools
import math
import uuid
from collections.abc import Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import ObjectChangedError, ObjectMissingError, RetryError, StorageError
from pipeline.records import ObjectInfo
from pipeline.storage.conditional import ConditionalWrites, Head
from pipeline.storage.hidden import is_listed
from pipeline.storage.ranges import Span
from pipeline.storage.retry import is_passing, retry, status_of

T = TypeVar("T")

_PART_BYTES = 64 << 20
_MOST_PARTS = 10_000
_LIST_PAGE = 1000
_UPLOAD_THREADS = 4
_DELETES_AT_ONCE = 32
_BODY_PIECE_BYTES = 1 << 20
_WRITE_ID = "write-id"


class S3Store:
    """Buckets behind an s3fs file system, whose own retries and caches are off."""

    def __init__(self, filesystem: Any, *, attempts: int) -> None:
        self._filesystem = filesystem
        self._attempts = attempts
        self._conditional = ConditionalWrites(self, attempts=attempts)

    def list_objects(self, uri: str) -> list[ObjectInfo]:
        """Return the objects under ``uri/``, or else the object ``uri`` itself."""
        bucket, key = split_uri(uri)
        found = self._list(bucket, f"{key}/" if key else "")
        if found or not key:
            return found
        # Of all keys that start with it the key itself sorts first; no HEAD: listing must do.
        page = self._call("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
        return [_describe(bucket, o) for o in page.get("Contents", ()) if o["Key"] == key]

    def stat(self, uri: str) -> ObjectInfo:
        """Describe one object."""
        head = self._call("head_object", **_name(uri))
        modified_s = head["LastModified"].timestamp()
        return ObjectInfo(uri, head["ContentLength"], _strip(head["ETag"]), modified_s)

    def fetch(self, uri: str, *, start: int, stop: int | None, version: str | None) -> Span:
        """Return bytes [start, stop) of one version; what had come before a reset, if any."""
        request = _name(uri)
        if version is not None:
            request["IfMatch"] = f'"{version}"'
        if start > 0 or stop is not None:
            request["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        try:
            return self._run(self._get(request, start=start, stop=stop))
        except Exception as error:
            status = status_of(error)
            if status == 416 and start == 0:  # an empty object has no range at all
                return self.fetch(uri, start=0, stop=None, version=version)
            if status == 416:
                raise StorageError(
                    f"cannot read {uri!r} from byte {start}: it ends before; list it again"
                ) from error
            if status == 412:
                raise ObjectChangedError(
                    f"{uri!r} has changed: version {version} is no longer there; "
                    "list the input again"
                ) from error
            raise

    def put(self, uri: str, data: bytes) -> None:
        """Write an object."""
        self.write(uri, data)

    def put_if(self, uri: str, data: bytes, *, version: str | None, write_id: str) -> str:
        """Write if the etag is still ``version``, or nothing is there where None."""
        return self._conditional.put_if(uri, data, version=version, write_id=write_id)

    def write(
        self, uri: str, data: bytes, *, condition: tuple[str, str] | None = None, write_id: str = ""
    ) -> str:
        """Write an object under a condition (header, value); return its etag."""
        request: dict[str, Any] = {**_name(uri), "Body": data}
        if condition is not None:
            request[condition[0].replace("-", "")] = condition[1]
        if write_id:
            request["Metadata"] = {_WRITE_ID: write_id}
        return _strip(self._call("put_object", **request)["ETag"])

    def look_up(self, uri: str) -> Head | None:
        """Return what a writer wants to know of an object, or None if it is not there."""
        try:
            head = self._call("head_object", **_name(uri))
        except FileNotFoundError:
            return None
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        age_s = (now - head["LastModified"]).total_seconds()
        return Head(_strip(head["ETag"]), head["Metadata"].get(_WRITE_ID, ""), age_s)

    def conditional_version(self, _data: bytes, version: str) -> str:
        """Return the version that ``put_if`` compares: the etag."""
        return version

    def delete(self, uris: Iterable[str]) -> None:
        """Delete objects; missing ones are fine."""
        self._run(self._delete([_name(uri) for uri in uris]))

    def delete_if(self, uri: str, *, version: str) -> None:
        """Delete an object if its etag is still ``version``.

        A store that does not know the condition says so or ignores it; a look comes before.
        """
        head = self.look_up(uri)
        if head is None or head.etag != version:
            return
        try:
            self._call("delete_object", **_name(uri), IfMatch=f'"{version}"')
        except Exception as error:
            if status_of(error) == 501:
                self.delete([uri])
            elif status_of(error) not in (404, 412):
                raise

    def upload(self, local_path: Path, uri: str) -> None:
        """Copy a file; large ones in parts, which show only once all of them are there."""
        if local_path.stat().st_size <= _PART_BYTES:
            self.put(uri, local_path.read_bytes())
            return
        target = _name(uri)
        write_id = uuid.uuid4().hex
        started = self._call("create_multipart_upload", **target, Metadata={_WRITE_ID: write_id})
        target["UploadId"] = started["UploadId"]
        try:
            parts = self._upload_parts(local_path, target, uri=uri)
            complete = functools.partial(
                self._complete, uri, target, parts=parts, write_id=write_id
            )
            retry(complete, action="write", uri=uri, attempts=self._attempts)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one that tells
                self._call("abort_multipart_upload", **target)
            raise

    def _complete(
        self, uri: str, target: dict[str, str], *, parts: list[dict[str, Any]], write_id: str
    ) -> None:
        try:
            self._call("complete_multipart_upload", **target, MultipartUpload={"Parts": parts})
        except FileNotFoundError:
            head = self.look_up(uri)
            if head is None or head.write_id != write_id:  # else done, and its answer was lost
                raise

    def _upload_parts(
        self, local_path: Path, target: dict[str, str], *, uri: str
    ) -> list[dict[str, Any]]:
        size_bytes = local_path.stat().st_size
        part_bytes = max(_PART_BYTES, math.ceil(size_bytes / _MOST_PARTS))

        def send(index: int) -> dict[str, Any]:
            with local_path.open("rb") as file:
                file.seek(index * part_bytes)
                data = file.read(part_bytes)
            request = {**target, "PartNumber": index + 1, "Body": data}
            answer = retry(
                lambda: self._call("upload_part", **request),
                action=f"write part {index + 1} of",
                uri=uri,
                attempts=self._attempts,
            )
            return {"PartNumber": index + 1, "ETag": answer["ETag"]}

        pool = ThreadPoolExecutor(_UPLOAD_THREADS)
        try:
            return list(pool.map(send, range(math.ceil(size_bytes / part_bytes))))
        finally:
            pool.shutdown(cancel_futures=True)

    def _list(self, bucket: str, prefix: str) -> list[ObjectInfo]:
        found: list[ObjectInfo] = []
        request = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": _LIST_PAGE}
        while True:
            page = retry(
                lambda: self._call("list_objects_v2", **request),
                action="list",
                uri=f"s3://{bucket}/{prefix}",
                attempts=self._attempts,
            )
            objects = page.get("Contents", ())
            found.extend(_describe(bucket, o) for o in objects if is_listed(o["Key"]))
            if not page.get("IsTruncated"):
                return found
            request["ContinuationToken"] = page["NextContinuationToken"]

    async def _get(self, request: dict[str, str], *, start: int, stop: int | None) -> Span:
        answer = await self._filesystem._call_s3("get_object", **request)
        size_bytes, data_start = _measure(answer)
        end = size_bytes if stop is None else min(stop, size_bytes)
        body = await _read_body(answer["Body"], answer["ContentLength"])
        data = body[start - data_start : end - data_start] if data_start <= start else b""
        if not data and start < end:
            raise RetryError(f"{len(body)} bytes came from {data_start}, none from {start} on")
        return Span(data, size_bytes, _strip(answer["ETag"]))

    async def _delete(self, objects: list[dict[str, str]]) -> None:
        for first in range(0, len(objects), _DELETES_AT_ONCE):
            batch = objects[first : first + _DELETES_AT_ONCE]
            call = self._filesystem._call_s3
            requests = [call("delete_object", **name) for name in batch]
            for error in await asyncio.gather(*requests, return_exceptions=True):
                if isinstance(error, BaseException) and status_of(error) != 404:
                    raise error

    def _call(self, method: str, **request: Any) -> Any:
        return self._run(self._filesystem._call_s3(method, **request))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for ``work`` on the file system's own event loop; safe from any thread."""
        future = asyncio.run_coroutine_threadsafe(work, self._filesystem.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


async def _read_body(body: Any, size_bytes: int) -> bytes:
    """Read an answer's body; after a fault return what had come, if anything had."""
    pieces: list[bytes] = []
    received = 0
    async with body as stream:
        try:
            while received < size_bytes:
                piece = await stream.read(_BODY_PIECE_BYTES)
                if not piece:
                    break
                pieces.append(piece)
                received += len(piece)
        except Exception as error:
            if not received or not is_passing(error):
                raise
    return b"".join(pieces)


def _measure(answer: dict[str, Any]) -> tuple[int, int]:
    """Return the size of the whole object, and where the body starts in it, in bytes."""
    content_range = answer.get("ContentRange")
    if content_range is None:  # all of it, whatever was asked for
        return answer["ContentLength"], 0
    positions, _, size = content_range.removeprefix("bytes ").partition("/")
    return int(size), int(positions.partition("-")[0])


def split_uri(uri: str) -> tuple[str, str]:
    """Return bucket and key; the key is empty for a whole bucket."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _name(uri: str) -> dict[str, str]:
    """Return the bucket and the key as S3 requests name them."""
    bucket, key = split_uri(uri)
    if not key:
        raise ObjectMissingError(f"{uri!r} is a bucket, not an object; add a key")
    return {"Bucket": bucket, "Key": key}


def _describe(bucket: str, listed: dict[str, Any]) -> ObjectInfo:
    return ObjectInfo(
        uri=f"s3://{bucket}/{listed['Key']}",
        size_bytes=listed["Size"],
        version=_strip(listed["ETag"]),
        modified_s=listed["LastModified"].timestamp(),
    )


def _strip(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')
