"""Writing a folder in parts: resumable, and the same bytes for any number of processes.

`job.json` holds the request and `shard-000000.json` the entry of each finished part. When all parts
are there, the record (`manifest.json`, ...) is written and these files are removed.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from tqdm import tqdm

from tokenizer.data.source import Skipped
from tokenizer.files import write_json
from tokenizer.shards import Samples
from tokenizer.stop import check_launcher

JOB_FILE = "job.json"

Output = tuple[Samples, list[tuple[str, str]]]  # of one batch; key and reason of what was skipped


class Sink(Protocol):
    """Where the samples of one part go."""

    def add(self, samples: Samples) -> None:
        """Take some samples."""
        ...

    def finish(self) -> dict[str, Any]:
        """Publish the part and return its entry."""
        ...


class Job:
    """The parts of one request.

    Args:
        out: the folder to write.
        request: the fields of the record that are known before the work is done; they decide every
            byte of the result, so another request for the same folder is refused.
        record: name of the file that makes the folder complete.
        num_items: inputs; part i takes the inputs from i * part_size on.
    """

    def __init__(
        self, out: Path, request: dict[str, Any], record: str, *, num_items: int, part_size: int
    ) -> None:
        self.out = out
        self.request = request
        self.record = out / record
        self._num_items = num_items
        self._part_size = part_size
        self.num_parts = -(-num_items // part_size)

    def run(
        self,
        accelerator: Accelerator,
        *,
        batch_size: int,
        process: Callable[[Sequence[range]], Iterable[Output]],
        open_sink: Callable[[int], Sink],
        finish: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        ignored: Skipped | None = None,
    ) -> None:
        """Do what is left of the job and report.

        Args:
            batch_size: inputs that are processed at a time; batches never cross parts.
            process: maps ranges of inputs to one output each, in order.
            open_sink: makes the sink of a part.
            finish: maps the entries of all parts to further fields of the record, in the main
                process, before that is written; by default they are its `shards`.
            ignored: inputs left out beforehand, to be counted with the skipped ones.
        """
        self._check_request()
        accelerator.wait_for_everyone()  # all have read what the main process may remove
        if self.record.is_file():
            if accelerator.is_main_process:
                self._remove_parts()  # left by a kill just after the record was written
            accelerator.print(f"{self.out} is complete: nothing to do")
            return
        if accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / JOB_FILE, self.request)
        accelerator.wait_for_everyone()
        left = [part for part in range(self.num_parts) if self._entry(part) is None]
        accelerator.wait_for_everyone()  # all have looked before the first part is added
        self._write(accelerator, left, batch_size, process, open_sink)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self._complete(finish, ignored or Skipped())
        accelerator.wait_for_everyone()

    def _write(
        self,
        accelerator: Accelerator,
        left: list[int],
        batch_size: int,
        process: Callable[[Sequence[range]], Iterable[Output]],
        open_sink: Callable[[int], Sink],
    ) -> None:
        """Write this process's share of the parts that are left."""
        mine = left[accelerator.process_index :: accelerator.num_processes]
        batches = [(part, batch) for part in mine for batch in self._batches(part, batch_size)]
        if len(left) < self.num_parts:
            done = self.num_parts - len(left)
            accelerator.print(f"{self.out}: {done} of {self.num_parts} shards are there already")
        outputs: Iterator[Output] = iter(process([batch for _, batch in batches]))
        sink, skipped = None, Skipped()
        with tqdm(
            total=sum(len(batch) for _, batch in batches),
            unit="image",
            desc="images of this process" if accelerator.num_processes > 1 else None,
            disable=not accelerator.is_main_process,
        ) as progress:
            for (part, batch), (samples, missing) in zip(batches, outputs, strict=True):
                check_launcher()
                sink = sink or open_sink(part)
                sink.add(samples)
                for key, reason in missing:
                    skipped.add(key, reason)
                progress.update(len(batch))
                if batch.stop == self._inputs(part).stop:
                    entry = {**sink.finish(), "skipped": skipped.to_json()}
                    write_json(self._entry_path(part), entry)
                    sink, skipped = None, Skipped()

    def _complete(
        self,
        finish: Callable[[list[dict[str, Any]]], dict[str, Any]] | None,
        skipped: Skipped,
    ) -> None:
        entries = [self._entry(part) for part in range(self.num_parts)]
        found = [entry for entry in entries if entry is not None]
        assert len(found) == self.num_parts
        for entry in found:
            skipped.merge(entry.pop("skipped"))
        num_samples = sum(entry["num_samples"] for entry in found)
        if not num_samples:
            raise ValueError(f"{self.out}: nothing could be used: {skipped}")
        results = {"num_samples": num_samples, "skipped": skipped.to_json()}
        parts = finish(found) if finish else {"shards": found}
        write_json(self.record, {**self.request, **results, **parts})
        self._remove_parts()
        print(f"wrote {num_samples:,} samples ({self.num_parts} shards) to {self.out}")
        if skipped.reasons:
            print(f"skipped {skipped}; {self.record} names them:", *skipped.examples, sep="\n  ")

    def _check_request(self) -> None:
        """Raise ValueError where the folder belongs to another request."""
        for path in (self.record, self.out / JOB_FILE):
            if not path.is_file():
                continue
            before = json.loads(path.read_text())
            changed = [name for name in self.request if not self._same(name, before.get(name))]
            if changed:
                raise ValueError(
                    f"{self.out} was begun with another {', '.join(changed)} (see {path.name}): "
                    "set out=ANOTHER_FOLDER or remove this one"
                )

    def _same(self, name: str, before: Any) -> bool:
        # Values as JSON has them. A checkpoint may be called by another path: its digest counts.
        now = json.loads(json.dumps(self.request[name]))
        if name == "tokenizer" and isinstance(before, dict):
            return now["digest"] == before.get("digest")
        return now == before

    def _inputs(self, part: int) -> range:
        start = part * self._part_size
        return range(start, min(start + self._part_size, self._num_items))

    def _batches(self, part: int, batch_size: int) -> list[range]:
        inputs = self._inputs(part)
        return [inputs[i : i + batch_size] for i in range(0, len(inputs), batch_size)]

    def _entry_path(self, part: int) -> Path:
        return self.out / f"shard-{part:06d}.json"

    def _entry(self, part: int) -> dict[str, Any] | None:
        """Return the entry of a finished part whose file, if it names one, is there in full."""
        path = self._entry_path(part)
        if not path.is_file():
            return None
        entry = json.loads(path.read_text())
        if "file" in entry:
            file = self.out / entry["file"]
            if not file.is_file() or file.stat().st_size != entry["size"]:
                return None
        return entry

    def _remove_parts(self) -> None:
        for part in range(self.num_parts):
            self._entry_path(part).unlink(missing_ok=True)
        (self.out / JOB_FILE).unlink(missing_ok=True)
