"""MovieLens 100K: who rated what, with what is known of both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torchfolio.data.places import folder_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["movielens"]

GENRES = (
    "unknown", "action", "adventure", "animation", "children", "comedy", "crime", "documentary", "drama", "fantasy",
    "film_noir", "horror", "musical", "mystery", "romance", "sci_fi", "thriller", "war", "western",
)  # fmt: skip


def movielens(*, root: str | Path | None = None) -> pd.DataFrame:
    """100,000 ratings, a row each, in the order of time.

    Columns: `user`, `item`, `rating` (1 to 5), `timestamp`; of the user `age`, `gender`, `occupation`, `zip`; of the
    film `title`, `year` (0 where it is unknown) and `genres` (names joined by `|`).

    Raises:
        DataNotFound: if it is nowhere.
    """
    import pandas as pd

    folder = folder_of("ml-100k", "u.data", root)
    ratings = pd.read_csv(folder / "u.data", sep="\t", names=["user", "item", "rating", "timestamp"])
    users = pd.read_csv(folder / "u.user", sep="|", names=["user", "age", "gender", "occupation", "zip"])
    columns = ["item", "title", "release", "video", "url", *GENRES]
    items = pd.read_csv(folder / "u.item", sep="|", names=columns, encoding="latin-1")
    flags = items[list(GENRES)].to_numpy(bool)
    items["genres"] = ["|".join(g for g, flag in zip(GENRES, row, strict=True) if flag) for row in flags]
    years = items["release"].fillna("").astype(str).str[-4:]
    items["year"] = [int(year) if year.isdigit() else 0 for year in years]
    merged = ratings.merge(users, on="user").merge(items[["item", "title", "year", "genres"]], on="item")
    return merged.sort_values(["timestamp", "user", "item"], ignore_index=True)
