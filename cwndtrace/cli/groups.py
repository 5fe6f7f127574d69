# SPDX-License-Identifier: Apache-2.0
"""The table of groups of connections, for ``report`` and for the summary of ``run``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pandas as pd

from cwndtrace import format as fmt
from cwndtrace.cli.table import Column, cells, cut, cut_connection, cut_middle, cut_service, prose, room, table
from cwndtrace.format import clean
from cwndtrace.present import groups as in_words
from cwndtrace.present import text

_COLUMNS: Final = (
    Column("WORKLOAD", least=16, shorten=cut_middle),
    Column("SERVICE", least=14, shorten=cut_service),
    Column("PEERS", least=18),
    Column("CONNECTIONS", 1, right=True),
    Column("RESETS", 2, right=True),
    Column("HARMFUL", 5, right=True),
    Column("COST", right=True),
    # The cause stays, and its share goes first.
    Column("CAUSE", 4, least=11, shorten=lambda cause, most: cut(cause.partition(" (")[0], most)),
    Column("WORST CONNECTION", 3, least=31, shorten=cut_connection),
    Column("ITS COST", 6, right=True),
)


def lines(groups: pd.DataFrame, connections: pd.DataFrame, by: str, most: int) -> Iterator[str]:
    """Yield the first ``most`` rows of ``Trace.groups(by)`` as a table, and a line on the others.

    ``connections`` is ``Trace.summary()``. Columns in which no row has anything are left out.
    """
    shown = groups.head(most).to_dict("records")
    if not shown:
        return
    by_key = connections.set_index("connection")
    rows = []
    for row in shown:
        worst = by_key.loc[row["worst"]].to_dict()
        names = in_words.names(row)
        rows.append(
            (
                *(names.get(name, "-") for name in in_words.HEADS),
                f"{row['connections']:,}",
                f"{row['resets']:,}",
                f"{row['resets_harmful']:,}",
                text.cost(row),
                in_words.cause(row),
                # Of connections that were never reset, none is worse than another.
                clean(fmt.connection(worst)) if row["resets"] else "-",
                text.cost(worst) if row["resets"] else "-",
                in_words.verdict(row),
            )
        )
    briefs = {in_words.verdict(row): in_words.verdict(row, text.brief(row["verdict"])) for row in shown}
    least = max(map(cells, briefs.values()))
    verdicts = Column("VERDICT", least=least, shorten=lambda label, most: cut(briefs.get(label, label), most))
    columns = (*_COLUMNS, verdicts)
    kept = [n for n, column in enumerate(columns) if column.title == by.upper() or any(row[n] != "-" for row in rows)]
    yield from table([columns[n] for n in kept], [[row[n] for n in kept] for row in rows])
    if len(groups) > most:
        yield from prose(in_words.more(groups.iloc[most:], in_words.NOUNS[by]), room(), indent=2)
