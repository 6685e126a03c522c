"""Rollouts that a worker drew while another one was drawing earlier rollouts of the same question.

Their latents come back with them, and the driver compares them with the earlier ones once it has those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa

from latent_tts.pipeline.drawer import Part, directions, directions_key


class EarlyParts:
    """Parts with rollouts that are still to be compared, and the sums of directions that these are compared with.

    Attributes:
        keys: row keys of questions of which some worker has had early rollouts; their sums are not dropped.
    """

    def __init__(self, latents: str) -> None:
        """Begin empty; `latents` is the digest of the run's latents, see `directions_key`."""
        self._latents, self.keys = latents, set[str]()
        self._waiting: list[Part] = []

    def compared(self, parts: Iterable[Part]) -> Iterator[Part]:
        """Those of some parts, and of parts before, whose rollouts are compared with all those before them by now."""
        for part in parts:
            for key, (count, sums_TD) in part.sums.items():
                directions.put(self._name(key), count, sums_TD, kept=self._kept)
            if part.early:
                self._waiting.append(part)
            else:
                yield part
            while (index := next((i for i, each in enumerate(self._waiting) if self._is_next(each)), None)) is not None:
                yield self._compare(self._waiting.pop(index))

    @property
    def _kept(self) -> set[str]:
        return set(map(self._name, self.keys))

    def _name(self, key: str) -> str:
        return directions_key(self._latents, key)

    def _is_next(self, part: Part) -> bool:
        """Whether the sums of each of its early questions hold the rollouts before."""
        return all(directions.counted(self._name(key)) == _rows_of(part, key)[1] for key in part.early)

    def _compare(self, part: Part) -> Part:
        assert part.make_table is not None
        assert part.latents_RTD is not None
        table = part.make_table()
        column = table.column_names.index("dissimilarity")
        compared = table[column].to_pylist()
        for key in part.early:
            rows, first = _rows_of(part, key)
            summed_NT = directions.add([self._name(key)], part.latents_RTD[rows], first=[first], kept=self._kept)
            for row, summed_T in zip(rows, summed_NT.tolist(), strict=True):
                compared[row] = summed_T[: len(compared[row])]
        field = table.schema.field(column)
        return part.with_table(table.set_column(column, field, pa.array(compared, field.type)))


def _rows_of(part: Part, key: str) -> tuple[list[int], int]:
    """The rows of a question in a part, and the number of its first rollout there."""
    rows = [row for row, (own, _) in enumerate(part.places) if own == key]
    return rows, part.places[rows[0]][1]
